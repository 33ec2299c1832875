// The arithmetic of experts and of every fixed matrix, for the rows of a decode step: plain weights, read once.

#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/ops/empty.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <cstring>
#include <numeric>
#include <optional>
#include <vector>

#include "exchange.h"
#include "products.h"
#include "team.h"

namespace {

using evermoe::Lanes;
using evermoe::Team;
using Vec = at::vec::Vectorized<float>;
constexpr int64_t kChunkBytes = 1 << 17;  // of weights: it stays in the second-level cache for all rows
constexpr int64_t kWidest = 64;           // rows that one buffer of sums holds

template <typename T>
inline std::tuple<Vec, Vec> wide(const T* from) {
  if constexpr (std::is_same_v<T, at::BFloat16>) {
    return at::vec::convert_bfloat16_float(at::vec::Vectorized<T>::loadu(from));
  } else {
    return {Vec::loadu(from), Vec::loadu(from + Vec::size())};
  }
}

template <typename T>
inline void narrow(const Vec& low, const Vec& high, T* to) {
  if constexpr (std::is_same_v<T, at::BFloat16>) {
    at::vec::convert_float_bfloat16(low, high).store(to);
  } else {
    low.store(to);
    high.store(to + Vec::size());
  }
}

template <typename T>
inline Vec rounded(const Vec& x) {
  if constexpr (std::is_same_v<T, at::BFloat16>) {
    return std::get<0>(at::vec::convert_bfloat16_float(at::vec::convert_float_bfloat16(x, x)));
  } else {
    return x;
  }
}

// Weights [outs, depth] in chunks of about kChunkBytes; a chunk is a multiple of `step` weights.
inline int64_t chunk_of(int64_t depth, int64_t bytes, int64_t outs, int64_t step) {
  return std::min(outs, std::max<int64_t>(1, kChunkBytes / (depth * bytes) / step) * step);
}

inline int64_t pieces(int64_t all, int64_t each) { return (all + each - 1) / each; }

// One expert's rows and weights.
template <typename T>
struct Segment {
  const T* rows;
  const T *up, *down;
  T *inner, *out;
  int64_t count, step;
};

// silu(gate) * up of `outs` columns; every result is rounded as where the modeling code makes tensors of it.
template <typename T>
void gated(const T* x, int64_t x_step, int64_t rows, const T* gate, const T* up, int64_t outs, int64_t depth, T* to,
           int64_t to_step) {
  thread_local std::vector<float> sums;
  sums.resize(2 * kWidest * outs);
  for (int64_t m = 0; m < rows; m += kWidest) {
    const int64_t count = std::min(kWidest, rows - m);
    float *g = sums.data(), *u = g + count * outs;
    evermoe::product(x + m * x_step, x_step, count, gate, outs, depth, g, outs);
    evermoe::product(x + m * x_step, x_step, count, up, outs, depth, u, outs);
    for (int64_t r = 0; r < count; ++r)
      for (int64_t i = 0; i < outs; i += 2 * Vec::size()) {
        const auto activated = [&](int64_t at) {
          const Vec x = rounded<T>(Vec::loadu(g + r * outs + at));
          return rounded<T>(x / (Vec(1.0f) + x.neg().exp())) * rounded<T>(Vec::loadu(u + r * outs + at));
        };
        narrow(activated(i), activated(i + Vec::size()), to + (m + r) * to_step + i);
      }
  }
}

// x . w + bias of `outs` columns.
template <typename T>
void plain(const T* x, int64_t rows, const T* w, int64_t outs, int64_t depth, const T* bias, T* to, int64_t to_step) {
  thread_local std::vector<float> sums;
  sums.resize(kWidest * outs);
  for (int64_t m = 0; m < rows; m += kWidest) {
    const int64_t count = std::min(kWidest, rows - m);
    evermoe::product(x + m * depth, depth, count, w, outs, depth, sums.data(), outs);
    for (int64_t r = 0; r < count; ++r)
      for (int64_t i = 0; i < outs; i += 2 * Vec::size()) {
        Vec low = Vec::loadu(sums.data() + r * outs + i), high = Vec::loadu(sums.data() + r * outs + i + Vec::size());
        if (bias) {
          const auto [b0, b1] = wide(bias + i);
          low = low + b0;
          high = high + b1;
        }
        narrow(low, high, to + (m + r) * to_step + i);
      }
  }
}

template <typename T>
void run(const at::Tensor& rows, at::IntArrayRef counts, at::TensorList up, at::TensorList down, at::Tensor& out) {
  const int64_t hidden = rows.size(1), width = down[0].size(1), step = 2 * Vec::size();
  const at::Tensor inner = at::empty({rows.size(0), width}, rows.options());
  std::vector<Segment<T>> segments;
  int64_t start = 0;
  for (size_t e = 0; e < counts.size(); ++e) {
    segments.push_back({rows.const_data_ptr<T>() + start * rows.stride(0), up[e].const_data_ptr<T>(),
                        down[e].const_data_ptr<T>(), inner.mutable_data_ptr<T>() + start * width,
                        out.mutable_data_ptr<T>() + start * hidden, counts[e], rows.stride(0)});
    start += counts[e];
  }
  const int64_t many = static_cast<int64_t>(segments.size());
  const int64_t wide = chunk_of(2 * hidden, sizeof(T), width, step), ups = pieces(width, wide);
  Team::shared().run(many * ups, [&](int64_t chunk) {
    const Segment<T>& s = segments[chunk / ups];
    const int64_t at = chunk % ups * wide, outs = std::min(wide, width - at);
    gated(s.rows, s.step, s.count, s.up + at * hidden, s.up + (width + at) * hidden, outs, hidden, s.inner + at, width);
  });
  const int64_t tall = chunk_of(width, sizeof(T), hidden, step), downs = pieces(hidden, tall);
  Team::shared().run(many * downs, [&](int64_t chunk) {
    const Segment<T>& s = segments[chunk / downs];
    const int64_t at = chunk % downs * tall, outs = std::min(tall, hidden - at);
    plain<T>(s.inner, s.count, s.down + at * width, outs, width, nullptr, s.out + at, hidden);
  });
}

bool dense(const at::Tensor& tensor, at::ScalarType dtype) {
  return tensor.scalar_type() == dtype && tensor.is_contiguous();
}

// down(silu(gate) * up) of rows [N, H] sorted by expert, counts[e] of each; up[e] [2W, H], down[e] [H, W]; into out.
void expert_ffn(const at::Tensor& rows, at::IntArrayRef counts, at::TensorList up, at::TensorList down,
                at::Tensor& out) {
  const auto dtype = rows.scalar_type();
  TORCH_CHECK(counts.size() == up.size() && up.size() == down.size() && rows.stride(1) == 1 && dense(out, dtype));
  const int64_t hidden = rows.size(1);
  TORCH_CHECK(out.sizes() == rows.sizes() && std::accumulate(counts.begin(), counts.end(), int64_t{0}) == rows.size(0));
  for (size_t e = 0; e < up.size(); ++e) {
    TORCH_CHECK(dense(up[e], dtype) && dense(down[e], dtype) && counts[e] >= 0);
    TORCH_CHECK(up[e].size(1) == hidden && down[e].size(0) == hidden && up[e].size(0) == 2 * down[e].size(1),
                "rows of ", hidden, " numbers do not fit the weights");
  }
  if (counts.empty()) return;
  if (dtype == at::kFloat) {
    run<float>(rows, counts, up, down, out);
  } else if constexpr (Lanes<at::BFloat16>::kHere) {
    TORCH_CHECK(dtype == at::kBFloat16, "expert_ffn takes float32 and bfloat16");
    run<at::BFloat16>(rows, counts, up, down, out);
  } else {
    TORCH_CHECK(false, "no bfloat16 here");
  }
}

template <typename T>
void multiply(const at::Tensor& rows, const at::Tensor& weight, const T* bias, at::Tensor& out) {
  const int64_t depth = weight.size(1), outs = weight.size(0), count = rows.numel() / depth;
  const int64_t each = chunk_of(depth, sizeof(T), outs, 2 * Vec::size());
  Team::shared().run(pieces(outs, each), [&](int64_t chunk) {
    const int64_t at = chunk * each, mine = std::min(each, outs - at);
    plain<T>(rows.const_data_ptr<T>(), count, weight.const_data_ptr<T>() + at * depth, mine, depth,
             bias ? bias + at : nullptr, out.mutable_data_ptr<T>() + at, outs);
  });
}

// rows [..., in] by weight [out, in] and bias [out]: [..., out].
at::Tensor product(const at::Tensor& rows, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  const auto dtype = rows.scalar_type();
  const at::Tensor in = rows.contiguous();
  TORCH_CHECK(dense(weight, dtype) && (!bias || dense(*bias, dtype)));
  auto shape = rows.sizes().vec();
  shape.back() = weight.size(0);
  at::Tensor out = at::empty(shape, rows.options());
  if (dtype == at::kFloat) {
    multiply<float>(in, weight, bias ? bias->const_data_ptr<float>() : nullptr, out);
  } else if constexpr (Lanes<at::BFloat16>::kHere) {
    TORCH_CHECK(dtype == at::kBFloat16, "product takes float32 and bfloat16");
    multiply<at::BFloat16>(in, weight, bias ? bias->const_data_ptr<at::BFloat16>() : nullptr, out);
  } else {
    TORCH_CHECK(false, "no bfloat16 here");
  }
  return out;
}

// Products that compiled layers of this thread ask for: number `slot` of a layer is at first[layer] + slot.
struct Products {
  std::vector<at::Tensor> weights, biases;
  std::vector<int64_t> first;
  int64_t most_rows = 0;
};
thread_local Products products;

// From now on this thread's layers get these products without Python, for up to `most_rows` rows; an empty bias is none.
void products_of(at::TensorList weights, at::TensorList biases, at::IntArrayRef first, int64_t most_rows) {
  TORCH_CHECK(weights.size() == biases.size() && (first.empty() || first.back() == (int64_t)weights.size()));
  products = {weights.vec(), biases.vec(), first.vec(), most_rows};
}

// A compiled layer's product number `slot`: see gateway/layer_ops.py, which answers what is not known here.
at::Tensor linear(const at::Tensor& rows, const at::Tensor& layer, int64_t slot, int64_t out) {
  const int64_t number = *layer.const_data_ptr<int64_t>();
  const auto& first = products.first;
  if (number >= 0 && number + 1 < static_cast<int64_t>(first.size()) && slot < first[number + 1] - first[number]) {
    const at::Tensor &weight = products.weights[first[number] + slot], &bias = products.biases[first[number] + slot];
    if (rows.scalar_type() == weight.scalar_type() && rows.numel() <= products.most_rows * weight.size(1))
      return product(rows, weight, bias.numel() ? std::optional(bias) : std::nullopt);
  }
  static const auto python = c10::Dispatcher::singleton()
                                 .findSchemaOrThrow("evermoe::linear_in_python", "")
                                 .typed<at::Tensor(const at::Tensor&, const at::Tensor&, int64_t, int64_t)>();
  return python.call(rows, layer, slot, out);
}

// sum over k of weights[t, k] * rows[place[t * K + k]], in fp32 and in the order of k.
template <typename T>
void sum(const T* rows, const int64_t* place, const float* weights, T* out, int64_t tokens, int64_t top_k,
         int64_t width) {
  constexpr int64_t step = 2 * Vec::size();
  constexpr int64_t kGrain = 1 << 16;
  const int64_t each = std::max<int64_t>(1, kGrain / (width * top_k));
  Team::shared().run(pieces(tokens, each), [&](int64_t chunk) {
    for (int64_t t = chunk * each; t < std::min(tokens, (chunk + 1) * each); ++t) {
      for (int64_t i = 0; i < width; i += step) {
        Vec low(0.0f), high(0.0f);
        for (int64_t k = 0; k < top_k; ++k) {
          const Vec weight(weights[t * top_k + k]);
          const auto [a, b] = wide(rows + place[t * top_k + k] * width + i);
          low = at::vec::fmadd(weight, a, low);
          high = at::vec::fmadd(weight, b, high);
        }
        narrow(low, high, out + t * width + i);
      }
    }
  });
}

at::Tensor weighted_sum(const at::Tensor& rows, const at::Tensor& place, const at::Tensor& weights) {
  const int64_t tokens = weights.size(0), top_k = weights.size(1), width = rows.size(1);
  TORCH_CHECK(rows.is_contiguous() && place.is_contiguous() && weights.is_contiguous());
  at::Tensor out = at::empty({tokens, width}, rows.options());
  const auto* at = place.const_data_ptr<int64_t>();
  const auto* by = weights.const_data_ptr<float>();
  if (rows.scalar_type() == at::kBFloat16) {
    sum(rows.const_data_ptr<at::BFloat16>(), at, by, out.mutable_data_ptr<at::BFloat16>(), tokens, top_k, width);
  } else {
    sum(rows.const_data_ptr<float>(), at, by, out.mutable_data_ptr<float>(), tokens, top_k, width);
  }
  return out;
}

// A layer's experts in one call: for each row t of hidden [T, H] the sum over k of weights[t, k] (fp32) times expert
// index[t, k]'s output; up[e] [2W, H], down[e] [H, W] of all experts.
at::Tensor mixture(const at::Tensor& hidden, const at::Tensor& index, const at::Tensor& weights, at::TensorList up,
                   at::TensorList down) {
  const int64_t tokens = index.size(0), top_k = index.size(1), pairs = tokens * top_k;
  const int64_t experts = static_cast<int64_t>(up.size()), bytes = hidden.size(1) * hidden.element_size();
  TORCH_CHECK(hidden.is_contiguous() && index.is_contiguous() && hidden.size(0) == tokens);
  const int64_t* choice = index.const_data_ptr<int64_t>();
  std::vector<int64_t> start(experts + 1, 0);
  for (int64_t i = 0; i < pairs; ++i) {
    TORCH_CHECK_INDEX(choice[i] >= 0 && choice[i] < experts, "there is no expert ", choice[i]);
    ++start[choice[i] + 1];
  }
  std::vector<int64_t> counts;
  std::vector<at::Tensor> ups, downs;
  for (int64_t e = 0; e < experts; ++e) {
    if (start[e + 1]) {
      counts.push_back(start[e + 1]);
      ups.push_back(up[e]);
      downs.push_back(down[e]);
    }
    start[e + 1] += start[e];
  }
  const at::Tensor place = at::empty({pairs}, index.options());
  const at::Tensor rows = at::empty({pairs, hidden.size(1)}, hidden.options());
  at::Tensor results = at::empty_like(rows);
  int64_t* at = place.mutable_data_ptr<int64_t>();
  const char* from = static_cast<const char*>(hidden.const_data_ptr());
  char* to = static_cast<char*>(rows.mutable_data_ptr());
  for (int64_t i = 0; i < pairs; ++i) {
    at[i] = start[choice[i]]++;
    std::memcpy(to + at[i] * bytes, from + i / top_k * bytes, bytes);
  }
  expert_ffn(rows, counts, ups, downs, results);
  return weighted_sum(results, place, weights);
}

// A replica's calls on the socket `fd`, in the arena number `arena` of `memory` (rows, then results), until one comes
// that is not of these slices (layer, expert) or of more than `most_rows` rows, or the `stamp` of `tally` is another;
// up[s] [2W, H], down[s] [H, W].
void serve(int64_t fd, int64_t arena, const at::Tensor& memory, at::IntArrayRef slices, at::TensorList up,
           at::TensorList down, int64_t most_rows, at::Tensor& tally, int64_t stamp) {
  TORCH_CHECK(slices.size() == 2 * up.size() && up.size() == down.size() && !up.empty() && memory.is_contiguous());
  TORCH_CHECK(dense(tally, at::kLong) && tally.numel() == evermoe::Tally::kNumbers);
  const auto dtype = down[0].scalar_type();
  evermoe::Served served{};
  for (size_t s = 0; s < up.size(); ++s) {
    TORCH_CHECK(dense(up[s], dtype) && dense(down[s], dtype) && down[s].size(0) == down[0].size(0));
    served.slices[evermoe::Served::key(slices[2 * s], slices[2 * s + 1])] = s;
  }
  served.up = up;
  served.down = down;
  served.memory = static_cast<char*>(memory.data_ptr());
  served.capacity = memory.nbytes() / 2;
  served.arena = arena;
  served.width = down[0].size(0);
  served.most_rows = most_rows;
  served.dtype = dtype;
  evermoe::serve_calls(static_cast<int>(fd), served, {tally.mutable_data_ptr<int64_t>(), stamp}, expert_ffn);
}

// How many threads share an operation from now on, in the whole process.
void share(int64_t threads) { Team::shared().resize(static_cast<int>(threads)); }

// Whether rows of `dtype` are multiplied here.
bool multiplies(at::ScalarType dtype) {
  return dtype == at::kFloat || (dtype == at::kBFloat16 && Lanes<at::BFloat16>::kHere);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(evermoe, library) {
  library.def("expert_ffn(Tensor rows, int[] counts, Tensor[] up, Tensor[] down, Tensor(a!) out) -> ()");
  library.def("mixture(Tensor hidden, Tensor index, Tensor weights, Tensor[] up, Tensor[] down) -> Tensor");
  library.def("product(Tensor rows, Tensor weight, Tensor? bias) -> Tensor");
  library.def("products_of(Tensor[] weights, Tensor[] biases, int[] first, int most_rows) -> ()", &products_of);
  library.def("weighted_sum(Tensor rows, Tensor place, Tensor weights) -> Tensor");
  library.def("lay_out(Tensor hidden, Tensor index, int[] parts, Tensor(a!) out) -> Tensor");
  library.def("send_calls(int[] fds, int[] heads, int[] segments) -> int[]", &evermoe::send_calls);
  library.def(
      "receive_replies(int[] fds, int[] seqs, int[] rows, int[] patience, int grace, Tensor(a!) headers) -> int[]");
  library.def(
      "serve(int fd, int arena, Tensor memory, int[] slices, Tensor[] up, Tensor[] down, int most_rows, "
      "Tensor(a!) tally, int stamp) -> ()");
  library.def("share(int threads) -> ()", &share);
  library.def("multiplies(ScalarType dtype) -> bool", &multiplies);
}

TORCH_LIBRARY_IMPL(evermoe, CPU, library) {
  library.impl("expert_ffn", &expert_ffn);
  library.impl("mixture", &mixture);
  library.impl("product", &product);
  library.impl("linear", &linear);
  library.impl("weighted_sum", &weighted_sum);
  library.impl("lay_out", &evermoe::lay_out);
  library.impl("receive_replies", &evermoe::receive_replies);
  library.impl("serve", &serve);
}

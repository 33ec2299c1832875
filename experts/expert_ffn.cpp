// The experts of one layer in one call: for each expert gate and up projection, silu(gate) * up, down projection.
//
// The products are oneDNN's own, with packed weights; what is saved is everything around them, a dozen small operations
// and as many passes through Python for each expert.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cstring>
#include <optional>

namespace {

using Vec = at::vec::Vectorized<float>;
constexpr int64_t kGrain = 1 << 15;

at::Tensor product(const at::Tensor& rows, const at::Tensor& packed) {
  using Linear = at::Tensor(const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, std::string_view,
                            c10::List<std::optional<at::Scalar>>, std::optional<std::string_view>);
  static const auto linear =
      c10::Dispatcher::singleton().findSchemaOrThrow("mkldnn::_linear_pointwise", "").typed<Linear>();
  return linear.call(rows, packed, std::nullopt, "none", c10::List<std::optional<at::Scalar>>(), "");
}

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

inline Vec silu(const Vec& x) { return x / (Vec(1.0f) + x.neg().exp()); }

// [n, 2 * width] to [n, width]; the activation is rounded before it is multiplied, as in the modeling code.
template <typename T>
void gate(const T* both, T* out, int64_t rows, int64_t width) {
  constexpr int64_t step = 2 * Vec::size();
  at::parallel_for(0, rows, std::max<int64_t>(1, kGrain / width), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const T* row = both + 2 * r * width;
      for (int64_t i = 0; i < width; i += step) {
        const auto [g0, g1] = wide(row + i);
        T rounded[step];
        narrow(silu(g0), silu(g1), rounded);
        const auto [a0, a1] = wide(rounded);
        const auto [u0, u1] = wide(row + width + i);
        narrow(a0 * u0, a1 * u1, out + r * width + i);
      }
    }
  });
}

template <typename T>
void run(const at::Tensor& rows, at::IntArrayRef counts, at::TensorList up, at::TensorList down, at::Tensor& out) {
  const int64_t hidden = out.size(1);
  int64_t start = 0;
  for (size_t e = 0; e < counts.size(); ++e) {
    const at::Tensor both = product(rows.narrow(0, start, counts[e]), up[e]);
    const int64_t width = both.size(1) / 2;
    at::Tensor inner = at::empty({counts[e], width}, rows.options());
    gate<T>(both.const_data_ptr<T>(), inner.mutable_data_ptr<T>(), counts[e], width);
    const at::Tensor result = product(inner, down[e]);
    std::memcpy(out.mutable_data_ptr<T>() + start * hidden, result.const_data_ptr<T>(),
                counts[e] * hidden * sizeof(T));
    start += counts[e];
  }
}

// rows [N, H] sorted by expert, counts[e] of each; packed up[e] and down[e]; into out [N, H].
void expert_ffn(const at::Tensor& rows, at::IntArrayRef counts, at::TensorList up, at::TensorList down,
                at::Tensor& out) {
  TORCH_CHECK(counts.size() == up.size() && up.size() == down.size() && out.is_contiguous());
  if (rows.scalar_type() == at::kBFloat16) {
    run<at::BFloat16>(rows, counts, up, down, out);
  } else {
    TORCH_CHECK(rows.scalar_type() == at::kFloat, "expert_ffn takes float32 and bfloat16");
    run<float>(rows, counts, up, down, out);
  }
}

// sum over k of weights[t, k] * rows[place[t * K + k]], in fp32 and in the order of k.
template <typename T>
void sum(const T* rows, const int64_t* place, const float* weights, T* out, int64_t tokens, int64_t top_k,
         int64_t width) {
  constexpr int64_t step = 2 * Vec::size();
  at::parallel_for(0, tokens, std::max<int64_t>(1, kGrain / (width * top_k)), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
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

}  // namespace

TORCH_LIBRARY_FRAGMENT(evermoe, library) {
  library.def("expert_ffn(Tensor rows, int[] counts, Tensor[] up, Tensor[] down, Tensor(a!) out) -> ()");
  library.def("weighted_sum(Tensor rows, Tensor place, Tensor weights) -> Tensor");
}

TORCH_LIBRARY_IMPL(evermoe, CPU, library) {
  library.impl("expert_ffn", &expert_ffn);
  library.impl("weighted_sum", &weighted_sum);
}

TORCH_LIBRARY_IMPL(evermoe, MkldnnCPU, library) { library.impl("expert_ffn", &expert_ffn); }

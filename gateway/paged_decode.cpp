// Attention of decoding rows over the paged KV cache: each row against its own sequence, block by block, no copies.
//
// torch has no CPU kernel that reads a block table; gathering the blocks first costs as much as the attention itself.
// A task is one sequence and one key head with the query heads that share it. Sums are fp32.

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <vector>

#include "../experts/team.h"

namespace {

using Vec = at::vec::Vectorized<float>;
constexpr int64_t kLanes = Vec::size();

// `count` numbers (a multiple of the vector's width) as floats.
template <typename T>
inline void widen(const T* from, float* to, int64_t count) {
  if constexpr (std::is_same_v<T, float>) {
    std::copy(from, from + count, to);
  } else {
    using Half = at::vec::Vectorized<T>;
    int64_t i = 0;
    for (; i + Half::size() <= count; i += Half::size()) {
      const auto [low, high] = [&] {
        if constexpr (std::is_same_v<T, at::BFloat16>) return at::vec::convert_bfloat16_float(Half::loadu(from + i));
        else return at::vec::convert_half_float(Half::loadu(from + i));
      }();
      low.store(to + i);
      high.store(to + i + kLanes);
    }
    for (; i < count; ++i) to[i] = static_cast<float>(from[i]);
  }
}

inline float sum_of(const Vec& lanes) {
  return at::vec::vec_reduce_all<float>([](const Vec& x, const Vec& y) { return x + y; }, lanes);
}

// scores[t] = query . rows[t]. With `N` vectors a row, known when compiled, the query stays in registers; N = 0: any.
template <int N>
inline void score(const float* query, const float* rows, int64_t dim, int64_t count, float* scores) {
  if constexpr (N > 0) {
    Vec q[N];
    for (int i = 0; i < N; ++i) q[i] = Vec::loadu(query + i * kLanes);
    for (int64_t t = 0; t < count; ++t) {
      Vec sum = q[0] * Vec::loadu(rows + t * dim);
      for (int i = 1; i < N; ++i) sum = at::vec::fmadd(q[i], Vec::loadu(rows + t * dim + i * kLanes), sum);
      scores[t] = sum_of(sum);
    }
  } else {
    for (int64_t t = 0; t < count; ++t) {
      Vec sum(0.0f);
      for (int64_t i = 0; i < dim; i += kLanes)
        sum = at::vec::fmadd(Vec::loadu(query + i), Vec::loadu(rows + t * dim + i), sum);
      scores[t] = sum_of(sum);
    }
  }
}

// sums += weights[t] * rows[t]
template <int N>
inline void mix(float* sums, const float* weights, const float* rows, int64_t dim, int64_t count) {
  if constexpr (N > 0) {
    Vec held[N];
    for (int i = 0; i < N; ++i) held[i] = Vec::loadu(sums + i * kLanes);
    for (int64_t t = 0; t < count; ++t) {
      const Vec weight(weights[t]);
      for (int i = 0; i < N; ++i) held[i] = at::vec::fmadd(weight, Vec::loadu(rows + t * dim + i * kLanes), held[i]);
    }
    for (int i = 0; i < N; ++i) held[i].store(sums + i * kLanes);
  } else {
    for (int64_t t = 0; t < count; ++t) {
      const Vec weight(weights[t]);
      for (int64_t i = 0; i < dim; i += kLanes)
        at::vec::fmadd(weight, Vec::loadu(rows + t * dim + i), Vec::loadu(sums + i)).store(sums + i);
    }
  }
}

template <typename Run>
inline void by_width(int64_t dim, const Run& run) {
  switch (dim / kLanes) {
    case 4: return run.template operator()<4>();
    case 8: return run.template operator()<8>();
    case 16: return run.template operator()<16>();
    default: return run.template operator()<0>();
  }
}

// In place: scores (padded to whole vectors) to their exponentials over `total`.
inline void softmax(float* scores, int64_t count, const float* sink) {
  float best = *std::max_element(scores, scores + count);
  if (sink) best = std::max(best, *sink);
  const Vec shift(best);
  Vec sums(0.0f);
  std::fill(scores + count, scores + (count + kLanes - 1) / kLanes * kLanes, -std::numeric_limits<float>::infinity());
  for (int64_t t = 0; t < count; t += kLanes) {
    const Vec e = (Vec::loadu(scores + t) - shift).exp();
    e.store(scores + t);
    sums = sums + e;
  }
  const Vec share(1.0f / (sum_of(sums) + (sink ? std::exp(*sink - best) : 0.0f)));
  for (int64_t t = 0; t < count; t += kLanes) (Vec::loadu(scores + t) * share).store(scores + t);
}

// Asks for memory that will be read next: blocks lie anywhere, which no hardware prefetcher foresees.
template <typename T>
inline void prefetch(const T* from, int64_t count) {
  const char* start = reinterpret_cast<const char*>(from);
  for (int64_t i = 0; i < count * static_cast<int64_t>(sizeof(T)); i += 64) __builtin_prefetch(start + i);
}

struct Shape {
  int64_t sequences, key_heads, group, key_dim, value_dim, blocks, block_size, width, longest;
};

// One task: scores of all cached tokens, softmax, weighted sum of the values.
template <typename T>
void attend(const Shape& s, const T* query, int64_t head_stride, const T* keys, const T* values, const int64_t* table,
            int64_t length, float scale, const float* mask, const float* sinks, T* out, std::vector<float>& scratch) {
  const int64_t key_step = s.block_size * s.key_dim, value_step = s.block_size * s.value_dim;
  const int64_t room = (s.longest + 2 * kLanes) / kLanes * kLanes;
  scratch.resize(s.group * (s.key_dim + room + s.value_dim) + s.block_size * std::max(s.key_dim, s.value_dim));
  float* q = scratch.data();
  float* scores = q + s.group * s.key_dim;
  float* sums = scores + s.group * room;
  float* rows = sums + s.group * s.value_dim;
  for (int64_t g = 0; g < s.group; ++g) {
    widen(query + g * head_stride, q + g * s.key_dim, s.key_dim);
    for (int64_t i = 0; i < s.key_dim; ++i) q[g * s.key_dim + i] *= scale;
  }
  for (int64_t t = 0; t < length; t += s.block_size) {
    const int64_t count = std::min(s.block_size, length - t);
    if (t + s.block_size < length) prefetch(keys + table[t / s.block_size + 1] * key_step, key_step);
    widen(keys + table[t / s.block_size] * key_step, rows, count * s.key_dim);
    by_width(s.key_dim, [&]<int N>() {
      for (int64_t g = 0; g < s.group; ++g) score<N>(q + g * s.key_dim, rows, s.key_dim, count, scores + g * room + t);
    });
  }
  for (int64_t g = 0; g < s.group; ++g) {
    if (mask)
      for (int64_t t = 0; t < length; ++t) scores[g * room + t] += mask[t];
    softmax(scores + g * room, length, sinks ? sinks + g : nullptr);
  }
  std::fill(sums, sums + s.group * s.value_dim, 0.0f);
  for (int64_t t = 0; t < length; t += s.block_size) {
    const int64_t count = std::min(s.block_size, length - t);
    if (t + s.block_size < length) prefetch(values + table[t / s.block_size + 1] * value_step, value_step);
    widen(values + table[t / s.block_size] * value_step, rows, count * s.value_dim);
    by_width(s.value_dim, [&]<int N>() {
      for (int64_t g = 0; g < s.group; ++g)
        mix<N>(sums + g * s.value_dim, scores + g * room + t, rows, s.value_dim, count);
    });
  }
  for (int64_t i = 0; i < s.group * s.value_dim; ++i) out[i] = static_cast<T>(sums[i]);
}

// query [Hq, B, Dk] (rows contiguous), keys [Hkv, blocks, block_size, Dk], values [.., Dv], tables [B, W] and
// lengths [B] int64, mask [B, S] and sinks [Hq] fp32 or none; result [B, Hq, Dv].
at::Tensor paged_decode(const at::Tensor& query, const at::Tensor& keys, const at::Tensor& values,
                        const at::Tensor& tables, const at::Tensor& lengths, double scale,
                        const std::optional<at::Tensor>& mask, const std::optional<at::Tensor>& sinks) {
  Shape s{};
  s.sequences = query.size(1);
  s.key_heads = keys.size(0);
  s.group = query.size(0) / s.key_heads;
  s.key_dim = keys.size(3);
  s.value_dim = values.size(3);
  s.blocks = keys.size(1);
  s.block_size = keys.size(2);
  s.width = tables.size(1);
  const int64_t* length = lengths.const_data_ptr<int64_t>();
  s.longest = *std::max_element(length, length + s.sequences);
  TORCH_CHECK(query.stride(2) == 1 && keys.is_contiguous() && values.is_contiguous() && tables.is_contiguous());
  TORCH_CHECK(s.key_dim % kLanes == 0 && s.value_dim % kLanes == 0 && s.longest <= s.width * s.block_size);
  TORCH_CHECK(!mask || (mask->is_contiguous() && mask->size(1) >= s.longest));
  at::Tensor out = at::empty({s.sequences, s.key_heads * s.group, s.value_dim}, query.options());
  const int64_t grain = std::max<int64_t>(1, 16384 / (s.longest * s.group + 1));
  const auto run = [&]<typename scalar_t>() {
    const scalar_t* q = query.const_data_ptr<scalar_t>();
    const int64_t tasks = s.sequences * s.key_heads;
    evermoe::Team::shared().run((tasks + grain - 1) / grain, [&](int64_t chunk) {
      thread_local std::vector<float> scratch;
      for (int64_t task = chunk * grain; task < std::min(tasks, (chunk + 1) * grain); ++task) {
        const int64_t b = task / s.key_heads, h = task % s.key_heads, head = h * s.group;
        attend<scalar_t>(
            s, q + head * query.stride(0) + b * query.stride(1), query.stride(0),
            keys.const_data_ptr<scalar_t>() + h * s.blocks * s.block_size * s.key_dim,
            values.const_data_ptr<scalar_t>() + h * s.blocks * s.block_size * s.value_dim,
            tables.const_data_ptr<int64_t>() + b * s.width, length[b], static_cast<float>(scale),
            mask ? mask->const_data_ptr<float>() + b * mask->size(1) : nullptr,
            sinks ? sinks->const_data_ptr<float>() + head : nullptr,
            out.mutable_data_ptr<scalar_t>() + (b * s.key_heads + h) * s.group * s.value_dim, scratch);
      }
    });
  };
  switch (query.scalar_type()) {
    case at::kFloat: run.operator()<float>(); break;
    case at::kBFloat16: run.operator()<at::BFloat16>(); break;
    case at::kHalf: run.operator()<at::Half>(); break;
    default: TORCH_CHECK(false, "paged_decode takes float32, bfloat16 and float16");
  }
  return out;
}

// A step of nothing but decoding rows, as the layers of this thread attend in it; layers without a pool are not known.
struct Step {
  at::Tensor slots, tables, lengths;
  std::vector<at::Tensor> keys, values;
};
thread_local Step step;

// Until the next call this thread's layers attend without Python: slots [T] of the new rows, tables [T, W], lengths [T],
// the pools of each layer.
void decode_step(const at::Tensor& slots, const at::Tensor& tables, const at::Tensor& lengths, at::TensorList keys,
                 at::TensorList values) {
  step = {slots, tables, lengths, keys.vec(), values.vec()};
}

// Puts rows [Hkv, T, D] into their slots of a pool [Hkv, blocks, block_size, D].
void store(const at::Tensor& rows, const at::Tensor& slots, const at::Tensor& pool) {
  const int64_t item = rows.element_size(), bytes = rows.size(2) * item, room = pool.size(1) * pool.size(2);
  const auto* from = static_cast<const char*>(rows.const_data_ptr());
  auto* to = static_cast<char*>(pool.mutable_data_ptr());
  const int64_t* slot = slots.const_data_ptr<int64_t>();
  for (int64_t t = 0; t < rows.size(1); ++t) {
    TORCH_CHECK_INDEX(slot[t] >= 0 && slot[t] < room, "there is no slot ", slot[t]);
    for (int64_t h = 0; h < rows.size(0); ++h)
      std::memcpy(to + (h * room + slot[t]) * bytes, from + (h * rows.stride(0) + t * rows.stride(1)) * item, bytes);
  }
}

bool fits(const at::Tensor& rows, const at::Tensor& pool) {
  return rows.scalar_type() == pool.scalar_type() && rows.size(0) == pool.size(0) && rows.size(2) == pool.size(3) &&
         rows.stride(2) == 1 && pool.is_contiguous();
}

// A compiled layer's attention: see gateway/layer_ops.py, which answers what is not known here.
at::Tensor attend_layer(const at::Tensor& query, const at::Tensor& keys, const std::optional<at::Tensor>& values,
                        const at::Tensor& layer, double scaling, const std::optional<at::Tensor>& sinks,
                        int64_t width) {
  const int64_t number = *layer.const_data_ptr<int64_t>(), rows = query.size(1);
  const bool known = number >= 0 && number < static_cast<int64_t>(step.keys.size()) && values && !sinks;
  if (known && step.slots.numel() == rows && keys.size(1) == rows && values->size(1) == rows &&
      fits(keys, step.keys[number]) && fits(*values, step.values[number]) && query.stride(2) == 1 &&
      query.scalar_type() == keys.scalar_type()) {
    store(keys, step.slots, step.keys[number]);
    store(*values, step.slots, step.values[number]);
    return paged_decode(query, step.keys[number], step.values[number], step.tables, step.lengths, scaling, {}, {});
  }
  static const auto python =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("evermoe::attend_in_python", "")
          .typed<at::Tensor(const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, const at::Tensor&,
                            double, const std::optional<at::Tensor>&, int64_t)>();
  return python.call(query, keys, values, layer, scaling, sinks, width);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(evermoe, library) {
  library.def(
      "paged_decode(Tensor query, Tensor keys, Tensor values, Tensor tables, Tensor lengths, float scale, "
      "Tensor? mask, Tensor? sinks) -> Tensor");
  library.def(
      "decode_step(Tensor slots, Tensor tables, Tensor lengths, Tensor[] keys, Tensor[] values) -> ()", &decode_step);
}

TORCH_LIBRARY_IMPL(evermoe, CPU, library) {
  library.impl("paged_decode", &paged_decode);
  library.impl("attend", &attend_layer);
}

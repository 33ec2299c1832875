// Products of few rows with weights as they lie in memory: y[m, o] = x[m] . w[o], sums in fp32.
//
// Decoding reads each weight for a handful of rows: the product runs at the speed of memory, whatever multiplies. So
// the weights stay in their plain layout (the memory map that all processes share), and what counts is that they are
// read once, in order, by as many threads as there are.

#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <immintrin.h>

#include <algorithm>
#include <cstdint>

namespace evermoe {

constexpr int kOuts = 4;  // weights and rows of one tile: their sums stay in registers
constexpr int kRows = 6;

// Numbers of one vector: how they are loaded and multiplied.
template <typename T>
struct Lanes;

template <>
struct Lanes<float> {
  static constexpr bool kHere = true;
  static constexpr int64_t kWidth = at::vec::Vectorized<float>::size();
  using Numbers = at::vec::Vectorized<float>;
  using Sums = at::vec::Vectorized<float>;
  static Numbers load(const float* from) { return Numbers::loadu(from); }
  static Sums zero() { return Sums(0.0f); }
  static void add(Sums& sums, const Numbers& a, const Numbers& b) { sums = at::vec::fmadd(a, b, sums); }
  static void totals(const Sums* sums, float* to) {
    for (int o = 0; o < kOuts; ++o)
      to[o] = at::vec::vec_reduce_all<float>([](const Sums& a, const Sums& b) { return a + b; }, sums[o]);
  }
};

template <>
struct Lanes<at::BFloat16> {
#ifdef __AVX512BF16__
  static constexpr bool kHere = true;
  static constexpr int64_t kWidth = 32;
  using Numbers = __m512bh;
  using Sums = __m512;
  static Numbers load(const at::BFloat16* from) { return (__m512bh)_mm512_loadu_si512(from); }
  static Sums zero() { return _mm512_setzero_ps(); }
  static void add(Sums& sums, const Numbers& a, const Numbers& b) { sums = _mm512_dpbf16_ps(sums, a, b); }
  static void totals(const Sums* sums, float* to) {
    __m128 quarter[kOuts];
    for (int o = 0; o < kOuts; ++o) {
      const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(sums[o]), _mm512_extractf32x8_ps(sums[o], 1));
      quarter[o] = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    }
    const __m128 low = _mm_hadd_ps(quarter[0], quarter[1]), high = _mm_hadd_ps(quarter[2], quarter[3]);
    _mm_storeu_ps(to, _mm_hadd_ps(low, high));
  }
#else
  static constexpr bool kHere = false;
#endif
};

// y[m, o] for M rows and kOuts consecutive weights; `ahead` asks for the weights that are read next.
template <typename T, int M>
inline void tile(const T* x, int64_t x_step, const T* w, int64_t depth, bool ahead, float* y, int64_t y_step) {
  using L = Lanes<T>;
  typename L::Sums sums[M][kOuts];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int o = 0; o < kOuts; ++o) sums[m][o] = L::zero();
  for (int64_t i = 0; i < depth; i += L::kWidth) {
    typename L::Numbers weights[kOuts];
#pragma GCC unroll 8
    for (int o = 0; o < kOuts; ++o) {
      weights[o] = L::load(w + o * depth + i);
      if (ahead) __builtin_prefetch(w + (kOuts + o) * depth + i);
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const typename L::Numbers row = L::load(x + m * x_step + i);
#pragma GCC unroll 8
      for (int o = 0; o < kOuts; ++o) L::add(sums[m][o], row, weights[o]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) L::totals(sums[m], y + m * y_step);
}

// y[m, o] for `rows` rows and `outs` (a multiple of kOuts) weights of `depth` (a multiple of the vector's width).
template <typename T>
inline void product(const T* x, int64_t x_step, int64_t rows, const T* w, int64_t outs, int64_t depth, float* y,
                    int64_t y_step) {
  const int64_t tiles = (rows + kRows - 1) / kRows, each = tiles ? (rows + tiles - 1) / tiles : 0;
  for (int64_t o = 0; o < outs; o += kOuts) {
    for (int64_t m = 0; m < rows; m += each) {
      const bool ahead = m == 0;
      const T *from = x + m * x_step, *by = w + o * depth;
      float* to = y + m * y_step + o;
      switch (std::min(each, rows - m)) {
        case 1: tile<T, 1>(from, x_step, by, depth, ahead, to, y_step); break;
        case 2: tile<T, 2>(from, x_step, by, depth, ahead, to, y_step); break;
        case 3: tile<T, 3>(from, x_step, by, depth, ahead, to, y_step); break;
        case 4: tile<T, 4>(from, x_step, by, depth, ahead, to, y_step); break;
        case 5: tile<T, 5>(from, x_step, by, depth, ahead, to, y_step); break;
        default: tile<T, 6>(from, x_step, by, depth, ahead, to, y_step);
      }
    }
  }
}

}  // namespace evermoe

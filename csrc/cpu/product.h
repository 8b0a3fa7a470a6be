// Products of small matrices by one micro-kernel: rows are broadcast, columns lie in the lanes.
#pragma once

#include "simd.h"

namespace deepmsi::DEEPMSI_ISA_NAMESPACE {
namespace {

// What a product takes of a row in one step of its depth: a float, or two bfloat16 side by side.
struct Pair {
  BFloat16 first, second;
};

// The right side's columns of one step.
DEEPMSI_INLINE Vec<float> load_step(const float* p) { return load(p); }
DEEPMSI_INLINE Vec<float> multiply_add(Vec<float> sum, float left, Vec<float> right) {
  return sum + left * right;
}
#if defined(__AVX512BF16__)
DEEPMSI_INLINE __m512bh load_step(const Pair* p) {
  __m512bh v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
DEEPMSI_INLINE Vec<float> multiply_add(Vec<float> sum, Pair left, __m512bh right) {
  const __m512i both = _mm512_set1_epi32(__builtin_bit_cast(int32_t, left));
  return reinterpret_cast<Vec<float>>(
      _mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(both), right));
}
#endif

// How the left side lies: element [i, k] at a[i * stride + k], or turned round at a[k * stride + i]. A
// template argument, so that the addresses of a tile's rows fit into the registers that are left.
enum class Left { kRows, kTurned };

// How far apart its rows lie.
template <Left kLeft>
DEEPMSI_INLINE int64_t row_stride(int64_t stride) {
  return kLeft == Left::kTurned ? 1 : stride;
}

// c[i, j] (+)= sum over k of a[i, k] * b[k * stride_b + j] for kRows rows and kWide vectors of columns,
// summed in the order of k, which counts steps. Not inlined, so that it has all registers to itself.
template <Left kLeft, bool kAdd, int kRows, int kWide, typename Step>
__attribute__((noinline)) void product_tile(int64_t depth, const Step* a, int64_t stride_a, const Step* b,
                                            int64_t stride_b, float* c, int64_t stride_c) {
  constexpr int64_t kLanesF = kLanes<float>;
  Vec<float> sum[kRows][kWide] = {};
  for (int64_t k = 0; k < depth; ++k) {
    decltype(load_step(b)) right[kWide];
#pragma GCC unroll 4
    for (int j = 0; j < kWide; ++j) right[j] = load_step(b + k * stride_b + j * kLanesF);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const Step left = kLeft == Left::kTurned ? a[k * stride_a + i] : a[i * stride_a + k];
#pragma GCC unroll 4
      for (int j = 0; j < kWide; ++j) sum[i][j] = multiply_add(sum[i][j], left, right[j]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kWide; ++j) {
      float* to = c + i * stride_c + j * kLanesF;
      store(to, kAdd ? load(to) + sum[i][j] : sum[i][j]);
    }
  }
}

// The same for any number of rows: tiles of kRows, then of half as many.
template <Left kLeft, bool kAdd, int kRows, int kWide, typename Step>
DEEPMSI_INLINE void product_columns(int64_t rows, int64_t depth, const Step* a, int64_t stride_a,
                                    const Step* b, int64_t stride_b, float* c, int64_t stride_c) {
  const int64_t row = row_stride<kLeft>(stride_a);
  int64_t i = 0;
  for (; i + kRows <= rows; i += kRows)
    product_tile<kLeft, kAdd, kRows, kWide>(depth, a + i * row, stride_a, b, stride_b, c + i * stride_c,
                                            stride_c);
  if constexpr (kRows > 1) {
    product_columns<kLeft, kAdd, kRows / 2, kWide>(rows - i, depth, a + i * row, stride_a, b, stride_b,
                                                   c + i * stride_c, stride_c);
  }
}

// Tiles fill the registers: 32 of AVX-512, 16 of the others.
#if DEEPMSI_VECTOR_BYTES == 64
constexpr int kTallRows = 8, kWideRows = 4, kWideVectors = 4;
#else
constexpr int kTallRows = 6, kWideRows = 6, kWideVectors = 2;
#endif

// c [rows, columns] (+)= a b, where columns is a multiple of the lanes.
template <Left kLeft, bool kAdd = false>
void product(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t stride_a, const float* b,
             int64_t stride_b, float* c, int64_t stride_c) {
  constexpr int64_t kLanesF = kLanes<float>;
  int64_t j = 0;
  for (; j + kWideVectors * kLanesF <= columns; j += kWideVectors * kLanesF)
    product_columns<kLeft, kAdd, kWideRows, kWideVectors>(rows, depth, a, stride_a, b + j, stride_b, c + j,
                                                          stride_c);
  if (kWideVectors > 2 && j + 2 * kLanesF <= columns) {
    product_columns<kLeft, kAdd, kTallRows, 2>(rows, depth, a, stride_a, b + j, stride_b, c + j, stride_c);
    j += 2 * kLanesF;
  }
  if (j < columns)
    product_columns<kLeft, kAdd, kTallRows, 1>(rows, depth, a, stride_a, b + j, stride_b, c + j, stride_c);
}

}  // namespace
}  // namespace deepmsi::DEEPMSI_ISA_NAMESPACE

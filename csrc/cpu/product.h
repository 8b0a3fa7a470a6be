// Products of small matrices by one micro-kernel: rows are broadcast, columns lie in the lanes.
#pragma once

#include "simd.h"

namespace deepmsi::DEEPMSI_ISA_NAMESPACE {
namespace {

// c[i, j] (+)= sum over k of a[i * row + k * step] * b[k * stride_b + j] for kRows rows and kWide vectors of
// columns, summed in the order of k.
template <bool kAdd, int kRows, int kWide>
DEEPMSI_INLINE void product_tile(int64_t depth, const float* a, int64_t row, int64_t step, const float* b,
                                 int64_t stride_b, float* c, int64_t stride_c) {
  constexpr int64_t kLanesF = kLanes<float>;
  Vec<float> sum[kRows][kWide] = {};
  for (int64_t k = 0; k < depth; ++k) {
    Vec<float> right[kWide];
#pragma GCC unroll 4
    for (int j = 0; j < kWide; ++j) right[j] = load(b + k * stride_b + j * kLanesF);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const float left = a[i * row + k * step];
#pragma GCC unroll 4
      for (int j = 0; j < kWide; ++j) sum[i][j] += left * right[j];
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
template <bool kAdd, int kRows, int kWide>
DEEPMSI_INLINE void product_columns(int64_t rows, int64_t depth, const float* a, int64_t row, int64_t step,
                                    const float* b, int64_t stride_b, float* c, int64_t stride_c) {
  int64_t i = 0;
  for (; i + kRows <= rows; i += kRows)
    product_tile<kAdd, kRows, kWide>(depth, a + i * row, row, step, b, stride_b, c + i * stride_c, stride_c);
  if constexpr (kRows > 1) {
    product_columns<kAdd, kRows / 2, kWide>(rows - i, depth, a + i * row, row, step, b, stride_b,
                                            c + i * stride_c, stride_c);
  }
}

// Tiles fill the registers: 32 of AVX-512, 16 of the others.
#if DEEPMSI_VECTOR_BYTES == 64
constexpr int kTallRows = 8, kWideRows = 4, kWideVectors = 4;
#else
constexpr int kTallRows = 6, kWideRows = 6, kWideVectors = 2;
#endif

// c [rows, columns] (+)= a b, where a may be read turned round (row and step) and columns is a multiple of
// the lanes.
template <bool kAdd = false>
void product(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t row, int64_t step,
             const float* b, int64_t stride_b, float* c, int64_t stride_c) {
  constexpr int64_t kLanesF = kLanes<float>;
  int64_t j = 0;
  for (; j + kWideVectors * kLanesF <= columns; j += kWideVectors * kLanesF)
    product_columns<kAdd, kWideRows, kWideVectors>(rows, depth, a, row, step, b + j, stride_b, c + j,
                                                   stride_c);
  if (kWideVectors > 2 && j + 2 * kLanesF <= columns) {
    product_columns<kAdd, kTallRows, 2>(rows, depth, a, row, step, b + j, stride_b, c + j, stride_c);
    j += 2 * kLanesF;
  }
  if (j < columns)
    product_columns<kAdd, kTallRows, 1>(rows, depth, a, row, step, b + j, stride_b, c + j, stride_c);
}

}  // namespace
}  // namespace deepmsi::DEEPMSI_ISA_NAMESPACE

// The exponential and the logarithm of a vector of floats, and the largest lane: what a softmax is made of.
#pragma once

#include "simd.h"

namespace deepmsi::DEEPMSI_ISA_NAMESPACE {
namespace {

typedef int32_t VecInt __attribute__((vector_size(DEEPMSI_VECTOR_BYTES)));

#if DEEPMSI_VECTOR_BYTES == 64
// For the forms with a mask of what others do without one, in whose headers GCC finds undefined values.
constexpr __mmask16 kEveryLane = 0xffff;
#endif

// The larger and the smaller of two; b where one of them is no number. For AVX-512 compilers make a
// comparison and a choice of the form below.
DEEPMSI_INLINE Vec<float> maximum(Vec<float> a, Vec<float> b) {
#if DEEPMSI_VECTOR_BYTES == 64
  const auto left = reinterpret_cast<__m512>(a), right = reinterpret_cast<__m512>(b);
  return reinterpret_cast<Vec<float>>(_mm512_mask_max_ps(right, kEveryLane, left, right));
#else
  return a > b ? a : b;
#endif
}
DEEPMSI_INLINE Vec<float> minimum(Vec<float> a, Vec<float> b) {
#if DEEPMSI_VECTOR_BYTES == 64
  const auto left = reinterpret_cast<__m512>(a), right = reinterpret_cast<__m512>(b);
  return reinterpret_cast<Vec<float>>(_mm512_mask_min_ps(right, kEveryLane, left, right));
#else
  return a < b ? a : b;
#endif
}

DEEPMSI_INLINE float lane_max(Vec<float> v) {
  float top = v[0];
#pragma GCC unroll 16
  for (int i = 1; i < kLanes<float>; ++i) top = v[i] > top ? v[i] : top;
  return top;
}

// value * 2^n for n, which is `shifted` less kShift: where that is added, it rounds to the nearest integer.
// What is no number stays so.
constexpr float kShift = 12582912.0f;  // 1.5 * 2^23
DEEPMSI_INLINE Vec<float> raise_exponent(Vec<float> value, Vec<float> shifted) {
#if DEEPMSI_VECTOR_BYTES == 64
  const auto factor = reinterpret_cast<__m512>(value), n = reinterpret_cast<__m512>(shifted - kShift);
  return reinterpret_cast<Vec<float>>(_mm512_mask_scalef_ps(factor, kEveryLane, factor, n));
#else
  VecBits bits, n;
  __builtin_memcpy(&bits, &value, sizeof bits);
  __builtin_memcpy(&n, &shifted, sizeof n);
  bits += n << 23;
  Vec<float> raised;
  __builtin_memcpy(&raised, &bits, sizeof raised);
  return value == value ? raised : value;
#endif
}

// e^x for x <= 0: 2^n e^r with |r| <= ln 2 / 2 and a polynomial of degree 7 (relative error 1e-7); below -87
// it is less than 2e-38.
DEEPMSI_INLINE Vec<float> exp_nonpositive(Vec<float> x) {
  x = maximum(Vec<float>{} - 87.0f, x);
  const Vec<float> shifted = x * 1.44269504f + kShift, n = shifted - kShift;
  const Vec<float> r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec<float> p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r + 1.0f;
  return raise_exponent(p * r + 1.0f, shifted);
}

// 2^x for x <= 0, with a relative error of 2e-9 before rounding; below -126 it is less than 2e-38.
DEEPMSI_INLINE Vec<float> exp2_nonpositive(Vec<float> x) {
  x = maximum(Vec<float>{} - 126.0f, x);
  const Vec<float> shifted = x + kShift, r = x - (shifted - kShift);
  Vec<float> p = r * 1.535336189e-4f + 1.339887442e-3f;
  p = p * r + 9.618437358e-3f;
  p = p * r + 5.550332471e-2f;
  p = p * r + 2.402264791e-1f;
  p = p * r + 6.931472029e-1f;
  return raise_exponent(p * r + 1.0f, shifted);
}

// log x for a normal x > 0: the exponent and 2 artanh((m - 1) / (m + 1)) by its series, for m in [0.7, 1.4].
DEEPMSI_INLINE Vec<float> logarithm(Vec<float> x) {
  VecInt bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  const VecInt exponent = (bits - 0x3f3504f3) >> 23;  // of a mantissa from the root of 1/2
  bits -= exponent << 23;
  Vec<float> m;
  __builtin_memcpy(&m, &bits, sizeof m);
  const Vec<float> z = (m - 1.0f) / (m + 1.0f), w = z * z, n = __builtin_convertvector(exponent, Vec<float>);
  Vec<float> p = w * (1.0f / 9) + 1.0f / 7;
  p = p * w + 1.0f / 5;
  p = p * w + 1.0f / 3;
  return n * 0.693359375f + (2.0f * (z + z * w * p) - n * 2.12194440e-4f);
}

}  // namespace
}  // namespace deepmsi::DEEPMSI_ISA_NAMESPACE

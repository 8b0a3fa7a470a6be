// Storage types of the CPU kernels and the type that each is summed in. Plain bit arithmetic: see simd.h for
// why.
#pragma once

#include <cstdint>

namespace deepmsi {

struct BFloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

enum class DType { kFloat, kDouble, kBFloat16, kHalf };

namespace {

template <typename T>
struct Storage;

template <>
struct Storage<float> {
  using Wide = float;
  static inline float narrow(float v) { return v; }
};

template <>
struct Storage<double> {
  using Wide = double;
  static inline double narrow(double v) { return v; }
};

template <>
struct Storage<BFloat16> {
  using Wide = float;
  // Round to nearest, ties to even; a NaN stays a NaN.
  static inline BFloat16 narrow(float v) {
    uint32_t u = __builtin_bit_cast(uint32_t, v);
    const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    return {static_cast<uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded)};
  }
};

template <>
struct Storage<Half> {
  using Wide = float;
  static inline Half narrow(float v) {
    // Scaling by powers of two lets the float unit do the rounding, subnormal results included.
    uint32_t u = __builtin_bit_cast(uint32_t, v);
    const uint32_t sign = (u >> 16) & 0x8000u;
    u &= 0x7fffffffu;
    if (u > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
    if (u >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};
    if (u < 0x38800000u) {
      const float magnitude = __builtin_bit_cast(float, u) + 0.5f;
      return {static_cast<uint16_t>(sign | (__builtin_bit_cast(uint32_t, magnitude) - 0x3f000000u))};
    }
    u += 0xc8000fffu + ((u >> 13) & 1u);
    return {static_cast<uint16_t>(sign | (u >> 13))};
  }
};

inline float to_wide(float v) { return v; }
inline double to_wide(double v) { return v; }
inline float to_wide(BFloat16 v) { return __builtin_bit_cast(float, static_cast<uint32_t>(v.bits) << 16); }
inline float to_wide(Half v) {
  const uint32_t sign = static_cast<uint32_t>(v.bits & 0x8000u) << 16;
  uint32_t u = static_cast<uint32_t>(v.bits & 0x7fffu) << 13;
  const bool special = u >= 0x0f800000u;
  u += special ? 0x70000000u : 0x38000000u;
  const bool subnormal = (v.bits & 0x7c00u) == 0;
  if (subnormal) u += 0x00800000u;
  float f = __builtin_bit_cast(float, u);
  if (subnormal) f -= 6.103515625e-05f;
  return __builtin_bit_cast(float, __builtin_bit_cast(uint32_t, f) | sign);
}

}  // namespace
}  // namespace deepmsi

// Vectors of the instruction set that a translation unit is compiled for, and loops over the channels of a
// row.
//
// This header is compiled once per instruction set. Everything in it and in the *_kernel.h files lives in an
// unnamed namespace inside `deepmsi::<isa>`, and uses no inline function of the standard library: the linker
// would keep one copy of such a function for all units, and it might be the one with instructions that this
// CPU lacks.
#pragma once

#include <cstdint>
#include <cstring>

#include "storage.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#define DEEPMSI_ISA_NAMESPACE avx512_bf16
#define DEEPMSI_VECTOR_BYTES 64
#elif defined(__AVX512F__)
#include <immintrin.h>
#define DEEPMSI_ISA_NAMESPACE avx512
#define DEEPMSI_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define DEEPMSI_ISA_NAMESPACE avx2
#define DEEPMSI_VECTOR_BYTES 32
#else
#define DEEPMSI_ISA_NAMESPACE baseline
#define DEEPMSI_VECTOR_BYTES 16
#endif

#define DEEPMSI_INLINE inline __attribute__((always_inline))

namespace deepmsi::DEEPMSI_ISA_NAMESPACE {
namespace {

template <typename A>
struct Vector;
template <>
struct Vector<float> {
  typedef float type __attribute__((vector_size(DEEPMSI_VECTOR_BYTES)));
};
template <>
struct Vector<double> {
  typedef double type __attribute__((vector_size(DEEPMSI_VECTOR_BYTES)));
};
template <typename A>
using Vec = typename Vector<A>::type;

template <typename A>
constexpr int64_t kLanes = DEEPMSI_VECTOR_BYTES / sizeof(A);

template <typename A>
DEEPMSI_INLINE Vec<A> load(const A* p) {
  Vec<A> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

template <typename A>
DEEPMSI_INLINE void store(A* p, Vec<A> v) {
  __builtin_memcpy(p, &v, sizeof v);
}

// Sum of the lanes, by halves: the order never changes.
template <typename A>
DEEPMSI_INLINE A lane_sum(Vec<A> v) {
  if constexpr (kLanes<A> == 16) {
    v += __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    v += __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3);
    v += __builtin_shufflevector(v, v, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1);
  } else if constexpr (kLanes<A> == 8) {
    v += __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3);
    v += __builtin_shufflevector(v, v, 2, 3, 0, 1, 2, 3, 0, 1);
  } else if constexpr (kLanes<A> == 4) {
    v += __builtin_shufflevector(v, v, 2, 3, 0, 1);
  }
  return v[0] + v[1];
}

// a0 b0 a1 b1 ..., of the lower or of the higher halves.
template <typename A>
DEEPMSI_INLINE Vec<A> interleave_low(Vec<A> a, Vec<A> b) {
  if constexpr (kLanes<A> == 16) {
    return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  } else if constexpr (kLanes<A> == 8) {
    return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
  } else if constexpr (kLanes<A> == 4) {
    return __builtin_shufflevector(a, b, 0, 4, 1, 5);
  } else {
    return __builtin_shufflevector(a, b, 0, 2);
  }
}
template <typename A>
DEEPMSI_INLINE Vec<A> interleave_high(Vec<A> a, Vec<A> b) {
  if constexpr (kLanes<A> == 16) {
    return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  } else if constexpr (kLanes<A> == 8) {
    return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
  } else if constexpr (kLanes<A> == 4) {
    return __builtin_shufflevector(a, b, 2, 6, 3, 7);
  } else {
    return __builtin_shufflevector(a, b, 1, 3);
  }
}

// The lane sums of as many vectors as there are lanes, one in each lane, by a tree that costs three
// instructions a sum.
template <typename A, int kCount = kLanes<A>>
DEEPMSI_INLINE Vec<A> lane_sums(const Vec<A>* v) {
  if constexpr (kCount == 1) {
    return v[0];
  } else {
    Vec<A> half[kCount / 2];
#pragma GCC unroll 8
    for (int i = 0; i < kCount / 2; ++i) {
      half[i] = interleave_low<A>(v[i], v[i + kCount / 2]) + interleave_high<A>(v[i], v[i + kCount / 2]);
    }
    return lane_sums<A, kCount / 2>(half);
  }
}

// Transposes a square of as many vectors as there are lanes, in place: a perfect shuffle of rows for every
// bit.
template <typename A, int kStages = kLanes<A>>
DEEPMSI_INLINE void transpose(Vec<A>* v) {
  if constexpr (kStages > 1) {
    constexpr int kCount = kLanes<A>;
    Vec<A> shuffled[kCount];
#pragma GCC unroll 8
    for (int i = 0; i < kCount / 2; ++i) {
      shuffled[2 * i] = interleave_low<A>(v[i], v[i + kCount / 2]);
      shuffled[2 * i + 1] = interleave_high<A>(v[i], v[i + kCount / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kCount; ++i) v[i] = shuffled[i];
    transpose<A, kStages / 2>(v);
  }
}

// Body is called as body(offset, vector tag) over whole vectors, then as body(offset, scalar tag) over the
// rest.
struct VectorTag {};
struct ScalarTag {};

template <typename A, typename Body>
DEEPMSI_INLINE void for_channels(int64_t channels, const Body& body) {
  int64_t c = 0;
  for (; c + kLanes<A> <= channels; c += kLanes<A>) body(c, VectorTag{});
  for (; c < channels; ++c) body(c, ScalarTag{});
}

template <typename A>
DEEPMSI_INLINE Vec<A> get(const A* p, VectorTag) {
  return load(p);
}
template <typename A>
DEEPMSI_INLINE A get(const A* p, ScalarTag) {
  return *p;
}
template <typename A>
DEEPMSI_INLINE void put(A* p, Vec<A> v, VectorTag) {
  store(p, v);
}
template <typename A>
DEEPMSI_INLINE void put(A* p, A v, ScalarTag) {
  *p = v;
}

// bfloat16 is read as float, and rounded where it is written.
typedef uint32_t VecBits __attribute__((vector_size(DEEPMSI_VECTOR_BYTES)));
typedef uint16_t VecHalves __attribute__((vector_size(DEEPMSI_VECTOR_BYTES / 2)));

DEEPMSI_INLINE VecBits load_halves(const BFloat16* p) {
  VecHalves halves;
  __builtin_memcpy(&halves, p, sizeof halves);
  return __builtin_convertvector(halves, VecBits);
}

DEEPMSI_INLINE Vec<float> get(const BFloat16* p, VectorTag) {
  const VecBits bits = load_halves(p) << 16;
  Vec<float> v;
  __builtin_memcpy(&v, &bits, sizeof v);
  return v;
}
DEEPMSI_INLINE float get(const BFloat16* p, ScalarTag) { return to_wide(*p); }

DEEPMSI_INLINE void put(BFloat16* p, Vec<float> v, VectorTag) {
#if defined(__AVX512BF16__)
  const auto halves = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(v));
#else
  VecBits bits;
  __builtin_memcpy(&bits, &v, sizeof bits);
  const VecBits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const VecHalves halves =
      __builtin_convertvector((bits & 0x7fffffffu) > 0x7f800000u ? VecBits{} + 0x7fc0u : rounded, VecHalves);
#endif
  __builtin_memcpy(p, &halves, sizeof halves);
}
DEEPMSI_INLINE void put(BFloat16* p, float v, ScalarTag) { *p = Storage<BFloat16>::narrow(v); }

template <typename A>
DEEPMSI_INLINE A root(A value) {
  if constexpr (sizeof(A) == 4) {
    return __builtin_sqrtf(value);
  } else {
    return __builtin_sqrt(value);
  }
}

template <typename A>
DEEPMSI_INLINE A exponential(A value) {
  if constexpr (sizeof(A) == 4) {
    return __builtin_expf(value);
  } else {
    return __builtin_exp(value);
  }
}

// Dot products of kLeft rows with kRight rows, out[i * kRight + j]; the channel count may be any.
template <typename A, int kLeft, int kRight>
DEEPMSI_INLINE void dot_tile(const A* const* left, const A* const* right, int64_t channels, A* out) {
  Vec<A> sum[kLeft][kRight] = {};
  int64_t c = 0;
  for (; c + kLanes<A> <= channels; c += kLanes<A>) {
    Vec<A> r[kRight];
#pragma GCC unroll 8
    for (int j = 0; j < kRight; ++j) r[j] = load(right[j] + c);
#pragma GCC unroll 8
    for (int i = 0; i < kLeft; ++i) {
      const Vec<A> l = load(left[i] + c);
#pragma GCC unroll 8
      for (int j = 0; j < kRight; ++j) sum[i][j] += l * r[j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kLeft; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kRight; ++j) {
      A total = lane_sum<A>(sum[i][j]);
      for (int64_t t = c; t < channels; ++t) total += left[i][t] * right[j][t];
      out[i * kRight + j] = total;
    }
  }
}

template <typename A>
DEEPMSI_INLINE A dot(const A* a, const A* b, int64_t channels) {
  // Four running sums hide the latency of the multiply-add.
  Vec<A> sum[4] = {};
  int64_t c = 0;
  for (; c + 4 * kLanes<A> <= channels; c += 4 * kLanes<A>) {
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) sum[k] += load(a + c + k * kLanes<A>) * load(b + c + k * kLanes<A>);
  }
  for (; c + kLanes<A> <= channels; c += kLanes<A>) sum[0] += load(a + c) * load(b + c);
  A total = lane_sum<A>((sum[0] + sum[1]) + (sum[2] + sum[3]));
  for (; c < channels; ++c) total += a[c] * b[c];
  return total;
}

// Widen a row of storage into the type that sums, or narrow it back.
template <typename T, typename A>
DEEPMSI_INLINE void widen(const T* from, A* to, int64_t count) {
  for (int64_t c = 0; c < count; ++c) to[c] = to_wide(from[c]);
}
template <typename T, typename A>
DEEPMSI_INLINE void narrow(const A* from, T* to, int64_t count) {
  for (int64_t c = 0; c < count; ++c) to[c] = Storage<T>::narrow(from[c]);
}

}  // namespace
}  // namespace deepmsi::DEEPMSI_ISA_NAMESPACE

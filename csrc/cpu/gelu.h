// The exact GELU x Φ(x) of a vector of floats, and its slope Φ(x) + x φ(x).
#pragma once

#include "exponential.h"

namespace deepmsi::DEEPMSI_ISA_NAMESPACE {
namespace {

// What lies beyond |x|, and the density's shape exp(-x² / 2). From 6 on the size |x| is held, and the mass is
// about Φ(-|x|).
struct Tail {
  Vec<float> mass, size, bell;
};

// Both from one exponential, so that the tail keeps its digits: Φ(-t) = exp(-t² / 2) (1/2 - t P(t) / Q(t)),
// where the bracket is half the scaled complement of the error function on [0, 6] (relative error 1e-8), and
// its form leaves little of the rounding of P and Q near 0.
DEEPMSI_INLINE Tail tail_of(Vec<float> x) {
  const Vec<float> bell = exp2_nonpositive(x * x * -0.72134752f);
  VecBits bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  bits &= 0x7fffffffu;
  Vec<float> t;
  __builtin_memcpy(&t, &bits, sizeof t);
  t = minimum(Vec<float>{} + 6.0f, t);
  const Vec<float> p = ((t * 1.3988208347e-2f + 1.0378079468e-1f) * t + 3.147112464e-1f) * t + 3.98941824e-1f;
  const Vec<float> q =
      (((t * 2.797901534e-2f + 2.298056964e-1f) * t + 8.138976248e-1f) * t + 1.415508847f) * t + 1.0f;
  return {bell * (0.5f - t * (p / q)), t, bell};
}

// Beyond 6 it is 0 or x, but for 1e-8; at -inf it is its limit, 0, where torch's is no number.
DEEPMSI_INLINE Vec<float> gelu_of(Vec<float> x, const Tail& tail) {
  return maximum(Vec<float>{}, x) - tail.size * tail.mass;
}
DEEPMSI_INLINE Vec<float> gelu(Vec<float> x) { return gelu_of(x, tail_of(x)); }

struct GeluAndSlope {
  Vec<float> value, slope;
};
DEEPMSI_INLINE GeluAndSlope gelu_and_slope(Vec<float> x) {
  const Tail tail = tail_of(x);
  const Vec<float> left = tail.mass - tail.size * (tail.bell * 0.39894228f);  // the slope at -|x|
  return {gelu_of(x, tail), x < 0.0f ? left : 1.0f - left};
}

}  // namespace
}  // namespace deepmsi::DEEPMSI_ISA_NAMESPACE

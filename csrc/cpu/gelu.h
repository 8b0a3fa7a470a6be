// The normal distribution of a vector of floats, for the exact GELU x Φ(x) and its slope Φ(x) + x φ(x).
#pragma once

#include "exponential.h"

namespace deepmsi::DEEPMSI_ISA_NAMESPACE {
namespace {

struct Normal {
  Vec<float> below;    // Φ(x)
  Vec<float> density;  // φ(x) = exp(-x² / 2) / √(2π)
};

// Both from one exponential, so that the lower tail keeps its digits: Φ(-t) = exp(-t² / 2) (1/2 - t P(t) /
// Q(t)), where the bracket is half the scaled complement of the error function on [0, 6] (relative error
// 1e-8), and its form leaves little of the rounding of P and Q near 0.
DEEPMSI_INLINE Normal normal(Vec<float> x) {
  const Vec<float> e = exp2_nonpositive(x * x * -0.72134752f);
  const Vec<float> limit = Vec<float>{} + 6.0f, size = x < 0.0f ? -x : x, t = size > limit ? limit : size;
  const Vec<float> p = ((t * 1.3988208347e-2f + 1.0378079468e-1f) * t + 3.147112464e-1f) * t + 3.98941824e-1f;
  const Vec<float> q =
      (((t * 2.797901534e-2f + 2.298056964e-1f) * t + 8.138976248e-1f) * t + 1.415508847f) * t + 1.0f;
  const Vec<float> tail = e * (0.5f - t * (p / q));
  return {x < 0.0f ? tail : 1.0f - tail, e * 0.39894228f};
}

}  // namespace
}  // namespace deepmsi::DEEPMSI_ISA_NAMESPACE

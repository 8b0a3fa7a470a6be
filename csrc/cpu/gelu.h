// The normal distribution of a vector of floats, for the exact GELU x Φ(x) and its slope Φ(x) + x φ(x).
#pragma once

#include "exponential.h"

namespace deepmsi::DEEPMSI_ISA_NAMESPACE {
namespace {

struct Normal {
  Vec<float> below;    // Φ(x)
  Vec<float> density;  // φ(x) = exp(-x² / 2) / √(2π)
};

// Both from one exponential, so that the lower tail keeps its digits: Φ(-t) = exp(-t² / 2) R(t), where R, half
// the scaled complement of the error function, is a ratio of polynomials on [0, 6] (relative error 1e-8).
DEEPMSI_INLINE Normal normal(Vec<float> x) {
  const Vec<float> e = exp2_nonpositive(x * x * -0.72134752f);
  const Vec<float> limit = Vec<float>{} + 6.0f, size = x < 0.0f ? -x : x, t = size > limit ? limit : size;
  const Vec<float> above =
      (((t * 1.299323427e-6f + 1.112205352e-2f) * t + 9.223756601e-2f) * t + 3.088125995e-1f) * t + 0.5f;
  const Vec<float> under =
      (((t * 2.797901534e-2f + 2.298056964e-1f) * t + 8.138976248e-1f) * t + 1.415508847f) * t + 1.0f;
  const Vec<float> tail = e * above / under;
  return {x < 0.0f ? tail : 1.0f - tail, e * 0.39894228f};
}

}  // namespace
}  // namespace deepmsi::DEEPMSI_ISA_NAMESPACE

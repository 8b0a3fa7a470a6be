// The normal distribution function of a vector of floats, for the exact GELU x Φ(x).
#pragma once

#include "exponential.h"

namespace deepmsi::DEEPMSI_ISA_NAMESPACE {
namespace {

// Φ(x) = (1 + erf(x / √2)) / 2 to about one rounding: erf as a polynomial near 0, and its complement as the
// exponential of one further out, so that the lower tail keeps its digits.
DEEPMSI_INLINE Vec<float> normal_cdf(Vec<float> x) {
  const Vec<float> a = x * 0.70710678f, s = a * a;
  const Vec<float> t = a < 0.0f ? -a : a;
  Vec<float> near = s * -5.96761703e-4f + 4.99119423e-3f;
  near = near * s - 2.67681349e-2f;
  near = near * s + 1.12819925e-1f;
  near = near * s - 3.76125336e-1f;
  near = near * s + 1.28379166e-1f;
  near = (near * a + a) * 0.5f + 0.5f;

  Vec<float> far = (t * -1.72853470e-5f + 3.83197126e-4f) * s + (t * -3.88396438e-3f + 2.42546219e-2f);
  far = far * t - 1.06777877e-1f;
  far = far * t - 6.34846687e-1f;
  far = far * t - 1.28717512e-1f;
  far = exp_nonpositive(far * t - t) * 0.5f;
  far = a < 0.0f ? far : 1.0f - far;
  return t > 0.927734375f ? far : near;
}

// φ(x) = exp(-x² / 2) / √(2π).
DEEPMSI_INLINE Vec<float> normal_pdf(Vec<float> x) { return exp_nonpositive(x * x * -0.5f) * 0.39894228f; }

}  // namespace
}  // namespace deepmsi::DEEPMSI_ISA_NAMESPACE

// The rows of the cross-modal contrastive loss (SPEC 6): from scores to loss and gradient in three passes
// over a row that stays in the cache.
#include "cross_modal_contrastive.h"
#include "exponential.h"
#include "simd.h"

namespace deepmsi::DEEPMSI_ISA_NAMESPACE {
namespace {

constexpr float kUnitNormFloor = 1e-12f;

inline void contrastive_normalize(const float* x, const bool* valid, int64_t rows, int64_t dim, float* unit,
                                  float* norm) {
  for (int64_t r = 0; r < rows; ++r, x += dim, unit += dim) {
    const bool present = valid == nullptr || valid[r];
    const float length = present ? root(dot(x, x, dim)) : 0.0f;
    norm[r] = length > kUnitNormFloor ? length : kUnitNormFloor;
    const float scale = 1.0f / norm[r];
    for (int64_t c = 0; c < dim; ++c) unit[c] = present ? x[c] * scale : 0.0f;
  }
}

inline void contrastive_through_norm(const float* unit, const float* norm, int64_t rows, int64_t dim,
                                     float* grad) {
  for (int64_t r = 0; r < rows; ++r, unit += dim, grad += dim) {
    // Below the floor the norm is a constant, so nothing is taken away along the row.
    const float along = norm[r] > kUnitNormFloor ? dot(unit, grad, dim) : 0.0f;
    const float scale = 1.0f / norm[r];
    for (int64_t c = 0; c < dim; ++c) grad[c] = (grad[c] - unit[c] * along) * scale;
  }
}

// log(1 + t) for t in [0, 1], relative error 1e-7 down to the smallest t: 2 artanh(t / (2 + t)) by its
// series.
DEEPMSI_INLINE Vec<float> log1p_unit(Vec<float> t) {
  const Vec<float> z = t / (t + 2.0f), w = z * z;
  Vec<float> p = w * (1.0f / 15) + 1.0f / 13;
  p = p * w + 1.0f / 11;
  p = p * w + 1.0f / 9;
  p = p * w + 1.0f / 7;
  p = p * w + 1.0f / 5;
  p = p * w + 1.0f / 3;
  return 2.0f * (z + z * w * p);
}

// A vector of scores, or the last few of a row with the rest marked as taking no part.
struct Columns {
  Vec<float> score;
  VecInt label;
};

DEEPMSI_INLINE Columns columns_at(const ContrastiveRow& r, const float* scores, int64_t j) {
  constexpr int64_t kLanesF = kLanes<float>;
  Columns c;
  if (j + kLanesF <= r.columns) {
    c.score = load(scores + j);
    __builtin_memcpy(&c.label, r.labels + j, sizeof c.label);
  } else {
    for (int64_t i = 0; i < kLanesF; ++i) {
      c.score[i] = j + i < r.columns ? scores[j + i] : 0.0f;
      c.label[i] = j + i < r.columns ? r.labels[j + i] : -1;
    }
  }
  // The row itself is neither positive nor negative.
  if (r.self >= j && r.self < j + kLanesF) c.label[r.self - j] = -1;
  return c;
}

DEEPMSI_INLINE void put_columns(const ContrastiveRow& r, float* scores, int64_t j, Vec<float> value) {
  if (j + kLanes<float> <= r.columns) {
    store(scores + j, value);
  } else {
    for (int64_t i = 0; j + i < r.columns; ++i) scores[j + i] = value[i];
  }
}

inline double contrastive_row(const ContrastiveRow& r, float* scores) {
  constexpr int64_t kLanesF = kLanes<float>;
  const Vec<float> zero = {}, one = zero + 1.0f, lowest = zero - __builtin_inff();
  const VecInt row = VecInt{} + r.label, none = VecInt{};

  // The largest score of a negative; without one the row's terms are all 0. Negatives are counted rather than
  // told from the largest, which stays -inf where all scores are NaN: such a row must not pass for 0.
  Vec<float> high = lowest;
  VecInt count_same = {}, count_other = {};
  int64_t positives = 0, negatives = 0;
  for (int64_t j = 0; j < r.columns; j += kLanesF) {
    const Columns c = columns_at(r, scores, j);
    const VecInt same = c.label == row, other = (c.label != row) & (c.label >= none);
    const Vec<float> score = other ? c.score : lowest;
    high = score > high ? score : high;
    count_same -= same;
    count_other -= other;
  }
  for (int64_t i = 0; i < kLanesF; ++i) {
    positives += count_same[i];
    negatives += count_other[i];
  }
  const float top = lane_max(high);
  if (negatives == 0 || positives == 0) {
    for (int64_t j = 0; j < r.columns; ++j) scores[j] = 0.0f;
    return 0.0;
  }
  Vec<float> sum = {};
  for (int64_t j = 0; j < r.columns; j += kLanesF) {
    const Columns c = columns_at(r, scores, j);
    sum += (c.label != row) & (c.label >= none) ? exp_nonpositive(c.score - top) : zero;
  }
  const float total = lane_sum<float>(sum), log_z = top + __builtin_logf(total);
  const float share = static_cast<float>(r.per_positive ? r.share / static_cast<double>(positives) : r.share);

  // Positive: softplus(x) with x = log Z - s, whose derivative is the logistic function of x.
  Vec<float> loss = {}, pull = {};
  for (int64_t j = 0; j < r.columns; j += kLanesF) {
    const Columns c = columns_at(r, scores, j);
    const VecInt same = c.label == row;
    const Vec<float> x = log_z - c.score, t = exp_nonpositive(x < zero ? x : -x), rest = one / (one + t);
    const Vec<float> logistic = same ? (x < zero ? t * rest : rest) : zero;
    loss += same ? (x < zero ? zero : x) + log1p_unit(t) : zero;
    pull += logistic;
    // A negative's share of Z stands where its score was; its factor is known after the row.
    const Vec<float> other =
        (c.label != row) & (c.label >= none) ? exp_nonpositive(c.score - top) / total : zero;
    put_columns(r, scores, j, same ? -share * logistic : other);
  }
  const float push = share * lane_sum<float>(pull);
  for (int64_t j = 0; j < r.columns; j += kLanesF) {
    const Columns c = columns_at(r, scores, j);
    put_columns(r, scores, j, c.label == row ? c.score : c.score * push);
  }
  return static_cast<double>(share) * lane_sum<float>(loss);
}

}  // namespace

ContrastiveKernels contrastive_kernels() {
  return {contrastive_normalize, contrastive_row, contrastive_through_norm};
}

}  // namespace deepmsi::DEEPMSI_ISA_NAMESPACE

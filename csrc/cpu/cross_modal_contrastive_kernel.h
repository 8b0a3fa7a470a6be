// The cross-modal contrastive loss (Eq. 5) for a stripe of rows: scores, then loss and gradient of the
// scores in four passes, then the gradients of both sides.
#include "cross_modal_contrastive.h"
#include "exponential.h"
#include "product.h"
#include "simd.h"

namespace deepmsi::DEEPMSI_ISA_NAMESPACE {
namespace {

constexpr float kUnitNormFloor = 1e-12f;
constexpr int64_t kRowGroup = 16;  // rows whose running sums stay in the first-level cache
// Rows of an operand of a product that stay in the first-level cache: sums go through partial sums over as
// many.
constexpr int64_t kScoreDepth = 32;

inline void contrastive_normalize(const float* x, const bool* valid, int64_t rows, int64_t dim,
                                  int64_t padded, float factor, float* unit, float* norm) {
  for (int64_t r = 0; r < rows; ++r, x += dim, unit += padded) {
    const bool present = valid == nullptr || valid[r];
    const float length = present ? root(dot(x, x, dim)) : 0.0f;
    norm[r] = length > kUnitNormFloor ? length : kUnitNormFloor;
    const float scale = factor / norm[r];
    for (int64_t c = 0; c < dim; ++c) unit[c] = present ? x[c] * scale : 0.0f;
    for (int64_t c = dim; c < padded; ++c) unit[c] = 0.0f;
  }
}

inline void contrastive_turn(const float* unit_b, int64_t begin, int64_t end, int64_t dim, float* turned) {
  constexpr int64_t kLanesF = kLanes<float>;
  for (int64_t p = begin; p < end; ++p) {
    const float* from = unit_b + p * kPanel * dim;
    float* to = turned + p * kPanel * dim;
    for (int64_t r = 0; r < kPanel; r += kLanesF) {
      for (int64_t c = 0; c < dim; c += kLanesF) {
        Vec<float> square[kLanesF];
#pragma GCC unroll 16
        for (int64_t t = 0; t < kLanesF; ++t) square[t] = load(from + (r + t) * dim + c);
        transpose<float>(square);
#pragma GCC unroll 16
        for (int64_t t = 0; t < kLanesF; ++t) store(to + (c + t) * kPanel + r, square[t]);
      }
    }
  }
}

// Columns of a panel that are there: the products over columns leave the last panel's padding out.
DEEPMSI_INLINE int64_t columns_of(const ContrastiveStripe& s, int64_t panel) {
  const int64_t left = s.columns - panel * kPanel;
  return left < kPanel ? left : kPanel;
}

inline void contrastive_scores(const ContrastiveStripe& s, int64_t begin, int64_t end) {
  for (int64_t p = begin; p < end; ++p) {
    const int64_t width = columns_of(s, p) > kPanel / 2 ? kPanel : kPanel / 2;
    product<Left::kRows>(s.height, width, s.dim, s.unit_a, s.dim, s.turned_b + p * s.dim * kPanel, kPanel,
                         s.scores + p * s.height * kPanel, kPanel);
  }
}

inline void contrastive_gradient_a(const ContrastiveStripe& s, int64_t begin, int64_t end) {
  for (int64_t p = 0; p < s.panels; ++p) {
    product<Left::kRows, true>(end - begin, s.dim, columns_of(s, p),
                               s.scores + (p * s.height + begin) * kPanel, kPanel,
                               s.unit_b + p * kPanel * s.dim, s.dim, s.grad_a + begin * s.dim, s.dim);
  }
}

inline void contrastive_gradient_b(const ContrastiveStripe& s, int64_t begin, int64_t end) {
  for (int64_t p = begin; p < end; ++p) {
    for (int64_t r = 0; r < s.height; r += kScoreDepth) {
      const int64_t depth = s.height - r < kScoreDepth ? s.height - r : kScoreDepth;
      product<Left::kTurned, true>(columns_of(s, p), s.dim, depth, s.scores + (p * s.height + r) * kPanel,
                                   kPanel, s.unit_a + r * s.dim, s.dim, s.grad_b + p * kPanel * s.dim, s.dim);
    }
  }
}

inline void contrastive_through_norm(const float* unit, const float* norm, const bool* valid, int64_t rows,
                                     int64_t dim, int64_t padded, float factor, float* grad, float* grad_x) {
  for (int64_t r = 0; r < rows; ++r, unit += padded, grad += padded, grad_x += dim) {
    const bool present = valid == nullptr || valid[r];
    // `unit` and the gradient each carry a factor of the temperature's inverse. Below the floor the norm is a
    // constant, so nothing is taken away along the row.
    const float along = norm[r] > kUnitNormFloor ? dot(unit, grad, padded) / (factor * factor) : 0.0f;
    const float scale = factor / norm[r];
    for (int64_t c = 0; c < dim; ++c) grad_x[c] = present ? (grad[c] - unit[c] * along) * scale : 0.0f;
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

// Panels whose columns a lane adds up before what it has goes to the whole sum: bounds the error of long
// rows.
constexpr int64_t kSumPanels = 16;

// The sums of a group of rows, lane by lane.
struct RowSums {
  Vec<float> part[kRowGroup] = {}, whole[kRowGroup] = {};

  DEEPMSI_INLINE void add_up() {
    for (int64_t r = 0; r < kRowGroup; ++r) whole[r] += part[r], part[r] = Vec<float>{};
  }
  DEEPMSI_INLINE float of(int64_t r) const { return lane_sum<float>(whole[r] + part[r]); }
};

// Runs over the scores of rows [begin, end) of a stripe, panel after panel: visit(row - begin, scores, other,
// same) for each vector, where `other` and `same` say which columns are its negatives and its positives. The
// sums are added up every few panels.
template <typename Visit, typename... Sums>
DEEPMSI_INLINE void for_scores(const ContrastiveStripe& s, int64_t begin, int64_t end, const Visit& visit,
                               Sums&... sums) {
  constexpr int64_t kLanesF = kLanes<float>;
  const VecInt none = VecInt{};
  for (int64_t p = 0; p < s.panels; ++p) {
    if (p % kSumPanels == 0) (sums.add_up(), ...);
    for (int64_t v = 0; v < kPanel; v += kLanesF) {
      const int64_t column = p * kPanel + v;
      VecInt label;
      __builtin_memcpy(&label, s.label_b + column, sizeof label);
      for (int64_t r = begin; r < end; ++r) {
        if (!(s.share[r] > 0)) continue;
        const VecInt row = VecInt{} + s.label[r];
        VecInt same = label == row;
        const VecInt other = ~same & (label >= none);
        const int64_t self = s.self < 0 ? -1 : s.self + r - column;
        if (self >= 0 && self < kLanesF) same[self] = 0;
        visit(r - begin, s.scores + (p * s.height + r) * kPanel + v, other, same);
      }
    }
  }
}

inline void contrastive_row_group(const ContrastiveStripe& s, int64_t begin, int64_t end) {
  const Vec<float> zero = {}, one = zero + 1.0f, lowest = zero - __builtin_inff();
  Vec<float> high[kRowGroup];
  RowSums sum, pull, loss;
  float top[kRowGroup], log_z[kRowGroup], push[kRowGroup];
  for (int64_t r = 0; r < kRowGroup; ++r) high[r] = lowest;
  for_scores(s, begin, end, [&](int64_t r, float* at, VecInt other, VecInt) {
    const Vec<float> score = other ? load(at) : lowest;
    high[r] = score > high[r] ? score : high[r];
  });
  for (int64_t r = 0; r < end - begin; ++r) top[r] = lane_max(high[r]);
  // A negative's share of Z takes its score's place; its factor is known after the row.
  for_scores(
      s, begin, end,
      [&](int64_t r, float* at, VecInt other, VecInt same) {
        const Vec<float> score = load(at), e = other ? exp_nonpositive(score - top[r]) : zero;
        sum.part[r] += e;
        store(at, same ? score : e);
      },
      sum);
  for (int64_t r = 0; r < end - begin; ++r) log_z[r] = top[r] + __builtin_logf(sum.of(r));
  // Positive: softplus(x) with x = log Z - s, whose derivative is the logistic function of x.
  for_scores(
      s, begin, end,
      [&](int64_t r, float* at, VecInt, VecInt same) {
        const Vec<float> score = load(at), x = log_z[r] - score, t = exp_nonpositive(x < zero ? x : -x);
        const Vec<float> rest = one / (one + t), logistic = same ? (x < zero ? t * rest : rest) : zero;
        loss.part[r] += same ? (x < zero ? zero : x) + log1p_unit(t) : zero;
        pull.part[r] += logistic;
        store(at, same ? -s.share[begin + r] * logistic : score);
      },
      pull, loss);
  for (int64_t r = 0; r < end - begin; ++r) {
    const float share = s.share[begin + r];
    push[r] = share * pull.of(r) / sum.of(r);
    s.loss[begin + r] = share > 0 ? static_cast<double>(share) * loss.of(r) : 0.0;
  }
  for_scores(s, begin, end, [&](int64_t r, float* at, VecInt, VecInt same) {
    const Vec<float> score = load(at);
    store(at, same ? score : score * push[r]);
  });
  for (int64_t r = begin; r < end; ++r) {
    for (int64_t p = 0; p < s.panels && !(s.share[r] > 0); ++p)
      std::memset(s.scores + (p * s.height + r) * kPanel, 0, kPanel * sizeof(float));
  }
}

inline void contrastive_rows(const ContrastiveStripe& s, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; r += kRowGroup)
    contrastive_row_group(s, r, r + kRowGroup < end ? r + kRowGroup : end);
}

}  // namespace

ContrastiveKernels contrastive_kernels() {
  return {contrastive_normalize,  contrastive_turn,       contrastive_scores,      contrastive_rows,
          contrastive_gradient_a, contrastive_gradient_b, contrastive_through_norm};
}

}  // namespace deepmsi::DEEPMSI_ISA_NAMESPACE

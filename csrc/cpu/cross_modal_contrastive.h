// What the registration of cross_modal_contrastive and its kernels share: one table of kernels per ISA.
#pragma once

#include <cstdint>

namespace deepmsi {

// One row of scores against all columns, of which it makes the loss of the row and the gradient of the
// scores.
struct ContrastiveRow {
  int32_t label;          // of the row
  const int32_t* labels;  // [columns], below 0 where the column takes no part
  int64_t columns;
  int64_t self;  // the column that is neither positive nor negative, or -1
  double share;  // of one positive's term in the loss; over |P(i)| where per_positive
  bool per_positive;
};

struct ContrastiveKernels {
  // unit[r] = x[r] / max(|x[r]|, 1e-12); rows that take no part (valid, if any) become 0 whatever they hold.
  void (*normalize)(const float* x, const bool* valid, int64_t rows, int64_t dim, float* unit, float* norm);
  // Turns the scores of a row into the gradient of the loss and returns the row's part of the loss.
  double (*row)(const ContrastiveRow&, float* scores);
  // grad[r] = (gradient of the unit row taken to x) for rows [0, rows), in place.
  void (*through_norm)(const float* unit, const float* norm, int64_t rows, int64_t dim, float* grad);
};

namespace baseline {
ContrastiveKernels contrastive_kernels();
}
namespace avx2 {
ContrastiveKernels contrastive_kernels();
}
namespace avx512 {
ContrastiveKernels contrastive_kernels();
}

}  // namespace deepmsi

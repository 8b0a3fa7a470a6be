// What the registration of cross_modal_contrastive and its kernels share: the operands of a stripe of rows,
// and one table of kernels per ISA.
#pragma once

#include <cstdint>

namespace deepmsi {

constexpr int64_t kPanel = 32;   // columns that are computed together; joined rows are padded to whole panels
constexpr int64_t kDimPad = 16;  // channels are padded to whole vectors of any instruction set

// A stripe of rows of one modality against all of the other. Scores lie panel after panel, so that the
// product that makes them, the passes over the rows and the two products that read them all walk forwards.
struct ContrastiveStripe {
  int64_t height, panels, dim;  // rows; columns / kPanel; channels, padded
  int64_t columns;              // how many of the panels' columns are there
  const float* unit_a;          // [height, dim], over the temperature
  const float* unit_b;          // [panels * kPanel, dim]
  const float* turned_b;        // [panels, dim, kPanel]
  const int32_t* label;         // [height]
  const int32_t* label_b;       // [panels * kPanel], below 0 where the column takes no part
  int64_t self;                 // of row 0: the column that is neither positive nor negative; -1 if none is
  const float* share;           // [height], of one positive's term in the loss; 0 where a row has no terms

  float* scores;  // [panels, height, kPanel]; after `rows` the gradient of the loss
  double* loss;   // [height]
  float* grad_a;  // [height, dim], added to
  float* grad_b;  // [panels * kPanel, dim], added to
};

struct ContrastiveKernels {
  // unit[r] = x[r] / max(|x[r]|, 1e-12) * factor, `padded` channels apart; rows that take no part (valid, if
  // any) become 0 whatever they hold.
  void (*normalize)(const float* x, const bool* valid, int64_t rows, int64_t dim, int64_t padded,
                    float factor, float* unit, float* norm);
  // Panels [begin, end) of unit_b turned round.
  void (*turn)(const float* unit_b, int64_t begin, int64_t end, int64_t dim, float* turned);
  void (*scores)(const ContrastiveStripe&, int64_t begin, int64_t end);  // panels
  // Turns scores into the gradient of the loss.
  void (*rows)(const ContrastiveStripe&, int64_t begin, int64_t end);
  void (*gradient_a)(const ContrastiveStripe&, int64_t begin, int64_t end);  // rows
  void (*gradient_b)(const ContrastiveStripe&, int64_t begin, int64_t end);  // panels
  // grad_x[r] = the gradient of x, where grad is that of x / |x|; absent rows get 0.
  void (*through_norm)(const float* unit, const float* norm, const bool* valid, int64_t rows, int64_t dim,
                       int64_t padded, float factor, float* grad, float* grad_x);
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

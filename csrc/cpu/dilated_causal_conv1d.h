// What the registration of dilated_causal_conv1d and its kernels share: arguments, and one table of kernels
// per ISA.
#pragma once

#include <cstdint>

#include "storage.h"

namespace deepmsi {

// Output j of `count` lies at row first() + j * step of x; row m of an output is batch m / count, position
// m % count. A is the type in which T is summed.
struct CausalConv {
  int64_t batch, length, inputs, outputs, taps, dilation, count, step;
  bool relu;
  bool residual_given;
  uint32_t threshold;  // words of Philox below it are dropped; 0 without dropout
  double scale;        // of what dropout keeps
  uint64_t seed;

  const void* x;       // T [batch, length, inputs]
  const void* weight;  // T [taps, inputs, outputs]

  // Forward.
  const void* bias;      // T [outputs] or null
  const void* residual;  // T [batch, count, outputs] or null
  void* y;               // T [batch, count, outputs]
  bool* active;          // [batch, count, outputs] or null

  // Backward.
  const void* grad_y;   // T [batch, count, outputs]
  const void* y_saved;  // T, likewise, where relu or a residual was given
  const bool* was_active;
  void* gradient;       // A [batch, count, outputs]: of the convolution itself
  void* grad_residual;  // T or null
  void* grad_x;         // T [batch, length, inputs] or null
  void* grad_weight;    // T [taps, inputs, outputs] or null
  void* grad_bias;      // T [outputs]

  int64_t rows() const { return batch * count; }
  int64_t first() const { return length - 1 - (count - 1) * step; }
};

// weight[tap][c][o] = g[o] v[o][c][tap] / |v[o]|: weight norm over an output, laid out as the convolution
// reads it.
struct WeightFold {
  int64_t outputs, inputs, taps;
  const void* v;  // T [outputs, inputs, taps]
  const void* g;  // T [outputs]
  void* norm;     // A [outputs]

  // Forward.
  void* weight;  // T [taps, inputs, outputs]

  // Backward.
  const void* grad_weight;
  void* grad_v;
  void* grad_g;
};

constexpr int64_t kFoldOutputs = 16;  // outputs of a task: a cache line of floats

struct CausalConvKernels {
  // Tiles [begin, end) of a product; each owns its part of the output and sums it in the same order
  // whoever runs it.
  void (*forward)(const CausalConv&, int64_t begin, int64_t end, char* scratch);
  void (*grad_x)(const CausalConv&, int64_t begin, int64_t end, char* scratch);
  void (*grad_weight)(const CausalConv&, int64_t begin, int64_t end, char* scratch);
  // Rows [begin, end) of `gradient` and of grad_residual.
  void (*gradient)(const CausalConv&, int64_t begin, int64_t end);
  // Columns [begin, end) of grad_bias.
  void (*grad_bias)(const CausalConv&, int64_t begin, int64_t end);
  // Tasks [begin, end) of kFoldOutputs outputs each; scratch holds kFoldOutputs x inputs x taps of A.
  void (*fold)(const WeightFold&, int64_t begin, int64_t end, char* scratch);
  void (*unfold)(const WeightFold&, int64_t begin, int64_t end, char* scratch);
  // Of a product of rows x columns.
  int64_t (*tiles)(int64_t rows, int64_t columns);
  int64_t (*scratch_bytes)(int64_t rows);
};

namespace baseline {
CausalConvKernels causal_conv_kernels(DType dtype);
}
namespace avx2 {
CausalConvKernels causal_conv_kernels(DType dtype);
}
namespace avx512 {
CausalConvKernels causal_conv_kernels(DType dtype);
}

}  // namespace deepmsi

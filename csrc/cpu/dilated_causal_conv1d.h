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
  const void* weight;  // T [taps, inputs, outputs]; of a weight norm v and what follows stand in its place

  // The weight of output o is g[o] v[o] / |v[o]|.
  const void* v;  // T [outputs, inputs, taps]
  const void* g;  // T [outputs]
  void* norms;    // A [2, outputs]: |v| and g / |v|

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
  void* grad_v;         // T [outputs, inputs, taps]
  void* grad_g;         // T [outputs]
  void* grad_bias;      // T [outputs]

  int64_t rows() const { return batch * count; }
  int64_t first() const { return length - 1 - (count - 1) * step; }
};

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
  // The products of a weight norm. Those of the outputs go by panels of `panel` of them, all rows of one at
  // once.
  void (*normed_forward)(const CausalConv&, int64_t begin, int64_t end, char* scratch);
  void (*normed_grad_x)(const CausalConv&, int64_t begin, int64_t end, char* scratch);
  void (*normed_grad_weight)(const CausalConv&, int64_t begin, int64_t end, char* scratch);
  int64_t panel;
  // Of a product of rows x columns.
  int64_t (*tiles)(int64_t rows, int64_t columns);
  int64_t (*scratch_bytes)(int64_t rows);
  int64_t (*normed_scratch_bytes)(const CausalConv&, int64_t rows);
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

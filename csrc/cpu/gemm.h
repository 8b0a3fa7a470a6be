// What the blocks of a transformer are made of on the CPU, one table of functions per instruction set:
// products of matrices with one side packed, and what stands between them, row by row while the rows are in
// cache.
//
// All matrices are float32 with rows that lie `row_*` elements apart.
#pragma once

#include <cstdint>

namespace deepmsi {

struct BlockKernels {
  int64_t tile;   // rows that a product takes at a time
  int64_t panel;  // columns of a packed panel

  // Pack panels [first, last) of B [depth, columns], B[k, j] = b[k * row_b + j] (or b[j * row_b + k] where
  // transposed), into out [panels, depth, panel], with zeros past the last column.
  void (*pack)(const float* b, int64_t row_b, bool transposed, int64_t depth, int64_t columns, int64_t first,
               int64_t last, float* out);
  // C [rows, columns] = A [rows, depth] B for a packed B of which this is a part: its panels lie
  // `panel_depth` rows apart. Added to C, where asked.
  void (*multiply)(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t row_a,
                   const float* packed, int64_t panel_depth, bool add, float* c, int64_t row_c);
  // C [rows, columns] += A^T B for A [depth, rows] and B [depth, columns]; scratch holds depth * panel.
  void (*add_outer)(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t row_a,
                    const float* b, int64_t row_b, float* c, int64_t row_c, float* scratch);

  // x += bias, for every row.
  void (*add_bias)(int64_t rows, int64_t columns, float* x, const float* bias);
  // x = gelu(x + bias), with the exact normal distribution function.
  void (*bias_gelu)(int64_t rows, int64_t columns, float* x, const float* bias);
  // y = gelu(x + bias), and x = gelu'(x + bias).
  void (*bias_gelu_slope)(int64_t rows, int64_t columns, float* x, const float* bias, float* y);
  // x *= y.
  void (*scale_by)(int64_t rows, int64_t columns, float* x, const float* y);
  // x += y.
  void (*add)(int64_t rows, int64_t columns, float* x, const float* y);
  // sums += the columns' sums.
  void (*add_columns)(int64_t rows, int64_t columns, const float* x, float* sums);
  // z += bias; y = x + scale * (normalised z * weight + shift), without x and scale where they are null.
  void (*norm)(int64_t rows, int64_t columns, float* z, const float* bias, const float* x, const float* scale,
               const float* weight, const float* shift, float eps, float* y);
  // The gradient of z from that of y; sums [3, columns] takes those of weight and shift, and of the bias.
  void (*norm_gradient)(int64_t rows, int64_t columns, const float* grad_y, const float* z,
                        const float* scale, const float* weight, float eps, float* grad_z, float* sums);
};

namespace baseline {
BlockKernels block_kernels();
}
namespace avx2 {
BlockKernels block_kernels();
}
namespace avx512 {
BlockKernels block_kernels();
}

}  // namespace deepmsi

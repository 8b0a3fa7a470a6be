// What the blocks of a transformer are made of on the CPU, one table of functions per instruction set and
// type of tensors: products of matrices with one side packed, and what stands between them, row by row while
// the rows are in cache.
//
// Tensors are `stored` in float32 or bfloat16. A product reads `operand` numbers: float32, or bfloat16 where
// that is stored and the CPU multiplies it; it writes float32. Rows of operands lie pitch(columns) numbers
// apart and hold zeros behind the last column; others lie side by side unless told.
#pragma once

#include <cstdint>

#include "storage.h"

namespace deepmsi {

inline int64_t bytes_of(DType type) { return type == DType::kFloat ? 4 : 2; }

struct BlockKernels {
  DType stored, operand;
  int64_t tile;   // rows that a product takes at a time
  int64_t panel;  // columns of a packed panel

  // Numbers from one row of operands to the next: bfloat16 are multiplied two by two.
  int64_t pitch(int64_t columns) const { return multiplies_floats() ? columns : columns + columns % 2; }
  bool stores_floats() const { return stored == DType::kFloat; }
  bool multiplies_floats() const { return operand == DType::kFloat; }
  // Whether stored rows of so many columns are operands as they lie.
  bool as_stored(int64_t columns) const { return operand == stored && pitch(columns) == columns; }

  // Pack panels [first, last) of B [depth, columns], B[k, j] = b[k * row_b + j] (or b[j * row_b + k] where
  // transposed), into out [panels, pitch(depth), panel], with zeros past the last column. B is stored, or in
  // float32 and rounded.
  using Pack = void(const void* b, int64_t row_b, bool transposed, int64_t depth, int64_t columns,
                    int64_t first, int64_t last, void* out);
  Pack *pack, *pack_floats;
  // C [rows, columns] = A [rows, depth] B for a packed B of which this is a part: its panels lie
  // `panel_depth` rows apart, and the rows of C `row_c` numbers. Added to C, where asked.
  void (*multiply)(int64_t rows, int64_t columns, int64_t depth, const void* a, const void* packed,
                   int64_t panel_depth, bool add, float* c, int64_t row_c);
  // C [rows, columns] += A^T B for operands A [depth, rows], whose rows lie `row_a` numbers apart, and B
  // [depth, columns]; scratch holds outer_scratch bytes.
  void (*add_outer)(int64_t rows, int64_t columns, int64_t depth, const void* a, int64_t row_a, const void* b,
                    float* c, void* scratch);
  int64_t outer_scratch;

  // Stored rows as operands, and operands as stored rows.
  void (*to_operand)(int64_t rows, int64_t columns, const void* x, void* y);
  void (*to_stored)(int64_t rows, int64_t columns, const void* x, void* y);
  // x + bias as operands y; a bias of null is 0. Here, in bias_gelu and in scale_by y may be x where operands
  // are floats.
  void (*add_bias)(int64_t rows, int64_t columns, float* x, const float* bias, void* y);
  // gelu(x + bias), with the exact normal distribution function, as operands y.
  void (*bias_gelu)(int64_t rows, int64_t columns, float* x, const float* bias, void* y);
  // The same in other memory, and x = gelu'(x + bias).
  void (*bias_gelu_slope)(int64_t rows, int64_t columns, float* x, const float* bias, void* y);
  // x * factor as operands y.
  void (*scale_by)(int64_t rows, int64_t columns, float* x, const float* factor, void* y);
  // sums += the columns' sums of operands x.
  void (*add_columns)(int64_t rows, int64_t columns, const void* x, float* sums);
  // x + y as stored rows `out`, which may be x where floats are stored; a y of null is 0.
  void (*add)(int64_t rows, int64_t columns, const float* x, const void* y, void* out);
  // z += bias; y = x + scale * (normalised z * weight + shift) for stored x and y, without x and scale where
  // they are null; z is stored in `kept`, where that is not null. Where floats are stored y may be z.
  void (*norm)(int64_t rows, int64_t columns, float* z, const float* bias, const void* x, const float* scale,
               const float* weight, const float* shift, float eps, void* y, void* kept);
  // The gradient of z as operands, from stored z and gradient of y; sums [3, columns] takes those of weight
  // and shift, and of the bias.
  void (*norm_gradient)(int64_t rows, int64_t columns, const void* grad_y, const void* z, const float* scale,
                        const float* weight, float eps, void* grad_z, float* sums);

  // Where the norm comes first: normalised x * weight + shift as operands y, of stored x.
  void (*normed)(int64_t rows, int64_t columns, const void* x, const float* weight, const float* shift,
                 float eps, void* y);
  // x + scale * (z + bias) as stored rows y, which may be z where floats are stored; x and a bias of null are
  // 0, and a scale of null is 1.
  void (*residual)(int64_t rows, int64_t columns, const float* z, const float* bias, const void* x,
                   const float* scale, void* y);
  // The gradient of z as operands, scale * grad_y; sums [columns] takes that of the bias.
  void (*residual_gradient)(int64_t rows, int64_t columns, const void* grad_y, const float* scale,
                            void* grad_z, float* sums);
  // grad_y and what comes through the norm of stored x, whose result has the gradient `through`, as stored
  // rows grad_x, which may be `through` where floats are stored; a grad_y of null is 0, and sums [2, columns]
  // takes those of weight and shift.
  void (*normed_gradient)(int64_t rows, int64_t columns, const float* through, const void* x,
                          const float* weight, float eps, const void* grad_y, void* grad_x, float* sums);
};

// For tensors of float32 or bfloat16.
namespace baseline {
BlockKernels block_kernels(DType stored);
}
namespace avx2 {
BlockKernels block_kernels(DType stored);
}
namespace avx512 {
BlockKernels block_kernels(DType stored);
}
namespace avx512_bf16 {
BlockKernels block_kernels(DType stored);
}

}  // namespace deepmsi

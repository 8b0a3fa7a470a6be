// What both halves of a transformer block share, of a branch f of rows x that ends in a layer's bias:
// y = x + scale * LN(f(x)), or, where the norm comes first, x + scale * f(LN(x)).
#pragma once

#include "blocks.h"

namespace deepmsi {

struct Residual {
  int64_t channels;
  const BlockKernels& k;
  Vector bias, norm_weight, norm_bias, row_scale;
  float eps;
  bool norm_first;

  // Rows of x as f reads them, `most` at a time.
  AsOperands operands(const Rows& x, int64_t most) const {
    const Norm norm{norm_weight.data(), norm_bias.data(), eps};
    return AsOperands(k, x, channels, most, norm_first ? norm : Norm{});
  }

  // Backward reads what f gives where the norm does.
  bool keeps_branch(bool with_grad) const { return with_grad && !norm_first; }

  // y of `rows` rows from `row` on, from z = f without its bias, which y may take the place of. z with the
  // bias is kept, where there is a place for it and the norm reads it.
  void finish(int64_t rows, float* z, int64_t row, const Rows& x, const Rows& y, void* kept) const {
    if (norm_first) {
      k.residual(rows, channels, z, bias.data(), x.at(row), row_scale.at(row), y.at(row));
    } else {
      k.norm(rows, channels, z, bias.data(), x.at(row), row_scale.at(row), norm_weight.data(),
             norm_bias.data(), eps, y.at(row), kept);
    }
  }

  // Of the sums of a gradient the first are those of the norm's weight, of its bias, and of f's bias.
  int64_t sums() const { return 3 * channels; }
  Tensor norm_weight_gradient(const ColumnSums& sums, const Tensor& like) const {
    return sums.write(0, channels, like);
  }
  Tensor norm_bias_gradient(const ColumnSums& sums, const Tensor& like) const {
    return sums.write(channels, channels, like);
  }
  Tensor bias_gradient(const ColumnSums& sums, bool wanted, const Tensor& like) const {
    return sums.write(2 * channels, wanted ? channels : 0, like);
  }

  // The gradient of f, from that of y, for rows from `row` on, which are those from `at` on in a chunk.
  void branch_gradient(int64_t rows, int64_t row, int64_t at, const Rows& grad_y, const Rows& z,
                       const OperandRows& grad_z, ColumnSums& sums) const {
    each_tile(k, rows, [&](int64_t r, int64_t count) {
      const void* dy = grad_y.at(row + r);
      const float* scale = row_scale.at(row + r);
      if (norm_first) {
        k.residual_gradient(count, channels, dy, scale, grad_z.at(at + r), sums.tile(at + r) + 2 * channels);
      } else {
        k.norm_gradient(count, channels, dy, z.at(row + r), scale, norm_weight.data(), eps, grad_z.at(at + r),
                        sums.tile(at + r));
      }
    });
  }

  // The gradient of x, of which `through` came through f, whose place it may take.
  void input_gradient(int64_t rows, int64_t row, int64_t at, const float* through, const Rows& x,
                      const Rows& grad_y, const Rows& grad_x, ColumnSums& sums) const {
    if (!norm_first) {
      k.add(rows, channels, through, grad_y.at(row), grad_x.at(row));
      return;
    }
    each_tile(k, rows, [&](int64_t r, int64_t count) {
      k.normed_gradient(count, channels, through + r * channels, x.at(row + r), norm_weight.data(), eps,
                        grad_y.at(row + r), grad_x.at(row + r), sums.tile(at + r));
    });
  }
};

}  // namespace deepmsi

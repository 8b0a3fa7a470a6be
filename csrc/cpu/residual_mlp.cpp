// Registration of residual_mlp under the CPU key: y = x + scale * LN(W2 gelu(W1 x + b1) + b2).
//
// The wide hidden rows never leave the cache: the forward pass makes them a block of rows and of columns at a
// time, the backward pass makes them again a chunk at a time. Rows past the last offset cost nothing.
#include <tuple>

#include "blocks.h"

namespace deepmsi {
namespace {

constexpr const char* kOp = "residual_mlp";
// Hidden columns that the forward pass makes of a block of rows at a time; whole panels.
constexpr int64_t kHiddenColumns = 512;
// Bytes of all rows up to which these stay in cache while the weights pass by, a group of hidden columns at a
// time.
constexpr int64_t kRowBytes = int64_t{8} << 20;

struct Mlp {
  int64_t rows, channels, hidden, valid;
  const BlockKernels& k;
  Tensor x, fc1_weight, fc2_weight;
  Vector fc1_bias, fc2_bias, norm_weight, norm_bias, row_scale;
  float eps;

  Mlp(const Tensor& x_any, const Tensor& w1, const Tensor& b1, const Tensor& w2, const Tensor& b2,
      const Tensor& weight, const Tensor& bias, const std::optional<Tensor>& scale,
      const std::optional<Tensor>& cu_seqlens, double epsilon)
      : rows(x_any.size(0)),
        channels(x_any.size(1)),
        hidden(b1.numel()),
        valid(valid_rows(cu_seqlens, rows, kOp)),
        k(block_kernels(stored_type(x_any, kOp))),
        x(stored(x_any, k, rows * channels, kOp, "x")),
        fc1_weight(weight_of(w1, k, hidden, channels, kOp, "fc1_weight")),
        fc2_weight(weight_of(w2, k, channels, hidden, kOp, "fc2_weight")),
        fc1_bias(b1, hidden, kOp, "fc1_bias"),
        fc2_bias(b2, channels, kOp, "fc2_bias"),
        norm_weight(weight, channels, kOp, "norm_weight"),
        norm_bias(bias, channels, kOp, "norm_bias"),
        row_scale(scale, rows, kOp, "row_scale"),
        eps(static_cast<float>(epsilon)) {}
};

// y of so few rows that threads share the columns of a product.
void forward_few(const Mlp& m, const Rows& x, const Rows& y) {
  const BlockKernels& k = m.k;
  const Packed first(k, m.fc1_weight, true, m.channels, m.hidden);
  const Packed second(k, m.fc2_weight, true, m.hidden, m.channels);
  const Floats hidden(m.valid * m.hidden);
  const OperandRows active(k, m.valid, m.hidden, hidden);
  const AsOperands operands(k, x, m.channels, m.valid);
  first.multiply_shared(m.valid, operands.rows_of_chunk(0, m.valid).start, hidden.data());
  over_each_row(m.valid, [&](int64_t row) {
    k.bias_gelu(1, m.hidden, hidden.data() + row * m.hidden, m.fc1_bias.data(), active.at(row));
  });
  const FloatRows sum(k.stores_floats(), m.valid, m.channels);
  float* z = sum.at(y.at(0));
  second.multiply_shared(m.valid, active.at(0), z);
  over_each_row(m.valid, [&](int64_t row) {
    k.norm(1, m.channels, z + row * m.channels, m.fc2_bias.data(), x.at(row), m.row_scale.at(row),
           m.norm_weight.data(), m.norm_bias.data(), m.eps, y.at(row), nullptr);
  });
}

std::tuple<Tensor, Tensor> residual_mlp_fwd_cpu(Tensor x_any, Tensor fc1_weight, Tensor fc1_bias,
                                                Tensor fc2_weight, Tensor fc2_bias, Tensor norm_weight,
                                                Tensor norm_bias, std::optional<Tensor> row_scale,
                                                std::optional<Tensor> cu_seqlens, double eps,
                                                bool with_grad) {
  const Mlp m(x_any, fc1_weight, fc1_bias, fc2_weight, fc2_bias, norm_weight, norm_bias, row_scale,
              cu_seqlens, eps);
  const BlockKernels& k = m.k;
  const int64_t channels = m.channels;
  Tensor y_all = torch::stable::new_empty(m.x, {m.rows, channels});
  Tensor branch = torch::stable::new_empty(m.x, {with_grad ? m.rows : 0, channels});
  const Rows x = rows_of(m.x, channels), y = rows_of(y_all, channels), kept = rows_of(branch, channels);
  if (!with_grad && is_packed(m.fc2_weight) && shares_columns(m.fc1_weight, m.valid, m.hidden)) {
    forward_few(m, x, y);
    pass_rows(y_all, &m.x, m.valid);
    return {y_all, branch};
  }
  const int64_t width = std::min(m.hidden, kHiddenColumns), block = block_rows(width + 2 * channels);
  // Few rows: the memory that a group's weights are packed into stays in cache, too. Many: all weights at
  // once.
  const bool few = m.valid * channels * static_cast<int64_t>(sizeof(float)) <= kRowBytes;
  const int64_t span = few ? width : m.hidden;
  // What the norm reads is summed where it is kept, or where its result will be, if floats are stored; else
  // in memory of its own, from group to group for all rows.
  const bool across = !k.stores_floats() && span < m.hidden;
  const Floats summed(across ? m.valid * channels : 0);
  for (int64_t start = 0; start < m.hidden; start += span) {
    const int64_t group = std::min(span, m.hidden - start);
    const Packed first(k, m.fc1_weight, true, channels, m.hidden, {0, start, channels, group});
    const Packed second(k, m.fc2_weight, true, m.hidden, channels, {start, 0, group, channels});
    over_rows(m.valid, [&](int64_t begin, int64_t end) {
      const Floats hidden(block * width);
      const FloatRows sum(k.stores_floats() || across, block, channels);
      const OperandRows active(k, block, width, hidden);
      const AsOperands operands(k, x, channels, block);
      for (int64_t row = begin; row < end; row += block) {
        const int64_t count = std::min(block, end - row);
        const void* in = operands.rows(row, count).start;
        float* z = sum.at(across ? summed.data() + row * channels : (with_grad ? kept : y).at(row));
        for (int64_t from = 0; from < group; from += width) {
          const int64_t columns = std::min(width, group - from);
          first.multiply_columns(count, in, from, columns, hidden.data());
          k.bias_gelu(count, columns, hidden.data(), m.fc1_bias.at(start + from), active.at(0));
          second.multiply_rows(count, active.at(0), from, columns, start + from > 0, z);
        }
        if (start + group < m.hidden) continue;
        k.norm(count, channels, z, m.fc2_bias.data(), x.at(row), m.row_scale.at(row), m.norm_weight.data(),
               m.norm_bias.data(), m.eps, y.at(row),
               with_grad && !k.stores_floats() ? kept.at(row) : nullptr);
      }
    });
  }
  pass_rows(y_all, &m.x, m.valid);
  pass_rows(branch, nullptr, m.valid);
  return {y_all, branch};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> residual_mlp_bwd_cpu(
    Tensor grad_y_any, Tensor x_any, Tensor branch, Tensor fc1_weight, Tensor fc1_bias, Tensor fc2_weight,
    Tensor fc2_bias, Tensor norm_weight, Tensor norm_bias, std::optional<Tensor> row_scale,
    std::optional<Tensor> cu_seqlens, double eps, bool wants_layers) {
  const Mlp m(x_any, fc1_weight, fc1_bias, fc2_weight, fc2_bias, norm_weight, norm_bias, row_scale,
              cu_seqlens, eps);
  const BlockKernels& k = m.k;
  const int64_t channels = m.channels, width = m.hidden;
  const Tensor grad_y = stored(grad_y_any, k, m.rows * channels, kOp, "the gradient");
  const Tensor held = stored(branch, k, m.rows * channels, kOp, "the branch");
  Tensor grad_x = torch::stable::new_empty(m.x, {m.rows, channels});
  const Rows x = rows_of(m.x, channels), dy = rows_of(grad_y, channels), z = rows_of(held, channels),
             dx = rows_of(grad_x, channels);
  const WeightGradient grad_fc1(k, wants_layers, m.fc1_weight, width, channels),
      grad_fc2(k, wants_layers, m.fc2_weight, channels, width);
  const Packed first(k, m.fc1_weight, true, channels, width);
  const Packed back_second(k, m.fc2_weight, false, channels, width);
  const Packed back_first(k, m.fc1_weight, false, width, channels);

  const int64_t step = std::min(chunk_rows(k, width, width * channels), std::max<int64_t>(m.valid, 1));
  const OperandRows active(k, step, width), grad_hidden(k, step, width), grad_z(k, step, channels);
  const AsOperands operands(k, x, channels, step);
  ColumnSums sums(3 * channels + width);  // of the norm's weight and bias, of b2, of b1
  for (int64_t start = 0; start < m.valid; start += step) {
    const int64_t rows = std::min(step, m.valid - start);
    const Rows in = operands.rows_of_chunk(start, rows);
    sums.begin_chunk(rows);
    over_rows(rows, [&](int64_t begin, int64_t end) {
      const Floats gradient(kBlockRows * width);
      const FloatRows slopes(k.multiplies_floats(), kBlockRows, width);
      const FloatRows back(k.stores_floats(), kBlockRows, channels);
      for (int64_t row = begin; row < end; row += kBlockRows) {
        const int64_t count = std::min(kBlockRows, end - row), at = start + row;
        for (int64_t r = row; r < row + count; r += k.tile) {
          k.norm_gradient(std::min(k.tile, row + count - r), channels, dy.at(start + r), z.at(start + r),
                          m.row_scale.at(start + r), m.norm_weight.data(), m.eps, grad_z.at(r), sums.tile(r));
        }
        float* slope = slopes.at(grad_hidden.at(row));
        first.multiply(count, in.at(row), slope);
        k.bias_gelu_slope(count, width, slope, m.fc1_bias.data(), active.at(row));
        back_second.multiply(count, grad_z.at(row), gradient.data());
        k.scale_by(count, width, slope, gradient.data(), grad_hidden.at(row));
        for (int64_t r = row; wants_layers && r < row + count; r += k.tile) {
          k.add_columns(std::min(k.tile, row + count - r), width, grad_hidden.at(r),
                        sums.tile(r) + 3 * channels);
        }
        float* through = back.at(dx.at(at));
        back_first.multiply(count, grad_hidden.at(row), through);
        k.add(count, channels, through, dy.at(at), dx.at(at));
      }
    });
    sums.end_chunk();
    if (!wants_layers) continue;
    grad_fc1.add(rows, grad_hidden.at(0), in.at(0));
    grad_fc2.add(rows, grad_z.at(0), active.at(0));
  }
  pass_rows(grad_x, &grad_y, m.valid);
  return {grad_x,
          grad_fc1.written(),
          sums.write(3 * channels, wants_layers ? width : 0, fc1_bias),
          grad_fc2.written(),
          sums.write(2 * channels, wants_layers ? channels : 0, fc2_bias),
          sums.write(0, channels, norm_weight),
          sums.write(channels, channels, norm_bias)};
}

STABLE_TORCH_LIBRARY_IMPL(deepmsi, CPU, m) {
  m.impl("residual_mlp_cpp_fwd", TORCH_BOX(&residual_mlp_fwd_cpu));
  m.impl("residual_mlp_cpp_bwd", TORCH_BOX(&residual_mlp_bwd_cpu));
}

}  // namespace
}  // namespace deepmsi

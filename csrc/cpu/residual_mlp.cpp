// Registration of residual_mlp under the CPU key: y = x + scale * LN(W2 gelu(W1 x + b1) + b2), or the norm of
// x first.
//
// The wide hidden rows never leave the cache: the forward pass makes them a block of rows and of columns at a
// time, the backward pass makes them again a chunk at a time. Rows past the last offset cost nothing.
#include <tuple>

#include "residual.h"

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
  Vector fc1_bias;
  Residual residual;

  Mlp(const Tensor& x_any, const Tensor& w1, const Tensor& b1, const Tensor& w2, const Tensor& b2,
      const Tensor& weight, const Tensor& bias, const std::optional<Tensor>& scale,
      const std::optional<Tensor>& cu_seqlens, double eps, bool norm_first)
      : rows(x_any.size(0)),
        channels(x_any.size(1)),
        hidden(b1.numel()),
        valid(valid_rows(cu_seqlens, rows, kOp)),
        k(block_kernels(stored_type(x_any, kOp))),
        x(stored(x_any, k, rows * channels, kOp, "x")),
        fc1_weight(weight_of(w1, k, hidden, channels, kOp, "fc1_weight")),
        fc2_weight(weight_of(w2, k, channels, hidden, kOp, "fc2_weight")),
        fc1_bias(b1, hidden, kOp, "fc1_bias"),
        residual{channels,
                 k,
                 Vector(b2, channels, kOp, "fc2_bias"),
                 Vector(weight, channels, kOp, "norm_weight"),
                 Vector(bias, channels, kOp, "norm_bias"),
                 Vector(scale, rows, kOp, "row_scale"),
                 static_cast<float>(eps),
                 norm_first} {}
};

// y of so few rows that threads share the columns of a product.
void forward_few(const Mlp& m, const Rows& x, const Rows& y) {
  const BlockKernels& k = m.k;
  const Packed first(k, m.fc1_weight, true, m.channels, m.hidden);
  const Packed second(k, m.fc2_weight, true, m.hidden, m.channels);
  const Floats hidden(m.valid * m.hidden);
  const OperandRows active(k, m.valid, m.hidden, hidden);
  const AsOperands operands = m.residual.operands(x, m.valid);
  first.multiply_shared(m.valid, operands.rows_of_chunk(0, m.valid).start, hidden.data());
  over_each_row(m.valid, [&](int64_t row) {
    k.bias_gelu(1, m.hidden, hidden.data() + row * m.hidden, m.fc1_bias.data(), active.at(row));
  });
  const FloatRows sum(k.stores_floats(), m.valid, m.channels);
  float* z = sum.at(y.at(0));
  second.multiply_shared(m.valid, active.at(0), z);
  over_each_row(m.valid,
                [&](int64_t row) { m.residual.finish(1, z + row * m.channels, row, x, y, nullptr); });
}

std::tuple<Tensor, Tensor> residual_mlp_fwd_cpu(Tensor x_any, Tensor fc1_weight, Tensor fc1_bias,
                                                Tensor fc2_weight, Tensor fc2_bias, Tensor norm_weight,
                                                Tensor norm_bias, std::optional<Tensor> row_scale,
                                                std::optional<Tensor> cu_seqlens, double eps, bool norm_first,
                                                bool with_grad) {
  const Mlp m(x_any, fc1_weight, fc1_bias, fc2_weight, fc2_bias, norm_weight, norm_bias, row_scale,
              cu_seqlens, eps, norm_first);
  const BlockKernels& k = m.k;
  const int64_t channels = m.channels;
  Tensor y_all = torch::stable::new_empty(m.x, {m.rows, channels});
  const bool keeps = m.residual.keeps_branch(with_grad);
  Tensor branch = torch::stable::new_empty(m.x, {keeps ? m.rows : 0, channels});
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
      const AsOperands operands = m.residual.operands(x, block);
      for (int64_t row = begin; row < end; row += block) {
        const int64_t count = std::min(block, end - row);
        const void* in = operands.rows(row, count).start;
        float* z = sum.at(across ? summed.data() + row * channels : (keeps ? kept : y).at(row));
        for (int64_t from = 0; from < group; from += width) {
          const int64_t columns = std::min(width, group - from);
          first.multiply_columns(count, in, from, columns, hidden.data());
          k.bias_gelu(count, columns, hidden.data(), m.fc1_bias.at(start + from), active.at(0));
          second.multiply_rows(count, active.at(0), from, columns, start + from > 0, z);
        }
        if (start + group < m.hidden) continue;
        m.residual.finish(count, z, row, x, y, keeps && !k.stores_floats() ? kept.at(row) : nullptr);
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
    std::optional<Tensor> cu_seqlens, double eps, bool norm_first, bool wants_layers) {
  const Mlp m(x_any, fc1_weight, fc1_bias, fc2_weight, fc2_bias, norm_weight, norm_bias, row_scale,
              cu_seqlens, eps, norm_first);
  const BlockKernels& k = m.k;
  const int64_t channels = m.channels, width = m.hidden;
  const Tensor grad_y = stored(grad_y_any, k, m.rows * channels, kOp, "the gradient");
  const Tensor held =
      stored(branch, k, m.residual.keeps_branch(true) ? m.rows * channels : 0, kOp, "the branch");
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
  const AsOperands operands = m.residual.operands(x, step);
  const int64_t own = m.residual.sums();
  ColumnSums sums(own + width);  // of the residual, and of b1
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
        m.residual.branch_gradient(count, at, row, dy, z, grad_z, sums);
        float* slope = slopes.at(grad_hidden.at(row));
        first.multiply(count, in.at(row), slope);
        k.bias_gelu_slope(count, width, slope, m.fc1_bias.data(), active.at(row));
        back_second.multiply(count, grad_z.at(row), gradient.data());
        k.scale_by(count, width, slope, gradient.data(), grad_hidden.at(row));
        for (int64_t r = row; wants_layers && r < row + count; r += k.tile) {
          k.add_columns(std::min(k.tile, row + count - r), width, grad_hidden.at(r), sums.tile(r) + own);
        }
        float* through = back.at(dx.at(at));
        back_first.multiply(count, grad_hidden.at(row), through);
        m.residual.input_gradient(count, at, row, through, x, dy, dx, sums);
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
          sums.write(own, wants_layers ? width : 0, fc1_bias),
          grad_fc2.written(),
          m.residual.bias_gradient(sums, wants_layers, fc2_bias),
          m.residual.norm_weight_gradient(sums, norm_weight),
          m.residual.norm_bias_gradient(sums, norm_bias)};
}

STABLE_TORCH_LIBRARY_IMPL(deepmsi, CPU, m) {
  m.impl("residual_mlp_cpp_fwd", TORCH_BOX(&residual_mlp_fwd_cpu));
  m.impl("residual_mlp_cpp_bwd", TORCH_BOX(&residual_mlp_bwd_cpu));
}

}  // namespace
}  // namespace deepmsi

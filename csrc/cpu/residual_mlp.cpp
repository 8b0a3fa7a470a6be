// Registration of residual_mlp under the CPU key: y = x + scale * LN(W2 gelu(W1 x + b1) + b2).
//
// The wide hidden rows never leave the cache: the forward pass makes them a block of rows and of columns at a
// time, the backward pass makes them again a chunk at a time. Rows past the last offset cost nothing.
#include <cstring>
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
  Tensor x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, norm_weight, norm_bias;
  std::optional<Tensor> row_scale;
  float eps;

  Mlp(const Tensor& x_any, const Tensor& w1, const Tensor& b1, const Tensor& w2, const Tensor& b2,
      const Tensor& weight, const Tensor& bias, const std::optional<Tensor>& scale,
      const std::optional<Tensor>& cu_seqlens, double epsilon)
      : rows(x_any.size(0)),
        channels(x_any.size(1)),
        hidden(w1.size(0)),
        valid(valid_rows(cu_seqlens, rows, kOp)),
        x(floats(x_any, rows * channels, kOp, "x")),
        fc1_weight(floats(w1, hidden * channels, kOp, "fc1_weight")),
        fc1_bias(floats(b1, hidden, kOp, "fc1_bias")),
        fc2_weight(floats(w2, channels * hidden, kOp, "fc2_weight")),
        fc2_bias(floats(b2, channels, kOp, "fc2_bias")),
        norm_weight(floats(weight, channels, kOp, "norm_weight")),
        norm_bias(floats(bias, channels, kOp, "norm_bias")),
        row_scale(floats(scale, rows, kOp, "row_scale")),
        eps(static_cast<float>(epsilon)) {}
};

std::tuple<Tensor, Tensor> residual_mlp_fwd_cpu(Tensor x, Tensor fc1_weight, Tensor fc1_bias,
                                                Tensor fc2_weight, Tensor fc2_bias, Tensor norm_weight,
                                                Tensor norm_bias, std::optional<Tensor> row_scale,
                                                std::optional<Tensor> cu_seqlens, double eps,
                                                bool with_grad) {
  const Mlp m(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, norm_weight, norm_bias, row_scale, cu_seqlens,
              eps);
  const BlockKernels& k = block_kernels();
  Tensor y = torch::stable::new_empty(m.x, {m.rows, m.channels});
  Tensor branch = torch::stable::new_empty(m.x, {with_grad ? m.rows : 0, m.channels});
  const int64_t width = std::min(m.hidden, kHiddenColumns), block = block_rows(width + 2 * m.channels);
  // Few rows: the memory that a group's weights are packed into stays in cache, too. Many: all weights at
  // once.
  const bool few = m.valid * m.channels * static_cast<int64_t>(sizeof(float)) <= kRowBytes;
  const int64_t span = few ? width : m.hidden;
  for (int64_t start = 0; start < m.hidden; start += span) {
    const int64_t group = std::min(span, m.hidden - start);
    const Packed first(pointer<const float>(m.fc1_weight) + start * m.channels, true, m.channels, group);
    const Packed second(pointer<const float>(m.fc2_weight) + start, true, group, m.channels, m.hidden);
    over_rows(m.valid, [&](int64_t begin, int64_t end) {
      const Floats hidden(block * width);
      for (int64_t row = begin; row < end; row += block) {
        const int64_t count = std::min(block, end - row), at = row * m.channels;
        const float* in = pointer<const float>(m.x) + at;
        float* z = pointer<float>(with_grad ? branch : y) + at;
        for (int64_t from = 0; from < group; from += width) {
          const int64_t columns = std::min(width, group - from);
          first.multiply_columns(count, in, from, columns, hidden.data());
          k.bias_gelu(count, columns, hidden.data(), pointer<const float>(m.fc1_bias) + start + from);
          second.multiply_rows(count, hidden.data(), from, columns, start + from > 0, z);
        }
        if (start + group < m.hidden) continue;
        k.norm(count, m.channels, z, pointer<const float>(m.fc2_bias), in,
               at_row(pointer_or_null(m.row_scale), row), pointer<const float>(m.norm_weight),
               pointer<const float>(m.norm_bias), m.eps, pointer<float>(y) + at);
      }
    });
  }
  pass_rows(y, &m.x, m.valid);
  pass_rows(branch, nullptr, m.valid);
  return {y, branch};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> residual_mlp_bwd_cpu(
    Tensor grad_y_any, Tensor x, Tensor branch, Tensor fc1_weight, Tensor fc1_bias, Tensor fc2_weight,
    Tensor fc2_bias, Tensor norm_weight, Tensor norm_bias, std::optional<Tensor> row_scale,
    std::optional<Tensor> cu_seqlens, double eps, bool wants_layers) {
  const Mlp m(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, norm_weight, norm_bias, row_scale, cu_seqlens,
              eps);
  const BlockKernels& k = block_kernels();
  const int64_t channels = m.channels, width = m.hidden;
  const Tensor grad_y = floats(grad_y_any, m.rows * channels, kOp, "the gradient");
  const Tensor z = floats(branch, m.rows * channels, kOp, "the branch");
  Tensor grad_x = torch::stable::new_empty(m.x, {m.rows, channels});
  Tensor grad_fc1 = zeros_where(wants_layers, m.fc1_weight),
         grad_fc2 = zeros_where(wants_layers, m.fc2_weight);
  const Packed first(pointer<const float>(m.fc1_weight), true, channels, width);
  const Packed back_second(pointer<const float>(m.fc2_weight), false, channels, width);
  const Packed back_first(pointer<const float>(m.fc1_weight), false, width, channels);

  const int64_t step = std::min(chunk_rows(width), std::max<int64_t>(m.valid, 1));
  const Floats active(step * width), grad_hidden(step * width), grad_z(step * channels);
  ColumnSums sums(3 * channels + width);  // of the norm's weight and bias, of b2, of b1
  for (int64_t start = 0; start < m.valid; start += step) {
    const int64_t rows = std::min(step, m.valid - start);
    const float* in = pointer<const float>(m.x) + start * channels;
    sums.begin_chunk(rows);
    over_rows(rows, [&](int64_t begin, int64_t end) {
      const Floats gradient(kBlockRows * width);
      for (int64_t row = begin; row < end; row += kBlockRows) {
        const int64_t count = std::min(kBlockRows, end - row), at = (start + row) * channels;
        const float* dy = pointer<const float>(grad_y) + at;
        float *dz = grad_z.data() + row * channels, *slope = grad_hidden.data() + row * width;
        for (int64_t r = 0; r < count; r += k.tile) {
          k.norm_gradient(std::min(k.tile, count - r), channels, dy + r * channels,
                          pointer<const float>(z) + at + r * channels,
                          at_row(pointer_or_null(m.row_scale), start + row + r),
                          pointer<const float>(m.norm_weight), m.eps, dz + r * channels, sums.tile(row + r));
        }
        first.multiply(count, in + row * channels, slope);
        k.bias_gelu_slope(count, width, slope, pointer<const float>(m.fc1_bias), active.data() + row * width);
        back_second.multiply(count, dz, gradient.data());
        k.scale_by(count, width, slope, gradient.data());
        for (int64_t r = 0; wants_layers && r < count; r += k.tile) {
          k.add_columns(std::min(k.tile, count - r), width, slope + r * width,
                        sums.tile(row + r) + 3 * channels);
        }
        back_first.multiply(count, slope, pointer<float>(grad_x) + at);
        k.add(count, channels, pointer<float>(grad_x) + at, dy);
      }
    });
    sums.end_chunk();
    if (!wants_layers) continue;
    add_weight_gradient(rows, width, channels, grad_hidden.data(), in, pointer<float>(grad_fc1));
    add_weight_gradient(rows, channels, width, grad_z.data(), active.data(), pointer<float>(grad_fc2));
  }
  pass_rows(grad_x, &grad_y, m.valid);
  auto written = [&](int64_t from, int64_t count) {
    Tensor out = torch::stable::new_empty(m.x, {count});
    sums.write(from, out);
    return out;
  };
  return {grad_x,
          grad_fc1,
          written(3 * channels, wants_layers ? width : 0),
          grad_fc2,
          written(2 * channels, wants_layers ? channels : 0),
          written(0, channels),
          written(channels, channels)};
}

STABLE_TORCH_LIBRARY_IMPL(deepmsi, CPU, m) {
  m.impl("residual_mlp_cpp_fwd", TORCH_BOX(&residual_mlp_fwd_cpu));
  m.impl("residual_mlp_cpp_bwd", TORCH_BOX(&residual_mlp_bwd_cpu));
}

}  // namespace
}  // namespace deepmsi

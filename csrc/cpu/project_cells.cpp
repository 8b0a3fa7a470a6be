// Registration of project_cells under the CPU key: y = LN(W cell + b) for the cells of a strided view.
//
// Cells are gathered a block of rows at a time and never lie in memory as a whole. Rows past the last offset
// cost nothing.
#include <cstring>
#include <tuple>

#include "blocks.h"

namespace deepmsi {
namespace {

constexpr const char* kOp = "project_cells";

struct Cells {
  int64_t rows, depth, channels, valid;
  int64_t size[6], stride[6];  // of x [F, H, W, A, B, c], whose last stride is 1
  Tensor x, weight, norm_weight;
  float eps;

  Cells(const Tensor& x_any, const Tensor& w, const Tensor& norm, const std::optional<Tensor>& cu_seqlens,
        double epsilon)
      : channels(w.size(0)), x(x_any), norm_weight(norm), eps(static_cast<float>(epsilon)) {
    STD_TORCH_CHECK(
        x.scalar_type() == ScalarType::Float && x.dim() == 6 && (x.stride(5) == 1 || x.size(5) == 1), kOp,
        ": x must be float32 [F, H, W, A, B, c] with runs of c");
    for (int64_t d = 0; d < 6; ++d) size[d] = x.size(d), stride[d] = x.stride(d);
    rows = size[0] * size[1] * size[2];
    depth = size[3] * size[4] * size[5];
    valid = valid_rows(cu_seqlens, rows, kOp);
    weight = floats(w, channels * depth, kOp, "weight");
    norm_weight = floats(norm, channels, kOp, "norm_weight");
  }

  // Call visit(offset in a tensor of x's sizes, offset in the cell) for every run of a row.
  template <typename Visit>
  void runs(const int64_t* step, int64_t row, const Visit& visit) const {
    const int64_t frame = row / (size[1] * size[2]), rest = row % (size[1] * size[2]);
    const int64_t start = frame * step[0] + rest / size[2] * step[1] + rest % size[2] * step[2];
    int64_t to = 0;
    for (int64_t a = 0; a < size[3]; ++a) {
      for (int64_t b = 0; b < size[4]; ++b, to += size[5]) visit(start + a * step[3] + b * step[4], to);
    }
  }

  void gather(int64_t row, int64_t count, float* out) const {
    const float* from = pointer<const float>(x);
    for (int64_t r = 0; r < count; ++r, out += depth) {
      runs(stride, row + r,
           [&](int64_t at, int64_t to) { std::memcpy(out + to, from + at, size[5] * sizeof(float)); });
    }
  }

  void scatter(int64_t row, int64_t count, const float* in, const Tensor& like_x) const {
    int64_t step[6];
    for (int64_t d = 0; d < 6; ++d) step[d] = like_x.stride(d);
    float* out = pointer<float>(like_x);
    for (int64_t r = 0; r < count; ++r, in += depth) {
      runs(step, row + r,
           [&](int64_t at, int64_t to) { std::memcpy(out + at, in + to, size[5] * sizeof(float)); });
    }
  }
};

std::tuple<Tensor, Tensor> project_cells_fwd_cpu(Tensor x, Tensor weight, std::optional<Tensor> bias_any,
                                                 Tensor norm_weight, Tensor norm_bias_any,
                                                 std::optional<Tensor> cu_seqlens, double eps,
                                                 bool with_grad) {
  const Cells cells(x, weight, norm_weight, cu_seqlens, eps);
  const BlockKernels& k = block_kernels();
  const std::optional<Tensor> bias = floats(bias_any, cells.channels, kOp, "bias");
  const Tensor norm_bias = floats(norm_bias_any, cells.channels, kOp, "norm_bias");
  Tensor y = torch::stable::new_empty(x, {cells.rows, cells.channels});
  Tensor branch = torch::stable::new_empty(x, {with_grad ? cells.rows : 0, cells.channels});
  const Packed product(pointer<const float>(cells.weight), true, cells.depth, cells.channels);
  const int64_t block = block_rows(cells.depth + cells.channels);
  over_rows(cells.valid, [&](int64_t begin, int64_t end) {
    const Floats gathered(block * cells.depth), kept(with_grad ? 0 : block * cells.channels);
    for (int64_t row = begin; row < end; row += block) {
      const int64_t count = std::min(block, end - row), at = row * cells.channels;
      float* z = with_grad ? pointer<float>(branch) + at : kept.data();
      cells.gather(row, count, gathered.data());
      product.multiply(count, gathered.data(), z);
      k.norm(count, cells.channels, z, pointer_or_null(bias), nullptr, nullptr,
             pointer<const float>(cells.norm_weight), pointer<const float>(norm_bias), cells.eps,
             pointer<float>(y) + at);
    }
  });
  pass_rows(y, nullptr, cells.valid);
  pass_rows(branch, nullptr, cells.valid);
  return {y, branch};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> project_cells_bwd_cpu(Tensor grad_y_any, Tensor x,
                                                                         Tensor branch, Tensor weight,
                                                                         Tensor norm_weight,
                                                                         std::optional<Tensor> cu_seqlens,
                                                                         double eps, bool wants_x) {
  const Cells cells(x, weight, norm_weight, cu_seqlens, eps);
  const BlockKernels& k = block_kernels();
  const int64_t channels = cells.channels, depth = cells.depth;
  const Tensor grad_y = floats(grad_y_any, cells.rows * channels, kOp, "the gradient");
  const Tensor z = floats(branch, cells.rows * channels, kOp, "the branch");
  Tensor grad_x = wants_x ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0, 0, 0, 0, 0, 0});
  if (wants_x && cells.valid < cells.rows)
    std::memset(grad_x.data_ptr(), 0, grad_x.numel() * static_cast<int64_t>(sizeof(float)));
  Tensor grad_weight = zeros_like(cells.weight);
  const Packed back(pointer<const float>(cells.weight), false, channels, depth);
  const int64_t step = std::min(chunk_rows(std::max(depth, channels)), std::max<int64_t>(cells.valid, 1));
  const Floats gathered(step * depth), grad_z(step * channels);
  ColumnSums sums(3 * channels);  // of the norm's weight and bias, of the bias
  for (int64_t start = 0; start < cells.valid; start += step) {
    const int64_t rows = std::min(step, cells.valid - start);
    sums.begin_chunk(rows);
    over_rows(rows, [&](int64_t begin, int64_t end) {
      const Floats gradient(wants_x ? kBlockRows * depth : 0);
      for (int64_t row = begin; row < end; row += kBlockRows) {
        const int64_t count = std::min(kBlockRows, end - row), at = (start + row) * channels;
        float* dz = grad_z.data() + row * channels;
        cells.gather(start + row, count, gathered.data() + row * depth);
        for (int64_t r = 0; r < count; r += k.tile) {
          const int64_t from = at + r * channels;
          k.norm_gradient(std::min(k.tile, count - r), channels, pointer<const float>(grad_y) + from,
                          pointer<const float>(z) + from, nullptr, pointer<const float>(cells.norm_weight),
                          cells.eps, dz + r * channels, sums.tile(row + r));
        }
        if (!wants_x) continue;
        back.multiply(count, dz, gradient.data());
        cells.scatter(start + row, count, gradient.data(), grad_x);
      }
    });
    sums.end_chunk();
    add_weight_gradient(rows, channels, depth, grad_z.data(), gathered.data(), pointer<float>(grad_weight));
  }
  auto written = [&](int64_t from) {
    Tensor out = torch::stable::new_empty(x, {channels});
    sums.write(from, out);
    return out;
  };
  return {grad_x, grad_weight, written(2 * channels), written(0), written(channels)};
}

STABLE_TORCH_LIBRARY_IMPL(deepmsi, CPU, m) {
  m.impl("project_cells_cpp_fwd", TORCH_BOX(&project_cells_fwd_cpu));
  m.impl("project_cells_cpp_bwd", TORCH_BOX(&project_cells_bwd_cpu));
}

}  // namespace
}  // namespace deepmsi

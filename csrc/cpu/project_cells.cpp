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
  const BlockKernels& k;
  Tensor x, weight;
  Vector norm_weight;
  float eps;

  Cells(const Tensor& x_any, const Tensor& w, const Tensor& norm, const std::optional<Tensor>& cu_seqlens,
        double epsilon)
      : channels(norm.numel()),
        k(block_kernels(stored_type(x_any, kOp))),
        x(x_any),
        norm_weight(norm, channels, kOp, "norm_weight"),
        eps(static_cast<float>(epsilon)) {
    STD_TORCH_CHECK(x.dim() == 6 && (x.stride(5) == 1 || x.size(5) == 1), kOp,
                    ": x must be [F, H, W, A, B, c] with runs of c");
    for (int64_t d = 0; d < 6; ++d) size[d] = x.size(d), stride[d] = x.stride(d);
    rows = size[0] * size[1] * size[2];
    depth = size[3] * size[4] * size[5];
    valid = valid_rows(cu_seqlens, rows, kOp);
    weight = weight_of(w, k, channels, depth, kOp, "weight");
  }

  // Call visit(offset in a tensor of x's sizes, offset in the cell) for every run of a row, in bytes.
  template <typename Visit>
  void runs(const int64_t* step, int64_t row, const Visit& visit) const {
    const int64_t frame = row / (size[1] * size[2]), rest = row % (size[1] * size[2]);
    const int64_t start = frame * step[0] + rest / size[2] * step[1] + rest % size[2] * step[2];
    const int64_t bytes = bytes_of(k.stored);
    int64_t to = 0;
    for (int64_t a = 0; a < size[3]; ++a) {
      for (int64_t b = 0; b < size[4]; ++b, to += size[5])
        visit((start + a * step[3] + b * step[4]) * bytes, to * bytes);
    }
  }

  // The cells of some rows, stored.
  void gather(int64_t row, int64_t count, const Rows& out) const {
    const char* from = static_cast<const char*>(x.data_ptr());
    const int64_t bytes = size[5] * bytes_of(k.stored);
    for (int64_t r = 0; r < count; ++r) {
      char* cell = static_cast<char*>(out.at(r));
      runs(stride, row + r, [&](int64_t at, int64_t to) { std::memcpy(cell + to, from + at, bytes); });
    }
  }

  void scatter(int64_t row, int64_t count, const Rows& in, const Tensor& like_x) const {
    int64_t step[6];
    for (int64_t d = 0; d < 6; ++d) step[d] = like_x.stride(d);
    char* out = static_cast<char*>(like_x.data_ptr());
    const int64_t bytes = size[5] * bytes_of(k.stored);
    for (int64_t r = 0; r < count; ++r) {
      const char* cell = static_cast<const char*>(in.at(r));
      runs(step, row + r, [&](int64_t at, int64_t to) { std::memcpy(out + at, cell + to, bytes); });
    }
  }
};

// Working memory of cells as they are stored, and as operands.
class GatheredCells {
 public:
  GatheredCells(const Cells& cells, int64_t rows)
      : cells_(cells),
        memory_(rows * cells.depth * bytes_of(cells.k.stored)),
        rows_{memory_.data(), cells.depth * bytes_of(cells.k.stored)},
        operands_(cells.k, rows_, cells.depth, rows) {}
  // Those of rows [row, row + count) of the call, from a row of this memory on.
  void gather(int64_t row, int64_t count, int64_t to) const {
    cells_.gather(row, count, {static_cast<char*>(rows_.at(to)), rows_.bytes});
  }
  const AsOperands& operands() const { return operands_; }

 private:
  const Cells& cells_;
  Bytes memory_;
  Rows rows_;
  AsOperands operands_;
};

std::tuple<Tensor, Tensor> project_cells_fwd_cpu(Tensor x, Tensor weight, std::optional<Tensor> bias_any,
                                                 Tensor norm_weight, Tensor norm_bias_any,
                                                 std::optional<Tensor> cu_seqlens, double eps,
                                                 bool with_grad) {
  const Cells cells(x, weight, norm_weight, cu_seqlens, eps);
  const BlockKernels& k = cells.k;
  const int64_t channels = cells.channels;
  const Vector bias(bias_any, channels, kOp, "bias"), norm_bias(norm_bias_any, channels, kOp, "norm_bias");
  Tensor y_all = torch::stable::new_empty(x, {cells.rows, channels});
  Tensor branch = torch::stable::new_empty(x, {with_grad ? cells.rows : 0, channels});
  const Rows y = rows_of(y_all, channels), kept = rows_of(branch, channels);
  const Packed product(k, cells.weight, true, cells.depth, channels);
  const int64_t block = block_rows(cells.depth + channels);
  const bool in_place = with_grad && k.stores_floats();  // what the norm reads is made where it is kept
  if (!with_grad && shares_columns(cells.weight, cells.valid, std::max(cells.depth, channels))) {
    const GatheredCells gathered(cells, cells.valid);
    const FloatRows sum(k.stores_floats(), cells.valid, channels);
    float* z = sum.at(y.at(0));
    over_each_row(cells.valid, [&](int64_t row) { gathered.gather(row, 1, row); });
    product.multiply_shared(cells.valid, gathered.operands().rows_of_chunk(0, cells.valid).start, z);
    over_each_row(cells.valid, [&](int64_t row) {
      k.norm(1, channels, z + row * channels, bias.data(), nullptr, nullptr, cells.norm_weight.data(),
             norm_bias.data(), cells.eps, y.at(row), nullptr);
    });
    pass_rows(y_all, nullptr, cells.valid);
    return {y_all, branch};
  }
  over_rows(cells.valid, [&](int64_t begin, int64_t end) {
    const GatheredCells gathered(cells, block);
    const FloatRows sum(in_place, block, channels);
    for (int64_t row = begin; row < end; row += block) {
      const int64_t count = std::min(block, end - row);
      float* z = sum.at(kept.at(row));
      gathered.gather(row, count, 0);
      product.multiply(count, gathered.operands().rows(0, count).start, z);
      k.norm(count, channels, z, bias.data(), nullptr, nullptr, cells.norm_weight.data(), norm_bias.data(),
             cells.eps, y.at(row), with_grad && !in_place ? kept.at(row) : nullptr);
    }
  });
  pass_rows(y_all, nullptr, cells.valid);
  pass_rows(branch, nullptr, cells.valid);
  return {y_all, branch};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> project_cells_bwd_cpu(
    Tensor grad_y_any, Tensor x, Tensor branch, Tensor weight, Tensor norm_weight,
    std::optional<Tensor> cu_seqlens, double eps, bool wants_x, bool wants_layer) {
  const Cells cells(x, weight, norm_weight, cu_seqlens, eps);
  const BlockKernels& k = cells.k;
  const int64_t channels = cells.channels, depth = cells.depth;
  const Tensor grad_y = stored(grad_y_any, k, cells.rows * channels, kOp, "the gradient");
  const Tensor held = stored(branch, k, cells.rows * channels, kOp, "the branch");
  const Rows dy = rows_of(grad_y, channels), z = rows_of(held, channels);
  Tensor grad_x = wants_x ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0, 0, 0, 0, 0, 0});
  if (wants_x && cells.valid < cells.rows)
    std::memset(grad_x.data_ptr(), 0, grad_x.numel() * static_cast<int64_t>(grad_x.element_size()));
  const WeightGradient grad_weight(k, wants_layer, cells.weight, channels, depth);
  const Packed back(k, cells.weight, false, channels, depth);
  const int64_t step =
      std::min(chunk_rows(k, std::max(depth, channels), channels * depth), std::max<int64_t>(cells.valid, 1));
  const GatheredCells gathered(cells, step);
  const OperandRows grad_z(k, step, channels);
  ColumnSums sums(3 * channels);  // of the norm's weight and bias, of the bias
  for (int64_t start = 0; start < cells.valid; start += step) {
    const int64_t rows = std::min(step, cells.valid - start);
    sums.begin_chunk(rows);
    over_rows(rows, [&](int64_t begin, int64_t end) {
      const int64_t bytes = depth * bytes_of(k.stored), most = wants_x ? kBlockRows : 0;
      const Bytes gradient(most * bytes);
      const FloatRows products(k.stores_floats(), most, depth);
      for (int64_t row = begin; row < end; row += kBlockRows) {
        const int64_t count = std::min(kBlockRows, end - row);
        if (wants_layer) gathered.gather(start + row, count, row);
        for (int64_t r = row; r < row + count; r += k.tile) {
          k.norm_gradient(std::min(k.tile, row + count - r), channels, dy.at(start + r), z.at(start + r),
                          nullptr, cells.norm_weight.data(), cells.eps, grad_z.at(r), sums.tile(r));
        }
        if (!wants_x) continue;
        float* to = products.at(gradient.data());
        back.multiply(count, grad_z.at(row), to);
        if (!k.stores_floats()) k.add(count, depth, to, nullptr, gradient.data());
        cells.scatter(start + row, count, {gradient.data(), bytes}, grad_x);
      }
    });
    sums.end_chunk();
    if (wants_layer) grad_weight.add(rows, grad_z.at(0), gathered.operands().rows_of_chunk(0, rows).start);
  }
  const auto written = [&](int64_t from, int64_t count) {
    return sums.write(from, count, x, ScalarType::Float);
  };
  return {grad_x, grad_weight.written(), written(2 * channels, wants_layer ? channels : 0),
          written(0, channels), written(channels, channels)};
}

STABLE_TORCH_LIBRARY_IMPL(deepmsi, CPU, m) {
  m.impl("project_cells_cpp_fwd", TORCH_BOX(&project_cells_fwd_cpu));
  m.impl("project_cells_cpp_bwd", TORCH_BOX(&project_cells_bwd_cpu));
}

}  // namespace
}  // namespace deepmsi

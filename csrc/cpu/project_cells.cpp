// Registration of project_cells under the CPU key: y = LN(W cell + b) for the cells of a strided view, or,
// where the norm comes first, W LN(cell) + b.
//
// Cells are gathered a block of rows at a time and never lie in memory as a whole. Rows past the last offset
// cost nothing.
#include <cstring>
#include <tuple>

#include "blocks.h"

namespace deepmsi {
namespace {

constexpr const char* kOp = "project_cells";

// A view [F, H, W, A, B, c] of runs of c.
inline const Tensor& in_runs(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 6 && (x.stride(5) == 1 || x.size(5) == 1), kOp,
                  ": x must be [F, H, W, A, B, c] with runs of c");
  return x;
}

struct Cells {
  Tensor x, weight;
  int64_t rows, depth, channels, valid;
  int64_t size[6], stride[6];  // of x
  const BlockKernels& k;
  bool norm_first;
  Vector norm_weight, norm_bias;
  float eps;

  Cells(const Tensor& x_any, const Tensor& w, const Tensor& norm_weight_any, const Tensor& norm_bias_any,
        const std::optional<Tensor>& cu_seqlens, double epsilon, bool first, int64_t outputs)
      : x(in_runs(x_any)),
        rows(x.size(0) * x.size(1) * x.size(2)),
        depth(x.size(3) * x.size(4) * x.size(5)),
        channels(outputs),
        valid(valid_rows(cu_seqlens, rows, kOp)),
        k(block_kernels(stored_type(x, kOp))),
        norm_first(first),
        norm_weight(norm_weight_any, normed(), kOp, "norm_weight"),
        norm_bias(norm_bias_any, normed(), kOp, "norm_bias"),
        eps(static_cast<float>(epsilon)) {
    for (int64_t d = 0; d < 6; ++d) size[d] = x.size(d), stride[d] = x.stride(d);
    weight = weight_of(w, k, channels, depth, kOp, "weight");
  }

  // Numbers that the norm reads of a row.
  int64_t normed() const { return norm_first ? depth : channels; }
  // What makes operands of cells.
  Norm norm() const { return norm_first ? Norm{norm_weight.data(), norm_bias.data(), eps} : Norm{}; }

  // y of some rows from z, which is W times them and which y may take the place of; z with the bias is kept,
  // where there is a place for it and the norm reads it.
  void finish(int64_t count, float* z, const float* bias, void* y, void* kept) const {
    if (norm_first) {
      k.residual(count, channels, z, bias, nullptr, nullptr, y);
    } else {
      k.norm(count, channels, z, bias, nullptr, nullptr, norm_weight.data(), norm_bias.data(), eps, y, kept);
    }
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

// Working memory of cells as they are stored, and as operands, normed where the norm comes first.
class GatheredCells {
 public:
  GatheredCells(const Cells& cells, int64_t rows)
      : cells_(cells),
        memory_(rows * cells.depth * bytes_of(cells.k.stored)),
        rows_{memory_.data(), cells.depth * bytes_of(cells.k.stored)},
        operands_(cells.k, rows_, cells.depth, rows, cells.norm()) {}
  // Those of rows [row, row + count) of the call, from a row of this memory on.
  void gather(int64_t row, int64_t count, int64_t to) const {
    cells_.gather(row, count, {static_cast<char*>(rows_.at(to)), rows_.bytes});
  }
  const void* at(int64_t row) const { return rows_.at(row); }
  const AsOperands& operands() const { return operands_; }

 private:
  const Cells& cells_;
  Bytes memory_;
  Rows rows_;
  AsOperands operands_;
};

std::tuple<Tensor, Tensor> project_cells_fwd_cpu(Tensor x, Tensor weight, std::optional<Tensor> bias_any,
                                                 Tensor norm_weight, Tensor norm_bias,
                                                 std::optional<Tensor> cu_seqlens, double eps,
                                                 bool norm_first, int64_t outputs, bool with_grad) {
  const Cells cells(x, weight, norm_weight, norm_bias, cu_seqlens, eps, norm_first, outputs);
  const BlockKernels& k = cells.k;
  const int64_t channels = cells.channels;
  const Vector bias(bias_any, channels, kOp, "bias");
  const bool keeps = with_grad && !norm_first;
  Tensor y_all = torch::stable::new_empty(x, {cells.rows, channels});
  Tensor branch = torch::stable::new_empty(x, {keeps ? cells.rows : 0, channels});
  const Rows y = rows_of(y_all, channels), kept = rows_of(branch, channels);
  const Packed product(k, cells.weight, true, cells.depth, channels);
  const int64_t block = block_rows(cells.depth + channels);
  // What the norm reads is made where it is kept, and what nothing more is added to but the bias in y.
  const bool in_place = k.stores_floats() && (keeps || norm_first);
  if (!with_grad && shares_columns(cells.weight, cells.valid, std::max(cells.depth, channels))) {
    const GatheredCells gathered(cells, cells.valid);
    const FloatRows sum(k.stores_floats(), cells.valid, channels);
    float* z = sum.at(y.at(0));
    over_each_row(cells.valid, [&](int64_t row) { gathered.gather(row, 1, row); });
    product.multiply_shared(cells.valid, gathered.operands().rows_of_chunk(0, cells.valid).start, z);
    over_each_row(cells.valid,
                  [&](int64_t row) { cells.finish(1, z + row * channels, bias.data(), y.at(row), nullptr); });
    pass_rows(y_all, nullptr, cells.valid);
    return {y_all, branch};
  }
  over_rows(cells.valid, [&](int64_t begin, int64_t end) {
    const GatheredCells gathered(cells, block);
    const FloatRows sum(in_place, block, channels);
    for (int64_t row = begin; row < end; row += block) {
      const int64_t count = std::min(block, end - row);
      float* z = sum.at(norm_first ? y.at(row) : kept.at(row));
      gathered.gather(row, count, 0);
      product.multiply(count, gathered.operands().rows(0, count).start, z);
      cells.finish(count, z, bias.data(), y.at(row), keeps && !in_place ? kept.at(row) : nullptr);
    }
  });
  pass_rows(y_all, nullptr, cells.valid);
  pass_rows(branch, nullptr, cells.valid);
  return {y_all, branch};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> project_cells_bwd_cpu(
    Tensor grad_y_any, Tensor x, Tensor branch, Tensor weight, Tensor norm_weight, Tensor norm_bias,
    std::optional<Tensor> cu_seqlens, double eps, bool norm_first, bool wants_x, bool wants_layer) {
  const Cells cells(x, weight, norm_weight, norm_bias, cu_seqlens, eps, norm_first, weight.size(0));
  const BlockKernels& k = cells.k;
  const int64_t channels = cells.channels, depth = cells.depth, normed = cells.normed();
  const Tensor grad_y = stored(grad_y_any, k, cells.rows * channels, kOp, "the gradient");
  const Tensor held = stored(branch, k, norm_first ? 0 : cells.rows * channels, kOp, "the branch");
  const Rows dy = rows_of(grad_y, channels), z = rows_of(held, channels);
  Tensor grad_x = wants_x ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0, 0, 0, 0, 0, 0});
  if (wants_x) in_runs(grad_x);
  if (wants_x && cells.valid < cells.rows)
    std::memset(grad_x.data_ptr(), 0, grad_x.numel() * static_cast<int64_t>(grad_x.element_size()));
  const WeightGradient grad_weight(k, wants_layer, cells.weight, channels, depth);
  const Packed back(k, cells.weight, false, channels, depth);
  const int64_t step =
      std::min(chunk_rows(k, std::max(depth, channels), channels * depth), std::max<int64_t>(cells.valid, 1));
  const GatheredCells gathered(cells, step);
  const OperandRows grad_z(k, step, channels);
  const bool reaches_cells = wants_x || norm_first;
  ColumnSums sums(2 * normed + channels);  // of the norm's weight and bias, of the bias
  for (int64_t start = 0; start < cells.valid; start += step) {
    const int64_t rows = std::min(step, cells.valid - start);
    sums.begin_chunk(rows);
    over_rows(rows, [&](int64_t begin, int64_t end) {
      const int64_t bytes = depth * bytes_of(k.stored), most = reaches_cells ? kBlockRows : 0;
      const Bytes gradient(most * bytes);
      const FloatRows products(k.stores_floats(), most, depth);
      for (int64_t row = begin; row < end; row += kBlockRows) {
        const int64_t count = std::min(kBlockRows, end - row);
        if (wants_layer || norm_first) gathered.gather(start + row, count, row);
        each_tile(k, count, [&](int64_t r, int64_t some) {
          const void* dy_r = dy.at(start + row + r);
          float* own = sums.tile(row + r);
          if (norm_first) {
            k.residual_gradient(some, channels, dy_r, nullptr, grad_z.at(row + r), own + 2 * normed);
          } else {
            k.norm_gradient(some, channels, dy_r, z.at(start + row + r), nullptr, cells.norm_weight.data(),
                            cells.eps, grad_z.at(row + r), own);
          }
        });
        if (!reaches_cells) continue;
        float* to = products.at(gradient.data());
        const Rows out{gradient.data(), bytes};
        back.multiply(count, grad_z.at(row), to);
        if (norm_first) {
          each_tile(k, count, [&](int64_t r, int64_t some) {
            k.normed_gradient(some, depth, to + r * depth, gathered.at(row + r), cells.norm_weight.data(),
                              cells.eps, nullptr, out.at(r), sums.tile(row + r));
          });
        } else if (!k.stores_floats()) {
          k.add(count, depth, to, nullptr, out.start);
        }
        if (wants_x) cells.scatter(start + row, count, out, grad_x);
      }
    });
    sums.end_chunk();
    if (wants_layer) grad_weight.add(rows, grad_z.at(0), gathered.operands().rows_of_chunk(0, rows).start);
  }
  const auto written = [&](int64_t from, int64_t count) {
    return sums.write(from, count, x, ScalarType::Float);
  };
  return {grad_x, grad_weight.written(), written(2 * normed, wants_layer ? channels : 0), written(0, normed),
          written(normed, normed)};
}

STABLE_TORCH_LIBRARY_IMPL(deepmsi, CPU, m) {
  m.impl("project_cells_cpp_fwd", TORCH_BOX(&project_cells_fwd_cpu));
  m.impl("project_cells_cpp_bwd", TORCH_BOX(&project_cells_bwd_cpu));
}

}  // namespace
}  // namespace deepmsi

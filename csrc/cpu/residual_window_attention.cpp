// Registration of residual_window_attention under the CPU key: y = x + scale * LN(proj(attention(qkv(x)))),
// or the norm of x first.
//
// A chunk of whole frames at a time, so that q, k and v of its rows stay in cache; the backward pass makes
// them again.
#include <tuple>

#include "residual.h"
#include "window_attention_call.h"

namespace deepmsi {
namespace {

constexpr const char* kOp = "residual_window_attention";

struct Attention {
  int64_t rows, channels;
  const BlockKernels& k;
  Tensor x, qkv_weight, proj_weight;
  Vector qkv_bias;
  Residual residual;
  WindowCall call;  // of operands

  Attention(const Tensor& x_any, const Tensor& qkv, const std::optional<Tensor>& bias, const Tensor& proj,
            const Tensor& proj_bias, const Tensor& norm_weight, const Tensor& norm_bias,
            const std::optional<Tensor>& row_scale, double eps, bool norm_first, const Tensor& bias_table,
            const std::optional<Tensor>& head_scale, double scale, const std::optional<Tensor>& positions,
            const std::optional<Tensor>& cu_seqlens, int64_t heads, int64_t height, int64_t width,
            int64_t window, int64_t shift)
      : rows(x_any.size(0)),
        channels(x_any.size(1)),
        k(block_kernels(stored_type(x_any, kOp))),
        x(stored(x_any, k, rows * channels, kOp, "x")),
        qkv_weight(weight_of(qkv, k, 3 * channels, channels, kOp, "qkv_weight")),
        proj_weight(weight_of(proj, k, channels, channels, kOp, "proj_weight")),
        qkv_bias(bias, 3 * channels, kOp, "qkv_bias"),
        residual{channels,
                 k,
                 Vector(proj_bias, channels, kOp, "proj_bias"),
                 Vector(norm_weight, channels, kOp, "norm_weight"),
                 Vector(norm_bias, channels, kOp, "norm_bias"),
                 Vector(row_scale, rows, kOp, "row_scale"),
                 static_cast<float>(eps),
                 norm_first},
        call(kOp, rows, channels, k.operand, bias_table, head_scale, scale, positions, cu_seqlens, heads,
             height, width, window, shift) {
    call.w.qkv_stride = call.w.grad_qkv_stride = k.pitch(3 * channels);
    call.w.out_stride = k.pitch(channels);
  }
};

// Some frames of a call, whose rows count from 0.
struct Chunk {
  int64_t frames, first, rows;
  std::vector<int32_t> offset;
  WindowAttention w;
};

template <typename Run>
void over_chunks(const Attention& a, const Run& run) {
  const WindowCall& call = a.call;
  const int64_t most =
      std::max(chunk_rows(a.k, 3 * a.channels, 3 * a.channels * a.channels), call.w.height * call.w.width);
  // Of about as many frames each: a small rest at the end would read all weights again for little.
  const int64_t full = std::max<int64_t>(call.frames * most / std::max<int64_t>(call.valid, 1), 1);
  const int64_t chunks = (call.frames + full - 1) / full;
  for (int64_t frame = 0, first = 0; first < call.valid;) {
    int64_t end = frame + 1;
    while (end < call.frames && (end - frame) * chunks < call.frames &&
           call.first_row(end + 1) - first <= most)
      ++end;
    Chunk chunk{end - frame, first, call.first_row(end) - first, {}, call.w};
    if (call.w.offset != nullptr) {
      for (int64_t f = frame; f <= end; ++f)
        chunk.offset.push_back(call.w.offset[f] - static_cast<int32_t>(first));
      chunk.w.offset = chunk.offset.data();
      chunk.w.positions = call.w.positions + first;
    }
    run(chunk);
    frame = end;
    first += chunk.rows;
  }
}

// Rows of the largest chunk.
int64_t largest_chunk(const Attention& a) {
  int64_t rows = 0;
  over_chunks(a, [&](const Chunk& chunk) { rows = std::max(rows, chunk.rows); });
  return rows;
}

// q, k and v of a chunk's rows, in operands.
void make_qkv(const Attention& a, const Packed& weight, const Chunk& chunk, const OperandRows& qkv) {
  const BlockKernels& k = a.k;
  const int64_t wide = 3 * a.channels, block = block_rows(a.channels);
  if (shares_columns(a.qkv_weight, chunk.rows, wide)) {
    const AsOperands operands = a.residual.operands(rows_of(a.x, a.channels), chunk.rows);
    const FloatRows products(k.multiplies_floats(), chunk.rows, wide);
    float* to = products.at(qkv.at(0));
    weight.multiply_shared(chunk.rows, operands.rows_of_chunk(chunk.first, chunk.rows).start, to);
    if (k.multiplies_floats() && !a.qkv_bias.has_value()) return;
    over_each_row(chunk.rows,
                  [&](int64_t row) { k.add_bias(1, wide, to + row * wide, a.qkv_bias.data(), qkv.at(row)); });
    return;
  }
  over_rows(chunk.rows, [&](int64_t begin, int64_t end) {
    const AsOperands operands = a.residual.operands(rows_of(a.x, a.channels), block);
    const FloatRows products(k.multiplies_floats(), block, wide);
    for (int64_t row = begin; row < end; row += block) {
      const int64_t count = std::min(block, end - row);
      float* to = products.at(qkv.at(row));
      weight.multiply(count, operands.rows(chunk.first + row, count).start, to);
      if (!k.multiplies_floats() || a.qkv_bias.has_value())
        k.add_bias(count, wide, to, a.qkv_bias.data(), qkv.at(row));
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> residual_window_attention_fwd_cpu(
    Tensor x_any, Tensor qkv_weight, std::optional<Tensor> qkv_bias, Tensor proj_weight, Tensor proj_bias,
    Tensor norm_weight, Tensor norm_bias, std::optional<Tensor> row_scale, double eps, bool norm_first,
    Tensor bias_table, std::optional<Tensor> head_scale, double scale, std::optional<Tensor> positions,
    std::optional<Tensor> cu_seqlens, int64_t heads, int64_t height, int64_t width, int64_t window,
    int64_t shift, bool with_grad) {
  const Attention a(x_any, qkv_weight, qkv_bias, proj_weight, proj_bias, norm_weight, norm_bias, row_scale,
                    eps, norm_first, bias_table, head_scale, scale, positions, cu_seqlens, heads, height,
                    width, window, shift);
  const BlockKernels& k = a.k;
  const int64_t channels = a.channels, most = largest_chunk(a);
  const int64_t block = block_rows(2 * channels);
  Tensor y_all = torch::stable::new_empty(a.x, {a.rows, channels});
  const bool keeps_z = a.residual.keeps_branch(with_grad);
  Tensor branch = torch::stable::new_empty(a.x, {keeps_z ? a.rows : 0, channels});
  Tensor attended = torch::stable::new_empty(a.x, {with_grad ? a.rows : 0, channels});
  const Rows x = rows_of(a.x, channels), y = rows_of(y_all, channels);
  const Rows kept = rows_of(branch, channels), kept_middle = rows_of(attended, channels);
  // What is kept is made where it is kept, or else where its result will be, if it is of the type that makes
  // it.
  const bool z_in_place = k.stores_floats();
  const bool middle_in_place = with_grad && k.as_stored(channels);
  const Packed in(k, a.qkv_weight, true, channels, 3 * channels);
  const Packed out(k, a.proj_weight, true, channels, channels);
  const OperandRows qkv(k, most, 3 * channels), scratch(k, middle_in_place ? 0 : most, channels);
  const Floats lse(most * heads);
  over_chunks(a, [&](const Chunk& chunk) {
    make_qkv(a, in, chunk, qkv);
    const Rows middle{static_cast<char*>(middle_in_place ? kept_middle.at(chunk.first) : scratch.at(0)),
                      OperandRows::row_bytes(k, channels)};
    WindowAttention w = chunk.w;
    w.qkv = qkv.at(0);
    w.out = middle.start;
    w.lse = lse.data();
    a.call.parallel(chunk.frames * w.bands(), false, [&](int64_t begin, int64_t end, char* memory) {
      a.call.kernels.forward(w, begin, end, memory);
    });
    if (!with_grad && shares_columns(a.proj_weight, chunk.rows, channels)) {
      scratch.pad(0, chunk.rows);
      const FloatRows sum(k.stores_floats(), chunk.rows, channels);
      float* z = sum.at(y.at(chunk.first));
      out.multiply_shared(chunk.rows, middle.start, z);
      over_each_row(chunk.rows, [&](int64_t row) {
        a.residual.finish(1, z + row * channels, chunk.first + row, x, y, nullptr);
      });
      return;
    }
    over_rows(chunk.rows, [&](int64_t begin, int64_t end) {
      const FloatRows sum(z_in_place, block, channels);
      for (int64_t row = begin; row < end; row += block) {
        const int64_t count = std::min(block, end - row), at = chunk.first + row;
        float* z = sum.at((keeps_z ? kept : y).at(at));
        if (!middle_in_place) scratch.pad(row, count);
        out.multiply(count, middle.at(row), z);
        if (with_grad && !middle_in_place) k.to_stored(count, channels, middle.at(row), kept_middle.at(at));
        a.residual.finish(count, z, at, x, y, keeps_z && !z_in_place ? kept.at(at) : nullptr);
      }
    });
  });
  pass_rows(y_all, &a.x, a.call.valid);
  pass_rows(branch, nullptr, a.call.valid);
  pass_rows(attended, nullptr, a.call.valid);
  return {y_all, branch, attended};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
residual_window_attention_bwd_cpu(Tensor grad_y_any, Tensor x_any, Tensor branch, Tensor attended_any,
                                  Tensor qkv_weight, std::optional<Tensor> qkv_bias, Tensor proj_weight,
                                  Tensor proj_bias, Tensor norm_weight, Tensor norm_bias,
                                  std::optional<Tensor> row_scale, double eps, bool norm_first,
                                  Tensor bias_table, std::optional<Tensor> head_scale, double scale,
                                  std::optional<Tensor> positions, std::optional<Tensor> cu_seqlens,
                                  int64_t heads, int64_t height, int64_t width, int64_t window, int64_t shift,
                                  bool wants_layers) {
  const Attention a(x_any, qkv_weight, qkv_bias, proj_weight, proj_bias, norm_weight, norm_bias, row_scale,
                    eps, norm_first, bias_table, head_scale, scale, positions, cu_seqlens, heads, height,
                    width, window, shift);
  const BlockKernels& k = a.k;
  const int64_t channels = a.channels, wide = 3 * channels, most = largest_chunk(a);
  const Tensor grad_y = stored(grad_y_any, k, a.rows * channels, kOp, "the gradient");
  const Tensor held =
      stored(branch, k, a.residual.keeps_branch(true) ? a.rows * channels : 0, kOp, "the branch");
  const Tensor held_middle = stored(attended_any, k, a.rows * channels, kOp, "the attention");
  Tensor grad_x = torch::stable::new_empty(a.x, {a.rows, channels});
  const Rows x = rows_of(a.x, channels), dy = rows_of(grad_y, channels), z = rows_of(held, channels),
             dx = rows_of(grad_x, channels);
  const WeightGradient grad_qkv_weight(k, wants_layers, a.qkv_weight, wide, channels),
      grad_proj_weight(k, wants_layers, a.proj_weight, channels, channels);
  const Packed in(k, a.qkv_weight, true, channels, wide);
  const Packed back_in(k, a.qkv_weight, false, wide, channels);
  const Packed back_out(k, a.proj_weight, false, channels, channels);
  const OperandRows qkv(k, most, wide), grad_qkv(k, most, wide), grad_z(k, most, channels),
      grad_out(k, most, channels);
  const AsOperands read = a.residual.operands(x, most),
                   middle(k, rows_of(held_middle, channels), channels, most);
  const int64_t own = a.residual.sums();
  ColumnSums sums(own + wide);  // of the residual, and of qkv's bias
  WindowSums window_sums(a.call.w);
  over_chunks(a, [&](const Chunk& chunk) {
    sums.begin_chunk(chunk.rows);
    make_qkv(a, in, chunk, qkv);
    over_rows(chunk.rows, [&](int64_t begin, int64_t end) {
      const FloatRows products(k.multiplies_floats(), kBlockRows, channels);
      for (int64_t row = begin; row < end; row += kBlockRows) {
        const int64_t count = std::min(kBlockRows, end - row);
        a.residual.branch_gradient(count, chunk.first + row, row, dy, z, grad_z, sums);
        float* to = products.at(grad_out.at(row));
        back_out.multiply(count, grad_z.at(row), to);
        if (!k.multiplies_floats()) k.add_bias(count, channels, to, nullptr, grad_out.at(row));
      }
    });
    WindowAttention w = chunk.w;
    w.qkv = qkv.at(0);
    w.grad_out = grad_out.at(0);
    w.grad_qkv = grad_qkv.at(0);
    window_sums.add(a.call, w, chunk.frames);
    over_rows(chunk.rows, [&](int64_t begin, int64_t end) {
      const FloatRows products(k.stores_floats(), kBlockRows, channels);
      for (int64_t row = begin; row < end; row += kBlockRows) {
        const int64_t count = std::min(kBlockRows, end - row), at = chunk.first + row;
        grad_qkv.pad(row, count);
        for (int64_t r = row; wants_layers && r < row + count; r += k.tile)
          k.add_columns(std::min(k.tile, row + count - r), wide, grad_qkv.at(r), sums.tile(r) + own);
        float* to = products.at(dx.at(at));
        back_in.multiply(count, grad_qkv.at(row), to);
        a.residual.input_gradient(count, at, row, to, x, dy, dx, sums);
      }
    });
    sums.end_chunk();
    if (!wants_layers) return;
    grad_qkv_weight.add(chunk.rows, grad_qkv.at(0), read.rows_of_chunk(chunk.first, chunk.rows).start);
    grad_proj_weight.add(chunk.rows, grad_z.at(0), middle.rows_of_chunk(chunk.first, chunk.rows).start);
  });
  pass_rows(grad_x, &grad_y, a.call.valid);
  Tensor grad_table = torch::stable::new_empty(bias_table, bias_table.sizes());
  Tensor grad_scale = torch::stable::new_empty(bias_table, {heads});
  window_sums.write(a.call.w.head_scale, grad_table, grad_scale);
  return {grad_x,
          grad_qkv_weight.written(),
          sums.write(own, wants_layers ? wide : 0, qkv_bias.has_value() ? *qkv_bias : qkv_weight),
          grad_proj_weight.written(),
          a.residual.bias_gradient(sums, wants_layers, proj_bias),
          a.residual.norm_weight_gradient(sums, norm_weight),
          a.residual.norm_bias_gradient(sums, norm_bias),
          grad_table,
          grad_scale};
}

STABLE_TORCH_LIBRARY_IMPL(deepmsi, CPU, m) {
  m.impl("residual_window_attention_cpp_fwd", TORCH_BOX(&residual_window_attention_fwd_cpu));
  m.impl("residual_window_attention_cpp_bwd", TORCH_BOX(&residual_window_attention_bwd_cpu));
}

}  // namespace
}  // namespace deepmsi

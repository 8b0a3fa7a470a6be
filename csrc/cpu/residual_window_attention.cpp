// Registration of residual_window_attention under the CPU key: y = x + scale * LN(proj(attention(qkv(x)))).
//
// A chunk of whole frames at a time, so that q, k and v of its rows stay in cache; the backward pass makes
// them again.
#include <tuple>

#include "blocks.h"
#include "window_attention_call.h"

namespace deepmsi {
namespace {

constexpr const char* kOp = "residual_window_attention";

struct Attention {
  int64_t rows, channels;
  Tensor x, qkv_weight, proj_weight, proj_bias, norm_weight, norm_bias;
  std::optional<Tensor> qkv_bias, row_scale;
  float eps;
  WindowCall call;

  Attention(const Tensor& x_any, const Tensor& qkv, const std::optional<Tensor>& bias, const Tensor& proj,
            const Tensor& projected_bias, const Tensor& weight, const Tensor& shift_of_norm,
            const std::optional<Tensor>& scale_of_row, double epsilon, const Tensor& bias_table,
            const std::optional<Tensor>& head_scale, double scale, const std::optional<Tensor>& positions,
            const std::optional<Tensor>& cu_seqlens, int64_t heads, int64_t height, int64_t width,
            int64_t window, int64_t shift)
      : rows(x_any.size(0)),
        channels(x_any.size(1)),
        x(floats(x_any, rows * channels, kOp, "x")),
        qkv_weight(floats(qkv, 3 * channels * channels, kOp, "qkv_weight")),
        proj_weight(floats(proj, channels * channels, kOp, "proj_weight")),
        proj_bias(floats(projected_bias, channels, kOp, "proj_bias")),
        norm_weight(floats(weight, channels, kOp, "norm_weight")),
        norm_bias(floats(shift_of_norm, channels, kOp, "norm_bias")),
        qkv_bias(floats(bias, 3 * channels, kOp, "qkv_bias")),
        row_scale(floats(scale_of_row, rows, kOp, "row_scale")),
        eps(static_cast<float>(epsilon)),
        call(kOp, rows, channels, DType::kFloat, bias_table, head_scale, scale, positions, cu_seqlens, heads,
             height, width, window, shift) {}
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
  const int64_t most = std::max(chunk_rows(3 * a.channels), call.w.height * call.w.width);
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

void make_qkv(const Attention& a, const Packed& weight, const Chunk& chunk, float* qkv) {
  const int64_t block = block_rows(a.channels);
  over_rows(chunk.rows, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row += block) {
      const int64_t count = std::min(block, end - row);
      float* to = qkv + row * 3 * a.channels;
      weight.multiply(count, pointer<const float>(a.x) + (chunk.first + row) * a.channels, to);
      if (a.qkv_bias.has_value())
        block_kernels().add_bias(count, 3 * a.channels, to, pointer<const float>(*a.qkv_bias));
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> residual_window_attention_fwd_cpu(
    Tensor x, Tensor qkv_weight, std::optional<Tensor> qkv_bias, Tensor proj_weight, Tensor proj_bias,
    Tensor norm_weight, Tensor norm_bias, std::optional<Tensor> row_scale, double eps, Tensor bias_table,
    std::optional<Tensor> head_scale, double scale, std::optional<Tensor> positions,
    std::optional<Tensor> cu_seqlens, int64_t heads, int64_t height, int64_t width, int64_t window,
    int64_t shift, bool with_grad) {
  const Attention a(x, qkv_weight, qkv_bias, proj_weight, proj_bias, norm_weight, norm_bias, row_scale, eps,
                    bias_table, head_scale, scale, positions, cu_seqlens, heads, height, width, window,
                    shift);
  const BlockKernels& k = block_kernels();
  const int64_t channels = a.channels, kept = with_grad ? a.rows : 0, most = largest_chunk(a);
  const int64_t block = block_rows(2 * channels);
  Tensor y = torch::stable::new_empty(a.x, {a.rows, channels});
  Tensor branch = torch::stable::new_empty(a.x, {kept, channels});
  Tensor attended = torch::stable::new_empty(a.x, {kept, channels});
  const Packed in(pointer<const float>(a.qkv_weight), true, channels, 3 * channels);
  const Packed out(pointer<const float>(a.proj_weight), true, channels, channels);
  const Floats qkv(most * 3 * channels), lse(most * heads), scratch(with_grad ? 0 : most * channels);
  over_chunks(a, [&](const Chunk& chunk) {
    make_qkv(a, in, chunk, qkv.data());
    float* middle = with_grad ? pointer<float>(attended) + chunk.first * channels : scratch.data();
    WindowAttention w = chunk.w;
    w.qkv = qkv.data();
    w.out = middle;
    w.lse = lse.data();
    a.call.parallel(chunk.frames * w.bands(), false, [&](int64_t begin, int64_t end, char* memory) {
      a.call.kernels.forward(w, begin, end, memory);
    });
    over_rows(chunk.rows, [&](int64_t begin, int64_t end) {
      const Floats own(with_grad ? 0 : block * channels);
      for (int64_t row = begin; row < end; row += block) {
        const int64_t count = std::min(block, end - row), at = (chunk.first + row) * channels;
        float* z = with_grad ? pointer<float>(branch) + at : own.data();
        out.multiply(count, middle + row * channels, z);
        k.norm(count, channels, z, pointer<const float>(a.proj_bias), pointer<const float>(a.x) + at,
               at_row(pointer_or_null(a.row_scale), chunk.first + row), pointer<const float>(a.norm_weight),
               pointer<const float>(a.norm_bias), a.eps, pointer<float>(y) + at);
      }
    });
  });
  pass_rows(y, &a.x, a.call.valid);
  pass_rows(branch, nullptr, a.call.valid);
  pass_rows(attended, nullptr, a.call.valid);
  return {y, branch, attended};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
residual_window_attention_bwd_cpu(Tensor grad_y_any, Tensor x, Tensor branch, Tensor attended_any,
                                  Tensor qkv_weight, std::optional<Tensor> qkv_bias, Tensor proj_weight,
                                  Tensor proj_bias, Tensor norm_weight, Tensor norm_bias,
                                  std::optional<Tensor> row_scale, double eps, Tensor bias_table,
                                  std::optional<Tensor> head_scale, double scale,
                                  std::optional<Tensor> positions, std::optional<Tensor> cu_seqlens,
                                  int64_t heads, int64_t height, int64_t width, int64_t window, int64_t shift,
                                  bool wants_layers) {
  const Attention a(x, qkv_weight, qkv_bias, proj_weight, proj_bias, norm_weight, norm_bias, row_scale, eps,
                    bias_table, head_scale, scale, positions, cu_seqlens, heads, height, width, window,
                    shift);
  const BlockKernels& k = block_kernels();
  const int64_t channels = a.channels, wide = 3 * channels, most = largest_chunk(a);
  const Tensor grad_y = floats(grad_y_any, a.rows * channels, kOp, "the gradient");
  const Tensor z = floats(branch, a.rows * channels, kOp, "the branch");
  const Tensor attended = floats(attended_any, a.rows * channels, kOp, "the attention");
  Tensor grad_x = torch::stable::new_empty(a.x, {a.rows, channels});
  Tensor grad_qkv_weight = zeros_where(wants_layers, a.qkv_weight),
         grad_proj_weight = zeros_where(wants_layers, a.proj_weight);
  const Packed in(pointer<const float>(a.qkv_weight), true, channels, wide);
  const Packed back_in(pointer<const float>(a.qkv_weight), false, wide, channels);
  const Packed back_out(pointer<const float>(a.proj_weight), false, channels, channels);
  const Floats qkv(most * wide), grad_qkv(most * wide), grad_z(most * channels), grad_out(most * channels);
  ColumnSums sums(3 * channels + wide);  // of the norm's weight and bias, of proj's bias, of qkv's
  WindowSums window_sums(a.call.w);
  over_chunks(a, [&](const Chunk& chunk) {
    sums.begin_chunk(chunk.rows);
    make_qkv(a, in, chunk, qkv.data());
    over_rows(chunk.rows, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; row += kBlockRows) {
        const int64_t count = std::min(kBlockRows, end - row), at = (chunk.first + row) * channels;
        float* dz = grad_z.data() + row * channels;
        for (int64_t r = 0; r < count; r += k.tile) {
          const int64_t from = at + r * channels;
          k.norm_gradient(std::min(k.tile, count - r), channels, pointer<const float>(grad_y) + from,
                          pointer<const float>(z) + from,
                          at_row(pointer_or_null(a.row_scale), chunk.first + row + r),
                          pointer<const float>(a.norm_weight), a.eps, dz + r * channels, sums.tile(row + r));
        }
        back_out.multiply(count, dz, grad_out.data() + row * channels);
      }
    });
    WindowAttention w = chunk.w;
    w.qkv = qkv.data();
    w.grad_out = grad_out.data();
    w.grad_qkv = grad_qkv.data();
    window_sums.add(a.call, w, chunk.frames);
    over_rows(chunk.rows, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; row += kBlockRows) {
        const int64_t count = std::min(kBlockRows, end - row), at = (chunk.first + row) * channels;
        const float* gradient = grad_qkv.data() + row * wide;
        for (int64_t r = 0; wants_layers && r < count; r += k.tile)
          k.add_columns(std::min(k.tile, count - r), wide, gradient + r * wide,
                        sums.tile(row + r) + 3 * channels);
        back_in.multiply(count, gradient, pointer<float>(grad_x) + at);
        k.add(count, channels, pointer<float>(grad_x) + at, pointer<const float>(grad_y) + at);
      }
    });
    sums.end_chunk();
    if (!wants_layers) return;
    add_weight_gradient(chunk.rows, wide, channels, grad_qkv.data(),
                        pointer<const float>(a.x) + chunk.first * channels, pointer<float>(grad_qkv_weight));
    add_weight_gradient(chunk.rows, channels, channels, grad_z.data(),
                        pointer<const float>(attended) + chunk.first * channels,
                        pointer<float>(grad_proj_weight));
  });
  pass_rows(grad_x, &grad_y, a.call.valid);
  auto written = [&](int64_t from, int64_t count) {
    Tensor out = torch::stable::new_empty(a.x, {count});
    sums.write(from, out);
    return out;
  };
  Tensor grad_table = torch::stable::new_empty(bias_table, bias_table.sizes());
  Tensor grad_scale = torch::stable::new_empty(bias_table, {heads});
  window_sums.write(a.call.w.head_scale, grad_table, grad_scale);
  return {grad_x,
          grad_qkv_weight,
          written(3 * channels, wants_layers ? wide : 0),
          grad_proj_weight,
          written(2 * channels, wants_layers ? channels : 0),
          written(0, channels),
          written(channels, channels),
          grad_table,
          grad_scale};
}

STABLE_TORCH_LIBRARY_IMPL(deepmsi, CPU, m) {
  m.impl("residual_window_attention_cpp_fwd", TORCH_BOX(&residual_window_attention_fwd_cpu));
  m.impl("residual_window_attention_cpp_bwd", TORCH_BOX(&residual_window_attention_bwd_cpu));
}

}  // namespace
}  // namespace deepmsi

// Registration of window_attention under the CPU key: outputs, threads over bands of windows, choice of the
// instruction set.
#include "window_attention.h"

#include <algorithm>
#include <tuple>

#include "tensors.h"

namespace deepmsi {
namespace {

constexpr const char* kOp = "window_attention";
// Sums of the bias' gradient, each over its own bands in order: their number does not depend on that of the
// threads.
constexpr int64_t kPartialSums = 32;

WindowAttentionKernels active_kernels(DType dtype) {
#if DEEPMSI_X86
  switch (active_isa()) {
    case Isa::kAvx512:
      return avx512::window_attention_kernels(dtype);
    case Isa::kAvx2:
      return avx2::window_attention_kernels(dtype);
    default:
      break;
  }
#endif
  return baseline::window_attention_kernels(dtype);
}

// What both directions read, checked; it owns the tensors behind the pointers of `w`.
struct Call {
  WindowAttention w{};
  int64_t rows = 0, valid = 0, tasks = 0;
  Tensor qkv;
  std::optional<Tensor> head_scale, positions, cu_seqlens;
  std::vector<float> bias;
  WindowAttentionKernels kernels{};

  Call(const Tensor& qkv_any, const Tensor& bias_table, const std::optional<Tensor>& scale_of_head,
       double scale, const std::optional<Tensor>& positions_any, const std::optional<Tensor>& cu_seqlens_any,
       int64_t heads, int64_t height, int64_t width, int64_t window, int64_t shift)
      : qkv(qkv_any) {
    const DType dtype = storage_of(qkv, kOp);
    STD_TORCH_CHECK(dtype != DType::kDouble, kOp, ": takes float32, bfloat16 or float16");
    STD_TORCH_CHECK(qkv.dim() == 2 && heads > 0 && qkv.size(1) % (3 * heads) == 0, kOp,
                    ": qkv must be [R, 3C] with C a multiple of heads");
    STD_TORCH_CHECK(height > 0 && width > 0 && window > 0 && 0 <= shift && shift < window, kOp,
                    ": the grid must not be empty, nor the shift outside of the window");
    if (qkv.stride(1) != 1) qkv = torch::stable::contiguous(qkv);
    rows = qkv.size(0);
    w.qkv = qkv.data_ptr();
    w.qkv_stride = qkv.stride(0);
    w.heads = heads;
    w.head_dim = qkv.size(1) / (3 * heads);
    w.height = height;
    w.width = width;
    w.window = window;
    w.shift = shift;
    w.scale = static_cast<float>(scale);
    const int64_t table = w.table();
    STD_TORCH_CHECK(bias_table.scalar_type() == ScalarType::Float && bias_table.dim() == 2 &&
                        bias_table.size(0) == table && bias_table.size(1) == heads,
                    kOp, ": bias_table must be [(2w - 1)^2, heads] float32");
    const Tensor held = contiguous(bias_table);
    bias.resize(heads * w.spread() + kBiasPad);
    float* spread = bias.data();
    for (int64_t h = 0; h < heads; ++h) {
      for (int64_t key_x = 0; key_x < window; ++key_x) {
        for (int64_t down = 0; down < 2 * window - 1; ++down) {
          for (int64_t x = 0; x < window; ++x)
            *spread++ = pointer<const float>(held)[w.table_row(key_x, down, x) * heads + h];
        }
      }
    }
    w.bias = bias.data();
    if (scale_of_head.has_value()) {
      head_scale = contiguous(*scale_of_head);
      STD_TORCH_CHECK(head_scale->scalar_type() == ScalarType::Float && head_scale->numel() == heads, kOp,
                      ": head_scale must be [heads] float32");
      w.head_scale = pointer<const float>(*head_scale);
    }
    int64_t frames = 0;
    if (positions_any.has_value()) {
      STD_TORCH_CHECK(cu_seqlens_any.has_value() && positions_any->scalar_type() == ScalarType::Int &&
                          cu_seqlens_any->scalar_type() == ScalarType::Int &&
                          positions_any->numel() == rows && cu_seqlens_any->numel() >= 1,
                      kOp, ": packed rows need positions [R] int32 and cu_seqlens [F + 1] int32");
      positions = contiguous(*positions_any);
      cu_seqlens = contiguous(*cu_seqlens_any);
      w.positions = pointer<const int32_t>(*positions);
      w.offset = pointer<const int32_t>(*cu_seqlens);
      frames = cu_seqlens->numel() - 1;
      check_packed(frames);
      valid = w.offset[frames];
    } else {
      STD_TORCH_CHECK(rows % (height * width) == 0, kOp, ": rows are not a multiple of the grid's places");
      frames = rows / (height * width);
      valid = rows;
    }
    tasks = frames * w.bands();
    kernels = active_kernels(dtype);
  }

  // A window's rows lie in memory for area tokens, so a position that stands twice must not get through.
  void check_packed(int64_t frames) const {
    STD_TORCH_CHECK(w.offset[0] == 0 && w.offset[frames] <= rows, kOp,
                    ": cu_seqlens must start at 0 and end within the rows of qkv");
    for (int64_t f = 0; f < frames; ++f) {
      STD_TORCH_CHECK(w.offset[f] <= w.offset[f + 1], kOp, ": cu_seqlens must not descend");
      int64_t before = -1;
      for (int64_t r = w.offset[f]; r < w.offset[f + 1]; ++r) {
        STD_TORCH_CHECK(w.positions[r] > before && w.positions[r] < w.height * w.width, kOp,
                        ": positions must ascend inside a frame and lie on the grid");
        before = w.positions[r];
      }
    }
  }

  // Call run(begin, end, scratch) for ranges of [0, count) on torch's threads.
  template <typename Run>
  void parallel(int64_t count, bool backward, const Run& run) const {
    const int64_t bytes = kernels.scratch_bytes(w, backward);
    torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      std::vector<char> memory(bytes + 64);
      run(begin, end, memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64));
    });
  }
};

// Rows past the last frame's end are nobody's.
void zero_tail(const Tensor& x, int64_t from) {
  if (x.size(0) <= from) return;
  const int64_t row = x.size(1) * static_cast<int64_t>(x.element_size());
  std::memset(static_cast<char*>(x.data_ptr()) + from * row, 0, (x.size(0) - from) * row);
}

std::tuple<Tensor, Tensor> window_attention_fwd_cpu(Tensor qkv, Tensor bias_table,
                                                    std::optional<Tensor> head_scale, double scale,
                                                    std::optional<Tensor> positions,
                                                    std::optional<Tensor> cu_seqlens, int64_t heads,
                                                    int64_t height, int64_t width, int64_t window,
                                                    int64_t shift) {
  Call call(qkv, bias_table, head_scale, scale, positions, cu_seqlens, heads, height, width, window, shift);
  Tensor out = torch::stable::new_empty(qkv, {call.rows, qkv.size(1) / 3});
  Tensor lse = torch::stable::new_empty(qkv, {call.rows, heads}, ScalarType::Float);
  call.w.out = out.data_ptr();
  call.w.lse = pointer<float>(lse);
  call.parallel(call.tasks, false, [&](int64_t begin, int64_t end, char* scratch) {
    call.kernels.forward(call.w, begin, end, scratch);
  });
  zero_tail(out, call.valid);
  zero_tail(lse, call.valid);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> window_attention_bwd_cpu(
    Tensor grad_out_any, Tensor qkv, Tensor /* out: what the kernels need of it they compute */,
    Tensor /* lse: likewise */, Tensor bias_table, std::optional<Tensor> head_scale, double scale,
    std::optional<Tensor> positions, std::optional<Tensor> cu_seqlens, int64_t heads, int64_t height,
    int64_t width, int64_t window, int64_t shift) {
  Call call(qkv, bias_table, head_scale, scale, positions, cu_seqlens, heads, height, width, window, shift);
  const Tensor grad_out = contiguous(grad_out_any);
  STD_TORCH_CHECK(grad_out.scalar_type() == qkv.scalar_type() && grad_out.size(0) == call.rows &&
                      grad_out.numel() == call.rows * (qkv.size(1) / 3),
                  kOp, ": the gradient does not fit qkv");
  Tensor grad_qkv = torch::stable::new_empty(qkv, {call.rows, qkv.size(1)});
  Tensor grad_table = torch::stable::new_empty(bias_table, bias_table.sizes());
  Tensor grad_scale = torch::stable::new_empty(bias_table, {heads});
  call.w.grad_out = grad_out.data_ptr();
  call.w.grad_qkv = grad_qkv.data_ptr();

  const int64_t table = call.w.table(), stride = table * heads;
  const int64_t parts = std::min(call.tasks, kPartialSums);
  std::vector<float> bias(parts * stride, 0.0f);
  std::vector<double> log_scale(parts * heads, 0.0);
  call.parallel(parts, true, [&](int64_t begin, int64_t end, char* scratch) {
    for (int64_t p = begin; p < end; ++p) {
      call.kernels.backward(call.w, call.tasks * p / parts, call.tasks * (p + 1) / parts, scratch,
                            bias.data() + p * stride, log_scale.data() + p * heads);
    }
  });
  zero_tail(grad_qkv, call.valid);

  auto total = [parts](const auto& partial, int64_t at, int64_t step) {
    double sum = 0;
    for (int64_t p = 0; p < parts; ++p) sum += partial[p * step + at];
    return sum;
  };
  for (int64_t h = 0; h < heads; ++h) {
    for (int64_t t = 0; t < table; ++t) {
      pointer<float>(grad_table)[t * heads + h] = static_cast<float>(total(bias, h * table + t, stride));
    }
    const double along = total(log_scale, h, heads);
    pointer<float>(grad_scale)[h] =
        call.w.head_scale ? static_cast<float>(along / call.w.head_scale[h]) : 0.0f;
  }
  return {grad_qkv, grad_table, grad_scale};
}

STABLE_TORCH_LIBRARY_IMPL(deepmsi, CPU, m) {
  m.impl("window_attention_cpp_fwd", TORCH_BOX(&window_attention_fwd_cpu));
  m.impl("window_attention_cpp_bwd", TORCH_BOX(&window_attention_bwd_cpu));
}

}  // namespace
}  // namespace deepmsi

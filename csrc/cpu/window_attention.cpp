// Registration of window_attention under the CPU key: outputs, and threads over bands of windows.
#include <tuple>

#include "window_attention_call.h"

namespace deepmsi {
namespace {

constexpr const char* kOp = "window_attention";

// qkv [R, 3C] whose rows are dense, however far apart.
Tensor rows_of(const Tensor& qkv) {
  STD_TORCH_CHECK(qkv.dim() == 2 && qkv.size(1) % 3 == 0, kOp, ": qkv must be [R, 3C]");
  return qkv.stride(1) == 1 ? qkv : torch::stable::contiguous(qkv);
}

std::tuple<Tensor, Tensor> window_attention_fwd_cpu(Tensor qkv_any, Tensor bias_table,
                                                    std::optional<Tensor> head_scale, double scale,
                                                    std::optional<Tensor> positions,
                                                    std::optional<Tensor> cu_seqlens, int64_t heads,
                                                    int64_t height, int64_t width, int64_t window,
                                                    int64_t shift) {
  const Tensor qkv = rows_of(qkv_any);
  const WindowCall call(kOp, qkv.size(0), qkv.size(1) / 3, storage_of(qkv, kOp), bias_table, head_scale,
                        scale, positions, cu_seqlens, heads, height, width, window, shift);
  Tensor out = torch::stable::new_empty(qkv, {call.rows, qkv.size(1) / 3});
  Tensor lse = torch::stable::new_empty(qkv, {call.rows, heads}, ScalarType::Float);
  WindowAttention w = call.w;
  w.qkv = qkv.data_ptr();
  w.qkv_stride = qkv.stride(0);
  w.out = out.data_ptr();
  w.lse = pointer<float>(lse);
  call.parallel(call.frames * w.bands(), false, [&](int64_t begin, int64_t end, char* scratch) {
    call.kernels.forward(w, begin, end, scratch);
  });
  zero_tail(out, call.valid);
  zero_tail(lse, call.valid);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> window_attention_bwd_cpu(
    Tensor grad_out_any, Tensor qkv_any, Tensor /* out: what the kernels need of it they compute */,
    Tensor /* lse: likewise */, Tensor bias_table, std::optional<Tensor> head_scale, double scale,
    std::optional<Tensor> positions, std::optional<Tensor> cu_seqlens, int64_t heads, int64_t height,
    int64_t width, int64_t window, int64_t shift) {
  const Tensor qkv = rows_of(qkv_any);
  const WindowCall call(kOp, qkv.size(0), qkv.size(1) / 3, storage_of(qkv, kOp), bias_table, head_scale,
                        scale, positions, cu_seqlens, heads, height, width, window, shift);
  const Tensor grad_out = dense(grad_out_any);
  STD_TORCH_CHECK(grad_out.scalar_type() == qkv.scalar_type() && grad_out.size(0) == call.rows &&
                      grad_out.numel() == call.rows * (qkv.size(1) / 3),
                  kOp, ": the gradient does not fit qkv");
  Tensor grad_qkv = torch::stable::new_empty(qkv, {call.rows, qkv.size(1)});
  Tensor grad_table = torch::stable::new_empty(bias_table, bias_table.sizes());
  Tensor grad_scale = torch::stable::new_empty(bias_table, {heads});
  WindowAttention w = call.w;
  w.qkv = qkv.data_ptr();
  w.qkv_stride = qkv.stride(0);
  w.grad_out = grad_out.data_ptr();
  w.grad_qkv = grad_qkv.data_ptr();
  WindowSums sums(w);
  sums.add(call, w, call.frames);
  zero_tail(grad_qkv, call.valid);
  sums.write(w.head_scale, grad_table, grad_scale);
  return {grad_qkv, grad_table, grad_scale};
}

STABLE_TORCH_LIBRARY_IMPL(deepmsi, CPU, m) {
  m.impl("window_attention_cpp_fwd", TORCH_BOX(&window_attention_fwd_cpu));
  m.impl("window_attention_cpp_bwd", TORCH_BOX(&window_attention_bwd_cpu));
}

}  // namespace
}  // namespace deepmsi

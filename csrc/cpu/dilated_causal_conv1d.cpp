// Registration of dilated_causal_conv1d under the CPU key: outputs, threads over tiles, choice of the
// instruction set.
#include "dilated_causal_conv1d.h"

#include <algorithm>
#include <memory>
#include <tuple>

#include "tensors.h"

namespace deepmsi {
namespace {

constexpr const char* kOp = "dilated_causal_conv1d";
constexpr int64_t kGrain = 16384;  // elements that are worth a thread

CausalConvKernels active_kernels(DType dtype) {
#if DEEPMSI_X86
  switch (active_isa()) {
    case Isa::kAvx512:
      return avx512::causal_conv_kernels(dtype);
    case Isa::kAvx2:
      return avx2::causal_conv_kernels(dtype);
    default:
      break;
  }
#endif
  return baseline::causal_conv_kernels(dtype);
}

// What both directions read, checked; it owns the tensors behind the pointers of `conv`.
struct Call {
  Tensor x, weight;
  CausalConv conv{};
  CausalConvKernels kernels;

  Call(const Tensor& x_any, const Tensor& weight_any, int64_t dilation, std::optional<int64_t> count,
       int64_t step, bool relu, double dropout)
      : x(dense(x_any)), weight(dense(weight_any)), kernels(active_kernels(storage_of(x_any, kOp))) {
    STD_TORCH_CHECK(x.dim() == 3 && weight.dim() == 3 && weight.size(0) >= 1 && weight.size(1) == x.size(2) &&
                        weight.scalar_type() == x.scalar_type(),
                    kOp, ": x must be [B, n, Cin] and weight [k, Cin, Cout] of the same type");
    conv.batch = x.size(0);
    conv.length = x.size(1);
    conv.inputs = x.size(2);
    conv.taps = weight.size(0);
    conv.outputs = weight.size(2);
    conv.dilation = dilation;
    conv.count = count.value_or(conv.length);
    conv.step = step;
    conv.relu = relu;
    conv.scale = 1.0 / (1.0 - dropout);
    conv.x = x.data_ptr();
    conv.weight = weight.data_ptr();
    STD_TORCH_CHECK(dilation >= 1 && step >= 1 && conv.count >= 0 && (conv.count == 0 || conv.first() >= 0),
                    kOp, ": dilation and step must be at least 1, and the positions lie in x");
    STD_TORCH_CHECK(0.0 <= dropout && dropout < 1.0 && (dropout == 0.0 || relu), kOp,
                    ": dropout must lie in [0, 1) and follows relu");
  }

  Tensor checked(const Tensor& any) const {
    STD_TORCH_CHECK(any.scalar_type() == x.scalar_type() && any.numel() == conv.rows() * conv.outputs, kOp,
                    ": a tensor of the output's kind is not [B, count, Cout] of x's type");
    return dense(any);
  }

  Tensor output() const { return torch::stable::new_empty(x, {conv.batch, conv.count, conv.outputs}); }

  // Run a product of rows x columns tile by tile on torch's threads.
  void product(void (*kernel)(const CausalConv&, int64_t, int64_t, char*), int64_t rows,
               int64_t columns) const {
    const int64_t bytes = kernels.scratch_bytes(rows);
    torch::stable::parallel_for(0, kernels.tiles(rows, columns), 1, [&](int64_t begin, int64_t end) {
      const std::unique_ptr<char[]> memory(new char[bytes + 64]);
      kernel(conv, begin, end, memory.get() + (64 - reinterpret_cast<uintptr_t>(memory.get()) % 64));
    });
  }
};

std::tuple<Tensor, Tensor> causal_conv_fwd_cpu(Tensor x, Tensor weight, std::optional<Tensor> bias_any,
                                               std::optional<Tensor> residual_any, std::optional<Tensor> seed,
                                               int64_t dilation, std::optional<int64_t> count, int64_t step,
                                               bool relu, double dropout, bool with_grad) {
  Call call(x, weight, dilation, count, step, relu, dropout);
  CausalConv& conv = call.conv;
  Tensor y = call.output();
  const bool kept = relu && residual_any.has_value() && with_grad;
  Tensor active = kept ? torch::stable::new_empty(y, y.sizes(), ScalarType::Bool)
                       : torch::stable::new_empty(y, {0}, ScalarType::Bool);
  std::optional<Tensor> bias, residual;
  if (bias_any.has_value()) {
    STD_TORCH_CHECK(bias_any->scalar_type() == x.scalar_type() && bias_any->numel() == conv.outputs, kOp,
                    ": bias must be [Cout] of x's type");
    bias = dense(*bias_any);
    conv.bias = bias->data_ptr();
  }
  if (residual_any.has_value()) {
    residual = call.checked(*residual_any);
    conv.residual = residual->data_ptr();
  }
  if (dropout > 0.0) {
    STD_TORCH_CHECK(seed.has_value() && seed->scalar_type() == ScalarType::Long && seed->numel() == 1, kOp,
                    ": dropout needs a seed of one int64");
    conv.seed = static_cast<uint64_t>(*pointer<const int64_t>(*seed));
    conv.threshold = static_cast<uint32_t>(dropout * 4294967296.0);
  }
  conv.y = y.data_ptr();
  conv.active = kept ? pointer<bool>(active) : nullptr;
  call.product(call.kernels.forward, conv.rows(), conv.outputs);
  return {y, active};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> causal_conv_bwd_cpu(Tensor grad_y_any, Tensor x, Tensor weight,
                                                               Tensor y_any, Tensor active_any,
                                                               int64_t dilation, int64_t step, bool relu,
                                                               bool residual, double dropout, bool want_x,
                                                               bool want_weight) {
  STD_TORCH_CHECK(grad_y_any.dim() == 3, kOp, ": the gradient must be [B, count, Cout]");
  Call call(x, weight, dilation, grad_y_any.size(1), step, relu, dropout);
  CausalConv& conv = call.conv;
  const Tensor grad_y = call.checked(grad_y_any);
  const Tensor y = relu || residual ? call.checked(y_any) : y_any;
  const Tensor active = dense(active_any);
  STD_TORCH_CHECK(!(relu && residual) || (active.scalar_type() == ScalarType::Bool &&
                                          active.numel() == conv.rows() * conv.outputs),
                  kOp, ": active must be [B, count, Cout] bool");
  const ScalarType wide = wide_of(x.scalar_type());
  Tensor gradient = torch::stable::new_empty(grad_y, grad_y.sizes(), wide);
  Tensor grad_residual = residual ? call.output() : torch::stable::new_empty(x, {0});
  Tensor grad_x = want_x ? torch::stable::new_empty(x, x.sizes()) : torch::stable::new_empty(x, {0});
  Tensor grad_weight =
      want_weight ? torch::stable::new_empty(x, weight.sizes()) : torch::stable::new_empty(x, {0});
  Tensor grad_bias = torch::stable::new_empty(x, {conv.outputs});
  conv.residual_given = residual;
  conv.grad_y = grad_y.data_ptr();
  conv.y_saved = y.data_ptr();
  conv.was_active = pointer<const bool>(active);
  conv.gradient = gradient.data_ptr();
  conv.grad_residual = grad_residual.data_ptr();
  conv.grad_x = grad_x.data_ptr();
  conv.grad_weight = grad_weight.data_ptr();
  conv.grad_bias = grad_bias.data_ptr();
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(conv.outputs, 1));
  torch::stable::parallel_for(0, conv.rows(), grain,
                              [&](int64_t begin, int64_t end) { call.kernels.gradient(conv, begin, end); });
  torch::stable::parallel_for(0, conv.outputs,
                              std::max<int64_t>(64, kGrain / std::max<int64_t>(conv.rows(), 1)),
                              [&](int64_t begin, int64_t end) { call.kernels.grad_bias(conv, begin, end); });
  if (want_x) call.product(call.kernels.grad_x, conv.batch * conv.length, conv.inputs);
  if (want_weight) call.product(call.kernels.grad_weight, conv.taps * conv.inputs, conv.outputs);
  return {grad_x, grad_weight, grad_bias, grad_residual};
}

// Checked arguments of the fold of a weight norm; it owns the tensors behind the pointers of `fold`.
struct Folding {
  Tensor v, g;
  WeightFold fold{};
  CausalConvKernels kernels;

  Folding(const Tensor& v_any, const Tensor& g_any)
      : v(dense(v_any)), g(dense(g_any)), kernels(active_kernels(storage_of(v_any, kOp))) {
    STD_TORCH_CHECK(v.dim() == 3 && g.numel() == v.size(0) && g.scalar_type() == v.scalar_type(), kOp,
                    ": v must be [Cout, Cin, k] and g [Cout, 1, 1] of the same type");
    fold.outputs = v.size(0);
    fold.inputs = v.size(1);
    fold.taps = v.size(2);
    fold.v = v.data_ptr();
    fold.g = g.data_ptr();
  }

  void run(void (*kernel)(const WeightFold&, int64_t, int64_t, char*)) const {
    const int64_t tasks = (fold.outputs + kFoldOutputs - 1) / kFoldOutputs;
    const int64_t bytes =
        kFoldOutputs * fold.inputs * fold.taps * (v.scalar_type() == ScalarType::Double ? 8 : 4);
    torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
      const std::unique_ptr<char[]> memory(new char[bytes + 64]);
      kernel(fold, begin, end, memory.get() + (64 - reinterpret_cast<uintptr_t>(memory.get()) % 64));
    });
  }
};

std::tuple<Tensor, Tensor> fold_fwd_cpu(Tensor v, Tensor g) {
  Folding folding(v, g);
  WeightFold& fold = folding.fold;
  Tensor weight = torch::stable::new_empty(v, {fold.taps, fold.inputs, fold.outputs});
  Tensor norm = torch::stable::new_empty(v, {fold.outputs}, wide_of(v.scalar_type()));
  fold.weight = weight.data_ptr();
  fold.norm = norm.data_ptr();
  folding.run(folding.kernels.fold);
  return {weight, norm};
}

std::tuple<Tensor, Tensor> fold_bwd_cpu(Tensor grad_any, Tensor v, Tensor g, Tensor norm_any) {
  Folding folding(v, g);
  WeightFold& fold = folding.fold;
  const Tensor grad = dense(grad_any), norm = dense(norm_any);
  STD_TORCH_CHECK(grad.scalar_type() == v.scalar_type() && grad.numel() == v.numel() &&
                      norm.numel() == fold.outputs && norm.scalar_type() == wide_of(v.scalar_type()),
                  kOp, ": the gradient does not fit the weight");
  Tensor grad_v = torch::stable::new_empty(v, v.sizes()), grad_g = torch::stable::new_empty(g, g.sizes());
  fold.grad_weight = grad.data_ptr();
  fold.norm = norm.data_ptr();
  fold.grad_v = grad_v.data_ptr();
  fold.grad_g = grad_g.data_ptr();
  folding.run(folding.kernels.unfold);
  return {grad_v, grad_g};
}

STABLE_TORCH_LIBRARY_IMPL(deepmsi, CPU, m) {
  m.impl("dilated_causal_conv1d_cpp_fwd", TORCH_BOX(&causal_conv_fwd_cpu));
  m.impl("dilated_causal_conv1d_cpp_bwd", TORCH_BOX(&causal_conv_bwd_cpu));
  m.impl("fold_weight_norm_cpp_fwd", TORCH_BOX(&fold_fwd_cpu));
  m.impl("fold_weight_norm_cpp_bwd", TORCH_BOX(&fold_bwd_cpu));
}

}  // namespace
}  // namespace deepmsi

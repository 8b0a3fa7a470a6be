// Registration of dilated_causal_conv1d under the CPU key: outputs, and threads over tiles.
#include "dilated_causal_conv1d.h"

#include <algorithm>
#include <memory>
#include <tuple>

#include "tensors.h"

namespace deepmsi {
namespace {

constexpr const char* kOp = "dilated_causal_conv1d";
constexpr int64_t kGrain = 16384;  // elements that are worth a thread

// What both directions read, checked; it owns the tensors behind the pointers of `conv`. Where g is given the
// weight is v [Cout, Cin, k] of a weight norm.
struct Call {
  Tensor x, weight;
  std::optional<Tensor> g;
  CausalConv conv{};
  CausalConvKernels kernels;

  Call(const Tensor& x_any, const Tensor& weight_any, const std::optional<Tensor>& g_any, int64_t dilation,
       std::optional<int64_t> count, int64_t step, bool relu, double dropout)
      : x(dense(x_any)),
        weight(dense(weight_any)),
        kernels(DEEPMSI_ACTIVE(causal_conv_kernels)(storage_of(x_any, kOp))) {
    const bool normed = g_any.has_value();
    STD_TORCH_CHECK(
        x.dim() == 3 && weight.dim() == 3 && weight.size(normed ? 2 : 0) >= 1 &&
            weight.size(1) == x.size(2) && weight.scalar_type() == x.scalar_type(),
        kOp, ": x must be [B, n, Cin] and weight [k, Cin, Cout], or v [Cout, Cin, k], of the same type");
    conv.batch = x.size(0);
    conv.length = x.size(1);
    conv.inputs = x.size(2);
    conv.taps = weight.size(normed ? 2 : 0);
    conv.outputs = weight.size(normed ? 0 : 2);
    conv.dilation = dilation;
    conv.count = count.value_or(conv.length);
    conv.step = step;
    conv.relu = relu;
    conv.scale = 1.0 / (1.0 - dropout);
    conv.x = x.data_ptr();
    if (normed) {
      STD_TORCH_CHECK(g_any->scalar_type() == x.scalar_type() && g_any->numel() == conv.outputs, kOp,
                      ": g must be [Cout, 1, 1] of x's type");
      g = dense(*g_any);
      conv.v = weight.data_ptr();
      conv.g = g->data_ptr();
    } else {
      conv.weight = weight.data_ptr();
    }
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

  // Run `tasks` of a kernel on torch's threads.
  void run(void (*kernel)(const CausalConv&, int64_t, int64_t, char*), int64_t tasks, int64_t bytes) const {
    torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
      const std::unique_ptr<char[]> memory(new char[bytes + 64]);
      kernel(conv, begin, end, memory.get() + (64 - reinterpret_cast<uintptr_t>(memory.get()) % 64));
    });
  }

  // A product of rows x columns, tile by tile.
  void product(void (*kernel)(const CausalConv&, int64_t, int64_t, char*), int64_t rows,
               int64_t columns) const {
    run(kernel, kernels.tiles(rows, columns), kernels.scratch_bytes(rows));
  }

  // A product of a weight norm's outputs, panel by panel of them.
  void normed_product(void (*kernel)(const CausalConv&, int64_t, int64_t, char*), int64_t rows) const {
    run(kernel, (conv.outputs + kernels.panel - 1) / kernels.panel, kernels.normed_scratch_bytes(conv, rows));
  }
};

std::tuple<Tensor, Tensor, Tensor> forward(Tensor x, Tensor weight, std::optional<Tensor> g,
                                           std::optional<Tensor> bias_any, std::optional<Tensor> residual_any,
                                           std::optional<Tensor> seed, int64_t dilation,
                                           std::optional<int64_t> count, int64_t step, bool relu,
                                           double dropout, bool with_grad) {
  Call call(x, weight, g, dilation, count, step, relu, dropout);
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
  Tensor norms = torch::stable::new_empty(x, {g.has_value() ? 2 : 0, conv.outputs}, wide_of(x.scalar_type()));
  conv.norms = norms.data_ptr();
  if (g.has_value()) {
    call.normed_product(call.kernels.normed_forward, conv.rows());
  } else {
    call.product(call.kernels.forward, conv.rows(), conv.outputs);
  }
  return {y, active, norms};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(Tensor grad_y_any, Tensor x, Tensor weight,
                                                            std::optional<Tensor> g,
                                                            std::optional<Tensor> norms_any, Tensor y_any,
                                                            Tensor active_any, int64_t dilation, int64_t step,
                                                            bool relu, bool residual, double dropout,
                                                            bool want_x, bool want_weight) {
  STD_TORCH_CHECK(grad_y_any.dim() == 3, kOp, ": the gradient must be [B, count, Cout]");
  Call call(x, weight, g, dilation, grad_y_any.size(1), step, relu, dropout);
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
  prefer_large_pages(grad_weight);
  Tensor grad_g = torch::stable::new_empty(x, {want_weight && g.has_value() ? conv.outputs : 0, 1, 1});
  Tensor grad_bias = torch::stable::new_empty(x, {conv.outputs});
  conv.residual_given = residual;
  conv.grad_y = grad_y.data_ptr();
  conv.y_saved = y.data_ptr();
  conv.was_active = pointer<const bool>(active);
  conv.gradient = gradient.data_ptr();
  conv.grad_residual = grad_residual.data_ptr();
  conv.grad_x = grad_x.data_ptr();
  conv.grad_weight = conv.grad_v = grad_weight.data_ptr();
  conv.grad_g = grad_g.data_ptr();
  conv.grad_bias = grad_bias.data_ptr();
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(conv.outputs, 1));
  torch::stable::parallel_for(0, conv.rows(), grain,
                              [&](int64_t begin, int64_t end) { call.kernels.gradient(conv, begin, end); });
  torch::stable::parallel_for(0, conv.outputs,
                              std::max<int64_t>(64, kGrain / std::max<int64_t>(conv.rows(), 1)),
                              [&](int64_t begin, int64_t end) { call.kernels.grad_bias(conv, begin, end); });
  const int64_t rows_of_x = conv.batch * conv.length;
  if (g.has_value()) {
    const Tensor norms = dense(*norms_any);
    STD_TORCH_CHECK(norms.scalar_type() == wide && norms.numel() == 2 * conv.outputs, kOp,
                    ": norms must be [2, Cout] as the forward left them");
    conv.norms = norms.data_ptr();
    if (want_x) call.product(call.kernels.normed_grad_x, rows_of_x, conv.inputs);
    if (want_weight) call.normed_product(call.kernels.normed_grad_weight, conv.taps * conv.inputs);
  } else {
    if (want_x) call.product(call.kernels.grad_x, rows_of_x, conv.inputs);
    if (want_weight) call.product(call.kernels.grad_weight, conv.taps * conv.inputs, conv.outputs);
  }
  return {grad_x, grad_weight, grad_g, grad_bias, grad_residual};
}

std::tuple<Tensor, Tensor> causal_conv_fwd_cpu(Tensor x, Tensor weight, std::optional<Tensor> bias,
                                               std::optional<Tensor> residual, std::optional<Tensor> seed,
                                               int64_t dilation, std::optional<int64_t> count, int64_t step,
                                               bool relu, double dropout, bool with_grad) {
  auto [y, active, norms] =
      forward(x, weight, std::nullopt, bias, residual, seed, dilation, count, step, relu, dropout, with_grad);
  return {y, active};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> causal_conv_bwd_cpu(Tensor grad_y, Tensor x, Tensor weight,
                                                               Tensor y, Tensor active, int64_t dilation,
                                                               int64_t step, bool relu, bool residual,
                                                               double dropout, bool want_x,
                                                               bool want_weight) {
  auto [grad_x, grad_weight, grad_g, grad_bias, grad_residual] =
      backward(grad_y, x, weight, std::nullopt, std::nullopt, y, active, dilation, step, relu, residual,
               dropout, want_x, want_weight);
  return {grad_x, grad_weight, grad_bias, grad_residual};
}

std::tuple<Tensor, Tensor, Tensor> normed_conv_fwd_cpu(Tensor x, Tensor v, Tensor g,
                                                       std::optional<Tensor> bias,
                                                       std::optional<Tensor> residual,
                                                       std::optional<Tensor> seed, int64_t dilation,
                                                       std::optional<int64_t> count, int64_t step, bool relu,
                                                       double dropout, bool with_grad) {
  return forward(x, v, g, bias, residual, seed, dilation, count, step, relu, dropout, with_grad);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> normed_conv_bwd_cpu(
    Tensor grad_y, Tensor x, Tensor v, Tensor g, Tensor norms, Tensor y, Tensor active, int64_t dilation,
    int64_t step, bool relu, bool residual, double dropout, bool want_x, bool want_weight) {
  return backward(grad_y, x, v, g, norms, y, active, dilation, step, relu, residual, dropout, want_x,
                  want_weight);
}

STABLE_TORCH_LIBRARY_IMPL(deepmsi, CPU, m) {
  m.impl("dilated_causal_conv1d_cpp_fwd", TORCH_BOX(&causal_conv_fwd_cpu));
  m.impl("dilated_causal_conv1d_cpp_bwd", TORCH_BOX(&causal_conv_bwd_cpu));
  m.impl("weight_normed_conv1d_cpp_fwd", TORCH_BOX(&normed_conv_fwd_cpu));
  m.impl("weight_normed_conv1d_cpp_bwd", TORCH_BOX(&normed_conv_bwd_cpu));
}

}  // namespace
}  // namespace deepmsi

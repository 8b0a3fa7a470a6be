// Registration of vsc_compress under the CPU key: outputs, and threads over frames.
#include "vsc_compress.h"

#include <algorithm>
#include <cstring>
#include <tuple>

#include "memory.h"
#include "tensors.h"
#include "threads.h"

namespace deepmsi {
namespace {

constexpr const char* kOp = "vsc_compress";

int64_t longest_frame(const std::vector<int64_t>& offset) {
  int64_t longest = 0;
  for (size_t b = 1; b < offset.size(); ++b) longest = std::max(longest, offset[b] - offset[b - 1]);
  return longest;
}

// Run a kernel over all frames on torch's threads. A frame is computed by one thread in one order, so the
// bits do not depend on how many there are.
template <typename Arguments>
void over_frames(void (*kernel)(const Arguments&, int64_t, int64_t, char*), const Arguments& arguments,
                 int64_t frames, int64_t scratch) {
  share_out(frames, 1, [&](int64_t begin, int64_t end) {
    const Bytes memory(scratch);
    kernel(arguments, begin, end, memory.data());
  });
}

using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Forward vsc_compress_fwd_cpu(Tensor x_any, std::optional<Tensor> cu_seqlens, Tensor guide_any,
                             Tensor guide_weight, double temperature, bool standardize, double threshold,
                             std::optional<int64_t> keep, std::optional<int64_t> capacity, int64_t min_keep,
                             double fuse_threshold, double fuse_alpha) {
  const DType dtype = storage_of(x_any, kOp);
  const ScalarType wide = wide_of(x_any.scalar_type());
  const Tensor x = dense(x_any), guide = dense(guide_any);
  STD_TORCH_CHECK(guide.dim() == 2 && guide.scalar_type() == wide && guide_weight.scalar_type() == wide, kOp,
                  ": guide [B, C] and guide_weight must be float32 (float64 with a float64 x)");
  const int64_t frames = guide.size(0), channels = guide.size(1);
  STD_TORCH_CHECK(channels > 0 && x.size(x.dim() - 1) == channels, kOp,
                  ": guide and x must have the same channels");
  const std::vector<int64_t> offset = frame_offsets(x, cu_seqlens, frames, kOp);
  const int64_t rows = cu_seqlens.has_value() ? x.size(0) : frames * x.size(1);
  STD_TORCH_CHECK(rows <= INT32_MAX, kOp, ": 2^31 rows or more");

  Tensor relevance = torch::stable::new_empty(x, {rows}, wide);
  Tensor assignment = torch::stable::new_empty(x, {rows}, ScalarType::Int);
  Tensor state = torch::stable::new_empty(x, {3, rows}, wide);
  Tensor mean = torch::stable::new_empty(x, {frames, channels}, wide);
  Tensor cu_out = torch::stable::new_empty(x, {frames + 1}, ScalarType::Int);
  std::vector<int64_t> count(frames), offset_out(frames + 1);
  const int64_t step = rows * static_cast<int64_t>(state.element_size());

  VscForward f{};
  f.x = x.data_ptr();
  f.offset = offset.data();
  f.guide = guide.data_ptr();
  f.guide_weight = number(guide_weight, kOp);
  f.channels = channels;
  f.temperature = temperature;
  f.standardize = standardize;
  f.threshold = threshold;
  f.keep = keep.value_or(0);
  f.capacity = capacity.value_or(0);
  f.min_keep = min_keep;
  f.fuse_threshold = fuse_threshold;
  f.fuse_alpha = fuse_alpha;
  f.relevance = relevance.data_ptr();
  f.assignment = pointer<int32_t>(assignment);
  f.score = state.data_ptr();
  f.norm = pointer<char>(state) + step;
  f.closeness = pointer<char>(state) + 2 * step;
  f.mean = mean.data_ptr();
  f.count = count.data();
  const VscKernels kernels = DEEPMSI_ACTIVE(vsc_kernels)(dtype);
  const int64_t scratch = kernels.scratch_bytes(longest_frame(offset), channels);
  over_frames(kernels.select, f, frames, scratch);

  for (int64_t b = 0; b < frames; ++b) offset_out[b + 1] = offset_out[b] + count[b];
  std::copy(offset_out.begin(), offset_out.end(), pointer<int32_t>(cu_out));
  const int64_t packed = capacity.has_value() ? frames * *capacity : offset_out[frames];
  Tensor tokens = torch::stable::new_empty(x, {packed, channels});
  Tensor index = torch::stable::new_empty(x, {packed}, ScalarType::Long);
  Tensor gate = torch::stable::new_empty(x, {packed});
  f.offset_out = offset_out.data();
  f.tokens = tokens.data_ptr();
  f.index = pointer<int64_t>(index);
  f.gate = gate.data_ptr();
  over_frames(kernels.merge, f, frames, scratch);

  zero_tail(tokens, offset_out[frames]);
  zero_tail(gate, offset_out[frames]);
  std::fill(pointer<int64_t>(index) + offset_out[frames], pointer<int64_t>(index) + packed, -1);
  std::fill(pointer<int32_t>(assignment) + offset[frames], pointer<int32_t>(assignment) + rows, -1);
  zero_tail(relevance, offset[frames]);
  for (int64_t k = 0; k < 3 && offset[frames] < rows; ++k) {
    const int64_t row = step / rows;
    std::memset(pointer<char>(state) + k * step + offset[frames] * row, 0, (rows - offset[frames]) * row);
  }
  return {tokens, cu_out, index, gate, relevance, assignment, state, mean};
}

std::tuple<Tensor, Tensor, Tensor> vsc_compress_bwd_cpu(
    std::optional<Tensor> grad_tokens, std::optional<Tensor> grad_gate, Tensor x_any,
    std::optional<Tensor> cu_seqlens, Tensor guide_any, Tensor guide_weight, Tensor cu_out_any,
    Tensor index_any, Tensor assignment_any, Tensor state_any, Tensor mean_any, double fuse_alpha) {
  const DType dtype = storage_of(x_any, kOp);
  const Tensor x = dense(x_any), guide = dense(guide_any), cu_out = dense(cu_out_any),
               index = dense(index_any), assignment = dense(assignment_any), state = dense(state_any),
               mean = dense(mean_any);
  const int64_t frames = guide.size(0), channels = guide.size(1);
  const std::vector<int64_t> offset = frame_offsets(x, cu_seqlens, frames, kOp);
  const int64_t rows = assignment.size(0);
  STD_TORCH_CHECK(x.numel() == rows * channels && state.numel() == 3 * rows && cu_out.size(0) == frames + 1 &&
                      mean.numel() == frames * channels,
                  kOp, ": the saved tensors do not fit x");
  const int32_t* cu = pointer<const int32_t>(cu_out);
  std::vector<int64_t> offset_out(cu, cu + frames + 1);
  STD_TORCH_CHECK(offset_out[frames] <= index.size(0), kOp, ": the saved tensors do not fit one another");
  std::optional<Tensor> tokens_held, gate_held;
  if (grad_tokens.has_value()) {
    tokens_held = dense(*grad_tokens);
    STD_TORCH_CHECK(tokens_held->scalar_type() == x.scalar_type() && tokens_held->dim() == 2 &&
                        tokens_held->size(0) == index.size(0) && tokens_held->size(1) == channels,
                    kOp, ": the gradient of tokens has another shape or type than tokens");
  }
  if (grad_gate.has_value()) {
    gate_held = dense(*grad_gate);
    STD_TORCH_CHECK(gate_held->scalar_type() == x.scalar_type() && gate_held->numel() == index.size(0), kOp,
                    ": the gradient of gate has another shape or type than gate");
  }
  Tensor grad_x = torch::stable::new_empty(x, x.sizes());
  Tensor grad_guide = torch::stable::new_empty(guide, guide.sizes());
  Tensor grad_weight = torch::stable::new_empty(guide_weight, {});
  std::vector<double> weight(frames);
  const int64_t step = rows * static_cast<int64_t>(state.element_size());

  VscBackward f{};
  f.grad_tokens = tokens_held.has_value() ? tokens_held->data_ptr() : nullptr;
  f.grad_gate = gate_held.has_value() ? gate_held->data_ptr() : nullptr;
  f.x = x.data_ptr();
  f.offset = offset.data();
  f.offset_out = offset_out.data();
  f.index = pointer<const int64_t>(index);
  f.assignment = pointer<const int32_t>(assignment);
  f.score = state.data_ptr();
  f.norm = pointer<char>(state) + step;
  f.closeness = pointer<char>(state) + 2 * step;
  f.mean = mean.data_ptr();
  f.guide = guide.data_ptr();
  f.guide_weight = number(guide_weight, kOp);
  f.channels = channels;
  f.fuse_alpha = fuse_alpha;
  f.grad_x = grad_x.data_ptr();
  f.grad_guide = grad_guide.data_ptr();
  f.grad_weight = weight.data();
  const VscKernels kernels = DEEPMSI_ACTIVE(vsc_kernels)(dtype);
  over_frames(kernels.backward, f, frames, kernels.scratch_bytes(longest_frame(offset), channels));
  if (cu_seqlens.has_value()) zero_tail(grad_x, offset[frames]);

  double total = 0;
  for (const double part : weight) total += part;
  if (grad_weight.scalar_type() == ScalarType::Double) {
    *pointer<double>(grad_weight) = total;
  } else {
    *pointer<float>(grad_weight) = static_cast<float>(total);
  }
  return {grad_x, grad_guide, grad_weight};
}

STABLE_TORCH_LIBRARY_IMPL(deepmsi, CPU, m) {
  m.impl("vsc_compress_cpp_fwd", TORCH_BOX(&vsc_compress_fwd_cpu));
  m.impl("vsc_compress_cpp_bwd", TORCH_BOX(&vsc_compress_bwd_cpu));
}

}  // namespace
}  // namespace deepmsi

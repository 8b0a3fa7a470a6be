// Registration of pack_weight under the CPU key: a weight as the products of a transformer's blocks read it,
// laid out once where it stays as it is.
#include "blocks.h"

namespace deepmsi {
namespace {

constexpr const char* kOp = "pack_weight";

Tensor pack_weight_cpu(Tensor weight_any, bool halves) {
  const BlockKernels& k = block_kernels(halves ? DType::kBFloat16 : DType::kFloat);
  STD_TORCH_CHECK(weight_any.dim() == 2, kOp, ": weight must be [out, in]");
  const Tensor weight = weight_of(weight_any, k, weight_any.size(0), weight_any.size(1), kOp, "weight");
  const int64_t columns = weight.size(0), depth = weight.size(1);
  Tensor packed = torch::stable::new_empty(weight, {panels_of(k, columns), k.pitch(depth), k.panel},
                                           scalar_type_of(k.operand));
  pack_part(k, weight, true, depth, columns, {0, 0, depth, columns}, packed.data_ptr());
  return packed;
}

STABLE_TORCH_LIBRARY_IMPL(deepmsi, CPU, m) { m.impl("pack_weight_cpp", TORCH_BOX(&pack_weight_cpu)); }

}  // namespace
}  // namespace deepmsi

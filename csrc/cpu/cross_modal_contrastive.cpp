// Registration of cross_modal_contrastive under the CPU key. The scores exist a stripe of rows at a time:
// products by torch's own matmul, everything between them in one pass over a row. The gradient of the
// features is made with the loss, so the backward only scales it.
#include "cross_modal_contrastive.h"

#include <algorithm>
#include <tuple>
#include <unordered_map>

#include "tensors.h"

namespace deepmsi {
namespace {

constexpr const char* kOp = "cross_modal_contrastive";
constexpr int64_t kStripeFloats = int64_t(1) << 21;  // scores in memory at a time: 8 MB

ContrastiveKernels active_kernels() {
#if DEEPMSI_X86
  switch (active_isa()) {
    case Isa::kAvx512:
      return avx512::contrastive_kernels();
    case Isa::kAvx2:
      return avx2::contrastive_kernels();
    default:
      break;
  }
#endif
  return baseline::contrastive_kernels();
}

// Labels as small numbers from 0, the same in both lists.
void number_labels(const Tensor& a_any, const Tensor& b_any, std::vector<int32_t>* a,
                   std::vector<int32_t>* b) {
  std::unordered_map<int64_t, int32_t> numbers;
  for (auto [any, list] : {std::pair{&a_any, a}, std::pair{&b_any, b}}) {
    STD_TORCH_CHECK(any->scalar_type() == ScalarType::Long && any->dim() == 1, kOp,
                    ": labels must be [B] int64");
    const Tensor held = contiguous(*any);
    list->resize(any->size(0));
    for (size_t i = 0; i < list->size(); ++i) {
      (*list)[i] = numbers.emplace(pointer<const int64_t>(held)[i], static_cast<int32_t>(numbers.size()))
                       .first->second;
    }
  }
}

std::tuple<Tensor, Tensor, Tensor> contrastive_fwd_cpu(Tensor a_any, Tensor b_any, Tensor labels,
                                                       Tensor labels_b, int64_t row_offset,
                                                       std::optional<Tensor> valid_any,
                                                       std::optional<Tensor> valid_b_any, double temperature,
                                                       bool include_matched, bool per_positive,
                                                       bool with_grad) {
  STD_TORCH_CHECK(a_any.dim() == 2 && b_any.dim() == 3 && a_any.size(1) == b_any.size(2) &&
                      a_any.scalar_type() == ScalarType::Float && b_any.scalar_type() == ScalarType::Float,
                  kOp, ": a must be [B, D] and b [P, J, D], both float32");
  const Tensor a = contiguous(a_any), b = contiguous(b_any);
  const int64_t rows = a.size(0), dim = a.size(1), pairs = b.size(0), columns = b.size(1);
  std::vector<int32_t> label, label_b;
  number_labels(labels, labels_b, &label, &label_b);
  STD_TORCH_CHECK(static_cast<int64_t>(label.size()) == rows &&
                      static_cast<int64_t>(label_b.size()) == columns && row_offset >= 0 &&
                      row_offset + rows <= columns,
                  kOp, ": labels do not fit the rows, or the rows do not lie in the joined batch");
  std::optional<Tensor> valid, valid_b;
  if (valid_any.has_value()) valid = contiguous(*valid_any);
  if (valid_b_any.has_value()) valid_b = contiguous(*valid_b_any);
  STD_TORCH_CHECK(
      (!valid || (valid->scalar_type() == ScalarType::Bool && valid->numel() == pairs * rows)) &&
          (!valid_b || (valid_b->scalar_type() == ScalarType::Bool && valid_b->numel() == pairs * columns)),
      kOp, ": valid must be [P, B] bool and valid_b [P, J] bool");

  const ContrastiveKernels kernels = active_kernels();
  Tensor loss = torch::stable::new_zeros(a, {});
  Tensor grad_a =
      with_grad ? torch::stable::new_zeros(a, {rows, dim}) : torch::stable::new_empty(a, {0, dim});
  Tensor grad_b = torch::stable::new_empty(a, {pairs, with_grad ? columns : 0, dim});
  Tensor unit_a = torch::stable::new_empty(a, {rows, dim}),
         unit_b = torch::stable::new_empty(a, {columns, dim});
  std::vector<float> norm_a(rows), norm_b(columns);
  std::vector<double> parts(rows);
  const int64_t stripe = std::max<int64_t>(1, std::min(rows, kStripeFloats / std::max<int64_t>(columns, 1)));
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(columns, 1));
  double total = 0;

  for (int64_t p = 0; p < pairs && rows > 0; ++p) {
    const bool* present = valid ? pointer<const bool>(*valid) + p * rows : nullptr;
    const bool* present_b = valid_b ? pointer<const bool>(*valid_b) + p * columns : nullptr;
    std::vector<int32_t> kind(label_b);
    int64_t count = columns;
    for (int64_t j = 0; present_b != nullptr && j < columns; ++j) {
      if (!present_b[j]) {
        kind[j] = -1;
        --count;
      }
    }
    float* gradient_b = with_grad ? pointer<float>(grad_b) + p * columns * dim : nullptr;
    if (with_grad) std::fill_n(gradient_b, columns * dim, 0.0f);
    if (count < 2) continue;
    const double share = 1.0 / (static_cast<double>(pairs) * static_cast<double>(count) *
                                (per_positive ? 1.0 : static_cast<double>(count - 1)));
    const int64_t chunk = std::max<int64_t>(1, 16384 / std::max<int64_t>(dim, 1));
    torch::stable::parallel_for(0, columns, chunk, [&](int64_t begin, int64_t end) {
      kernels.normalize(pointer<const float>(b) + (p * columns + begin) * dim,
                        present_b == nullptr ? nullptr : present_b + begin, end - begin, dim,
                        pointer<float>(unit_b) + begin * dim, norm_b.data() + begin);
    });
    torch::stable::parallel_for(0, rows, chunk, [&](int64_t begin, int64_t end) {
      kernels.normalize(pointer<const float>(a) + begin * dim, present == nullptr ? nullptr : present + begin,
                        end - begin, dim, pointer<float>(unit_a) + begin * dim, norm_a.data() + begin);
      // The temperature rides on a's side.
      for (int64_t k = begin * dim; k < end * dim; ++k)
        pointer<float>(unit_a)[k] /= static_cast<float>(temperature);
    });
    const Tensor turned = torch::stable::transpose(unit_b, 0, 1);
    std::vector<float> gradient_a(with_grad ? rows * dim : 0);
    for (int64_t from = 0; from < rows; from += stripe) {
      const int64_t height = std::min(stripe, rows - from);
      const Tensor part = torch::stable::narrow(unit_a, 0, from, height);
      Tensor scores = torch::stable::matmul(part, turned);
      float* score = pointer<float>(scores);
      torch::stable::parallel_for(0, height, grain, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
          const int64_t i = from + r;
          if (present != nullptr && !present[i]) {
            std::fill_n(score + r * columns, columns, 0.0f);
            parts[i] = 0;
            continue;
          }
          parts[i] = kernels.row(
              {label[i], kind.data(), columns, include_matched ? -1 : row_offset + i, share, per_positive},
              score + r * columns);
        }
      });
      for (int64_t i = from; i < from + height; ++i) total += parts[i];
      if (!with_grad) continue;
      const Tensor left = torch::stable::matmul(scores, unit_b);
      std::copy_n(pointer<const float>(left), height * dim, gradient_a.data() + from * dim);
      const Tensor right = torch::stable::matmul(torch::stable::transpose(scores, 0, 1), part);
      const float* piece = pointer<const float>(right);
      torch::stable::parallel_for(0, columns * dim, 16384, [&](int64_t begin, int64_t end) {
        for (int64_t k = begin; k < end; ++k) gradient_b[k] += piece[k];
      });
    }
    if (!with_grad) continue;
    torch::stable::parallel_for(0, columns, chunk, [&](int64_t begin, int64_t end) {
      kernels.through_norm(pointer<const float>(unit_b) + begin * dim, norm_b.data() + begin, end - begin,
                           dim, gradient_b + begin * dim);
      for (int64_t j = begin; present_b != nullptr && j < end; ++j) {
        if (!present_b[j]) std::fill_n(gradient_b + j * dim, dim, 0.0f);
      }
    });
    torch::stable::parallel_for(0, rows, chunk, [&](int64_t begin, int64_t end) {
      const float scale = static_cast<float>(1.0 / temperature), back = static_cast<float>(temperature);
      for (int64_t k = begin * dim; k < end * dim; ++k) {
        gradient_a[k] *= scale;
        pointer<float>(unit_a)[k] *= back;
      }
      kernels.through_norm(pointer<const float>(unit_a) + begin * dim, norm_a.data() + begin, end - begin,
                           dim, gradient_a.data() + begin * dim);
      for (int64_t i = begin; i < end; ++i) {
        if (present != nullptr && !present[i]) continue;
        float* to = pointer<float>(grad_a) + i * dim;
        for (int64_t c = 0; c < dim; ++c) to[c] += gradient_a[i * dim + c];
      }
    });
  }
  *pointer<float>(loss) = static_cast<float>(total);
  return {loss, grad_a, grad_b};
}

// The gradients that the forward made, times the gradient of the loss.
std::tuple<Tensor, Tensor> contrastive_bwd_cpu(Tensor grad_loss, Tensor grad_a, Tensor grad_b) {
  const float factor = static_cast<float>(number(grad_loss, kOp));
  auto scaled = [&](const Tensor& any) {
    const Tensor x = contiguous(any);
    Tensor y = torch::stable::new_empty(x, x.sizes());
    const float* from = pointer<const float>(x);
    float* to = pointer<float>(y);
    torch::stable::parallel_for(0, x.numel(), 65536, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) to[k] = from[k] * factor;
    });
    return y;
  };
  return {scaled(grad_a), scaled(grad_b)};
}

STABLE_TORCH_LIBRARY_IMPL(deepmsi, CPU, m) {
  m.impl("cross_modal_contrastive_cpp_fwd", TORCH_BOX(&contrastive_fwd_cpu));
  m.impl("cross_modal_contrastive_cpp_bwd", TORCH_BOX(&contrastive_bwd_cpu));
}

}  // namespace
}  // namespace deepmsi

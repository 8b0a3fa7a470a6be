// Registration of cross_modal_contrastive under the CPU key. The scores exist a stripe of rows at a time. The
// gradient of the features is made with the loss, so the backward only scales it.
#include "cross_modal_contrastive.h"

#include <algorithm>
#include <memory>
#include <tuple>
#include <unordered_map>

#include "tensors.h"

namespace deepmsi {
namespace {

constexpr const char* kOp = "cross_modal_contrastive";
constexpr int64_t kStripeFloats = int64_t(1) << 20;  // scores in memory at a time, about: 4 MB
constexpr int64_t kLowestStripe = 64, kHighestStripe = 256;
constexpr int64_t kThreadWork = 2'000'000;  // multiply-adds below which another thread does not pay

int64_t whole(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }

// Rows of a stripe: many, for each stripe reads all of b, but few enough that its scores stay in the cache.
int64_t stripe_rows(int64_t columns) {
  return std::clamp(whole(kStripeFloats / std::max<int64_t>(columns, 1), kPanel), kLowestStripe,
                    kHighestStripe);
}

// Run over [0, count) on torch's threads where the work, in multiply-adds an item, pays for them.
template <typename Run>
void spread(int64_t count, int64_t work, const Run& run) {
  if (count == 0) return;
  torch::stable::parallel_for(0, count, std::max<int64_t>(1, kThreadWork / std::max<int64_t>(work, 1)), run);
}

// Labels as small numbers from 0, the same in both lists; returns how many there are.
int64_t number_labels(const Tensor& a_any, const Tensor& b_any, std::vector<int32_t>* a,
                      std::vector<int32_t>* b) {
  std::unordered_map<int64_t, int32_t> numbers;
  for (auto [any, list] : {std::pair{&a_any, a}, std::pair{&b_any, b}}) {
    STD_TORCH_CHECK(any->scalar_type() == ScalarType::Long && any->dim() == 1, kOp,
                    ": labels must be [B] int64");
    const Tensor held = dense(*any);
    list->resize(any->size(0));
    for (size_t i = 0; i < list->size(); ++i) {
      (*list)[i] = numbers.emplace(pointer<const int64_t>(held)[i], static_cast<int32_t>(numbers.size()))
                       .first->second;
    }
  }
  return static_cast<int64_t>(numbers.size());
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
  const Tensor a = dense(a_any), b = contiguous(b_any);
  const int64_t rows = a.size(0), dim = a.size(1), pairs = b.size(0), columns = b.size(1);
  std::vector<int32_t> label, label_b;
  const int64_t classes = number_labels(labels, labels_b, &label, &label_b);
  STD_TORCH_CHECK(static_cast<int64_t>(label.size()) == rows &&
                      static_cast<int64_t>(label_b.size()) == columns && row_offset >= 0 &&
                      row_offset + rows <= columns,
                  kOp, ": labels do not fit the rows, or the rows do not lie in the joined batch");
  std::optional<Tensor> valid, valid_b;
  if (valid_any.has_value()) valid = dense(*valid_any);
  if (valid_b_any.has_value()) valid_b = dense(*valid_b_any);
  STD_TORCH_CHECK(
      (!valid || (valid->scalar_type() == ScalarType::Bool && valid->numel() == pairs * rows)) &&
          (!valid_b || (valid_b->scalar_type() == ScalarType::Bool && valid_b->numel() == pairs * columns)),
      kOp, ": valid must be [P, B] bool and valid_b [P, J] bool");

  const ContrastiveKernels kernels = DEEPMSI_ACTIVE(contrastive_kernels)();
  Tensor loss = torch::stable::new_empty(a, {});
  Tensor grad_a = torch::stable::new_empty(a, {with_grad ? rows : 0, dim});
  Tensor grad_b = torch::stable::new_empty(a, {pairs, with_grad ? columns : 0, dim});
  const int64_t padded = whole(dim, kDimPad), wide = whole(columns, kPanel), panels = wide / kPanel;
  const int64_t height = std::min(rows, stripe_rows(wide));

  // One allocation for all that is held meanwhile: O(J D) and one stripe of scores.
  float *unit_a, *norm_a, *sum_a, *unit_b, *norm_b, *sum_b, *turned_b, *scores, *share;
  auto lay_out = [&](float* memory) {
    int64_t used = 0;
    auto take = [&](float*& piece, int64_t count) {
      piece = memory + used;
      used += whole(count, 16);
    };
    take(unit_a, rows * padded), take(norm_a, rows), take(unit_b, wide * padded), take(norm_b, wide);
    take(turned_b, wide * padded), take(scores, height * wide), take(share, rows);
    take(sum_a, with_grad ? rows * padded : 0), take(sum_b, with_grad ? wide * padded : 0);
    return used;
  };
  const std::unique_ptr<float[]> memory(new float[lay_out(nullptr) + 16]);
  lay_out(memory.get() + (64 - reinterpret_cast<uintptr_t>(memory.get()) % 64) % 64 / sizeof(float));

  // A row takes part in some pair, or what it holds is nobody's business.
  std::vector<char> anywhere;
  if (valid) {
    anywhere.assign(rows, 0);
    for (int64_t k = 0; k < pairs * rows; ++k) anywhere[k % rows] |= pointer<const bool>(*valid)[k];
  }
  const bool* present_a = valid ? reinterpret_cast<const bool*>(anywhere.data()) : nullptr;
  const float inverse = static_cast<float>(1.0 / temperature);
  spread(rows, dim, [&](int64_t begin, int64_t end) {
    // The temperature rides on a's side.
    kernels.normalize(pointer<const float>(a) + begin * dim,
                      present_a == nullptr ? nullptr : present_a + begin, end - begin, dim, padded, inverse,
                      unit_a + begin * padded, norm_a + begin);
  });
  if (with_grad) std::fill_n(sum_a, rows * padded, 0.0f);

  std::vector<double> parts(rows);
  std::vector<int32_t> kind(wide, -1);
  std::vector<int64_t> members;
  double total = 0;
  for (int64_t p = 0; p < pairs; ++p) {
    const bool* present = valid ? pointer<const bool>(*valid) + p * rows : nullptr;
    const bool* present_b = valid_b ? pointer<const bool>(*valid_b) + p * columns : nullptr;
    float* gradient_b = with_grad ? pointer<float>(grad_b) + p * columns * dim : nullptr;
    members.assign(classes, 0);
    int64_t count = 0;
    for (int64_t j = 0; j < columns; ++j) {
      kind[j] = present_b == nullptr || present_b[j] ? label_b[j] : -1;
      if (kind[j] >= 0) ++members[kind[j]], ++count;
    }
    if (count < 2) {
      if (with_grad) std::fill_n(gradient_b, columns * dim, 0.0f);
      continue;
    }
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t same = members[label[i]];
      const int64_t positives = same - (!include_matched && kind[row_offset + i] == label[i]);
      const bool terms = (present == nullptr || present[i]) && positives > 0 && same < count;
      share[i] = terms ? static_cast<float>(1.0 / (static_cast<double>(pairs * count) *
                                                   static_cast<double>(per_positive ? positives : count - 1)))
                       : 0.0f;
    }
    spread(panels, kPanel * dim, [&](int64_t begin, int64_t end) {
      const int64_t first = begin * kPanel, last = std::min(end * kPanel, columns);
      kernels.normalize(pointer<const float>(b) + (p * columns + first) * dim,
                        present_b == nullptr ? nullptr : present_b + first, last - first, dim, padded, 1.0f,
                        unit_b + first * padded, norm_b + first);
      std::fill_n(unit_b + last * padded, (end * kPanel - last) * padded, 0.0f);
      kernels.turn(unit_b, begin, end, padded, turned_b);
      if (with_grad) std::fill_n(sum_b + first * padded, (end * kPanel - first) * padded, 0.0f);
    });
    for (int64_t from = 0; from < rows; from += height) {
      const ContrastiveStripe s{std::min(height, rows - from),
                                panels,
                                padded,
                                columns,
                                unit_a + from * padded,
                                unit_b,
                                turned_b,
                                label.data() + from,
                                kind.data(),
                                include_matched ? -1 : row_offset + from,
                                share + from,
                                scores,
                                parts.data() + from,
                                with_grad ? sum_a + from * padded : nullptr,
                                sum_b};
      spread(panels, s.height * kPanel * padded,
             [&](int64_t begin, int64_t end) { kernels.scores(s, begin, end); });
      // In whole groups of rows, of which each is worth a thread's while sooner than its count tells.
      const int64_t groups = whole(s.height, kPanel) / kPanel;
      auto by_rows = [&](const auto& run, int64_t work) {
        spread(groups, work,
               [&](int64_t begin, int64_t end) { run(s, begin * kPanel, std::min(end * kPanel, s.height)); });
      };
      by_rows(kernels.rows, 64 * kPanel * wide);
      if (!with_grad) continue;
      by_rows(kernels.gradient_a, kPanel * wide * padded);
      spread(panels, s.height * kPanel * padded,
             [&](int64_t begin, int64_t end) { kernels.gradient_b(s, begin, end); });
    }
    for (const double part : parts) total += part;
    if (!with_grad) continue;
    spread(columns, dim, [&](int64_t begin, int64_t end) {
      kernels.through_norm(unit_b + begin * padded, norm_b + begin,
                           present_b == nullptr ? nullptr : present_b + begin, end - begin, dim, padded, 1.0f,
                           sum_b + begin * padded, gradient_b + begin * dim);
    });
  }
  if (with_grad) {
    spread(rows, dim, [&](int64_t begin, int64_t end) {
      kernels.through_norm(unit_a + begin * padded, norm_a + begin,
                           present_a == nullptr ? nullptr : present_a + begin, end - begin, dim, padded,
                           inverse, sum_a + begin * padded, pointer<float>(grad_a) + begin * dim);
    });
  }
  *pointer<float>(loss) = static_cast<float>(total);
  return {loss, grad_a, grad_b};
}

// The gradients that the forward made, times the gradient of the loss.
std::tuple<Tensor, Tensor> contrastive_bwd_cpu(Tensor grad_loss, Tensor grad_a, Tensor grad_b) {
  const float factor = static_cast<float>(number(grad_loss, kOp));
  auto scaled = [&](const Tensor& any) {
    const Tensor x = dense(any);
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

// Checks and views of torch's tensors that the registrations of the CPU kernels share.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstring>
#include <optional>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "isa.h"
#include "storage.h"

namespace deepmsi {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType storage_of(const Tensor& x, const char* op) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat;
    case ScalarType::Double:
      return DType::kDouble;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kHalf;
    default:
      STD_TORCH_CHECK(false, op, ": takes float32, float64, bfloat16 or float16");
  }
}

inline ScalarType wide_of(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline Tensor dense(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

// Asks for large pages under a tensor that is still to be written. The first write to a page of fresh memory
// costs a fault, and to a gradient of megabytes those cost more than what is computed. A system that gives no
// such pages stays with small ones.
inline void prefer_large_pages(const Tensor& x) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  const uintptr_t start = reinterpret_cast<uintptr_t>(x.data_ptr());
  const uintptr_t first = (start + kPage - 1) / kPage * kPage;
  const uintptr_t last = (start + x.numel() * x.element_size()) / kPage * kPage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

template <typename P>
P* pointer(const Tensor& x) {
  return static_cast<P*>(x.data_ptr());
}

// A 0-dim number on the CPU, as double.
inline double number(const Tensor& x, const char* op) {
  STD_TORCH_CHECK(x.numel() == 1, op, ": expected a tensor of one number");
  return x.scalar_type() == ScalarType::Double ? *pointer<const double>(x)
                                               : static_cast<double>(*pointer<const float>(x));
}

// Row offsets of the frames of x [R, C] or [B, N, C], checked against the rows that are there.
inline std::vector<int64_t> frame_offsets(const Tensor& x, const std::optional<Tensor>& cu_seqlens,
                                          int64_t frames, const char* op) {
  std::vector<int64_t> offset(frames + 1);
  if (!cu_seqlens.has_value()) {
    STD_TORCH_CHECK(x.dim() == 3 && x.size(0) == frames, op, ": x must be [B, N, C] for B frames");
    for (int64_t b = 0; b <= frames; ++b) offset[b] = b * x.size(1);
    return offset;
  }
  STD_TORCH_CHECK(x.dim() == 2, op, ": x must be packed [R, C]");
  STD_TORCH_CHECK(cu_seqlens->scalar_type() == ScalarType::Int && cu_seqlens->dim() == 1 &&
                      cu_seqlens->size(0) == frames + 1,
                  op, ": cu_seqlens must be [B + 1] int32");
  const Tensor held = dense(*cu_seqlens);
  const int32_t* cu = pointer<const int32_t>(held);
  STD_TORCH_CHECK(cu[0] == 0 && cu[frames] <= x.size(0), op,
                  ": cu_seqlens must start at 0 and end within the rows of x");
  for (int64_t b = 0; b <= frames; ++b) {
    STD_TORCH_CHECK(b == 0 || cu[b] >= cu[b - 1], op, ": cu_seqlens must not descend");
    offset[b] = cu[b];
  }
  return offset;
}

// Rows of x [R, ...] past the last frame's end are nobody's.
inline void zero_tail(const Tensor& x, int64_t from) {
  if (x.size(0) <= from) return;
  const int64_t row = x.numel() / x.size(0) * static_cast<int64_t>(x.element_size());
  std::memset(static_cast<char*>(x.data_ptr()) + from * row, 0, (x.size(0) - from) * row);
}

}  // namespace deepmsi

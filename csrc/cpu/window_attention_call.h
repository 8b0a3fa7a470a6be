// A call of window attention on torch's tensors: its arguments checked and laid out for the kernels.
#pragma once

#include <algorithm>

#include "memory.h"
#include "tensors.h"
#include "threads.h"
#include "window_attention.h"

namespace deepmsi {

// What both directions read, checked, but for qkv; it owns the tensors behind the pointers of `w`.
struct WindowCall {
  WindowAttention w{};
  int64_t rows, frames, valid;
  std::optional<Tensor> head_scale, positions, cu_seqlens;
  std::vector<float> bias;
  WindowAttentionKernels kernels{};

  WindowCall(const char* op, int64_t row_count, int64_t channels, DType dtype, const Tensor& bias_table,
             const std::optional<Tensor>& scale_of_head, double scale,
             const std::optional<Tensor>& positions_any, const std::optional<Tensor>& cu_seqlens_any,
             int64_t heads, int64_t height, int64_t width, int64_t window, int64_t shift)
      : rows(row_count) {
    STD_TORCH_CHECK(dtype != DType::kDouble, op, ": takes float32, bfloat16 or float16");
    STD_TORCH_CHECK(heads > 0 && channels % heads == 0, op, ": the channels must be a multiple of heads");
    STD_TORCH_CHECK(height > 0 && width > 0 && window > 0 && 0 <= shift && shift < window, op,
                    ": the grid must not be empty, nor the shift outside of the window");
    w.heads = heads;
    w.head_dim = channels / heads;
    w.qkv_stride = w.grad_qkv_stride = 3 * channels;
    w.out_stride = channels;
    w.height = height;
    w.width = width;
    w.window = window;
    w.shift = shift;
    w.scale = static_cast<float>(scale);
    const int64_t table = w.table();
    STD_TORCH_CHECK(bias_table.scalar_type() == ScalarType::Float && bias_table.dim() == 2 &&
                        bias_table.size(0) == table && bias_table.size(1) == heads,
                    op, ": bias_table must be [(2w - 1)^2, heads] float32");
    const Tensor held = dense(bias_table);
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
      head_scale = dense(*scale_of_head);
      STD_TORCH_CHECK(head_scale->scalar_type() == ScalarType::Float && head_scale->numel() == heads, op,
                      ": head_scale must be [heads] float32");
      w.head_scale = pointer<const float>(*head_scale);
    }
    if (positions_any.has_value()) {
      STD_TORCH_CHECK(cu_seqlens_any.has_value() && positions_any->scalar_type() == ScalarType::Int &&
                          cu_seqlens_any->scalar_type() == ScalarType::Int &&
                          positions_any->numel() == rows && cu_seqlens_any->numel() >= 1,
                      op, ": packed rows need positions [R] int32 and cu_seqlens [F + 1] int32");
      positions = dense(*positions_any);
      cu_seqlens = dense(*cu_seqlens_any);
      w.positions = pointer<const int32_t>(*positions);
      w.offset = pointer<const int32_t>(*cu_seqlens);
      frames = cu_seqlens->numel() - 1;
      check_packed(op);
      valid = w.offset[frames];
    } else {
      STD_TORCH_CHECK(rows % (height * width) == 0, op, ": rows are not a multiple of the grid's places");
      frames = rows / (height * width);
      valid = rows;
    }
    kernels = DEEPMSI_ACTIVE(window_attention_kernels)(dtype);
  }

  // The first row of a frame.
  int64_t first_row(int64_t frame) const {
    return w.offset != nullptr ? w.offset[frame] : frame * w.height * w.width;
  }

  // A window's rows lie in memory for area tokens, so a position that stands twice must not get through.
  void check_packed(const char* op) const {
    STD_TORCH_CHECK(w.offset[0] == 0 && w.offset[frames] <= rows, op,
                    ": cu_seqlens must start at 0 and end within the rows");
    for (int64_t f = 0; f < frames; ++f) {
      STD_TORCH_CHECK(w.offset[f] <= w.offset[f + 1], op, ": cu_seqlens must not descend");
      int64_t before = -1;
      for (int64_t r = w.offset[f]; r < w.offset[f + 1]; ++r) {
        STD_TORCH_CHECK(w.positions[r] > before && w.positions[r] < w.height * w.width, op,
                        ": positions must ascend inside a frame and lie on the grid");
        before = w.positions[r];
      }
    }
  }

  // Call run(begin, end, scratch) for ranges of [0, count) on torch's threads.
  template <typename Run>
  void parallel(int64_t count, bool backward, const Run& run) const {
    const int64_t bytes = kernels.scratch_bytes(w, backward);
    share_out(count, 1, [&](int64_t begin, int64_t end) {
      const Bytes memory(bytes);
      run(begin, end, memory.data());
    });
  }
};

// The gradients of bias table and scales: partial sums, each over its own bands in order, whose number does
// not depend on that of the threads.
class WindowSums {
 public:
  explicit WindowSums(const WindowAttention& w)
      : heads_(w.heads),
        table_(w.table()),
        bias_(kParts * table_ * heads_, 0.0f),
        log_scale_(kParts * heads_, 0.0) {}

  // Run the backward kernels over the bands of `frames` frames.
  void add(const WindowCall& call, const WindowAttention& w, int64_t frames) {
    const int64_t tasks = frames * w.bands(), parts = std::min(tasks, kParts);
    call.parallel(parts, true, [&](int64_t begin, int64_t end, char* scratch) {
      for (int64_t p = begin; p < end; ++p) {
        call.kernels.backward(w, tasks * p / parts, tasks * (p + 1) / parts, scratch,
                              bias_.data() + p * table_ * heads_, log_scale_.data() + p * heads_);
      }
    });
  }

  void write(const float* head_scale, const Tensor& grad_table, const Tensor& grad_scale) const {
    for (int64_t h = 0; h < heads_; ++h) {
      for (int64_t t = 0; t < table_; ++t) {
        pointer<float>(grad_table)[t * heads_ + h] =
            static_cast<float>(total(bias_, h * table_ + t, table_ * heads_));
      }
      const double along = total(log_scale_, h, heads_);
      pointer<float>(grad_scale)[h] = head_scale ? static_cast<float>(along / head_scale[h]) : 0.0f;
    }
  }

 private:
  static constexpr int64_t kParts = 32;

  template <typename Partial>
  static double total(const Partial& partial, int64_t at, int64_t step) {
    double sum = 0;
    for (int64_t p = 0; p < kParts; ++p) sum += partial[p * step + at];
    return sum;
  }

  int64_t heads_, table_;
  std::vector<float> bias_;
  std::vector<double> log_scale_;
};

}  // namespace deepmsi

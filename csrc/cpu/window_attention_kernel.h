// Window attention, one head of one window at a time, in registers and the first-level cache.
//
// Tokens attend to each other where (floor((y - s) / w), floor((x - s) / w)) agree. The kernels walk those
// shifted windows themselves: one at the border of the grid is merely a smaller one, so there is nothing to
// mask, roll or copy, and packed rows differ from a dense grid only in how a window's rows are found.
#include "exponential.h"
#include "simd.h"
#include "window_attention.h"

namespace deepmsi::DEEPMSI_ISA_NAMESPACE {
namespace {

constexpr int64_t kLanesF = kLanes<float>;
constexpr float kWindowNormFloor = 1e-12f;  // torch.nn.functional.normalize's
constexpr int kTileRows = 4;

DEEPMSI_INLINE int64_t whole_vectors(int64_t count) { return (count + kLanesF - 1) / kLanesF * kLanesF; }

// c[i, j] = sum over k of a[i * row + k * step] * b[k * stride_b + j] for kRows rows and kWide vectors of
// columns.
template <int kRows, int kWide>
DEEPMSI_INLINE void product_tile(int64_t depth, const float* a, int64_t row, int64_t step, const float* b,
                                 int64_t stride_b, float* c, int64_t stride_c) {
  Vec<float> sum[kRows][kWide] = {};
  for (int64_t k = 0; k < depth; ++k) {
    Vec<float> right[kWide];
#pragma GCC unroll 4
    for (int j = 0; j < kWide; ++j) right[j] = load(b + k * stride_b + j * kLanesF);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const float left = a[i * row + k * step];
#pragma GCC unroll 4
      for (int j = 0; j < kWide; ++j) sum[i][j] += left * right[j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kWide; ++j) store(c + i * stride_c + j * kLanesF, sum[i][j]);
  }
}

template <int kRows>
DEEPMSI_INLINE void product_rows(int64_t columns, int64_t depth, const float* a, int64_t row, int64_t step,
                                 const float* b, int64_t stride_b, float* c, int64_t stride_c) {
  int64_t j = 0;
  for (; j + 2 * kLanesF <= columns; j += 2 * kLanesF)
    product_tile<kRows, 2>(depth, a, row, step, b + j, stride_b, c + j, stride_c);
  for (; j < columns; j += kLanesF)
    product_tile<kRows, 1>(depth, a, row, step, b + j, stride_b, c + j, stride_c);
}

// c [rows, columns] = a b, where a may be read turned round (row and step) and columns is a multiple of the
// lanes.
inline void product(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t row, int64_t step,
                    const float* b, int64_t stride_b, float* c, int64_t stride_c) {
  int64_t i = 0;
  for (; i + kTileRows <= rows; i += kTileRows)
    product_rows<kTileRows>(columns, depth, a + i * row, row, step, b, stride_b, c + i * stride_c, stride_c);
  for (; i < rows; ++i)
    product_rows<1>(columns, depth, a + i * row, row, step, b, stride_b, c + i * stride_c, stride_c);
}

struct Window {
  int64_t count;
  const int64_t* row;   // of qkv and out
  const int32_t* code;  // y * (2w - 1) + x inside the window
};

// A thread's memory: the windows of one band, and the matrices of one head of one window.
struct WindowScratch {
  int64_t* row;
  int32_t* code;
  int64_t* filled;
  float *q, *k, *kt, *v, *scores, *result, *q_norm, *k_norm;
  float *vt, *grad_scores, *grad_out, *grad_q, *grad_k, *grad_v;  // backward only

  // Lays the pieces out from `memory` and returns the bytes they take.
  int64_t lay_out(const WindowAttention& w, bool backward, char* memory) {
    int64_t used = 0;
    auto take = [&](auto*& piece, int64_t count) {
      piece = reinterpret_cast<decltype(&*piece)>(memory + used);
      used += (count * static_cast<int64_t>(sizeof(*piece)) + 63) / 64 * 64;
    };
    const int64_t across = w.width / w.window + 2, area = w.window * w.window;
    const int64_t tokens = whole_vectors(area), dim = whole_vectors(w.head_dim);
    take(row, across * area);
    take(code, across * area);
    take(filled, across);
    take(q, tokens * dim);
    take(k, tokens * dim);
    take(kt, tokens * dim);
    take(v, tokens * dim);
    take(q_norm, tokens);
    take(k_norm, tokens);
    take(scores, (backward ? tokens : kTileRows) * tokens);
    take(result, kTileRows * dim);
    if (backward) {
      take(grad_scores, tokens * tokens);
      take(vt, tokens * dim);
      take(grad_out, tokens * dim);
      take(grad_q, tokens * dim);
      take(grad_k, tokens * dim);
      take(grad_v, tokens * dim);
    }
    return used;
  }
};

// Call visit(Window) for every window of a band that has tokens.
template <typename Visit>
DEEPMSI_INLINE void for_windows(const WindowAttention& w, int64_t task, const WindowScratch& s,
                                const Visit& visit) {
  const int64_t frame = task / w.bands(), band = task % w.bands();
  const int64_t first =
      w.shift > 0 ? w.shift - w.window : 0;  // a shifted grid begins inside its first window
  const int64_t top = first + band * w.window;
  const int64_t from = top > 0 ? top : 0;
  const int64_t to = top + w.window < w.height ? top + w.window : w.height;
  const int64_t across = (w.width - first + w.window - 1) / w.window, area = w.window * w.window;
  for (int64_t i = 0; i < across; ++i) s.filled[i] = 0;
  auto put = [&](int64_t row, int64_t y, int64_t x) {
    const int64_t i = (x - first) / w.window, slot = i * area + s.filled[i]++;
    s.row[slot] = row;
    s.code[slot] = static_cast<int32_t>((y - top) * (2 * w.window - 1) + (x - first) - i * w.window);
  };
  if (w.offset == nullptr) {  // positions of no rows are null too
    int64_t row = (frame * w.height + from) * w.width;
    for (int64_t y = from; y < to; ++y) {
      for (int64_t x = 0; x < w.width; ++x) put(row++, y, x);
    }
  } else {
    int64_t row = w.offset[frame], end = w.offset[frame + 1];
    for (int64_t high = end; row < high;) {  // the first row of the band, by bisection
      const int64_t middle = row + (high - row) / 2;
      if (w.positions[middle] < from * w.width) {
        row = middle + 1;
      } else {
        high = middle;
      }
    }
    for (; row < end && w.positions[row] < to * w.width; ++row)
      put(row, w.positions[row] / w.width, w.positions[row] % w.width);
  }
  for (int64_t i = 0; i < across; ++i) {
    if (s.filled[i] > 0) visit(Window{s.filled[i], s.row + i * area, s.code + i * area});
  }
}

// out[column * stride + i] = in[i * dim + column], with zeros up to a whole vector of tokens.
DEEPMSI_INLINE void turn(const float* in, int64_t count, int64_t dim, int64_t columns, float* out,
                         int64_t stride) {
  for (int64_t c = 0; c < columns; ++c) {
    for (int64_t i = 0; i < count; ++i) out[c * stride + i] = in[i * dim + c];
    for (int64_t i = count; i < stride; ++i) out[c * stride + i] = 0.0f;
  }
}

template <typename T>
DEEPMSI_INLINE void read_row(const T* from, int64_t channels, int64_t dim, float* to) {
  widen(from, to, channels);
  for (int64_t c = channels; c < dim; ++c) to[c] = 0.0f;
}

DEEPMSI_INLINE float floored_norm(const float* x, int64_t dim) {
  const float norm = root(dot(x, x, dim));
  return norm > kWindowNormFloor ? norm : kWindowNormFloor;
}

DEEPMSI_INLINE void scale_row(float* x, int64_t dim, float factor) {
  for (int64_t c = 0; c < dim; c += kLanesF) store(x + c, load(x + c) * factor);
}

// Read q, k and v of one head: q and k normalised for cosine attention, k turned round. The scale is applied
// to the products, not to q: it may be 100, and would magnify the rounding of a sum that mostly cancels.
template <typename T>
DEEPMSI_INLINE void read_head(const WindowAttention& w, const Window& window, int64_t head,
                              WindowScratch& s) {
  const int64_t dim = whole_vectors(w.head_dim), channels = w.heads * w.head_dim;
  for (int64_t i = 0; i < window.count; ++i) {
    const T* from = static_cast<const T*>(w.qkv) + window.row[i] * w.qkv_stride + head * w.head_dim;
    float *q = s.q + i * dim, *k = s.k + i * dim;
    read_row(from, w.head_dim, dim, q);
    read_row(from + channels, w.head_dim, dim, k);
    read_row(from + 2 * channels, w.head_dim, dim, s.v + i * dim);
    if (w.head_scale != nullptr) {
      s.q_norm[i] = floored_norm(q, dim);
      s.k_norm[i] = floored_norm(k, dim);
      scale_row(k, dim, 1.0f / s.k_norm[i]);
      scale_row(q, dim, 1.0f / s.q_norm[i]);
    }
  }
  turn(s.k, window.count, dim, w.head_dim, s.kt, whole_vectors(window.count));
}

// The bias table of a head lies so that row i of a window reads it forwards from here, at the codes of its
// keys.
DEEPMSI_INLINE int64_t bias_offset(const WindowAttention& w, const Window& window, int64_t i) {
  return w.table() / 2 - window.code[i];
}

// Whether a window's rows of scores are w whole vectors, so that the bias is read and its gradient added by
// vectors.
DEEPMSI_INLINE bool by_vectors(const WindowAttention& w, const Window& window) {
  return w.window == kLanesF && window.count == kLanesF * kLanesF;
}

DEEPMSI_INLINE float scale_of(const WindowAttention& w, int64_t head) {
  return w.head_scale != nullptr ? w.head_scale[head] : w.scale;
}

// Make a row of logits from a row of products: scale and add the position bias.
DEEPMSI_INLINE void logits(const WindowAttention& w, const Window& window, float scale, const float* bias,
                           float* products) {
  if (by_vectors(w, window)) {
#pragma GCC unroll 16
    for (int64_t y = 0; y < kLanesF; ++y) {
      float* row = products + y * kLanesF;
      store(row, load(row) * scale + load(bias + y * (2 * kLanesF - 1)));
    }
  } else {
    for (int64_t j = 0; j < window.count; ++j) products[j] = products[j] * scale + bias[window.code[j]];
  }
}

DEEPMSI_INLINE void add_bias_gradient(const WindowAttention& w, const Window& window, const float* gradient,
                                      float* bias) {
  if (by_vectors(w, window)) {
#pragma GCC unroll 16
    for (int64_t y = 0; y < kLanesF; ++y) {
      float* to = bias + y * (2 * kLanesF - 1);
      store(to, load(to) + load(gradient + y * kLanesF));
    }
  } else {
    for (int64_t j = 0; j < window.count; ++j) bias[window.code[j]] += gradient[j];
  }
}

// Turn a row of logits into its softmax, with zeros up to `stride`; returns the log-sum-exp.
DEEPMSI_INLINE float softmax(float* row, int64_t count, int64_t stride) {
  for (int64_t j = count; j < stride; ++j) row[j] = -__builtin_inff();
  Vec<float> high = load(row);
  for (int64_t j = kLanesF; j < stride; j += kLanesF) {
    const Vec<float> x = load(row + j);
    high = x > high ? x : high;
  }
  const float top = lane_max(high);
  Vec<float> sum = {};
  for (int64_t j = 0; j < stride; j += kLanesF) {
    const Vec<float> e = exp_nonpositive(load(row + j) - top);  // 2e-38 in the padding, too little to count
    store(row + j, e);
    sum += e;
  }
  const float total = lane_sum<float>(sum);
  scale_row(row, stride, 1.0f / total);
  for (int64_t j = count; j < stride; ++j) row[j] = 0.0f;
  return top + __builtin_logf(total);
}

template <typename T>
void attend(const WindowAttention& w, const Window& window, WindowScratch& s) {
  const int64_t dim = whole_vectors(w.head_dim), stride = whole_vectors(window.count);
  const int64_t channels = w.heads * w.head_dim;
  for (int64_t head = 0; head < w.heads; ++head) {
    read_head<T>(w, window, head, s);
    const float* bias = w.bias + head * w.table();
    for (int64_t i = 0; i < window.count; i += kTileRows) {
      const int64_t rows = window.count - i < kTileRows ? window.count - i : kTileRows;
      product(rows, stride, w.head_dim, s.q + i * dim, dim, 1, s.kt, stride, s.scores, stride);
      for (int64_t r = 0; r < rows; ++r) {
        logits(w, window, scale_of(w, head), bias + bias_offset(w, window, i + r), s.scores + r * stride);
        w.lse[window.row[i + r] * w.heads + head] = softmax(s.scores + r * stride, window.count, stride);
      }
      product(rows, dim, window.count, s.scores, stride, 1, s.v, dim, s.result, dim);
      for (int64_t r = 0; r < rows; ++r) {
        narrow(s.result + r * dim, static_cast<T*>(w.out) + window.row[i + r] * channels + head * w.head_dim,
               w.head_dim);
      }
    }
  }
}

// Take the gradient of x / |x| to the gradient of x in place; returns the product of unit row and gradient.
DEEPMSI_INLINE float through_norm(const float* unit, float norm, int64_t dim, float* gradient) {
  const float along = dot(unit, gradient, dim);
  // Below the floor the norm is a constant, so nothing is taken away along x.
  const float inward = norm > kWindowNormFloor ? along : 0.0f;
  for (int64_t c = 0; c < dim; c += kLanesF)
    store(gradient + c, (load(gradient + c) - load(unit + c) * inward) / norm);
  return along;
}

template <typename T>
void attend_backward(const WindowAttention& w, const Window& window, WindowScratch& s, float* grad_bias,
                     double* grad_log_scale) {
  const int64_t count = window.count, dim = whole_vectors(w.head_dim), stride = whole_vectors(count);
  const int64_t channels = w.heads * w.head_dim;
  for (int64_t head = 0; head < w.heads; ++head) {
    const float scale = scale_of(w, head);
    read_head<T>(w, window, head, s);
    for (int64_t i = 0; i < count; ++i) {
      read_row(static_cast<const T*>(w.grad_out) + window.row[i] * channels + head * w.head_dim, w.head_dim,
               dim, s.grad_out + i * dim);
    }
    turn(s.v, count, dim, w.head_dim, s.vt, stride);
    product(count, stride, w.head_dim, s.q, dim, 1, s.kt, stride, s.scores, stride);
    product(count, stride, w.head_dim, s.grad_out, dim, 1, s.vt, stride, s.grad_scores, stride);
    for (int64_t i = 0; i < count; ++i) {
      float *p = s.scores + i * stride, *gradient = s.grad_scores + i * stride;
      const int64_t offset = head * w.table() + bias_offset(w, window, i);
      logits(w, window, scale, w.bias + offset, p);
      // Not from the saved log-sum-exp: its rounding would be common to the row, whose gradients must sum to
      // zero.
      softmax(p, count, stride);
      const float mean = dot(p, gradient, stride);
      for (int64_t j = 0; j < stride; j += kLanesF)
        store(gradient + j, load(p + j) * (load(gradient + j) - mean));
      add_bias_gradient(w, window, gradient, grad_bias + offset);
      scale_row(gradient, stride, scale);
    }
    product(count, dim, count, s.scores, 1, stride, s.grad_out, dim, s.grad_v, dim);
    product(count, dim, count, s.grad_scores, stride, 1, s.k, dim, s.grad_q, dim);
    product(count, dim, count, s.grad_scores, 1, stride, s.q, dim, s.grad_k, dim);
    for (int64_t i = 0; i < count; ++i) {
      float *grad_q = s.grad_q + i * dim, *grad_k = s.grad_k + i * dim;
      if (w.head_scale != nullptr) {
        // The logits are linear in the scale, so d loss / d log scale is the sum of scaled product times
        // gradient.
        grad_log_scale[head] += through_norm(s.q + i * dim, s.q_norm[i], dim, grad_q);
        through_norm(s.k + i * dim, s.k_norm[i], dim, grad_k);
      }
      T* to = static_cast<T*>(w.grad_qkv) + window.row[i] * 3 * channels + head * w.head_dim;
      narrow(grad_q, to, w.head_dim);
      narrow(grad_k, to + channels, w.head_dim);
      narrow(s.grad_v + i * dim, to + 2 * channels, w.head_dim);
    }
  }
}

template <typename T>
void window_forward(const WindowAttention& w, int64_t begin, int64_t end, char* memory) {
  WindowScratch s;
  s.lay_out(w, false, memory);
  for (int64_t task = begin; task < end; ++task)
    for_windows(w, task, s, [&](const Window& window) { attend<T>(w, window, s); });
}

template <typename T>
void window_backward(const WindowAttention& w, int64_t begin, int64_t end, char* memory, float* grad_bias,
                     double* grad_log_scale) {
  WindowScratch s;
  s.lay_out(w, true, memory);
  for (int64_t task = begin; task < end; ++task) {
    for_windows(w, task, s,
                [&](const Window& window) { attend_backward<T>(w, window, s, grad_bias, grad_log_scale); });
  }
}

inline int64_t window_scratch_bytes(const WindowAttention& w, bool backward) {
  return WindowScratch().lay_out(w, backward, nullptr);
}

}  // namespace

WindowAttentionKernels window_attention_kernels(DType dtype) {
  switch (dtype) {
    case DType::kBFloat16:
      return {window_forward<BFloat16>, window_backward<BFloat16>, window_scratch_bytes};
    case DType::kHalf:
      return {window_forward<Half>, window_backward<Half>, window_scratch_bytes};
    default:
      return {window_forward<float>, window_backward<float>, window_scratch_bytes};
  }
}

}  // namespace deepmsi::DEEPMSI_ISA_NAMESPACE

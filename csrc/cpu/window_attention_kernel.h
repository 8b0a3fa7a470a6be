// Window attention, one head of one window at a time, in registers and the first-level cache.
//
// Tokens attend to each other where (floor((y - s) / w), floor((x - s) / w)) agree. The kernels walk those
// shifted windows themselves: one at the border of the grid is merely a smaller one, so there is nothing to
// mask, roll or copy, and packed rows differ from a dense grid only in how a window's rows are found.
#include "exponential.h"
#include "product.h"
#include "simd.h"
#include "window_attention.h"

namespace deepmsi::DEEPMSI_ISA_NAMESPACE {
namespace {

constexpr int64_t kLanesF = kLanes<float>;
constexpr float kWindowNormFloor = 1e-12f;  // torch.nn.functional.normalize's

DEEPMSI_INLINE int64_t whole_vectors(int64_t count) { return (count + kLanesF - 1) / kLanesF * kLanesF; }

struct Window {
  int64_t count;
  const int64_t* row;   // of qkv and out
  const int32_t* slot;  // y * w + x inside the window, ascending; 0 up to a whole vector

  // Whether the slots follow one another, as all of a dense grid's do that are as wide as the window.
  bool in_a_row() const { return slot[count - 1] - slot[0] == count - 1; }
};

// A thread's memory: the windows of one band, and the matrices of one head of one window. Scores and their
// gradients are held by keys, [keys, queries]: a query's softmax then runs down a lane.
struct WindowScratch {
  int64_t* row;
  int32_t* slot;
  int64_t* filled;
  float *q, *qt, *k, *v, *scores, *result, *q_norm, *k_norm, *inverse, *lse;
  int64_t* bias_of_key;  // where the bias of a key begins, to which the slot of a query is added
  float *grad_scores, *grad_out, *grad_out_t, *grad_q, *grad_k, *grad_bias;  // backward only

  // Lays the pieces out from `memory` and returns the bytes they take.
  int64_t lay_out(const WindowAttention& w, bool backward, char* memory) {
    int64_t used = 0;
    auto take = [&](auto*& piece, int64_t count) {
      piece = reinterpret_cast<decltype(&*piece)>(memory + used);
      used += (count * static_cast<int64_t>(sizeof(*piece)) + 63) / 64 * 64;
    };
    const int64_t across = w.width / w.window + 2, area = w.window * w.window;
    const int64_t tokens = whole_vectors(area), dim = whole_vectors(w.head_dim);
    take(row, across * tokens);
    take(slot, across * tokens);
    take(filled, across);
    take(bias_of_key, area);
    take(q, tokens * dim);
    take(qt, tokens * dim);
    take(k, tokens * dim);
    take(v, tokens * dim);
    take(q_norm, tokens);
    take(k_norm, tokens);
    take(scores, tokens * tokens);
    take(inverse, tokens);
    take(lse, tokens);
    take(result, tokens * dim);  // the gradient of v in the backward
    if (backward) {
      take(grad_scores, tokens * tokens);
      take(grad_out, tokens * dim);
      take(grad_out_t, tokens * dim);
      take(grad_q, tokens * dim);
      take(grad_k, tokens * dim);
      take(grad_bias, w.heads * w.spread() + kBiasPad);
    }
    return used;
  }
};

// Call visit(window, next) for every window of a band that has tokens; the last one's next has none.
template <typename Visit>
DEEPMSI_INLINE void for_windows(const WindowAttention& w, int64_t task, const WindowScratch& s,
                                const Visit& visit) {
  const int64_t frame = task / w.bands(), band = task % w.bands();
  const int64_t first =
      w.shift > 0 ? w.shift - w.window : 0;  // a shifted grid begins inside its first window
  const int64_t top = first + band * w.window;
  const int64_t from = top > 0 ? top : 0;
  const int64_t to = top + w.window < w.height ? top + w.window : w.height;
  const int64_t across = (w.width - first + w.window - 1) / w.window;
  const int64_t tokens = whole_vectors(w.window * w.window);
  for (int64_t i = 0; i < across; ++i) s.filled[i] = 0;
  auto put = [&](int64_t i, int64_t row, int64_t y, int64_t x) {
    const int64_t n = i * tokens + s.filled[i]++;
    s.row[n] = row;
    s.slot[n] = static_cast<int32_t>((y - top) * w.window + (x - first) - i * w.window);
  };
  if (w.offset == nullptr) {  // positions of no rows are null too
    int64_t row = (frame * w.height + from) * w.width;
    for (int64_t y = from; y < to; ++y) {
      for (int64_t i = 0, x = 0; x < w.width; ++i) {
        const int64_t edge = first + (i + 1) * w.window, end = edge < w.width ? edge : w.width;
        for (; x < end; ++x) put(i, row++, y, x);
      }
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
    for (; row < end && w.positions[row] < to * w.width; ++row) {
      const int64_t y = w.positions[row] / w.width, x = w.positions[row] % w.width;
      put((x - first) / w.window, row, y, x);
    }
  }
  Window window{};
  for (int64_t i = 0; i < across; ++i) {
    const int64_t count = s.filled[i];
    if (count == 0) continue;
    for (int64_t n = count; n < whole_vectors(count); ++n) s.slot[i * tokens + n] = 0;
    const Window next{count, s.row + i * tokens, s.slot + i * tokens};
    if (window.count > 0) visit(window, next);
    window = next;
  }
  if (window.count > 0) visit(window, Window{});
}

// out[c * stride + i] = in[i * dim + c] for whole vectors of rows and of columns.
DEEPMSI_INLINE void turn(const float* in, int64_t stride, int64_t dim, float* out) {
  for (int64_t i = 0; i < stride; i += kLanesF) {
    for (int64_t c = 0; c < dim; c += kLanesF) {
      Vec<float> square[kLanesF];
#pragma GCC unroll 16
      for (int64_t r = 0; r < kLanesF; ++r) square[r] = load(in + (i + r) * dim + c);
      transpose<float>(square);
#pragma GCC unroll 16
      for (int64_t r = 0; r < kLanesF; ++r) store(out + (c + r) * stride + i, square[r]);
    }
  }
}

// Products of the rows of a and b with the same number, for whole vectors of rows.
DEEPMSI_INLINE void row_dots(const float* a, const float* b, int64_t stride, int64_t dim, float* out) {
  for (int64_t i = 0; i < stride; i += kLanesF) {
    Vec<float> sum[kLanesF];
#pragma GCC unroll 16
    for (int64_t r = 0; r < kLanesF; ++r) {
      const float *x = a + (i + r) * dim, *y = b + (i + r) * dim;
      sum[r] = load(x) * load(y);
      for (int64_t c = kLanesF; c < dim; c += kLanesF) sum[r] += load(x + c) * load(y + c);
    }
    store(out + i, lane_sums<float>(sum));
  }
}

template <typename T>
DEEPMSI_INLINE void read_row(const T* from, int64_t channels, int64_t dim, float* to) {
  widen(from, to, channels);
  for (int64_t c = channels; c < dim; ++c) to[c] = 0.0f;
}

// Read rows of a window from x, whose rows are `stride_x` apart, with rows of zeros up to a whole vector.
template <typename T>
DEEPMSI_INLINE void read_rows(const Window& window, const T* x, int64_t stride_x, int64_t channels,
                              float* to) {
  const int64_t dim = whole_vectors(channels), stride = whole_vectors(window.count);
  for (int64_t i = 0; i < window.count; ++i)
    read_row(x + window.row[i] * stride_x, channels, dim, to + i * dim);
  std::memset(to + window.count * dim, 0, (stride - window.count) * dim * sizeof(float));
}

// What is read next, asked for while this is computed: rows so far apart are foreseen by no hardware.
template <typename T>
DEEPMSI_INLINE void prefetch_rows(const Window& window, const T* x, int64_t stride_x, int64_t channels) {
  const int64_t bytes = channels * static_cast<int64_t>(sizeof(T));
  for (int64_t i = 0; i < window.count; ++i) {
    const char* row = reinterpret_cast<const char*>(x + window.row[i] * stride_x);
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(row + at);
    __builtin_prefetch(row + bytes - 1);
  }
}

// The head that is computed next, of this window or of the following one.
template <typename T>
struct Ahead {
  const WindowAttention& w;
  const Window& window;
  int64_t head;

  Ahead(const WindowAttention& attention, const Window& now, const Window& next, int64_t head_now)
      : w(attention),
        window(head_now + 1 < attention.heads ? now : next),
        head(head_now + 1 < attention.heads ? head_now + 1 : 0) {}
  DEEPMSI_INLINE void part_of_qkv(int64_t part) const {
    prefetch_rows(window, static_cast<const T*>(w.qkv) + (part * w.heads + head) * w.head_dim, w.qkv_stride,
                  w.head_dim);
  }
  DEEPMSI_INLINE void grad_out() const {
    prefetch_rows(window, static_cast<const T*>(w.grad_out) + head * w.head_dim, w.out_stride, w.head_dim);
  }
};

// Divide rows by their floored norms, which are kept.
DEEPMSI_INLINE void make_unit(int64_t stride, int64_t dim, float* x, float* norm) {
  row_dots(x, x, stride, dim, norm);
  float inverse[kLanesF];
  for (int64_t i = 0; i < stride; i += kLanesF) {
    Vec<float> length = load(norm + i);
#pragma GCC unroll 16
    for (int64_t r = 0; r < kLanesF; ++r) length[r] = root(length[r]);
    const Vec<float> floor = Vec<float>{} + kWindowNormFloor;
    length = length > floor ? length : floor;
    store(norm + i, length);
    store(inverse, 1.0f / length);
    for (int64_t r = 0; r < kLanesF; ++r) {
      for (int64_t c = 0; c < dim; c += kLanesF) {
        float* at = x + (i + r) * dim + c;
        store(at, load(at) * inverse[r]);
      }
    }
  }
}

// Read q, k and v of one head: q and k normalised for cosine attention, q also turned round. The scale is
// applied to the products, not to q: it may be 100, and would magnify the rounding of a sum that mostly
// cancels.
template <typename T>
DEEPMSI_INLINE void read_head(const WindowAttention& w, const Window& window, int64_t head,
                              WindowScratch& s) {
  const int64_t dim = whole_vectors(w.head_dim), stride = whole_vectors(window.count);
  const int64_t channels = w.heads * w.head_dim;
  const T* from = static_cast<const T*>(w.qkv) + head * w.head_dim;
  read_rows(window, from, w.qkv_stride, w.head_dim, s.q);
  read_rows(window, from + channels, w.qkv_stride, w.head_dim, s.k);
  read_rows(window, from + 2 * channels, w.qkv_stride, w.head_dim, s.v);
  if (w.head_scale != nullptr) {
    make_unit(stride, dim, s.q, s.q_norm);
    make_unit(stride, dim, s.k, s.k_norm);
  }
  turn(s.q, stride, dim, s.qt);
}

// Work out, once for all heads, where the bias of each key begins.
DEEPMSI_INLINE void find_biases(const WindowAttention& w, const Window& window, WindowScratch& s) {
  for (int64_t j = 0; j < window.count; ++j) {
    const int64_t y = window.slot[j] / w.window, x = window.slot[j] % w.window;
    s.bias_of_key[j] = (x * (2 * w.window - 1) + w.window - 1 - y) * w.window;
  }
}

DEEPMSI_INLINE float scale_of(const WindowAttention& w, int64_t head) {
  return w.head_scale != nullptr ? w.head_scale[head] : w.scale;
}

DEEPMSI_INLINE Vec<float> exponentiate(float* logit, Vec<float> high) {
  const Vec<float> e = exp_nonpositive(load(logit) - high);
  store(logit, e);
  return e;
}

// How the bias of a vector of queries is read: side by side, picked out of the whole row in registers, or one
// by one.
enum class Queries { kInARow, kInRegisters, kScattered };

// Slots that fit into registers: those of a window of 8.
#if DEEPMSI_VECTOR_BYTES == 64 && !defined(__clang__)
constexpr int64_t kSlotsInRegisters = 64;

// row[slot] for every lane.
DEEPMSI_INLINE Vec<float> pick(const float* row, VecInt slot) {
  const Vec<float> low = __builtin_shuffle(load(row), load(row + kLanesF), slot);
  const Vec<float> high = __builtin_shuffle(load(row + 2 * kLanesF), load(row + 3 * kLanesF), slot);
  return slot < 2 * static_cast<int32_t>(kLanesF) ? low : high;
}
#else
constexpr int64_t kSlotsInRegisters = 0;

DEEPMSI_INLINE Vec<float> pick(const float*, VecInt) { return Vec<float>{}; }
#endif

// Turn products of keys and queries into exp(logit - the query's largest), and put down for each query the
// inverse of their sum and the log-sum-exp.
template <Queries kQueries>
DEEPMSI_INLINE void exponentials(const WindowAttention& w, const Window& window, float scale,
                                 const float* bias, WindowScratch& s) {
  const int64_t stride = whole_vectors(window.count);
  for (int64_t i = 0; i < stride; i += kLanesF) {
    Vec<float> high = Vec<float>{} - __builtin_inff();
    VecInt slots;
    __builtin_memcpy(&slots, window.slot + i, sizeof slots);
    for (int64_t j = 0; j < window.count; ++j) {
      const float* of_key = bias + s.bias_of_key[j];
      float* at = s.scores + j * stride + i;
      Vec<float> b;
      if constexpr (kQueries == Queries::kInARow) {
        b = load(of_key + window.slot[0] + i);
      } else if constexpr (kQueries == Queries::kInRegisters) {
        b = pick(of_key, slots);
      } else {
        float gathered[kLanesF];
        for (int64_t r = 0; r < kLanesF; ++r) gathered[r] = of_key[window.slot[i + r]];
        b = load(gathered);
      }
      const Vec<float> logit = load(at) * scale + b;
      store(at, logit);
      high = maximum(logit, high);
    }
    // Four partial sums: less rounding in a large window, and no waiting for the sum before.
    Vec<float> part[4] = {};
    int64_t j = 0;
    for (; j + 4 <= window.count; j += 4) {
#pragma GCC unroll 4
      for (int64_t t = 0; t < 4; ++t) part[t] += exponentiate(s.scores + (j + t) * stride + i, high);
    }
    for (; j < window.count; ++j) part[0] += exponentiate(s.scores + j * stride + i, high);
    const Vec<float> sum = (part[0] + part[1]) + (part[2] + part[3]);
    store(s.inverse + i, 1.0f / sum);
    store(s.lse + i, high + logarithm(sum));
  }
}

// Between the two steps it calls `between`.
template <typename Between>
DEEPMSI_INLINE void weights(const WindowAttention& w, const Window& window, int64_t head, WindowScratch& s,
                            const Between& between) {
  const int64_t stride = whole_vectors(window.count);
  const float* bias = w.bias + head * w.spread();
  product<Left::kRows>(window.count, stride, w.head_dim, s.k, whole_vectors(w.head_dim), s.qt, stride,
                       s.scores, stride);
  between();
  if (window.in_a_row()) {
    exponentials<Queries::kInARow>(w, window, scale_of(w, head), bias, s);
  } else if (w.window * w.window <= kSlotsInRegisters) {
    exponentials<Queries::kInRegisters>(w, window, scale_of(w, head), bias, s);
  } else {
    exponentials<Queries::kScattered>(w, window, scale_of(w, head), bias, s);
  }
}

template <typename T>
void attend(const WindowAttention& w, const Window& window, const Window& next, WindowScratch& s) {
  const int64_t dim = whole_vectors(w.head_dim), stride = whole_vectors(window.count);
  find_biases(w, window, s);
  for (int64_t head = 0; head < w.heads; ++head) {
    read_head<T>(w, window, head, s);
    const Ahead<T> ahead(w, window, next, head);
    ahead.part_of_qkv(0);
    weights(w, window, head, s, [&]() __attribute__((always_inline)) { ahead.part_of_qkv(1); });
    ahead.part_of_qkv(2);
    product<Left::kTurned>(window.count, dim, window.count, s.scores, stride, s.v, dim, s.result, dim);
    for (int64_t i = 0; i < window.count; ++i) {
      float* row = s.result + i * dim;
      for (int64_t c = 0; c < dim; c += kLanesF) store(row + c, load(row + c) * s.inverse[i]);
      narrow(row, static_cast<T*>(w.out) + window.row[i] * w.out_stride + head * w.head_dim, w.head_dim);
      w.lse[window.row[i] * w.heads + head] = s.lse[i];
    }
  }
}

// Take the gradients of x / |x| to those of x in place; returns the sum of products of unit rows and
// gradients.
DEEPMSI_INLINE double through_norm(const float* unit, const float* norm, int64_t count, int64_t dim,
                                   float* along, float* gradient) {
  row_dots(unit, gradient, whole_vectors(count), dim, along);
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) {
    sum += along[i];
    // Below the floor the norm is a constant, so nothing is taken away along x.
    const float inward = norm[i] > kWindowNormFloor ? along[i] : 0.0f, inverse = 1.0f / norm[i];
    for (int64_t c = i * dim; c < (i + 1) * dim; c += kLanesF)
      store(gradient + c, (load(gradient + c) - load(unit + c) * inward) * inverse);
  }
  return sum;
}

// From weights and their gradients to the scaled gradients of the logits; those of the bias are added up.
template <bool kInARow>
DEEPMSI_INLINE void logit_gradients(const WindowAttention& w, const Window& window, float scale,
                                    float* grad_bias, WindowScratch& s) {
  const int64_t stride = whole_vectors(window.count);
  for (int64_t i = 0; i < stride; i += kLanesF) {
    // Not from the saved log-sum-exp: its rounding would be common to a query, whose gradients must sum to
    // zero.
    const Vec<float> inverse = load(s.inverse + i);
    // In four parts, as the sum of the exponentials: in a window of 576 slots one sum is off by so much that
    // gradients which cancel lose two digits.
    Vec<float> part[4] = {};
    const auto weigh = [&](int64_t j, Vec<float>& sum) __attribute__((always_inline)) {
      const Vec<float> p = load(s.scores + j * stride + i) * inverse;
      store(s.scores + j * stride + i, p);
      sum += p * load(s.grad_scores + j * stride + i);
    };
    int64_t whole = 0;
    for (; whole + 4 <= window.count; whole += 4) {
#pragma GCC unroll 4
      for (int64_t t = 0; t < 4; ++t) weigh(whole + t, part[t]);
    }
    for (; whole < window.count; ++whole) weigh(whole, part[0]);
    const Vec<float> mean = (part[0] + part[1]) + (part[2] + part[3]);
    for (int64_t j = 0; j < window.count; ++j) {
      float *at = s.grad_scores + j * stride + i, *of_key = grad_bias + s.bias_of_key[j];
      const Vec<float> gradient = load(s.scores + j * stride + i) * (load(at) - mean);
      store(at, gradient * scale);
      // Queries past the last have no gradient.
      if constexpr (kInARow) {
        float* to = of_key + window.slot[0] + i;
        store(to, load(to) + gradient);
      } else {
        float each[kLanesF];
        store(each, gradient);
        const int64_t end = window.count - i < kLanesF ? window.count - i : kLanesF;
        for (int64_t r = 0; r < end; ++r) of_key[window.slot[i + r]] += each[r];
      }
    }
  }
}

template <typename T>
void attend_backward(const WindowAttention& w, const Window& window, const Window& next, WindowScratch& s,
                     double* grad_log_scale) {
  const int64_t count = window.count, dim = whole_vectors(w.head_dim), stride = whole_vectors(count);
  const int64_t channels = w.heads * w.head_dim;
  find_biases(w, window, s);
  for (int64_t head = 0; head < w.heads; ++head) {
    read_head<T>(w, window, head, s);
    read_rows(window, static_cast<const T*>(w.grad_out) + head * w.head_dim, w.out_stride, w.head_dim,
              s.grad_out);
    turn(s.grad_out, stride, dim, s.grad_out_t);
    const Ahead<T> ahead(w, window, next, head);
    ahead.part_of_qkv(0);
    weights(w, window, head, s, [&]() __attribute__((always_inline)) { ahead.part_of_qkv(1); });
    ahead.part_of_qkv(2);
    product<Left::kRows>(count, stride, w.head_dim, s.v, dim, s.grad_out_t, stride, s.grad_scores, stride);
    float* grad_bias = s.grad_bias + head * w.spread();
    if (window.in_a_row()) {
      logit_gradients<true>(w, window, scale_of(w, head), grad_bias, s);
    } else {
      logit_gradients<false>(w, window, scale_of(w, head), grad_bias, s);
    }
    ahead.grad_out();
    float *grad_q = s.grad_q, *grad_k = s.grad_k, *grad_v = s.result;
    product<Left::kRows>(count, dim, count, s.scores, stride, s.grad_out, dim, grad_v, dim);
    product<Left::kTurned>(count, dim, count, s.grad_scores, stride, s.k, dim, grad_q, dim);
    product<Left::kRows>(count, dim, count, s.grad_scores, stride, s.q, dim, grad_k, dim);
    if (w.head_scale != nullptr) {
      // The logits are linear in the scale, so d loss / d log scale is the sum of scaled product times
      // gradient.
      grad_log_scale[head] += through_norm(s.q, s.q_norm, count, dim, s.lse, grad_q);
      through_norm(s.k, s.k_norm, count, dim, s.lse, grad_k);
    }
    for (int64_t i = 0; i < count; ++i) {
      T* to = static_cast<T*>(w.grad_qkv) + window.row[i] * w.grad_qkv_stride + head * w.head_dim;
      narrow(grad_q + i * dim, to, w.head_dim);
      narrow(grad_k + i * dim, to + channels, w.head_dim);
      narrow(grad_v + i * dim, to + 2 * channels, w.head_dim);
    }
  }
}

// Add what was gathered for each column of keys to the rows of the table.
inline void fold_bias(const WindowAttention& w, const float* spread, float* grad_bias) {
  for (int64_t head = 0; head < w.heads; ++head, grad_bias += w.table()) {
    for (int64_t key_x = 0; key_x < w.window; ++key_x) {
      for (int64_t down = 0; down < 2 * w.window - 1; ++down) {
        for (int64_t x = 0; x < w.window; ++x) grad_bias[w.table_row(key_x, down, x)] += *spread++;
      }
    }
  }
}

template <typename T>
void window_forward(const WindowAttention& w, int64_t begin, int64_t end, char* memory) {
  WindowScratch s;
  s.lay_out(w, false, memory);
  for (int64_t task = begin; task < end; ++task)
    for_windows(w, task, s, [&](const Window& window, const Window& next) { attend<T>(w, window, next, s); });
}

template <typename T>
void window_backward(const WindowAttention& w, int64_t begin, int64_t end, char* memory, float* grad_bias,
                     double* grad_log_scale) {
  WindowScratch s;
  s.lay_out(w, true, memory);
  std::memset(s.grad_bias, 0, (w.heads * w.spread() + kBiasPad) * sizeof(float));
  for (int64_t task = begin; task < end; ++task)
    for_windows(w, task, s, [&](const Window& window, const Window& next) {
      attend_backward<T>(w, window, next, s, grad_log_scale);
    });
  fold_bias(w, s.grad_bias, grad_bias);
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

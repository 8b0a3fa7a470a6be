// What the registration of window_attention and its kernels share: arguments, and one table of kernels per
// ISA.
#pragma once

#include <cstdint>

#include "storage.h"

namespace deepmsi {

struct WindowAttention {
  const void* qkv;  // T [R, 3C], rows qkv_stride elements apart
  int64_t qkv_stride;
  int64_t out_stride;  // between rows of out and its gradient
  int64_t grad_qkv_stride;
  const float* bias;        // [heads, spread()] and kBiasPad more, laid out for the keys' columns
  const float* head_scale;  // [heads] for cosine attention, else null
  float scale;              // where head_scale is null
  int64_t heads, head_dim;
  int64_t height, width, window, shift;
  const int32_t* offset;     // [F + 1], null for a dense grid
  const int32_t* positions;  // [R], y * width + x, ascending inside a frame; null for a dense grid

  // Forward.
  void* out;   // T [R, C], rows out_stride elements apart
  float* lse;  // [R, heads]

  // Backward.
  const void* grad_out;  // T [R, C], rows out_stride elements apart
  void* grad_qkv;        // T [R, 3C], rows grad_qkv_stride elements apart

  int64_t table() const { return (2 * window - 1) * (2 * window - 1); }
  // The bias and its gradient are held once for each column that a key may stand in, [key x, query y - key y,
  // query x]: then the queries of a key, row after row of the window, lie side by side.
  int64_t spread() const { return window * (2 * window - 1) * window; }
  int64_t table_row(int64_t key_x, int64_t down, int64_t query_x) const {
    return down * (2 * window - 1) + query_x - key_x + window - 1;
  }
  // Rows of windows over a frame; a shift cuts one more.
  int64_t bands() const { return (height - shift + window - 1) / window + (shift > 0 ? 1 : 0); }
};

constexpr int64_t kBiasPad = 64;  // what a key's row may be read past its end: registers that hold 64 slots

struct WindowAttentionKernels {
  // Bands [begin, end) counted over all frames. Each owns its rows of the outputs.
  void (*forward)(const WindowAttention&, int64_t begin, int64_t end, char* scratch);
  // Adds to grad_bias [heads, table] and grad_log_scale [heads], which a caller owns.
  void (*backward)(const WindowAttention&, int64_t begin, int64_t end, char* scratch, float* grad_bias,
                   double* grad_log_scale);
  int64_t (*scratch_bytes)(const WindowAttention&, bool backward);
};

namespace baseline {
WindowAttentionKernels window_attention_kernels(DType dtype);
}
namespace avx2 {
WindowAttentionKernels window_attention_kernels(DType dtype);
}
namespace avx512 {
WindowAttentionKernels window_attention_kernels(DType dtype);
}

}  // namespace deepmsi

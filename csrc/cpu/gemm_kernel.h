// Products of float32 matrices out of registers, and row-wise functions that run while the rows are in cache.
//
// A tile of C stays in registers over a stretch of the depth: kRows broadcasts of A against two vectors of B.
// B is packed so that a tile reads it in one stream; A is read where it lies.
#include "gelu.h"
#include "gemm.h"
#include "product.h"

namespace deepmsi::DEEPMSI_ISA_NAMESPACE {
namespace {

constexpr int64_t kPanel = 2 * kLanes<float>;
// As many rows as leave registers for one row of B and a broadcast.
constexpr int kTile = DEEPMSI_VECTOR_BYTES == 64 ? 12 : 6;
// A sum is interrupted after so many terms, for its rounding.
constexpr int64_t kDepth = 256;

// One panel of C, whose last columns may be missing.
template <Left kLeft, bool kAdd>
inline void gemm_panel(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t row_a,
                       const float* b, float* c, int64_t row_c) {
  if (columns >= kPanel) {
    product_columns<kLeft, kAdd, kTile, 2>(rows, depth, a, row_a, b, kPanel, c, row_c);
    return;
  }
  float edge[kTile * kPanel];
  for (int64_t i = 0; i < rows; i += kTile) {
    const int64_t count = rows - i < kTile ? rows - i : kTile;
    product_columns<kLeft, false, kTile, 2>(count, depth, a + i * row_stride<kLeft>(row_a), row_a, b, kPanel,
                                            edge, kPanel);
    for (int64_t r = 0; r < count; ++r) {
      float* to = c + (i + r) * row_c;
      for (int64_t j = 0; j < columns; ++j)
        to[j] = kAdd ? to[j] + edge[r * kPanel + j] : edge[r * kPanel + j];
    }
  }
}

inline void pack(const float* b, int64_t row_b, bool transposed, int64_t depth, int64_t columns,
                 int64_t first, int64_t last, float* out) {
  constexpr int64_t kCount = kLanes<float>;
  for (int64_t p = first; p < last; ++p) {
    float* to = out + p * depth * kPanel;
    const int64_t from = p * kPanel, width = columns - from < kPanel ? columns - from : kPanel;
    if (!transposed) {
      for (int64_t k = 0; k < depth; ++k) {
        const float* row = b + k * row_b + from;
        if (width == kPanel) {
          store(to + k * kPanel, load(row));
          store(to + k * kPanel + kCount, load(row + kCount));
        } else {
          for (int64_t j = 0; j < kPanel; ++j) to[k * kPanel + j] = j < width ? row[j] : 0.0f;
        }
      }
      continue;
    }
    int64_t k = 0;
    if (width == kPanel) {
      for (; k + kCount <= depth; k += kCount) {
        for (int64_t j = 0; j < kPanel; j += kCount) {
          Vec<float> square[kCount];
#pragma GCC unroll 16
          for (int64_t i = 0; i < kCount; ++i) square[i] = load(b + (from + j + i) * row_b + k);
          transpose<float>(square);
#pragma GCC unroll 16
          for (int64_t i = 0; i < kCount; ++i) store(to + (k + i) * kPanel + j, square[i]);
        }
      }
    }
    for (; k < depth; ++k) {
      for (int64_t j = 0; j < kPanel; ++j) to[k * kPanel + j] = j < width ? b[(from + j) * row_b + k] : 0.0f;
    }
  }
}

inline void multiply(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t row_a,
                     const float* packed, int64_t panel_depth, bool add, float* c, int64_t row_c) {
  for (int64_t j = 0; j < columns; j += kPanel) {
    const float* panel = packed + j * panel_depth;
    const int64_t width = columns - j, first = depth < kDepth ? depth : kDepth;
    if (add) {
      gemm_panel<Left::kRows, true>(rows, width, first, a, row_a, panel, c + j, row_c);
    } else {
      gemm_panel<Left::kRows, false>(rows, width, first, a, row_a, panel, c + j, row_c);
    }
    for (int64_t k = kDepth; k < depth; k += kDepth) {
      gemm_panel<Left::kRows, true>(rows, width, depth - k < kDepth ? depth - k : kDepth, a + k, row_a,
                                    panel + k * kPanel, c + j, row_c);
    }
  }
}

inline void add_outer(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t row_a,
                      const float* b, int64_t row_b, float* c, int64_t row_c, float* scratch) {
  for (int64_t j = 0; j < columns; j += kPanel) {
    for (int64_t k = 0; k < depth; k += kDepth) {
      const int64_t count = depth - k < kDepth ? depth - k : kDepth;
      pack(b + k * row_b + j, row_b, false, count, columns - j, 0, 1, scratch);
      gemm_panel<Left::kTurned, true>(rows, columns - j, count, a + k * row_a, row_a, scratch, c + j, row_c);
    }
  }
}

inline void add_bias(int64_t rows, int64_t columns, float* x, const float* bias) {
  for (int64_t r = 0; r < rows; ++r) {
    float* row = x + r * columns;
    for_channels<float>(
        columns, [&](int64_t c, auto tag) { put(row + c, get(row + c, tag) + get(bias + c, tag), tag); });
  }
}

// A vector, or what is left of a row, with zeros behind it.
DEEPMSI_INLINE Vec<float> load_some(const float* p, int64_t count) {
  if (count >= kLanes<float>) return load(p);
  Vec<float> v = {};
  for (int64_t i = 0; i < count; ++i) v[i] = p[i];
  return v;
}
DEEPMSI_INLINE void store_some(float* p, Vec<float> v, int64_t count) {
  if (count >= kLanes<float>) {
    store(p, v);
  } else {
    for (int64_t i = 0; i < count; ++i) p[i] = v[i];
  }
}

inline void bias_gelu(int64_t rows, int64_t columns, float* x, const float* bias) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; c += kLanes<float>) {
      float* at = x + r * columns + c;
      const Vec<float> h = load_some(at, columns - c) + load_some(bias + c, columns - c);
      store_some(at, h * normal(h).below, columns - c);
    }
  }
}

inline void bias_gelu_slope(int64_t rows, int64_t columns, float* x, const float* bias, float* y) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; c += kLanes<float>) {
      float* at = x + r * columns + c;
      const Vec<float> h = load_some(at, columns - c) + load_some(bias + c, columns - c);
      const Normal n = normal(h);
      store_some(y + r * columns + c, h * n.below, columns - c);
      store_some(at, n.below + h * n.density, columns - c);
    }
  }
}

inline void scale_by(int64_t rows, int64_t columns, float* x, const float* y) {
  for_channels<float>(rows * columns,
                      [&](int64_t c, auto tag) { put(x + c, get(x + c, tag) * get(y + c, tag), tag); });
}

inline void add(int64_t rows, int64_t columns, float* x, const float* y) {
  for_channels<float>(rows * columns,
                      [&](int64_t c, auto tag) { put(x + c, get(x + c, tag) + get(y + c, tag), tag); });
}

inline void add_columns(int64_t rows, int64_t columns, const float* x, float* sums) {
  for (int64_t r = 0; r < rows; ++r) add(1, columns, sums, x + r * columns);
}

struct Moments {
  float mean, inverse;  // of the standard deviation
};

DEEPMSI_INLINE Moments moments(const float* z, int64_t columns, float eps) {
  Vec<float> sum = {};
  int64_t c = 0;
  for (; c + kLanes<float> <= columns; c += kLanes<float>) sum += load(z + c);
  float total = lane_sum<float>(sum);
  for (; c < columns; ++c) total += z[c];
  const float mean = total / static_cast<float>(columns);
  Vec<float> square = {};
  for (c = 0; c + kLanes<float> <= columns; c += kLanes<float>) {
    const Vec<float> d = load(z + c) - mean;
    square += d * d;
  }
  float spread = lane_sum<float>(square);
  for (; c < columns; ++c) spread += (z[c] - mean) * (z[c] - mean);
  return {mean, 1.0f / root(spread / static_cast<float>(columns) + eps)};
}

inline void norm(int64_t rows, int64_t columns, float* z, const float* bias, const float* x,
                 const float* scale, const float* weight, const float* shift, float eps, float* y) {
  for (int64_t r = 0; r < rows; ++r) {
    float *from = z + r * columns, *to = y + r * columns;
    if (bias != nullptr) add(1, columns, from, bias);
    const Moments m = moments(from, columns, eps);
    const float* skip = x != nullptr ? x + r * columns : nullptr;
    const float by = scale != nullptr ? scale[r] : 1.0f;
    for_channels<float>(columns, [&](int64_t c, auto tag) {
      auto value = (get(from + c, tag) - m.mean) * m.inverse * get(weight + c, tag) + get(shift + c, tag);
      if (skip != nullptr) value = get(skip + c, tag) + value * by;
      put(to + c, value, tag);
    });
  }
}

inline void norm_gradient(int64_t rows, int64_t columns, const float* grad_y, const float* z,
                          const float* scale, const float* weight, float eps, float* grad_z, float* sums) {
  for (int64_t r = 0; r < rows; ++r) {
    const float *dy = grad_y + r * columns, *from = z + r * columns;
    float* to = grad_z + r * columns;
    const Moments m = moments(from, columns, eps);
    const float by = scale != nullptr ? scale[r] : 1.0f;
    Vec<float> sum = {}, along = {};
    float sum_rest = 0.0f, along_rest = 0.0f;
    for_channels<float>(columns, [&](int64_t c, auto tag) {
      const auto unit = (get(from + c, tag) - m.mean) * m.inverse, dn = get(dy + c, tag) * by;
      const auto gradient = dn * get(weight + c, tag);
      put(sums + c, get(sums + c, tag) + dn * unit, tag);
      put(sums + columns + c, get(sums + columns + c, tag) + dn, tag);
      if constexpr (sizeof(gradient) == sizeof(float)) {
        sum_rest += gradient;
        along_rest += gradient * unit;
      } else {
        sum += gradient;
        along += gradient * unit;
      }
    });
    const float mean = (lane_sum<float>(sum) + sum_rest) / static_cast<float>(columns);
    const float slope = (lane_sum<float>(along) + along_rest) / static_cast<float>(columns);
    for_channels<float>(columns, [&](int64_t c, auto tag) {
      const auto unit = (get(from + c, tag) - m.mean) * m.inverse;
      const auto gradient = (get(dy + c, tag) * by * get(weight + c, tag) - mean - unit * slope) * m.inverse;
      put(to + c, gradient, tag);
      put(sums + 2 * columns + c, get(sums + 2 * columns + c, tag) + gradient, tag);
    });
  }
}

}  // namespace

BlockKernels block_kernels() {
  return {kTile,           kPanel,   pack, multiply,    add_outer, add_bias,     bias_gelu,
          bias_gelu_slope, scale_by, add,  add_columns, norm,      norm_gradient};
}

}  // namespace deepmsi::DEEPMSI_ISA_NAMESPACE

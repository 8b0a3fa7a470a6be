// Products of matrices out of registers, and row-wise functions that run while the rows are in cache.
//
// A tile of C stays in registers over a stretch of the depth: kRows broadcasts of A against two vectors of B.
// B is packed so that a tile reads it in one stream; A is read where it lies.
#include "gelu.h"
#include "gemm.h"
#include "product.h"

namespace deepmsi::DEEPMSI_ISA_NAMESPACE {
namespace {

constexpr int64_t kPackedColumns = 2 * kLanes<float>;
// As many rows as leave registers for one row of B and a broadcast.
constexpr int kTile = DEEPMSI_VECTOR_BYTES == 64 ? 12 : 6;
// A sum is interrupted after so many steps, for its rounding.
constexpr int64_t kDepth = 256;
// Rows of C for which pairs of A are laid out at a time.
constexpr int64_t kOuterRows = 16 * kTile;

// What products read of tensors stored as S, and what of it they take in a step of the depth.
template <typename S>
struct Operands {
  using Number = float;
  using Step = float;
};
#if defined(__AVX512BF16__)
template <>
struct Operands<BFloat16> {
  using Number = BFloat16;
  using Step = Pair;
};
#endif
template <typename S>
using Operand = typename Operands<S>::Number;
template <typename S>
using StepOf = typename Operands<S>::Step;
template <typename S>
constexpr int64_t kStep = sizeof(StepOf<S>) / sizeof(Operand<S>);

template <typename S>
constexpr DType kTypeOf = sizeof(S) == sizeof(float) ? DType::kFloat : DType::kBFloat16;

// Steps of a depth, whose last one may hold a zero.
template <typename S>
DEEPMSI_INLINE int64_t steps(int64_t depth) {
  return (depth + kStep<S> - 1) / kStep<S>;
}
template <typename S>
DEEPMSI_INLINE int64_t pitch(int64_t columns) {
  return steps<S>(columns) * kStep<S>;
}

// One panel of C, whose last columns may be missing.
template <Left kLeft, bool kAdd, typename Step>
inline void gemm_panel(int64_t rows, int64_t columns, int64_t depth, const Step* a, int64_t row_a,
                       const Step* b, float* c, int64_t row_c) {
  if (columns >= kPackedColumns) {
    product_columns<kLeft, kAdd, kTile, 2>(rows, depth, a, row_a, b, kPackedColumns, c, row_c);
    return;
  }
  float edge[kTile * kPackedColumns];
  for (int64_t i = 0; i < rows; i += kTile) {
    const int64_t count = rows - i < kTile ? rows - i : kTile;
    product_columns<kLeft, false, kTile, 2>(count, depth, a + i * row_stride<kLeft>(row_a), row_a, b,
                                            kPackedColumns, edge, kPackedColumns);
    for (int64_t r = 0; r < count; ++r) {
      float* to = c + (i + r) * row_c;
      for (int64_t j = 0; j < columns; ++j)
        to[j] = kAdd ? to[j] + edge[r * kPackedColumns + j] : edge[r * kPackedColumns + j];
    }
  }
}

// Row k of B as a row of steps that are floats.
template <typename From>
DEEPMSI_INLINE void pack_step(const From* b, int64_t row_b, int64_t k, int64_t, int64_t width, float* to) {
  const From* row = b + k * row_b;
  if (width == kPackedColumns) {
    for_channels<float>(kPackedColumns, [&](int64_t j, auto tag) { put(to + j, get(row + j, tag), tag); });
  } else {
    for (int64_t j = 0; j < kPackedColumns; ++j) to[j] = j < width ? to_wide(row[j]) : 0.0f;
  }
}

// Consecutive steps of a row in the lanes of floats, and one, whose second number may be missing.
template <typename From>
DEEPMSI_INLINE Vec<float> steps_of(const From* row, int64_t k, const float*) {
  return get(row + k, VectorTag{});
}
template <typename From>
DEEPMSI_INLINE float step_of(const From* row, int64_t k, int64_t, const float*) {
  return to_wide(row[k]);
}

#if defined(__AVX512BF16__)
DEEPMSI_INLINE VecBits load_rounded(const BFloat16* p) { return load_halves(p); }
DEEPMSI_INLINE VecBits load_rounded(const float* p) {
  const auto rounded = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(load(p)));
  VecHalves halves;
  __builtin_memcpy(&halves, &rounded, sizeof halves);
  return __builtin_convertvector(halves, VecBits);
}
DEEPMSI_INLINE BFloat16 rounded(BFloat16 v) { return v; }
DEEPMSI_INLINE BFloat16 rounded(float v) { return Storage<BFloat16>::narrow(v); }

// Pairs of numbers that lie in two rows one above the other; the second row may be missing.
template <typename From>
DEEPMSI_INLINE void pair_rows(const From* first, const From* second, int64_t count, Pair* to) {
  int64_t j = 0;
  for (; j + kLanes<float> <= count; j += kLanes<float>) {
    VecBits both = load_rounded(first + j);
    if (second != nullptr) both |= load_rounded(second + j) << 16;
    __builtin_memcpy(to + j, &both, sizeof both);
  }
  for (; j < count; ++j) to[j] = {rounded(first[j]), second != nullptr ? rounded(second[j]) : BFloat16{0}};
}

template <typename From>
DEEPMSI_INLINE void pack_step(const From* b, int64_t row_b, int64_t k, int64_t depth, int64_t width,
                              Pair* to) {
  const From* row = b + 2 * k * row_b;
  pair_rows(row, 2 * k + 1 < depth ? row + row_b : nullptr, width, to);
  for (int64_t j = width; j < kPackedColumns; ++j) to[j] = {};
}

DEEPMSI_INLINE Vec<float> steps_of(const BFloat16* row, int64_t k, const Pair*) {
  Vec<float> v;
  __builtin_memcpy(&v, row + 2 * k, sizeof v);
  return v;
}
DEEPMSI_INLINE Vec<float> steps_of(const float* row, int64_t k, const Pair*) {
  const float* at = row + 2 * k;
  return reinterpret_cast<Vec<float>>(_mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(load(at + kLanes<float>)),
                                                          reinterpret_cast<__m512>(load(at))));
}
template <typename From>
DEEPMSI_INLINE Pair step_of(const From* row, int64_t k, int64_t depth, const Pair*) {
  return {rounded(row[2 * k]), 2 * k + 1 < depth ? rounded(row[2 * k + 1]) : BFloat16{0}};
}
#endif

// From numbers of a type, for products of tensors stored as S.
template <typename From, typename S>
void pack(const void* b_any, int64_t row_b, bool transposed, int64_t depth, int64_t columns, int64_t first,
          int64_t last, void* out) {
  using Step = StepOf<S>;
  constexpr int64_t kCount = kLanes<float>;
  const From* b = static_cast<const From*>(b_any);
  const int64_t count = steps<S>(depth), whole = depth / kStep<S>;
  for (int64_t p = first; p < last; ++p) {
    Step* to = static_cast<Step*>(out) + p * count * kPackedColumns;
    const int64_t from = p * kPackedColumns,
                  width = columns - from < kPackedColumns ? columns - from : kPackedColumns;
    if (!transposed) {
      for (int64_t k = 0; k < count; ++k)
        pack_step(b + from, row_b, k, depth, width, to + k * kPackedColumns);
      continue;
    }
    int64_t k = 0;
    if (width == kPackedColumns) {
      for (; k + kCount <= whole; k += kCount) {
        for (int64_t j = 0; j < kPackedColumns; j += kCount) {
          Vec<float> square[kCount];
#pragma GCC unroll 16
          for (int64_t i = 0; i < kCount; ++i) square[i] = steps_of(b + (from + j + i) * row_b, k, to);
          transpose<float>(square);
#pragma GCC unroll 16
          for (int64_t i = 0; i < kCount; ++i)
            __builtin_memcpy(to + (k + i) * kPackedColumns + j, &square[i], sizeof square[i]);
        }
      }
    }
    for (; k < count; ++k) {
      for (int64_t j = 0; j < kPackedColumns; ++j)
        to[k * kPackedColumns + j] = j < width ? step_of(b + (from + j) * row_b, k, depth, to) : Step{};
    }
  }
}

template <typename S>
void multiply(int64_t rows, int64_t columns, int64_t depth, const void* a_any, const void* packed,
              int64_t panel_depth, bool add, float* c, int64_t row_c) {
  using Step = StepOf<S>;
  const Step* a = static_cast<const Step*>(a_any);
  const int64_t count = steps<S>(depth);
  for (int64_t j = 0; j < columns; j += kPackedColumns) {
    const Step* panel = static_cast<const Step*>(packed) + j * steps<S>(panel_depth);
    const int64_t width = columns - j, first = count < kDepth ? count : kDepth;
    if (add) {
      gemm_panel<Left::kRows, true>(rows, width, first, a, count, panel, c + j, row_c);
    } else {
      gemm_panel<Left::kRows, false>(rows, width, first, a, count, panel, c + j, row_c);
    }
    for (int64_t k = kDepth; k < count; k += kDepth) {
      gemm_panel<Left::kRows, true>(rows, width, count - k < kDepth ? count - k : kDepth, a + k, count,
                                    panel + k * kPackedColumns, c + j, row_c);
    }
  }
}

inline void add_outer_steps(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t row_a,
                            const float* b, float* c, float* panel) {
  for (int64_t j = 0; j < columns; j += kPackedColumns) {
    const int64_t width = columns - j;
    for (int64_t k = 0; k < depth; k += kDepth) {
      const int64_t count = depth - k < kDepth ? depth - k : kDepth;
      for (int64_t i = 0; i < count; ++i)
        pack_step(b + j, columns, k + i, depth, width < kPackedColumns ? width : kPackedColumns,
                  panel + i * kPackedColumns);
      gemm_panel<Left::kTurned, true>(rows, width, count, a + k * row_a, row_a, panel, c + j, columns);
    }
  }
}

#if defined(__AVX512BF16__)
// Two rows of A make a row of pairs, which are laid out first.
inline void add_outer_steps(int64_t rows, int64_t columns, int64_t depth, const BFloat16* a, int64_t row_a,
                            const BFloat16* b, float* c, Pair* panel) {
  Pair* left = panel + kDepth * kPackedColumns;
  const int64_t row_b = pitch<BFloat16>(columns), all = steps<BFloat16>(depth);
  for (int64_t k = 0; k < all; k += kDepth) {
    const int64_t count = all - k < kDepth ? all - k : kDepth;
    for (int64_t i = 0; i < rows; i += kOuterRows) {
      const int64_t some = rows - i < kOuterRows ? rows - i : kOuterRows;
      for (int64_t t = 0; t < count; ++t) {
        const BFloat16* row = a + 2 * (k + t) * row_a + i;
        pair_rows(row, 2 * (k + t) + 1 < depth ? row + row_a : nullptr, some, left + t * kOuterRows);
      }
      for (int64_t j = 0; j < columns; j += kPackedColumns) {
        const int64_t width = columns - j;
        for (int64_t t = 0; t < count; ++t)
          pack_step(b + j, row_b, k + t, depth, width < kPackedColumns ? width : kPackedColumns,
                    panel + t * kPackedColumns);
        gemm_panel<Left::kTurned, true>(some, width, count, left, kOuterRows, panel, c + i * columns + j,
                                        columns);
      }
    }
  }
}
#endif

template <typename S>
void add_outer(int64_t rows, int64_t columns, int64_t depth, const void* a, int64_t row_a, const void* b,
               float* c, void* scratch) {
  add_outer_steps(rows, columns, depth, static_cast<const Operand<S>*>(a), row_a,
                  static_cast<const Operand<S>*>(b), c, static_cast<StepOf<S>*>(scratch));
}

// Every row of x [rows, columns], whose rows lie `pitch_x` apart, in another type and pitch, with zeros
// behind it.
template <typename From, typename To>
DEEPMSI_INLINE void convert(int64_t rows, int64_t columns, const From* x, int64_t pitch_x, To* y,
                            int64_t pitch_y) {
  for (int64_t r = 0; r < rows; ++r) {
    const From* from = x + r * pitch_x;
    To* to = y + r * pitch_y;
    for_channels<float>(columns, [&](int64_t c, auto tag) { put(to + c, get(from + c, tag), tag); });
    for (int64_t c = columns; c < pitch_y; ++c) to[c] = To{};
  }
}

template <typename S>
void to_operand(int64_t rows, int64_t columns, const void* x, void* y) {
  convert(rows, columns, static_cast<const S*>(x), columns, static_cast<Operand<S>*>(y), pitch<S>(columns));
}

template <typename S>
void to_stored(int64_t rows, int64_t columns, const void* x, void* y) {
  convert(rows, columns, static_cast<const Operand<S>*>(x), pitch<S>(columns), static_cast<S*>(y), columns);
}

// Call body(row of x, row of y) for the rows of x and operands y, and put zeros behind those of y.
template <typename S, typename Body>
DEEPMSI_INLINE void for_operands(int64_t rows, int64_t columns, float* x, void* y, const Body& body) {
  const int64_t wide = pitch<S>(columns);
  for (int64_t r = 0; r < rows; ++r) {
    Operand<S>* to = static_cast<Operand<S>*>(y) + r * wide;
    body(r, x + r * columns, to);
    for (int64_t c = columns; c < wide; ++c) to[c] = {};
  }
}

template <typename S>
void add_bias(int64_t rows, int64_t columns, float* x, const float* bias, void* y) {
  for_operands<S>(rows, columns, x, y, [&](int64_t, const float* row, Operand<S>* to) {
    for_channels<float>(columns, [&](int64_t c, auto tag) {
      auto value = get(row + c, tag);
      if (bias != nullptr) value = value + get(bias + c, tag);
      put(to + c, value, tag);
    });
  });
}

// Call body(row + c, bias + c, y + c) for whole vectors, and at the end for copies of what is left of the
// row, with zeros behind it.
template <typename T, typename Body>
DEEPMSI_INLINE void over_vectors(int64_t columns, float* row, const float* bias, T* y, const Body& body) {
  int64_t c = 0;
  for (; c + kLanes<float> <= columns; c += kLanes<float>) body(row + c, bias + c, y + c);
  if (c == columns) return;
  float row_rest[kLanes<float>] = {}, bias_rest[kLanes<float>] = {};
  T y_rest[kLanes<float>];
  for (int64_t i = 0; i < columns - c; ++i) row_rest[i] = row[c + i], bias_rest[i] = bias[c + i];
  body(row_rest, bias_rest, y_rest);
  for (int64_t i = 0; i < columns - c; ++i) row[c + i] = row_rest[i], y[c + i] = y_rest[i];
}

template <typename S>
void bias_gelu(int64_t rows, int64_t columns, float* x, const float* bias, void* y) {
  for_operands<S>(rows, columns, x, y, [&](int64_t, float* row, Operand<S>* to) {
    over_vectors(columns, row, bias, to, [](float* h, const float* b, Operand<S>* out) {
      put(out, gelu(load(h) + load(b)), VectorTag{});
    });
  });
}

template <typename S>
void bias_gelu_slope(int64_t rows, int64_t columns, float* x, const float* bias, void* y) {
  for_operands<S>(rows, columns, x, y, [&](int64_t, float* row, Operand<S>* to) {
    over_vectors(columns, row, bias, to, [](float* h, const float* b, Operand<S>* out) {
      const GeluAndSlope found = gelu_and_slope(load(h) + load(b));
      put(out, found.value, VectorTag{});
      store(h, found.slope);
    });
  });
}

template <typename S>
void scale_by(int64_t rows, int64_t columns, float* x, const float* factor, void* y) {
  for_operands<S>(rows, columns, x, y, [&](int64_t r, const float* row, Operand<S>* to) {
    const float* by = factor + r * columns;
    for_channels<float>(columns,
                        [&](int64_t c, auto tag) { put(to + c, get(row + c, tag) * get(by + c, tag), tag); });
  });
}

template <typename T>
DEEPMSI_INLINE void add_to(int64_t columns, float* sums, const T* x) {
  for_channels<float>(columns,
                      [&](int64_t c, auto tag) { put(sums + c, get(sums + c, tag) + get(x + c, tag), tag); });
}

template <typename S>
void add_columns(int64_t rows, int64_t columns, const void* x, float* sums) {
  for (int64_t r = 0; r < rows; ++r)
    add_to(columns, sums, static_cast<const Operand<S>*>(x) + r * pitch<S>(columns));
}

template <typename S>
void add(int64_t rows, int64_t columns, const float* x, const void* y, void* out) {
  const S* other = static_cast<const S*>(y);
  for_channels<float>(rows * columns, [&](int64_t c, auto tag) {
    auto value = get(x + c, tag);
    if (other != nullptr) value = value + get(other + c, tag);
    put(static_cast<S*>(out) + c, value, tag);
  });
}

struct Moments {
  float mean, inverse;  // of the standard deviation
};

template <typename T>
DEEPMSI_INLINE Moments moments(const T* z, int64_t columns, float eps) {
  Vec<float> sum = {};
  int64_t c = 0;
  for (; c + kLanes<float> <= columns; c += kLanes<float>) sum += get(z + c, VectorTag{});
  float total = lane_sum<float>(sum);
  for (; c < columns; ++c) total += to_wide(z[c]);
  const float mean = total / static_cast<float>(columns);
  Vec<float> square = {};
  for (c = 0; c + kLanes<float> <= columns; c += kLanes<float>) {
    const Vec<float> d = get(z + c, VectorTag{}) - mean;
    square += d * d;
  }
  float spread = lane_sum<float>(square);
  for (; c < columns; ++c) spread += (to_wide(z[c]) - mean) * (to_wide(z[c]) - mean);
  return {mean, 1.0f / root(spread / static_cast<float>(columns) + eps)};
}

template <typename S>
void norm(int64_t rows, int64_t columns, float* z, const float* bias, const void* x, const float* scale,
          const float* weight, const float* shift, float eps, void* y, void* kept) {
  for (int64_t r = 0; r < rows; ++r) {
    float* from = z + r * columns;
    S* to = static_cast<S*>(y) + r * columns;
    if (bias != nullptr) add_to(columns, from, bias);
    if (kept != nullptr) convert(1, columns, from, columns, static_cast<S*>(kept) + r * columns, columns);
    const Moments m = moments(from, columns, eps);
    const S* skip = x != nullptr ? static_cast<const S*>(x) + r * columns : nullptr;
    const float by = scale != nullptr ? scale[r] : 1.0f;
    for_channels<float>(columns, [&](int64_t c, auto tag) {
      auto value = (get(from + c, tag) - m.mean) * m.inverse * get(weight + c, tag) + get(shift + c, tag);
      if (skip != nullptr) value = get(skip + c, tag) + value * by;
      put(to + c, value, tag);
    });
  }
}

// Take a row back through its norm: call give(c, gradient, tag) with that of z, where its result has the
// gradient of(c, tag), and add those of weight and shift to sums [2, columns].
template <typename S, typename Of, typename Give>
DEEPMSI_INLINE void through_norm(int64_t columns, const S* z, const float* weight, float eps, float* sums,
                                 const Of& of, const Give& give) {
  const Moments m = moments(z, columns, eps);
  Vec<float> sum = {}, along = {};
  float sum_rest = 0.0f, along_rest = 0.0f;
  for_channels<float>(columns, [&](int64_t c, auto tag) {
    const auto unit = (get(z + c, tag) - m.mean) * m.inverse, dn = of(c, tag);
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
    const auto unit = (get(z + c, tag) - m.mean) * m.inverse;
    give(c, (of(c, tag) * get(weight + c, tag) - mean - unit * slope) * m.inverse, tag);
  });
}

template <typename S>
void norm_gradient(int64_t rows, int64_t columns, const void* grad_y, const void* z, const float* scale,
                   const float* weight, float eps, void* grad_z, float* sums) {
  const int64_t wide = pitch<S>(columns);
  for (int64_t r = 0; r < rows; ++r) {
    const S *dy = static_cast<const S*>(grad_y) + r * columns, *from = static_cast<const S*>(z) + r * columns;
    Operand<S>* to = static_cast<Operand<S>*>(grad_z) + r * wide;
    float* of_bias = sums + 2 * columns;
    const float by = scale != nullptr ? scale[r] : 1.0f;
    through_norm(
        columns, from, weight, eps, sums, [&](int64_t c, auto tag) { return get(dy + c, tag) * by; },
        [&](int64_t c, auto gradient, auto tag) {
          put(to + c, gradient, tag);
          put(of_bias + c, get(of_bias + c, tag) + gradient, tag);
        });
    for (int64_t c = columns; c < wide; ++c) to[c] = {};
  }
}

template <typename S>
void normed(int64_t rows, int64_t columns, const void* x, const float* weight, const float* shift, float eps,
            void* y) {
  const int64_t wide = pitch<S>(columns);
  for (int64_t r = 0; r < rows; ++r) {
    const S* from = static_cast<const S*>(x) + r * columns;
    Operand<S>* to = static_cast<Operand<S>*>(y) + r * wide;
    const Moments m = moments(from, columns, eps);
    for_channels<float>(columns, [&](int64_t c, auto tag) {
      put(to + c, (get(from + c, tag) - m.mean) * m.inverse * get(weight + c, tag) + get(shift + c, tag),
          tag);
    });
    for (int64_t c = columns; c < wide; ++c) to[c] = {};
  }
}

template <typename S>
void residual(int64_t rows, int64_t columns, const float* z, const float* bias, const void* x,
              const float* scale, void* y) {
  for (int64_t r = 0; r < rows; ++r) {
    const float* from = z + r * columns;
    const S* skip = x != nullptr ? static_cast<const S*>(x) + r * columns : nullptr;
    S* to = static_cast<S*>(y) + r * columns;
    const float by = scale != nullptr ? scale[r] : 1.0f;
    for_channels<float>(columns, [&](int64_t c, auto tag) {
      auto value = get(from + c, tag);
      if (bias != nullptr) value = value + get(bias + c, tag);
      value = value * by;
      if (skip != nullptr) value = get(skip + c, tag) + value;
      put(to + c, value, tag);
    });
  }
}

template <typename S>
void residual_gradient(int64_t rows, int64_t columns, const void* grad_y, const float* scale, void* grad_z,
                       float* sums) {
  const int64_t wide = pitch<S>(columns);
  for (int64_t r = 0; r < rows; ++r) {
    const S* dy = static_cast<const S*>(grad_y) + r * columns;
    Operand<S>* to = static_cast<Operand<S>*>(grad_z) + r * wide;
    const float by = scale != nullptr ? scale[r] : 1.0f;
    for_channels<float>(columns, [&](int64_t c, auto tag) {
      const auto gradient = get(dy + c, tag) * by;
      put(to + c, gradient, tag);
      put(sums + c, get(sums + c, tag) + gradient, tag);
    });
    for (int64_t c = columns; c < wide; ++c) to[c] = {};
  }
}

template <typename S>
void normed_gradient(int64_t rows, int64_t columns, const float* through, const void* x, const float* weight,
                     float eps, const void* grad_y, void* grad_x, float* sums) {
  for (int64_t r = 0; r < rows; ++r) {
    const float* dn = through + r * columns;
    const S* from = static_cast<const S*>(x) + r * columns;
    const S* dy = grad_y != nullptr ? static_cast<const S*>(grad_y) + r * columns : nullptr;
    S* to = static_cast<S*>(grad_x) + r * columns;
    through_norm(
        columns, from, weight, eps, sums, [&](int64_t c, auto tag) { return get(dn + c, tag); },
        [&](int64_t c, auto gradient, auto tag) {
          if (dy != nullptr) gradient = get(dy + c, tag) + gradient;
          put(to + c, gradient, tag);
        });
  }
}

template <typename S>
BlockKernels block_kernels_of() {
  const int64_t pairs = kStep<S> > 1 ? kOuterRows : 0;
  return {kTypeOf<S>,
          kTypeOf<Operand<S>>,
          kTile,
          kPackedColumns,
          pack<S, S>,
          pack<float, S>,
          multiply<S>,
          add_outer<S>,
          kDepth * (kPackedColumns + pairs) * static_cast<int64_t>(sizeof(StepOf<S>)),
          to_operand<S>,
          to_stored<S>,
          add_bias<S>,
          bias_gelu<S>,
          bias_gelu_slope<S>,
          scale_by<S>,
          add_columns<S>,
          add<S>,
          norm<S>,
          norm_gradient<S>,
          normed<S>,
          residual<S>,
          residual_gradient<S>,
          normed_gradient<S>};
}

}  // namespace

BlockKernels block_kernels(DType stored) {
  return stored == DType::kBFloat16 ? block_kernels_of<BFloat16>() : block_kernels_of<float>();
}

}  // namespace deepmsi::DEEPMSI_ISA_NAMESPACE

// The dilated causal convolution of rows (Eq. 4) as products that gather their rows tap by tap, forward and
// backward.
//
// At a few positions a product is bound by reading the weights once, so a panel of them is met by all rows
// while it lies in the first-level cache, and the next panel is fetched meanwhile. A row that a tap does not
// reach (before the start, or between the positions that were asked for) is left out instead of being
// multiplied as zeros.
#include "dilated_causal_conv1d.h"
#include "simd.h"

namespace deepmsi::DEEPMSI_ISA_NAMESPACE {
namespace {
namespace causal_conv {

// Rows of a register tile; two vectors of columns beside them fill the registers.
#if defined(__AVX512F__)
constexpr int kTileRows = 14;
#elif defined(__AVX2__)
constexpr int kTileRows = 6;
#else
constexpr int kTileRows = 4;
#endif
constexpr int64_t kDepth = 128;      // summands of one pass over a panel
constexpr int64_t kChunkRows = 256;  // rows that share a reading of the weights
constexpr int64_t kGroup = 8;        // panels that share a packing of the rows
// Strides of packed rows, odd in cache lines: rows at a power of two would fight for a set of the cache.
constexpr int64_t kRowStride = kDepth + 16;
constexpr int64_t kTurnedStride = kChunkRows + 16;

template <typename A>
constexpr int64_t kPanel = 2 * kLanes<A>;

DEEPMSI_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
DEEPMSI_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Memory to fetch while a panel is multiplied: `rows` apart by `stride` bytes, one for each summand.
struct Ahead {
  const char* memory;
  int64_t stride;
};

// c[where[r]] += Σ_k a[r][k] b[k] for kRows rows and one panel; kTurned: a lies summand by summand.
template <typename A, int kRows, bool kTurned>
__attribute__((noinline)) void multiply_tile(const A* a, const A* b, int64_t b_stride, int64_t depth, A* c,
                                             int64_t c_stride, const int32_t* where, Ahead ahead) {
  constexpr int64_t kRow = kTurned ? 1 : kRowStride, kStep = kTurned ? kTurnedStride : 1;
  Vec<A> sum[kRows][2] = {};
  for (int64_t k = 0; k < depth; ++k) {
    __builtin_prefetch(ahead.memory, 0, 2);
    __builtin_prefetch(ahead.memory + 64, 0, 2);
    ahead.memory += ahead.stride;
    const Vec<A> b0 = load(b), b1 = load(b + kLanes<A>);
    b += b_stride;
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const A factor = a[r * kRow + k * kStep];
      sum[r][0] += factor * b0;
      sum[r][1] += factor * b1;
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    A* to = c + where[r] * c_stride;
    store(to, load(to) + sum[r][0]);
    store(to + kLanes<A>, load(to + kLanes<A>) + sum[r][1]);
  }
}

template <typename A, bool kTurned, int kRows = kTileRows>
DEEPMSI_INLINE void multiply_rows(int64_t rows, const A* a, const A* b, int64_t b_stride, int64_t depth, A* c,
                                  int64_t c_stride, const int32_t* where, Ahead ahead) {
  if (rows == kRows) {
    multiply_tile<A, kRows, kTurned>(a, b, b_stride, depth, c, c_stride, where, ahead);
  } else if constexpr (kRows > 1) {
    multiply_rows<A, kTurned, kRows - 1>(rows, a, b, b_stride, depth, c, c_stride, where, ahead);
  }
}

inline int64_t product_tiles(int64_t rows, int64_t columns, int64_t panel) {
  return ceil_div(rows, kChunkRows) * ceil_div(columns, panel);
}

template <typename A>
struct Panel {
  const A* values;
  int64_t stride;
};

// Tiles [begin, end) of a product that is summed in `passes`; a tile is one panel of a chunk of rows.
//   side.rows(pass, row, count, to, where): packs the rows that take part in a pass, numbers them in `where`
//     and returns how many they are.
//   side.depth(pass): summands of the pass.
//   side.panel(pass, column, columns, once, to): the pass' factors of a panel, at `to` or where they are.
//   side.ahead(pass, column): where those lie in memory.
//   side.finish(row, count, column, columns, sums, stride): takes the sums.
template <typename A, bool kTurned, typename Side>
DEEPMSI_INLINE void multiply(const Side& side, int64_t rows, int64_t columns, int64_t passes, int64_t begin,
                             int64_t end, char* scratch) {
  const int64_t chunks = ceil_div(rows, kChunkRows), panels = ceil_div(columns, kPanel<A>);
  const int64_t most = smaller(rows, kChunkRows);
  A* packed = reinterpret_cast<A*>(scratch);
  A* panel = packed + (kTurned ? kDepth * kTurnedStride : most * kRowStride);
  A* sums = panel + kDepth * kPanel<A>;
  int32_t where[kChunkRows];
  for (int64_t tile = begin; tile < end;) {
    const int64_t chunk = tile / panels, from = tile % panels;
    const int64_t to = smaller(smaller(panels, from + end - tile), from + kGroup);
    tile += to - from;
    const int64_t row = rows * chunk / chunks, count = rows * (chunk + 1) / chunks - row;
    const int64_t stride = (to - from) * kPanel<A>;
    for (int64_t i = 0; i < count * stride; ++i) sums[i] = 0;
    for (int64_t pass = 0; pass < passes; ++pass) {
      const int64_t active = side.rows(pass, row, count, packed, where);
      if (active == 0) continue;
      const int64_t depth = side.depth(pass), blocks = ceil_div(active, kTileRows);
      for (int64_t p = from; p < to; ++p) {
        const int64_t column = p * kPanel<A>;
        const Panel<A> b = side.panel(pass, column, smaller(kPanel<A>, columns - column), blocks <= 2, panel);
        Ahead ahead = p + 1 < to          ? side.ahead(pass, column + kPanel<A>)
                      : pass + 1 < passes ? side.ahead(pass + 1, from * kPanel<A>)
                                          : Ahead{reinterpret_cast<const char*>(b.values), 0};
        for (int64_t block = 0; block < blocks; ++block) {
          const int64_t r = active * block / blocks, height = active * (block + 1) / blocks - r;
          multiply_rows<A, kTurned>(height, packed + r * (kTurned ? 1 : kRowStride), b.values, b.stride,
                                    depth, sums + (p - from) * kPanel<A>, stride, where + r, ahead);
          ahead = {reinterpret_cast<const char*>(b.values), 0};
        }
      }
    }
    const int64_t column = from * kPanel<A>;
    side.finish(row, count, column, smaller(stride, columns - column), sums, stride);
  }
}

template <typename A>
int64_t scratch_bytes(int64_t rows) {
  const int64_t most = smaller(rows, kChunkRows);
  const int64_t plain = most * kRowStride, turned = kDepth * kTurnedStride;
  const int64_t packed = plain > turned ? plain : turned;
  return static_cast<int64_t>(sizeof(A)) * (packed + kDepth * kPanel<A> + most * kGroup * kPanel<A>);
}

template <typename A>
int64_t tiles(int64_t rows, int64_t columns) {
  return product_tiles(rows, columns, kPanel<A>);
}

// A panel of a row-major matrix, whose rows lie `stride` apart, from `from`.
template <typename T, typename A>
DEEPMSI_INLINE Panel<A> panel_of(const T* from, int64_t stride, int64_t depth, int64_t columns, bool once,
                                 A* to) {
  if constexpr (sizeof(T) == sizeof(A)) {
    if (once && columns == kPanel<A>) return {from, stride};
  }
  for (int64_t k = 0; k < depth; ++k) {
    if (columns == kPanel<A>) {
      widen(from + k * stride, to + k * kPanel<A>, kPanel<A>);
    } else {
      widen(from + k * stride, to + k * kPanel<A>, columns);
      for (int64_t c = columns; c < kPanel<A>; ++c) to[k * kPanel<A> + c] = 0;
    }
  }
  return {to, kPanel<A>};
}

// Words [first, first + count) of Philox4x32-10 under a key, four a counter, by groups of sixteen counters.
DEEPMSI_INLINE void philox_words(uint64_t seed, int64_t counter, int64_t counters, uint32_t* words) {
  constexpr int kAtOnce = 16;
  for (int64_t done = 0; done < counters; done += kAtOnce) {
    uint32_t c0[kAtOnce], c1[kAtOnce], c2[kAtOnce], c3[kAtOnce];
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int i = 0; i < kAtOnce; ++i) {
      const uint64_t index = static_cast<uint64_t>(counter + done + i);
      c0[i] = static_cast<uint32_t>(index);
      c1[i] = static_cast<uint32_t>(index >> 32);
      c2[i] = c3[i] = 0;
    }
    for (int round = 0; round < 10; ++round) {
      for (int i = 0; i < kAtOnce; ++i) {
        const uint64_t a = uint64_t{c0[i]} * 0xD2511F53u, b = uint64_t{c2[i]} * 0xCD9E8D57u;
        c0[i] = static_cast<uint32_t>(b >> 32) ^ c1[i] ^ k0;
        c1[i] = static_cast<uint32_t>(b);
        c2[i] = static_cast<uint32_t>(a >> 32) ^ c3[i] ^ k1;
        c3[i] = static_cast<uint32_t>(a);
      }
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    for (int i = 0; i < kAtOnce; ++i) {
      uint32_t* to = words + (done + i) * 4;
      to[0] = c0[i];
      to[1] = c1[i];
      to[2] = c2[i];
      to[3] = c3[i];
    }
  }
}

// to[j * to_stride + i] = from[i * from_stride + j] for i, j < 4.
template <typename T, typename A>
DEEPMSI_INLINE void turn_square(const T* from, int64_t from_stride, A* to, int64_t to_stride) {
  typedef A Four __attribute__((vector_size(4 * sizeof(A))));
  Four row[4], half[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    A wide[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) wide[j] = to_wide(from[i * from_stride + j]);
    __builtin_memcpy(&row[i], wide, sizeof wide);
  }
  half[0] = __builtin_shufflevector(row[0], row[1], 0, 4, 1, 5);
  half[1] = __builtin_shufflevector(row[2], row[3], 0, 4, 1, 5);
  half[2] = __builtin_shufflevector(row[0], row[1], 2, 6, 3, 7);
  half[3] = __builtin_shufflevector(row[2], row[3], 2, 6, 3, 7);
  row[0] = __builtin_shufflevector(half[0], half[1], 0, 1, 4, 5);
  row[1] = __builtin_shufflevector(half[0], half[1], 2, 3, 6, 7);
  row[2] = __builtin_shufflevector(half[2], half[3], 0, 1, 4, 5);
  row[3] = __builtin_shufflevector(half[2], half[3], 2, 3, 6, 7);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) __builtin_memcpy(to + i * to_stride, &row[i], sizeof row[i]);
}

// What a product over taps is made of: pass = (a piece of the depth, tap).
struct Taps {
  int64_t depth, taps;
  DEEPMSI_INLINE int64_t passes() const { return ceil_div(depth, kDepth) * taps; }
  DEEPMSI_INLINE int64_t tap(int64_t pass) const { return pass % taps; }
  DEEPMSI_INLINE int64_t from(int64_t pass) const { return pass / taps * kDepth; }
  DEEPMSI_INLINE int64_t size(int64_t pass) const { return smaller(kDepth, depth - from(pass)); }
};

template <typename T>
struct ForwardSide {
  using A = typename Storage<T>::Wide;
  const CausalConv& call;
  Taps taps;

  DEEPMSI_INLINE int64_t depth(int64_t pass) const { return taps.size(pass); }

  DEEPMSI_INLINE int64_t rows(int64_t pass, int64_t row, int64_t count, A* to, int32_t* where) const {
    const int64_t back = (call.taps - 1 - taps.tap(pass)) * call.dilation, k = taps.from(pass);
    int64_t active = 0;
    for (int64_t r = 0; r < count; ++r) {
      const int64_t m = row + r, at = call.first() + m % call.count * call.step - back;
      if (at < 0) continue;
      const T* from = static_cast<const T*>(call.x) + (m / call.count * call.length + at) * call.inputs + k;
      widen(from, to + active * kRowStride, taps.size(pass));
      where[active++] = static_cast<int32_t>(r);
    }
    return active;
  }

  DEEPMSI_INLINE const T* weights(int64_t pass, int64_t column) const {
    return static_cast<const T*>(call.weight) +
           (taps.tap(pass) * call.inputs + taps.from(pass)) * call.outputs + column;
  }
  DEEPMSI_INLINE Panel<A> panel(int64_t pass, int64_t column, int64_t columns, bool once, A* to) const {
    return panel_of<T, A>(weights(pass, column), call.outputs, taps.size(pass), columns, once, to);
  }
  DEEPMSI_INLINE Ahead ahead(int64_t pass, int64_t column) const {
    return {reinterpret_cast<const char*>(weights(pass, column)),
            call.outputs * static_cast<int64_t>(sizeof(T))};
  }

  DEEPMSI_INLINE void finish(int64_t row, int64_t count, int64_t column, int64_t columns, A* sums,
                             int64_t stride) const {
    uint32_t words[kGroup * kPanel<A> + 128];
    const T* bias = call.bias == nullptr ? nullptr : static_cast<const T*>(call.bias) + column;
    const A scale = static_cast<A>(call.scale);
    for (int64_t r = 0; r < count; ++r) {
      A* value = sums + r * stride;
      const int64_t at = (row + r) * call.outputs + column;
      if (bias != nullptr) {
        for (int64_t c = 0; c < columns; ++c) value[c] += to_wide(bias[c]);
      }
      if (call.relu) {
        // Not a maximum, which would take 0 for a NaN.
        for (int64_t c = 0; c < columns; ++c) value[c] = value[c] < 0 ? A(0) : value[c];
      }
      if (call.threshold != 0) {
        philox_words(call.seed, at / 4, (at % 4 + columns + 3) / 4, words);
        const uint32_t* word = words + at % 4;
        for (int64_t c = 0; c < columns; ++c) value[c] = word[c] < call.threshold ? A(0) : value[c] * scale;
      }
      if (call.active != nullptr) {
        for (int64_t c = 0; c < columns; ++c) call.active[at + c] = !(value[c] <= 0);
      }
      if (call.residual != nullptr) {
        const T* residual = static_cast<const T*>(call.residual) + at;
        for (int64_t c = 0; c < columns; ++c) {
          const A sum = value[c] + to_wide(residual[c]);
          value[c] = sum < 0 ? A(0) : sum;
        }
      }
      narrow(value, static_cast<T*>(call.y) + at, columns);
    }
  }
};

template <typename T>
void forward(const CausalConv& call, int64_t begin, int64_t end, char* scratch) {
  using A = typename Storage<T>::Wide;
  const Taps taps{call.inputs, call.taps};
  multiply<A, false>(ForwardSide<T>{call, taps}, call.rows(), call.outputs, taps.passes(), begin, end,
                     scratch);
}

template <typename T>
void gradient(const CausalConv& call, int64_t begin, int64_t end) {
  using A = typename Storage<T>::Wide;
  const A scale = static_cast<A>(call.scale);
  const int64_t size = end - begin;
  const int64_t at = begin * call.outputs, count = size * call.outputs;
  const T* from = static_cast<const T*>(call.grad_y) + at;
  const T* y = static_cast<const T*>(call.y_saved) + at;
  A* to = static_cast<A*>(call.gradient) + at;
  if (call.residual_given) {
    T* residual = static_cast<T*>(call.grad_residual) + at;
    for (int64_t i = 0; i < count; ++i) {
      const A g = to_wide(y[i]) <= 0 ? A(0) : to_wide(from[i]);
      residual[i] = Storage<T>::narrow(g);
      to[i] = g;
    }
    if (!call.relu) return;
    const bool* active = call.was_active + at;
    for (int64_t i = 0; i < count; ++i) to[i] = active[i] ? to[i] * scale : A(0);
  } else if (call.relu) {
    for (int64_t i = 0; i < count; ++i) to[i] = to_wide(y[i]) <= 0 ? A(0) : to_wide(from[i]) * scale;
  } else {
    widen(from, to, count);
  }
}

// Gathers the gradient: what position t gave to tap i came from row t - (k - 1 - i)·d.
template <typename T>
struct GradXSide {
  using A = typename Storage<T>::Wide;
  const CausalConv& call;
  Taps taps;

  DEEPMSI_INLINE int64_t depth(int64_t pass) const { return taps.size(pass); }

  DEEPMSI_INLINE int64_t rows(int64_t pass, int64_t row, int64_t count, A* to, int32_t* where) const {
    const int64_t back = (call.taps - 1 - taps.tap(pass)) * call.dilation, k = taps.from(pass);
    int64_t active = 0;
    for (int64_t r = 0; r < count; ++r) {
      const int64_t m = row + r, past = m % call.length + back - call.first();
      if (past < 0 || past % call.step != 0 || past / call.step >= call.count) continue;
      const A* from = static_cast<const A*>(call.gradient) +
                      (m / call.length * call.count + past / call.step) * call.outputs + k;
      widen(from, to + active * kRowStride, taps.size(pass));
      where[active++] = static_cast<int32_t>(r);
    }
    return active;
  }

  // Weights of output k0 + k and input column + c stand at [k][c]: turned round by squares of four.
  DEEPMSI_INLINE Panel<A> panel(int64_t pass, int64_t column, int64_t columns, bool, A* to) const {
    const int64_t depth = taps.size(pass);
    const T* from = weights(pass, column);
    for (int64_t c = 0; c < kPanel<A>; c += 4) {
      int64_t k = 0;
      for (; c + 4 <= columns && k + 4 <= depth; k += 4) {
        turn_square(from + c * call.outputs + k, call.outputs, to + k * kPanel<A> + c, kPanel<A>);
      }
      for (; k < depth; ++k) {
        for (int64_t i = c; i < c + 4; ++i) {
          to[k * kPanel<A> + i] = i < columns ? to_wide(from[i * call.outputs + k]) : A(0);
        }
      }
    }
    return {to, kPanel<A>};
  }

  DEEPMSI_INLINE const T* weights(int64_t pass, int64_t column) const {
    return static_cast<const T*>(call.weight) + (taps.tap(pass) * call.inputs + column) * call.outputs +
           taps.from(pass);
  }
  // One row of weights holds many summands, so a summand fetches a part of one.
  DEEPMSI_INLINE Ahead ahead(int64_t pass, int64_t column) const {
    return {reinterpret_cast<const char*>(weights(pass, column)),
            call.outputs * static_cast<int64_t>(sizeof(T)) * kPanel<A> / kDepth};
  }

  DEEPMSI_INLINE void finish(int64_t row, int64_t count, int64_t column, int64_t columns, const A* sums,
                             int64_t stride) const {
    for (int64_t r = 0; r < count; ++r) {
      narrow(sums + r * stride, static_cast<T*>(call.grad_x) + (row + r) * call.inputs + column, columns);
    }
  }
};

template <typename T>
void grad_x(const CausalConv& call, int64_t begin, int64_t end, char* scratch) {
  using A = typename Storage<T>::Wide;
  const Taps taps{call.outputs, call.taps};
  multiply<A, false>(GradXSide<T>{call, taps}, call.batch * call.length, call.inputs, taps.passes(), begin,
                     end, scratch);
}

// Rows are the weights of (tap, input), summands the output rows.
template <typename T>
struct GradWeightSide {
  using A = typename Storage<T>::Wide;
  const CausalConv& call;

  DEEPMSI_INLINE int64_t depth(int64_t pass) const { return smaller(kDepth, call.rows() - pass * kDepth); }

  DEEPMSI_INLINE int64_t rows(int64_t pass, int64_t row, int64_t count, A* to, int32_t* where) const {
    for (int64_t k = 0; k < depth(pass); ++k) {
      const int64_t m = pass * kDepth + k, time = call.first() + m % call.count * call.step;
      for (int64_t r = 0; r < count;) {
        const int64_t tap = (row + r) / call.inputs, input = (row + r) % call.inputs;
        const int64_t size = smaller(count - r, call.inputs - input);
        const int64_t at = time - (call.taps - 1 - tap) * call.dilation;
        A* row_to = to + k * kTurnedStride + r;
        if (at < 0) {
          for (int64_t c = 0; c < size; ++c) row_to[c] = 0;
        } else {
          widen(static_cast<const T*>(call.x) + (m / call.count * call.length + at) * call.inputs + input,
                row_to, size);
        }
        r += size;
      }
    }
    for (int64_t r = 0; r < count; ++r) where[r] = static_cast<int32_t>(r);
    return count;
  }

  DEEPMSI_INLINE Panel<A> panel(int64_t pass, int64_t column, int64_t columns, bool once, A* to) const {
    return panel_of<A, A>(static_cast<const A*>(call.gradient) + pass * kDepth * call.outputs + column,
                          call.outputs, depth(pass), columns, once, to);
  }
  DEEPMSI_INLINE Ahead ahead(int64_t pass, int64_t column) const {
    return {reinterpret_cast<const char*>(static_cast<const A*>(call.gradient) +
                                          pass * kDepth * call.outputs + column),
            call.outputs * static_cast<int64_t>(sizeof(A))};
  }

  DEEPMSI_INLINE void finish(int64_t row, int64_t count, int64_t column, int64_t columns, const A* sums,
                             int64_t stride) const {
    for (int64_t r = 0; r < count; ++r) {
      narrow(sums + r * stride, static_cast<T*>(call.grad_weight) + (row + r) * call.outputs + column,
             columns);
    }
  }
};

template <typename T>
void grad_weight(const CausalConv& call, int64_t begin, int64_t end, char* scratch) {
  using A = typename Storage<T>::Wide;
  multiply<A, true>(GradWeightSide<T>{call}, call.taps * call.inputs, call.outputs,
                    ceil_div(call.rows(), kDepth), begin, end, scratch);
}

template <typename T>
void grad_bias(const CausalConv& call, int64_t begin, int64_t end) {
  using A = typename Storage<T>::Wide;
  constexpr int64_t kAtOnce = 64;
  for (int64_t column = begin; column < end; column += kAtOnce) {
    const int64_t columns = smaller(kAtOnce, end - column);
    double sum[kAtOnce] = {};
    for (int64_t m = 0; m < call.rows(); ++m) {
      const A* from = static_cast<const A*>(call.gradient) + m * call.outputs + column;
      for (int64_t c = 0; c < columns; ++c) sum[c] += static_cast<double>(from[c]);
    }
    for (int64_t c = 0; c < columns; ++c) {
      static_cast<T*>(call.grad_bias)[column + c] = Storage<T>::narrow(static_cast<A>(sum[c]));
    }
  }
}

// A weight norm's products read v itself, [outputs, inputs, taps], so that neither the folded weight nor its
// gradient ever lies in memory: at a few rows, writing and reading those would take longer than all else.

// Outputs [first, first + count) of v, turned round: summand s = input * taps + tap of them at to[s]. Their
// norms are taken on the way.
template <typename T, typename A = typename Storage<T>::Wide>
DEEPMSI_INLINE void turn_panel(const CausalConv& call, int64_t first, int64_t count, A* to) {
  constexpr int64_t kWide = kPanel<A>, kAtOnce = 64 / sizeof(T), kAhead = 4 * kAtOnce;
  const int64_t size = call.inputs * call.taps;
  const T* v = static_cast<const T*>(call.v) + first * size;
  A sum[kWide] = {};
  for (int64_t from = 0; from < size; from += kAtOnce) {
    const int64_t width = smaller(kAtOnce, size - from);
    A* rows = to + from * kWide;
    if (count == kWide && width == kAtOnce) {
      for (int64_t o = 0; o < kWide; o += 4) {
        for (int64_t i = o; i < o + 4; ++i) __builtin_prefetch(v + i * size + from + kAhead, 0, 2);
        for (int64_t k = 0; k < kAtOnce; k += 4) {
          turn_square(v + o * size + from + k, size, rows + k * kWide + o, kWide);
        }
      }
    } else {
      for (int64_t k = 0; k < width; ++k) {
        for (int64_t o = 0; o < kWide; ++o) {
          rows[k * kWide + o] = o < count ? to_wide(v[o * size + from + k]) : A(0);
        }
      }
    }
    A squares[kWide] = {};
    for (int64_t k = 0; k < width; ++k) {
      for (int64_t o = 0; o < kWide; ++o) squares[o] += rows[k * kWide + o] * rows[k * kWide + o];
    }
    for (int64_t o = 0; o < kWide; ++o) sum[o] += squares[o];
  }
  A* norms = static_cast<A*>(call.norms) + first;
  for (int64_t o = 0; o < count; ++o) {
    norms[o] = root(sum[o]);
    norms[call.outputs + o] = to_wide(static_cast<const T*>(call.g)[first + o]) / norms[o];
  }
}

template <typename T>
struct NormedForwardSide : ForwardSide<T> {
  using A = typename Storage<T>::Wide;
  const A* turned;  // of the one panel that is asked for

  DEEPMSI_INLINE Panel<A> panel(int64_t pass, int64_t, int64_t, bool, A*) const {
    const int64_t taps = this->call.taps;
    return {turned + (this->taps.from(pass) * taps + this->taps.tap(pass)) * kPanel<A>, taps * kPanel<A>};
  }
  DEEPMSI_INLINE Ahead ahead(int64_t pass, int64_t column) const {
    const Panel<A> next = panel(pass, column, 0, false, nullptr);
    return {reinterpret_cast<const char*>(next.values), next.stride * static_cast<int64_t>(sizeof(A))};
  }

  DEEPMSI_INLINE void finish(int64_t row, int64_t count, int64_t column, int64_t columns, A* sums,
                             int64_t stride) const {
    const A* scale = static_cast<const A*>(this->call.norms) + this->call.outputs + column;
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t c = 0; c < columns; ++c) sums[r * stride + c] *= scale[c];
    }
    ForwardSide<T>::finish(row, count, column, columns, sums, stride);
  }
};

// The one panel p of a product, all chunks of its rows.
template <typename A, bool kTurned, typename Side>
DEEPMSI_INLINE void multiply_panel(const Side& side, int64_t rows, int64_t columns, int64_t passes, int64_t p,
                                   char* scratch) {
  const int64_t panels = ceil_div(columns, kPanel<A>);
  for (int64_t tile = p; tile < product_tiles(rows, columns, kPanel<A>); tile += panels) {
    multiply<A, kTurned>(side, rows, columns, passes, tile, tile + 1, scratch);
  }
}

template <typename T>
void normed_forward(const CausalConv& call, int64_t begin, int64_t end, char* scratch) {
  using A = typename Storage<T>::Wide;
  const Taps taps{call.inputs, call.taps};
  A* turned = reinterpret_cast<A*>(scratch);
  const NormedForwardSide<T> side{{call, taps}, turned};
  for (int64_t p = begin; p < end; ++p) {
    const int64_t first = p * kPanel<A>;
    turn_panel<T>(call, first, smaller(kPanel<A>, call.outputs - first), turned);
    multiply_panel<A, false>(side, call.rows(), call.outputs, taps.passes(), p,
                             scratch + call.inputs * call.taps * kPanel<A> * sizeof(A));
  }
}

template <typename T>
struct NormedGradXSide : GradXSide<T> {
  using A = typename Storage<T>::Wide;

  DEEPMSI_INLINE int64_t rows(int64_t pass, int64_t row, int64_t count, A* to, int32_t* where) const {
    const int64_t active = GradXSide<T>::rows(pass, row, count, to, where), size = this->taps.size(pass);
    const A* scale = static_cast<const A*>(this->call.norms) + this->call.outputs + this->taps.from(pass);
    for (int64_t r = 0; r < active; ++r) {
      for (int64_t k = 0; k < size; ++k) to[r * kRowStride + k] *= scale[k];
    }
    return active;
  }

  DEEPMSI_INLINE const T* weights(int64_t pass, int64_t column) const {
    const int64_t taps = this->call.taps;
    return static_cast<const T*>(this->call.v) + (this->taps.from(pass) * this->call.inputs + column) * taps +
           this->taps.tap(pass);
  }
  // The taps of a weight lie together, and a panel takes one of them.
  DEEPMSI_INLINE Panel<A> panel(int64_t pass, int64_t column, int64_t columns, bool, A* to) const {
    const T* from = weights(pass, column);
    const int64_t depth = this->taps.size(pass), taps = this->call.taps, size = this->call.inputs * taps;
    for (int64_t k = 0; k < depth; ++k, from += size, to += kPanel<A>) {
      if (columns == kPanel<A> && taps == 3) {
        for (int64_t c = 0; c < kPanel<A>; ++c) to[c] = to_wide(from[c * 3]);
      } else {
        for (int64_t c = 0; c < kPanel<A>; ++c) to[c] = c < columns ? to_wide(from[c * taps]) : A(0);
      }
    }
    return {to - depth * kPanel<A>, kPanel<A>};
  }
  DEEPMSI_INLINE Ahead ahead(int64_t pass, int64_t column) const {
    return {reinterpret_cast<const char*>(weights(pass, column)),
            this->call.inputs * this->call.taps * static_cast<int64_t>(sizeof(T))};
  }
};

template <typename T>
void normed_grad_x(const CausalConv& call, int64_t begin, int64_t end, char* scratch) {
  using A = typename Storage<T>::Wide;
  const Taps taps{call.outputs, call.taps};
  multiply<A, false>(NormedGradXSide<T>{{call, taps}}, call.batch * call.length, call.inputs, taps.passes(),
                     begin, end, scratch);
}

template <typename T>
struct NormedGradWeightSide : GradWeightSide<T> {
  using A = typename Storage<T>::Wide;
  A* turned;  // as turn_panel lays it out

  DEEPMSI_INLINE void finish(int64_t row, int64_t count, int64_t, int64_t columns, const A* sums,
                             int64_t stride) const {
    const int64_t inputs = this->call.inputs, taps = this->call.taps;
    for (int64_t r = 0; r < count; ++r) {
      A* to = turned + ((row + r) % inputs * taps + (row + r) / inputs) * kPanel<A>;
      for (int64_t c = 0; c < columns; ++c) to[c] = sums[r * stride + c];
    }
  }
};

// With u = v / |v| and w the gradient of g u: grad_g = <w, u>, grad_v = g / |v| (w - <w, u> u).
template <typename T>
DEEPMSI_INLINE void unfold_row(const CausalConv& call, int64_t o, const typename Storage<T>::Wide* w) {
  using A = typename Storage<T>::Wide;
  constexpr int64_t kSums = 64;
  const int64_t size = call.inputs * call.taps;
  const T* v = static_cast<const T*>(call.v) + o * size;
  T* to = static_cast<T*>(call.grad_v) + o * size;
  A sum[kSums] = {};
  int64_t i = 0;
  for (; i + kSums <= size; i += kSums) {
    for (int64_t k = 0; k < kSums; ++k) sum[k] += w[i + k] * to_wide(v[i + k]);
  }
  for (; i < size; ++i) sum[0] += w[i] * to_wide(v[i]);
  double total = 0;
  for (int64_t k = 0; k < kSums; ++k) total += static_cast<double>(sum[k]);
  const A* norms = static_cast<const A*>(call.norms);
  const A norm = norms[o], scale = norms[call.outputs + o];
  const A along = static_cast<A>(total) / norm, back = along / norm;
  static_cast<T*>(call.grad_g)[o] = Storage<T>::narrow(along);
  for (int64_t c = 0; c < size; ++c) to[c] = Storage<T>::narrow(scale * (w[c] - back * to_wide(v[c])));
}

template <typename A>
constexpr int64_t kUnfolded = kPanel<A> < 16 ? kPanel<A> : 16;  // outputs that are turned back at once
// Of their rows: odd in cache lines, as kRowStride is.
template <typename A>
DEEPMSI_INLINE int64_t unfolded_stride(int64_t size) {
  constexpr int64_t kLine = 64 / sizeof(A);
  return ceil_div(size, 2 * kLine) * 2 * kLine + kLine;
}

template <typename T>
void normed_grad_weight(const CausalConv& call, int64_t begin, int64_t end, char* scratch) {
  using A = typename Storage<T>::Wide;
  constexpr int64_t kRows = kUnfolded<A>;
  const int64_t size = call.inputs * call.taps;
  const int64_t stride = unfolded_stride<A>(size);
  A* turned = reinterpret_cast<A*>(scratch);
  A* rows = turned + size * kPanel<A>;
  const NormedGradWeightSide<T> side{{call}, turned};
  for (int64_t p = begin; p < end; ++p) {
    multiply_panel<A, true>(side, size, call.outputs, ceil_div(call.rows(), kDepth), p,
                            reinterpret_cast<char*>(rows + stride * kRows));
    const int64_t first = p * kPanel<A>, count = smaller(kPanel<A>, call.outputs - first);
    for (int64_t from = 0; from < count; from += kRows) {
      int64_t s = 0;
      for (; s + 4 <= size; s += 4) {
        for (int64_t o = 0; o < kRows; o += 4) {
          turn_square(turned + s * kPanel<A> + from + o, kPanel<A>, rows + o * stride + s, stride);
        }
      }
      for (; s < size; ++s) {
        for (int64_t o = 0; o < kRows; ++o) rows[o * stride + s] = turned[s * kPanel<A> + from + o];
      }
      for (int64_t o = from; o < smaller(count, from + kRows); ++o) {
        unfold_row<T>(call, first + o, rows + (o - from) * stride);
      }
    }
  }
}

template <typename A>
int64_t normed_scratch_bytes(const CausalConv& call, int64_t rows) {
  const int64_t size = call.inputs * call.taps;
  return static_cast<int64_t>(sizeof(A)) *
         (size * kPanel<A> + unfolded_stride<A>(size) * kUnfolded<A>)+scratch_bytes<A>(rows);
}

template <typename T>
CausalConvKernels kernels_of() {
  using A = typename Storage<T>::Wide;
  return {forward<T>,   grad_x<T>,         grad_weight<T>,   gradient<T>,
          grad_bias<T>, normed_forward<T>, normed_grad_x<T>, normed_grad_weight<T>,
          kPanel<A>,    tiles<A>,          scratch_bytes<A>, normed_scratch_bytes<A>};
}

}  // namespace causal_conv
}  // namespace

CausalConvKernels causal_conv_kernels(DType dtype) {
  switch (dtype) {
    case DType::kDouble:
      return causal_conv::kernels_of<double>();
    case DType::kBFloat16:
      return causal_conv::kernels_of<BFloat16>();
    case DType::kHalf:
      return causal_conv::kernels_of<Half>();
    default:
      return causal_conv::kernels_of<float>();
  }
}

}  // namespace deepmsi::DEEPMSI_ISA_NAMESPACE

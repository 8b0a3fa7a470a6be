// Visual sequence compression of one frame at a time (Eq. 1 to 3). A frame's rows stay in the second-level
// cache from one step to the next; the similarity of irrelevant and relevant rows exists only in registers.
#include "simd.h"
#include "vsc_compress.h"

namespace deepmsi::DEEPMSI_ISA_NAMESPACE {
namespace {

constexpr double kNormFloor = 1e-6;
constexpr double kDeviationFloor = 1e-3;
// Column sums go through partial sums over this many rows, which bounds their error for long frames.
constexpr int64_t kSumRows = 64;
// Relevant rows of one pass over the irrelevant ones: they stay in the first-level cache.
constexpr int64_t kRelevantBytes = 20 * 1024;

#if DEEPMSI_VECTOR_BYTES == 64
constexpr int kTileLost = 6, kTileKept = 4;
#elif DEEPMSI_VECTOR_BYTES == 32
constexpr int kTileLost = 4, kTileKept = 3;
#else
constexpr int kTileLost = 3, kTileKept = 3;
#endif

// Hands out pieces of a thread's scratch memory, aligned to a cache line.
class Arena {
 public:
  explicit Arena(char* memory) : memory_(memory) {}
  template <typename P>
  P* take(int64_t count) {
    P* piece = reinterpret_cast<P*>(memory_ + used_);
    used_ += (count * static_cast<int64_t>(sizeof(P)) + 63) / 64 * 64;
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  char* memory_;
  int64_t used_ = 0;
};

// Keys whose order as unsigned integers is the order of the numbers, so that selection compares nothing else
// (NaN too has its place).
template <typename A>
struct Key;
template <>
struct Key<float> {
  using type = uint32_t;
};
template <>
struct Key<double> {
  using type = uint64_t;
};

template <typename A>
DEEPMSI_INLINE typename Key<A>::type order_key(A value) {
  using K = typename Key<A>::type;
  value += A(0);  // -0 and +0 are equal
  K bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  constexpr K kSign = K(1) << (8 * sizeof(K) - 1);
  return bits & kSign ? ~bits : bits | kSign;
}

// The `rank`-th highest key (1 is the highest) by radix, and how many keys equal to it are among the `rank`
// highest.
template <typename K>
K select_key(const K* keys, int64_t count, int64_t rank, int64_t* equal) {
  K prefix = 0, mask = 0;
  for (int shift = 8 * static_cast<int>(sizeof(K)) - 8; shift >= 0; shift -= 8) {
    int64_t histogram[256] = {};
    for (int64_t n = 0; n < count; ++n) {
      if ((keys[n] & mask) == prefix) ++histogram[(keys[n] >> shift) & 255];
    }
    int digit = 255;
    while (histogram[digit] < rank) rank -= histogram[digit--];
    prefix |= K(digit) << shift;
    mask |= K(255) << shift;
  }
  *equal = rank;
  return prefix;
}

// Rows of a frame in the type that sums: x itself where that is its storage, else a widened copy.
template <typename T, typename A>
DEEPMSI_INLINE const A* wide_rows(const T* rows, int64_t count, A* copy) {
  if constexpr (sizeof(T) == sizeof(A)) {
    return rows;
  } else {
    widen(rows, copy, count);
    return copy;
  }
}

// Where to compute an output row: in place where the storage is the type that sums, else in `spare`; then
// `narrow_row`.
template <typename T, typename A>
DEEPMSI_INLINE A* row_for(T* row, A* spare) {
  if constexpr (sizeof(T) == sizeof(A)) {
    return row;
  } else {
    return spare;
  }
}
template <typename T, typename A>
DEEPMSI_INLINE void narrow_row(const A* from, T* to, int64_t channels) {
  if constexpr (sizeof(T) != sizeof(A)) narrow(from, to, channels);
}

// The rest of a row, with zeros behind it: what a compiler makes of a loop over scalars differs from place to
// place in its roundings.
template <typename A>
DEEPMSI_INLINE Vec<A> load_rest(const A* p, int64_t count) {
  Vec<A> v = {};
  std::memcpy(&v, p, count * sizeof(A));
  return v;
}

// Norms of kRows rows, each by the same arithmetic, so that equal rows tie; their sum is added to `partial`.
template <typename A, int kRows>
DEEPMSI_INLINE void norms_of_tile(const A* x, int64_t channels, A* norm, A* partial) {
  static_assert(kRows == 1 || kRows == 4);
  Vec<A> squares[kRows] = {};
  const auto add = [&](const Vec<A>* v, Vec<A> sum) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) squares[r] += v[r] * v[r];
    if constexpr (kRows == 4) {
      return sum + ((v[0] + v[1]) + (v[2] + v[3]));
    } else {
      return sum + v[0];
    }
  };
  Vec<A> v[kRows];
  int64_t c = 0;
  for (; c + kLanes<A> <= channels; c += kLanes<A>) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) v[r] = load(x + r * channels + c);
    store(partial + c, add(v, load(partial + c)));
  }
  if (const int64_t rest = channels - c; rest > 0) {
    for (int r = 0; r < kRows; ++r) v[r] = load_rest(x + r * channels + c, rest);
    const Vec<A> sum = add(v, load_rest(partial + c, rest));
    std::memcpy(partial + c, &sum, rest * sizeof(A));
  }
  for (int r = 0; r < kRows; ++r) norm[r] = root(lane_sum<A>(squares[r]));
}

// Norms of the rows, floored, and v, their mean, in one pass.
template <typename A>
void norms_and_mean(const A* x, int64_t rows, int64_t channels, A* norm, A* mean, A* partial) {
  std::memset(mean, 0, channels * sizeof(A));
  for (int64_t start = 0; start < rows; start += kSumRows) {
    const int64_t stop = start + kSumRows < rows ? start + kSumRows : rows;
    std::memset(partial, 0, channels * sizeof(A));
    int64_t n = start;
    for (; n + 4 <= stop; n += 4) norms_of_tile<A, 4>(x + n * channels, channels, norm + n, partial);
    for (; n < stop; ++n) norms_of_tile<A, 1>(x + n * channels, channels, norm + n, partial);
    for_channels<A>(channels, [&](int64_t c, auto tag) {
      put(mean + c, get(mean + c, tag) + get(partial + c, tag), tag);
    });
  }
  const A count = static_cast<A>(rows);
  for_channels<A>(channels, [&](int64_t c, auto tag) { put(mean + c, get(mean + c, tag) / count, tag); });
  for (int64_t n = 0; n < rows; ++n) norm[n] = norm[n] > A(kNormFloor) ? norm[n] : A(kNormFloor);
}

// m = λ g + (1 - λ) v; returns its floored norm.
template <typename A>
A fuse_guide(const A* guide, const A* mean, A weight, int64_t channels, A* fused) {
  for_channels<A>(channels, [&](int64_t c, auto tag) {
    put(fused + c, weight * get(guide + c, tag) + (1 - weight) * get(mean + c, tag), tag);
  });
  const A norm = root(dot(fused, fused, channels));
  return norm > A(kNormFloor) ? norm : A(kNormFloor);
}

// r = N softmax(ŝ / τ)
template <typename A>
void relevance_of(const A* score, int64_t rows, double temperature, bool standardize, A* relevance) {
  double mean = 0, scale = 1;
  if (standardize) {
    double variance = 0;
    for (int64_t n = 0; n < rows; ++n) mean += score[n];
    mean /= static_cast<double>(rows);
    for (int64_t n = 0; n < rows; ++n) variance += (score[n] - mean) * (score[n] - mean);
    const double deviation = __builtin_sqrt(variance / static_cast<double>(rows));
    scale = 1 / (deviation > kDeviationFloor ? deviation : kDeviationFloor);
  }
  scale /= temperature;
  double highest = -__builtin_inf();
  for (int64_t n = 0; n < rows; ++n) highest = score[n] > highest ? score[n] : highest;
  double total = 0;
  for (int64_t n = 0; n < rows; ++n) {
    relevance[n] = exponential(static_cast<A>((score[n] - highest) * scale));
    total += relevance[n];
  }
  const double factor = static_cast<double>(rows) / total;
  for (int64_t n = 0; n < rows; ++n) relevance[n] = static_cast<A>(relevance[n] * factor);
}

// Write 0 to the assignment of rows that stay and -1 to the others; returns how many stay.
template <typename A>
int64_t partition(const VscForward& f, const A* score, const A* relevance, int64_t rows, int32_t* assignment,
                  typename Key<A>::type* keys) {
  int64_t count = f.keep;
  int64_t passed = -1;
  if (f.keep == 0) {
    passed = 0;
    for (int64_t n = 0; n < rows; ++n) {
      const bool stays = relevance[n] >= static_cast<A>(f.threshold);
      assignment[n] = stays ? 0 : -1;
      passed += stays;
    }
    count = passed > f.min_keep ? passed : f.min_keep;
  }
  if (f.capacity > 0 && count > f.capacity) count = f.capacity;
  if (count > rows) count = rows;
  if (count == passed) return count;
  for (int64_t n = 0; n < rows; ++n) keys[n] = order_key(score[n]);
  int64_t equal = 0;
  const auto lowest = select_key(keys, rows, count, &equal);
  for (int64_t n = 0; n < rows; ++n) {
    const bool stays = keys[n] > lowest || (keys[n] == lowest && equal-- > 0);
    assignment[n] = stays ? 0 : -1;
  }
  return count;
}

template <typename T>
void select_frames(const VscForward& f, int64_t begin, int64_t end, char* scratch) {
  using A = typename Storage<T>::Wide;
  const int64_t channels = f.channels;
  for (int64_t b = begin; b < end; ++b) {
    const int64_t first = f.offset[b], rows = f.offset[b + 1] - first;
    A* mean = static_cast<A*>(f.mean) + b * channels;
    if (rows == 0) {
      std::memset(mean, 0, channels * sizeof(A));
      f.count[b] = 0;
      continue;
    }
    Arena arena(scratch);
    A* partial = arena.take<A>(channels);
    A* fused = arena.take<A>(channels);
    auto* keys = arena.take<typename Key<A>::type>(rows);
    A* copy = arena.take<A>(sizeof(T) == sizeof(A) ? 0 : rows * channels);
    const A* x = wide_rows(static_cast<const T*>(f.x) + first * channels, rows * channels, copy);
    A* norm = static_cast<A*>(f.norm) + first;
    A* score = static_cast<A*>(f.score) + first;
    A* relevance = static_cast<A*>(f.relevance) + first;
    norms_and_mean(x, rows, channels, norm, mean, partial);
    const A fused_norm = fuse_guide(static_cast<const A*>(f.guide) + b * channels, mean,
                                    static_cast<A>(f.guide_weight), channels, fused);
    for (int64_t n = 0; n < rows; n += 4) {
      // A short tile repeats its last row: the arithmetic of a row never depends on the tile.
      const A* four[4];
      for (int64_t t = 0; t < 4; ++t) four[t] = x + (n + t < rows ? n + t : rows - 1) * channels;
      const A* one[1] = {fused};
      A product[4];
      dot_tile<A, 4, 1>(four, one, channels, product);
      for (int64_t t = 0; t < 4 && n + t < rows; ++t) score[n + t] = product[t] / (fused_norm * norm[n + t]);
    }
    relevance_of(score, rows, f.temperature, f.standardize, relevance);
    f.count[b] = partition(f, score, relevance, rows, f.assignment + first, keys);
  }
}

// For every lost row the nearest kept one (its number among the kept, the lower among equals) and their
// cosine.
template <typename A>
void nearest_kept(const A* x, const A* norm, int64_t channels, const int32_t* lost, int64_t lost_count,
                  const int32_t* kept, int64_t kept_count, A* best, int32_t* nearest) {
  for (int64_t i = 0; i < lost_count; ++i) best[i] = -static_cast<A>(__builtin_inf()), nearest[i] = 0;
  int64_t block = kRelevantBytes / (channels * static_cast<int64_t>(sizeof(A))) / kTileKept * kTileKept;
  if (block < kTileKept) block = kTileKept;
  for (int64_t k0 = 0; k0 < kept_count; k0 += block) {
    const int64_t k1 = k0 + block < kept_count ? k0 + block : kept_count;
    for (int64_t i0 = 0; i0 < lost_count; i0 += kTileLost) {
      const A* left[kTileLost];
      const int64_t height = lost_count - i0 < kTileLost ? lost_count - i0 : kTileLost;
      // A short tile repeats its last row and drops the copies: the arithmetic of a row never depends on the
      // tile.
      for (int t = 0; t < kTileLost; ++t) left[t] = x + lost[i0 + (t < height ? t : height - 1)] * channels;
      for (int64_t k = k0; k < k1; k += kTileKept) {
        const A* right[kTileKept];
        A inverse[kTileKept];
        const int64_t width = k1 - k < kTileKept ? k1 - k : kTileKept;
        for (int t = 0; t < kTileKept; ++t) {
          const int32_t row = kept[k + (t < width ? t : width - 1)];
          right[t] = x + row * channels;
          inverse[t] = 1 / norm[row];
        }
        A product[kTileLost * kTileKept];
        dot_tile<A, kTileLost, kTileKept>(left, right, channels, product);
        for (int64_t i = 0; i < height; ++i) {
          for (int64_t t = 0; t < width; ++t) {
            const A cosine = product[i * kTileKept + t] * inverse[t];
            if (cosine > best[i0 + i]) best[i0 + i] = cosine, nearest[i0 + i] = static_cast<int32_t>(k + t);
          }
        }
      }
    }
  }
  for (int64_t i = 0; i < lost_count; ++i) best[i] /= norm[lost[i]];
}

// Group what the kept rows receive: sources[first[j] .. first[j + 1]) of kept row j, ascending.
void group_sources(const int32_t* target, int64_t count, int64_t kept_count, int32_t* first,
                   int32_t* sources) {
  std::memset(first, 0, (kept_count + 2) * sizeof(int32_t));
  for (int64_t i = 0; i < count; ++i) {
    if (target[i] >= 0) ++first[target[i] + 2];
  }
  for (int64_t j = 2; j < kept_count + 2; ++j) first[j] += first[j - 1];
  for (int64_t i = 0; i < count; ++i) {
    if (target[i] >= 0) sources[first[target[i] + 1]++] = static_cast<int32_t>(i);
  }
}

template <typename T>
void merge_frames(const VscForward& f, int64_t begin, int64_t end, char* scratch) {
  using A = typename Storage<T>::Wide;
  const int64_t channels = f.channels;
  for (int64_t b = begin; b < end; ++b) {
    const int64_t first = f.offset[b], rows = f.offset[b + 1] - first;
    const int64_t out = f.offset_out[b], kept_count = f.offset_out[b + 1] - out;
    Arena arena(scratch);
    int32_t* kept = arena.take<int32_t>(rows);
    int32_t* lost = arena.take<int32_t>(rows);
    int32_t* nearest = arena.take<int32_t>(rows);
    int32_t* group = arena.take<int32_t>(rows + 2);
    int32_t* sources = arena.take<int32_t>(rows);
    A* best = arena.take<A>(rows);
    A* sum = arena.take<A>(channels);
    A* copy = arena.take<A>(sizeof(T) == sizeof(A) ? 0 : rows * channels);
    const T* stored = static_cast<const T*>(f.x) + first * channels;
    const A* x = wide_rows(stored, rows * channels, copy);
    const A* norm = static_cast<const A*>(f.norm) + first;
    const A* score = static_cast<const A*>(f.score) + first;
    A* closeness = static_cast<A*>(f.closeness) + first;
    int32_t* assignment = f.assignment + first;
    T* tokens = static_cast<T*>(f.tokens) + out * channels;
    T* gate = static_cast<T*>(f.gate) + out;

    int64_t j = 0, lost_count = 0;
    for (int64_t n = 0; n < rows; ++n) {
      closeness[n] = 0;
      if (assignment[n] < 0) {
        lost[lost_count++] = static_cast<int32_t>(n);
        continue;
      }
      assignment[n] = static_cast<int32_t>(out + j);
      f.index[out + j] = first + n;
      gate[j] = Storage<T>::narrow(1 + (score[n] - score[n]));  // NaN where the score is not finite
      kept[j++] = static_cast<int32_t>(n);
    }
    nearest_kept(x, norm, channels, lost, lost_count, kept, kept_count, best, nearest);
    for (int64_t i = 0; i < lost_count; ++i) {
      closeness[lost[i]] = best[i];
      if (!(best[i] >= static_cast<A>(f.fuse_threshold))) nearest[i] = -1;
      assignment[lost[i]] = nearest[i] < 0 ? -1 : static_cast<int32_t>(out + nearest[i]);
    }
    group_sources(nearest, lost_count, kept_count, group, sources);
    const A alpha = static_cast<A>(f.fuse_alpha);
    for (j = 0; j < kept_count; ++j) {
      T* y = tokens + j * channels;
      if (group[j] == group[j + 1]) {
        std::memcpy(y, stored + kept[j] * channels, channels * sizeof(T));
        continue;
      }
      A total = 0;
      std::memset(sum, 0, channels * sizeof(A));
      for (int32_t k = group[j]; k < group[j + 1]; ++k) {
        const A weight = exponential(best[sources[k]]);
        const A* row = x + lost[sources[k]] * channels;
        total += weight;
        for_channels<A>(channels, [&](int64_t c, auto tag) {
          put(sum + c, get(sum + c, tag) + weight * get(row + c, tag), tag);
        });
      }
      const A share = (1 - alpha) / total;
      const A* row = x + kept[j] * channels;
      A* fused = row_for(y, sum);
      for_channels<A>(channels, [&](int64_t c, auto tag) {
        put(fused + c, alpha * get(row + c, tag) + share * get(sum + c, tag), tag);
      });
      narrow_row(fused, y, channels);
    }
  }
}

// Gradients of one frame. With G = ∂L/∂gate, Y = ∂L/∂tokens, W = Σ ω over the tokens i that j receives:
//   dm   = Σ_j G_j x_j / (|m| n_j) - (Σ_j G_j s_j) m / |m|²,   dg = λ dm,   dλ = ⟨dm, g - v⟩,   dv = (1 - λ)
//   dm dω_i = (1 - α) ⟨Y_j, x_i - x̄_j⟩ / W,   dc_i = ω_i dω_i dx_i = dv / N + (1 - α) ω_i / W · Y_j + dc_i
//   (x_j / (n_i n_j) - c_i x_i / n_i²) dx_j = dv / N + (α or 1) Y_j + G_j (m / (|m| n_j) - s_j x_j / n_j²) +
//   Σ_i dc_i (x_i / (n_i n_j) - c_i x_j / n_j²)
// A floored norm is a constant: its last term falls away.
template <typename T>
void backward_frames(const VscBackward& f, int64_t begin, int64_t end, char* scratch) {
  using A = typename Storage<T>::Wide;
  const int64_t channels = f.channels;
  const A lambda = static_cast<A>(f.guide_weight), alpha = static_cast<A>(f.fuse_alpha);
  const A floor = static_cast<A>(kNormFloor);
  for (int64_t b = begin; b < end; ++b) {
    const int64_t first = f.offset[b], rows = f.offset[b + 1] - first;
    const int64_t out = f.offset_out[b], kept_count = f.offset_out[b + 1] - out;
    A* grad_guide = static_cast<A*>(f.grad_guide) + b * channels;
    if (rows == 0) {
      std::memset(grad_guide, 0, channels * sizeof(A));
      f.grad_weight[b] = 0;
      continue;
    }
    Arena arena(scratch);
    int32_t* target = arena.take<int32_t>(rows);
    int32_t* group = arena.take<int32_t>(rows + 2);
    int32_t* sources = arena.take<int32_t>(rows);
    A* weight = arena.take<A>(rows);
    A* product = arena.take<A>(rows);
    A* fused = arena.take<A>(channels);
    A* base = arena.take<A>(channels);
    A* sum = arena.take<A>(channels);
    A* partial = arena.take<A>(channels);
    A* wide_grad = arena.take<A>(channels);
    A* copy = arena.take<A>(sizeof(T) == sizeof(A) ? 0 : rows * channels);
    const A* x = wide_rows(static_cast<const T*>(f.x) + first * channels, rows * channels, copy);
    const A* norm = static_cast<const A*>(f.norm) + first;
    const A* score = static_cast<const A*>(f.score) + first;
    const A* closeness = static_cast<const A*>(f.closeness) + first;
    const A* mean = static_cast<const A*>(f.mean) + b * channels;
    const A* guide = static_cast<const A*>(f.guide) + b * channels;
    const T* grad_gate = f.grad_gate ? static_cast<const T*>(f.grad_gate) + out : nullptr;
    const T* grad_tokens = f.grad_tokens ? static_cast<const T*>(f.grad_tokens) + out * channels : nullptr;
    T* grad_x = static_cast<T*>(f.grad_x) + first * channels;

    A fused_norm = 1;
    std::memset(base, 0, channels * sizeof(A));
    if (grad_gate != nullptr) {
      fused_norm = fuse_guide(guide, mean, lambda, channels, fused);
      double along = 0;
      // `sum` collects Σ_j G_j x_j / (|m| n_j) through partial sums over a few rows.
      std::memset(sum, 0, channels * sizeof(A));
      for (int64_t start = 0; start < kept_count; start += kSumRows) {
        const int64_t stop = start + kSumRows < kept_count ? start + kSumRows : kept_count;
        std::memset(partial, 0, channels * sizeof(A));
        for (int64_t j = start; j < stop; ++j) {
          const int64_t n = f.index[out + j] - first;
          const A g = to_wide(grad_gate[j]), scale = g / (fused_norm * norm[n]);
          const A* row = x + n * channels;
          along += static_cast<double>(g) * score[n];
          for_channels<A>(channels, [&](int64_t c, auto tag) {
            put(partial + c, get(partial + c, tag) + scale * get(row + c, tag), tag);
          });
        }
        for_channels<A>(channels, [&](int64_t c, auto tag) {
          put(sum + c, get(sum + c, tag) + get(partial + c, tag), tag);
        });
      }
      const A pull = fused_norm > floor ? static_cast<A>(along) / (fused_norm * fused_norm) : A(0);
      const A spread = (1 - lambda) / static_cast<A>(rows);
      for_channels<A>(channels, [&](int64_t c, auto tag) {
        const auto dm = get(sum + c, tag) - pull * get(fused + c, tag);
        put(grad_guide + c, lambda * dm, tag);
        put(base + c, spread * dm, tag);
        put(sum + c, dm, tag);
      });
      for_channels<A>(channels, [&](int64_t c, auto tag) {
        put(partial + c, get(guide + c, tag) - get(mean + c, tag), tag);
      });
      f.grad_weight[b] = static_cast<double>(dot(sum, partial, channels));
    } else {
      std::memset(grad_guide, 0, channels * sizeof(A));
      f.grad_weight[b] = 0;
    }

    // Kept rows are no sources; dropped rows get the share of the mean alone.
    for (int64_t n = 0; n < rows; ++n) {
      const int32_t row = f.assignment[first + n];
      target[n] = row < 0 || f.index[row] == first + n ? -1 : row - static_cast<int32_t>(out);
      if (row < 0) narrow(base, grad_x + n * channels, channels);
    }
    group_sources(target, rows, kept_count, group, sources);
    for (int64_t j = 0; j < kept_count; ++j) {
      const int64_t n = f.index[out + j] - first;
      const A* row = x + n * channels;
      const A* y = nullptr;
      if (grad_tokens != nullptr) {
        y = wide_rows(grad_tokens + j * channels, channels, wide_grad);
      }
      const A g = grad_gate != nullptr ? to_wide(grad_gate[j]) : A(0);
      const bool floored = !(norm[n] > floor);
      const bool receives = y != nullptr && group[j] != group[j + 1];
      A own = floored ? A(0) : -g * score[n] / (norm[n] * norm[n]);
      const A toward = g / (fused_norm * norm[n]);
      if (receives) {
        A total = 0, average = 0;
        for (int32_t k = group[j]; k < group[j + 1]; ++k) {
          const int32_t i = sources[k];
          weight[i] = exponential(closeness[i]);
          product[i] = dot(y, x + i * channels, channels);
          total += weight[i];
          average += weight[i] * product[i];
        }
        average /= total;
        std::memset(sum, 0, channels * sizeof(A));
        for (int32_t k = group[j]; k < group[j + 1]; ++k) {
          const int32_t i = sources[k];
          const A* source = x + i * channels;
          const A share = (1 - alpha) * weight[i] / total;
          const A pull = share * (product[i] - average);
          const A across = pull / (norm[i] * norm[n]);
          const A inward = norm[i] > floor ? -pull * closeness[i] / (norm[i] * norm[i]) : A(0);
          if (!floored) own -= pull * closeness[i] / (norm[n] * norm[n]);
          A* grad = row_for(grad_x + i * channels, partial);
          for_channels<A>(channels, [&](int64_t c, auto tag) {
            put(sum + c, get(sum + c, tag) + across * get(source + c, tag), tag);
            put(grad + c,
                get(base + c, tag) + share * get(y + c, tag) +
                    (across * get(row + c, tag) + inward * get(source + c, tag)),
                tag);
          });
          narrow_row(grad, grad_x + i * channels, channels);
        }
      } else {
        for (int32_t k = group[j]; k < group[j + 1]; ++k)
          narrow(base, grad_x + sources[k] * channels, channels);
      }
      const A direct = y == nullptr ? A(0) : receives ? alpha : A(1);
      const A* incoming = y == nullptr ? row : y;
      A* grad = row_for(grad_x + n * channels, partial);
      if (grad_gate == nullptr && !receives) {
        for_channels<A>(channels,
                        [&](int64_t c, auto tag) { put(grad + c, direct * get(incoming + c, tag), tag); });
      } else if (!receives) {
        for_channels<A>(channels, [&](int64_t c, auto tag) {
          put(grad + c,
              get(base + c, tag) + direct * get(incoming + c, tag) +
                  (toward * get(fused + c, tag) + own * get(row + c, tag)),
              tag);
        });
      } else if (grad_gate == nullptr) {
        for_channels<A>(channels, [&](int64_t c, auto tag) {
          put(grad + c, direct * get(incoming + c, tag) + (get(sum + c, tag) + own * get(row + c, tag)), tag);
        });
      } else {
        for_channels<A>(channels, [&](int64_t c, auto tag) {
          put(grad + c,
              get(base + c, tag) + direct * get(incoming + c, tag) + toward * get(fused + c, tag) +
                  (get(sum + c, tag) + own * get(row + c, tag)),
              tag);
        });
      }
      narrow_row(grad, grad_x + n * channels, channels);
    }
  }
}

template <typename T>
int64_t scratch_bytes(int64_t longest, int64_t channels) {
  using A = typename Storage<T>::Wide;
  // An upper bound on what the three kernels take from their arenas, each piece rounded up to a cache line.
  const int64_t pieces = 16;
  return longest * static_cast<int64_t>(4 * sizeof(int32_t) + sizeof(int32_t) + 2 * sizeof(A)) + 2 * 4 +
         channels * static_cast<int64_t>(5 * sizeof(A)) +
         (sizeof(T) == sizeof(A) ? 0 : longest * channels * static_cast<int64_t>(sizeof(A))) + pieces * 64;
}

template <typename T>
VscKernels kernels_of() {
  return {select_frames<T>, merge_frames<T>, backward_frames<T>, scratch_bytes<T>};
}

}  // namespace

VscKernels vsc_kernels(DType dtype) {
  switch (dtype) {
    case DType::kDouble:
      return kernels_of<double>();
    case DType::kBFloat16:
      return kernels_of<BFloat16>();
    case DType::kHalf:
      return kernels_of<Half>();
    default:
      return kernels_of<float>();
  }
}

}  // namespace deepmsi::DEEPMSI_ISA_NAMESPACE

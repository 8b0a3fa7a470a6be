// Visual sequence compression (Eq. 1 to 3) under the CUDA key. Forward: norms and column sums; scores,
// relevance, the k-th score and an order-preserving compaction, a block a frame; offsets of the output;
// nearest relevant rows by tiles whose similarities live in registers; merges gathered per relevant row.
// Every sum has an order that depends on shapes alone, and nothing accumulates through atomics. Sums are in
// true float32 (float64 for float64).
#include "tensors.cuh"

namespace deepmsi {
namespace {

constexpr const char* kOp = "vsc_compress";
constexpr double kNormFloor = 1e-6;
constexpr double kDeviationFloor = 1e-3;

constexpr int kFrameThreads = 512;  // of the kernels with a block a frame
constexpr int kPartThreads = 256;   // of the kernels with a few blocks a frame
constexpr int kRowWarps = 8;        // rows of a block of the kernels with a warp a row
constexpr int kSumRows = 32;        // rows of one partial column sum
constexpr int kTailBlocks = 16;     // blocks that clear what lies past the last frame
// Channels that a lane holds at once.
template <typename A>
constexpr int kLaneChannels = 32 / static_cast<int>(sizeof(A));
constexpr int kTileLost = 32, kTileKept = 64, kTileDepth = 16, kTileThreads = 128;

// Where the frames lie in the rows of x. Offsets come from the device unread, so they are kept within the
// rows.
struct Frames {
  const int32_t* cu;  // null where x is dense
  int64_t frames, length, rows;

  __device__ int64_t begin(int64_t b) const {
    if (cu == nullptr) return b * length;
    const int64_t row = cu[b];
    return row < 0 ? 0 : row > rows ? rows : row;
  }
  __device__ int64_t end(int64_t b) const {
    const int64_t first = begin(b), last = begin(b + 1);
    return last < first ? first : last;
  }
  __device__ int64_t tail() const { return begin(frames); }
  // The frame of a row before tail().
  __device__ int64_t of(int64_t row) const {
    if (cu == nullptr) return row / length;
    int64_t low = 0, high = frames - 1;
    while (low < high) {
      const int64_t middle = (low + high + 1) / 2;
      if (cu[middle] <= row) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    return low;
  }
};

// Frames of the output, always packed.
__device__ int64_t frame_of_output(const int32_t* cu_out, int64_t frames, int64_t row) {
  return Frames{cu_out, frames, 0, INT32_MAX}.of(row);
}

// Blocks a frame: from shapes alone, so that the order of a sum is the same on every device.
int64_t parts_of(int64_t rows, int64_t frames, int64_t each) {
  const int64_t parts = ceil_div(ceil_div(rows, frames > 0 ? frames : 1), each);
  return parts < 1 ? 1 : parts > 64 ? 64 : parts;
}

// Unsigned integers in the order of the numbers; -0 and +0 are equal, NaN too has its place.
__device__ inline uint32_t order_key(float value) {
  const uint32_t bits = __float_as_uint(value + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ inline uint64_t order_key(double value) {
  const uint64_t bits = static_cast<uint64_t>(__double_as_longlong(value + 0.0));
  constexpr uint64_t kSign = uint64_t(1) << 63;
  return bits & kSign ? ~bits : bits | kSign;
}

template <typename A, typename L, typename R>
__device__ A warp_dot(const L* left, const R* right, int64_t channels) {
  A sum = 0;
#pragma unroll 4
  for (int64_t c = threadIdx.x % kWarp; c < channels; c += kWarp) {
    sum += static_cast<A>(left[c]) * static_cast<A>(right[c]);
  }
  return warp_sum(sum);
}

// Floored norms, and column sums of a share of each frame [B, parts, C].
template <typename T>
__global__ void __launch_bounds__(kPartThreads)
    statistics_kernel(const T* x, Frames frames, int64_t channels, int64_t parts, wide_t<T>* norm,
                      wide_t<T>* partial) {
  using A = wide_t<T>;
  const int64_t b = blockIdx.x / parts, part = blockIdx.x % parts;
  const int64_t first = frames.begin(b), last = frames.end(b), share = (last - first + parts - 1) / parts;
  const int64_t start = first + part * share, stop = start + share < last ? start + share : last;
  A* sums = partial + static_cast<int64_t>(blockIdx.x) * channels;
  for (int64_t c = threadIdx.x; c < channels; c += kPartThreads) sums[c] = 0;
  for (int64_t r0 = start; r0 < stop; r0 += kSumRows) {
    const int64_t r1 = r0 + kSumRows < stop ? r0 + kSumRows : stop;
    for (int64_t r = r0 + threadIdx.x / kWarp; r < r1; r += kPartThreads / kWarp) {
      const A length = sqrt(warp_dot<A>(x + r * channels, x + r * channels, channels));
      if (threadIdx.x % kWarp == 0) norm[r] = length > A(kNormFloor) ? length : A(kNormFloor);
    }
    for (int64_t c = threadIdx.x; c < channels; c += kPartThreads) {
      A sum = 0;
#pragma unroll 4
      for (int64_t r = r0; r < r1; ++r) sum += static_cast<A>(x[r * channels + c]);
      sums[c] += sum;
    }
  }
}

// m = λ g + (1 - λ) v of a frame into `fused`; returns its floored norm.
template <typename A>
__device__ A fuse_guide(const A* guide, const A* mean, A lambda, int64_t channels, A* fused) {
  A square = 0;
  for (int64_t c = threadIdx.x; c < channels; c += blockDim.x) {
    const A m = lambda * guide[c] + (1 - lambda) * mean[c];
    fused[c] = m;
    square += m * m;
  }
  const A length = sqrt(block_sum(square));
  return length > A(kNormFloor) ? length : A(kNormFloor);
}

template <typename T>
struct Forward {
  using A = wide_t<T>;
  const T* x;
  Frames frames;
  const A *guide, *guide_weight, *partial;
  int64_t channels, parts, keep, capacity, min_keep;  // keep and capacity: 0 where there is none
  A temperature, threshold, fuse_threshold, fuse_alpha;
  bool standardize;
  A *relevance, *score, *norm, *closeness, *mean, *fused;
  int32_t *assignment, *count, *order, *cu_out;
};

// r = N softmax(ŝ / τ) of a frame's scores; returns how many are at least the threshold.
template <typename T>
__device__ int64_t relevance_of(const Forward<T>& f, int64_t first, int64_t rows) {
  using A = wide_t<T>;
  const A *score = f.score + first, count = static_cast<A>(rows);
  A centre = 0, scale = 1;
  if (f.standardize) {
    A sum = 0, square = 0;
    for (int64_t n = threadIdx.x; n < rows; n += blockDim.x) sum += score[n];
    centre = block_sum(sum) / count;
    for (int64_t n = threadIdx.x; n < rows; n += blockDim.x)
      square += (score[n] - centre) * (score[n] - centre);
    const A deviation = sqrt(block_sum(square) / count);
    scale = deviation > A(kDeviationFloor) ? deviation : A(kDeviationFloor);
  }
  A highest = -INFINITY, sum = 0;
  for (int64_t n = threadIdx.x; n < rows; n += blockDim.x) {
    const A value = (score[n] - centre) / scale / f.temperature;
    f.relevance[first + n] = value;
    highest = value > highest ? value : highest;
  }
  highest = block_max(highest, A(-INFINITY));
  for (int64_t n = threadIdx.x; n < rows; n += blockDim.x) {
    const A value = exp(f.relevance[first + n] - highest);
    f.relevance[first + n] = value;
    sum += value;
  }
  sum = block_sum(sum);
  int32_t above = 0;
  for (int64_t n = threadIdx.x; n < rows; n += blockDim.x) {
    const A value = count * f.relevance[first + n] / sum;
    f.relevance[first + n] = value;
    above += value >= f.threshold;
  }
  return block_sum(above);
}

// Scores, relevance and partition of one frame: its rows in `order`, first the kept ones, then the others.
template <typename T>
__global__ void __launch_bounds__(kFrameThreads) select_kernel(Forward<T> f) {
  using A = wide_t<T>;
  const int64_t b = blockIdx.x;
  if (b >= f.frames.frames) {
    const int64_t step = kTailBlocks * kFrameThreads;
    for (int64_t n = f.frames.tail() + (b - f.frames.frames) * kFrameThreads + threadIdx.x; n < f.frames.rows;
         n += step) {
      f.relevance[n] = f.score[n] = f.norm[n] = f.closeness[n] = 0;
      f.assignment[n] = -1;
    }
    return;
  }
  const int64_t first = f.frames.begin(b), rows = f.frames.end(b) - first, channels = f.channels;
  A *mean = f.mean + b * channels, *fused = f.fused + b * channels;
  for (int64_t c = threadIdx.x; c < channels; c += kFrameThreads) {
    A sum = 0;
    for (int64_t p = 0; p < f.parts; ++p) sum += f.partial[(b * f.parts + p) * channels + c];
    mean[c] = rows > 0 ? sum / static_cast<A>(rows) : A(0);
  }
  if (rows == 0) {
    if (threadIdx.x == 0) f.count[b] = 0;
    return;
  }
  const A fused_norm = fuse_guide(f.guide + b * channels, mean, *f.guide_weight, channels, fused);
  for (int64_t n = threadIdx.x / kWarp; n < rows; n += kFrameThreads / kWarp) {
    const A product = warp_dot<A>(f.x + (first + n) * channels, fused, channels);
    if (threadIdx.x % kWarp == 0) f.score[first + n] = product / (fused_norm * f.norm[first + n]);
  }
  __syncthreads();
  const int64_t above = relevance_of(f, first, rows);

  int64_t kept = f.keep > 0 ? f.keep : above > f.min_keep ? above : f.min_keep;
  if (f.capacity > 0 && kept > f.capacity) kept = f.capacity;
  if (kept > rows) kept = rows;

  // The kept-th highest key is the largest one that at least `kept` keys reach: bit by bit from the top.
  using K = decltype(order_key(A(0)));
  const A* score = f.score + first;
  K limit = 0;
  for (K bit = K(1) << (8 * sizeof(K) - 1); bit != 0; bit >>= 1) {
    const K candidate = limit | bit;
    int64_t reach = 0;
    for (int64_t n0 = 0; n0 < rows; n0 += kFrameThreads) {
      const int64_t n = n0 + threadIdx.x;
      reach += __syncthreads_count(n < rows && order_key(score[n]) >= candidate);
    }
    if (reach >= kept) limit = candidate;
  }
  int64_t higher = 0;
  for (int64_t n0 = 0; n0 < rows; n0 += kFrameThreads) {
    const int64_t n = n0 + threadIdx.x;
    higher += __syncthreads_count(n < rows && order_key(score[n]) > limit);
  }

  // Of the rows equal to the limit the lowest stay. Ranks by prefix sums keep the order of the input.
  int64_t equal_before = 0, kept_before = 0;
  for (int64_t n0 = 0; n0 < rows; n0 += kFrameThreads) {
    const int64_t n = n0 + threadIdx.x;
    const bool equal = n < rows && order_key(score[n]) == limit;
    const bool over = n < rows && order_key(score[n]) > limit;
    int32_t equal_total, kept_total;
    const int32_t equal_rank = block_scan(equal, &equal_total);
    const bool stays = over || (equal && equal_before + equal_rank <= kept - higher);
    const int64_t rank = kept_before + block_scan(stays, &kept_total) - stays;
    if (n < rows) f.order[first + (stays ? rank : kept + n - rank)] = static_cast<int32_t>(n);
    equal_before += equal_total;
    kept_before += kept_total;
  }
  if (threadIdx.x == 0) f.count[b] = static_cast<int32_t>(kept);
}

__global__ void __launch_bounds__(kFrameThreads)
    offsets_kernel(const int32_t* count, int64_t frames, int32_t* cu_out) {
  if (threadIdx.x == 0) cu_out[0] = 0;
  int32_t before = 0;
  for (int64_t b0 = 0; b0 < frames; b0 += kFrameThreads) {
    const int64_t b = b0 + threadIdx.x;
    int32_t total;
    const int32_t sum = block_scan(b < frames ? count[b] : 0, &total);
    if (b < frames) cu_out[b + 1] = before + sum;
    before += total;
  }
}

// Assignment and closeness of every row: kept rows go to their own output row, each other one to that of its
// nearest kept row (the lower among equals) or nowhere. A thread holds four by four cosines of a tile.
template <typename T>
__global__ void __launch_bounds__(kTileThreads) nearest_kernel(Forward<T> f, int64_t parts) {
  using A = wide_t<T>;
  __shared__ A left[kTileDepth][kTileLost + 4], right[kTileDepth][kTileKept + 4], inverse[kTileKept];
  __shared__ int32_t left_row[kTileLost], right_row[kTileKept];
  const int64_t b = blockIdx.x / parts, part = blockIdx.x % parts, channels = f.channels;
  const int64_t first = f.frames.begin(b), rows = f.frames.end(b) - first, kept = f.count[b],
                lost = rows - kept;
  const int32_t out = f.cu_out[b];
  const int32_t* order = f.order + first;
  const T* x = f.x + first * channels;
  const A* norm = f.norm + first;
  for (int64_t j = part * kTileThreads + threadIdx.x; j < kept; j += parts * kTileThreads) {
    f.assignment[first + order[j]] = out + static_cast<int32_t>(j);
    f.closeness[first + order[j]] = 0;
  }
  const int column = threadIdx.x % (kTileKept / 4) * 4, line = threadIdx.x / (kTileKept / 4) * 4;
  for (int64_t i0 = part * kTileLost; i0 < lost; i0 += parts * kTileLost) {
    A best[4];
    int32_t nearest[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) best[i] = -INFINITY, nearest[i] = 0;
    for (int64_t k0 = 0; k0 < kept; k0 += kTileKept) {
      __syncthreads();  // the last tile has been read
      // A short tile repeats its last row: the arithmetic of a row never depends on the tile.
      if (threadIdx.x < kTileLost) {
        const int64_t i = i0 + threadIdx.x;
        left_row[threadIdx.x] = order[kept + (i < lost ? i : lost - 1)];
      }
      if (threadIdx.x < kTileKept) {
        const int64_t k = k0 + threadIdx.x;
        const int32_t row = order[k < kept ? k : kept - 1];
        right_row[threadIdx.x] = row;
        inverse[threadIdx.x] = 1 / norm[row];
      }
      A product[4][4] = {};
      for (int64_t c0 = 0; c0 < channels; c0 += kTileDepth) {
        __syncthreads();
        const int64_t c = c0 + threadIdx.x % kTileDepth;
#pragma unroll
        for (int t = threadIdx.x / kTileDepth; t < kTileLost; t += kTileThreads / kTileDepth) {
          left[threadIdx.x % kTileDepth][t] =
              c < channels ? static_cast<A>(x[left_row[t] * channels + c]) : A(0);
        }
#pragma unroll
        for (int t = threadIdx.x / kTileDepth; t < kTileKept; t += kTileThreads / kTileDepth) {
          right[threadIdx.x % kTileDepth][t] =
              c < channels ? static_cast<A>(x[right_row[t] * channels + c]) : A(0);
        }
        __syncthreads();
#pragma unroll
        for (int d = 0; d < kTileDepth; ++d) {
          A l[4], r[4];
#pragma unroll
          for (int u = 0; u < 4; ++u) l[u] = left[d][line + u], r[u] = right[d][column + u];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
#pragma unroll
            for (int k = 0; k < 4; ++k) product[i][k] += l[i] * r[k];
          }
        }
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if (k0 + column + k < kept) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const A cosine = product[i][k] * inverse[column + k];
            if (cosine > best[i]) best[i] = cosine, nearest[i] = static_cast<int32_t>(k0 + column + k);
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int offset = kTileKept / 8; offset > 0; offset /= 2) {
        const A other = __shfl_xor_sync(kAllLanes, best[i], offset);
        const int32_t at = __shfl_xor_sync(kAllLanes, nearest[i], offset);
        if (other > best[i] || (other == best[i] && at < nearest[i])) best[i] = other, nearest[i] = at;
      }
      if (column == 0 && i0 + line + i < lost) {
        const int32_t row = order[kept + i0 + line + i];
        const A cosine = best[i] / norm[row];
        f.closeness[first + row] = cosine;
        f.assignment[first + row] = cosine >= f.fuse_threshold ? out + nearest[i] : -1;
      }
    }
  }
}

// Call f with every row of a frame, ascending, that goes to output row `wanted` and is not `self`. Whole
// warps call it.
template <typename F>
__device__ void each_source(const int32_t* assignment, int64_t begin, int64_t end, int32_t wanted,
                            int64_t self, F f) {
  for (int64_t base = begin; base < end; base += kWarp) {
    const int64_t n = base + threadIdx.x % kWarp;
    unsigned found = __ballot_sync(kAllLanes, n < end && n != self && assignment[n] == wanted);
    for (; found != 0; found &= found - 1) f(base + __ffs(found) - 1);
  }
}

// A warp an output row: y_j = α x_j + (1 - α) Σ ω x / Σ ω over what it receives, in ascending order.
template <typename T>
__global__ void __launch_bounds__(kRowWarps* kWarp)
    merge_kernel(Forward<T> f, int64_t packed, T* tokens, int64_t* index, T* gate) {
  using A = wide_t<T>;
  constexpr int kHeld = kLaneChannels<A>;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRowWarps + threadIdx.x / kWarp,
                channels = f.channels;
  const int lane = threadIdx.x % kWarp;
  if (row >= packed) return;
  T* y = tokens + row * channels;
  if (f.frames.frames == 0 || row >= f.cu_out[f.frames.frames]) {
    for (int64_t c = lane; c < channels; c += kWarp) y[c] = static_cast<T>(A(0));
    if (lane == 0) index[row] = -1, gate[row] = static_cast<T>(A(0));
    return;
  }
  const int64_t b = frame_of_output(f.cu_out, f.frames.frames, row);
  const int64_t first = f.frames.begin(b), last = f.frames.end(b);
  const int64_t self = first + f.order[first + row - f.cu_out[b]];
  if (lane == 0) {
    const A score = f.score[self];
    index[row] = self, gate[row] = static_cast<T>(1 + (score - score));  // NaN where the score is not finite
  }
  A total = 0;
  each_source(f.assignment, first, last, static_cast<int32_t>(row), self,
              [&](int64_t i) { total += exp(f.closeness[i]); });
  const T* own = f.x + self * channels;
  if (total == 0) {
    for (int64_t c = lane; c < channels; c += kWarp) y[c] = own[c];
    return;
  }
  const A share = (1 - f.fuse_alpha) / total;
  for (int64_t c0 = 0; c0 < channels; c0 += kHeld * kWarp) {
    A sum[kHeld] = {};
    each_source(f.assignment, first, last, static_cast<int32_t>(row), self, [&](int64_t i) {
      const A weight = exp(f.closeness[i]);
#pragma unroll
      for (int u = 0; u < kHeld; ++u) {
        const int64_t c = c0 + u * kWarp + lane;
        if (c < channels) sum[u] += weight * static_cast<A>(f.x[i * channels + c]);
      }
    });
#pragma unroll
    for (int u = 0; u < kHeld; ++u) {
      const int64_t c = c0 + u * kWarp + lane;
      if (c < channels) y[c] = static_cast<T>(f.fuse_alpha * static_cast<A>(own[c]) + share * sum[u]);
    }
  }
}

// Gradients of one frame. With G = ∂L/∂gate, Y = ∂L/∂tokens, W = Σ ω over the tokens i that j receives:
//   dm = Σ_j G_j x_j / (|m| n_j) - (Σ_j G_j s_j) m / |m|²,   dg = λ dm,   dλ = ⟨dm, g - v⟩,   dv = (1 - λ) dm
//   dc_i = (1 - α) ω_i / W ⟨Y_j, x_i - x̄_j⟩
//   dx_i = dv / N + (1 - α) ω_i / W Y_j + dc_i (x_j / (n_i n_j) - c_i x_i / n_i²)
//   dx_j = dv / N + (α or 1) Y_j + G_j (m / (|m| n_j) - s_j x_j / n_j²) + Σ_i dc_i (x_i / (n_i n_j) - c_i x_j
//   / n_j²)
// A floored norm is a constant: its last term falls away.
template <typename T>
struct Backward {
  using A = wide_t<T>;
  const T *grad_tokens, *grad_gate, *x;
  Frames frames;
  const A *guide, *guide_weight, *score, *norm, *closeness, *mean;
  const int32_t *cu_out, *assignment;
  const int64_t* index;
  int64_t channels, packed, parts;
  A fuse_alpha;
  A *partial, *fused, *fused_norm, *base, *product;
  double* weight;
  T* grad_x;
  A *grad_guide, *grad_weight;
};

// Σ_j G_j x_j / n_j over a share of each frame's kept rows [B, parts, C].
template <typename T>
__global__ void __launch_bounds__(kPartThreads) pull_kernel(Backward<T> f) {
  using A = wide_t<T>;
  const int64_t b = blockIdx.x / f.parts, part = blockIdx.x % f.parts;
  const int64_t first = f.cu_out[b], last = f.cu_out[b + 1], share = (last - first + f.parts - 1) / f.parts;
  const int64_t start = first + part * share, stop = start + share < last ? start + share : last;
  for (int64_t c = threadIdx.x; c < f.channels; c += kPartThreads) {
    A sum = 0;
    for (int64_t j0 = start; j0 < stop; j0 += kSumRows) {
      A inner = 0;
      for (int64_t j = j0; j < j0 + kSumRows && j < stop; ++j) {
        const int64_t n = f.index[j];
        inner += static_cast<A>(f.grad_gate[j]) / f.norm[n] * static_cast<A>(f.x[n * f.channels + c]);
      }
      sum += inner;
    }
    f.partial[static_cast<int64_t>(blockIdx.x) * f.channels + c] = sum;
  }
}

// Gradients of the guide and of λ, and `base`, the share of dv that every row of the frame gets.
template <typename T>
__global__ void __launch_bounds__(kFrameThreads) guide_kernel(Backward<T> f) {
  using A = wide_t<T>;
  const int64_t b = blockIdx.x, channels = f.channels, rows = f.frames.end(b) - f.frames.begin(b);
  A *grad_guide = f.grad_guide + b * channels, *base = f.base + b * channels, *fused = f.fused + b * channels;
  if (f.grad_gate == nullptr || rows == 0) {
    for (int64_t c = threadIdx.x; c < channels; c += kFrameThreads) grad_guide[c] = base[c] = fused[c] = 0;
    if (threadIdx.x == 0) f.fused_norm[b] = 1, f.weight[b] = 0;
    return;
  }
  const A *guide = f.guide + b * channels, *mean = f.mean + b * channels;
  const A lambda = *f.guide_weight, length = fuse_guide(guide, mean, lambda, channels, fused);
  double along = 0;
  for (int64_t j = f.cu_out[b] + threadIdx.x; j < f.cu_out[b + 1]; j += kFrameThreads) {
    along += static_cast<double>(static_cast<A>(f.grad_gate[j])) * static_cast<double>(f.score[f.index[j]]);
  }
  along = block_sum(along);
  const A pull = length > A(kNormFloor) ? static_cast<A>(along) / (length * length) : A(0);
  double weight = 0;
  for (int64_t c = threadIdx.x; c < channels; c += kFrameThreads) {
    A sum = 0;
    for (int64_t p = 0; p < f.parts; ++p) sum += f.partial[(b * f.parts + p) * channels + c];
    const A dm = sum / length - pull * fused[c];
    grad_guide[c] = lambda * dm;
    base[c] = (1 - lambda) / static_cast<A>(rows) * dm;
    weight += static_cast<double>(dm) * static_cast<double>(guide[c] - mean[c]);
  }
  weight = block_sum(weight);
  if (threadIdx.x == 0) f.fused_norm[b] = length, f.weight[b] = weight;
}

template <typename A>
__global__ void __launch_bounds__(kFrameThreads)
    weight_kernel(const double* weight, int64_t frames, A* grad_weight) {
  double sum = 0;
  for (int64_t b = threadIdx.x; b < frames; b += kFrameThreads) sum += weight[b];
  sum = block_sum(sum);
  if (threadIdx.x == 0) *grad_weight = static_cast<A>(sum);
}

// A warp an input row. That of a kept row writes the gradients of the rows which it received too.
template <typename T>
__global__ void __launch_bounds__(kRowWarps* kWarp) rows_kernel(Backward<T> f) {
  using A = wide_t<T>;
  constexpr int kHeld = kLaneChannels<A>;
  const int64_t self = static_cast<int64_t>(blockIdx.x) * kRowWarps + threadIdx.x / kWarp,
                channels = f.channels;
  const int lane = threadIdx.x % kWarp;
  if (self >= f.frames.rows) return;
  T* grad = f.grad_x + self * channels;
  if (self >= f.frames.tail()) {
    for (int64_t c = lane; c < channels; c += kWarp) grad[c] = static_cast<T>(A(0));
    return;
  }
  const int64_t b = f.frames.of(self);
  const A* base = f.base + b * channels;
  const int32_t row = f.assignment[self];
  const bool kept = row >= 0 && row < f.packed && f.index[row] == self;
  if (!kept) {
    if (row >= 0 && f.grad_tokens != nullptr) return;  // its kept row's warp writes it
    for (int64_t c = lane; c < channels; c += kWarp) grad[c] = static_cast<T>(base[c]);
    return;
  }
  const int64_t first = f.frames.begin(b), last = f.frames.end(b);
  const T *x = f.x + self * channels, *y = f.grad_tokens ? f.grad_tokens + row * channels : nullptr;
  const A *fused = f.fused + b * channels, norm = f.norm[self], floor = A(kNormFloor);
  const A g = f.grad_gate ? static_cast<A>(f.grad_gate[row]) : A(0);
  const A toward = g / (f.fused_norm[b] * norm);
  A own = norm > floor ? -g * f.score[self] / (norm * norm) : A(0);
  A total = 0, average = 0;
  if (y != nullptr) {
    each_source(f.assignment, first, last, row, self, [&](int64_t i) {
      const A weight = exp(f.closeness[i]), product = warp_dot<A>(y, f.x + i * channels, channels);
      total += weight;
      average += weight * product;
      if (lane == 0) f.product[i] = product;
    });
    __syncwarp();
  }
  const bool receives = total > 0;
  if (receives) {
    average /= total;
    if (norm > floor) {
      each_source(f.assignment, first, last, row, self, [&](int64_t i) {
        const A pull = (1 - f.fuse_alpha) * exp(f.closeness[i]) / total * (f.product[i] - average);
        own -= pull * f.closeness[i] / (norm * norm);
      });
    }
  }
  const A direct = receives ? f.fuse_alpha : A(1);
  for (int64_t c0 = 0; c0 < channels; c0 += kHeld * kWarp) {
    A sum[kHeld] = {};
    if (receives) {
      each_source(f.assignment, first, last, row, self, [&](int64_t i) {
        const A share = (1 - f.fuse_alpha) * exp(f.closeness[i]) / total;
        const A pull = share * (f.product[i] - average), other = f.norm[i];
        const A across = pull / (other * norm);
        const A inward = other > floor ? -pull * f.closeness[i] / (other * other) : A(0);
#pragma unroll
        for (int u = 0; u < kHeld; ++u) {
          const int64_t c = c0 + u * kWarp + lane;
          if (c < channels) {
            const A source = static_cast<A>(f.x[i * channels + c]);
            sum[u] += across * source;
            f.grad_x[i * channels + c] = static_cast<T>(base[c] + share * static_cast<A>(y[c]) +
                                                        (across * static_cast<A>(x[c]) + inward * source));
          }
        }
      });
    }
#pragma unroll
    for (int u = 0; u < kHeld; ++u) {
      const int64_t c = c0 + u * kWarp + lane;
      if (c < channels) {
        const A incoming = y != nullptr ? direct * static_cast<A>(y[c]) : A(0);
        grad[c] =
            static_cast<T>(base[c] + incoming + toward * fused[c] + (sum[u] + own * static_cast<A>(x[c])));
      }
    }
  }
}

unsigned blocks(int64_t count) {
  STD_TORCH_CHECK(count <= INT32_MAX, kOp, ": too many frames or rows for one launch");
  return static_cast<unsigned>(count);
}

// Offsets are on the device: only their form is checked here, and the kernels keep them within the rows.
Frames frames_of(const Tensor& x, const std::optional<Tensor>& cu_seqlens, int64_t frames, int64_t channels) {
  if (!cu_seqlens.has_value()) {
    STD_TORCH_CHECK(x.dim() == 3 && x.size(0) == frames && x.size(2) == channels, kOp,
                    ": x must be [B, N, C] for B frames");
    STD_TORCH_CHECK(frames * x.size(1) <= INT32_MAX, kOp, ": 2^31 rows or more");
    return {nullptr, frames, x.size(1), frames * x.size(1)};
  }
  STD_TORCH_CHECK(x.dim() == 2 && x.size(1) == channels, kOp, ": x must be packed [R, C]");
  STD_TORCH_CHECK(x.size(0) <= INT32_MAX, kOp, ": 2^31 rows or more");
  STD_TORCH_CHECK(cu_seqlens->scalar_type() == ScalarType::Int && cu_seqlens->dim() == 1 &&
                      cu_seqlens->size(0) == frames + 1 && cu_seqlens->is_contiguous() &&
                      cu_seqlens->is_cuda(),
                  kOp, ": cu_seqlens must be [B + 1] int32 on x's device");
  return {pointer<const int32_t>(*cu_seqlens), frames, 0, x.size(0)};
}

void check_guide(const Tensor& x, const Tensor& guide, const Tensor& guide_weight) {
  const ScalarType wide = wide_of(x.scalar_type());
  STD_TORCH_CHECK(
      guide.dim() == 2 && guide.size(1) > 0 && guide.scalar_type() == wide && guide.is_cuda() &&
          guide_weight.scalar_type() == wide && guide_weight.numel() == 1 && guide_weight.is_cuda(),
      kOp, ": guide [B, C] and guide_weight must be float32 (float64 with a float64 x) on x's device");
}

using ForwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

ForwardResult vsc_compress_fwd_cuda(Tensor x_any, std::optional<Tensor> cu_any, Tensor guide_any,
                                    Tensor guide_weight, double temperature, bool standardize,
                                    double threshold, std::optional<int64_t> keep,
                                    std::optional<int64_t> capacity, int64_t min_keep, double fuse_threshold,
                                    double fuse_alpha) {
  const Launch launch(x_any);
  check_guide(x_any, guide_any, guide_weight);
  const Tensor x = dense(x_any), guide = dense(guide_any);
  const std::optional<Tensor> cu = cu_any.has_value() ? std::optional<Tensor>(dense(*cu_any)) : std::nullopt;
  const int64_t count = guide.size(0), channels = guide.size(1);
  const Frames frames = frames_of(x, cu, count, channels);
  const ScalarType wide = wide_of(x.scalar_type());
  const int64_t parts = parts_of(frames.rows, count, kSumRows);

  Tensor relevance = torch::stable::new_empty(x, {frames.rows}, wide);
  Tensor assignment = torch::stable::new_empty(x, {frames.rows}, ScalarType::Int);
  Tensor state = torch::stable::new_empty(x, {3, frames.rows}, wide);
  Tensor mean = torch::stable::new_empty(x, {count, channels}, wide);
  Tensor cu_out = torch::stable::new_empty(x, {count + 1}, ScalarType::Int);
  Tensor partial = torch::stable::new_empty(x, {count, parts, channels}, wide);
  Tensor fused = torch::stable::new_empty(x, {count, channels}, wide);
  Tensor order = torch::stable::new_empty(x, {frames.rows}, ScalarType::Int);
  Tensor counts = torch::stable::new_empty(x, {count}, ScalarType::Int);
  std::optional<Tensor> tokens, index, gate;

  dispatch(x.scalar_type(), kOp, [&](auto tag) {
    using T = decltype(tag);
    using A = wide_t<T>;
    Forward<T> f{};
    f.x = pointer<const T>(x);
    f.frames = frames;
    f.guide = pointer<const A>(guide);
    f.guide_weight = pointer<const A>(guide_weight);
    f.partial = pointer<const A>(partial);
    f.channels = channels;
    f.parts = parts;
    f.keep = keep.value_or(0);
    f.capacity = capacity.value_or(0);
    f.min_keep = min_keep;
    f.temperature = static_cast<A>(temperature);
    f.threshold = static_cast<A>(threshold);
    f.fuse_threshold = static_cast<A>(fuse_threshold);
    f.fuse_alpha = static_cast<A>(fuse_alpha);
    f.standardize = standardize;
    f.relevance = pointer<A>(relevance);
    f.score = pointer<A>(state);
    f.norm = pointer<A>(state) + frames.rows;
    f.closeness = pointer<A>(state) + 2 * frames.rows;
    f.mean = pointer<A>(mean);
    f.fused = pointer<A>(fused);
    f.assignment = pointer<int32_t>(assignment);
    f.count = pointer<int32_t>(counts);
    f.order = pointer<int32_t>(order);
    f.cu_out = pointer<int32_t>(cu_out);

    if (count > 0) {
      statistics_kernel<T><<<blocks(count * parts), kPartThreads, 0, launch.stream()>>>(
          f.x, frames, channels, parts, f.norm, pointer<A>(partial));
      Launch::check(kOp);
    }
    const int64_t tail = cu.has_value() ? kTailBlocks : 0;
    if (count + tail > 0) {
      select_kernel<T><<<blocks(count + tail), kFrameThreads, 0, launch.stream()>>>(f);
      Launch::check(kOp);
    }
    offsets_kernel<<<1, kFrameThreads, 0, launch.stream()>>>(f.count, count, f.cu_out);
    Launch::check(kOp);

    int64_t packed = 0;
    if (capacity.has_value()) {
      packed = count * *capacity;
    } else if (keep.has_value() && !cu.has_value()) {
      packed = count * (*keep < frames.length ? *keep : frames.length);
    } else {
      int32_t last = 0;  // the one integer that is read on the host
      cudaError_t error =
          cudaMemcpyAsync(&last, f.cu_out + count, sizeof last, cudaMemcpyDeviceToHost, launch.stream());
      if (error == cudaSuccess) error = cudaStreamSynchronize(launch.stream());
      STD_TORCH_CHECK(error == cudaSuccess, kOp,
                      ": reading the number of kept tokens failed: ", cudaGetErrorString(error));
      packed = last;
    }
    tokens = torch::stable::new_empty(x, {packed, channels});
    index = torch::stable::new_empty(x, {packed}, ScalarType::Long);
    gate = torch::stable::new_empty(x, {packed});
    if (frames.rows > 0 && count > 0) {
      const int64_t tiles = parts_of(frames.rows, count, kTileLost);
      nearest_kernel<T><<<blocks(count * tiles), kTileThreads, 0, launch.stream()>>>(f, tiles);
      Launch::check(kOp);
    }
    if (packed > 0) {
      merge_kernel<T><<<blocks(ceil_div(packed, kRowWarps)), kRowWarps * kWarp, 0, launch.stream()>>>(
          f, packed, pointer<T>(*tokens), pointer<int64_t>(*index), pointer<T>(*gate));
      Launch::check(kOp);
    }
  });
  return {*tokens, cu_out, *index, *gate, relevance, assignment, state, mean};
}

std::tuple<Tensor, Tensor, Tensor> vsc_compress_bwd_cuda(
    std::optional<Tensor> grad_tokens_any, std::optional<Tensor> grad_gate_any, Tensor x_any,
    std::optional<Tensor> cu_any, Tensor guide_any, Tensor guide_weight, Tensor cu_out_any, Tensor index_any,
    Tensor assignment_any, Tensor state_any, Tensor mean_any, double fuse_alpha) {
  const Launch launch(x_any);
  check_guide(x_any, guide_any, guide_weight);
  const Tensor x = dense(x_any), guide = dense(guide_any), cu_out = dense(cu_out_any),
               index = dense(index_any), assignment = dense(assignment_any), state = dense(state_any),
               mean = dense(mean_any);
  const std::optional<Tensor> cu = cu_any.has_value() ? std::optional<Tensor>(dense(*cu_any)) : std::nullopt;
  const int64_t count = guide.size(0), channels = guide.size(1), packed = index.size(0);
  const Frames frames = frames_of(x, cu, count, channels);
  const ScalarType wide = wide_of(x.scalar_type());
  STD_TORCH_CHECK(assignment.numel() == frames.rows && state.numel() == 3 * frames.rows &&
                      state.scalar_type() == wide && cu_out.size(0) == count + 1 &&
                      mean.numel() == count * channels,
                  kOp, ": the saved tensors do not fit x");
  std::optional<Tensor> grad_tokens, grad_gate;
  if (grad_tokens_any.has_value()) {
    grad_tokens = dense(*grad_tokens_any);
    STD_TORCH_CHECK(grad_tokens->scalar_type() == x.scalar_type() && grad_tokens->dim() == 2 &&
                        grad_tokens->size(0) == packed && grad_tokens->size(1) == channels,
                    kOp, ": the gradient of tokens has another shape or type than tokens");
  }
  if (grad_gate_any.has_value()) {
    grad_gate = dense(*grad_gate_any);
    STD_TORCH_CHECK(grad_gate->scalar_type() == x.scalar_type() && grad_gate->numel() == packed, kOp,
                    ": the gradient of gate has another shape or type than gate");
  }
  const int64_t parts = parts_of(packed, count, kSumRows);
  Tensor grad_x = torch::stable::new_empty(x, x.sizes());
  Tensor grad_guide = torch::stable::new_empty(guide, guide.sizes());
  Tensor grad_weight = torch::stable::new_empty(guide_weight, {});
  Tensor partial = torch::stable::new_empty(x, {grad_gate.has_value() ? count * parts : 0, channels}, wide);
  Tensor fused = torch::stable::new_empty(x, {count, channels}, wide);
  Tensor fused_norm = torch::stable::new_empty(x, {count}, wide);
  Tensor base = torch::stable::new_empty(x, {count, channels}, wide);
  Tensor product = torch::stable::new_empty(x, {frames.rows}, wide);
  Tensor weight = torch::stable::new_empty(x, {count}, ScalarType::Double);

  dispatch(x.scalar_type(), kOp, [&](auto tag) {
    using T = decltype(tag);
    using A = wide_t<T>;
    Backward<T> f{};
    f.grad_tokens = pointer_or_null<const T>(grad_tokens);
    f.grad_gate = pointer_or_null<const T>(grad_gate);
    f.x = pointer<const T>(x);
    f.frames = frames;
    f.guide = pointer<const A>(guide);
    f.guide_weight = pointer<const A>(guide_weight);
    f.score = pointer<const A>(state);
    f.norm = f.score + frames.rows;
    f.closeness = f.norm + frames.rows;
    f.mean = pointer<const A>(mean);
    f.cu_out = pointer<const int32_t>(cu_out);
    f.assignment = pointer<const int32_t>(assignment);
    f.index = pointer<const int64_t>(index);
    f.channels = channels;
    f.packed = packed;
    f.parts = parts;
    f.fuse_alpha = static_cast<A>(fuse_alpha);
    f.partial = pointer<A>(partial);
    f.fused = pointer<A>(fused);
    f.fused_norm = pointer<A>(fused_norm);
    f.base = pointer<A>(base);
    f.product = pointer<A>(product);
    f.weight = pointer<double>(weight);
    f.grad_x = pointer<T>(grad_x);
    f.grad_guide = pointer<A>(grad_guide);
    f.grad_weight = pointer<A>(grad_weight);
    if (count > 0) {
      if (grad_gate.has_value()) {
        pull_kernel<T><<<blocks(count * parts), kPartThreads, 0, launch.stream()>>>(f);
        Launch::check(kOp);
      }
      guide_kernel<T><<<blocks(count), kFrameThreads, 0, launch.stream()>>>(f);
      Launch::check(kOp);
    }
    weight_kernel<A><<<1, kFrameThreads, 0, launch.stream()>>>(f.weight, count, f.grad_weight);
    Launch::check(kOp);
    if (frames.rows > 0) {
      rows_kernel<T><<<blocks(ceil_div(frames.rows, kRowWarps)), kRowWarps * kWarp, 0, launch.stream()>>>(f);
      Launch::check(kOp);
    }
  });
  return {grad_x, grad_guide, grad_weight};
}

STABLE_TORCH_LIBRARY_IMPL(deepmsi, CUDA, m) {
  m.impl("vsc_compress_cpp_fwd", TORCH_BOX(&vsc_compress_fwd_cuda));
  m.impl("vsc_compress_cpp_bwd", TORCH_BOX(&vsc_compress_bwd_cuda));
}

}  // namespace
}  // namespace deepmsi

// window_attention under the CUDA key: one block of threads per head of one window, in float32 and shared
// memory.
//
// Windows are the cyclic ones on the grid padded to whole windows; a slot whose coordinate wraps belongs to
// another shifted window than one that does not. The backward makes the softmax anew and goes over a window
// twice: by queries, then by keys, so that every gradient row is one block's own sum. A block of the backward
// takes a chunk of windows, and its sums for bias and scale are added to the others' in fixed order: no
// atomics.
#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>
#include <type_traits>

#include "tensors.cuh"

namespace deepmsi {
namespace {

constexpr const char* kOp = "window_attention";
constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kTileRows = 4;
constexpr float kNormFloor = 1e-12f;  // torch.nn.functional.normalize's
// Blocks of a backward pass. It depends on nothing of the device, so that bits do not either.
constexpr int64_t kSummingBlocks = 1024;

struct Sizes {
  int64_t rows, frames, windows, chunks;
  int64_t qkv_stride;
  float scale;
  int heads, dim, height, width, window, shift, down, across;
  int block;  // rows of scores that are in shared memory at a time

  __host__ __device__ int slots() const { return window * window; }
  __host__ __device__ int table() const { return (2 * window - 1) * (2 * window - 1); }
  // An odd distance between rows, so that a warp that reads a column meets every bank once.
  __host__ __device__ int row_stride() const { return dim | 1; }
  __host__ __device__ int score_stride() const { return slots() | 1; }
};

struct Pointers {
  const void* qkv;          // T [R, 3C]
  const float* bias;        // [table, heads]
  const float* head_scale;  // [heads] for cosine attention, else null
  const int32_t* map;       // [F, H * W] row of a place or -1, null for a dense grid
  void* out;                // T [R, C]
  float* lse;               // [R, heads]
  const void* grad_out;     // T [R, C]
  void* grad_qkv;           // T [R, 3C]
  float* partial;           // [chunks, table * heads + heads]
};

// A block's shared memory. The rows are int64, so they come first.
struct Shared {
  int64_t* row;
  int *kind, *code;
  float *bias, *whole_a, *whole_b, *part_a, *part_b, *scores, *gradient;
  float *inverse_norm, *top, *inverse_sum, *mean, *grad_bias, *warp_sums;

  // Returns the bytes that the pieces take.
  __host__ __device__ int64_t lay_out(const Sizes& n, bool backward, char* memory) {
    char* at = memory;
    auto take = [&at](auto*& piece, int64_t count) {
      piece = reinterpret_cast<decltype(&*piece)>(at);
      at += count * static_cast<int64_t>(sizeof(*piece));
    };
    const int64_t slots = n.slots(), rows = n.block;
    take(row, slots);
    take(kind, slots);
    take(code, slots);
    take(bias, n.table());
    take(whole_a, slots * n.row_stride());
    take(whole_b, slots * n.row_stride());
    take(part_a, rows * n.row_stride());
    take(scores, rows * n.score_stride());
    take(inverse_norm, rows);
    if (backward) {
      take(part_b, rows * n.row_stride());
      take(gradient, rows * n.score_stride());
      take(top, slots);
      take(inverse_sum, slots);
      take(mean, slots);
      take(grad_bias, n.table());
      take(warp_sums, kWarps);
    }
    return at - memory;
  }
};

// Row of every place of a frame, or -1: a bisection in the frame's ascending positions.
__global__ void place_to_row(const int32_t* positions, const int32_t* offset, int32_t* map, int64_t rows,
                             int64_t count, int64_t places) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at >= count) return;
  const int64_t frame = at / places, place = at % places;
  int64_t low = offset[frame] > 0 ? offset[frame] : 0;
  const int64_t end = offset[frame + 1] < rows ? offset[frame + 1] : rows;
  for (int64_t high = end; low < high;) {
    const int64_t middle = low + (high - low) / 2;
    if (positions[middle] < place) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  map[at] = low < end && positions[low] == place ? static_cast<int32_t>(low) : -1;
}

// Zero the rows of x [rows, width] past the last frame's end.
template <typename T>
__global__ void zero_tail(T* x, const int32_t* offset, int64_t frames, int64_t rows, int64_t width) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  int64_t at = offset[frames] * width + static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (; at < rows * width; at += step) x[at] = static_cast<T>(0.0f);
}

// What each slot of a window holds. An empty slot is a shifted window of its own: it sees itself, whose value
// is zero.
__device__ void find_slots(const Sizes& n, const int32_t* map, int64_t index, const Shared& s) {
  const int64_t tiles = static_cast<int64_t>(n.down) * n.across, frame = index / tiles;
  const int tile = static_cast<int>(index % tiles);
  for (int slot = threadIdx.x; slot < n.slots(); slot += kThreads) {
    int y = tile / n.across * n.window + slot / n.window + n.shift;
    int x = tile % n.across * n.window + slot % n.window + n.shift;
    const bool wraps_y = y >= n.down * n.window, wraps_x = x >= n.across * n.window;
    if (wraps_y) y -= n.down * n.window;
    if (wraps_x) x -= n.across * n.window;
    int64_t row = -1;
    if (y < n.height && x < n.width) {
      row = (frame * n.height + y) * n.width + x;
      if (map != nullptr) row = map[row];
    }
    s.row[slot] = row;
    s.kind[slot] = row >= 0 ? 2 * wraps_y + wraps_x : -1 - slot;
    s.code[slot] = slot / n.window * (2 * n.window - 1) + slot % n.window;
  }
}

// Read the rows of `count` slots from `first`, a warp per row; with `unit`, over their norms, whose inverse
// is kept where there is room for it.
template <typename T>
__device__ void read_rows(const Sizes& n, const Shared& s, const T* from, int64_t stride, int first,
                          int count, bool unit, float* to, float* inverse_norm) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int r = warp; r < count; r += kWarps) {
    const int64_t row = s.row[first + r];
    float* x = to + r * n.row_stride();
    float squares = 0.0f;
    for (int c = lane; c < n.dim; c += 32) {
      x[c] = row >= 0 ? static_cast<float>(from[row * stride + c]) : 0.0f;
      squares += x[c] * x[c];
    }
    if (!unit) continue;
    const float inverse = 1.0f / fmaxf(sqrtf(warp_sum(squares)), kNormFloor);
    for (int c = lane; c < n.dim; c += 32) x[c] *= inverse;
    if (inverse_norm != nullptr && lane == 0) inverse_norm[r] = inverse;
  }
}

// store(i, j, sum over k of a[i * row_a + k] * b[k * step_b + j * column_b]): a thread takes kTileRows rows
// and two columns at a time. The same sizes give every (i, j) to the same thread.
template <typename Store>
__device__ void product(int rows, int columns, int depth, const float* a, int row_a, const float* b,
                        int step_b, int column_b, const Store& store) {
  const int across = (columns + 1) / 2, tiles = across * ((rows + kTileRows - 1) / kTileRows);
  for (int tile = threadIdx.x; tile < tiles; tile += kThreads) {
    const int i = tile / across * kTileRows, j = tile % across;
    const bool second = j + across < columns;
    const float* left[kTileRows];
#pragma unroll
    for (int r = 0; r < kTileRows; ++r) left[r] = a + min(i + r, rows - 1) * row_a;
    const float *right = b + j * column_b, *other = b + (second ? j + across : j) * column_b;
    float sum[kTileRows][2] = {};
    for (int k = 0; k < depth; ++k) {
      const float x = right[k * step_b], y = other[k * step_b];
#pragma unroll
      for (int r = 0; r < kTileRows; ++r) {
        const float value = left[r][k];
        sum[r][0] += value * x;
        sum[r][1] += value * y;
      }
    }
#pragma unroll
    for (int r = 0; r < kTileRows; ++r) {
      if (i + r >= rows) break;
      store(i + r, j, sum[r][0]);
      if (second) store(i + r, j + across, sum[r][1]);
    }
  }
}

__device__ void read_bias(const Sizes& n, const float* bias, int head, const Shared& s) {
  for (int t = threadIdx.x; t < n.table(); t += kThreads) s.bias[t] = bias[t * n.heads + head];
}

__device__ float logit(const Sizes& n, const Shared& s, float factor, int query, int key, float product) {
  if (s.kind[query] != s.kind[key]) return -INFINITY;
  return product * factor + s.bias[s.code[query] - s.code[key] + n.table() / 2];
}

// Turn `count` rows of logits into softmaxes; keep(r, maximum, sum) runs in one thread of each row.
template <typename Keep>
__device__ void softmax_rows(const Sizes& n, const Shared& s, int count, const Keep& keep) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int r = warp; r < count; r += kWarps) {
    float* p = s.scores + r * n.score_stride();
    float top = -INFINITY, sum = 0.0f;
    for (int j = lane; j < n.slots(); j += 32) top = fmaxf(top, p[j]);
    top = warp_max(top);
    for (int j = lane; j < n.slots(); j += 32) {
      p[j] = expf(p[j] - top);
      sum += p[j];
    }
    sum = warp_sum(sum);
    for (int j = lane; j < n.slots(); j += 32) p[j] /= sum;
    if (lane == 0) keep(r, top, sum);
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 4) forward(Sizes n, Pointers at) {
  extern __shared__ __align__(16) char memory[];
  Shared s{};
  s.lay_out(n, false, memory);
  const int head = static_cast<int>(blockIdx.x % n.heads);
  const int64_t channels = static_cast<int64_t>(n.heads) * n.dim;
  const T* qkv = static_cast<const T*>(at.qkv) + head * n.dim;
  T* out = static_cast<T*>(at.out) + head * n.dim;
  const bool cosine = at.head_scale != nullptr;
  const float factor = cosine ? at.head_scale[head] : n.scale;
  const int stride = n.row_stride(), width = n.score_stride();
  read_bias(n, at.bias, head, s);
  find_slots(n, at.map, blockIdx.x / n.heads, s);
  __syncthreads();
  read_rows(n, s, qkv + channels, n.qkv_stride, 0, n.slots(), cosine, s.whole_a, nullptr);
  read_rows(n, s, qkv + 2 * channels, n.qkv_stride, 0, n.slots(), false, s.whole_b, nullptr);
  for (int first = 0; first < n.slots(); first += n.block) {
    const int count = min(n.block, n.slots() - first);
    read_rows(n, s, qkv, n.qkv_stride, first, count, cosine, s.part_a, nullptr);
    __syncthreads();
    product(count, n.slots(), n.dim, s.part_a, stride, s.whole_a, 1, stride,
            [&](int i, int j, float x) { s.scores[i * width + j] = logit(n, s, factor, first + i, j, x); });
    __syncthreads();
    softmax_rows(n, s, count, [&](int r, float top, float sum) {
      const int64_t row = s.row[first + r];
      if (row >= 0) at.lse[row * n.heads + head] = top + logf(sum);
    });
    __syncthreads();
    product(count, n.dim, n.slots(), s.scores, width, s.whole_b, stride, 1, [&](int i, int j, float x) {
      const int64_t row = s.row[first + i];
      if (row >= 0) out[row * channels + j] = static_cast<T>(x);
    });
  }
}

// Write rows of gradients of x from those of x / |x| (with `cosine`), times factor; returns, in the first
// lane of each warp, the sum over its rows of unit row times gradient.
template <typename T>
__device__ float write_through_norm(const Sizes& n, const Shared& s, int first, int count, bool cosine,
                                    float factor, const float* units, const float* gradients, T* to,
                                    int64_t stride) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float total = 0.0f;
  for (int r = warp; r < count; r += kWarps) {
    const float *unit = units + r * n.row_stride(), *gradient = gradients + r * n.row_stride();
    float along = 0.0f, outward = factor;
    if (cosine) {
      for (int c = lane; c < n.dim; c += 32) along += unit[c] * gradient[c];
      along = warp_sum(along);
      total += along;
      outward *= s.inverse_norm[r];
      // At the floor the norm is a constant, so nothing is taken away along x.
      if (!(s.inverse_norm[r] < 1.0f / kNormFloor)) along = 0.0f;
    }
    const int64_t row = s.row[first + r];
    if (row < 0) continue;
    for (int c = lane; c < n.dim; c += 32)
      to[row * stride + c] = static_cast<T>((gradient[c] - unit[c] * along) * outward);
  }
  return total;
}

// Add a block of the logits' gradients to the sums of the bias table: a thread owns an entry.
__device__ void add_bias_gradient(const Sizes& n, const Shared& s, int first, int count) {
  const int side = 2 * n.window - 1;
  for (int t = threadIdx.x; t < n.table(); t += kThreads) {
    const int down = t / side - (n.window - 1), across = t % side - (n.window - 1);
    float sum = 0.0f;
    for (int r = 0; r < count; ++r) {
      const int y = (first + r) / n.window - down, x = (first + r) % n.window - across;
      if (y >= 0 && y < n.window && x >= 0 && x < n.window)
        sum += s.gradient[r * n.score_stride() + y * n.window + x];
    }
    s.grad_bias[t] += sum;
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 4) backward(Sizes n, Pointers at) {
  extern __shared__ __align__(16) char memory[];
  Shared s{};
  s.lay_out(n, true, memory);
  const int head = static_cast<int>(blockIdx.x % n.heads);
  const int64_t chunk = blockIdx.x / n.heads, channels = static_cast<int64_t>(n.heads) * n.dim;
  const T* qkv = static_cast<const T*>(at.qkv) + head * n.dim;
  const T* grad_out = static_cast<const T*>(at.grad_out) + head * n.dim;
  T* grad_qkv = static_cast<T*>(at.grad_qkv) + head * n.dim;
  const bool cosine = at.head_scale != nullptr;
  const float factor = cosine ? at.head_scale[head] : n.scale;
  const int stride = n.row_stride(), width = n.score_stride(), slots = n.slots();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float grad_scale = 0.0f;
  read_bias(n, at.bias, head, s);
  for (int t = threadIdx.x; t < n.table(); t += kThreads) s.grad_bias[t] = 0.0f;

  for (int64_t index = n.windows * chunk / n.chunks; index < n.windows * (chunk + 1) / n.chunks; ++index) {
    __syncthreads();
    find_slots(n, at.map, index, s);
    __syncthreads();
    read_rows(n, s, qkv + channels, n.qkv_stride, 0, slots, cosine, s.whole_a, nullptr);
    read_rows(n, s, qkv + 2 * channels, n.qkv_stride, 0, slots, false, s.whole_b, nullptr);
    for (int first = 0; first < slots; first += n.block) {  // by queries
      const int count = min(n.block, slots - first);
      read_rows(n, s, qkv, n.qkv_stride, first, count, cosine, s.part_a, s.inverse_norm);
      read_rows(n, s, grad_out, channels, first, count, false, s.part_b, nullptr);
      __syncthreads();
      product(count, slots, n.dim, s.part_a, stride, s.whole_a, 1, stride,
              [&](int i, int j, float x) { s.scores[i * width + j] = logit(n, s, factor, first + i, j, x); });
      product(count, slots, n.dim, s.part_b, stride, s.whole_b, 1, stride,
              [&](int i, int j, float x) { s.gradient[i * width + j] = x; });
      __syncthreads();
      softmax_rows(n, s, count, [&](int r, float top, float sum) {
        s.top[first + r] = top;
        s.inverse_sum[first + r] = 1.0f / sum;
      });
      __syncwarp();
      for (int r = warp; r < count; r += kWarps) {  // the rows whose softmax this warp made
        const float* p = s.scores + r * width;
        float *d = s.gradient + r * width, mean = 0.0f;
        for (int j = lane; j < slots; j += 32) mean += p[j] * d[j];
        mean = warp_sum(mean);
        for (int j = lane; j < slots; j += 32) d[j] = p[j] * (d[j] - mean);
        if (lane == 0) s.mean[first + r] = mean;
      }
      __syncthreads();
      add_bias_gradient(n, s, first, count);
      product(count, n.dim, slots, s.gradient, width, s.whole_a, stride, 1,
              [&](int i, int j, float x) { s.part_b[i * stride + j] = x; });
      __syncthreads();
      grad_scale +=
          write_through_norm(n, s, first, count, cosine, factor, s.part_a, s.part_b, grad_qkv, 3 * channels);
      __syncthreads();
    }
    read_rows(n, s, qkv, n.qkv_stride, 0, slots, cosine, s.whole_a, nullptr);
    read_rows(n, s, grad_out, channels, 0, slots, false, s.whole_b, nullptr);
    for (int first = 0; first < slots; first += n.block) {  // by keys
      const int count = min(n.block, slots - first);
      read_rows(n, s, qkv + channels, n.qkv_stride, first, count, cosine, s.part_a, s.inverse_norm);
      read_rows(n, s, qkv + 2 * channels, n.qkv_stride, first, count, false, s.part_b, nullptr);
      __syncthreads();
      product(count, slots, n.dim, s.part_a, stride, s.whole_a, 1, stride, [&](int i, int j, float x) {
        s.scores[i * width + j] = expf(logit(n, s, factor, j, first + i, x) - s.top[j]) * s.inverse_sum[j];
      });
      product(count, slots, n.dim, s.part_b, stride, s.whole_b, 1, stride, [&](int i, int j, float x) {
        s.gradient[i * width + j] = s.scores[i * width + j] * (x - s.mean[j]);
      });
      __syncthreads();
      product(count, n.dim, slots, s.scores, width, s.whole_b, stride, 1, [&](int i, int j, float x) {
        const int64_t row = s.row[first + i];
        if (row >= 0) grad_qkv[(row * 3 + 2) * channels + j] = static_cast<T>(x);
      });
      product(count, n.dim, slots, s.gradient, width, s.whole_a, stride, 1,
              [&](int i, int j, float x) { s.part_b[i * stride + j] = x; });
      __syncthreads();
      write_through_norm(n, s, first, count, cosine, factor, s.part_a, s.part_b, grad_qkv + channels,
                         3 * channels);
      __syncthreads();
    }
  }
  float* partial = at.partial + chunk * (n.table() + 1) * n.heads;
  __syncthreads();
  for (int t = threadIdx.x; t < n.table(); t += kThreads) partial[t * n.heads + head] = s.grad_bias[t];
  if (lane == 0) s.warp_sums[warp] = grad_scale;
  __syncthreads();
  if (threadIdx.x == 0) {
    float sum = 0.0f;
    for (int w = 0; w < kWarps; ++w) sum += s.warp_sums[w];
    partial[n.table() * n.heads + head] = sum;
  }
}

// Sum [chunks, columns] over the chunks, in order; the first `split` columns go to one output, the rest to
// another.
__global__ void add_partial_sums(const float* partial, int64_t chunks, int64_t columns, int64_t split,
                                 float* bias, float* scale) {
  const int64_t column = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (column >= columns) return;
  float sum = 0.0f;
  for (int64_t c = 0; c < chunks; ++c) sum += partial[c * columns + column];
  (column < split ? bias[column] : scale[column - split]) = sum;
}

void check(cudaError_t error) { STD_TORCH_CHECK(error == cudaSuccess, kOp, ": ", cudaGetErrorString(error)); }

unsigned blocks_of(int64_t count) { return static_cast<unsigned>(ceil_div(count, kThreads)); }

// Call run(T) for the storage types that these kernels have.
template <typename Run>
void by_type(ScalarType type, const Run& run) {
  STD_TORCH_CHECK(type != ScalarType::Double, kOp, ": takes float32, bfloat16 or float16");
  dispatch(type, kOp, [&](auto zero) {
    if constexpr (!std::is_same_v<decltype(zero), double>) run(zero);
  });
}

// What both directions read, checked; it owns the tensors behind the pointers of `at`.
struct Call {
  Sizes n{};
  Pointers at{};
  Tensor qkv, bias;
  std::optional<Tensor> head_scale, cu_seqlens, map;
  Launch on;

  Call(const Tensor& qkv_any, const Tensor& bias_table, const std::optional<Tensor>& scale_of_head,
       double scale, const std::optional<Tensor>& positions, const std::optional<Tensor>& cu_seqlens_any,
       int64_t heads, int64_t height, int64_t width, int64_t window, int64_t shift)
      : qkv(qkv_any), bias(dense(bias_table)), on(qkv_any) {
    STD_TORCH_CHECK(qkv.dim() == 2 && heads > 0 && qkv.size(1) % (3 * heads) == 0, kOp,
                    ": qkv must be [R, 3C] with C a multiple of heads");
    STD_TORCH_CHECK(height > 0 && width > 0 && window > 0 && 0 <= shift && shift < window, kOp,
                    ": the grid must not be empty, nor the shift outside of the window");
    if (qkv.stride(1) != 1) qkv = torch::stable::contiguous(qkv);
    n.rows = qkv.size(0);
    n.qkv_stride = qkv.stride(0);
    n.scale = static_cast<float>(scale);
    n.heads = static_cast<int>(heads);
    n.dim = static_cast<int>(qkv.size(1) / (3 * heads));
    n.height = static_cast<int>(height);
    n.width = static_cast<int>(width);
    n.window = static_cast<int>(window);
    n.shift = static_cast<int>(shift);
    n.down = static_cast<int>(ceil_div(height, window));
    n.across = static_cast<int>(ceil_div(width, window));
    STD_TORCH_CHECK(bias.scalar_type() == ScalarType::Float && bias.dim() == 2 && bias.size(0) == n.table() &&
                        bias.size(1) == heads,
                    kOp, ": bias_table must be [(2w - 1)^2, heads] float32");
    at.qkv = qkv.data_ptr();
    at.bias = pointer<const float>(bias);
    if (scale_of_head.has_value()) {
      head_scale = dense(*scale_of_head);
      STD_TORCH_CHECK(head_scale->scalar_type() == ScalarType::Float && head_scale->numel() == heads, kOp,
                      ": head_scale must be [heads] float32");
      at.head_scale = pointer<const float>(*head_scale);
    }
    const int64_t places = height * width;
    if (!positions.has_value()) {
      STD_TORCH_CHECK(n.rows % places == 0, kOp, ": rows are not a multiple of the grid's places");
      n.frames = n.rows / places;
    } else {
      STD_TORCH_CHECK(cu_seqlens_any.has_value() && positions->scalar_type() == ScalarType::Int &&
                          cu_seqlens_any->scalar_type() == ScalarType::Int && positions->numel() == n.rows &&
                          cu_seqlens_any->numel() >= 1,
                      kOp, ": packed rows need positions [R] int32 and cu_seqlens [F + 1] int32");
      const Tensor held = dense(*positions);
      cu_seqlens = dense(*cu_seqlens_any);
      n.frames = cu_seqlens->numel() - 1;
      map = torch::stable::new_empty(held, {n.frames, places});
      at.map = pointer<const int32_t>(*map);
      if (const int64_t count = n.frames * places; count > 0) {
        place_to_row<<<blocks_of(count), kThreads, 0, on.stream()>>>(
            pointer<const int32_t>(held), offset(), pointer<int32_t>(*map), n.rows, count, places);
        Launch::check(kOp);
      }
    }
    n.windows = n.frames * n.down * n.across;
    n.chunks = std::min(n.windows, ceil_div(kSummingBlocks, heads));
  }

  const int32_t* offset() const { return pointer<const int32_t>(*cu_seqlens); }

  // Rows past the last frame's end are nobody's.
  void zero_rows(const Tensor& x) const {
    if (!cu_seqlens.has_value() || x.numel() == 0) return;
    by_type(x.scalar_type(), [&](auto zero) {
      using T = decltype(zero);
      const unsigned blocks = std::min(blocks_of(x.numel()), 1024u);
      zero_tail<T>
          <<<blocks, kThreads, 0, on.stream()>>>(pointer<T>(x), offset(), n.frames, n.rows, x.size(1));
    });
    Launch::check(kOp);
  }

  // Launch a kernel with as many rows of scores in shared memory as fit.
  template <typename Kernel>
  void launch(const Kernel& kernel, bool backward, int64_t blocks) {
    int most = 0;
    check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, qkv.get_device_index()));
    int64_t bytes = 0;
    for (n.block = 16; n.block >= 4; n.block /= 2) {
      bytes = Shared{}.lay_out(n, backward, nullptr);
      if (bytes <= most) break;
    }
    STD_TORCH_CHECK(bytes <= most, kOp, ": a window of ", n.window, " x ", n.window, " tokens with ", n.dim,
                    " channels a head needs ", bytes, " bytes of shared memory, more than this GPU's ", most);
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
    kernel<<<static_cast<unsigned>(blocks), kThreads, bytes, on.stream()>>>(n, at);
    Launch::check(kOp);
  }
};

std::tuple<Tensor, Tensor> window_attention_fwd_cuda(Tensor qkv, Tensor bias_table,
                                                     std::optional<Tensor> head_scale, double scale,
                                                     std::optional<Tensor> positions,
                                                     std::optional<Tensor> cu_seqlens, int64_t heads,
                                                     int64_t height, int64_t width, int64_t window,
                                                     int64_t shift) {
  Call call(qkv, bias_table, head_scale, scale, positions, cu_seqlens, heads, height, width, window, shift);
  Tensor out = torch::stable::new_empty(qkv, {call.n.rows, qkv.size(1) / 3});
  Tensor lse = torch::stable::new_empty(qkv, {call.n.rows, heads}, ScalarType::Float);
  call.at.out = out.data_ptr();
  call.at.lse = pointer<float>(lse);
  call.zero_rows(out);
  call.zero_rows(lse);
  if (call.n.windows > 0) {
    by_type(qkv.scalar_type(),
            [&](auto zero) { call.launch(forward<decltype(zero)>, false, call.n.windows * heads); });
  }
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> window_attention_bwd_cuda(
    Tensor grad_out_any, Tensor qkv, Tensor /* out: made anew */, Tensor /* lse: likewise */,
    Tensor bias_table, std::optional<Tensor> head_scale, double scale, std::optional<Tensor> positions,
    std::optional<Tensor> cu_seqlens, int64_t heads, int64_t height, int64_t width, int64_t window,
    int64_t shift) {
  Call call(qkv, bias_table, head_scale, scale, positions, cu_seqlens, heads, height, width, window, shift);
  const Tensor grad_out = dense(grad_out_any);
  STD_TORCH_CHECK(grad_out.scalar_type() == qkv.scalar_type() && grad_out.size(0) == call.n.rows &&
                      grad_out.numel() == call.n.rows * (qkv.size(1) / 3),
                  kOp, ": the gradient does not fit qkv");
  const int64_t table = call.n.table() * heads, columns = table + heads;
  Tensor grad_qkv = torch::stable::new_empty(qkv, {call.n.rows, qkv.size(1)});
  Tensor grad_bias = torch::stable::new_empty(bias_table, {call.n.table(), heads});
  Tensor grad_scale = torch::stable::new_empty(bias_table, {heads});
  Tensor partial = torch::stable::new_empty(bias_table, {call.n.chunks, columns});
  call.at.grad_out = grad_out.data_ptr();
  call.at.grad_qkv = grad_qkv.data_ptr();
  call.at.partial = pointer<float>(partial);
  call.zero_rows(grad_qkv);
  if (call.n.windows > 0) {
    by_type(qkv.scalar_type(),
            [&](auto zero) { call.launch(backward<decltype(zero)>, true, call.n.chunks * heads); });
  }
  add_partial_sums<<<blocks_of(columns), kThreads, 0, call.on.stream()>>>(
      pointer<const float>(partial), call.n.chunks, columns, table, pointer<float>(grad_bias),
      pointer<float>(grad_scale));
  Launch::check(kOp);
  return {grad_qkv, grad_bias, grad_scale};
}

STABLE_TORCH_LIBRARY_IMPL(deepmsi, CUDA, m) {
  m.impl("window_attention_cpp_fwd", TORCH_BOX(&window_attention_fwd_cuda));
  m.impl("window_attention_cpp_bwd", TORCH_BOX(&window_attention_bwd_cuda));
}

}  // namespace
}  // namespace deepmsi

// dilated_causal_conv1d under the CUDA key: one launch a layer, with bias, ReLU, dropout and residual in it.
//
// A product gathers its rows tap by tap. At up to 16 rows (the last step of a network, a streaming step) it
// is bound by reading the weights once: a block then holds all rows and eight columns, which is one sector of
// memory, and its threads split the sum among them. Splitting it over blocks as well would take a second
// launch or a grid that waits for itself. Otherwise tiles of 64 x 64. Sums run in a fixed order without
// atomics.
#include "tensors.cuh"

namespace deepmsi {
namespace {

constexpr const char* kConv = "dilated_causal_conv1d";
constexpr int kTile = 64;      // rows and columns of a tile
constexpr int kDepth = 16;     // summands of a product at a time
constexpr int kStretch = 256;  // summands of a partial sum: the error of a sum grows with its length
constexpr int kSide = 16;      // threads along a side of the tile
constexpr int kEach = kTile / kSide;
constexpr int kThreads = kSide * kSide;
constexpr int kFewRows = 16;    // rows of a narrow product
constexpr int kFewColumns = 8;  // its columns
constexpr int kStripe = 256;    // summands whose rows it holds at a time
constexpr int kParts = kThreads / kFewColumns;
constexpr int kSumColumns = 32;  // columns of a block that sums over rows

// Output j of `count` lies at row first + j * step of x; row m of an output is batch m / count, position
// m % count.
template <typename T>
struct Conv {
  const T* x;         // [batch, length, inputs]
  const T* weight;    // [taps, inputs, outputs]
  const T* bias;      // [outputs] or null
  const T* residual;  // [batch, count, outputs] or null
  const int64_t* seed;
  T* y;
  bool* active;  // or null
  int64_t batch, length, inputs, outputs, taps, dilation, count, step, first;
  int64_t threshold;  // words of Philox below it are dropped
  wide_t<T> scale;    // of what dropout keeps
  bool relu;
};

// Word index mod 4 of Philox4x32-10 at counter index div 4.
__device__ __forceinline__ uint32_t philox_word(uint64_t seed, int64_t index) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  const uint64_t counter = static_cast<uint64_t>(index) / 4;
  uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32), c2 = 0, c3 = 0;
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint32_t high_a = __umulhi(0xD2511F53u, c0), low_a = 0xD2511F53u * c0;
    const uint32_t high_b = __umulhi(0xCD9E8D57u, c2), low_b = 0xCD9E8D57u * c2;
    c0 = high_b ^ c1 ^ k0;
    c1 = low_b;
    c2 = high_a ^ c3 ^ k1;
    c3 = low_a;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  const int lane = static_cast<int>(index % 4);
  return lane < 2 ? (lane == 0 ? c0 : c1) : (lane == 2 ? c2 : c3);
}

template <typename A>
__device__ __forceinline__ A relu_of(A value) {
  return value < A(0) ? A(0) : value;  // not fmax, which would take 0 for a NaN
}

// The three products. A side says where row `row` (kTurned: summand `row`) of the left factor begins in a
// pass, or -1 where it has no part in it, where a pass' right factor lies, and takes the sums.
template <typename T>
struct ForwardSide {
  using Left = T;
  static constexpr bool kTurned = false, kRightAcross = true;
  Conv<T> conv;
  __host__ __device__ int64_t rows() const { return conv.batch * conv.count; }
  __host__ __device__ int64_t columns() const { return conv.outputs; }
  __device__ int64_t passes() const { return conv.taps; }
  __device__ int64_t depth() const { return conv.inputs; }
  __device__ const T* left() const { return conv.x; }
  __device__ int64_t begin(int64_t row, int64_t tap) const {
    const int64_t at = conv.first + row % conv.count * conv.step - (conv.taps - 1 - tap) * conv.dilation;
    return at < 0 ? -1 : (row / conv.count * conv.length + at) * conv.inputs;
  }
  __device__ wide_t<T> right(int64_t tap, int64_t k, int64_t column) const {
    return static_cast<wide_t<T>>(conv.weight[(tap * conv.inputs + k) * conv.outputs + column]);
  }
  __device__ void finish(int64_t row, int64_t column, wide_t<T> value) const {
    const int64_t at = row * conv.outputs + column;
    if (conv.bias != nullptr) value += static_cast<wide_t<T>>(conv.bias[column]);
    if (conv.relu) value = relu_of(value);
    if (conv.seed != nullptr) {
      const bool kept = philox_word(static_cast<uint64_t>(*conv.seed), at) >= conv.threshold;
      value = kept ? value * conv.scale : wide_t<T>(0);
    }
    if (conv.active != nullptr) conv.active[at] = !(value <= wide_t<T>(0));
    if (conv.residual != nullptr) value = relu_of(value + static_cast<wide_t<T>>(conv.residual[at]));
    conv.y[at] = static_cast<T>(value);
  }
};

// What position t gave to tap i came from row t - (k - 1 - i)·d of x.
template <typename T>
struct GradXSide {
  using Left = wide_t<T>;
  static constexpr bool kTurned = false, kRightAcross = false;
  Conv<T> conv;
  const wide_t<T>* gradient;
  T* grad_x;
  __host__ __device__ int64_t rows() const { return conv.batch * conv.length; }
  __host__ __device__ int64_t columns() const { return conv.inputs; }
  __device__ int64_t passes() const { return conv.taps; }
  __device__ int64_t depth() const { return conv.outputs; }
  __device__ const wide_t<T>* left() const { return gradient; }
  __device__ int64_t begin(int64_t row, int64_t tap) const {
    const int64_t past = row % conv.length + (conv.taps - 1 - tap) * conv.dilation - conv.first;
    if (past < 0 || past % conv.step != 0 || past / conv.step >= conv.count) return -1;
    return (row / conv.length * conv.count + past / conv.step) * conv.outputs;
  }
  __device__ wide_t<T> right(int64_t tap, int64_t k, int64_t column) const {
    return static_cast<wide_t<T>>(conv.weight[(tap * conv.inputs + column) * conv.outputs + k]);
  }
  __device__ void finish(int64_t row, int64_t column, wide_t<T> value) const {
    grad_x[row * conv.inputs + column] = static_cast<T>(value);
  }
};

// One tap: its inputs are the rows, the output rows the summands.
template <typename T>
struct GradWeightSide {
  using Left = T;
  static constexpr bool kTurned = true, kRightAcross = true;
  Conv<T> conv;
  const wide_t<T>* gradient;
  T* grad_weight;
  __host__ __device__ int64_t rows() const { return conv.inputs; }
  __host__ __device__ int64_t columns() const { return conv.outputs; }
  __device__ int64_t passes() const { return 1; }
  __device__ int64_t depth() const { return conv.batch * conv.count; }
  __device__ const T* left() const { return conv.x; }
  __device__ int64_t begin(int64_t position, int64_t) const {
    const int64_t at =
        conv.first + position % conv.count * conv.step - (conv.taps - 1 - blockIdx.z) * conv.dilation;
    return at < 0 ? -1 : (position / conv.count * conv.length + at) * conv.inputs;
  }
  __device__ wide_t<T> right(int64_t, int64_t k, int64_t column) const {
    return gradient[k * conv.outputs + column];
  }
  __device__ void finish(int64_t row, int64_t column, wide_t<T> value) const {
    grad_weight[(blockIdx.z * conv.inputs + row) * conv.outputs + column] = static_cast<T>(value);
  }
};

template <typename Side, typename A>
__global__ void __launch_bounds__(kThreads) tile_kernel(Side side) {
  __shared__ A left[kDepth][kTile + 4], right[kDepth][kTile + 4];
  __shared__ int64_t begin[kTile];
  const int ty = threadIdx.x / kSide, tx = threadIdx.x % kSide;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kTile;
  const int64_t first_column = static_cast<int64_t>(blockIdx.y) * kTile;
  const typename Side::Left* memory = side.left();
  A sum[kEach][kEach] = {}, part[kEach][kEach] = {};
  for (int64_t pass = 0; pass < side.passes(); ++pass) {
    for (int64_t k0 = 0; k0 < side.depth(); k0 += kDepth) {
      __syncthreads();  // the slabs and the beginnings have been read
      if constexpr (Side::kTurned) {
        if (threadIdx.x < kDepth) {
          const int64_t k = k0 + threadIdx.x;
          begin[threadIdx.x] = k < side.depth() ? side.begin(k, pass) : -1;
        }
        __syncthreads();
      } else if (k0 == 0) {
        if (threadIdx.x < kTile) {
          const int64_t row = first_row + threadIdx.x;
          begin[threadIdx.x] = row < side.rows() ? side.begin(row, pass) : -1;
        }
        __syncthreads();
      }
      for (int at = threadIdx.x; at < kTile * kDepth; at += kThreads) {
        // Neighbouring threads read neighbouring numbers.
        const int row = Side::kTurned ? at % kTile : at / kDepth,
                  k = Side::kTurned ? at / kTile : at % kDepth;
        const int64_t from = begin[Side::kTurned ? k : row];
        const int64_t along = Side::kTurned ? first_row + row : k0 + k;
        const bool inside = from >= 0 && along < (Side::kTurned ? side.rows() : side.depth());
        left[k][row] = inside ? static_cast<A>(memory[from + along]) : A(0);
        const int column = Side::kRightAcross ? at % kTile : at / kDepth;
        const int r = Side::kRightAcross ? at / kTile : at % kDepth;
        const bool there = k0 + r < side.depth() && first_column + column < side.columns();
        right[r][column] = there ? side.right(pass, k0 + r, first_column + column) : A(0);
      }
      __syncthreads();
#pragma unroll
      for (int k = 0; k < kDepth; ++k) {
        A x[kEach], w[kEach];
#pragma unroll
        for (int i = 0; i < kEach; ++i) x[i] = left[k][ty * kEach + i];
#pragma unroll
        for (int j = 0; j < kEach; ++j) w[j] = right[k][tx + kSide * j];
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
#pragma unroll
          for (int j = 0; j < kEach; ++j) part[i][j] += x[i] * w[j];
        }
      }
      if ((k0 + kDepth) % kStretch != 0 && k0 + kDepth < side.depth()) continue;
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
#pragma unroll
        for (int j = 0; j < kEach; ++j) sum[i][j] += part[i][j], part[i][j] = A(0);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const int64_t row = first_row + ty * kEach + i, column = first_column + tx + kSide * j;
      if (row < side.rows() && column < side.columns()) side.finish(row, column, sum[i][j]);
    }
  }
}

// All rows (up to kFewRows) and kFewColumns columns: thread (part, column) sums every kParts-th summand.
template <typename T>
__global__ void __launch_bounds__(kThreads) narrow_kernel(ForwardSide<T> side) {
  using A = wide_t<T>;
  __shared__ A held[kFewRows][kStripe];
  __shared__ A parts[kParts][kFewRows][kFewColumns];
  __shared__ int64_t begin[kFewRows];
  const int part = threadIdx.x / kFewColumns;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kFewColumns + threadIdx.x % kFewColumns;
  const bool there = column < side.columns();
  const int rows = static_cast<int>(side.rows());
  A sum[kFewRows] = {};
  for (int64_t tap = 0; tap < side.passes(); ++tap) {
    // Read between the two barriers of each stripe alone, so it needs none of its own.
    if (threadIdx.x < kFewRows) begin[threadIdx.x] = threadIdx.x < rows ? side.begin(threadIdx.x, tap) : -1;
    for (int64_t k0 = 0; k0 < side.depth(); k0 += kStripe) {
      // The weights are asked for before the rows are waited for.
      A w[kStripe / kParts];
#pragma unroll
      for (int i = 0; i < kStripe / kParts; ++i) {
        const int64_t k = k0 + part + i * kParts;
        w[i] = there && k < side.depth() ? side.right(tap, k, column) : A(0);
      }
      __syncthreads();  // where the rows begin is written, and those of the last stripe have been read
      for (int at = threadIdx.x; at < kFewRows * kStripe; at += kThreads) {
        const int row = at / kStripe, k = at % kStripe;
        held[row][k] = begin[row] >= 0 && k0 + k < side.depth()
                           ? static_cast<A>(side.left()[begin[row] + k0 + k])
                           : A(0);
      }
      __syncthreads();
#pragma unroll
      for (int i = 0; i < kStripe / kParts; ++i) {
#pragma unroll
        for (int row = 0; row < kFewRows; ++row) sum[row] += held[row][part + i * kParts] * w[i];
      }
    }
  }
#pragma unroll
  for (int row = 0; row < kFewRows; ++row) parts[part][row][threadIdx.x % kFewColumns] = sum[row];
  __syncthreads();
  for (int at = threadIdx.x; at < rows * kFewColumns; at += kThreads) {
    const int row = at / kFewColumns, c = at % kFewColumns;
    A total = A(0);
    for (int p = 0; p < kParts; ++p) total += parts[p][row][c];
    const int64_t to = static_cast<int64_t>(blockIdx.x) * kFewColumns + c;
    if (to < side.columns()) side.finish(row, to, total);
  }
}

// The gradient of y taken back to that of the convolution, and to that of the residual where there was one.
template <typename T>
__global__ void gradient_kernel(const T* grad_y, const T* y, const bool* active, int64_t size, bool relu,
                                wide_t<T> scale, wide_t<T>* gradient, T* grad_residual) {
  using A = wide_t<T>;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at >= size) return;
  A g = static_cast<A>(grad_y[at]);
  if (grad_residual != nullptr) {
    if (static_cast<A>(y[at]) <= A(0)) g = A(0);
    grad_residual[at] = static_cast<T>(g);
    if (relu) g = active[at] ? g * scale : A(0);
  } else if (relu) {
    g = static_cast<A>(y[at]) <= A(0) ? A(0) : g * scale;
  }
  gradient[at] = g;
}

// Columns of the gradient, summed in double.
template <typename T>
__global__ void grad_bias_kernel(const wide_t<T>* gradient, int64_t rows, int64_t outputs, T* grad_bias) {
  __shared__ double parts[kThreads / kSumColumns][kSumColumns];
  const int lane = threadIdx.x % kSumColumns, part = threadIdx.x / kSumColumns;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kSumColumns + lane;
  double sum = 0.0;
  if (column < outputs) {
    for (int64_t m = part; m < rows; m += kThreads / kSumColumns) sum += gradient[m * outputs + column];
  }
  parts[part][lane] = sum;
  __syncthreads();
  if (part != 0 || column >= outputs) return;
  for (int p = 1; p < kThreads / kSumColumns; ++p) sum += parts[p][lane];
  grad_bias[column] = static_cast<T>(static_cast<wide_t<T>>(sum));
}

template <typename Side>
void launch_tiles(const Side& side, int64_t taps, cudaStream_t stream) {
  using A = decltype(side.right(0, 0, 0));
  const dim3 grid(static_cast<unsigned>(ceil_div(side.rows(), kTile)),
                  static_cast<unsigned>(ceil_div(side.columns(), kTile)), static_cast<unsigned>(taps));
  if (grid.x == 0 || grid.y == 0) return;
  tile_kernel<Side, A><<<grid, kThreads, 0, stream>>>(side);
  Launch::check(kConv);
}

// Sizes of a call, checked; x and weight are dense.
template <typename T>
Conv<T> conv_of(const Tensor& x, const Tensor& weight, int64_t dilation, int64_t count, int64_t step,
                bool relu, double dropout) {
  Conv<T> conv{};
  conv.x = pointer<const T>(x);
  conv.weight = pointer<const T>(weight);
  conv.batch = x.size(0);
  conv.length = x.size(1);
  conv.inputs = x.size(2);
  conv.outputs = weight.size(2);
  conv.taps = weight.size(0);
  conv.dilation = dilation;
  conv.count = count;
  conv.step = step;
  conv.first = conv.length - 1 - (count - 1) * step;
  conv.relu = relu;
  conv.threshold = static_cast<int64_t>(dropout * 4294967296.0);
  conv.scale = static_cast<wide_t<T>>(1.0 / (1.0 - dropout));
  return conv;
}

void check_call(const Tensor& x, const Tensor& weight, int64_t dilation, int64_t count, int64_t step,
                bool relu, double dropout) {
  STD_TORCH_CHECK(x.dim() == 3 && weight.dim() == 3 && weight.size(0) >= 1 && weight.size(1) == x.size(2) &&
                      weight.scalar_type() == x.scalar_type(),
                  kConv, ": x must be [B, n, Cin] and weight [k, Cin, Cout] of the same type");
  STD_TORCH_CHECK(
      dilation >= 1 && step >= 1 && count >= 0 && (count == 0 || x.size(1) - 1 - (count - 1) * step >= 0),
      kConv, ": dilation and step must be at least 1, and the positions lie in x");
  STD_TORCH_CHECK(0.0 <= dropout && dropout < 1.0 && (dropout == 0.0 || relu), kConv,
                  ": dropout must lie in [0, 1) and follows relu");
  STD_TORCH_CHECK(
      weight.size(0) < 65536 && ceil_div(weight.size(2), kTile) < 65536 && ceil_div(x.size(2), kTile) < 65536,
      kConv, ": more taps or channels than a grid holds");
}

std::optional<Tensor> dense_like(const std::optional<Tensor>& any, const Tensor& x, int64_t size) {
  if (!any.has_value()) return std::nullopt;
  STD_TORCH_CHECK(any->scalar_type() == x.scalar_type() && any->numel() == size, kConv,
                  ": bias must be [Cout], and residual and gradient [B, count, Cout], of x's type");
  return dense(*any);
}

std::tuple<Tensor, Tensor> causal_conv_fwd_cuda(Tensor x_any, Tensor weight_any,
                                                std::optional<Tensor> bias_any,
                                                std::optional<Tensor> residual_any,
                                                std::optional<Tensor> seed, int64_t dilation,
                                                std::optional<int64_t> count_any, int64_t step, bool relu,
                                                double dropout, bool with_grad) {
  const int64_t count = count_any.value_or(x_any.dim() == 3 ? x_any.size(1) : 0);
  check_call(x_any, weight_any, dilation, count, step, relu, dropout);
  const Launch launch(x_any);
  const Tensor x = dense(x_any), weight = dense(weight_any);
  const int64_t batch = x.size(0), outputs = weight.size(2);
  const std::optional<Tensor> bias = dense_like(bias_any, x, outputs);
  const std::optional<Tensor> residual = dense_like(residual_any, x, batch * count * outputs);
  STD_TORCH_CHECK(
      dropout == 0.0 || (seed.has_value() && seed->scalar_type() == ScalarType::Long && seed->numel() == 1),
      kConv, ": dropout needs a seed of one int64");
  Tensor y = torch::stable::new_empty(x, {batch, count, outputs});
  const bool kept = relu && residual.has_value() && with_grad;
  Tensor active = kept ? torch::stable::new_empty(x, {batch, count, outputs}, ScalarType::Bool)
                       : torch::stable::new_empty(x, {0}, ScalarType::Bool);
  if (y.numel() == 0) return {y, active};
  dispatch(x.scalar_type(), kConv, [&](auto zero) {
    using T = decltype(zero);
    Conv<T> conv = conv_of<T>(x, weight, dilation, count, step, relu, dropout);
    conv.bias = pointer_or_null<const T>(bias);
    conv.residual = pointer_or_null<const T>(residual);
    conv.seed = dropout > 0.0 ? pointer<const int64_t>(*seed) : nullptr;
    conv.y = pointer<T>(y);
    conv.active = kept ? pointer<bool>(active) : nullptr;
    const ForwardSide<T> side{conv};
    // In float64, which is there for checks, a narrow product's rows would not fit.
    if constexpr (sizeof(wide_t<T>) == sizeof(float)) {
      if (side.rows() <= kFewRows) {
        const unsigned blocks = static_cast<unsigned>(ceil_div(outputs, kFewColumns));
        narrow_kernel<T><<<blocks, kThreads, 0, launch.stream()>>>(side);
        return Launch::check(kConv);
      }
    }
    launch_tiles(side, 1, launch.stream());
  });
  return {y, active};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> causal_conv_bwd_cuda(
    Tensor grad_any, Tensor x_any, Tensor weight_any, Tensor y_any, Tensor active_any, int64_t dilation,
    int64_t step, bool relu, bool residual, double dropout, bool want_x, bool want_weight) {
  STD_TORCH_CHECK(grad_any.dim() == 3, kConv, ": the gradient must be [B, count, Cout]");
  const int64_t count = grad_any.size(1);
  check_call(x_any, weight_any, dilation, count, step, relu, dropout);
  const Launch launch(x_any);
  const Tensor x = dense(x_any), weight = dense(weight_any);
  const int64_t outputs = weight.size(2), rows = x.size(0) * count, size = rows * outputs;
  const Tensor grad_y = *dense_like(grad_any, x, size);
  const Tensor y = relu || residual ? *dense_like(y_any, x, size) : y_any;
  const Tensor active = dense(active_any);
  STD_TORCH_CHECK(!(relu && residual) || (active.scalar_type() == ScalarType::Bool && active.numel() == size),
                  kConv, ": active must be [B, count, Cout] bool");
  Tensor gradient = torch::stable::new_empty(x, grad_y.sizes(), wide_of(x.scalar_type()));
  Tensor grad_residual =
      residual ? torch::stable::new_empty(x, grad_y.sizes()) : torch::stable::new_empty(x, {0});
  Tensor grad_x = want_x ? torch::stable::new_empty(x, x.sizes()) : torch::stable::new_empty(x, {0});
  Tensor grad_weight =
      want_weight ? torch::stable::new_empty(x, weight.sizes()) : torch::stable::new_empty(x, {0});
  Tensor grad_bias = torch::stable::new_empty(x, {outputs});
  const cudaStream_t stream = launch.stream();
  dispatch(x.scalar_type(), kConv, [&](auto zero) {
    using T = decltype(zero);
    using A = wide_t<T>;
    const Conv<T> conv = conv_of<T>(x, weight, dilation, count, step, relu, dropout);
    if (size > 0) {
      gradient_kernel<T><<<static_cast<unsigned>(ceil_div(size, kThreads)), kThreads, 0, stream>>>(
          pointer<const T>(grad_y), pointer<const T>(y), pointer<const bool>(active), size, relu, conv.scale,
          pointer<A>(gradient), residual ? pointer<T>(grad_residual) : nullptr);
      Launch::check(kConv);
    }
    if (outputs > 0) {
      grad_bias_kernel<T><<<static_cast<unsigned>(ceil_div(outputs, kSumColumns)), kThreads, 0, stream>>>(
          pointer<const A>(gradient), rows, outputs, pointer<T>(grad_bias));
      Launch::check(kConv);
    }
    if (want_x) {
      launch_tiles(GradXSide<T>{conv, pointer<const A>(gradient), pointer<T>(grad_x)}, 1, stream);
    }
    if (want_weight) {
      launch_tiles(GradWeightSide<T>{conv, pointer<const A>(gradient), pointer<T>(grad_weight)}, conv.taps,
                   stream);
    }
  });
  return {grad_x, grad_weight, grad_bias, grad_residual};
}

STABLE_TORCH_LIBRARY_IMPL(deepmsi, CUDA, m) {
  m.impl("dilated_causal_conv1d_cpp_fwd", TORCH_BOX(&causal_conv_fwd_cuda));
  m.impl("dilated_causal_conv1d_cpp_bwd", TORCH_BOX(&causal_conv_bwd_cuda));
}

}  // namespace
}  // namespace deepmsi

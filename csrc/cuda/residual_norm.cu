// residual_norm under the CUDA key: y = x + s · LN(branch). A group of threads holds one row in registers: a
// warp up to 768 channels, a block above. The backward pass makes the statistics again; what it sums over
// rows are partial sums of a fixed number of groups, added up in fixed order without atomics.
#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>
#include <type_traits>

#include "tensors.cuh"

namespace deepmsi {
namespace {

constexpr const char* kNorm = "residual_norm";
constexpr int kThreads = 128;
constexpr int64_t kSummingGroups = 1024;  // depends on nothing of the device, so that bits do not either
constexpr int kSummers = 16;              // threads that share the partial sums of one channel

// What both directions read; V is the type that sums.
template <typename V>
struct Rows {
  int64_t rows, channels;
  V share;  // 1 / C
  V eps;
  const V* weight;  // [C]
  const V* bias;    // [C]
  const V* scale;   // [R], or null: every row's factor is 1

  __device__ V scale_of(int64_t row) const { return scale == nullptr ? V(1) : scale[row]; }
};

// A thread's place in its group of kGroup threads; it holds channels lane, lane + kGroup, ...
template <int kGroup>
struct Place {
  int64_t group;  // of the grid
  int lane;

  __device__ Place()
      : group(static_cast<int64_t>(blockIdx.x) * (kThreads / kGroup) + threadIdx.x / kGroup),
        lane(static_cast<int>(threadIdx.x) % kGroup) {}

  __device__ int64_t channel(int k) const { return lane + static_cast<int64_t>(kGroup) * k; }

  // All threads of the group call it.
  template <typename V>
  __device__ V sum(V value) const {
    if constexpr (kGroup == kWarp) {
      return warp_sum(value);
    } else {
      return block_sum(value);
    }
  }
};

// (branch - mean) / deviation of a row into `unit`, 0 past the channels; returns 1 / deviation.
template <int kGroup, int kEach, typename T, typename V>
__device__ V unit_row(const Rows<V>& call, const Place<kGroup>& place, const T* branch, V (&unit)[kEach]) {
  V sum = 0;
#pragma unroll
  for (int k = 0; k < kEach; ++k) {
    const int64_t c = place.channel(k);
    unit[k] = c < call.channels ? static_cast<V>(branch[c]) : V(0);
    sum += unit[k];
  }
  const V mean = place.sum(sum) * call.share;
  V squares = 0;
#pragma unroll
  for (int k = 0; k < kEach; ++k) {
    unit[k] = place.channel(k) < call.channels ? unit[k] - mean : V(0);
    squares += unit[k] * unit[k];
  }
  const V inverse = rsqrt(place.sum(squares) * call.share + call.eps);
#pragma unroll
  for (int k = 0; k < kEach; ++k) unit[k] *= inverse;
  return inverse;
}

// S is the type of the stream, x and y.
template <int kGroup, int kEach, typename S, typename T, typename V>
__global__ void __launch_bounds__(kThreads) forward(Rows<V> call, const S* x, const T* branch, S* y) {
  const Place<kGroup> place;
  if (place.group >= call.rows) return;
  const int64_t first = place.group * call.channels;
  V unit[kEach];
  unit_row(call, place, branch + first, unit);
  const V scale = call.scale_of(place.group);
#pragma unroll
  for (int k = 0; k < kEach; ++k) {
    const int64_t c = place.channel(k);
    if (c < call.channels) {
      const V normed = unit[k] * call.weight[c] + call.bias[c];
      y[first + c] = static_cast<S>(static_cast<V>(x[first + c]) + scale * normed);
    }
  }
}

// Of a group's rows; `partial` [groups, 2, C] gets its sums for weight and bias.
template <int kGroup, int kEach, typename S, typename T, typename V>
__global__ void __launch_bounds__(kThreads)
    backward(Rows<V> call, const S* grad_y, const T* branch, T* grad_branch, V* partial, int64_t groups) {
  const Place<kGroup> place;
  if (place.group >= groups) return;
  V grad_weight[kEach], grad_bias[kEach];
#pragma unroll
  for (int k = 0; k < kEach; ++k) grad_weight[k] = grad_bias[k] = V(0);
  for (int64_t row = place.group; row < call.rows; row += groups) {
    const int64_t first = row * call.channels;
    V unit[kEach];
    const V inverse = unit_row(call, place, branch + first, unit);
    const V scale = call.scale_of(row);
    V sum = 0, along = 0;
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      const int64_t c = place.channel(k);
      if (c < call.channels) {
        const V grad = scale * static_cast<V>(grad_y[first + c]);
        grad_weight[k] += grad * unit[k];
        grad_bias[k] += grad;
        sum += grad * call.weight[c];
        along += grad * call.weight[c] * unit[k];
      }
    }
    sum = place.sum(sum) * call.share;
    along = place.sum(along) * call.share;
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      const int64_t c = place.channel(k);
      if (c < call.channels) {
        // Read again, out of the cache, rather than held.
        const V grad = scale * static_cast<V>(grad_y[first + c]) * call.weight[c];
        grad_branch[first + c] = static_cast<T>((grad - sum - unit[k] * along) * inverse);
      }
    }
  }
  partial += place.group * 2 * call.channels;
#pragma unroll
  for (int k = 0; k < kEach; ++k) {
    const int64_t c = place.channel(k);
    if (c < call.channels) {
      partial[c] = grad_weight[k];
      partial[call.channels + c] = grad_bias[k];
    }
  }
}

// Adds `partial` [groups, 2, C] up.
template <typename V>
__global__ void add_partial(const V* partial, int64_t groups, int64_t channels, V* weight, V* bias) {
  __shared__ V parts[kSummers][kWarp];
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kWarp + threadIdx.x;
  V sum = 0;
  for (int64_t g = threadIdx.y; column < 2 * channels && g < groups; g += kSummers) {
    sum += partial[g * 2 * channels + column];
  }
  parts[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y > 0 || column >= 2 * channels) return;
  for (int k = 1; k < kSummers; ++k) sum += parts[k][threadIdx.x];
  (column < channels ? weight[column] : bias[column - channels]) = sum;
}

// Call run with the threads of a row and the channels of a thread.
template <typename Run>
void by_width(int64_t channels, const Run& run) {
  using std::integral_constant;
  const integral_constant<int, kWarp> warp;
  if (channels <= 4 * kWarp) return run(warp, integral_constant<int, 4>{});
  if (channels <= 12 * kWarp) return run(warp, integral_constant<int, 12>{});
  if (channels <= 24 * kWarp) return run(warp, integral_constant<int, 24>{});
  STD_TORCH_CHECK(channels <= 16 * kThreads, kNorm, ": rows may have ", 16 * kThreads, " channels at most");
  run(integral_constant<int, kThreads>{}, integral_constant<int, 16>{});
}

// x itself where it is dense and of that type, else a copy that is.
Tensor dense_as(const Tensor& x, ScalarType type) {
  return dense(x.scalar_type() == type ? x : torch::stable::to(x, type));
}

// The arguments that both directions share, checked, and the norm's in the type that sums.
struct Call {
  ScalarType wide;
  Tensor branch, weight;
  std::optional<Tensor> bias, scale;
  double eps;
  Launch on;

  Call(const Tensor& branch_any, const Tensor& weight_any, const std::optional<Tensor>& bias_any,
       const std::optional<Tensor>& scale_any, double eps_)
      : wide(wide_of(branch_any.scalar_type())),
        branch(dense(branch_any)),
        weight(dense_as(weight_any, wide)),
        eps(eps_),
        on(branch_any) {
    STD_TORCH_CHECK(branch.dim() == 2 && weight.numel() == branch.size(1), kNorm,
                    ": branch must be [R, C] and the norm's weight [C]");
    if (bias_any.has_value()) {
      bias = dense_as(*bias_any, wide);
      STD_TORCH_CHECK(bias->numel() == branch.size(1), kNorm, ": the norm's bias must be [C]");
    }
    if (scale_any.has_value()) {
      scale = dense_as(*scale_any, wide);
      STD_TORCH_CHECK(scale->numel() == branch.size(0), kNorm, ": row_scale must be [R]");
    }
  }

  // The stream's x or gradient, in the type of the branch or in the one that sums.
  Tensor stream(const Tensor& x) const {
    STD_TORCH_CHECK(x.dim() == 2 && x.size(0) == branch.size(0) && x.size(1) == branch.size(1), kNorm,
                    ": x and its gradient must be as branch is");
    return dense_as(x, x.scalar_type() == branch.scalar_type() ? x.scalar_type() : wide);
  }

  template <typename V>
  Rows<V> rows() const {
    return {branch.size(0),
            branch.size(1),
            static_cast<V>(1.0 / static_cast<double>(std::max<int64_t>(branch.size(1), 1))),
            static_cast<V>(eps),
            pointer<const V>(weight),
            pointer_or_null<const V>(bias),
            pointer_or_null<const V>(scale)};
  }

  // Call run with values of the stream's type, the branch's and the one that sums.
  template <typename Run>
  void by_types(const Tensor& streamed, const Run& run) const {
    dispatch(branch.scalar_type(), kNorm, [&](auto narrow) {
      using T = decltype(narrow);
      using V = wide_t<T>;
      if constexpr (!std::is_same_v<T, V>) {
        if (streamed.scalar_type() == branch.scalar_type()) return run(T{}, T{}, V{});
      }
      run(V{}, T{}, V{});
    });
  }
};

template <int kGroup>
unsigned blocks_of(int64_t groups) {
  return static_cast<unsigned>(ceil_div(groups, kThreads / kGroup));
}

Tensor residual_norm_fwd_cuda(Tensor x_any, Tensor branch, Tensor weight, Tensor bias,
                              std::optional<Tensor> scale, double eps) {
  const Call call(branch, weight, bias, scale, eps);
  const Tensor x = call.stream(x_any);
  Tensor y = torch::stable::new_empty(x, x.sizes());
  if (y.numel() > 0) {
    call.by_types(x, [&](auto stream, auto narrow, auto wide) {
      using S = decltype(stream);
      using T = decltype(narrow);
      using V = decltype(wide);
      by_width(x.size(1), [&](auto group, auto each) {
        constexpr int kGroup = decltype(group)::value, kEach = decltype(each)::value;
        forward<kGroup, kEach, S, T, V><<<blocks_of<kGroup>(x.size(0)), kThreads, 0, call.on.stream()>>>(
            call.rows<V>(), pointer<const S>(x), pointer<const T>(call.branch), pointer<S>(y));
      });
    });
    Launch::check(kNorm);
  }
  return y.scalar_type() == x_any.scalar_type() ? y : torch::stable::to(y, x_any.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor> residual_norm_bwd_cuda(Tensor grad_any, Tensor branch, Tensor weight,
                                                          std::optional<Tensor> scale, double eps) {
  const Call call(branch, weight, std::nullopt, scale, eps);
  const Tensor grad_y = call.stream(grad_any);
  const int64_t channels = grad_y.size(1), groups = std::min(grad_y.size(0), kSummingGroups);
  Tensor grad_branch = torch::stable::new_empty(call.branch, call.branch.sizes());
  Tensor grad_weight = torch::stable::new_empty(call.weight, {channels});
  Tensor grad_bias = torch::stable::new_empty(call.weight, {channels});
  const Tensor partial = torch::stable::new_empty(call.weight, {groups, 2, channels});
  if (channels > 0) {
    call.by_types(grad_y, [&](auto stream, auto narrow, auto wide) {
      using S = decltype(stream);
      using T = decltype(narrow);
      using V = decltype(wide);
      if (groups > 0) {
        by_width(channels, [&](auto group, auto each) {
          constexpr int kGroup = decltype(group)::value, kEach = decltype(each)::value;
          backward<kGroup, kEach, S, T, V><<<blocks_of<kGroup>(groups), kThreads, 0, call.on.stream()>>>(
              call.rows<V>(), pointer<const S>(grad_y), pointer<const T>(call.branch),
              pointer<T>(grad_branch), pointer<V>(partial), groups);
        });
        Launch::check(kNorm);
      }
      const dim3 threads(kWarp, kSummers);
      add_partial<V><<<static_cast<unsigned>(ceil_div(2 * channels, kWarp)), threads, 0, call.on.stream()>>>(
          pointer<const V>(partial), groups, channels, pointer<V>(grad_weight), pointer<V>(grad_bias));
    });
    Launch::check(kNorm);
  }
  const ScalarType type = weight.scalar_type();
  if (type == call.wide) return {grad_branch, grad_weight, grad_bias};
  return {grad_branch, torch::stable::to(grad_weight, type), torch::stable::to(grad_bias, type)};
}

STABLE_TORCH_LIBRARY_IMPL(deepmsi, CUDA, m) {
  m.impl("residual_norm_cpp_fwd", TORCH_BOX(&residual_norm_fwd_cuda));
  m.impl("residual_norm_cpp_bwd", TORCH_BOX(&residual_norm_bwd_cuda));
}

}  // namespace
}  // namespace deepmsi

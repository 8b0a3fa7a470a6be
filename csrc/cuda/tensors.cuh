// What the CUDA operators share: checks and views of torch's tensors through the stable ABI, the current
// stream, dispatch by storage type, and reductions in a fixed order.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <optional>
#include <tuple>

namespace deepmsi {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// The type that a storage type is summed in.
template <typename T>
struct Wide {
  using type = float;
};
template <>
struct Wide<double> {
  using type = double;
};
template <typename T>
using wide_t = typename Wide<T>::type;

inline ScalarType wide_of(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline Tensor dense(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

template <typename P>
P* pointer(const Tensor& x) {
  return static_cast<P*>(x.data_ptr());
}

template <typename P>
P* pointer_or_null(const std::optional<Tensor>& x) {
  return x.has_value() ? pointer<P>(*x) : nullptr;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Makes the tensor's device current for its lifetime, and knows torch's stream there.
class Launch {
 public:
  explicit Launch(const Tensor& x) : guard_(x.get_device_index()) {
    void* stream = nullptr;
    // Checked by hand: torch 2.11 has no macro for it under the name that later releases give it.
    const auto code = aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream);
    STD_TORCH_CHECK(code == AOTI_TORCH_SUCCESS, "torch has no current stream for the device of a tensor");
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }

  // Call after each launch.
  static void check(const char* op) {
    const cudaError_t error = cudaGetLastError();
    STD_TORCH_CHECK(error == cudaSuccess, op, ": the launch failed: ", cudaGetErrorString(error));
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

// Call f with a value of the storage type.
template <typename F>
void dispatch(ScalarType type, const char* op, F&& f) {
  switch (type) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Double:
      return f(double{});
    case ScalarType::BFloat16:
      return f(BFloat16{});
    case ScalarType::Half:
      return f(Half{});
    default:
      STD_TORCH_CHECK(false, op, ": takes float32, float64, bfloat16 or float16");
  }
}

template <typename V>
__device__ __forceinline__ V warp_sum(V value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kAllLanes, value, offset);
  return value;
}

template <typename V>
__device__ __forceinline__ V warp_max(V value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const V other = __shfl_xor_sync(kAllLanes, value, offset);
    value = other > value ? other : value;
  }
  return value;
}

// Every thread of the block calls these and gets the same bits. The block is one-dimensional and of whole
// warps.
template <typename V>
__device__ V block_share(V value, V neutral) {
  __shared__ V parts[kWarp];
  const int warps = static_cast<int>(blockDim.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  __syncthreads();  // the parts of the last call have been read
  if (lane == 0) parts[threadIdx.x / kWarp] = value;
  __syncthreads();
  return lane < warps ? parts[lane] : neutral;
}

template <typename V>
__device__ V block_sum(V value) {
  return warp_sum(block_share(warp_sum(value), V(0)));
}

template <typename V>
__device__ V block_max(V value, V lowest) {
  return warp_max(block_share(warp_max(value), lowest));
}

// Inclusive sum over the threads before and at this one; `total` gets that of the block.
__device__ inline int32_t block_scan(int32_t value, int32_t* total) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
#pragma unroll
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const int32_t before = __shfl_up_sync(kAllLanes, value, offset);
    if (lane >= offset) value += before;
  }
  const int32_t part = block_share(__shfl_sync(kAllLanes, value, kWarp - 1), 0);
  *total = warp_sum(part);
  return value + warp_sum(lane < warp ? part : 0);
}

}  // namespace deepmsi

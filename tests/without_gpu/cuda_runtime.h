// As much of CUDA as csrc/cuda speaks, on a CPU, for tests: the sources that build_on_cpu.py writes include
// this where CUDA's header would be. See scheduler.cpp for what runs, and what it proves.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <utility>

// torch's tensors lie on the CPU, which has neither guards nor streams.
#define aoti_torch_device_type_cuda aoti_torch_device_type_cpu
#define aoti_torch_create_device_guard(index, guard) (*(guard) = nullptr, AOTI_TORCH_SUCCESS)
#define aoti_torch_delete_device_guard(guard) ((void)(guard), AOTI_TORCH_SUCCESS)
#define aoti_torch_get_current_cuda_stream(index, stream) (*(stream) = nullptr, AOTI_TORCH_SUCCESS)

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration };
enum cudaMemcpyKind { cudaMemcpyDeviceToHost };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

namespace cuda_on_cpu {

// Of the running thread and launch.
extern dim3 thread_index, block_index, block_size, grid_size;

// Where a thread waits, by file and line of the source.
using Place = const char*;
void barrier(Place place);
int barrier_count(bool holds, Place place);
void warp_barrier(unsigned mask, Place place);
uint64_t warp_exchange(unsigned mask, uint64_t given, int from, Place place);  // what lane `from` gave
unsigned warp_ballot(unsigned mask, bool holds, Place place);
int lane();

char* dynamic_shared();
bool is_fresh(const void* shared);  // whether the block sees this variable for the first time

void run(const void* kernel, dim3 grid, dim3 block, int64_t shared, void (*body)(void*), void* arguments);
void allow_shared(const void* kernel, int64_t bytes);
int64_t shared_limit();
cudaError_t take_error();

template <typename... Variables>
void poison(Variables&... variables) {
  ((is_fresh(&variables) ? (void)std::memset(&variables, 0xff, sizeof variables) : (void)0), ...);
}

template <typename V>
V exchange(unsigned mask, V value, int from, Place place) {
  static_assert(sizeof(V) <= sizeof(uint64_t));
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof value);
  word = warp_exchange(mask, word, from, place);
  std::memcpy(&value, &word, sizeof value);
  return value;
}

// kernel<<<grid, block, shared, stream>>>(given...)
template <typename... Parameters>
auto launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, int64_t shared, cudaStream_t) {
  return [=](auto&&... given) {
    struct Call {
      void (*kernel)(Parameters...);
      std::tuple<Parameters...> values;
    } call{kernel, {static_cast<Parameters>(given)...}};
    run(
        reinterpret_cast<const void*>(kernel), grid, block, shared,
        [](void* at) { std::apply(static_cast<Call*>(at)->kernel, static_cast<Call*>(at)->values); }, &call);
  };
}

}  // namespace cuda_on_cpu

#define CUDA_ON_CPU_TEXT(line) #line
#define CUDA_ON_CPU_LINE(line) CUDA_ON_CPU_TEXT(line)
#define CUDA_ON_CPU_HERE __FILE__ ":" CUDA_ON_CPU_LINE(__LINE__)

#define threadIdx cuda_on_cpu::thread_index
#define blockIdx cuda_on_cpu::block_index
#define blockDim cuda_on_cpu::block_size
#define gridDim cuda_on_cpu::grid_size
#define __syncthreads() cuda_on_cpu::barrier(CUDA_ON_CPU_HERE)
#define __syncthreads_count(...) cuda_on_cpu::barrier_count(__VA_ARGS__, CUDA_ON_CPU_HERE)
#define __syncwarp() cuda_on_cpu::warp_barrier(0xffffffffu, CUDA_ON_CPU_HERE)
#define __ballot_sync(mask, ...) cuda_on_cpu::warp_ballot(mask, __VA_ARGS__, CUDA_ON_CPU_HERE)
#define __shfl_sync(mask, value, from) cuda_on_cpu::exchange(mask, value, from, CUDA_ON_CPU_HERE)
#define __shfl_xor_sync(mask, value, offset) \
  cuda_on_cpu::exchange(mask, value, cuda_on_cpu::lane() ^ static_cast<int>(offset), CUDA_ON_CPU_HERE)
#define __shfl_up_sync(mask, value, offset)                                                               \
  cuda_on_cpu::exchange(                                                                                  \
      mask, value, cuda_on_cpu::lane() < (offset) ? cuda_on_cpu::lane() : cuda_on_cpu::lane() - (offset), \
      CUDA_ON_CPU_HERE)

inline int min(int a, int b) { return std::min(a, b); }
inline float rsqrt(float x) { return 1.0f / std::sqrt(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
using std::exp;
using std::sqrt;
inline int __ffs(unsigned bits) { return __builtin_ffs(static_cast<int>(bits)); }
inline uint32_t __umulhi(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>(static_cast<uint64_t>(a) * b >> 32);
}
inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline int64_t __double_as_longlong(double value) {
  int64_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline cudaError_t cudaGetLastError() { return cuda_on_cpu::take_error(); }
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid configuration argument";
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = static_cast<int>(cuda_on_cpu::shared_limit());
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
  cuda_on_cpu::allow_shared(reinterpret_cast<const void*>(kernel), bytes);
  return cudaSuccess;
}

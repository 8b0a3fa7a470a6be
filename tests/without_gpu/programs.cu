// Kernels that keep CUDA's rules and kernels that break them, for test_cuda_on_cpu.py: `programs NAME` runs
// one, and prints its output or the sentence by which it was refused.
#include <cuda_runtime.h>

#include <cstdio>
#include <exception>
#include <string>

constexpr unsigned kAll = 0xffffffffu;

// y[i] = x[n - 1 - i] through shared memory.
template <bool kWaits>
__global__ void reverse(const int* x, int* y) {
  __shared__ int held[64];
  held[threadIdx.x] = x[threadIdx.x];
  if (kWaits) __syncthreads();
  y[threadIdx.x] = held[blockDim.x - 1 - threadIdx.x];
}

// Each warp tells the other the number of the round, which both add up.
template <bool kWaits>
__global__ void rounds(int* y) {
  __shared__ int told[2];
  const int warp = static_cast<int>(threadIdx.x) / 32;
  int sum = 0;
  for (int round = 0; round < 16; ++round) {
    if (kWaits) __syncthreads();
    if (threadIdx.x % 32 == 0) told[warp] = round;
    __syncthreads();
    sum += told[1 - warp];
  }
  y[threadIdx.x] = sum;
}

// Shared memory of a block's own, which nobody has written.
__global__ void unwritten(int* y) {
  __shared__ int held[64], other;
  y[threadIdx.x] = held[threadIdx.x] + other;
  __syncthreads();
  held[threadIdx.x] = other = 7;
}

__global__ void dynamic(int* y, int count) {
  extern __shared__ __align__(16) char memory[];
  int* held = reinterpret_cast<int*>(memory);
  held[(threadIdx.x + 1) % count] = threadIdx.x;
  __syncthreads();
  y[threadIdx.x] = held[threadIdx.x];
}

__global__ void two_barriers(int* y) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  y[threadIdx.x] = 0;
}

__global__ void barrier_of_a_half(int* y) {
  if (threadIdx.x < 16) __syncwarp();
  y[threadIdx.x] = 0;
}

__global__ void lane_gone(int* y) {
  if (threadIdx.x == 5) return;
  y[threadIdx.x] = __shfl_xor_sync(kAll, static_cast<int>(threadIdx.x), 1);
}

__global__ void lanes_apart(int* y) {
  if (threadIdx.x % 2) {
    y[threadIdx.x] = __shfl_xor_sync(kAll, 1, 2);
  } else {
    y[threadIdx.x] = __shfl_xor_sync(kAll, 1, 4);
  }
}

__global__ void lane_unnamed(int* y) {
  if (threadIdx.x < 16) y[threadIdx.x] = __shfl_sync(0xffffu, static_cast<int>(threadIdx.x), 20);
}

// What each of the warp's operations gives, and the block's count.
__global__ void operations(int* y) {
  const int lane = static_cast<int>(threadIdx.x) % 32, value = 10 * static_cast<int>(threadIdx.x);
  int sum = __shfl_xor_sync(kAll, value, 3) - __shfl_sync(kAll, value, 4) + __shfl_up_sync(kAll, value, 2);
  sum += __ffs(__ballot_sync(kAll, lane >= 6));
  y[threadIdx.x] = sum + 1000 * __syncthreads_count(threadIdx.x % 3 == 0);
}

// Threads that are gone are not waited for.
__global__ void early(int* y) {
  y[threadIdx.x] = 1;
  if (threadIdx.x >= 32) return;
  __syncthreads();
  y[threadIdx.x] = 2;
}

__global__ void indices(int* y) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  y[block * blockDim.x * blockDim.y + threadIdx.y * blockDim.x + threadIdx.x] =
      static_cast<int>(100 * block + 10 * threadIdx.y + threadIdx.x);
}

int main(int count, char** names) {
  const std::string name = count > 1 ? names[1] : "";
  int x[64], y[64] = {};
  for (int i = 0; i < 64; ++i) x[i] = i * i;
  try {
    if (name == "reverse") reverse<true><<<1, 64, 0, nullptr>>>(x, y);
    if (name == "no_barrier") reverse<false><<<1, 64, 0, nullptr>>>(x, y);
    if (name == "rounds") rounds<true><<<1, 64, 0, nullptr>>>(y);
    if (name == "warp_ahead") rounds<false><<<1, 64, 0, nullptr>>>(y);
    if (name == "unwritten") unwritten<<<3, 64, 0, nullptr>>>(y);
    if (name == "dynamic") dynamic<<<1, 64, 256, nullptr>>>(y, 64);
    if (name == "too_much_shared") dynamic<<<1, 64, 60 << 10, nullptr>>>(y, 64);
    if (name == "asked_shared") {
      cudaFuncSetAttribute(dynamic, cudaFuncAttributeMaxDynamicSharedMemorySize, 60 << 10);
      dynamic<<<1, 64, 60 << 10, nullptr>>>(y, 64);
    }
    if (name == "no_block") unwritten<<<0, 64, 0, nullptr>>>(y);
    if (name == "large_block") unwritten<<<1, 1025, 0, nullptr>>>(y);
    if (name == "far_down") unwritten<<<dim3(1, 65536), 64, 0, nullptr>>>(y);
    if (name == "two_barriers") two_barriers<<<1, 64, 0, nullptr>>>(y);
    if (name == "barrier_of_a_half") barrier_of_a_half<<<1, 32, 0, nullptr>>>(y);
    if (name == "lane_gone") lane_gone<<<1, 64, 0, nullptr>>>(y);
    if (name == "lanes_apart") lanes_apart<<<1, 32, 0, nullptr>>>(y);
    if (name == "lane_unnamed") lane_unnamed<<<1, 32, 0, nullptr>>>(y);
    if (name == "operations") operations<<<1, 64, 0, nullptr>>>(y);
    if (name == "early") early<<<1, 64, 0, nullptr>>>(y);
    if (name == "indices") indices<<<dim3(2, 2, 2), dim3(4, 2), 0, nullptr>>>(y);
  } catch (const std::exception& refused) {
    std::puts(refused.what());
    return 1;
  }
  if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) {
    std::puts(cudaGetErrorString(error));
    return 1;
  }
  for (const int value : y) std::printf("%d ", value);
  return 0;
}

// What every .cu file needs besides the CUDA runtime: errors of a launch, types of elements, sums over a
// block.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "matrix.h"

namespace d4s {

// Throws if a call of the CUDA runtime has failed.
inline void check_cuda(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
  }
}

// Throws if the launch just made was refused.
inline void check_launch(const char* kernel) { check_cuda(cudaGetLastError(), kernel); }

// Calls work(T{}) with the CUDA type of `dtype`.
template <class Work>
void with_cuda_type(DType dtype, Work work) {
  switch (dtype) {
    case DType::float64:
      return work(double{});
    case DType::float32:
      return work(float{});
    case DType::float16:
      return work(__half{});
    case DType::bfloat16:
      return work(__nv_bfloat16{});
  }
  throw std::logic_error("unknown DType");
}

// The type that holds every value of T exactly and that its sums are rounded through.
template <class T>
struct Wide {
  using type = float;
};
template <>
struct Wide<double> {
  using type = double;
};

// Sum over the block's kThreads threads, in a fixed order; valid in thread 0. All threads take part.
template <int kThreads>
__device__ double block_sum(double value) {
  __shared__ double warp_sums[kThreads / 32];
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_down_sync(0xffffffffu, value, offset);
  __syncthreads();  // an earlier call's sums have been read
  if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = value;
  __syncthreads();
  double total = 0;
  if (threadIdx.x == 0) {
    for (int warp = 0; warp < kThreads / 32; ++warp) total += warp_sums[warp];
  }
  return total;
}

}  // namespace d4s

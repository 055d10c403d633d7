// Σ|w| of many weights: grid (blocks a weight, weights). Every block strides over its weight in loads of
// 16 bytes, four in flight, adds in float64 registers, and leaves one partial sum; a second kernel adds those
// in order. Read-only and bound by memory bandwidth.
#include <cstdint>

#include "../shared/launch_cuda.h"
#include "l1_norms.h"

namespace d4s {
namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 4;

struct WeightTable {
  Weight weights[kWeightsPerLaunch];
};

template <class T>
struct alignas(16) Pack {
  T lane[16 / sizeof(T)];
};

template <class T>
__device__ double absolute_sum(const Pack<T>& pack) {
  double sum = 0;
#pragma unroll
  for (int i = 0; i < 16 / sizeof(T); ++i) {
    sum += fabs(static_cast<double>(static_cast<typename Wide<T>::type>(pack.lane[i])));
  }
  return sum;
}

// This thread's share of Σ|data|, data [numel] in device memory.
template <class T>
__device__ double strided_sum(const T* data, int64_t numel) {
  constexpr int64_t kLanes = 16 / sizeof(T);
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kThreads;
  // A view may begin anywhere; then every element is read by itself.
  const int64_t packs = reinterpret_cast<uintptr_t>(data) % 16 == 0 ? numel / kLanes : 0;
  const Pack<T>* packed = reinterpret_cast<const Pack<T>*>(data);
  double sum = 0;
  int64_t i = thread;
  for (; i + (kUnroll - 1) * threads < packs; i += kUnroll * threads) {
    Pack<T> loaded[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) loaded[u] = packed[i + u * threads];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) sum += absolute_sum(loaded[u]);
  }
  for (; i < packs; i += threads) sum += absolute_sum(packed[i]);
  for (int64_t rest = packs * kLanes + thread; rest < numel; rest += threads) {
    sum += fabs(static_cast<double>(static_cast<typename Wide<T>::type>(data[rest])));
  }
  return sum;
}

// partial [gridDim.y, gridDim.x], written.
__global__ void __launch_bounds__(kThreads) l1_norms_kernel(const WeightTable table, double* partial) {
  const Weight& weight = table.weights[blockIdx.y];
  double sum = 0;
  switch (weight.dtype) {
    case DType::float64:
      sum = strided_sum(static_cast<const double*>(weight.data), weight.numel);
      break;
    case DType::float32:
      sum = strided_sum(static_cast<const float*>(weight.data), weight.numel);
      break;
    case DType::float16:
      sum = strided_sum(static_cast<const __half*>(weight.data), weight.numel);
      break;
    case DType::bfloat16:
      sum = strided_sum(static_cast<const __nv_bfloat16*>(weight.data), weight.numel);
      break;
  }
  sum = block_sum<kThreads>(sum);
  if (threadIdx.x == 0) partial[blockIdx.y * gridDim.x + blockIdx.x] = sum;
}

// norms[i] = Σ partial[i][0:blocks], one block a weight.
__global__ void __launch_bounds__(kThreads)
    add_partial_kernel(const double* partial, int blocks, double* norms) {
  double sum = 0;
  for (int i = threadIdx.x; i < blocks; i += kThreads) sum += partial[blockIdx.x * blocks + i];
  sum = block_sum<kThreads>(sum);
  if (threadIdx.x == 0) norms[blockIdx.x] = sum;
}

}  // namespace

void l1_norms_cuda(const Weight* weights, int64_t count, double* partial, double* norms, Stream stream) {
  for (int64_t first = 0; first < count; first += kWeightsPerLaunch) {
    const int chunk = static_cast<int>(count - first < kWeightsPerLaunch ? count - first : kWeightsPerLaunch);
    WeightTable table{};
    for (int i = 0; i < chunk; ++i) table.weights[i] = weights[first + i];
    const int blocks = kNormBlocks / chunk;
    l1_norms_kernel<<<dim3(blocks, chunk), kThreads, 0, stream>>>(table, partial);
    check_launch("l1_norms_kernel");
    add_partial_kernel<<<chunk, kThreads, 0, stream>>>(partial, blocks, norms + first);
    check_launch("add_partial_kernel");
  }
}

}  // namespace d4s

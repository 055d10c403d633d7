// bfloat16 keys by the library's products. The kernel multiplies by mma.sync, which an H100 or H200 runs at a
// third of what cuBLAS reaches there by instructions of its own (wgmma).
#include <ATen/core/Tensor.h>
#include <ATen/ops/mm.h>
#include <torch/version.h>
#ifdef D4S_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

#include <algorithm>

#include "library.h"

namespace d4s {

// Rows of the moment in one product: tall enough to fill the device, flat enough to leave out most of the
// upper half. Of 512 to 4096 the fastest on an H200 from d 4096 to 14336
// (benchmarks/results/h200/panels.csv).
constexpr int64_t kPanel = 1024;

bool is_by_library(const at::Tensor& moment, const at::Tensor& keys) {
#if defined(D4S_WITH_CUDA) && (TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 8)
  // Rows at multiples of 16 bytes; float16 products may be set to be summed in float16.
  if (keys.scalar_type() != at::kBFloat16 || moment.scalar_type() != at::kFloat) return false;
  if (keys.size(1) % 8 != 0 || keys.stride(0) % 8 != 0) return false;
  int major = 0;
  return cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, moment.device().index()) ==
             cudaSuccess &&
         major >= 9;
#else
  return false;
#endif
}

void accumulate_key_covariance_library(const at::Tensor& moment, const at::Tensor& keys) {
#if TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 8
  const int64_t d = moment.size(0);
  for (int64_t top = 0; top < d; top += kPanel) {
    const int64_t bottom = std::min(top + kPanel, d);
    const at::Tensor product = at::mm(keys.slice(1, top, bottom).t(), keys.slice(1, 0, bottom), at::kFloat);
    product.slice(1, top, bottom).tril_();
    moment.slice(0, top, bottom).slice(1, 0, bottom).add_(product);
  }
#endif
}

}  // namespace d4s

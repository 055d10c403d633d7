// moment += Σ k kᵀ by the library's products, where those are faster than the kernel.
#pragma once

#include <ATen/core/Tensor.h>

namespace d4s {

// Whether tensors on a CUDA device are better off with the library: bfloat16 keys, a float32 moment, and
// tensor cores since Hopper's (measured on an H200).
bool is_by_library(const at::Tensor& moment, const at::Tensor& keys);

// keys [n, d], col_stride 1, bfloat16. moment [d, d], contiguous, float32; nothing changes above
// its diagonal.
void accumulate_key_covariance_library(const at::Tensor& moment, const at::Tensor& keys);

}  // namespace d4s

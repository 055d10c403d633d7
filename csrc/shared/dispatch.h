// The choice between the CPU and the CUDA half of an op: the only place that asks whether there are kernels.
#pragma once

#include <ATen/core/Tensor.h>
#ifdef D4S_WITH_CUDA
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>
#endif

#include "arguments.h"
#include "matrix.h"

namespace d4s {

// Calls on_cpu() where `tensor` is on the CPU, else on_cuda(stream) with its device made current. on_cuda
// takes `auto stream`, a Stream: what it calls is compiled only where there are kernels.
template <class OnCpu, class OnCuda>
void dispatch(const at::Tensor& tensor, OnCpu on_cpu, OnCuda on_cuda) {
  if (tensor.is_cpu()) return on_cpu();
#ifndef D4S_WITH_CUDA
  check(false, "d4s was built without CUDA kernels (" D4S_WITHOUT_CUDA
               "); build it where there are a CUDA compiler and a CUDA torch");
#else
  int major = 0;
  const cudaError_t asked =
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, tensor.device().index());
  check(asked == cudaSuccess, tensor.device(), " does not say what it can: ", cudaGetErrorString(asked));
  check(major >= 8, tensor.device(), " has compute capability ", major,
        ".x; the CUDA kernels need 8.0 (A100) or later");
  const c10::cuda::CUDAGuard guard(tensor.device());
  const Stream stream = c10::cuda::getCurrentCUDAStream(tensor.device().index()).stream();
  on_cuda(stream);
#endif
}

}  // namespace d4s

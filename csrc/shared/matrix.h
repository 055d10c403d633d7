// What the ops hand to their CPU and CUDA halves: raw memory with its type and strides. No torch in here, so
// that the .cu files compile in seconds, and without a CUDA build of torch.
#pragma once

#include <cstdint>

struct CUstream_st;

namespace d4s {

using Stream = CUstream_st*;  // cudaStream_t, named without the CUDA headers

enum class DType { float64, float32, float16, bfloat16 };

// Element (i, j) is data[i * row_stride + j * col_stride], counted in elements of `dtype`.
struct Matrix {
  void* data;
  DType dtype;
  int64_t rows;
  int64_t cols;
  int64_t row_stride;
  int64_t col_stride;
};

}  // namespace d4s

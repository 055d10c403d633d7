// weight = round(base + delta) once, with Σ|weight| and Σ(weight − base)² of the rounded values, in one pass.
#pragma once

#include "../shared/matrix.h"

namespace d4s {

// weight, base [rows, cols] of one type, col_stride 1. delta [rows, cols], float32 | float64, any strides.
// The sum is taken in float64 and rounded as torch rounds: through float32 where the weight is half
// precision. sums [2], float64, written: Σ|weight|, Σ(weight − base)². Equal inputs give equal bits, whatever
// the threads.
void write_back_cpu(const Matrix& weight, const Matrix& base, const Matrix& delta, double* sums);

// Blocks of the CUDA kernel; fixed, because the order of the sums hangs on it.
constexpr int kWriteBackBlocks = 1056;

// The same in device memory. partial [2 * kWriteBackBlocks], float64: scratch.
void write_back_cuda(const Matrix& weight, const Matrix& base, const Matrix& delta, double* partial,
                     double* sums, Stream stream);

}  // namespace d4s

// moment += Σ k kᵀ over given rows of keys, lower triangle only; symmetrize mirrors it once at the end.
#pragma once

#include "../shared/matrix.h"

namespace d4s {

// keys [n, d], col_stride 1, any type. rows [count]: indices of the rows to take; null: the first `count`.
// moment [d, d], contiguous, float32 | float64: products and sums are of this type. Above the diagonal it is
// neither read nor written, except inside the blocks on the diagonal (CPU).
void accumulate_key_covariance_cpu(const Matrix& keys, const int64_t* rows, int64_t count,
                                   const Matrix& moment);

// The same in device memory. Rows of keys begin at multiples of 16 bytes. bfloat16 and float16 keys run on
// the tensor cores with float32 sums, float32 keys as four TF32 products, any keys into a float64 moment in
// float64.
void accumulate_key_covariance_cuda(const Matrix& keys, const int64_t* rows, int64_t count,
                                    const Matrix& moment, Stream stream);

}  // namespace d4s

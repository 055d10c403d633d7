// The lower triangle of a square mirrored into the upper.
#pragma once

#include "../shared/matrix.h"

namespace d4s {

// matrix[i][j] = matrix[j][i] for i < j. matrix [d, d], contiguous, float32 | float64.
void symmetrize_cpu(const Matrix& matrix);

// The same in device memory.
void symmetrize_cuda(const Matrix& matrix, Stream stream);

}  // namespace d4s

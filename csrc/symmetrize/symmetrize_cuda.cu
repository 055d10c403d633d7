// matrix[i][j] = matrix[j][i] above the diagonal; one block a tile below it, turned in shared memory.
#include <cstdint>

#include "../shared/launch_cuda.h"
#include "../shared/triangle_tiles.h"
#include "symmetrize.h"

namespace d4s {
namespace {

constexpr int kThreads = 256;
constexpr int kTile = 32;

template <class T>
__global__ void __launch_bounds__(kThreads) symmetrize_kernel(T* matrix, int64_t d) {
  __shared__ T tile[kTile][kTile + 1];  // one column more: no two rows of a column share a bank
  const TilePosition position = lower_triangle_tile(blockIdx.x, (d + kTile - 1) / kTile);
  const int64_t tile_row = position.row * kTile, tile_col = position.col * kTile;
  const int x = threadIdx.x % kTile, y = threadIdx.x / kTile;
  for (int i = y; i < kTile; i += kThreads / kTile) {
    const int64_t row = tile_row + i, col = tile_col + x;
    if (row < d && col < d) tile[i][x] = matrix[row * d + col];
  }
  __syncthreads();
  for (int i = y; i < kTile; i += kThreads / kTile) {
    const int64_t row = tile_col + i, col = tile_row + x;
    if (row < d && col < d && row < col) matrix[row * d + col] = tile[x][i];
  }
}

}  // namespace

void symmetrize_cuda(const Matrix& matrix, Stream stream) {
  if (matrix.rows == 0) return;
  const unsigned blocks = static_cast<unsigned>(triangle_blocks(matrix.rows, kTile));
  if (matrix.dtype == DType::float64) {
    symmetrize_kernel<<<blocks, kThreads, 0, stream>>>(static_cast<double*>(matrix.data), matrix.rows);
  } else {
    symmetrize_kernel<<<blocks, kThreads, 0, stream>>>(static_cast<float*>(matrix.data), matrix.rows);
  }
  check_launch("symmetrize_kernel");
}

}  // namespace d4s

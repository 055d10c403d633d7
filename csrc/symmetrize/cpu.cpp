// Tile by tile, so that the rows that are written stay in the cache while columns are read.
#include <ATen/Parallel.h>

#include <algorithm>

#include "symmetrize.h"

namespace d4s {
namespace {

constexpr int64_t kTile = 64;

template <class T>
void mirror(T* matrix, int64_t d) {
  const int64_t tiles = (d + kTile - 1) / kTile;
  at::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t tile_row = begin; tile_row < end; ++tile_row) {
      for (int64_t tile_col = 0; tile_col <= tile_row; ++tile_col) {
        const int64_t last_row = std::min(d, (tile_row + 1) * kTile);
        const int64_t last_col = std::min(d, (tile_col + 1) * kTile);
        for (int64_t j = tile_col * kTile; j < last_col; ++j) {
          for (int64_t i = std::max(tile_row * kTile, j + 1); i < last_row; ++i) {
            matrix[j * d + i] = matrix[i * d + j];
          }
        }
      }
    }
  });
}

}  // namespace

void symmetrize_cpu(const Matrix& matrix) {
  if (matrix.dtype == DType::float64) {
    mirror(static_cast<double*>(matrix.data), matrix.rows);
  } else {
    mirror(static_cast<float*>(matrix.data), matrix.rows);
  }
}

}  // namespace d4s

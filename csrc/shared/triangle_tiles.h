// The order in which the tiles of a lower triangle are worked on. Shared by host and device.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define D4S_HOST_DEVICE __host__ __device__
#else
#define D4S_HOST_DEVICE
#endif

namespace d4s {

struct TilePosition {
  int64_t row;
  int64_t col;
};

// Tiles of one band share their rows and run through the columns together, so that the tiles in flight at one
// time need few different panels, and those stay in the L2 cache.
constexpr int64_t kBandRows = 8;

// Tiles on or below the diagonal of a square of side × side tiles.
D4S_HOST_DEVICE inline int64_t lower_triangle_count(int64_t side) { return side * (side + 1) / 2; }

// The same of a d × d matrix in tiles of `tile` rows.
D4S_HOST_DEVICE inline int64_t triangle_blocks(int64_t d, int64_t tile) {
  return lower_triangle_count((d + tile - 1) / tile);
}

// The index-th tile, 0 ≤ index < lower_triangle_count(side): bands of kBandRows rows from the top; within a
// band column by column up to its diagonal block, and that block row by row.
D4S_HOST_DEVICE inline TilePosition lower_triangle_tile(int64_t index, int64_t side) {
  int64_t row = static_cast<int64_t>((std::sqrt(8.0 * static_cast<double>(index) + 1.0) - 1.0) / 2.0);
  while (lower_triangle_count(row) > index) --row;
  while (lower_triangle_count(row + 1) <= index) ++row;

  // Whole bands hold the same tiles in either order, so the row in plain order names the band.
  const int64_t first = row / kBandRows * kBandRows;
  const int64_t height = side - first < kBandRows ? side - first : kBandRows;
  const int64_t offset = index - lower_triangle_count(first);
  if (offset < first * height) return {first + offset % height, offset / height};

  int64_t rest = offset - first * height;
  int64_t diagonal_row = 0;
  for (; rest > diagonal_row; ++diagonal_row) rest -= diagonal_row + 1;
  return {first + diagonal_row, first + rest};
}

}  // namespace d4s

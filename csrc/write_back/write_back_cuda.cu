// weight = round(base + delta) with Σ|weight| and Σ(weight − base)². Bound by memory bandwidth: base and
// delta are read once, weight is written once, the sums stay in registers. A fixed grid leaves one pair of
// partial sums a block; a second kernel adds them in order, so the result is the same in every run.
#include <cstdint>

#include "../shared/launch_cuda.h"
#include "write_back.h"

namespace d4s {
namespace {

constexpr int kThreads = 256;
constexpr int kTile = 32;   // side of the tile that turns a column-major delta
constexpr int kVector = 2;  // elements a thread reads at once: 16 bytes of a float64 delta
constexpr int kFlight = 4;  // such reads a thread has under way

template <class T, int kLanes>
struct alignas(kLanes * sizeof(T) < 16 ? kLanes * sizeof(T) : 16) Pack {
  T lane[kLanes];
};

struct Sums {
  double l1 = 0;
  double delta_sq = 0;
};

// round(base + delta), as torch rounds: the float64 sum reaches half precision by way of float32.
template <class Weight, class Delta>
__device__ Weight rounded_sum(Weight base, Delta delta, Sums& sums) {
  using Exact = typename Wide<Weight>::type;
  const double before = static_cast<double>(static_cast<Exact>(base));
  const Weight weight = static_cast<Weight>(static_cast<Exact>(before + static_cast<double>(delta)));
  const double after = static_cast<double>(static_cast<Exact>(weight));
  sums.l1 += fabs(after);
  sums.delta_sq += (after - before) * (after - before);
  return weight;
}

// partial [2, gridDim.x]: Σ|weight| of every block, then Σ(weight − base)² of every block.
__device__ void store_partial(const Sums& sums, double* partial) {
  const double l1 = block_sum<kThreads>(sums.l1);
  const double delta_sq = block_sum<kThreads>(sums.delta_sq);
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = l1;
    partial[gridDim.x + blockIdx.x] = delta_sq;
  }
}

// delta with col_stride 1. A block takes kFlight packs a thread at a time, all read before any is used, and
// every access of a warp lies in one run. cols is a multiple of kLanes, and every row begins at a multiple of
// a pack; kLanes = 1 asks for nothing.
template <class Weight, class Delta, int kLanes>
__global__ void __launch_bounds__(kThreads)
    write_back_kernel(Matrix weight, Matrix base, Matrix delta, double* partial) {
  constexpr int kTilePacks = kThreads * kFlight;
  const int64_t row_packs = weight.cols / kLanes;
  const int64_t row_tiles = (row_packs + kTilePacks - 1) / kTilePacks;
  const int64_t tiles = weight.rows * row_tiles;
  Sums sums;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t row = tile / row_tiles;
    const int64_t first = (tile - row * row_tiles) * kTilePacks + threadIdx.x;
    const auto* from = reinterpret_cast<const Pack<Weight, kLanes>*>(static_cast<const Weight*>(base.data) +
                                                                     row * base.row_stride);
    const auto* change = reinterpret_cast<const Pack<Delta, kLanes>*>(static_cast<const Delta*>(delta.data) +
                                                                      row * delta.row_stride);
    auto* to =
        reinterpret_cast<Pack<Weight, kLanes>*>(static_cast<Weight*>(weight.data) + row * weight.row_stride);
    Pack<Weight, kLanes> before[kFlight];
    Pack<Delta, kLanes> moved[kFlight];
#pragma unroll
    for (int n = 0; n < kFlight; ++n) {
      if (first + n * kThreads < row_packs) {
        before[n] = from[first + n * kThreads];
        moved[n] = change[first + n * kThreads];
      }
    }
#pragma unroll
    for (int n = 0; n < kFlight; ++n) {
      if (first + n * kThreads < row_packs) {
        Pack<Weight, kLanes> after;
#pragma unroll
        for (int lane = 0; lane < kLanes; ++lane) {
          after.lane[lane] = rounded_sum(before[n].lane[lane], moved[n].lane[lane], sums);
        }
        to[first + n * kThreads] = after;
      }
    }
  }
  store_partial(sums, partial);
}

// delta of any strides, read along its rows' direction and turned in shared memory; block (32, 8) threads.
template <class Weight, class Delta>
__global__ void __launch_bounds__(kThreads)
    write_back_turned_kernel(Matrix weight, Matrix base, Matrix delta, double* partial) {
  __shared__ Delta turned[kTile][kTile + 1];  // one column more: no two rows of a column share a bank
  const int x = threadIdx.x % kTile, y = threadIdx.x / kTile;
  const int64_t tile_cols = (weight.cols + kTile - 1) / kTile;
  const int64_t tiles = (weight.rows + kTile - 1) / kTile * tile_cols;
  Sums sums;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t first_row = tile / tile_cols * kTile, first_col = tile % tile_cols * kTile;
    for (int j = y; j < kTile; j += kThreads / kTile) {
      const int64_t row = first_row + x, col = first_col + j;
      if (row < weight.rows && col < weight.cols) {
        turned[x][j] = static_cast<const Delta*>(delta.data)[row * delta.row_stride + col * delta.col_stride];
      }
    }
    __syncthreads();
    for (int i = y; i < kTile; i += kThreads / kTile) {
      const int64_t row = first_row + i, col = first_col + x;
      if (row < weight.rows && col < weight.cols) {
        const Weight before = static_cast<const Weight*>(base.data)[row * base.row_stride + col];
        static_cast<Weight*>(weight.data)[row * weight.row_stride + col] =
            rounded_sum(before, turned[i][x], sums);
      }
    }
    __syncthreads();
  }
  store_partial(sums, partial);
}

// sums[0], sums[1] = the two rows of partial [2, kWriteBackBlocks] added up; one block.
__global__ void __launch_bounds__(kThreads) add_partial_kernel(const double* partial, double* sums) {
  for (int which = 0; which < 2; ++which) {
    double sum = 0;
    for (int i = threadIdx.x; i < kWriteBackBlocks; i += kThreads)
      sum += partial[which * kWriteBackBlocks + i];
    sum = block_sum<kThreads>(sum);
    if (threadIdx.x == 0) sums[which] = sum;
  }
}

// Whether rows can be read in vectors of kVector elements.
template <class T>
bool is_aligned(const Matrix& matrix) {
  return matrix.cols % kVector == 0 && matrix.row_stride % kVector == 0 &&
         reinterpret_cast<uintptr_t>(matrix.data) % alignof(Pack<T, kVector>) == 0;
}

// The same elements as one row where rows follow each other without a gap.
Matrix as_one_row(Matrix matrix) {
  matrix.cols *= matrix.rows;
  matrix.row_stride = matrix.cols;
  matrix.rows = 1;
  return matrix;
}

bool is_dense(const Matrix& matrix) { return matrix.col_stride == 1 && matrix.row_stride == matrix.cols; }

template <class Weight, class Delta>
void launch(Matrix weight, Matrix base, Matrix delta, double* partial, Stream stream) {
  if (is_dense(weight) && is_dense(base) && is_dense(delta)) {
    weight = as_one_row(weight), base = as_one_row(base), delta = as_one_row(delta);
  }
  if (delta.col_stride != 1) {
    write_back_turned_kernel<Weight, Delta>
        <<<kWriteBackBlocks, kThreads, 0, stream>>>(weight, base, delta, partial);
  } else if (is_aligned<Weight>(weight) && is_aligned<Weight>(base) && is_aligned<Delta>(delta)) {
    write_back_kernel<Weight, Delta, kVector>
        <<<kWriteBackBlocks, kThreads, 0, stream>>>(weight, base, delta, partial);
  } else {
    write_back_kernel<Weight, Delta, 1>
        <<<kWriteBackBlocks, kThreads, 0, stream>>>(weight, base, delta, partial);
  }
  check_launch("write_back_kernel");
}

}  // namespace

void write_back_cuda(const Matrix& weight, const Matrix& base, const Matrix& delta, double* partial,
                     double* sums, Stream stream) {
  with_cuda_type(weight.dtype, [&](auto zero) {
    using Weight = decltype(zero);
    if (delta.dtype == DType::float64) {
      launch<Weight, double>(weight, base, delta, partial, stream);
    } else {
      launch<Weight, float>(weight, base, delta, partial, stream);
    }
  });
  add_partial_kernel<<<1, kThreads, 0, stream>>>(partial, sums);
  check_launch("add_partial_kernel");
}

}  // namespace d4s

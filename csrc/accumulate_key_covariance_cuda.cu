// moment += Kᵀ K over the tiles of the lower triangle, one block a tile of 128 × 128.
//
// For tile (i, j) a block walks down the keys. Panels of kDepth keys by 128 columns, columns i and columns j,
// are copied to shared memory with cp.async, two buffers deep: while the tensor cores multiply one, the next
// is on its way. Rows are named by an index, so a mask costs no copy of the keys. Sums stay in float32
// registers and reach `moment` once, through shared memory. bfloat16 and float16 keys multiply exactly. A
// float32 key is split into two TF32 numbers, k ≈ high + low, and high·high + high·low + low·high + low·low
// is all but exact. Tensor cores cut the bits that a sum has no room for, so the products of eight keys are
// summed by themselves, and these sums are added up by ordinary additions, which round.
//
// Kᵀ needs no transposition: the panel of columns i, read column-major, is already the left operand.
#include <mma.h>

#include <cstdint>
#include <type_traits>

#include "accumulate_key_covariance.h"
#include "launch_cuda.h"
#include "triangle_tiles.h"

namespace d4s {
namespace {

namespace wmma = nvcuda::wmma;

constexpr int kThreads = 256;
constexpr int kTile = 128;     // side of a block's tile of the moment
constexpr int kWarpRows = 64;  // a warp's part of it: 64 × 32, eight warps as 2 × 4
constexpr int kWarpCols = 32;
constexpr int kFragment = 16;  // side of one tensor-core product
constexpr int kRowFragments = kWarpRows / kFragment;
constexpr int kColFragments = kWarpCols / kFragment;

// Tensor-core shapes of a key type. kPad shifts each row of a panel, so that the rows that a warp reads
// together lie in different banks.
template <class Key>
struct Panel {
  using Operand = Key;
  static constexpr int kStep = 16;   // keys a tensor-core product takes
  static constexpr int kDepth = 32;  // keys a panel holds
  static constexpr int kLanes = 16 / sizeof(Key);
  static constexpr int kPad = kLanes;
  Key key[kDepth][kTile + kPad];
};
template <>
struct Panel<float> {
  using Operand = wmma::precision::tf32;
  static constexpr int kStep = 8;
  static constexpr int kDepth = 16;
  static constexpr int kLanes = 4;
  static constexpr int kPad = 2 * kLanes;  // four rows of eight columns are read together
  float key[kDepth][kTile + kPad];
};

template <class Key>
using Left = wmma::fragment<wmma::matrix_a, kFragment, kFragment, Panel<Key>::kStep,
                            typename Panel<Key>::Operand, wmma::col_major>;
template <class Key>
using Right = wmma::fragment<wmma::matrix_b, kFragment, kFragment, Panel<Key>::kStep,
                             typename Panel<Key>::Operand, wmma::row_major>;
template <class Key>
using Sum = wmma::fragment<wmma::accumulator, kFragment, kFragment, Panel<Key>::kStep, float>;

// Starts copying 16 bytes to shared memory, the last 16 − bytes of them as zeros.
__device__ void copy_async(void* shared, const void* global, int bytes) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(bytes)
               : "memory");
}
__device__ void end_copy_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most kPending groups of this thread are still on their way.
template <int kPending>
__device__ void wait_copy_groups() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Starts copying keys [first_key, first_key + kDepth) × columns [first_col, first_col + kTile), zeros beyond
// the edges.
template <class Key>
__device__ void load_panel(const Matrix& keys, const int64_t* rows, int64_t count, int64_t first_key,
                           int64_t first_col, Panel<Key>& panel) {
  using P = Panel<Key>;
  constexpr int kRowChunks = kTile / P::kLanes;
  for (int chunk = threadIdx.x; chunk < P::kDepth * kRowChunks; chunk += kThreads) {
    const int row = chunk / kRowChunks, lane = chunk % kRowChunks * P::kLanes;
    const int64_t key = first_key + row, col = first_col + lane;
    const int64_t rest = keys.cols - col;
    const Key* source = static_cast<const Key*>(keys.data);
    int bytes = 0;
    if (key < count && rest > 0) {
      source += (rows ? rows[key] : key) * keys.row_stride + col;
      bytes = static_cast<int>((rest < P::kLanes ? rest : P::kLanes) * sizeof(Key));
    }
    copy_async(&panel.key[row][lane], source, bytes);
  }
}

// sums += left panelᵀ · right panel, this warp's part.
template <class Key>
__device__ void multiply(const Panel<Key>& left, const Panel<Key>& right, int row, int col,
                         Sum<Key> (&sums)[kRowFragments][kColFragments]) {
  constexpr int kPitch = kTile + Panel<Key>::kPad;
#pragma unroll
  for (int step = 0; step < Panel<Key>::kDepth; step += Panel<Key>::kStep) {
    Left<Key> a[kRowFragments];
    Right<Key> b[kColFragments];
#pragma unroll
    for (int i = 0; i < kRowFragments; ++i) {
      wmma::load_matrix_sync(a[i], &left.key[step][row + i * kFragment], kPitch);
    }
#pragma unroll
    for (int j = 0; j < kColFragments; ++j) {
      wmma::load_matrix_sync(b[j], &right.key[step][col + j * kFragment], kPitch);
    }
#pragma unroll
    for (int i = 0; i < kRowFragments; ++i) {
#pragma unroll
      for (int j = 0; j < kColFragments; ++j) wmma::mma_sync(sums[i][j], a[i], b[j], sums[i][j]);
    }
  }
}

// high = TF32 part of a float32 fragment; low = TF32 part of what is left.
template <class Fragment>
__device__ void split_tf32(Fragment& high, Fragment& low) {
#pragma unroll
  for (int e = 0; e < high.num_elements; ++e) {
    const float value = high.x[e];
    high.x[e] = wmma::__float_to_tf32(value);
    low.x[e] = wmma::__float_to_tf32(value - high.x[e]);
  }
}

template <>
__device__ void multiply<float>(const Panel<float>& left, const Panel<float>& right, int row, int col,
                                Sum<float> (&sums)[kRowFragments][kColFragments]) {
  constexpr int kPitch = kTile + Panel<float>::kPad;
#pragma unroll
  for (int step = 0; step < Panel<float>::kDepth; step += Panel<float>::kStep) {
    Right<float> high_b[kColFragments], low_b[kColFragments];
#pragma unroll
    for (int j = 0; j < kColFragments; ++j) {
      wmma::load_matrix_sync(high_b[j], &right.key[step][col + j * kFragment], kPitch);
      split_tf32(high_b[j], low_b[j]);
    }
#pragma unroll
    for (int i = 0; i < kRowFragments; ++i) {
      Left<float> high_a, low_a;
      wmma::load_matrix_sync(high_a, &left.key[step][row + i * kFragment], kPitch);
      split_tf32(high_a, low_a);
#pragma unroll
      for (int j = 0; j < kColFragments; ++j) {
        Sum<float> part;
        wmma::fill_fragment(part, 0.0f);
        // Small terms first, so that they are not lost in the large one.
        wmma::mma_sync(part, low_a, low_b[j], part);
        wmma::mma_sync(part, low_a, high_b[j], part);
        wmma::mma_sync(part, high_a, low_b[j], part);
        wmma::mma_sync(part, high_a, high_b[j], part);
#pragma unroll
        for (int e = 0; e < part.num_elements; ++e) sums[i][j].x[e] += part.x[e];
      }
    }
  }
}

// keys as for accumulate_key_covariance_cuda; moment [d, d], read and written on and below the diagonal.
template <class Key>
__global__ void __launch_bounds__(kThreads, 2)
    accumulate_key_covariance_kernel(Matrix keys, const int64_t* rows, int64_t count, float* moment) {
  using P = Panel<Key>;
  static_assert(sizeof(P) >= kThreads / 32 * kFragment * kFragment * sizeof(float), "room for the epilogue");
  __shared__ alignas(128) P panels[2][2];  // [buffer][columns i, columns j]

  const int64_t d = keys.cols;
  const TilePosition tile = lower_triangle_tile(blockIdx.x, (d + kTile - 1) / kTile);
  const int64_t tile_row = tile.row * kTile, tile_col = tile.col * kTile;
  const bool diagonal = tile.row == tile.col;  // both operands are the same panel
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row = warp / (kTile / kWarpCols) * kWarpRows, col = warp % (kTile / kWarpCols) * kWarpCols;

  Sum<Key> sums[kRowFragments][kColFragments];
#pragma unroll
  for (int i = 0; i < kRowFragments; ++i) {
#pragma unroll
    for (int j = 0; j < kColFragments; ++j) wmma::fill_fragment(sums[i][j], 0.0f);
  }

  const auto load = [&](int64_t stage) {
    load_panel(keys, rows, count, stage * P::kDepth, tile_row, panels[stage % 2][0]);
    if (!diagonal) load_panel(keys, rows, count, stage * P::kDepth, tile_col, panels[stage % 2][1]);
    end_copy_group();
  };
  const int64_t stages = (count + P::kDepth - 1) / P::kDepth;
  load(0);
  for (int64_t stage = 0; stage < stages; ++stage) {
    if (stage + 1 < stages) {
      load(stage + 1);
      wait_copy_groups<1>();
    } else {
      wait_copy_groups<0>();
    }
    __syncthreads();  // every thread's part of this stage has arrived
    multiply(panels[stage % 2][0], panels[stage % 2][diagonal ? 0 : 1], row, col, sums);
    __syncthreads();  // this buffer may be overwritten
  }

  // The layout of a fragment in registers is the compiler's own; shared memory makes it rows and columns.
  float* staged = reinterpret_cast<float*>(&panels[0][0]) + warp * kFragment * kFragment;
#pragma unroll
  for (int i = 0; i < kRowFragments; ++i) {
#pragma unroll
    for (int j = 0; j < kColFragments; ++j) {
      wmma::store_matrix_sync(staged, sums[i][j], kFragment, wmma::mem_row_major);
      __syncwarp();
      for (int e = lane; e < kFragment * kFragment; e += 32) {
        const int64_t to_row = tile_row + row + i * kFragment + e / kFragment;
        const int64_t to_col = tile_col + col + j * kFragment + e % kFragment;
        if (to_row < d && to_col <= to_row) moment[to_row * d + to_col] += staged[e];
      }
      __syncwarp();
    }
  }
}

constexpr int kWideTile = 64;   // side of a block's tile of a float64 moment
constexpr int kWideDepth = 16;  // keys in shared memory at a time
constexpr int kWideSums = 4;    // a thread's sums: 4 × 4, sixteen apart

// The same with products and sums in float64, on ordinary fused multiply-adds.
template <class Key>
__global__ void __launch_bounds__(kThreads)
    accumulate_wide_key_covariance_kernel(Matrix keys, const int64_t* rows, int64_t count, double* moment) {
  __shared__ double left[kWideDepth][kWideTile], right[kWideDepth][kWideTile];
  const int64_t d = keys.cols;
  const TilePosition tile = lower_triangle_tile(blockIdx.x, (d + kWideTile - 1) / kWideTile);
  const int64_t tile_row = tile.row * kWideTile, tile_col = tile.col * kWideTile;
  const int x = threadIdx.x % 16, y = threadIdx.x / 16;

  double sums[kWideSums][kWideSums] = {};
  for (int64_t first = 0; first < count; first += kWideDepth) {
    for (int e = threadIdx.x; e < kWideDepth * kWideTile; e += kThreads) {
      const int depth = e / kWideTile, offset = e % kWideTile;
      const int64_t key = first + depth;
      const Key* source = nullptr;
      if (key < count) {
        source = static_cast<const Key*>(keys.data) + (rows ? rows[key] : key) * keys.row_stride;
      }
      const auto element = [&](int64_t column) {
        if (!source || column >= d) return 0.0;
        return static_cast<double>(static_cast<typename Wide<Key>::type>(source[column]));
      };
      left[depth][offset] = element(tile_row + offset);
      right[depth][offset] = element(tile_col + offset);
    }
    __syncthreads();
#pragma unroll
    for (int depth = 0; depth < kWideDepth; ++depth) {
#pragma unroll
      for (int i = 0; i < kWideSums; ++i) {
#pragma unroll
        for (int j = 0; j < kWideSums; ++j) sums[i][j] += left[depth][y + 16 * i] * right[depth][x + 16 * j];
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < kWideSums; ++i) {
#pragma unroll
    for (int j = 0; j < kWideSums; ++j) {
      const int64_t to_row = tile_row + y + 16 * i, to_col = tile_col + x + 16 * j;
      if (to_row < d && to_col <= to_row) moment[to_row * d + to_col] += sums[i][j];
    }
  }
}

constexpr int kMirrorTile = 32;

// matrix[i][j] = matrix[j][i] above the diagonal; one block a tile below it, turned in shared memory.
template <class T>
__global__ void __launch_bounds__(kThreads) symmetrize_kernel(T* matrix, int64_t d) {
  __shared__ T tile[kMirrorTile][kMirrorTile + 1];  // one column more: no two rows of a column share a bank
  const TilePosition position = lower_triangle_tile(blockIdx.x, (d + kMirrorTile - 1) / kMirrorTile);
  const int64_t tile_row = position.row * kMirrorTile, tile_col = position.col * kMirrorTile;
  const int x = threadIdx.x % kMirrorTile, y = threadIdx.x / kMirrorTile;
  for (int i = y; i < kMirrorTile; i += kThreads / kMirrorTile) {
    const int64_t row = tile_row + i, col = tile_col + x;
    if (row < d && col < d) tile[i][x] = matrix[row * d + col];
  }
  __syncthreads();
  for (int i = y; i < kMirrorTile; i += kThreads / kMirrorTile) {
    const int64_t row = tile_col + i, col = tile_row + x;
    if (row < d && col < d && row < col) matrix[row * d + col] = tile[x][i];
  }
}

int64_t triangle_blocks(int64_t d, int64_t tile) { return lower_triangle_count((d + tile - 1) / tile); }

template <class Key>
void launch(const Matrix& keys, const int64_t* rows, int64_t count, const Matrix& moment, Stream stream) {
  if (moment.dtype == DType::float64) {
    const unsigned blocks = static_cast<unsigned>(triangle_blocks(keys.cols, kWideTile));
    accumulate_wide_key_covariance_kernel<Key>
        <<<blocks, kThreads, 0, stream>>>(keys, rows, count, static_cast<double*>(moment.data));
  } else if constexpr (!std::is_same_v<Key, double>) {
    const unsigned blocks = static_cast<unsigned>(triangle_blocks(keys.cols, kTile));
    accumulate_key_covariance_kernel<Key>
        <<<blocks, kThreads, 0, stream>>>(keys, rows, count, static_cast<float*>(moment.data));
  }
  check_launch("accumulate_key_covariance_kernel");
}

}  // namespace

void accumulate_key_covariance_cuda(const Matrix& keys, const int64_t* rows, int64_t count,
                                    const Matrix& moment, Stream stream) {
  if (count == 0 || keys.cols == 0) return;
  with_cuda_type(keys.dtype, [&](auto zero) { launch<decltype(zero)>(keys, rows, count, moment, stream); });
}

void symmetrize_cuda(const Matrix& matrix, Stream stream) {
  if (matrix.rows == 0) return;
  const unsigned blocks = static_cast<unsigned>(triangle_blocks(matrix.rows, kMirrorTile));
  if (matrix.dtype == DType::float64) {
    symmetrize_kernel<<<blocks, kThreads, 0, stream>>>(static_cast<double*>(matrix.data), matrix.rows);
  } else {
    symmetrize_kernel<<<blocks, kThreads, 0, stream>>>(static_cast<float*>(matrix.data), matrix.rows);
  }
  check_launch("symmetrize_kernel");
}

}  // namespace d4s

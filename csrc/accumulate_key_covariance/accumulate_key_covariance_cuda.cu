// moment += Kᵀ K over the tiles of the lower triangle, one block a tile.
//
// For tile (i, j) a block walks down the keys. Panels of some keys by the tile's columns, columns i and
// columns j, are copied to shared memory with cp.async, a few buffers deep: while the tensor cores multiply
// one, the next are on their way. Rows are named by an index, so a mask costs no copy of the keys. Sums stay
// in float32 registers and reach `moment` once.
//
// bfloat16 and float16 keys multiply exactly. A float32 key is split into two TF32 numbers, k ≈ high + low,
// and high·high + high·low + low·high + low·low is all but exact. Tensor cores cut the bits that a sum has no
// room for, so the products of eight float32 keys are summed by themselves, and these sums are added up by
// ordinary additions, which round.
//
// Kᵀ needs no transposition: the panel of columns i, read column-major, is already the left operand.
#include <mma.h>

#include <cstdint>
#include <type_traits>

#include "../shared/launch_cuda.h"
#include "../shared/triangle_tiles.h"
#include "accumulate_key_covariance.h"

namespace d4s {
namespace {

namespace wmma = nvcuda::wmma;

constexpr int kTile = 128;  // rows of a block's tile of the moment

// Some keys' columns of one tile. kPad shifts each row, so that the rows that a warp reads together lie in
// different banks.
template <class Key, int kDepth, int kCols, int kPad>
struct Panel {
  alignas(16) Key key[kDepth][kCols + kPad];
};

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

// Starts copying keys [first_key, first_key + kDepth) × columns [first_col, first_col + kCols), zeros beyond
// the edges.
template <int kThreads, class Key, int kDepth, int kCols, int kPad>
__device__ void load_panel(const Matrix& keys, const int64_t* rows, int64_t count, int64_t first_key,
                           int64_t first_col, Panel<Key, kDepth, kCols, kPad>& panel) {
  constexpr int kLanes = 16 / sizeof(Key), kRowChunks = kCols / kLanes;
  static_assert(kDepth * kRowChunks % kThreads == 0, "each thread copies as much");
#pragma unroll
  for (int i = 0; i < kDepth * kRowChunks / kThreads; ++i) {
    const int chunk = i * kThreads + threadIdx.x;
    const int row = chunk / kRowChunks, lane = chunk % kRowChunks * kLanes;
    const int64_t key = first_key + row, col = first_col + lane;
    const int64_t rest = keys.cols - col;
    const Key* source = static_cast<const Key*>(keys.data);
    int bytes = 0;
    if (key < count && rest > 0) {
      source += (rows ? rows[key] : key) * keys.row_stride + col;
      bytes = static_cast<int>((rest < kLanes ? rest : kLanes) * sizeof(Key));
    }
    copy_async(&panel.key[row][lane], source, bytes);
  }
}

// ---- bfloat16 and float16 keys: tiles of 128 × 128, or 128 × 256 of a large moment, 64 × 64 a warp ----

constexpr int kHalfStages = 3;  // panels that are multiplied or on their way
constexpr int kHalfDepth = 32;  // keys of one
constexpr int kHalfPad = 8;
constexpr int kWarpSide = 64;                                          // a warp's part of the tile
constexpr int kProductKeys = 16, kProductRows = 16, kProductCols = 8;  // of one mma.sync
constexpr int kRowProducts = kWarpSide / kProductRows, kColProducts = kWarpSide / kProductCols;

template <class Key, int kCols>
struct HalfStage {
  Panel<Key, kHalfDepth, kTile, kHalfPad> left;
  Panel<Key, kHalfDepth, kCols, kHalfPad> right;
};

// Four squares of 8 × 8, turned: lane l names row l % 8 of square l / 8 and gets from square s, in word s,
// its column l / 4 of rows l % 4 · 2 and + 1.
__device__ void load_turned_squares(uint32_t (&words)[4], const void* row) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(address)
               : "memory");
}

// sums [16, 8] += left [16, 16] · right [16, 8]. With g = lane / 4 and t = lane % 4 · 2, a lane has the sums
// of row g, columns t and t + 1, then of row g + 8; of the left operand rows g and g + 8 at keys t and t + 1,
// then the same at keys t + 8 and t + 9; and of the right one column g at keys t and t + 1, then t + 8 and t
// + 9.
template <class Key>
__device__ void multiply_squares(float (&sums)[4], const uint32_t (&left)[4], const uint32_t* right) {
  if constexpr (std::is_same_v<Key, __half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right[0]), "r"(right[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right[0]), "r"(right[1]));
  }
}

// Operands of one step of kProductKeys keys.
struct HalfOperands {
  uint32_t left[kRowProducts][4];
  uint32_t right[kColProducts / 2][4];  // two products' in one load
};

template <class Key, int kCols>
__device__ void load_operands(HalfOperands& to, const HalfStage<Key, kCols>& stage, int step, int row,
                              int col) {
  const int lane = threadIdx.x % 32, low = lane % 8, middle = lane / 8 % 2 * 8, high = lane / 16 * 8;
#pragma unroll
  for (int i = 0; i < kRowProducts; ++i) {  // squares: rows + 8, then keys + 8
    load_turned_squares(to.left[i], &stage.left.key[step + high + low][row + i * kProductRows + middle]);
  }
#pragma unroll
  for (int j = 0; j < kColProducts / 2; ++j) {  // squares: keys + 8, then columns + 8
    load_turned_squares(to.right[j],
                        &stage.right.key[step + middle + low][col + j * 2 * kProductCols + high]);
  }
}

// keys as for accumulate_key_covariance_cuda; moment [d, d], read and written on and below the diagonal.
// Dynamic shared memory: kHalfStages × HalfStage.
template <class Key, int kCols>
__global__ void __launch_bounds__(kCols, kCols == kTile ? 2 : 1)
    accumulate_half_key_covariance_kernel(Matrix keys, const int64_t* rows, int64_t count, float* moment) {
  constexpr int kThreads = kCols;  // two rows of warps
  constexpr int kTilesHigh = kCols / kTile;
  extern __shared__ uint4 shared[];
  auto* const stages = reinterpret_cast<HalfStage<Key, kCols>*>(shared);

  const int64_t d = keys.cols;
  const TilePosition square = lower_triangle_tile(blockIdx.x / kTilesHigh, (d + kCols - 1) / kCols);
  const int64_t tile_row = square.row * kCols + blockIdx.x % kTilesHigh * kTile;
  const int64_t tile_col = square.col * kCols;
  if (tile_row >= d) return;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row = warp % 2 * kWarpSide, col = warp / 2 * kWarpSide;

  const int64_t last = (count + kHalfDepth - 1) / kHalfDepth;
  const auto load = [&](int64_t index, HalfStage<Key, kCols>& stage) {
    if (index < last) {
      load_panel<kThreads>(keys, rows, count, index * kHalfDepth, tile_row, stage.left);
      load_panel<kThreads>(keys, rows, count, index * kHalfDepth, tile_col, stage.right);
    }
    end_copy_group();  // an empty one, too: groups are counted
  };
  float sums[kRowProducts][kColProducts][4] = {};
#pragma unroll
  for (int s = 0; s < kHalfStages - 1; ++s) load(s, stages[s]);
  int current = 0;
  for (int64_t index = 0; index < last; ++index) {
    wait_copy_groups<kHalfStages - 2>();
    __syncthreads();  // every thread's part of this stage has arrived, and all have read the one before it
    const int before = current == 0 ? kHalfStages - 1 : current - 1;
    load(index + kHalfStages - 1, stages[before]);

    HalfOperands operands[2];  // the next step's are loaded while this step's are multiplied
    load_operands(operands[0], stages[current], 0, row, col);
#pragma unroll
    for (int step = 0; step < kHalfDepth / kProductKeys; ++step) {
      if (step + 1 < kHalfDepth / kProductKeys) {
        load_operands(operands[(step + 1) % 2], stages[current], (step + 1) * kProductKeys, row, col);
      }
      const HalfOperands& now = operands[step % 2];
#pragma unroll
      for (int i = 0; i < kRowProducts; ++i) {
#pragma unroll
        for (int j = 0; j < kColProducts; ++j) {
          multiply_squares<Key>(sums[i][j], now.left[i], &now.right[j / 2][j % 2 * 2]);
        }
      }
    }
    current = current + 1 == kHalfStages ? 0 : current + 1;
  }

#pragma unroll
  for (int i = 0; i < kRowProducts; ++i) {
#pragma unroll
    for (int j = 0; j < kColProducts; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int64_t to_row = tile_row + row + i * kProductRows + e / 2 * 8 + lane / 4;
        const int64_t to_col = tile_col + col + j * kProductCols + lane % 4 * 2 + e % 2;
        if (to_row < d && to_col <= to_row) moment[to_row * d + to_col] += sums[i][j][e];
      }
    }
  }
}

// ---- float32 keys: tiles of 128 × 128, 64 × 32 a warp ----

constexpr int kThreads = 256;
constexpr int kDepth = 16;
constexpr int kStep = 8;       // keys a tensor-core product takes
constexpr int kWarpRows = 64;  // eight warps as 2 × 4
constexpr int kWarpCols = 32;
constexpr int kFragment = 16;  // side of one tensor-core product
constexpr int kRowFragments = kWarpRows / kFragment;
constexpr int kColFragments = kWarpCols / kFragment;

using FloatPanel = Panel<float, kDepth, kTile, 8>;  // four rows of eight columns are read together
using Left =
    wmma::fragment<wmma::matrix_a, kFragment, kFragment, kStep, wmma::precision::tf32, wmma::col_major>;
using Right =
    wmma::fragment<wmma::matrix_b, kFragment, kFragment, kStep, wmma::precision::tf32, wmma::row_major>;
using Sum = wmma::fragment<wmma::accumulator, kFragment, kFragment, kStep, float>;

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

// sums += left panelᵀ · right panel, this warp's part.
__device__ void multiply(const FloatPanel& left, const FloatPanel& right, int row, int col,
                         Sum (&sums)[kRowFragments][kColFragments]) {
  constexpr int kPitch = sizeof(FloatPanel) / sizeof(float) / kDepth;
#pragma unroll
  for (int step = 0; step < kDepth; step += kStep) {
    Right high_b[kColFragments], low_b[kColFragments];
#pragma unroll
    for (int j = 0; j < kColFragments; ++j) {
      wmma::load_matrix_sync(high_b[j], &right.key[step][col + j * kFragment], kPitch);
      split_tf32(high_b[j], low_b[j]);
    }
#pragma unroll
    for (int i = 0; i < kRowFragments; ++i) {
      Left high_a, low_a;
      wmma::load_matrix_sync(high_a, &left.key[step][row + i * kFragment], kPitch);
      split_tf32(high_a, low_a);
#pragma unroll
      for (int j = 0; j < kColFragments; ++j) {
        Sum part;
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
__global__ void __launch_bounds__(kThreads, 2)
    accumulate_float_key_covariance_kernel(Matrix keys, const int64_t* rows, int64_t count, float* moment) {
  static_assert(sizeof(FloatPanel) >= kThreads / 32 * kFragment * kFragment * sizeof(float),
                "room for the epilogue");
  __shared__ alignas(128) FloatPanel panels[2][2];  // [buffer][columns i, columns j]

  const int64_t d = keys.cols;
  const TilePosition tile = lower_triangle_tile(blockIdx.x, (d + kTile - 1) / kTile);
  const int64_t tile_row = tile.row * kTile, tile_col = tile.col * kTile;
  const bool diagonal = tile.row == tile.col;  // both operands are the same panel
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row = warp / (kTile / kWarpCols) * kWarpRows, col = warp % (kTile / kWarpCols) * kWarpCols;

  Sum sums[kRowFragments][kColFragments];
#pragma unroll
  for (int i = 0; i < kRowFragments; ++i) {
#pragma unroll
    for (int j = 0; j < kColFragments; ++j) wmma::fill_fragment(sums[i][j], 0.0f);
  }

  const auto load = [&](int64_t stage) {
    load_panel<kThreads>(keys, rows, count, stage * kDepth, tile_row, panels[stage % 2][0]);
    if (!diagonal) load_panel<kThreads>(keys, rows, count, stage * kDepth, tile_col, panels[stage % 2][1]);
    end_copy_group();
  };
  const int64_t stages = (count + kDepth - 1) / kDepth;
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

// A block's panels go through the L2 cache, and twice as wide a tile needs three quarters of them. But few
// wide tiles leave some multiprocessors without a last one: four rounds of tiles waste a fifth of their time
// at most.
bool wide_tiles(int64_t d) {
  int device = 0, processors = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  check_cuda(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "multiprocessors");
  return 2 * triangle_blocks(d, 2 * kTile) >= 4 * processors;
}

template <class Key, int kCols>
void launch_half(const Matrix& keys, const int64_t* rows, int64_t count, float* moment, Stream stream) {
  const auto kernel = accumulate_half_key_covariance_kernel<Key, kCols>;
  constexpr int kBytes = kHalfStages * sizeof(HalfStage<Key, kCols>);  // beyond 48 KiB one has to ask for it
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes),
             "shared memory of accumulate_half_key_covariance_kernel");
  const unsigned blocks = static_cast<unsigned>(kCols / kTile * triangle_blocks(keys.cols, kCols));
  kernel<<<blocks, kCols, kBytes, stream>>>(keys, rows, count, moment);
}

template <class Key>
void launch(const Matrix& keys, const int64_t* rows, int64_t count, const Matrix& moment, Stream stream) {
  if (moment.dtype == DType::float64) {
    const unsigned blocks = static_cast<unsigned>(triangle_blocks(keys.cols, kWideTile));
    accumulate_wide_key_covariance_kernel<Key>
        <<<blocks, kThreads, 0, stream>>>(keys, rows, count, static_cast<double*>(moment.data));
  } else if constexpr (std::is_same_v<Key, float>) {
    const unsigned blocks = static_cast<unsigned>(triangle_blocks(keys.cols, kTile));
    accumulate_float_key_covariance_kernel<<<blocks, kThreads, 0, stream>>>(keys, rows, count,
                                                                            static_cast<float*>(moment.data));
  } else if constexpr (!std::is_same_v<Key, double>) {
    const auto run = wide_tiles(keys.cols) ? launch_half<Key, 2 * kTile> : launch_half<Key, kTile>;
    run(keys, rows, count, static_cast<float*>(moment.data), stream);
  }
  check_launch("accumulate_key_covariance_kernel");
}

}  // namespace

void accumulate_key_covariance_cuda(const Matrix& keys, const int64_t* rows, int64_t count,
                                    const Matrix& moment, Stream stream) {
  if (count == 0 || keys.cols == 0) return;
  with_cuda_type(keys.dtype, [&](auto zero) { launch<decltype(zero)>(keys, rows, count, moment, stream); });
}

}  // namespace d4s

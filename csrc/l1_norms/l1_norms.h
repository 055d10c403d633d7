// Σ|w| of many weights in one pass, with float64 sums and no temporary.
#pragma once

#include "../shared/matrix.h"

namespace d4s {

// The elements of one weight, in whatever order they lie.
struct Weight {
  const void* data;
  DType dtype;
  int64_t numel;
};

// norms [count], float64, written. Equal inputs give equal bits, whatever the threads.
void l1_norms_cpu(const Weight* weights, int64_t count, double* norms);

// Weights of one launch travel as kernel arguments, which hold 4 KiB.
constexpr int kWeightsPerLaunch = 128;
// Blocks of one launch, shared out evenly; fixed, because the order of the sums hangs on it.
constexpr int kNormBlocks = 2048;

// The same in device memory, one launch for every kWeightsPerLaunch weights. norms in device memory;
// partial [kNormBlocks], float64: scratch.
void l1_norms_cuda(const Weight* weights, int64_t count, double* partial, double* norms, Stream stream);

}  // namespace d4s

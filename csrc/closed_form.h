// Δ = A (B + λC)⁻¹ of several layers by Cholesky, on whatever device the sums live.
#pragma once

#include <ATen/ATen.h>

#include <stdexcept>

namespace d4s {

// B + λC of one layer has no Cholesky factor, or holds NaN.
struct NotPositiveDefinite : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// residual_sum A [m, d_out, d_in], key_sum B and prior λC [m, d_in, d_in], one type, float32 | float64; of B
// and λC the lower triangles are read. Returns Δ [m, d_out, d_in]. Throws NotPositiveDefinite, naming the
// layer.
at::Tensor closed_form(const at::Tensor& residual_sum, const at::Tensor& key_sum, const at::Tensor& prior);

}  // namespace d4s

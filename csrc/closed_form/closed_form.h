// Δ = A (B + λC)⁻¹ of several layers by Cholesky, on whatever device the sums live.
#pragma once

#include <ATen/core/Tensor.h>

namespace d4s {

// residual_sum A [m, d_out, d_in], key_sum B and prior λC [m, d_in, d_in], one type, float32 | float64; of B
// and λC the lower triangles are read. Returns Δ [m, d_out, d_in]. Throws NotPositiveDefinite
// (shared/errors.h), naming the layer.
at::Tensor closed_form_any_device(const at::Tensor& residual_sum, const at::Tensor& key_sum,
                                  const at::Tensor& prior);

}  // namespace d4s

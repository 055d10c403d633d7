// The library's Cholesky, which torch has for both devices.
#include <ATen/TensorOperators.h>
#include <ATen/ops/cholesky_solve.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/linalg_cholesky_ex.h>

#include "../shared/errors.h"
#include "../shared/text.h"
#include "closed_form.h"

namespace d4s {

at::Tensor closed_form_any_device(const at::Tensor& residual_sum, const at::Tensor& key_sum,
                                  const at::Tensor& prior) {
  const int64_t layers = residual_sum.size(0);
  at::Tensor delta = at::empty_like(residual_sum, at::MemoryFormat::Contiguous);
  // Layer by layer: one d_in × d_in workspace at a time, and at these sizes a batch is not faster.
  for (int64_t layer = 0; layer < layers; ++layer) {
    const auto [factor, info] = at::linalg_cholesky_ex(key_sum[layer] + prior[layer]);
    // cuSOLVER may pass NaN through without a word; a NaN anywhere below the diagonal reaches the diagonal.
    if (info.item<int64_t>() != 0 || !at::isfinite(factor.diagonal()).all().item<bool>()) {
      throw NotPositiveDefinite(
          text_of("closed_form: layer ", layer, " of ", layers,
                  ": key_sum + prior is not positive definite; the prior needs more key vectors than d_in = ",
                  key_sum.size(-1), ", or a ridge, and no NaN"));
    }
    delta[layer].copy_(at::cholesky_solve(residual_sum[layer].t(), factor).t());
  }
  return delta;
}

}  // namespace d4s

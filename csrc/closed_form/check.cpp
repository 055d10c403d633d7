// d4s.ops.closed_form: what it asks of its arguments.
#include <ATen/ops/isfinite.h>
#include <torch/csrc/utils/pybind.h>

#include <vector>

#include "../shared/arguments.h"
#include "closed_form.h"

namespace d4s {
namespace {

at::Tensor closed_form(const at::Tensor& residual_sum, const at::Tensor& key_sum, const at::Tensor& prior) {
  const OnMemory on_memory;
  check_tensor(residual_sum, "residual_sum", kWide);
  check_tensor(key_sum, "key_sum", kWide);
  check_tensor(prior, "prior", kWide);
  check(residual_sum.dim() == 3, "residual_sum has shape ", residual_sum.sizes(),
        "; it must be [m, d_out, d_in]");
  const int64_t layers = residual_sum.size(0), d_in = residual_sum.size(2);
  const std::vector<int64_t> square{layers, d_in, d_in};
  check(key_sum.sizes() == square, "key_sum has shape ", key_sum.sizes(), "; it must be ", square);
  check(prior.sizes() == square, "prior has shape ", prior.sizes(), "; it must be ", square);
  check(key_sum.scalar_type() == residual_sum.scalar_type() &&
            prior.scalar_type() == residual_sum.scalar_type(),
        "residual_sum is ", name_of(residual_sum.scalar_type()), ", key_sum ", name_of(key_sum.scalar_type()),
        ", prior ", name_of(prior.scalar_type()), "; they must be of one type");
  check_device(residual_sum, key_sum, "key_sum");
  check_device(residual_sum, prior, "prior");
  check(at::isfinite(residual_sum).all().item<bool>(), "residual_sum holds NaN or infinity");
  return closed_form_any_device(residual_sum, key_sum, prior);
}

}  // namespace

void bind_closed_form(py::module_& module) {
  module.def("closed_form", &closed_form, py::call_guard<py::gil_scoped_release>());
}

}  // namespace d4s

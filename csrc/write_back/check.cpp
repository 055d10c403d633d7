// d4s.ops.write_back_: what it asks of its arguments, and the choice between CPU and CUDA.
#include <ATen/ops/empty.h>
#include <torch/csrc/utils/pybind.h>

#include <tuple>

#include "../shared/arguments.h"
#include "../shared/dispatch.h"
#include "write_back.h"

namespace d4s {
namespace {

std::tuple<at::Tensor, at::Tensor> write_back(at::Tensor weight, at::Tensor base, at::Tensor delta,
                                              bool transposed) {
  const OnMemory on_memory;
  check_tensor(weight, "weight", kFloating);
  check_tensor(base, "base", kFloating);
  check_tensor(delta, "delta", kWide);
  check(delta.dim() == 2, "delta has shape ", delta.sizes(), "; it must be [d_out, d_in]");
  if (transposed) delta = delta.t();
  check(weight.sizes() == delta.sizes(), "weight has shape ", weight.sizes(), "; it must be ", delta.sizes(),
        transposed ? ", [d_in, d_out] since it is stored transposed" : ", [d_out, d_in] as delta");
  check(base.sizes() == weight.sizes() && base.scalar_type() == weight.scalar_type(), "base is ",
        name_of(base.scalar_type()), " ", base.sizes(), "; it must be ", name_of(weight.scalar_type()), " ",
        weight.sizes(), " as weight");
  check_device(weight, base, "base");
  check_device(weight, delta, "delta");
  check_apart(weight, "weight", delta, "delta");
  check_apart(weight, "weight", base, "base", true);  // each element is read before it is written
  if (weight.stride(1) != 1) {
    weight = weight.t();
    base = base.t();
    delta = delta.t();
  }
  check(weight.stride(1) == 1 && (weight.size(0) <= 1 || weight.stride(0) >= weight.size(1)),
        "weight has strides ", weight.strides(), "; it must be dense along its rows or its columns");
  if (base.stride(1) != 1) base = base.contiguous();
  base = base.resolve_neg();
  delta = delta.resolve_neg();
  count_write(weight, "weight");

  const at::Tensor sums = at::empty({2}, weight.options().dtype(at::kDouble));
  if (weight.numel() == 0) {
    sums.zero_();
    return {sums[0], sums[1]};
  }
  const Matrix w = matrix_of(weight), w0 = matrix_of(base), change = matrix_of(delta);
  dispatch(
      weight, [&] { write_back_cpu(w, w0, change, sums.data_ptr<double>()); },
      [&](auto stream) {
        const at::Tensor partial = at::empty({2, kWriteBackBlocks}, sums.options());
        write_back_cuda(w, w0, change, partial.data_ptr<double>(), sums.data_ptr<double>(), stream);
      });
  return {sums[0], sums[1]};
}

}  // namespace

void bind_write_back(py::module_& module) {
  module.def("write_back_", &write_back, py::call_guard<py::gil_scoped_release>());
}

}  // namespace d4s

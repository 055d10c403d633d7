// d4s.ops.symmetrize_: what it asks of its arguments, and the choice between CPU and CUDA.
#include <torch/csrc/utils/pybind.h>

#include "../shared/arguments.h"
#include "../shared/dispatch.h"
#include "symmetrize.h"

namespace d4s {
namespace {

void symmetrize(at::Tensor matrix) {
  const OnMemory on_memory;
  check_square(matrix, "matrix");
  count_write(matrix, "matrix");
  dispatch(
      matrix, [&] { symmetrize_cpu(matrix_of(matrix)); },
      [&](auto stream) { symmetrize_cuda(matrix_of(matrix), stream); });
}

}  // namespace

void bind_symmetrize(py::module_& module) {
  module.def("symmetrize_", &symmetrize, py::call_guard<py::gil_scoped_release>());
}

}  // namespace d4s

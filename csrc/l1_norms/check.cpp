// d4s.ops.l1_norms: what it asks of its arguments, and the choice between CPU and CUDA.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/utils/pybind.h>

#include <string>
#include <vector>

#include "../shared/arguments.h"
#include "../shared/dispatch.h"
#include "l1_norms.h"

namespace d4s {
namespace {

at::Tensor l1_norms(std::vector<at::Tensor> weights) {
  const OnMemory on_memory;
  if (weights.empty()) return at::zeros({0}, at::kDouble);
  std::vector<Weight> views;
  for (size_t i = 0; i < weights.size(); ++i) {
    at::Tensor& weight = weights[i];
    const std::string name = text_of("weights[", i, "]");
    check_tensor(weight, name.c_str(), kFloating);
    check_device(weights[0], weight, name.c_str());
    // Σ|w| does not depend on the order, so a dense transpose is read where it lies.
    if (!weight.is_non_overlapping_and_dense()) weight = weight.contiguous();
    views.push_back({weight.data_ptr(), dtype_of(weight), weight.numel()});
  }
  const int64_t count = static_cast<int64_t>(views.size());
  const at::Tensor norms = at::zeros({count}, weights[0].options().dtype(at::kDouble));
  dispatch(
      norms, [&] { l1_norms_cpu(views.data(), count, norms.data_ptr<double>()); },
      [&](auto stream) {
        const at::Tensor partial = at::empty({kNormBlocks}, norms.options());
        l1_norms_cuda(views.data(), count, partial.data_ptr<double>(), norms.data_ptr<double>(), stream);
      });
  return norms;
}

}  // namespace

void bind_l1_norms(py::module_& module) {
  module.def("l1_norms", &l1_norms, py::call_guard<py::gil_scoped_release>());
}

}  // namespace d4s

// d4s.ops._C: the ops as Python calls them. They are described in d4s/ops/__init__.py.
#include <torch/csrc/utils/pybind.h>

#include <exception>

#include "shared/errors.h"

namespace d4s {
namespace {

void raise_as(const char* name, const std::exception& error) {
  PyErr_SetString(py::module_::import("d4s.errors").attr(name).ptr(), error.what());
}

}  // namespace

// The folder csrc/<op>/ is an op; its check.cpp defines bind_<op>, which adds it to the module.
#define D4S_OP(op)                     \
  void bind_##op(py::module_& module); \
  bind_##op(module)

void bind_ops(py::module_& module) {
  D4S_OP(accumulate_key_covariance);
  D4S_OP(closed_form);
  D4S_OP(l1_norms);
  D4S_OP(symmetrize);
  D4S_OP(write_back);
}

}  // namespace d4s

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
#if defined(D4S_AVX2) && defined(__GNUC__)
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) {
    throw py::import_error("this processor has no AVX2; build d4s with CMAKE_ARGS=-DD4S_AVX2=OFF");
  }
#endif
  py::register_local_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const d4s::ArgumentError& error) {
      d4s::raise_as("D4SError", error);
    } catch (const d4s::NotPositiveDefinite& error) {
      d4s::raise_as("NotPositiveDefiniteError", error);
    }
  });
  module.attr("torch_version") = D4S_TORCH_VERSION;
#ifdef D4S_WITH_CUDA
  module.attr("with_cuda") = true;
  module.attr("without_cuda") = "";
#else
  module.attr("with_cuda") = false;
  module.attr("without_cuda") = D4S_WITHOUT_CUDA;
#endif
  d4s::bind_ops(module);
}

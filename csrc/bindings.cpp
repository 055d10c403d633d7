// d4s._C: the ops as Python calls them, and the choice between CPU and CUDA. They are described in
// d4s/ops.py.
#include <torch/extension.h>
#ifdef D4S_WITH_CUDA
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>
#endif

#include <exception>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "accumulate_key_covariance.h"
#include "check.h"
#include "closed_form.h"
#include "l1_norms.h"
#include "matrix.h"
#include "triangle_tiles.h"
#include "write_back.h"

namespace d4s {
namespace {

Matrix matrix_of(const at::Tensor& tensor) {
  return {tensor.data_ptr(), dtype_of(tensor), tensor.size(0),
          tensor.size(1),    tensor.stride(0), tensor.stride(1)};
}

// Whether to take the CUDA half of an op; neither half is an error.
bool on_cuda(const at::Tensor& tensor) {
  if (tensor.is_cpu()) return false;
#ifndef D4S_WITH_CUDA
  check(false,
        "d4s was built without CUDA kernels; build it where there are a CUDA compiler and a CUDA torch");
#else
  int major = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, tensor.device().index());
  check(major >= 8, tensor.device(), " has compute capability ", major,
        ".x; the CUDA kernels need 8.0 (A100) or later");
#endif
  return true;
}

#ifdef D4S_WITH_CUDA
Stream stream_of(const at::Tensor& tensor) {
  return c10::cuda::getCurrentCUDAStream(tensor.device().index()).stream();
}
#endif

int64_t accumulate_key_covariance(at::Tensor moment, at::Tensor keys, const std::optional<at::Tensor>& mask) {
  const OnMemory on_memory;
  check_square(moment, "moment");
  check_tensor(keys, "keys", kFloating);
  if (mask) check_tensor(*mask, "mask", kBoolean);
  check_device(moment, keys, "keys");
  check(keys.dim() >= 2 && keys.size(-1) == moment.size(0), "keys have shape ", keys.sizes(),
        "; they must be [..., d] with d = ", moment.size(0), " as in moment");
  check(keys.scalar_type() != at::kDouble || moment.scalar_type() == at::kDouble,
        "keys are float64 and moment float32; a float32 moment takes float32, float16 or bfloat16 keys");
  check_apart(moment, "moment", keys, "keys");
  at::Tensor rows;
  if (mask) {
    check(mask->sizes() == keys.sizes().slice(0, keys.dim() - 1), "mask has shape ", mask->sizes(),
          "; it must be ", keys.sizes().slice(0, keys.dim() - 1), ", one entry a key");
    check_device(moment, *mask, "mask");
    rows = mask->reshape({-1}).nonzero().reshape({-1});
  }
  const int64_t d = moment.size(0);
  const int64_t total = d == 0 ? 0 : keys.numel() / d;
  const int64_t count = mask ? rows.size(0) : total;
  if (count == 0 || d == 0) return count;

  count_write(moment, "moment");
  keys = keys.reshape({total, d}).resolve_neg();
  if (keys.stride(1) != 1) keys = keys.contiguous();
  const int64_t* row_indices = mask ? rows.data_ptr<int64_t>() : nullptr;
  if (!on_cuda(moment)) {
    accumulate_key_covariance_cpu(matrix_of(keys), row_indices, count, matrix_of(moment));
    return count;
  }
#ifdef D4S_WITH_CUDA
  const c10::cuda::CUDAGuard guard(moment.device());
  const int64_t lane = 16 / keys.element_size();
  if (keys.stride(0) % lane != 0 || reinterpret_cast<uintptr_t>(keys.data_ptr()) % 16 != 0) {
    keys = at::constant_pad_nd(keys, {0, (lane - d % lane) % lane}).contiguous().narrow(1, 0, d);
  }
  accumulate_key_covariance_cuda(matrix_of(keys), row_indices, count, matrix_of(moment), stream_of(moment));
#endif
  return count;
}

void symmetrize(at::Tensor matrix) {
  const OnMemory on_memory;
  check_square(matrix, "matrix");
  count_write(matrix, "matrix");
  if (!on_cuda(matrix)) return symmetrize_cpu(matrix_of(matrix));
#ifdef D4S_WITH_CUDA
  const c10::cuda::CUDAGuard guard(matrix.device());
  symmetrize_cuda(matrix_of(matrix), stream_of(matrix));
#endif
}

at::Tensor checked_closed_form(const at::Tensor& residual_sum, const at::Tensor& key_sum,
                               const at::Tensor& prior) {
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
  return closed_form(residual_sum, key_sum, prior);
}

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

  const at::Tensor sums = at::zeros({2}, weight.options().dtype(at::kDouble));
  if (weight.numel() == 0) return {sums[0], sums[1]};
  const Matrix w = matrix_of(weight), w0 = matrix_of(base), change = matrix_of(delta);
  if (!on_cuda(weight)) {
    write_back_cpu(w, w0, change, sums.data_ptr<double>());
  } else {
#ifdef D4S_WITH_CUDA
    const c10::cuda::CUDAGuard guard(weight.device());
    const at::Tensor partial = at::empty({2, kWriteBackBlocks}, sums.options());
    write_back_cuda(w, w0, change, partial.data_ptr<double>(), sums.data_ptr<double>(), stream_of(weight));
#endif
  }
  return {sums[0], sums[1]};
}

at::Tensor checked_l1_norms(std::vector<at::Tensor> weights) {
  const OnMemory on_memory;
  if (weights.empty()) return at::zeros({0}, at::kDouble);
  std::vector<Weight> views;
  for (size_t i = 0; i < weights.size(); ++i) {
    at::Tensor& weight = weights[i];
    const std::string name = c10::str("weights[", i, "]");
    check_tensor(weight, name.c_str(), kFloating);
    check_device(weights[0], weight, name.c_str());
    // Σ|w| does not depend on the order, so a dense transpose is read where it lies.
    if (!weight.is_non_overlapping_and_dense()) weight = weight.contiguous();
    views.push_back({weight.data_ptr(), dtype_of(weight), weight.numel()});
  }
  const int64_t count = static_cast<int64_t>(views.size());
  const at::Tensor norms = at::zeros({count}, weights[0].options().dtype(at::kDouble));
  if (!on_cuda(norms)) {
    l1_norms_cpu(views.data(), count, norms.data_ptr<double>());
  } else {
#ifdef D4S_WITH_CUDA
    const c10::cuda::CUDAGuard guard(norms.device());
    const at::Tensor partial = at::empty({kNormBlocks}, norms.options());
    l1_norms_cuda(views.data(), count, partial.data_ptr<double>(), norms.data_ptr<double>(),
                  stream_of(norms));
#endif
  }
  return norms;
}

// The order in which the CUDA kernel works through a lower triangle of side × side tiles; for tests.
std::vector<std::pair<int64_t, int64_t>> lower_triangle_tiles(int64_t side) {
  std::vector<std::pair<int64_t, int64_t>> tiles;
  for (int64_t index = 0; index < lower_triangle_count(side); ++index) {
    const TilePosition tile = lower_triangle_tile(index, side);
    tiles.emplace_back(tile.row, tile.col);
  }
  return tiles;
}

void raise_as(const char* name, const std::exception& error) {
  PyErr_SetString(py::module_::import("d4s.errors").attr(name).ptr(), error.what());
}

}  // namespace
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
#else
  module.attr("with_cuda") = false;
#endif
  const py::call_guard<py::gil_scoped_release> release;
  module.def("accumulate_key_covariance_", &d4s::accumulate_key_covariance, release);
  module.def("symmetrize_", &d4s::symmetrize, release);
  module.def("closed_form", &d4s::checked_closed_form, release);
  module.def("write_back_", &d4s::write_back, release);
  module.def("l1_norms", &d4s::checked_l1_norms, release);
  module.def("lower_triangle_tiles", &d4s::lower_triangle_tiles);
}

// d4s._C: checks of what Python hands over, and the choice between CPU and CUDA. The ops are described in
// d4s/ops.py.
#include <torch/extension.h>
#ifdef D4S_WITH_CUDA
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>
#endif

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "accumulate_key_covariance.h"
#include "closed_form.h"
#include "l1_norms.h"
#include "matrix.h"
#include "triangle_tiles.h"
#include "write_back.h"

namespace d4s {
namespace {

// Becomes d4s.errors.D4SError.
struct ArgumentError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

template <class... Parts>
void check(bool holds, const Parts&... parts) {
  if (!holds) throw ArgumentError(c10::str(parts...));
}

DType dtype_of(const at::Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case at::kDouble:
      return DType::float64;
    case at::kFloat:
      return DType::float32;
    case at::kHalf:
      return DType::float16;
    case at::kBFloat16:
      return DType::bfloat16;
    default:
      check(false, name, " is ", tensor.scalar_type(), "; it must be float64, float32, float16 or bfloat16");
  }
  return DType::float64;
}

bool is_wide(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kFloat || tensor.scalar_type() == at::kDouble;
}

Matrix matrix_of(const at::Tensor& tensor, const char* name) {
  return {tensor.data_ptr(), dtype_of(tensor, name), tensor.size(0),
          tensor.size(1),    tensor.stride(0),       tensor.stride(1)};
}

void check_device(const at::Tensor& first, const at::Tensor& other, const char* name) {
  check(first.device() == other.device(), name, " is on ", other.device(), ", the others on ",
        first.device());
}

// Where the elements of a tensor of one or more begin and end in memory.
std::pair<const char*, const char*> bytes_of(const at::Tensor& tensor) {
  int64_t last = 0;
  for (int64_t i = 0; i < tensor.dim(); ++i) last += (tensor.size(i) - 1) * tensor.stride(i);
  const char* const first = static_cast<const char*>(tensor.data_ptr());
  return {first, first + (last + 1) * static_cast<int64_t>(tensor.element_size())};
}

// `written` must not share memory with what is read meanwhile, unless they are the same elements and
// `same_is_right`.
void check_apart(const at::Tensor& written, const char* written_name, const at::Tensor& read,
                 const char* name, bool same_is_right = false) {
  const at::MemOverlapStatus status = at::get_overlap_status(written, read);
  bool apart = status == at::MemOverlapStatus::No, same = status == at::MemOverlapStatus::Full;
  if (status == at::MemOverlapStatus::TooHard) {  // strided views: apart if all their bytes are
    const auto [written_begin, written_end] = bytes_of(written);
    const auto [begin, end] = bytes_of(read);
    apart = end <= written_begin || written_end <= begin;
    same = begin == written_begin && written.sizes() == read.sizes() && written.strides() == read.strides();
  }
  check(apart || (same_is_right && same), name, " shares memory with ", written_name,
        ", which is written while ", name, " is read; pass a clone");
}

// A tensor about to be written: autograd must know, and its elements must be what lies in memory.
void count_write(const at::Tensor& written, const char* name) {
  check(!written.is_neg(), name, " is a lazily negated view; pass ", name, ".resolve_neg()");
  if (!written.is_inference()) written.unsafeGetTensorImpl()->bump_version();
}

// Whether to take the CUDA half of an op; neither half is an error.
bool on_cuda(const at::Tensor& tensor) {
  if (tensor.is_cpu()) return false;
  check(tensor.is_cuda(), "tensors on ", tensor.device(), " are not supported; use cpu or cuda");
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

void check_square(const at::Tensor& matrix, const char* name) {
  check(matrix.dim() == 2 && matrix.size(0) == matrix.size(1), name, " has shape ", matrix.sizes(),
        "; it must be [d, d]");
  check(is_wide(matrix), name, " is ", matrix.scalar_type(), "; sums are kept in float32 or float64");
  check(matrix.is_contiguous(), name, " must be contiguous");
}

int64_t accumulate_key_covariance(at::Tensor moment, at::Tensor keys, const std::optional<at::Tensor>& mask) {
  at::NoGradGuard no_grad;
  check_square(moment, "moment");
  check_device(moment, keys, "keys");
  check(keys.dim() >= 2 && keys.size(-1) == moment.size(0), "keys have shape ", keys.sizes(),
        "; they must be [..., d] with d = ", moment.size(0), " as in moment");
  check(keys.scalar_type() != at::kDouble || moment.scalar_type() == at::kDouble,
        "keys are float64 and moment float32; a float32 moment takes float32, float16 or bfloat16 keys");
  check_apart(moment, "moment", keys, "keys");
  at::Tensor rows;
  if (mask) {
    check(mask->scalar_type() == at::kBool && mask->sizes() == keys.sizes().slice(0, keys.dim() - 1),
          "mask is ", mask->scalar_type(), " ", mask->sizes(), "; it must be bool ",
          keys.sizes().slice(0, keys.dim() - 1), ", one entry a key");
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
    accumulate_key_covariance_cpu(matrix_of(keys, "keys"), row_indices, count, matrix_of(moment, "moment"));
    return count;
  }
#ifdef D4S_WITH_CUDA
  const c10::cuda::CUDAGuard guard(moment.device());
  const int64_t lane = 16 / keys.element_size();
  if (keys.stride(0) % lane != 0 || reinterpret_cast<uintptr_t>(keys.data_ptr()) % 16 != 0) {
    keys = at::constant_pad_nd(keys, {0, (lane - d % lane) % lane}).contiguous().narrow(1, 0, d);
  }
  accumulate_key_covariance_cuda(matrix_of(keys, "keys"), row_indices, count, matrix_of(moment, "moment"),
                                 stream_of(moment));
#endif
  return count;
}

void symmetrize(at::Tensor matrix) {
  check_square(matrix, "matrix");
  count_write(matrix, "matrix");
  if (!on_cuda(matrix)) return symmetrize_cpu(matrix_of(matrix, "matrix"));
#ifdef D4S_WITH_CUDA
  const c10::cuda::CUDAGuard guard(matrix.device());
  symmetrize_cuda(matrix_of(matrix, "matrix"), stream_of(matrix));
#endif
}

at::Tensor checked_closed_form(const at::Tensor& residual_sum, const at::Tensor& key_sum,
                               const at::Tensor& prior) {
  at::NoGradGuard no_grad;
  check(residual_sum.dim() == 3, "residual_sum has shape ", residual_sum.sizes(),
        "; it must be [m, d_out, d_in]");
  const int64_t layers = residual_sum.size(0), d_in = residual_sum.size(2);
  const std::vector<int64_t> square{layers, d_in, d_in};
  check(key_sum.sizes() == square, "key_sum has shape ", key_sum.sizes(), "; it must be ", square);
  check(prior.sizes() == square, "prior has shape ", prior.sizes(), "; it must be ", square);
  check(is_wide(residual_sum) && key_sum.scalar_type() == residual_sum.scalar_type() &&
            prior.scalar_type() == residual_sum.scalar_type(),
        "residual_sum is ", residual_sum.scalar_type(), ", key_sum ", key_sum.scalar_type(), ", prior ",
        prior.scalar_type(), "; they must be of one type, float32 or float64");
  check_device(residual_sum, key_sum, "key_sum");
  check_device(residual_sum, prior, "prior");
  check(at::isfinite(residual_sum).all().item<bool>(), "residual_sum holds NaN or infinity");
  return closed_form(residual_sum, key_sum, prior);
}

std::tuple<at::Tensor, at::Tensor> write_back(at::Tensor weight, at::Tensor base, at::Tensor delta,
                                              bool transposed) {
  at::NoGradGuard no_grad;
  check(delta.dim() == 2 && is_wide(delta), "delta is ", delta.scalar_type(), " ", delta.sizes(),
        "; it must be float32 or float64 [d_out, d_in]");
  if (transposed) delta = delta.t();
  check(weight.sizes() == delta.sizes(), "weight has shape ", weight.sizes(), "; it must be ", delta.sizes(),
        transposed ? ", [d_in, d_out] since it is stored transposed" : ", [d_out, d_in] as delta");
  check(base.sizes() == weight.sizes() && base.scalar_type() == weight.scalar_type(), "base is ",
        base.scalar_type(), " ", base.sizes(), "; it must be ", weight.scalar_type(), " ", weight.sizes(),
        " as weight");
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
  const Matrix w = matrix_of(weight, "weight"), w0 = matrix_of(base, "base"),
               change = matrix_of(delta, "delta");
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
  at::NoGradGuard no_grad;
  if (weights.empty()) return at::zeros({0}, at::kDouble);
  std::vector<Weight> views;
  for (at::Tensor& weight : weights) {
    const DType dtype = dtype_of(weight, "weight");
    check_device(weights[0], weight, "weight");
    // Σ|w| does not depend on the order, so a dense transpose is read where it lies.
    if (!weight.is_non_overlapping_and_dense()) weight = weight.contiguous();
    views.push_back({weight.data_ptr(), dtype, weight.numel()});
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

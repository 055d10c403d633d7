// d4s.ops.accumulate_key_covariance_: what it asks of its arguments, and the choice between CPU and CUDA.
#include <ATen/ops/constant_pad_nd.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <utility>
#include <vector>

#include "../shared/arguments.h"
#include "../shared/dispatch.h"
#include "../shared/triangle_tiles.h"
#include "accumulate_key_covariance.h"
#include "library.h"

namespace d4s {
namespace {

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
  dispatch(
      moment, [&] { accumulate_key_covariance_cpu(matrix_of(keys), row_indices, count, matrix_of(moment)); },
      [&](auto stream) {
        if (is_by_library(moment, keys)) {
          return accumulate_key_covariance_library(moment, mask ? keys.index_select(0, rows) : keys);
        }
        const int64_t lane = 16 / keys.element_size();
        if (keys.stride(0) % lane != 0 || reinterpret_cast<uintptr_t>(keys.data_ptr()) % 16 != 0) {
          keys = at::constant_pad_nd(keys, {0, (lane - d % lane) % lane}).contiguous().narrow(1, 0, d);
        }
        accumulate_key_covariance_cuda(matrix_of(keys), row_indices, count, matrix_of(moment), stream);
      });
  return count;
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

}  // namespace

void bind_accumulate_key_covariance(py::module_& module) {
  module.def("accumulate_key_covariance_", &accumulate_key_covariance,
             py::call_guard<py::gil_scoped_release>());
  module.def("lower_triangle_tiles", &lower_triangle_tiles);
}

}  // namespace d4s

// The triangle is cut into block columns, each one matrix product, so that the library's product does the
// work and little more than half of it is done. Keys are gathered and up-cast into a buffer in the same pass.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>

#include <algorithm>

#include "../shared/lanes_cpu.h"
#include "accumulate_key_covariance.h"

namespace d4s {
namespace {

constexpr int64_t kBlockColumns = 256;         // (1 + 256 / d) / 2 of a full product is computed
constexpr int64_t kBufferElements = 16 << 20;  // gathered rows held at a time: 64 MiB of float32

// to[0:n] = from[0:n], up-cast.
template <class From, class To>
void copy_row(const From* from, To* to, int64_t n) {
  int64_t i = 0;
  if constexpr (std::is_same_v<To, float> && sizeof(From) == 2) {
    for (; i + kLanes <= n; i += kLanes) {
      const Float8 lanes = load8(from + i);
      std::memcpy(to + i, &lanes, sizeof(lanes));
    }
  }
  for (; i < n; ++i) to[i] = static_cast<To>(from[i]);
}

// packed [count, d] = the named rows of keys, up-cast to the type of the sums.
template <class Sum>
void gather_rows(const Matrix& keys, const int64_t* rows, int64_t first, int64_t count, Sum* packed) {
  with_cpu_type(keys.dtype, [&](auto zero) {
    using Key = decltype(zero);
    const Key* data = static_cast<const Key*>(keys.data);
    const int64_t grain = std::max<int64_t>(1, kElementsAThread / keys.cols);
    at::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t row = rows ? rows[first + i] : first + i;
        copy_row(data + row * keys.row_stride, packed + i * keys.cols, keys.cols);
      }
    });
  });
}

template <class Sum>
void accumulate(const Matrix& keys, const int64_t* rows, int64_t count, const Matrix& moment_view) {
  const int64_t d = keys.cols;
  const auto type = c10::CppTypeToScalarType<Sum>::value;
  const at::Tensor moment = at::from_blob(moment_view.data, {d, d}, type);
  const bool in_place = !rows && keys.dtype == moment_view.dtype;

  const int64_t buffer_rows =
      std::min(count, std::max<int64_t>(256, kBufferElements / std::max<int64_t>(d, 1)));
  const at::Tensor buffer = in_place ? at::Tensor() : at::empty({buffer_rows, d}, type);
  for (int64_t first = 0; first < count; first += buffer_rows) {
    const int64_t chunk = std::min(buffer_rows, count - first);
    at::Tensor packed;
    if (in_place) {
      Sum* start = static_cast<Sum*>(keys.data) + first * keys.row_stride;
      packed = at::from_blob(start, {chunk, d}, {keys.row_stride, 1}, type);
    } else {
      gather_rows(keys, rows, first, chunk, buffer.data_ptr<Sum>());
      packed = buffer.narrow(0, 0, chunk);
    }
    for (int64_t column = 0; column < d; column += kBlockColumns) {
      const int64_t width = std::min(kBlockColumns, d - column);
      at::Tensor block = moment.narrow(0, column, d - column).narrow(1, column, width);
      block.addmm_(packed.narrow(1, column, d - column).t(), packed.narrow(1, column, width));
    }
  }
}

}  // namespace

void accumulate_key_covariance_cpu(const Matrix& keys, const int64_t* rows, int64_t count,
                                   const Matrix& moment) {
  if (moment.dtype == DType::float64) {
    accumulate<double>(keys, rows, count, moment);
  } else {
    accumulate<float>(keys, rows, count, moment);
  }
}

}  // namespace d4s

// Eight elements at a time go from memory through registers to memory: up-cast, add, round, sum.
#include <ATen/Parallel.h>

#include <algorithm>
#include <type_traits>
#include <vector>

#include "../shared/lanes_cpu.h"
#include "write_back.h"

namespace d4s {
namespace {

constexpr int64_t kTransposeRows = 32;   // rows of a column-major delta turned together: runs of memory
constexpr int64_t kTransposeCols = 256;  // by so many columns, in the second-level cache
constexpr int64_t kPrefetch = 32;        // columns asked for ahead, since each lies in another page
constexpr int64_t kTransposePitch = kTransposeCols + kLanes;  // rows must not share a cache set

struct Sums {
  Double8 l1{};
  Double8 delta_sq{};
};

// after = round(base + delta) of eight elements.
template <class Weight, class Delta>
inline void write8(const Weight* base, const Delta* delta, Stored8<Weight>& after, Sums& sums) {
  const auto before = load8(base);
  Wide8<Weight> sum;
  if constexpr (std::is_same_v<Delta, float> && !std::is_same_v<Weight, double>) {
    sum = before + load8(delta);  // rounds as the float64 sum would (53 ≥ 2 · 24 + 2 bits)
  } else {
    narrow(widen(before) + widen(load8(delta)), sum);
  }
  const Wide8<Weight> stored = round8(sum, after);
  const Double8 wide = widen(stored);
  const Double8 change = wide - widen(before);
  sums.l1 += absolute(wide);
  sums.delta_sq += change * change;
}

// weight[0:n] = round(base[0:n] + delta[0:n]).
template <class Weight, class Delta>
void write_row(Weight* weight, const Weight* base, const Delta* delta, int64_t n, Sums& sums) {
  Stored8<Weight> after;
  const bool aligned = reinterpret_cast<uintptr_t>(weight) % 16 == 0;
  int64_t i = 0;
  if (aligned) {
    for (; i + kLanes <= n; i += kLanes) {
      write8(base + i, delta + i, after, sums);
      stream8(after, weight + i);
    }
  } else {
    for (; i + kLanes <= n; i += kLanes) {
      write8(base + i, delta + i, after, sums);
      std::memcpy(weight + i, &after, sizeof(after));
    }
  }
  if (i < n) {
    Weight last_base[kLanes] = {};  // zeros add nothing to the sums
    Delta last_delta[kLanes] = {};
    std::copy(base + i, base + n, last_base);
    std::copy(delta + i, delta + n, last_delta);
    write8(last_base, last_delta, after, sums);
    std::copy(after.lane, after.lane + (n - i), weight + i);
  }
}

// to[i * kTransposePitch + j] = from[i + j * stride] for 4 × 4 elements.
template <class T>
inline void turn4(const T* from, int64_t stride, T* to) {
  using Vector = std::conditional_t<std::is_same_v<T, double>, Double4, Float4>;
  Vector column[4];
  for (int j = 0; j < 4; ++j) column[j] = load_vector<Vector>(from + j * stride);
  for (int i = 0; i < 4; ++i) {  // compilers make shuffles of it
    const Vector row = {column[0][i], column[1][i], column[2][i], column[3][i]};
    std::memcpy(to + i * kTransposePitch, &row, sizeof(row));
  }
}

// Part `part` of `parts` of the lines of base[0:rows, 0:n]: asked for while the tile's delta is turned.
template <class Weight>
inline void prefetch_share(const Weight* base, int64_t row_stride, int64_t rows, int64_t n, int64_t part,
                           int64_t parts) {
  constexpr int64_t kLine = 64 / sizeof(Weight);
  for (int64_t row = rows * part / parts; row < rows * (part + 1) / parts; ++row) {
    for (int64_t i = 0; i < n; i += kLine) __builtin_prefetch(base + row * row_stride + i, 0, 2);
  }
}

// turned[i * kTransposePitch + j] = delta[i, j] of a tile of a column-major delta.
template <class Weight, class Delta>
void turn_tile(const Delta* delta, const Matrix& stored, int64_t rows, int64_t n, const Weight* base,
               int64_t base_stride, Delta* turned) {
  const bool runs = stored.row_stride == 1;
  const int64_t whole_rows = runs ? rows - rows % 4 : 0, whole_columns = n - n % 4;
  for (int64_t j = 0; j < whole_columns; j += 4) {
    const Delta* source = delta + j * stored.col_stride;
    for (int64_t ahead = kPrefetch; ahead < kPrefetch + 4; ++ahead) {
      for (int64_t i = 0; i < rows; i += 64 / sizeof(Delta))
        __builtin_prefetch(source + ahead * stored.col_stride + i * stored.row_stride, 0, 2);
    }
    prefetch_share(base, base_stride, rows, n, j / 4, whole_columns / 4);
    for (int64_t i = 0; i < whole_rows; i += 4)
      turn4(source + i, stored.col_stride, turned + i * kTransposePitch + j);
  }
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = i < whole_rows ? whole_columns : 0; j < n; ++j)
      turned[i * kTransposePitch + j] = delta[i * stored.row_stride + j * stored.col_stride];
  }
}

template <class Weight, class Delta>
void write_back(const Matrix& weight, const Matrix& base, const Matrix& delta, double* sums) {
  Weight* w = static_cast<Weight*>(weight.data);
  const Weight* w0 = static_cast<const Weight*>(base.data);
  const Delta* change = static_cast<const Delta*>(delta.data);
  const bool turn = delta.col_stride != 1;
  const int64_t width = turn ? kTransposeCols : weight.cols;

  // One pair of sums a strip, added up in order at the end: the result does not depend on the threads.
  const int64_t strips = (weight.rows + kTransposeRows - 1) / kTransposeRows;
  std::vector<double> strip_sums(2 * strips);
  const int64_t grain = std::max<int64_t>(1, kElementsAThread / (kTransposeRows * weight.cols));
  at::parallel_for(0, strips, grain, [&](int64_t begin, int64_t end) {
    std::vector<Delta> turned(turn ? kTransposeRows * kTransposePitch : 0);
    for (int64_t strip = begin; strip < end; ++strip) {
      const int64_t first = strip * kTransposeRows;
      const int64_t last = std::min(weight.rows, first + kTransposeRows);
      Sums strip_sum;
      for (int64_t column = 0; column < weight.cols; column += width) {
        const int64_t n = std::min(width, weight.cols - column);
        if (turn) {
          turn_tile(change + first * delta.row_stride + column * delta.col_stride, delta, last - first, n,
                    w0 + first * base.row_stride + column, base.row_stride, turned.data());
        }
        for (int64_t row = first; row < last; ++row) {
          const Delta* row_change =
              turn ? turned.data() + (row - first) * kTransposePitch : change + row * delta.row_stride;
          write_row(w + row * weight.row_stride + column, w0 + row * base.row_stride + column, row_change, n,
                    strip_sum);
        }
      }
      strip_sums[2 * strip] = sum_of(strip_sum.l1);
      strip_sums[2 * strip + 1] = sum_of(strip_sum.delta_sq);
    }
    end_streaming();
  });

  sums[0] = sums[1] = 0;
  for (int64_t strip = 0; strip < strips; ++strip) {
    sums[0] += strip_sums[2 * strip];
    sums[1] += strip_sums[2 * strip + 1];
  }
}

}  // namespace

void write_back_cpu(const Matrix& weight, const Matrix& base, const Matrix& delta, double* sums) {
  with_cpu_type(weight.dtype, [&](auto zero) {
    using Weight = decltype(zero);
    if (delta.dtype == DType::float64) {
      write_back<Weight, double>(weight, base, delta, sums);
    } else {
      write_back<Weight, float>(weight, base, delta, sums);
    }
  });
}

}  // namespace d4s

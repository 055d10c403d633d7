// Eight elements at a time go from memory through registers to memory: up-cast, add, round, sum.
#include <ATen/Parallel.h>

#include <algorithm>
#include <type_traits>
#include <vector>

#include "lanes_cpu.h"
#include "write_back.h"

namespace d4s {
namespace {

constexpr int64_t kTransposeRows = 64;   // rows of a column-major delta turned together: runs of memory
constexpr int64_t kTransposeCols = 128;  // by so many columns, in the second-level cache
constexpr int64_t kPrefetch = 4;         // columns asked for ahead, since each lies in another page
constexpr int64_t kTransposePitch = kTransposeCols + kLanes;  // rows must not share a cache set

struct Sums {
  Double8 l1{};
  Double8 delta_sq{};
};

// after = round(base + delta) of eight elements.
template <class Weight, class Delta>
inline void write8(const Weight* base, const Delta* delta, Stored8<Weight>& after, Sums& sums) {
  const auto before = load8(base);
  if constexpr (std::is_same_v<Delta, float> && !std::is_same_v<Weight, double>) {
    // Rounds as the float64 sum would (53 ≥ 2 · 24 + 2 bits).
    round8(before + load8(delta), after);
  } else {
    Wide8<Weight> sum;
    narrow(widen(before) + widen(load8(delta)), sum);
    round8(sum, after);
  }
  const Double8 stored = widen(load8(after.lane));
  const Double8 change = stored - widen(before);
  sums.l1 += absolute(stored);
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
        for (int64_t j = 0; turn && j < n; ++j) {
          const Delta* source = change + first * delta.row_stride + (column + j) * delta.col_stride;
          for (int64_t i = 0; i < kTransposeRows; i += 64 / sizeof(Delta)) {
            __builtin_prefetch(source + kPrefetch * delta.col_stride + i * delta.row_stride);
          }
          for (int64_t i = 0; i < last - first; ++i)
            turned[i * kTransposePitch + j] = source[i * delta.row_stride];
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

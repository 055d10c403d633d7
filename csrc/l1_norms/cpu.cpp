// All weights are cut into pieces of one size, so that threads share the work evenly whatever the shapes.
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "../shared/lanes_cpu.h"
#include "l1_norms.h"

namespace d4s {
namespace {

constexpr int64_t kPiece = 1 << 16;  // elements summed by one thread at a time

struct Piece {
  int64_t weight;
  int64_t first;
  int64_t numel;
};

// |a| + |b| of eight neighbours (a, b), which lie in 32 bits: each is a float32 once the other's bits are
// cleared. Four numbers of 8 bits add up exactly in the 24 of float32, unless one is 2¹⁴ times another.
inline Float8 absolute_pairs(const c10::BFloat16* from) {
  const Bits8 pairs = load_vector<Bits8>(from);
  return same_bits<Float8>(pairs & 0x7fff0000) + same_bits<Float8>((pairs & 0x7fff) << 16);
}

template <class T, bool kInPairs = std::is_same_v<T, c10::BFloat16>>
double l1_norm(const T* data, int64_t numel) {
  // Two sums at a time: one would wait for its own last addition.
  Double8 even{}, odd{};
  int64_t i = 0;
  if constexpr (kInPairs) {
    for (; i + 8 * kLanes <= numel; i += 8 * kLanes) {
      even += widen(absolute_pairs(data + i) + absolute_pairs(data + i + 2 * kLanes));
      odd += widen(absolute_pairs(data + i + 4 * kLanes) + absolute_pairs(data + i + 6 * kLanes));
    }
  }
  for (; i + 2 * kLanes <= numel; i += 2 * kLanes) {
    even += widen(absolute(load8(data + i)));
    odd += widen(absolute(load8(data + i + kLanes)));
  }
  for (; i < numel; i += kLanes) {
    T last[kLanes] = {};
    std::copy(data + i, data + std::min(numel, i + kLanes), last);
    even += widen(absolute(load8(last)));
  }
  const double sum = sum_of(even + odd);
  if constexpr (kInPairs) {
    if (!std::isfinite(sum)) return l1_norm<T, false>(data, numel);  // four of 2¹²⁶ and more overflow float32
  }
  return sum;
}

}  // namespace

void l1_norms_cpu(const Weight* weights, int64_t count, double* norms) {
  std::vector<Piece> pieces;
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t first = 0; first < weights[i].numel; first += kPiece) {
      pieces.push_back({i, first, std::min(kPiece, weights[i].numel - first)});
    }
  }
  std::vector<double> sums(pieces.size());
  at::parallel_for(0, static_cast<int64_t>(pieces.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Piece& piece = pieces[i];
      with_cpu_type(weights[piece.weight].dtype, [&](auto zero) {
        using T = decltype(zero);
        sums[i] = l1_norm(static_cast<const T*>(weights[piece.weight].data) + piece.first, piece.numel);
      });
    }
  });
  std::fill(norms, norms + count, 0.0);
  for (size_t i = 0; i < pieces.size(); ++i) norms[pieces[i].weight] += sums[i];
}

}  // namespace d4s

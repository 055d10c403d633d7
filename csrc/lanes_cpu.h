// Eight elements of any floating type as one vector of float32 or float64, and back. Written with the vector types
// of GCC and Clang, which become whatever the processor has; only half precision needs named instructions.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <type_traits>

#include "matrix.h"

namespace d4s {

constexpr int64_t kLanes = 8;

using Double8 = double __attribute__((vector_size(64)));
using Float8 = float __attribute__((vector_size(32)));
using Bits8 = uint32_t __attribute__((vector_size(32)));
using HalfBits8 = uint16_t __attribute__((vector_size(16)));

// The type that holds every value of T exactly: double for double, float for the others.
template <class T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;
template <class T>
using Wide8 = std::conditional_t<std::is_same_v<T, double>, Double8, Float8>;

template <class To, class From>
inline To same_bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

template <class Vector, class T>
inline Vector load_vector(const T* from) {
  Vector vector;
  std::memcpy(&vector, from, sizeof(vector));
  return vector;
}

inline Double8 load8(const double* from) { return load_vector<Double8>(from); }
inline Float8 load8(const float* from) { return load_vector<Float8>(from); }
inline Float8 load8(const c10::BFloat16* from) {
  return same_bits<Float8>(__builtin_convertvector(load_vector<HalfBits8>(from), Bits8) << 16);
}
inline Float8 load8(const c10::Half* from) {
#ifdef __F16C__
  return same_bits<Float8>(_mm256_cvtph_ps(load_vector<__m128i>(from)));
#else
  Float8 lanes;
  for (int i = 0; i < kLanes; ++i) lanes[i] = from[i];
  return lanes;
#endif
}

// What eight elements of type T take in memory.
template <class T>
struct alignas(16) Stored8 {
  T lane[kLanes];
};

// Rounded to nearest even, NaN to NaN.
inline void round8(Double8 from, Stored8<double>& to) { std::memcpy(&to, &from, sizeof(to)); }
inline void round8(Float8 from, Stored8<float>& to) { std::memcpy(&to, &from, sizeof(to)); }
inline void round8(Float8 from, Stored8<c10::BFloat16>& to) {
  const Bits8 bits = same_bits<Bits8>(from);
  const Bits8 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Bits8 is_number = same_bits<Bits8>(from == from);
  const HalfBits8 half = __builtin_convertvector((rounded & is_number) | (~is_number & 0x7fc0), HalfBits8);
  std::memcpy(&to, &half, sizeof(to));
}
inline void round8(Float8 from, Stored8<c10::Half>& to) {
#ifdef __F16C__
  const __m128i half = _mm256_cvtps_ph(same_bits<__m256>(from), _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(&to, &half, sizeof(to));
#else
  for (int i = 0; i < kLanes; ++i) to.lane[i] = from[i];
#endif
}

// Stores past the cache, for memory that is not read again soon: a plain store reads each line before it writes
// it. `to` is a multiple of 16 bytes; end_streaming before other threads may look.
template <class T>
inline void stream8(const Stored8<T>& from, T* to) {
#ifdef __AVX2__
  for (size_t i = 0; i < sizeof(from) / 16; ++i) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(to) + i, reinterpret_cast<const __m128i*>(&from)[i]);
  }
#else
  std::memcpy(to, &from, sizeof(from));
#endif
}
inline void end_streaming() {
#ifdef __AVX2__
  _mm_sfence();
#endif
}

inline Double8 widen(Double8 lanes) { return lanes; }
inline Double8 widen(Float8 lanes) { return __builtin_convertvector(lanes, Double8); }

// Cleared sign bits.
inline Double8 absolute(Double8 lanes) { return lanes < 0 ? -lanes : lanes; }
inline Float8 absolute(Float8 lanes) { return same_bits<Float8>(same_bits<Bits8>(lanes) & 0x7fffffff); }

inline double sum_of(Double8 lanes) {
  double sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += lanes[i];
  return sum;
}

// Calls work(T{}) with the C++ type of `dtype`.
template <class Work>
void with_cpu_type(DType dtype, Work work) {
  switch (dtype) {
    case DType::float64:
      return work(double{});
    case DType::float32:
      return work(float{});
    case DType::float16:
      return work(c10::Half{});
    case DType::bfloat16:
      return work(c10::BFloat16{});
  }
  throw std::logic_error("unknown DType");
}

}  // namespace d4s

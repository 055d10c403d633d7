// Eight elements of any floating type as float32 or float64 lanes, and back. The vector types are those of
// GCC and Clang and hold on every processor; conversions name AVX2 where it is there, since compilers lower
// the portable form of these to scalar code.
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
constexpr int64_t kElementsAThread = 1 << 15;  // less is done sooner than a second thread wakes

using Double4 = double __attribute__((vector_size(32)));
using Float4 = float __attribute__((vector_size(16)));
using Float8 = float __attribute__((vector_size(32)));
using Bits8 = uint32_t __attribute__((vector_size(32)));
using HalfBits8 = uint16_t __attribute__((vector_size(16)));

// Two vectors: one of 64 bytes becomes scalar code where there is no AVX-512.
struct Double8 {
  Double4 low;
  Double4 high;
};
inline Double8 operator+(const Double8& a, const Double8& b) { return {a.low + b.low, a.high + b.high}; }
inline Double8 operator-(const Double8& a, const Double8& b) { return {a.low - b.low, a.high - b.high}; }
inline Double8 operator*(const Double8& a, const Double8& b) { return {a.low * b.low, a.high * b.high}; }
inline Double8& operator+=(Double8& a, const Double8& b) { return a = a + b; }

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

inline Double8 load8(const double* from) {
  return {load_vector<Double4>(from), load_vector<Double4>(from + 4)};
}
inline Float8 load8(const float* from) { return load_vector<Float8>(from); }
inline Float8 load8(const c10::BFloat16* from) {
#ifdef __AVX2__
  return same_bits<Float8>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_vector<__m128i>(from)), 16));
#else
  return same_bits<Float8>(__builtin_convertvector(load_vector<HalfBits8>(from), Bits8) << 16);
#endif
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

// Rounded to nearest even, NaN to NaN; the rounded values are returned, too.
inline Double8 round8(const Double8& from, Stored8<double>& to) {
  std::memcpy(&to, &from, sizeof(to));
  return from;
}
inline Float8 round8(Float8 from, Stored8<float>& to) {
  std::memcpy(&to, &from, sizeof(to));
  return from;
}
inline Float8 round8(Float8 from, Stored8<c10::BFloat16>& to) {
  const Bits8 bits = same_bits<Bits8>(from);
  const Bits8 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000;
  const Bits8 quiet_nan = Bits8{} + 0x7fc00000;
#ifdef __AVX2__
  const __m256 lanes = same_bits<__m256>(from);
  const Float8 result = same_bits<Float8>(_mm256_blendv_ps(
      same_bits<__m256>(rounded), same_bits<__m256>(quiet_nan), _mm256_cmp_ps(lanes, lanes, _CMP_UNORD_Q)));
  const __m256i high = _mm256_srli_epi32(same_bits<__m256i>(result), 16);
  const __m128i half = _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
#else
  const Bits8 is_number = same_bits<Bits8>(from == from);
  const Float8 result = same_bits<Float8>((rounded & is_number) | (~is_number & quiet_nan));
  const HalfBits8 half = __builtin_convertvector(same_bits<Bits8>(result) >> 16, HalfBits8);
#endif
  std::memcpy(&to, &half, sizeof(to));
  return result;
}
inline Float8 round8(Float8 from, Stored8<c10::Half>& to) {
#ifdef __F16C__
  const __m128i half = _mm256_cvtps_ph(same_bits<__m256>(from), _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(&to, &half, sizeof(to));
  return same_bits<Float8>(_mm256_cvtph_ps(half));
#else
  for (int i = 0; i < kLanes; ++i) to.lane[i] = from[i];
  return load8(to.lane);
#endif
}

// Stores past the cache, for memory that is not read again soon: a plain store reads each line before it
// writes it. `to` is a multiple of 16 bytes; end_streaming before other threads may look.
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

inline Double8 widen(const Double8& lanes) { return lanes; }
inline Double8 widen(Float8 lanes) {
#ifdef __AVX2__
  return {_mm256_cvtps_pd(_mm256_castps256_ps128(lanes)), _mm256_cvtps_pd(_mm256_extractf128_ps(lanes, 1))};
#else
  return {Double4{lanes[0], lanes[1], lanes[2], lanes[3]}, Double4{lanes[4], lanes[5], lanes[6], lanes[7]}};
#endif
}

// Rounded to nearest even.
inline void narrow(const Double8& lanes, Double8& to) { to = lanes; }
inline void narrow(const Double8& lanes, Float8& to) {
#ifdef __AVX2__
  to = _mm256_set_m128(_mm256_cvtpd_ps(lanes.high), _mm256_cvtpd_ps(lanes.low));
#else
  for (int i = 0; i < 4; ++i) {
    to[i] = static_cast<float>(lanes.low[i]);
    to[i + 4] = static_cast<float>(lanes.high[i]);
  }
#endif
}

// Cleared sign bits.
inline Float8 absolute(Float8 lanes) { return same_bits<Float8>(same_bits<Bits8>(lanes) & 0x7fffffff); }
inline Double8 absolute(const Double8& lanes) {
  const Bits8 keep = {~0u, 0x7fffffff, ~0u, 0x7fffffff, ~0u, 0x7fffffff, ~0u, 0x7fffffff};
  return {same_bits<Double4>(same_bits<Bits8>(lanes.low) & keep),
          same_bits<Double4>(same_bits<Bits8>(lanes.high) & keep)};
}

inline double sum_of(const Double8& lanes) {
  const Double4 halves = lanes.low + lanes.high;
  return (halves[0] + halves[1]) + (halves[2] + halves[3]);
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

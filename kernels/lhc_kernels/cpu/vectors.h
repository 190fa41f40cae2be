// Vectors of floats from the compiler's own extensions, so that one text serves AVX-512, AVX2, SSE and NEON.
#pragma once

#include <cstdint>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

// Of a lambda: were it called, the sums that it refers to would live in memory.
#define LHC_INLINE __attribute__((always_inline))

namespace lhc {

// Lanes of the widest vector, and how many vector registers there are.
#if defined(__AVX512F__) && defined(__AVX512VL__)
constexpr int kLanes = 16, kRegisters = 32;
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int kLanes = 8, kRegisters = 16;
#elif defined(__aarch64__)
constexpr int kLanes = 4, kRegisters = 32;
#else
constexpr int kLanes = 4, kRegisters = 16;
#endif

// Whether products of pairs of bfloat16, summed in float32, have an instruction. It takes denormals for zero.
// (AMX's tile product would be one entry of 32 channels by 16 filters for 16 pixels: it belongs beside PairMath in
// cells_pairs.cpp, once a machine is at hand that can run it.)
#if defined(__AVX512BF16__) && defined(__AVX512VL__)
constexpr bool kHasPairs = true;
#else
constexpr bool kHasPairs = false;
#endif

// Whether sums of four products of an unsigned and a signed byte, in int32, have an instruction.
#if (defined(__AVX512VNNI__) && defined(__AVX512VL__)) || defined(__AVXVNNI__)
constexpr bool kHasFours = true;
#else
constexpr bool kHasFours = false;
#endif

template <int L>
struct Vectors {
  typedef float Floats __attribute__((vector_size(L * 4)));
  typedef int32_t Ints __attribute__((vector_size(L * 4)));
  typedef uint32_t Bits __attribute__((vector_size(L * 4)));
  typedef uint16_t Halves __attribute__((vector_size(L * 2)));
  typedef int8_t Bytes __attribute__((vector_size(L)));
  typedef float UnalignedFloats __attribute__((vector_size(L * 4), aligned(4), may_alias));
  typedef uint16_t UnalignedHalves __attribute__((vector_size(L * 2), aligned(2), may_alias));
  typedef int32_t UnalignedInts __attribute__((vector_size(L * 4), aligned(4), may_alias));
  typedef int8_t UnalignedBytes __attribute__((vector_size(L), aligned(1), may_alias));
};
template <int L>
using Vec = typename Vectors<L>::Floats;

template <int L>
[[gnu::always_inline]] inline Vec<L> load(const float* p) {
  return *reinterpret_cast<const typename Vectors<L>::UnalignedFloats*>(p);
}

template <int L>
[[gnu::always_inline]] inline void store(float* p, Vec<L> v) {
  *reinterpret_cast<typename Vectors<L>::UnalignedFloats*>(p) = v;
}

// bfloat16, as the upper halves of floats.
template <int L>
[[gnu::always_inline]] inline Vec<L> load(const uint16_t* p) {
  const typename Vectors<L>::Halves halves = *reinterpret_cast<const typename Vectors<L>::UnalignedHalves*>(p);
  return reinterpret_cast<Vec<L>>(__builtin_convertvector(halves, typename Vectors<L>::Bits) << 16);
}

// Rounded to the nearest, ties to even; NaN stays NaN, denormals are kept.
template <int L>
[[gnu::always_inline]] inline void store(uint16_t* p, Vec<L> v) {
  using Bits = typename Vectors<L>::Bits;
  const Bits bits = reinterpret_cast<Bits>(v), odd = (bits >> 16) & 1;
  const Bits rounded = (bits + 0x7fff + odd) >> 16, quiet = (bits >> 16) | 0x40;
  const auto halves = __builtin_convertvector(v != v ? quiet : rounded, typename Vectors<L>::Halves);
  *reinterpret_cast<typename Vectors<L>::UnalignedHalves*>(p) = halves;
}

template <int L>
[[gnu::always_inline]] inline typename Vectors<L>::Ints load(const int32_t* p) {
  return *reinterpret_cast<const typename Vectors<L>::UnalignedInts*>(p);
}

// The nearest integers, ties to even, from -127 to 127; NaN counts as 0. Adding 1.5 * 2^23 rounds: its last bit is 1.
template <int L>
[[gnu::always_inline]] inline void store(int8_t* p, Vec<L> v) {
  using Ints = typename Vectors<L>::Ints;
  const Vec<L> most = Vec<L>{} + 127.0f, bounded = v > most ? most : v < -most ? -most : v == v ? v : Vec<L>{};
  const Ints integers = reinterpret_cast<Ints>(bounded + 12582912.0f) - 0x4b400000;
  *reinterpret_cast<typename Vectors<L>::UnalignedBytes*>(p) =
      __builtin_convertvector(integers, typename Vectors<L>::Bytes);
}

// A difference, because adding +0 would turn -0 into +0, and so could not be left out by the compiler.
template <int L>
[[gnu::always_inline]] inline Vec<L> broadcast(float value) {
  return value - Vec<L>{};
}

// Comparisons, not the instructions for maxima: NaN must win.
template <int L>
[[gnu::always_inline]] inline Vec<L> at_least(Vec<L> values, Vec<L> floor) {
  return values < floor ? floor : values;
}
template <int L>
[[gnu::always_inline]] inline Vec<L> larger(Vec<L> a, Vec<L> b) {
  return (a > b) | (a != a) ? a : b;
}

// body(0) ... body(N - 1) with constant arguments: sums that are indexed by constants from the start are kept in
// registers, while those of an ordinary loop, unrolled late, were stored in every round (3x slower).
template <int N, typename Body>
[[gnu::always_inline]] inline void unrolled(Body body) {
  [&]<int... I>(std::integer_sequence<int, I...>)
      LHC_INLINE { (body(std::integral_constant<int, I>{}), ...); }(std::make_integer_sequence<int, N>{});
}

}  // namespace lhc

// Vectors of floats from the compiler's own extensions, so that one text serves AVX-512, AVX2, SSE and NEON; masks and
// gaps take some instructions by name.
#pragma once

#include <cstdint>
#include <utility>

#if defined(__AVX__)
#include <immintrin.h>
#endif

namespace lhc {

// A register block holds kFilters x kVectors sums; beside them kVectors inputs and one weight need a register.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kFilters = 8, kVectors = 3;
#elif defined(__AVX__)
constexpr int kLanes = 8, kFilters = 4, kVectors = 3;
#elif defined(__aarch64__)
constexpr int kLanes = 4, kFilters = 8, kVectors = 3;
#else
constexpr int kLanes = 4, kFilters = 4, kVectors = 3;
#endif

typedef float Vec __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t IntVec __attribute__((vector_size(kLanes * sizeof(int32_t))));
typedef float UnalignedVec __attribute__((vector_size(kLanes * sizeof(float)), aligned(4), may_alias));

// Which lanes of a vector take part.
#if defined(__AVX512F__)
struct Mask {
  __mmask16 lanes;
};
#else
struct Mask {
  IntVec lanes;  // -1 or 0
};
#endif

// Loads that skip masked lanes cost little on AVX-512 and AVX2 and do not fault there, which makes a zero border around
// the input needless. Elsewhere they are emulated, for the edges only.
#if defined(__AVX__)
constexpr bool kFreeMasks = true;
#else
constexpr bool kFreeMasks = false;
#endif

// 0, 1, 2, ...
inline IntVec counting() {
  IntVec v{};
  for (int i = 0; i < kLanes; ++i) v[i] = i;
  return v;
}

// Lanes whose value, moved by `shift`, lies in [0, end).
inline Mask within(IntVec values, int64_t shift, int64_t end) {
  const IntVec moved = values + static_cast<int32_t>(shift);
  const IntVec inside = (moved >= 0) & (moved < static_cast<int32_t>(end));
#if defined(__AVX512F__)
  return {_mm512_test_epi32_mask(reinterpret_cast<__m512i>(inside), reinterpret_cast<__m512i>(inside))};
#else
  return {inside};
#endif
}

inline Mask first_lanes(int64_t count) { return within(counting(), 0, count < kLanes ? count : kLanes); }

inline Mask operator&(Mask a, Mask b) { return {static_cast<decltype(a.lanes)>(a.lanes & b.lanes)}; }

inline bool is_full(Mask mask) {
#if defined(__AVX512F__)
  return mask.lanes == 0xffff;
#elif defined(__AVX__)
  return _mm256_movemask_ps(reinterpret_cast<__m256>(mask.lanes)) == 0xff;
#else
  bool full = true;
  for (int i = 0; i < kLanes; ++i) full = full && mask.lanes[i];
  return full;
#endif
}

// A difference, because adding +0 would turn -0 into +0, and so could not be left out by the compiler.
inline Vec broadcast(float value) { return value - Vec{}; }

inline Vec load(const float* p) { return *reinterpret_cast<const UnalignedVec*>(p); }

// The same value, but in a register, where the compiler would rather load it again for each use.
[[gnu::always_inline]] inline Vec in_register(Vec v) {
#if defined(__AVX512F__)
  asm("" : "+v"(v));
#elif defined(__x86_64__)
  asm("" : "+x"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
  return v;
}

inline void store(float* p, Vec v) { *reinterpret_cast<UnalignedVec*>(p) = v; }

// The lanes of `mask` from p, zero in the others, whose memory is not touched.
inline Vec load(const float* p, Mask mask) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec>(_mm512_maskz_loadu_ps(mask.lanes, p));
#elif defined(__AVX__)
  return reinterpret_cast<Vec>(_mm256_maskload_ps(p, reinterpret_cast<__m256i>(mask.lanes)));
#else
  Vec v{};
  for (int i = 0; i < kLanes; ++i)
    if (mask.lanes[i]) v[i] = p[i];
  return v;
#endif
}

inline void store(float* p, Vec v, Mask mask) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, mask.lanes, reinterpret_cast<__m512>(v));
#elif defined(__AVX__)
  // Where all lanes are stored, the plain instruction is ten times faster on some processors.
  if (is_full(mask)) return store(p, v);
  _mm256_maskstore_ps(p, reinterpret_cast<__m256i>(mask.lanes), reinterpret_cast<__m256>(v));
#else
  for (int i = 0; i < kLanes; ++i)
    if (mask.lanes[i]) p[i] = v[i];
#endif
}

// p[0], p[2], p[4], ...; the masks stand for the floats from p and from p + kLanes on.
inline Vec load_even(const float* p, Mask near, Mask far) {
  const Vec first = load(p, near), second = load(p + kLanes, far);
#if defined(__AVX512F__)
  const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  return reinterpret_cast<Vec>(
      _mm512_permutex2var_ps(reinterpret_cast<__m512>(first), even, reinterpret_cast<__m512>(second)));
#elif defined(__AVX2__)
  // 0 2 8 10 4 6 12 14 of both, then pairs 0 2 1 3 of these.
  const __m256 even = _mm256_shuffle_ps(reinterpret_cast<__m256>(first), reinterpret_cast<__m256>(second), 0x88);
  return reinterpret_cast<Vec>(_mm256_permute4x64_pd(_mm256_castps_pd(even), 0xd8));
#else
  Vec v{};
  for (int i = 0; i < kLanes; ++i) v[i] = 2 * i < kLanes ? first[2 * i] : second[2 * i - kLanes];
  return v;
#endif
}

// body(0) ... body(N - 1) with constant arguments: sums that are indexed by constants from the start are kept in
// registers, while those of an ordinary loop, unrolled late, were stored in every round (3x slower).
template <int N, typename Body>
[[gnu::always_inline]] inline void unrolled(Body body) {
  [&]<int... I>(std::integer_sequence<int, I...>) [[gnu::always_inline]] {
    (body(std::integral_constant<int, I>{}), ...);
  }(std::make_integer_sequence<int, N>{});
}

}  // namespace lhc

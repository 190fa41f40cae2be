// Vectors of floats from the compiler's own extensions, so that one text serves AVX-512, AVX2 and NEON.
#pragma once

#include <cstdint>
#include <utility>

#if defined(__AVX512F__)
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

// Bit i stands for lane i.
using Mask = uint16_t;
constexpr Mask kAllLanes = static_cast<Mask>((1u << kLanes) - 1);

// Loads that skip masked lanes cost nothing on AVX-512 and do not fault there, which makes a zero border
// around the input needless. Elsewhere they are emulated, for the edges only.
#if defined(__AVX512F__)
constexpr bool kFreeMasks = true;
#else
constexpr bool kFreeMasks = false;
#endif

inline Mask first_lanes(int64_t count) {
  return count >= kLanes ? kAllLanes : static_cast<Mask>((1u << count) - 1);
}

// A difference, because adding +0 would turn -0 into +0, and so could not be left out by the compiler.
inline Vec broadcast(float value) { return value - Vec{}; }

inline Vec load(const float* p) { return *reinterpret_cast<const UnalignedVec*>(p); }

inline void store(float* p, Vec v) { *reinterpret_cast<UnalignedVec*>(p) = v; }

// The lanes of `mask` from p, zero in the others, whose memory is not touched.
inline Vec load(const float* p, Mask mask) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec>(_mm512_maskz_loadu_ps(mask, p));
#else
  Vec v{};
  for (int i = 0; i < kLanes; ++i)
    if (mask >> i & 1) v[i] = p[i];
  return v;
#endif
}

// p[0], p[2], p[4], ...; bit i of the masks stands for the float at p + i and at p + kLanes + i.
inline Vec load_even(const float* p, Mask near, Mask far) {
#if defined(__AVX512F__)
  const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  const __m512 first = _mm512_maskz_loadu_ps(near, p), second = _mm512_maskz_loadu_ps(far, p + kLanes);
  return reinterpret_cast<Vec>(_mm512_permutex2var_ps(first, even, second));
#else
  Vec v{};
  for (int i = 0; i < kLanes; ++i)
    if ((i < kLanes / 2 ? near >> 2 * i : far >> (2 * i - kLanes)) & 1) v[i] = p[2 * i];
  return v;
#endif
}

inline void store(float* p, Vec v, Mask mask) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, mask, reinterpret_cast<__m512>(v));
#else
  for (int i = 0; i < kLanes; ++i)
    if (mask >> i & 1) p[i] = v[i];
#endif
}

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
  return _mm512_test_epi32_mask(reinterpret_cast<__m512i>(inside), reinterpret_cast<__m512i>(inside));
#else
  Mask mask = 0;
  for (int i = 0; i < kLanes; ++i) mask |= static_cast<Mask>(inside[i] != 0) << i;
  return mask;
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

#include "cells_of.h"

#if defined(__AVX512BF16__) && defined(__AVX512VL__)
namespace lhc {
namespace {

// A unit is a pair of channels in bfloat16: four bytes as well, of a pixel and of each filter's weight.
struct PairMath {
  static constexpr bool kFinishes = false, kFours = false;  // rounding to bfloat16 takes registers from the sums

  template <int L>
  [[gnu::always_inline]] static Vec<L> factor(const char* x) {
    return reinterpret_cast<Vec<L>>(typename Vectors<L>::Ints{} + *reinterpret_cast<const UnalignedInt*>(x));
  }
  template <int L>
  [[gnu::always_inline]] static Vec<L> add(Vec<L> sum, Vec<L> weight, Vec<L> factor) {
    if constexpr (L == 16)
      return reinterpret_cast<Vec<L>>(_mm512_dpbf16_ps(
          reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(weight), reinterpret_cast<__m512bh>(factor)));
    else if constexpr (L == 8)
      return reinterpret_cast<Vec<L>>(_mm256_dpbf16_ps(
          reinterpret_cast<__m256>(sum), reinterpret_cast<__m256bh>(weight), reinterpret_cast<__m256bh>(factor)));
    else
      return reinterpret_cast<Vec<L>>(_mm_dpbf16_ps(reinterpret_cast<__m128>(sum), reinterpret_cast<__m128bh>(weight),
                                                    reinterpret_cast<__m128bh>(factor)));
  }
  // By name: compilers would give a register to each factor, and then there are too few for the sums.
  template <int L>
  [[gnu::always_inline]] static Vec<L> add(Vec<L> sum, Vec<L> weight, const char* x) {
    const auto& pair = *reinterpret_cast<const UnalignedInt*>(x);
    if constexpr (L == 16)
      asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(weight), "m"(pair));
    else if constexpr (L == 8)
      asm("vdpbf16ps %2%{1to8%}, %1, %0" : "+v"(sum) : "v"(weight), "m"(pair));
    else
      asm("vdpbf16ps %2%{1to4%}, %1, %0" : "+v"(sum) : "v"(weight), "m"(pair));
    return sum;
  }

  template <int L>
  [[gnu::always_inline]] static Vec<L> total(Vec<L> sum) {
    return sum;
  }
};

}  // namespace

Kernel find_pairs_kernel(int lanes, int vectors, int pixels) { return find<PairMath>(lanes, vectors, pixels); }

}  // namespace lhc
#else
namespace lhc {

Kernel find_pairs_kernel(int, int, int) { return {}; }

}  // namespace lhc
#endif

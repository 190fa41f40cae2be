#include "cells_of.h"

#if (defined(__AVX512VNNI__) && defined(__AVX512VL__)) || defined(__AVXVNNI__)
namespace lhc {
namespace {

// A unit is four channels in int8, and sums are int32, in the registers of floats. The instruction wants one side
// unsigned: it is given x + 128, which is x with its sign bit flipped, and the sums begin with -128 times those of the
// weights. Sums may wrap on the way; what they come to fits (see Call.bind for how many products may be summed).
struct FoursMath {
  static constexpr bool kFinishes = true, kFours = true;

#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
  // By name: compilers would flip the bits in an integer register and bring it over, which takes twice as long.
  template <int L>
  [[gnu::always_inline]] static Vec<L> factor(const char* x) {
    const UnalignedInt& four = *reinterpret_cast<const UnalignedInt*>(x);
    Vec<L> flipped;
    if constexpr (L == 16)
      asm("vpxord %2%{1to16%}, %1, %0" : "=v"(flipped) : "v"(signs<L>()), "m"(four));
    else if constexpr (L == 8)
      asm("vpxord %2%{1to8%}, %1, %0" : "=v"(flipped) : "v"(signs<L>()), "m"(four));
    else
      asm("vpxord %2%{1to4%}, %1, %0" : "=v"(flipped) : "v"(signs<L>()), "m"(four));
    return flipped;
  }
  template <int L>
  [[gnu::always_inline]] static Vec<L> add(Vec<L> sum, Vec<L> weight, Vec<L> factor) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(factor), "v"(weight));
    return sum;
  }
#else
  template <int L>
  [[gnu::always_inline]] static Vec<L> factor(const char* x) {
    const UnalignedInt& four = *reinterpret_cast<const UnalignedInt*>(x);
    typename Vectors<L>::Ints spread;
    asm("vpbroadcastd %1, %0" : "=x"(spread) : "m"(four));
    return reinterpret_cast<Vec<L> >(spread ^ signs<L>());
  }
  template <int L>
  [[gnu::always_inline]] static Vec<L> add(Vec<L> sum, Vec<L> weight, Vec<L> factor) {
    asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(factor), "x"(weight));
    return sum;
  }
#endif
  template <int L>
  [[gnu::always_inline]] static Vec<L> add(Vec<L> sum, Vec<L> weight, const char* x) {
    return add<L>(sum, weight, factor<L>(x));
  }
  template <int L>
  [[gnu::always_inline]] static typename Vectors<L>::Ints signs() {
    return typename Vectors<L>::Ints{} + static_cast<int32_t>(0x80808080);
  }
  template <int L>
  [[gnu::always_inline]] static Vec<L> total(Vec<L> sum) {
    return __builtin_convertvector(reinterpret_cast<typename Vectors<L>::Ints>(sum), Vec<L>);
  }
  template <int L>
  [[gnu::always_inline]] static Vec<L> finished(Vec<L> sum, const float* scale, const float* bias) {
    return total<L>(sum) * load<L>(scale) + load<L>(bias);
  }
  template <int L>
  [[gnu::always_inline]] static void write(const Cell& cell, int64_t at, Vec<L> value) {
    if (cell.bytes)
      store<L>(cell.bytes + at, value * cell.out_factor);
    else
      store<L>(cell.y + at, value);
  }
};

}  // namespace

Kernel find_fours_kernel(int lanes, int vectors, int pixels) { return find<FoursMath>(lanes, vectors, pixels); }

}  // namespace lhc
#else
namespace lhc {

Kernel find_fours_kernel(int, int, int) { return {}; }

}  // namespace lhc
#endif

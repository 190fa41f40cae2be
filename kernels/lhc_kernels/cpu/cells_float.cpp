#include "cells_of.h"

namespace lhc {
namespace {

// A unit is one channel in float32.
struct FloatMath {
  static constexpr bool kFinishes = true;

  template <int L>
  [[gnu::always_inline]] static Vec<L> factor(const char* x) {
    return broadcast<L>(*reinterpret_cast<const UnalignedFloat*>(x));
  }
  template <int L>
  [[gnu::always_inline]] static Vec<L> add(Vec<L> sum, Vec<L> weight, Vec<L> factor) {
    return sum + weight * factor;
  }
  template <int L>
  [[gnu::always_inline]] static Vec<L> add(Vec<L> sum, Vec<L> weight, const char* x) {
    return add<L>(sum, weight, factor<L>(x));
  }
};

}  // namespace

Kernel find_float_kernel(int lanes, int vectors, int pixels) { return find<FloatMath>(lanes, vectors, pixels); }

}  // namespace lhc

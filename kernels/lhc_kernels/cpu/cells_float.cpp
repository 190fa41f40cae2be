#include "cells_of.h"

namespace lhc {
namespace {

// A unit is one channel in float32.
struct FloatMath {
  static constexpr bool kFinishes = true, kFours = false;

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

  template <int L>
  [[gnu::always_inline]] static Vec<L> total(Vec<L> sum) {
    return sum;
  }
  // The sums began with the bias.
  template <int L>
  [[gnu::always_inline]] static Vec<L> finished(Vec<L> sum, const float*, const float*) {
    return sum;
  }
  template <int L>
  [[gnu::always_inline]] static void write(const Cell& cell, int64_t at, Vec<L> value) {
    store<L>(cell.y + at, value);
  }
};

}  // namespace

Kernel find_float_kernel(int lanes, int vectors, int pixels) { return find<FloatMath>(lanes, vectors, pixels); }

}  // namespace lhc

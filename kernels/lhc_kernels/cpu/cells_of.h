// An indirect convolution (M. Dukhan, arXiv 1907.02129) over live entries only: filters are the lanes of vectors,
// pixels are pointers. One unit of a step costs a vector of weights, and for each pixel a broadcast and a product; all
// sums stay in registers over a tile's steps. What a unit is, and how it is multiplied, is up to `Math`.
#pragma once

#include <array>
#include <type_traits>

#include "cells.h"

namespace lhc {
namespace {

// Units in a line of the caches.
constexpr int kLine = 16;

typedef float UnalignedFloat __attribute__((aligned(1), may_alias));
typedef int32_t UnalignedInt __attribute__((aligned(1), may_alias));

// Adds `kUnits` units of kCount pixels, from kFirst on.
template <class Math, int L, int V, int kFirst, int kCount, int kUnits, int kSums>
[[gnu::always_inline]] inline void add_units(const uintptr_t* pixels, uintptr_t shift, const char* weight,
                                             int64_t row_step, Vec<L> (&sums)[kSums]) {
  Vec<L> weights[kUnits * V];
  unrolled<kUnits * V>([&](auto i) LHC_INLINE {
    weights[i] = load<L>(reinterpret_cast<const float*>(weight + i / V * row_step + i % V * (4 * L)));
  });
  unrolled<kCount>([&](auto i) LHC_INLINE {
    constexpr int p = kFirst + i;
    const char* x = reinterpret_cast<const char*>(pixels[p] + shift);
    unrolled<kUnits>([&](auto u) LHC_INLINE {
      if constexpr (V == 1) {
        sums[p] = Math::template add<L>(sums[p], weights[u], x + 4 * u);
      } else {
        const Vec<L> factor = Math::template factor<L>(x + 4 * u);
        unrolled<V>([&](auto v) LHC_INLINE {
          sums[p * V + v] = Math::template add<L>(sums[p * V + v], weights[u * V + v], factor);
        });
      }
    });
  });
}

// Pixels that take turns at one line of their channels. 512 channels lie 2 KiB apart: of 28 pixels' lines, 14 would
// fall into the same 8 places of a first-level cache, and be fetched four times instead of once.
constexpr int group_of(int pixels) {
  for (int group = 8; group > 4; --group)
    if (pixels % group == 0) return group;
  return pixels;
}

template <class Math, int L, int V, int P>
[[gnu::always_inline]] inline void add_step(const Cell& cell, const Step& step, Vec<L> (&sums)[P * V]) {
  // Units at once: one pixel's address serves them all. Their weights take the registers that the sums leave.
  constexpr int kUnits = kRegisters == 32 && V == 1 ? (L == kLanes && !Math::kFours ? 4 : 2) : 1;
  constexpr int kGroup = group_of(P);
  const char* weight = step.weight + cell.column_shift;
  uintptr_t shift = step.shift + cell.shift;
  int64_t units = step.units;
  if constexpr (kGroup < P)
    for (; units >= kLine; units -= kLine) {
      unrolled<P / kGroup>([&](auto g) LHC_INLINE {
        for (int u = 0; u < kLine; u += kUnits)
          add_units<Math, L, V, g * kGroup, kGroup, kUnits>(cell.x, shift + 4 * static_cast<unsigned>(u),
                                                            weight + u * cell.row_step, cell.row_step, sums);
      });
      shift += 4 * kLine, weight += kLine * cell.row_step;
    }
  for (; units >= kUnits; units -= kUnits) {
    add_units<Math, L, V, 0, P, kUnits>(cell.x, shift, weight, cell.row_step, sums);
    shift += 4 * kUnits, weight += kUnits * cell.row_step;
  }
  if constexpr (kUnits > 1)
    for (; units > 0; --units) {
      add_units<Math, L, V, 0, P, 1>(cell.x, shift, weight, cell.row_step, sums);
      shift += 4, weight += cell.row_step;
    }
}

template <class Math, int L, int V, int P>
[[gnu::always_inline]] inline void finish(const Cell& cell, const Vec<L> (&sums)[P * V]) {
  const Vec<L> floor = broadcast<L>(cell.floor);
  const auto write = [&](auto with_residual) LHC_INLINE {
    unrolled<P * V>([&](auto i) LHC_INLINE {
      constexpr int p = i / V, v = i % V;
      Vec<L> value = Math::template finished<L>(sums[i], cell.scale + v * L, cell.bias + v * L);
      if constexpr (with_residual) value += load<L>(cell.residual + cell.residual_at[p] + cell.filters[v]);
      Math::template write<L>(cell, cell.out[p] + cell.filters[v], at_least<L>(value, floor));
    });
  };
  if (cell.residual)
    write(std::true_type{});
  else
    write(std::false_type{});
}

[[gnu::always_inline]] inline bool is_inside(const Cell& cell, const Step& step) {
  return step.row >= cell.rows[0] && step.row < cell.rows[1] && step.column >= cell.columns[0] &&
         step.column < cell.columns[1];
}

// What sums of fours begin with, in int32: see conv.h.
template <int L, int V>
[[gnu::always_inline]] inline void begin(const Cell& cell, Vec<L> (&start)[V]) {
  using Bits = typename Vectors<L>::Bits;  // what lanes without a filter read may add up to anything
  Bits sums[V] = {};
  for (const Step* step = cell.steps; step != cell.end; ++step) {
    if (!is_inside(cell, *step)) continue;
    const char* row = step->weight + cell.column_shift + cell.sums_shift;
    unrolled<V>([&](auto v) LHC_INLINE {
      sums[v] += reinterpret_cast<Bits>(load<L>(reinterpret_cast<const int32_t*>(row) + v * L));
    });
  }
  unrolled<V>([&](auto v) LHC_INLINE { start[v] = reinterpret_cast<Vec<L>>(sums[v]); });
}

template <class Math, int L, int V, int P>
void run(const Cell& cell) {
  Vec<L> sums[P * V];
  if constexpr (Math::kFours) {
    Vec<L> start[V];
    begin<L, V>(cell, start);
    unrolled<P * V>([&](auto i) LHC_INLINE { sums[i] = start[i % V]; });
  } else {
    unrolled<P * V>([&](auto i) LHC_INLINE { sums[i] = load<L>(cell.bias + i % V * L); });
  }
  for (const Step* step = cell.steps; step != cell.end; ++step) {
    if (is_inside(cell, *step)) add_step<Math, L, V, P>(cell, *step, sums);
  }
  // A copy, since what refers to the sums themselves from here on could keep them out of registers above.
  Vec<L> totals[P * V];
  unrolled<P * V>([&](auto i) LHC_INLINE { totals[i] = sums[i]; });
  if constexpr (Math::kFinishes)
    if (!cell.sums) return finish<Math, L, V, P>(cell, totals);
  unrolled<P * V>([&](auto i) LHC_INLINE { store<L>(cell.sums + i * L, Math::template total<L>(totals[i])); });
}

// How many pixels there are kernels for: multiples of these. Fewer than four sums at a time would take as long, for
// each product waits for the one before.
template <int L, int V>
constexpr int rounded(int pixels) {
  constexpr int kStep = max_pixels(V) / (L < kLanes ? 2 : kRegisters == 32 ? 7 : 3);
  // An image of 7x7 pixels has 5x5 that see the whole kernel, and 5 at each border.
  if (L == kLanes && V == 1 && (pixels == 5 || pixels == 25)) return pixels;
  return (pixels + kStep - 1) / kStep * kStep;
}

template <class Math, int L, int V>
Kernel find(int pixels) {
  constexpr int kMax = max_pixels(V);
  static constexpr auto kKernels = []<int... I>(std::integer_sequence<int, I...>) {
    return std::array<Kernel, kMax>{Kernel{&run<Math, L, V, rounded<L, V>(I + 1)>, rounded<L, V>(I + 1)}...};
  }(std::make_integer_sequence<int, kMax>{});
  return kKernels[static_cast<size_t>(pixels - 1)];
}

template <class Math>
Kernel find(int lanes, int vectors, int pixels) {
  if (lanes == kLanes) {
    if constexpr (kMaxVectors == 4)
      if (vectors == 4) return find<Math, kLanes, 4>(pixels);
    return vectors == 2 ? find<Math, kLanes, 2>(pixels) : find<Math, kLanes, 1>(pixels);
  }
  if constexpr (kLanes == 16)
    if (lanes == 8) return find<Math, 8, 1>(pixels);
  return find<Math, 4, 1>(pixels);
}

}  // namespace
}  // namespace lhc

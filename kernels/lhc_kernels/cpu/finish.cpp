#include "finish.h"

#include <bit>
#include <cstring>

#include "vectors.h"

namespace lhc {
namespace {

// exp(x), infinite above 88.72, to about one unit in the last place: 2^n times a polynomial (that of Cephes' expf).
template <int L>
Vec<L> exponential(Vec<L> x) {
  using Ints = typename Vectors<L>::Ints;
  const Vec<L> one = broadcast<L>(1.0f), least = broadcast<L>(-104.0f), most = broadcast<L>(89.0f);
  const Vec<L> bounded = x < least ? least : x > most ? most : x;
  const Vec<L> scaled = bounded * 1.44269504f;
  const Ints n = __builtin_convertvector(scaled + (scaled < 0 ? -0.5f * one : 0.5f * one), Ints);
  const Vec<L> whole = __builtin_convertvector(n, Vec<L>);
  const Vec<L> r = bounded - whole * 0.693359375f - whole * -2.12194440e-4f;
  Vec<L> sum = broadcast<L>(1.9875691500e-4f);
  for (const float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    sum = sum * r + c;
  sum = sum * r * r + r + one;
  // In two factors, since 2^n itself may be too large or too small for a float.
  const Ints half = n >> 1;
  const auto power = [](Ints k) { return reinterpret_cast<Vec<L>>((k + 127) << 23); };
  const Vec<L> result = sum * power(half) * power(n - half);
  return x != x ? x : result;
}

// As torch computes it: NaN for -infinity.
template <int L>
Vec<L> silu(Vec<L> x) {
  return x / (1.0f + exponential<L>(-x));
}

// A panel's columns that are no whole vector of adjacent filters.
template <int L, typename Value>
Vec<L> gather(const Value* p, const int32_t* filters) {
  Vec<L> v{};
  for (int i = 0; i < L; ++i)
    if (filters[i] >= 0) {
      if constexpr (sizeof(Value) == 4)
        v[i] = p[filters[i]];
      else
        v[i] = std::bit_cast<float>(static_cast<uint32_t>(p[filters[i]]) << 16);
    }
  return v;
}

template <int L, typename Value>
void scatter(Value* p, const int32_t* filters, bool in_fours, Vec<L> v) {
  Value values[L];
  store<L>(values, v);
  if (in_fours) {
    for (int i = 0; i < L; i += 4)
      if (filters[i] >= 0) std::memcpy(p + filters[i], values + i, 4 * sizeof(Value));
    return;
  }
  for (int i = 0; i < L; ++i)
    if (filters[i] >= 0) p[filters[i]] = values[i];
}

template <int L, typename Value, typename Result = Value>
void run(const Conv& conv, const Layer& layer, const Columns& columns, int64_t tile, int64_t index, const Block& block,
         const Sums& sums) {
  const Panel& panel = layer.panels[static_cast<size_t>(index)];
  const Layer::Filled& filled =
      layer.filled[static_cast<size_t>(tile) * layer.panels.size() + static_cast<size_t>(index)];
  const auto place = static_cast<size_t>(tile * layer.padded_width + panel.place);
  const int64_t width = panel.lanes * filled.vectors;
  const auto* residual = static_cast<const Value*>(conv.residual);
  auto* y = static_cast<Result*>(conv.y);
  const int pixels = conv.pooled ? 4 : 1;
  for (int i = sums.first; i < sums.first + sums.count; ++i)
    for (int64_t column = 0; column < filled.columns; column += L) {
      const int32_t* filters = layer.filters.data() + place + column;
      Vec<L> result;
      for (int a = 0; a < pixels; ++a) {
        Vec<L> v = load<L>(sums.values + (a * sums.pixels + i - sums.first) * width + column);
        if (conv.scale) v = v * load<L>(columns.scale + place + column) + load<L>(columns.bias + place + column);
        if (residual) {
          const Value* from = residual + block.residual[i] + (a / 2 * conv.out_width + a % 2) * conv.out_channels;
          v += filled.adjacent ? load<L>(from + *filters) : gather<L>(from, filters);
        }
        if (conv.activation == Activation::kRelu) v = at_least<L>(v, Vec<L>{});
        if (conv.activation == Activation::kSilu) v = silu<L>(v);
        result = a == 0 ? v : larger<L>(v, result);
      }
      if constexpr (sizeof(Result) == 1) result = result * conv.out_factor;
      if (filled.adjacent)
        store<L>(y + block.out[i] + *filters, result);
      else
        scatter<L>(y + block.out[i], filters, filled.in_fours, result);
    }
}

template <int L>
void run(const Conv& conv, const Layer& layer, const Columns& columns, int64_t tile, int64_t index, const Block& block,
         const Sums& sums) {
  if (conv.unit == 2)
    run<L, uint16_t>(conv, layer, columns, tile, index, block, sums);
  else if (conv.out_factor != 0)
    run<L, float, int8_t>(conv, layer, columns, tile, index, block, sums);
  else
    run<L, float>(conv, layer, columns, tile, index, block, sums);
}

}  // namespace

void finish(const Conv& conv, const Layer& layer, const Columns& columns, int64_t tile, int64_t index,
            const Block& block, const Sums& sums) {
  const int lanes = layer.panels[static_cast<size_t>(index)].lanes;
  if (lanes == kLanes) return run<kLanes>(conv, layer, columns, tile, index, block, sums);
  if constexpr (kLanes == 16)
    if (lanes == 8) return run<8>(conv, layer, columns, tile, index, block, sums);
  run<4>(conv, layer, columns, tile, index, block, sums);
}

}  // namespace lhc

// What follows the sums where it is more than a bias, a residual and ReLU over adjacent filters.
#pragma once

#include "layer.h"
#include "regions.h"

namespace lhc {

// Pixels (or windows) [first, first + count) of a block, one panel of a tile.
struct Sums {
  const float* values;  // [1 or 4 pixels of a window, pixels, vectors * lanes], bias included unless there is a scale
  int pixels;           // at least count
  int first, count;
};

// Writes y for these sums.
void finish(const Conv& conv, const Layer& layer, const Columns& columns, int64_t tile, int64_t panel,
            const Block& block, const Sums& sums);

}  // namespace lhc

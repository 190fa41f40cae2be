// What a layer's tables and its sizes ask for, worked out once and read by many calls at once.
#pragma once

#include <vector>

#include "conv.h"
#include "layer.h"
#include "regions.h"

namespace lhc {

struct Prepared {
  explicit Prepared(const Conv& conv);
  size_t bytes() const;

  Layer layer;
  Regions regions;
  std::vector<int64_t> chunks;  // first tile of each chunk of tiles, and the end
};

}  // namespace lhc

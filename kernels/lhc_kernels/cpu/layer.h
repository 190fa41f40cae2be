// A layer's tables, decoded into what the inner loops read.
#pragma once

#include <cstdint>
#include <vector>

#include "conv.h"

namespace lhc {

// Adjacent input channels of one tap: one entry, or several whose blocks follow each other.
struct Step {
  const char* weight;   // of the first of these channels, for the tile's column 0
  uintptr_t shift;      // from a block's pixel address to the first channel; modulo the address space
  int32_t row, column;  // of the kernel
  int64_t units;        // channels, pairs of them, or fours
};

// Columns of a tile that one call of a kernel computes: `vectors` vectors of `lanes` filters.
struct Panel {
  int lanes, vectors;
  int64_t column;  // in the packed weight
  int64_t place;   // in the padded vectors below
};

class Layer {
 public:
  explicit Layer(const Conv& conv);

  std::vector<Step> steps;
  std::vector<int64_t> first_step;  // of each tile, and the end
  std::vector<int64_t> cost;        // of all tiles before each tile, and of all: units of steps, and the epilogue
  std::vector<Panel> panels;
  // For each tile, padded to whole vectors: -1 where a column has no filter.
  int64_t padded_width;
  std::vector<int32_t> filters;
  bool in_order;  // whether the filters are 0, 1, 2, ... without a gap
  // For each tile and panel: columns up to the last filter; vectors that hold them; whether each vector's filters are
  // adjacent, and whether those of each four columns are, or there are none.
  struct Filled {
    int64_t columns;
    int vectors;
    bool adjacent, in_fours;
  };
  std::vector<Filled> filled;
  int64_t row_step;  // bytes from one unit of the weight to the next

  // Whether some weights were copied: the layer then holds what they were.
  bool copies_weights() const { return !last_entries_.empty(); }
  size_t bytes() const;

 private:
  void read_entries(const Conv& conv);
  void read_filters(const Conv& conv);

  std::vector<char> last_entries_;  // of the weight, and room behind them
};

// A call's bias and scale in the order of a layer's columns, [tiles, padded width]: what the caller has, where that is
// the order of the filters, else a copy; zero and one where a column has no filter.
class Columns {
 public:
  Columns(const Conv& conv, const Layer& layer);

  const float *bias, *scale;  // scale is null where there is none

 private:
  std::vector<float> bias_, scale_;
};

}  // namespace lhc

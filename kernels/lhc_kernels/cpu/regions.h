// The output's pixels, in rectangles that see the same part of the kernel.
//
// At the image's border some taps fall outside. Output rows are cut into spans within which the same kernel rows
// meet the image, columns likewise; in a rectangle of two spans a tap then exists for all pixels or for none, and
// is skipped in the second case. So no pixel is ever looked at for the border's sake: nothing is padded, and what
// lies outside the image contributes nothing, not even 0 times infinity. For small images that is also less work,
// 4 of 9 taps where 2x2 pixels meet a 3x3 kernel.
#pragma once

#include <cstdint>
#include <vector>

#include "cells.h"
#include "conv.h"

namespace lhc {

// Pixels that are handled together; a multiple of the most that each kernel of cells.h takes.
constexpr int kBlock = 2 * max_pixels(1);

// Output rows (or columns) first, first + 1, ...; pooled, pairs of them. Of pixel `a` of a pair, or a = 0, the
// taps of begin[a] to end[a] - 1 lie in the image.
struct Span {
  int64_t first, count;
  int64_t begin[2], end[2];
};

// A run of pixels of one rectangle, or, pooled, of windows, each told by its upper left pixel.
struct Block {
  int count;
  const Span *rows, *columns;
  // Of each pixel; the last one is repeated, for a kernel may take more than there are.
  uintptr_t x[kBlock + max_pixels(1)];  // address that tap (0, 0) would read, were there no border
  int64_t out[kBlock + max_pixels(1)];  // place in y of filter 0, in values
  int64_t residual[kBlock + max_pixels(1)];
};

class Regions {
 public:
  explicit Regions(const Conv& conv);
  int64_t blocks() const { return first_block_.back(); }
  // Of a convolution with the sizes that these regions were made for.
  void place(const Conv& conv, int64_t block, Block& out) const;
  size_t bytes() const;

 private:
  int64_t pixels(const Conv& conv, size_t region) const;

  std::vector<Span> rows_, columns_;
  std::vector<int64_t> first_block_;  // of each region, row by row, and the end
};

}  // namespace lhc

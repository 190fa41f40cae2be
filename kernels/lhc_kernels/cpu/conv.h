// A grouped, structured-sparse convolution as plain pointers and sizes.
#pragma once

#include <cstdint>

#include "threads.h"

namespace lhc {

enum class Activation { kNone, kRelu, kSilu };

// Every count and index is trusted: the caller has checked them, and nobody else can change them meanwhile.
struct Conv {
  int64_t batch, channels, height, width;
  int64_t out_channels, out_height, out_width;  // before pooling
  int64_t kernel[2], stride[2], dilation[2];
  int64_t top, left;  // zero border; below and right it follows from the output size
  int64_t tiles, tile_width, in_block;
  // Channels of four bytes. 1: weight is [entries, in_block, tile_width], and x, residual and y are float32. 2, pairs:
  // weight is [entries, in_block / 2, tile_width, 2], channels and in_block are even, and all four are bfloat16. 4,
  // fours: x and weight are int8, residual and y float32, or y int8; weight is [entries, fours + 1, tile_width, 4],
  // with fours = in_block / 4 rounded up and zeros for the channels that there are not. The last row of an entry is
  // int32: -128 times the sums of its columns. Behind x there are three bytes that may be read if 4 does not divide
  // channels or in_block.
  int unit;
  const void* x;                              // [batch, height, width, channels], the last adjacent
  int64_t image_step, row_step, column_step;  // of x, in bytes
  const void* weight;
  const int32_t* tile_ptr;  // [tiles + 1]: first entry of each tile
  const int32_t* entries;   // tap * in_blocks + block
  const int32_t* filters;   // [tiles, tile_width]: filter of each column, -1 for none
  const float* bias;        // [out_channels] or null
  const float* scale;       // [out_channels] or null; never null for fours
  const void* residual;     // [batch, out_height, out_width, out_channels] or null
  Activation activation;
  bool pooled;  // the largest of each 2x2 window, NaN if one of them is
  void* y;      // like residual, or with halved sizes
  // Of fours: y is the int8 nearest to this times the result; 0 for a result in float32.
  float out_factor;

  int64_t value_bytes() const { return 4 / unit; }  // of x and weight
  int64_t y_bytes() const { return unit == 2 ? 2 : out_factor != 0 ? 1 : 4; }
  // Of the packed weight: rows of an entry's products.
  int64_t rows() const { return (in_block - 1) / unit + 1; }
  int64_t entry_bytes() const { return (rows() + (unit == 4)) * tile_width * 4; }
};

// A product of sizes for addresses, which count modulo 2^64: a tap that lies outside may lie anywhere.
inline uintptr_t times(int64_t a, int64_t b) { return static_cast<uintptr_t>(a) * static_cast<uintptr_t>(b); }

struct Prepared;

// y = pool(act(scale * sums + bias + residual)). `prepared` was made for a convolution with the same sizes, tables,
// weight address and steps of x.
void grouped_conv2d(const Conv& conv, const Prepared& prepared, const Threads& threads);

}  // namespace lhc

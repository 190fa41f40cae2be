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
  // Float32: weight is [entries, in_block, tile_width], and x, residual and y are float32. Pairs: weight is
  // [entries, in_block / 2, tile_width, 2], channels and in_block are even, and all four are bfloat16.
  bool pairs;
  const void* x;                              // [batch, height, width, channels], the last adjacent
  int64_t image_step, row_step, column_step;  // of x, in bytes
  const void* weight;
  const int32_t* tile_ptr;  // [tiles + 1]: first entry of each tile
  const int32_t* entries;   // tap * in_blocks + block
  const int32_t* filters;   // [tiles, tile_width]: filter of each column, -1 for none
  const float* bias;        // [out_channels] or null
  const float* scale;       // [out_channels] or null
  const void* residual;     // [batch, out_height, out_width, out_channels] or null
  Activation activation;
  bool pooled;  // the largest of each 2x2 window, NaN if one of them is
  void* y;      // like residual, or with halved sizes
};

// A product of sizes for addresses, which count modulo 2^64: a tap that lies outside may lie anywhere.
inline uintptr_t times(int64_t a, int64_t b) { return static_cast<uintptr_t>(a) * static_cast<uintptr_t>(b); }

struct Prepared;

// y = pool(act(scale * sums + bias + residual)). `prepared` was made for a convolution with the same sizes, tables,
// weight address and steps of x.
void grouped_conv2d(const Conv& conv, const Prepared& prepared, const Threads& threads);

}  // namespace lhc

// A grouped, structured-sparse convolution in float32, as plain pointers and sizes.
#pragma once

#include <cstdint>

#include "threads.h"

namespace lhc {

// All arrays are contiguous; every count and index is trusted, the caller has checked them.
struct Conv {
  int64_t batch, channels, height, width;
  int64_t out_channels, out_height, out_width;
  int64_t kernel[2], stride[2], dilation[2];
  int64_t top, left;                     // zero border; below and right it follows from the output size
  int64_t tiles, tile_width, in_block;
  const float* x;                        // [batch, channels, height, width]
  const float* weight;                   // [entries, in_block, tile_width]
  const int32_t* tile_ptr;               // [tiles + 1]: first entry of each tile
  const int32_t* entries;                // tap * in_blocks + block
  const int32_t* filters;                // [tiles, tile_width]: filter of each column, -1 for none
  const float* bias;                     // [out_channels] or null
  const float* scale;                    // [out_channels] or null
  const float* residual;                 // like y, or null
  bool relu;
  float* y;                              // [batch, out_channels, out_height, out_width]
};

void grouped_conv2d(const Conv& conv, const Threads& threads);

// Whether pooled_conv2d serves the convolution, and is faster than pooling its output afterwards.
bool pools_in_bands(const Conv& conv);

// grouped_conv2d and max_pool_2x2, one band of rows after the other; y is [batch, out_channels, out_height / 2,
// out_width / 2].
void pooled_conv2d(const Conv& conv, const Threads& threads);

}  // namespace lhc

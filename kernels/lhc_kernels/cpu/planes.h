// Where the kernel reads its pixels: the input itself, or planes with a zero border made from it.
#pragma once

#include <cstdint>
#include <vector>

#include "conv.h"
#include "vectors.h"

namespace lhc {

// One (tap, input block) as the kernel wants it.
struct Step {
  int64_t offset;     // from a pixel's place in the planes to the entry's first channel
  int32_t channels;   // fewer than in_block in a cropped last block
  int32_t tap;          // for the masks
};

// Pixels are lanes. A *group* is the part of the output that is computed from one filling of the planes:
// rows [row, row + rows) of images [image, image + images).
struct Group {
  int64_t image, images, row, rows;
};

// Planes are filled group by group, each small enough for the second-level caches (per thread; of 1, 2 and 4 MB,
// 1 MB was the best for many images and 2 MB for one).
constexpr int64_t kPlanesFloats = 3 << 17;
// Planes a multiple of this apart are crowded: a pixel's lines in all of them fall into the same 4 of 64 sets of a
// first-level cache, or fewer.
constexpr int64_t kCrowdedFloats = 256;
// Whether crowded planes are worth a copy: with vectors of 8 floats and 8 ways it made layers of 16x16 to 224x224 pixels
// 1.05 to 1.25 times as fast, on one core. Not measured with AVX-512, many of whose processors have more ways.
constexpr bool kSpreads = kLanes == 8;

// Planes are [copy][channel][plane], and a tap is an offset in them. Three variants:
//
// direct: the planes are the input itself, for stride 1 and outputs as wide as the input. Where a tap leaves
//   the image, its lanes are masked. Nothing is copied.
// spread: one copy of the same, between rows of zeros, whose planes are not crowded.
// copied: one copy for each kernel column and row phase (row modulo the vertical stride), in which exactly
//   the pixels that this column's taps read lie side by side, whatever the width, stride and dilation.
//
// Lanes go along *runs*, in which the pixels of a tap are contiguous: the pixels of one image; or, where images
// are so small that this would leave many lanes idle, of all images of a group, laid side by side in each row.
struct Planes {
  bool direct, keeps_layout, side_by_side;  // keeps_layout: direct or spread
  int64_t runs, run_pixels, run_step;   // run_step: floats from one run to the next
  int64_t channel_step;                 // floats from one channel to the next
  std::vector<Step> steps;              // for each possible entry
  // Of a copy:
  int64_t copies, phases, rows;         // of one plane, for one image
  int64_t row_step, image_step;         // floats from one row, or image, to the next
};

// Whether the direct variant serves, or the spread one.
bool keeps_layout(const Conv& conv);
bool reads_directly(const Conv& conv);
Planes plan_planes(const Conv& conv, const Group& group);
// Floats that the copy of a group takes.
int64_t planes_size(const Conv& conv, const Group& group);
// Write one channel of a group's planes.
void fill_channel(const Conv& conv, const Planes& planes, const Group& group, int64_t channel, float* data);

}  // namespace lhc

// The inner loops: a few pixels by the filters of one panel, summed in registers over the steps of a tile.
#pragma once

#include <cstdint>

#include "layer.h"
#include "vectors.h"

namespace lhc {

// Vectors of filters side by side, at most. With registers enough, sums take 28 of 32; with 16, 12 beside two weights
// and a factor.
constexpr int kMaxVectors = kLanes == 4 && kRegisters == 32 ? 4 : 2;
constexpr int max_pixels(int vectors) { return (kRegisters == 32 ? 28 : 12) / vectors; }

// One call of a kernel. Sums in float32 of adjacent filters can go to y at once; else they go to `sums`, and `finish`
// of finish.h does the rest.
struct Cell {
  const Step *steps, *end;
  int64_t rows[2], columns[2];       // taps that exist for these pixels, begin and end
  const uintptr_t* x;                // addresses of the pixels, before a step's shift
  uintptr_t shift;                   // common to all steps
  int64_t column_shift, row_step;    // of the weight, in bytes
  const float* bias;                 // what the sums begin with; of fours it is added to scaled sums
  const float* scale;                // of fours
  int64_t sums_shift;                // of fours: from a step's weight to what its sums begin with
  float* sums;                       // [pixels, vectors * lanes], or null:
  const int64_t *out, *residual_at;  // of each pixel, in values
  int64_t filters[4];                // first filter of each vector
  const float* residual;             // or null
  float* y;
  float floor;       // of y: 0 for ReLU, -infinity for none
  int8_t* bytes;     // y in int8, or null
  float out_factor;  // of y in int8
};

// A kernel, and the pixels that it takes.
struct Kernel {
  void (*run)(const Cell&);
  int pixels;
};

// The kernel for so many pixels, or the next that there is; for pairs only where kHasPairs, for fours where kHasFours.
Kernel find_float_kernel(int lanes, int vectors, int pixels);
Kernel find_pairs_kernel(int lanes, int vectors, int pixels);
Kernel find_fours_kernel(int lanes, int vectors, int pixels);
inline Kernel find_kernel(int unit, int lanes, int vectors, int pixels) {
  if (unit == 4) return find_fours_kernel(lanes, vectors, pixels);
  return unit == 2 ? find_pairs_kernel(lanes, vectors, pixels) : find_float_kernel(lanes, vectors, pixels);
}

}  // namespace lhc

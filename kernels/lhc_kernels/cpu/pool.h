// 2x2 max pooling of planes.
#pragma once

#include <cstdint>

#include "threads.h"

namespace lhc {

// y[p][i][j] is the largest of a 2x2 window of x[p], NaN if one of them is; an odd last row or column is dropped.
// x is [planes, height, width], contiguous; y is [planes, height / 2, width / 2], its planes `step` floats apart.
void max_pool_2x2(const float* x, int64_t planes, int64_t height, int64_t width, float* y, int64_t step,
                  const Threads& threads);

}  // namespace lhc

// Floats to int8.
#pragma once

#include <cstdint>

#include "threads.h"

namespace lhc {

// The int8 nearest to each value times a factor, from -127 to 127, ties to even; NaN counts as 0.
void quantise(const float* x, int8_t* y, int64_t count, float factor, const Threads& threads);

}  // namespace lhc

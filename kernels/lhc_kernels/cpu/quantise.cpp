#include "quantise.h"

#include <algorithm>

#include "vectors.h"

namespace lhc {
namespace {

constexpr int64_t kChunk = 1 << 14;  // values: what a thread takes at a time

}  // namespace

void quantise(const float* x, int8_t* y, int64_t count, float factor, const Threads& threads) {
  for_each(threads, (count + kChunk - 1) / kChunk, [&](int64_t chunk) {
    int64_t i = chunk * kChunk;
    const int64_t end = std::min(count, i + kChunk);
    for (; i + kLanes <= end; i += kLanes) store<kLanes>(y + i, load<kLanes>(x + i) * factor);
    for (; i < end; ++i) {
      int8_t last[4];
      store<4>(last, broadcast<4>(x[i]) * factor);
      y[i] = last[0];
    }
  });
}

}  // namespace lhc

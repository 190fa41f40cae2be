// Random calls of the native kernel against a plain loop in double, for a build with sanitizers: no torch, no Python,
// every array in memory of exactly its size. Arguments: seed and number of calls. Built and run by `make sanitize`.

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

#include "prepared.h"
#include "vectors.h"

namespace {

std::mt19937 random_bits;

int64_t draw(int64_t least, int64_t most) { return std::uniform_int_distribution<int64_t>(least, most)(random_bits); }
double chance() { return std::uniform_real_distribution<>(0.0, 1.0)(random_bits); }

// Floats, or beside them the bfloat16 nearest to zero (of two bytes) or the int8 that 32 times as much is.
struct Values {
  explicit Values(size_t count, int64_t size = 4)
      : floats(count), bits(size == 2 ? count : 0), bytes(size == 1 ? count : 0) {
    for (size_t i = 0; i < count; ++i) set(i, std::normal_distribution<float>()(random_bits));
  }
  void set(size_t i, float value) {
    if (!bits.empty()) {
      bits[i] = static_cast<uint16_t>(std::bit_cast<uint32_t>(value) >> 16);
      value = std::bit_cast<float>(static_cast<uint32_t>(bits[i]) << 16);
    }
    if (!bytes.empty()) bytes[i] = static_cast<int8_t>(value = std::clamp(std::round(value * 32), -128.0f, 127.0f));
    floats[i] = value;
  }
  void* data() {
    if (!bytes.empty()) return bytes.data();
    return bits.empty() ? static_cast<void*>(floats.data()) : bits.data();
  }

  std::vector<float> floats;  // vectors allocate what they hold: a sanitizer sees the first byte past it
  std::vector<uint16_t> bits;
  std::vector<int8_t> bytes;
};

// Where the weight of one entry, channel and column is.
size_t place(const lhc::Conv& conv, int64_t entry, int64_t channel, int64_t column) {
  const int64_t row = entry * (conv.rows() + (conv.unit == 4)) + channel / conv.unit;
  return static_cast<size_t>((row * conv.tile_width + column) * conv.unit + channel % conv.unit);
}

// The sums that fours begin with, and zeros for the channels that an entry lacks.
void complete_fours(const lhc::Conv& conv, int64_t entries, Values& weight) {
  const int64_t in_blocks = (conv.channels + conv.in_block - 1) / conv.in_block;
  for (int64_t e = 0; e < entries; ++e) {
    const int64_t live = std::min(conv.in_block, conv.channels - conv.entries[e] % in_blocks * conv.in_block);
    for (int64_t column = 0; column < conv.tile_width; ++column) {
      int32_t sum = 0;
      for (int64_t c = 0; c < conv.rows() * 4; ++c) {
        if (c >= live) weight.bytes[place(conv, e, c, column)] = 0;
        sum += weight.bytes[place(conv, e, c, column)];
      }
      sum *= -128;
      std::memcpy(weight.bytes.data() + place(conv, e, conv.rows() * 4, column), &sum, 4);
    }
  }
}

const lhc::Threads threads{3, [](int workers, const std::function<void(int)>& work) {
                             std::vector<std::jthread> pool;
                             for (int w = 0; w < workers; ++w) pool.emplace_back([&work, w] { work(w); });
                           }};

// The sum that one output pixel of one filter begins its epilogue with.
double sum_of(const lhc::Conv& conv, const Values& x, const Values& weight, int64_t tile, int64_t column, int64_t n,
              int64_t oh, int64_t ow) {
  const int64_t in_blocks = (conv.channels + conv.in_block - 1) / conv.in_block;
  double sum = 0;
  for (int64_t e = conv.tile_ptr[tile]; e < conv.tile_ptr[tile + 1]; ++e) {
    const int64_t tap = conv.entries[e] / in_blocks, first = conv.entries[e] % in_blocks * conv.in_block;
    const int64_t ih = oh * conv.stride[0] + tap / conv.kernel[1] * conv.dilation[0] - conv.top;
    const int64_t iw = ow * conv.stride[1] + tap % conv.kernel[1] * conv.dilation[1] - conv.left;
    if (ih < 0 || ih >= conv.height || iw < 0 || iw >= conv.width) continue;
    for (int64_t c = 0; c < std::min(conv.in_block, conv.channels - first); ++c) {
      const int64_t at = ((n * conv.height + ih) * conv.width + iw) * conv.channels + first + c;
      sum += static_cast<double>(weight.floats[place(conv, e, c, column)]) * x.floats[static_cast<size_t>(at)];
    }
  }
  return sum;
}

double activated(lhc::Activation activation, double v) {
  if (activation == lhc::Activation::kRelu) return std::max(v, 0.0);
  return activation == lhc::Activation::kSilu ? v / (1 + std::exp(-v)) : v;
}

bool one_call() {
  lhc::Conv conv{};
  conv.unit = lhc::kHasPairs && chance() < 0.3 ? 2 : lhc::kHasFours && chance() < 0.5 ? 4 : 1;
  const int64_t unit = conv.unit == 2 ? 2 : 1, size = conv.value_bytes();
  conv.batch = draw(1, 3), conv.channels = draw(1, 70 / unit) * unit, conv.out_channels = draw(1, 70);
  conv.in_block = draw(1, 40 / unit) * unit, conv.tile_width = chance() < 0.5 ? draw(1, 20) : draw(1, 130);
  conv.pooled = chance() < 0.3;
  int64_t* const sizes[2] = {&conv.height, &conv.width};
  int64_t* const outs[2] = {&conv.out_height, &conv.out_width};
  int64_t* const borders[2] = {&conv.top, &conv.left};
  for (int axis = 0; axis < 2; ++axis) {
    conv.kernel[axis] = draw(1, 5), conv.stride[axis] = draw(1, 3), conv.dilation[axis] = draw(1, 3);
    const int64_t begin = draw(0, 7), end = draw(0, 7), reach = conv.dilation[axis] * (conv.kernel[axis] - 1) + 1;
    const int64_t least = reach - begin - end + (conv.pooled ? conv.stride[axis] : 0);
    *sizes[axis] = std::max<int64_t>(1, least) + draw(0, 12);
    *borders[axis] = begin;
    *outs[axis] = (*sizes[axis] + begin + end - reach) / conv.stride[axis] + 1;
  }

  const int64_t possible = conv.kernel[0] * conv.kernel[1] * ((conv.channels + conv.in_block - 1) / conv.in_block);
  conv.tiles = (conv.out_channels + conv.tile_width - 1) / conv.tile_width + draw(0, 1);
  std::vector<int32_t> tile_ptr{0}, entries, filters(static_cast<size_t>(conv.tiles * conv.tile_width), -1);
  const double density = chance() < 0.2 ? 0.0 : chance();
  for (int64_t t = 0; t < conv.tiles; ++t) {
    for (int64_t e = 0; e < possible; ++e)
      if (chance() < density) entries.push_back(static_cast<int32_t>(e));
    tile_ptr.push_back(static_cast<int32_t>(entries.size()));
  }
  std::iota(filters.begin(), filters.begin() + conv.out_channels, 0);
  if (chance() < 0.5) std::shuffle(filters.begin(), filters.end(), random_bits);

  const int64_t step = conv.pooled ? 2 : 1, height = conv.out_height / step, width = conv.out_width / step;
  const auto count = [](auto... n) { return static_cast<size_t>((n * ...)); };
  const bool rounds = conv.unit == 4 && chance() < 0.5;
  if (rounds) conv.out_factor = 20;
  const bool uneven = conv.unit == 4 && (conv.channels % 4 != 0 || conv.in_block % 4 != 0);
  Values x(count(conv.batch, conv.height, conv.width, conv.channels) + (uneven ? 3 : 0), size);
  Values weight(count(static_cast<int64_t>(entries.size()), conv.entry_bytes() / size), size);
  Values residual(count(conv.batch, conv.out_height, conv.out_width, conv.out_channels), conv.unit == 2 ? 2 : 4);
  Values y(count(conv.batch, height, width, conv.out_channels), conv.y_bytes());
  for (size_t i = 0; i < y.floats.size(); ++i) rounds ? void(y.bytes[i] = -128) : y.set(i, NAN);
  Values bias(count(conv.out_channels)), scale(count(conv.out_channels));
  conv.x = x.data(), conv.weight = weight.data(), conv.y = y.data();
  conv.column_step = conv.channels * size, conv.row_step = conv.width * conv.column_step;
  conv.image_step = conv.height * conv.row_step;
  conv.tile_ptr = tile_ptr.data(), conv.entries = entries.data(), conv.filters = filters.data();
  if (conv.unit == 4) {
    complete_fours(conv, static_cast<int64_t>(entries.size()), weight);
    for (float& s : scale.floats) s /= 1024;
  }
  if (chance() < 0.5) conv.bias = bias.floats.data();
  if (conv.unit == 4 || chance() < 0.3) conv.scale = scale.floats.data();
  if (chance() < 0.4) conv.residual = residual.data();
  conv.activation = static_cast<lhc::Activation>(draw(0, 2));
  lhc::grouped_conv2d(conv, lhc::Prepared(conv), threads);

  double error = 0, norm = 1e-30;
  for (size_t i = 0; i < y.floats.size(); ++i) {
    if (conv.unit == 2) y.floats[i] = std::bit_cast<float>(static_cast<uint32_t>(y.bits[i]) << 16);
    if (rounds) y.floats[i] = y.bytes[i] == -128 ? NAN : y.bytes[i];
  }
  for (int64_t place = 0; place < conv.tiles * conv.tile_width; ++place) {
    const int64_t f = filters[static_cast<size_t>(place)];
    if (f < 0) continue;
    for (int64_t i = 0; i < conv.batch * height * width; ++i) {
      const int64_t n = i / (height * width), row = i / width % height, column = i % width;
      double expected = -INFINITY;
      for (int64_t a = 0; a < step * step; ++a) {
        const int64_t oh = row * step + a / 2, ow = column * step + a % 2;
        double v = sum_of(conv, x, weight, place / conv.tile_width, place % conv.tile_width, n, oh, ow);
        if (conv.scale) v *= conv.scale[f];
        if (conv.bias) v += conv.bias[f];
        const int64_t at = ((n * conv.out_height + oh) * conv.out_width + ow) * conv.out_channels + f;
        if (conv.residual) v += residual.floats[static_cast<size_t>(at)];
        expected = std::max(expected, activated(conv.activation, v));
      }
      const double got = y.floats[static_cast<size_t>(i * conv.out_channels + f)];
      if (rounds) {  // to one of the two integers at a tie, which float32 may see elsewhere
        const double exact = std::clamp(expected * conv.out_factor, -127.0, 127.0);
        if (!(std::abs(got - exact) <= 0.501)) return false;
        continue;
      }
      error += (got - expected) * (got - expected), norm += expected * expected;
    }
  }
  return std::sqrt(error / norm) <= (conv.unit == 2 ? 1e-2 : 1e-5);  // false for NaN, which an unwritten output is
}

}  // namespace

int main(int argc, char** argv) {
  const long seed = argc > 1 ? std::atol(argv[1]) : 0, calls = argc > 2 ? std::atol(argv[2]) : 1000;
  for (long i = 0; i < calls; ++i) {
    random_bits.seed(static_cast<unsigned>(seed + i));
    if (one_call()) continue;
    std::printf("seed %ld: the result is wrong\n", seed + i);
    return 1;
  }
  std::printf("%ld calls from seed %ld: all right\n", calls, seed);
}

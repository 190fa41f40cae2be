#include "conv.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <vector>

#include "cells.h"
#include "finish.h"
#include "prepared.h"

namespace lhc {
namespace {

// Weights that stay in a core's second-level cache while blocks of pixels pass by. Blocks outside, tiles inside: with
// 28 pixels to a weight, even weights from the third level cost little, and all orders came out within 5 % for 512
// channels of 28x28 to 2x2 pixels.
constexpr int64_t kWeightBytes = 1 << 19;
// Images larger than a first-level cache and outputs larger than a second-level one are fetched ahead (a fifth of the
// whole for 64 channels of 224x224 pixels at density 0.05). Smaller images lie, in a network, in the caches of the
// other core that wrote a part of them.
constexpr int64_t kReadAheadBytes = 1 << 15, kWriteAheadBytes = 1 << 20;
constexpr int64_t kFetchedBytes = 1 << 16, kLineBytes = 64;
constexpr int64_t kItemsPerThread = 8;
constexpr int kMostPixels = max_pixels(1);
// What the sums begin with where a scale has to come before the bias.
alignas(64) constexpr float kZeros[kMaxVectors * kLanes] = {};

// A convolution cut into cells: a tile of filters by a block of pixels.
struct Job {
  const Conv& conv;
  const Layer& layer;
  const Regions& regions;
  const std::vector<int64_t>& chunks;
  Columns columns;
};

// A place in the order of work: chunk of tiles by chunk, block by block, tile by tile.
struct Position {
  int64_t chunk, block, tile;
  bool operator<(const Position& o) const {
    if (chunk != o.chunk) return chunk < o.chunk;
    return block != o.block ? block < o.block : tile < o.tile;
  }
};

Position position_at(const Job& job, int64_t cost) {
  const auto& before = job.layer.cost;
  const int64_t chunks = static_cast<int64_t>(job.chunks.size()) - 1, blocks = job.regions.blocks();
  const auto start_of = [&](int64_t chunk) {
    return before[static_cast<size_t>(job.chunks[static_cast<size_t>(chunk)])];
  };
  int64_t chunk = 0;
  while (chunk < chunks && start_of(chunk + 1) * blocks <= cost) ++chunk;
  if (chunk == chunks) return {chunks, 0, job.conv.tiles};
  const int64_t start = start_of(chunk), size = start_of(chunk + 1) - start;
  const int64_t rest = cost - start * blocks, target = start + rest % size;
  const auto tile = std::upper_bound(before.begin(), before.end(), target) - before.begin() - 1;
  return {chunk, rest / size, tile};
}

void run_panel(const Job& job, const Block& block, int64_t tile, size_t index) {
  const Conv& conv = job.conv;
  const Layer& layer = job.layer;
  const Panel& panel = layer.panels[index];
  const Layer::Filled& filled = layer.filled[static_cast<size_t>(tile) * layer.panels.size() + index];
  if (filled.columns == 0) return;
  const auto place = static_cast<size_t>(tile * layer.padded_width + panel.place);
  const bool direct = filled.adjacent && !conv.pooled && conv.activation != Activation::kSilu &&
                      (conv.unit == 1 ? !conv.scale : conv.unit == 4);
  alignas(64) float sums[4 * kMostPixels * kLanes];

  Cell cell{};
  cell.steps = layer.steps.data() + layer.first_step[static_cast<size_t>(tile)];
  cell.end = layer.steps.data() + layer.first_step[static_cast<size_t>(tile) + 1];
  cell.column_shift = panel.column * 4, cell.row_step = layer.row_step;
  const bool scales_in_place = direct && conv.unit == 4;
  cell.bias = conv.scale && !scales_in_place ? kZeros : job.columns.bias + place;
  if (conv.unit == 4) cell.scale = job.columns.scale + place;
  cell.sums_shift = conv.rows() * layer.row_step;
  for (int v = 0; v < filled.vectors; ++v)
    cell.filters[v] = layer.filters[place + static_cast<size_t>(v * panel.lanes)];
  cell.residual = static_cast<const float*>(conv.residual), cell.y = static_cast<float*>(conv.y);
  if (conv.out_factor != 0) cell.bytes = static_cast<int8_t*>(conv.y), cell.out_factor = conv.out_factor;
  cell.floor = conv.activation == Activation::kRelu ? 0.0f : -std::numeric_limits<float>::infinity();
  const int most = max_pixels(filled.vectors);
  for (int first = 0; first < block.count; first += most) {
    const int count = std::min(most, block.count - first);
    const Kernel kernel = find_kernel(conv.unit, panel.lanes, filled.vectors, count);
    cell.x = block.x + first, cell.out = block.out + first, cell.residual_at = block.residual + first;
    for (int a = 0; a < (conv.pooled ? 4 : 1); ++a) {
      const int down = a / 2, right = a % 2;
      cell.rows[0] = block.rows->begin[down], cell.rows[1] = block.rows->end[down];
      cell.columns[0] = block.columns->begin[right], cell.columns[1] = block.columns->end[right];
      cell.shift = times(down * conv.stride[0], conv.row_step) + times(right * conv.stride[1], conv.column_step);
      cell.sums = direct ? nullptr : sums + a * kernel.pixels * filled.vectors * panel.lanes;
      kernel.run(cell);
    }
    if (!direct)
      finish(conv, layer, job.columns, tile, static_cast<int64_t>(index), block, {sums, kernel.pixels, first, count});
  }
}

// Asks for a share of `bytes` from an address on, to read (0) or to write (1).
template <int kWrites>
void fetch(uintptr_t address, int64_t bytes, int64_t share, int64_t shares) {
  bytes = std::min(bytes, kFetchedBytes);
  for (int64_t at = bytes * share / shares; at < bytes * (share + 1) / shares; at += kLineBytes)
    __builtin_prefetch(reinterpret_cast<const char*>(address + static_cast<uintptr_t>(at)), kWrites, 2);
}

// The next block is the first to read the pixels of its lowest row, and the first to write; the hardware's prefetchers
// do not follow pixels of several lines of which each cell touches one or two.
void fetch_ahead(const Conv& conv, const Block& block, int64_t share, int64_t shares) {
  const int64_t step = conv.pooled ? 2 : 1, last = block.count - 1;
  if (conv.height * conv.row_step > kReadAheadBytes) {
    const int64_t below = (conv.kernel[0] - 1) * conv.dilation[0] - conv.top + (step - 1) * conv.stride[0];
    const int64_t bytes = block.count * step * conv.stride[1] * conv.column_step;
    fetch<0>(block.x[last] + times(below, conv.row_step), bytes, share, shares);
  }
  const int64_t pixel_bytes = conv.out_channels * conv.y_bytes();
  if (conv.out_height * conv.out_width * pixel_bytes > kWriteAheadBytes * step * step)
    fetch<1>(reinterpret_cast<uintptr_t>(conv.y) + times(block.out[last] + conv.out_channels, conv.y_bytes()),
             block.count * pixel_bytes, share, shares);
}

void run_cells(const Job& job, int64_t begin_cost, int64_t end_cost) {
  const Conv& conv = job.conv;
  Position at = position_at(job, begin_cost);
  const Position end = position_at(job, end_cost);
  const auto chunks = static_cast<int64_t>(job.chunks.size()) - 1;
  Block block;
  int64_t placed = -1;
  while (at < end) {
    if (placed != at.block) job.regions.place(conv, placed = at.block, block);
    const int64_t first = job.chunks[static_cast<size_t>(at.chunk)];
    fetch_ahead(conv, block, at.tile - first, job.chunks[static_cast<size_t>(at.chunk) + 1] - first);
    for (size_t panel = 0; panel < job.layer.panels.size(); ++panel) run_panel(job, block, at.tile, panel);
    if (++at.tile < job.chunks[static_cast<size_t>(at.chunk) + 1]) continue;
    if (++at.block == job.regions.blocks()) ++at.chunk, at.block = 0;
    at.tile = at.chunk < chunks ? job.chunks[static_cast<size_t>(at.chunk)] : conv.tiles;
  }
}

std::vector<int64_t> cut_into_chunks(const Conv& conv) {
  std::vector<int64_t> chunks;
  for (int64_t t = 0, first = 0; t < conv.tiles; ++t) {
    if (!chunks.empty() && (conv.tile_ptr[t + 1] - first) * conv.entry_bytes() <= kWeightBytes) continue;
    chunks.push_back(t);
    first = conv.tile_ptr[t];
  }
  chunks.push_back(conv.tiles);
  return chunks;
}

}  // namespace

Prepared::Prepared(const Conv& conv) : layer(conv), regions(conv), chunks(cut_into_chunks(conv)) {}

size_t Prepared::bytes() const { return layer.bytes() + regions.bytes() + chunks.size() * sizeof(int64_t); }

void grouped_conv2d(const Conv& conv, const Prepared& prepared, const Threads& threads) {
  const Job job{conv, prepared.layer, prepared.regions, prepared.chunks, Columns(conv, prepared.layer)};
  int64_t cost = 0;
  if (__builtin_mul_overflow(job.layer.cost.back() * kItemsPerThread * threads.count, job.regions.blocks(), &cost))
    throw std::length_error("grouped_conv2d: the weights and the output are too large for each other");
  cost = job.layer.cost.back() * job.regions.blocks();
  const int64_t items = std::min(job.regions.blocks() * conv.tiles, kItemsPerThread * threads.count);
  for_each(threads, items, [&](int64_t item) { run_cells(job, cost * item / items, cost * (item + 1) / items); });
}

}  // namespace lhc

// Grouped, structured-sparse convolution on the CPU: pixels are the lanes of vectors, filters are scalars.
//
// A tile of filters shares one list of entries (tap, input block). For a *strip* of up to kVectors vectors of
// pixels and kFilters filters the sums stay in registers over the whole list; one input channel of an entry
// costs kVectors loads, kFilters broadcasts and their product of fused multiply-adds. There is neither a
// gather nor an im2col: a tap is an offset into planes of pixels (planes.h).

#include "conv.h"

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <memory>
#include <type_traits>

#include "planes.h"
#include "pool.h"
#include "threads.h"
#include "vectors.h"

namespace lhc {
namespace {

// Weights that stay in a core's second-level cache while strips pass by.
constexpr int64_t kWeightFloats = 1 << 18;
// Outputs that stay in a core's second-level cache until they are pooled.
constexpr int64_t kPooledFloats = 1 << 17;
constexpr int64_t kItemsPerThread = 8;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t weight_floats(const Conv& conv) { return conv.tile_ptr[conv.tiles] * conv.in_block * conv.tile_width; }

// A run of output pixels of one group, as vectors.
struct Strip {
  int vectors;
  const float* x[kVectors];  // each vector's pixels in the planes, before a step's offset
  int64_t y[kVectors];     // and in filter 0's output plane, where they are contiguous
  Mask lanes[kVectors];    // lanes that are output pixels
  bool full;               // all lanes are output pixels
  bool scattered;          // they are not contiguous there: images lie side by side
  int64_t count, places[kVectors * kLanes];  // scattered: pixels in all, and where each lies
};

// Which lanes of a strip a tap may read: of the direct variant those whose row and column exist, of the spread one
// those whose column does. The copied one has no masks, nor has any where masks are not free.
struct Border {
  Mask masks[kVectors];
  bool whole;   // all lanes of all vectors
};
using Borders = std::vector<Border>;   // of each tap

struct Job {
  const Conv& conv;
  Planes planes;
  Group group;
  int64_t strips, vectors;
  std::vector<int64_t> chunks;   // first tile of each chunk of filter tiles, and the end
  std::vector<int64_t> cost;     // of the tiles before each tile, for one strip
};

// Adds one entry's products to the sums of F filters and V vectors, and asks for the pixels at `next`.
template <int F, int V, bool kMasked>
[[gnu::always_inline]] inline void add_entry(const float* const (&x)[V], const Mask* masks, int64_t channel_step,
                                             const float* w, int64_t width, int32_t channels,
                                             const float* next, Vec (&sums)[F * V]) {
  int64_t at = 0;
  for (int32_t c = 0; c < channels; ++c, at += channel_step, w += width) {
    Vec pixels[V];
    unrolled<V>([&](auto v) { __builtin_prefetch(next + at + v * kLanes); });
    unrolled<V>([&](auto v) { pixels[v] = in_register(kMasked ? load(x[v] + at, masks[v]) : load(x[v] + at)); });
    unrolled<F>([&](auto f) {
      const Vec factor = broadcast(w[f]);
      unrolled<V>([&](auto v) { sums[f * V + v] += pixels[v] * factor; });
    });
  }
}

// Adds all entries of a tile to the sums of F of its filters, from `column` on.
template <int F, int V>
[[gnu::always_inline]] inline void add_entries(const Job& job, const Strip& strip, const Borders& borders,
                                               int64_t tile, int64_t column, Vec (&out)[F * V]) {
  const Conv& conv = job.conv;
  // A copy that nothing else refers to, or the compiler stores every sum in every round (2x slower).
  Vec sums[F * V];
  unrolled<F * V>([&](auto i) { sums[i] = out[i]; });
  const int64_t width = conv.tile_width, channel_step = job.planes.channel_step;
  const bool crowded = channel_step % kCrowdedFloats == 0;
  for (int32_t e = conv.tile_ptr[tile]; e < conv.tile_ptr[tile + 1]; ++e) {
    const Step& step = job.planes.steps[conv.entries[e]];
    const float* w = conv.weight + e * conv.in_block * width + column;
    // The next entry's pixels enter the first-level cache meanwhile (3 to 10 % faster), unless planes lie so that
    // they would push out this entry's (then 5 % slower).
    const bool stay = crowded || e + 1 == conv.tile_ptr[tile + 1];
    const float* next = strip.x[0] + job.planes.steps[conv.entries[stay ? e : e + 1]].offset;
    const float* x[V];
    for (int v = 0; v < V; ++v) x[v] = strip.x[v] + step.offset;
    const Border& border = borders[step.tap];
    // A masked load takes a slot of the units that multiply: 8 to 10 % of the whole where all are masked.
    if (!kFreeMasks || border.whole)
      add_entry<F, V, false>(x, border.masks, channel_step, w, width, step.channels, next, sums);
    else
      add_entry<F, V, true>(x, border.masks, channel_step, w, width, step.channels, next, sums);
  }
  unrolled<F * V>([&](auto i) { out[i] = sums[i]; });
}

Vec at_least(Vec values, Vec floor) {
  // A comparison, not a maximum: NaN must stay.
  return values < floor ? floor : values;
}

// The end of one filter's sums where run_block's own does not serve: act(scale * sums + bias + residual).
void finish(const Conv& conv, const Strip& strip, int64_t filter, const Vec* sums) {
  const int64_t base = filter * conv.out_height * conv.out_width;
  float* y = conv.y + base;
  const float* residual = conv.residual ? conv.residual + base : nullptr;
  for (int v = 0; v < strip.vectors; ++v) {
    const int64_t* places = strip.places + v * kLanes;
    const int64_t count = strip.scattered ? std::min<int64_t>(strip.count - v * kLanes, kLanes) : 0;
    Vec out = sums[v];
    if (conv.scale) out = out * broadcast(conv.scale[filter]);
    if (conv.bias) out += broadcast(conv.bias[filter]);
    if (residual && strip.scattered)
      for (int64_t i = 0; i < count; ++i) out[i] += residual[places[i]];
    else if (residual)
      out += load(residual + strip.y[v], strip.lanes[v]);
    if (conv.relu) out = at_least(out, Vec{});
    if (!strip.scattered) {
      store(y + strip.y[v], out, strip.lanes[v]);
      continue;
    }
    alignas(64) float values[kLanes];
    store(values, out);
    for (int64_t i = 0; i < count; ++i) y[places[i]] = values[i];
  }
}

// Computes F filters of a tile, from `column` on, for a strip.
template <int F, int V>
void run_block(const Job& job, const Strip& strip, const Borders& borders, int64_t tile, int64_t column) {
  const Conv& conv = job.conv;
  const int32_t* filters = conv.filters + tile * conv.tile_width + column;
  const int64_t pixels = conv.out_height * conv.out_width;
  // Starting from the bias and ending in registers, the epilogue of a narrow layer takes a fifth less time.
  const bool plain = !strip.scattered && !conv.scale && (kFreeMasks || strip.full);
  bool used = false;
  float* y[F];
  Vec sums[F * V];
  unrolled<F>([&](auto f) {
    const int64_t filter = std::max(filters[f], 0);
    used = used || filters[f] >= 0;
    y[f] = conv.y + filter * pixels;
    const Vec first = broadcast(plain && conv.bias ? conv.bias[filter] : 0.0f);
    unrolled<V>([&](auto v) { sums[f * V + v] = first; });
  });
  if (!used) return;
  // The lines to be written, and to be added, arrive while the sums are computed.
  if (!strip.scattered)
    unrolled<F>([&](auto f) { unrolled<V>([&](auto v) { __builtin_prefetch(y[f] + strip.y[v], 1); }); });
  if (!strip.scattered && conv.residual)
    unrolled<F>([&](auto f) {
      unrolled<V>([&](auto v) { __builtin_prefetch(conv.residual + (y[f] - conv.y) + strip.y[v]); });
    });
  add_entries<F, V>(job, strip, borders, tile, column, sums);
  if (!plain) {
    unrolled<F>([&](auto f) {
      Vec spilled[V];
      unrolled<V>([&](auto v) { spilled[v] = sums[f * V + v]; });
      if (filters[f] >= 0) finish(conv, strip, filters[f], spilled);
    });
    return;
  }
  const Vec floor = broadcast(conv.relu ? 0.0f : -std::numeric_limits<float>::infinity());
  // Its two questions are asked once, not for every vector: a fifth of the time of a layer with few entries.
  const auto write = [&](auto whole, auto adds) {
    unrolled<F>([&](auto f) {
      if (filters[f] < 0) return;
      unrolled<V>([&](auto v) {
        float* to = y[f] + strip.y[v];
        Vec out = sums[f * V + v];
        const float* added = conv.residual + (to - conv.y);
        if constexpr (adds && whole) out += load(added);
        if constexpr (adds && !whole) out += load(added, strip.lanes[v]);
        out = at_least(out, floor);
        if constexpr (whole)
          store(to, out);
        else
          store(to, out, strip.lanes[v]);
      });
    });
  };
  constexpr std::true_type yes;
  constexpr std::false_type no;
  if (strip.full && conv.residual)
    write(yes, yes);
  else if (strip.full)
    write(yes, no);
  else if (conv.residual)
    write(no, yes);
  else
    write(no, no);
}

template <int V>
void run_tile(const Job& job, const Strip& strip, const Borders& borders, int64_t tile) {
  const int64_t width = job.conv.tile_width;
  int64_t column = 0;
  for (; column + kFilters <= width; column += kFilters)
    run_block<kFilters, V>(job, strip, borders, tile, column);
  if constexpr (kFilters > 4)
    for (; column + 4 <= width; column += 4) run_block<4, V>(job, strip, borders, tile, column);
  for (; column + 2 <= width; column += 2) run_block<2, V>(job, strip, borders, tile, column);
  for (; column < width; ++column) run_block<1, V>(job, strip, borders, tile, column);
}

void run_tile(const Job& job, const Strip& strip, const Borders& borders, int64_t tile) {
  static_assert(kVectors == 3);
  if (strip.vectors == 3)
    run_tile<3>(job, strip, borders, tile);
  else if (strip.vectors == 2)
    run_tile<2>(job, strip, borders, tile);
  else
    run_tile<1>(job, strip, borders, tile);
}

// Where the pixels from `first` on of images side by side lie in the output.
void scatter(const Job& job, int64_t first, int64_t origin, Strip& strip) {
  const Conv& conv = job.conv;
  const int64_t image_size = conv.out_channels * conv.out_height * conv.out_width;
  int64_t row = first / job.planes.row_step, rest = first % job.planes.row_step;
  int64_t image = rest / conv.out_width, column = rest % conv.out_width;
  strip.count = std::min<int64_t>(strip.vectors * kLanes, job.planes.run_pixels - first);
  for (int64_t i = 0; i < strip.count; ++i) {
    strip.places[i] = origin + image * image_size + row * conv.out_width + column;
    if (++column < conv.out_width) continue;
    column = 0;
    if (++image < job.group.images) continue;
    image = 0;
    ++row;
  }
}

void mask_taps(const Job& job, const Strip& strip, int64_t begin, int v, Borders& borders) {
  const Conv& conv = job.conv;
  IntVec columns = counting() + static_cast<int32_t>(begin % conv.out_width);
  IntVec rows = IntVec{} + static_cast<int32_t>(begin / conv.out_width);
  const int32_t width = static_cast<int32_t>(conv.out_width);
  for (int32_t wraps = 0; wraps * width < kLanes; ++wraps) {
    const IntVec past = columns >= width;  // -1 where true
    columns -= past & width;
    rows -= past;
  }
  for (int64_t r = 0; r < conv.kernel[0]; ++r) {
    // The spread variant has rows of zeros.
    const Mask inside =
        job.planes.direct ? strip.lanes[v] & within(rows, r * conv.dilation[0] - conv.top, conv.height) : strip.lanes[v];
    for (int64_t s = 0; s < conv.kernel[1]; ++s)
      borders[r * conv.kernel[1] + s].masks[v] =
          inside & within(columns, s * conv.dilation[1] - conv.left, conv.width);
  }
}

// Places the strip of vectors from `first` on, and says which of their lanes each tap may read.
void place(const Job& job, const float* data, int64_t first, Strip& strip, Borders& borders) {
  const Conv& conv = job.conv;
  const Planes& planes = job.planes;
  const int64_t image_size = conv.out_channels * conv.out_height * conv.out_width;
  const int64_t origin = job.group.image * image_size + job.group.row * conv.out_width;
  const int64_t per_run = ceil_div(planes.run_pixels, kLanes);
  strip.scattered = planes.side_by_side;
  strip.full = true;
  for (int v = 0; v < strip.vectors; ++v) {
    const int64_t run = (first + v) / per_run, begin = (first + v) % per_run * kLanes;
    strip.x[v] = data + run * planes.run_step + begin;
    strip.y[v] = origin + run * image_size + begin;
    strip.lanes[v] = first_lanes(planes.run_pixels - begin);
    strip.full = strip.full && is_full(strip.lanes[v]);
    if (kFreeMasks && planes.keeps_layout) mask_taps(job, strip, begin, v, borders);
  }
  if (kFreeMasks && planes.keeps_layout) {
    for (Border& border : borders) {
      border.whole = true;
      for (int v = 0; v < strip.vectors; ++v) border.whole = border.whole && is_full(border.masks[v]);
    }
  }
  if (strip.scattered) scatter(job, first * kLanes, origin, strip);
}

// Asks for a share of the pixels that the next strip is the first to read, those of its lowest row: strips go
// through many planes a few lines at a time, which the hardware's prefetchers do not follow.
void fetch_ahead(const Job& job, const Strip& strip, int64_t tile) {
  const Conv& conv = job.conv;
  const int64_t below = (conv.kernel[0] - 1) * conv.dilation[0] - conv.top;
  const float* x = strip.x[0] + strip.vectors * kLanes + below * conv.width;
  const int64_t end = conv.channels * (tile + 1) / conv.tiles;
  for (int64_t c = conv.channels * tile / conv.tiles; c < end; ++c)
    for (int v = 0; v < kVectors; ++v)
      __builtin_prefetch(x + c * job.planes.channel_step + v * kLanes, 0, 2);
}

// A place in the order of work: chunk of filter tiles by chunk, strip by strip, tile by tile.
struct Cell {
  int64_t chunk, strip, tile;
  bool operator<(const Cell& o) const {
    if (chunk != o.chunk) return chunk < o.chunk;
    return strip != o.strip ? strip < o.strip : tile < o.tile;
  }
};

Cell cell_at(const Job& job, int64_t cost) {
  const auto& before = job.cost;
  const int64_t chunks = static_cast<int64_t>(job.chunks.size()) - 1;
  int64_t chunk = 0;
  while (chunk < chunks && before[job.chunks[chunk + 1]] * job.strips <= cost) ++chunk;
  if (chunk == chunks) return {chunks, 0, job.conv.tiles};
  const int64_t start = before[job.chunks[chunk]], size = before[job.chunks[chunk + 1]] - start;
  const int64_t rest = cost - start * job.strips, target = start + rest % size;
  const auto tile = std::upper_bound(before.begin(), before.end(), target) - before.begin() - 1;
  return {chunk, rest / size, tile};
}

// Computes a share of the cells from planes at `data`.
void run_cells(const Job& job, const float* data, int64_t begin_cost, int64_t end_cost) {
  Cell cell = cell_at(job, begin_cost);
  const Cell end = cell_at(job, end_cost);
  Strip strip;
  Borders borders(job.conv.kernel[0] * job.conv.kernel[1], {{}, true});
  bool placed = false;
  while (cell < end) {
    if (!placed) {
      const int64_t first = cell.strip * job.vectors / job.strips;
      strip.vectors = static_cast<int>((cell.strip + 1) * job.vectors / job.strips - first);
      place(job, data, first, strip, borders);
      placed = true;
    }
    if (job.planes.direct) fetch_ahead(job, strip, cell.tile);
    run_tile(job, strip, borders, cell.tile);
    if (++cell.tile < job.chunks[cell.chunk + 1]) continue;
    placed = false;
    if (++cell.strip == job.strips) ++cell.chunk, cell.strip = 0;
    cell.tile = cell.chunk + 1 < static_cast<int64_t>(job.chunks.size()) ? job.chunks[cell.chunk]
                                                                        : job.conv.tiles;
  }
}

// What a thread keeps memory for.
enum class Scratch { kPlanes, kBand };

// Memory that stays with the calling thread: giving it back after every call would cost a page fault for each 4 KiB on
// the next one.
template <Scratch>
float* scratch(int64_t floats) {
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<float, Free> memory;
  thread_local int64_t size = 0;
  if (floats > size) {
    memory.reset();
    memory.reset(static_cast<float*>(std::aligned_alloc(64, ceil_div(floats, 16) * 64)));
    size = memory ? floats : 0;
    if (!memory) throw std::bad_alloc();
  }
  return memory.get();
}

void run_group(const Conv& conv, const Group& group, const Threads& threads) {
  Job job{conv, plan_planes(conv, group), group, 0, 0, {}, {}};
  job.vectors = job.planes.runs * ceil_div(job.planes.run_pixels, kLanes);
  job.strips = ceil_div(job.vectors, kVectors);

  // Strip by strip, all weights passing by, while these fit into the second-level cache beside the pixels.
  // Where the weights are more than the pixels they pass by once, tile by tile, each thread reading its own, if the
  // pixels fit; else in chunks that do.
  const int64_t pixels = conv.channels * job.planes.runs * job.planes.run_pixels;
  const int64_t budget = weight_floats(conv) > pixels && pixels <= kWeightFloats ? 0 : kWeightFloats;
  job.cost.push_back(0);
  for (int64_t t = 0; t < conv.tiles; ++t) {
    const int64_t entries = conv.tile_ptr[t + 1] - conv.tile_ptr[t];
    // An entry's channels, and about as much as two of them for the epilogue of each filter.
    job.cost.push_back(job.cost.back() + entries * conv.in_block + 16);
  }
  for (int64_t t = 0, first = 0; t < conv.tiles; ++t) {
    const int64_t floats = (conv.tile_ptr[t + 1] - first) * conv.in_block * conv.tile_width;
    if (!job.chunks.empty() && floats <= budget) continue;
    job.chunks.push_back(t);
    first = conv.tile_ptr[t];
  }
  job.chunks.push_back(conv.tiles);

  const int64_t cost = job.cost.back() * job.strips, cells = job.strips * conv.tiles;
  if (job.planes.direct) {
    const int64_t items = std::min(cells, kItemsPerThread * threads.count);
    for_each(threads, items, [&](int64_t item) {
      run_cells(job, conv.x, cost * item / items, cost * (item + 1) / items);
    });
    return;
  }
  // Each thread fills planes of its own: to read what another core has just written takes longer (1.5x the whole for
  // 512 channels of 2x2 pixels).
  const int64_t shares = std::min<int64_t>(cells, threads.count);
  for_each(threads, shares, [&](int64_t share) {
    const int64_t begin = cost * share / shares, end = cost * (share + 1) / shares;
    if (!(cell_at(job, begin) < cell_at(job, end))) return;
    float* data = scratch<Scratch::kPlanes>(planes_size(conv, group));
    for (int64_t c = 0; c < conv.channels; ++c) fill_channel(conv, job.planes, group, c, data);
    run_cells(job, data, begin, end);
  });
}

// The images and rows of a group whose planes take up to `limit` floats, so many that the groups come out even
// on `threads` threads: whole images if they fit, else rows of one image.
Group group_size(const Conv& conv, int64_t limit, int64_t threads) {
  int64_t images = ceil_div(conv.batch, threads), rows = conv.out_height;
  while (images > 1 && planes_size(conv, {0, images, 0, rows}) > limit) images = ceil_div(images, 2);
  while (rows > 1 && planes_size(conv, {0, images, 0, rows}) > limit) rows = ceil_div(rows, 2);
  const int64_t blocks = ceil_div(conv.batch, images);
  int64_t bands = ceil_div(conv.out_height, rows);
  bands = std::min(conv.out_height, ceil_div(ceil_div(blocks * bands, threads) * threads, blocks));
  return {0, ceil_div(conv.batch, blocks), 0, ceil_div(conv.out_height, bands)};
}

}  // namespace

void grouped_conv2d(const Conv& conv, const Threads& threads) {
  if (conv.batch == 0) return;
  if (reads_directly(conv)) return run_group(conv, {0, conv.batch, 0, conv.out_height}, threads);
  const auto bands = [&](const Group& size) { return ceil_div(conv.out_height, size.rows); };
  const auto groups = [&](const Group& size) { return ceil_div(conv.batch, size.images) * bands(size); };
  Group size = group_size(conv, kPlanesFloats, threads.count);
  // Threads take groups of pixels, or, where these are too small or too few or the weights far more, share out the
  // tiles of one group after the other (1.2x faster for 512 channels of 2x2 pixels).
  const bool heavy = weight_floats(conv) > 2 * conv.batch * conv.channels * conv.height * conv.width;
  const bool enough = size.images * size.rows * conv.out_width >= kLanes && groups(size) >= threads.count;
  const bool by_pixels = (enough && !heavy) || threads.count == 1;
  if (!by_pixels) size = group_size(conv, kPlanesFloats, 1);
  const auto run = [&](int64_t item, const Threads& on) {
    const int64_t image = item / bands(size) * size.images, row = item % bands(size) * size.rows;
    run_group(conv, {image, std::min(size.images, conv.batch - image), row,
                     std::min(size.rows, conv.out_height - row)}, on);
  };
  if (by_pixels)
    for_each(threads, groups(size), [&](int64_t item) { run(item, {1, {}}); });
  else
    for (int64_t item = 0; item < groups(size); ++item) run(item, threads);
}

bool pools_in_bands(const Conv& conv) {
  // Smaller outputs are still in the caches when they are pooled.
  const bool large = conv.batch * conv.out_channels * conv.out_height * conv.out_width > 2 * kPooledFloats;
  // The first band of a pointwise layer would be copied.
  const bool pointwise = conv.kernel[0] * conv.kernel[1] == 1;
  return large && !pointwise && keeps_layout(conv) && !conv.residual;
}

void pooled_conv2d(const Conv& conv, const Threads& threads) {
  const int64_t height = conv.out_height / 2, width = conv.out_width / 2, step = height * width;
  const int64_t fitting = kPooledFloats / (conv.out_channels * 2 * conv.out_width);
  int64_t pairs = std::clamp<int64_t>(fitting, 1, ceil_div(height, threads.count));
  if (!reads_directly(conv))
    while (pairs > 1 && planes_size(conv, {0, 1, 0, 2 * pairs}) > kPlanesFloats) pairs = ceil_div(pairs, 2);
  const int64_t bands = ceil_div(height, pairs);
  for_each(threads, conv.batch * bands, [&](int64_t item) {
    const int64_t image = item / bands, pair = item % bands * pairs;
    // The band as a convolution of its own: fewer output rows, and a border that begins as much higher.
    Conv band = conv;
    band.batch = 1;
    band.out_height = 2 * std::min(pairs, height - pair);
    band.top = conv.top - 2 * pair;
    band.x = conv.x + image * conv.channels * conv.height * conv.width;
    band.y = scratch<Scratch::kBand>(conv.out_channels * band.out_height * conv.out_width);
    const Threads alone{1, {}};
    run_group(band, {0, 1, 0, band.out_height}, alone);
    float* y = conv.y + image * conv.out_channels * step + pair * width;
    max_pool_2x2(band.y, conv.out_channels, band.out_height, conv.out_width, y, step, alone);
  });
}

}  // namespace lhc

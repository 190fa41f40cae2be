#include "layer.h"

#include <algorithm>
#include <cstring>

#include "cells.h"

namespace lhc {
namespace {

// What finishing a cell costs, in units of the products of one channel.
constexpr int64_t kEpilogue = 16;

std::vector<Panel> cut(int64_t width) {
  std::vector<Panel> panels;
  int64_t column = 0, place = 0;
  const auto add = [&](int lanes, int vectors) {
    panels.push_back({lanes, vectors, column, place});
    column += lanes * vectors, place += lanes * vectors;
  };
  for (int vectors = kMaxVectors; vectors >= 1; vectors /= 2)
    while (width - column >= kLanes * vectors) add(kLanes, vectors);
  if (column < width) {
    int lanes = kLanes;
    while (lanes > 4 && lanes / 2 >= width - column) lanes /= 2;
    add(lanes, 1);
  }
  return panels;
}

}  // namespace

Layer::Layer(const Conv& conv) : panels(cut(conv.tile_width)) {
  padded_width = panels.back().place + panels.back().lanes * panels.back().vectors;
  row_step = conv.tile_width * 4;
  read_entries(conv);
  read_filters(conv);
}

void Layer::read_entries(const Conv& conv) {
  const int64_t entries = conv.tile_ptr[conv.tiles], in_blocks = (conv.channels - 1) / conv.in_block + 1;
  const int64_t unit = conv.unit, entry_bytes = conv.entry_bytes();
  const auto* weight = static_cast<const char*>(conv.weight);
  // A row's last vector may reach past it, into the rows behind; the last entries, behind whose rows there are too few
  // weights for that, are read from a copy.
  const int64_t reach = (padded_width - conv.tile_width) * 4;
  const int64_t kept = reach > 0 ? std::min(entries, (reach - 1) / entry_bytes + 1) : 0, copied = entries - kept;
  if (kept > 0) {
    last_entries_.resize(static_cast<size_t>(kept * entry_bytes + reach));
    std::memcpy(last_entries_.data(), weight + copied * entry_bytes, static_cast<size_t>(kept * entry_bytes));
  }

  steps.reserve(static_cast<size_t>(entries));
  first_step.reserve(static_cast<size_t>(conv.tiles) + 1);
  cost.reserve(static_cast<size_t>(conv.tiles) + 1);
  first_step.push_back(0), cost.push_back(0);
  for (int64_t tile = 0; tile < conv.tiles; ++tile) {
    int64_t tap_begin = 0, previous = -1, row = 0, column = 0, units = 0;
    for (int64_t e = conv.tile_ptr[tile]; e < conv.tile_ptr[tile + 1]; ++e) {
      const int64_t entry = conv.entries[e];
      if (entry < tap_begin || entry >= tap_begin + in_blocks) {
        const int64_t tap = entry / in_blocks;
        tap_begin = tap * in_blocks, row = tap / conv.kernel[1], column = tap % conv.kernel[1];
      }
      const int64_t first = (entry - tap_begin) * conv.in_block;
      const int64_t count = (std::min(conv.in_block, conv.channels - first) - 1) / unit + 1;
      const bool adjacent = unit != 4 && entry == previous + 1 && entry > tap_begin;  // fours have sums in between
      previous = entry;
      units += count;
      if (adjacent && e != copied) {
        steps.back().units += count;
        continue;
      }
      const uintptr_t shift = times(row * conv.dilation[0] - conv.top, conv.row_step) +
                              times(column * conv.dilation[1] - conv.left, conv.column_step) +
                              times(first, conv.value_bytes());
      const char* from = e < copied ? weight + e * entry_bytes : last_entries_.data() + (e - copied) * entry_bytes;
      steps.push_back({from, shift, static_cast<int32_t>(row), static_cast<int32_t>(column), count});
    }
    first_step.push_back(static_cast<int64_t>(steps.size()));
    cost.push_back(cost.back() + units + kEpilogue);
  }
}

void Layer::read_filters(const Conv& conv) {
  const auto all = static_cast<size_t>(conv.tiles * padded_width);
  filters.assign(all, -1);
  filled.reserve(static_cast<size_t>(conv.tiles) * panels.size());
  for (int64_t tile = 0; tile < conv.tiles; ++tile) {
    int32_t* to = filters.data() + tile * padded_width;
    std::copy_n(conv.filters + tile * conv.tile_width, conv.tile_width, to);
    for (const Panel& panel : panels) {
      const int32_t* f = to + panel.place;
      Filled found{0, panel.vectors, true, true};
      for (int64_t i = 0; i < panel.lanes * panel.vectors; ++i)
        if (f[i] >= 0) found.columns = i + 1;
      while (found.vectors > 1 && found.columns <= panel.lanes * found.vectors / 2) found.vectors /= 2;
      for (int64_t i = 0; i < panel.lanes * found.vectors; ++i) {
        const bool follows = i > 0 && f[i - 1] >= 0 && f[i] == f[i - 1] + 1;
        found.adjacent = found.adjacent && f[i] >= 0 && (i % panel.lanes == 0 || follows);
        found.in_fours = found.in_fours && (i % 4 == 0 || follows || (f[i] < 0 && f[i - 1] < 0));
      }
      filled.push_back(found);
    }
  }
  in_order = true;
  for (size_t i = 0; in_order && i < all; ++i) in_order = filters[i] == static_cast<int64_t>(i);
}

size_t Layer::bytes() const {
  return steps.size() * sizeof(Step) + (first_step.size() + cost.size()) * sizeof(int64_t) +
         filters.size() * sizeof(int32_t) + filled.size() * sizeof(Filled) + last_entries_.size();
}

Columns::Columns(const Conv& conv, const Layer& layer) : bias(conv.bias), scale(conv.scale) {
  const auto spread = [&](const float*& values, std::vector<float>& kept, float missing) {
    if (values && layer.in_order) return;
    kept.assign(layer.filters.size(), missing);
    for (size_t i = 0; values && i < kept.size(); ++i)
      if (layer.filters[i] >= 0) kept[i] = values[layer.filters[i]];
    values = kept.data();
  };
  spread(bias, bias_, 0.0f);
  if (scale) spread(scale, scale_, 1.0f);
}

}  // namespace lhc

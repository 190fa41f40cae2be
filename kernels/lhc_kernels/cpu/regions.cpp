#include "regions.h"

#include <algorithm>

namespace lhc {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b > 0); }
int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0); }

// One axis of the convolution.
struct Axis {
  int64_t size, out, kernel, stride, dilation, border;

  // Taps of output o that lie in the image.
  int64_t begin(int64_t o) const { return std::clamp<int64_t>(ceil_div(border - o * stride, dilation), 0, kernel); }
  int64_t end(int64_t o) const {
    return std::clamp<int64_t>(floor_div(size - 1 + border - o * stride, dilation) + 1, 0, kernel);
  }
  // The next output that has others.
  int64_t next(int64_t o) const {
    int64_t found = out;
    if (const int64_t b = begin(o); b > 0)
      found = std::min(found, std::max(o + 1, ceil_div(border - (b - 1) * dilation, stride)));
    if (const int64_t e = end(o); e > 0)
      found = std::min(found, std::max(o + 1, floor_div(size - 1 + border - (e - 1) * dilation, stride) + 1));
    return found;
  }
};

std::vector<Span> spans(const Axis& axis, bool pooled) {
  std::vector<Span> found;
  const int64_t step = pooled ? 2 : 1, count = axis.out / step;
  for (int64_t at = 0; at < count;) {
    int64_t next = count;
    Span span{at, 0, {}, {}};
    for (int64_t a = 0; a < step; ++a) {
      const int64_t o = at * step + a;
      span.begin[a] = axis.begin(o), span.end[a] = axis.end(o);
      next = std::min(next, std::max(at + 1, ceil_div(axis.next(o) - a, step)));
    }
    span.count = next - at;
    found.push_back(span);
    at = next;
  }
  return found;
}

}  // namespace

Regions::Regions(const Conv& conv)
    : rows_(spans({conv.height, conv.out_height, conv.kernel[0], conv.stride[0], conv.dilation[0], conv.top},
                  conv.pooled)),
      columns_(spans({conv.width, conv.out_width, conv.kernel[1], conv.stride[1], conv.dilation[1], conv.left},
                     conv.pooled)) {
  const size_t regions = rows_.size() * columns_.size();
  first_block_.reserve(regions + 1);
  first_block_.push_back(0);
  for (size_t region = 0; region < regions; ++region)
    first_block_.push_back(first_block_.back() + ceil_div(pixels(conv, region), kBlock));
}

size_t Regions::bytes() const {
  return (rows_.size() + columns_.size()) * sizeof(Span) + first_block_.size() * sizeof(int64_t);
}

int64_t Regions::pixels(const Conv& conv, size_t region) const {
  return conv.batch * rows_[region / columns_.size()].count * columns_[region % columns_.size()].count;
}

void Regions::place(const Conv& conv, int64_t block, Block& out) const {
  const auto found = std::upper_bound(first_block_.begin(), first_block_.end(), block) - 1;
  const auto region = static_cast<size_t>(found - first_block_.begin());
  const Span &rows = rows_[region / columns_.size()], &columns = columns_[region % columns_.size()];
  // Blocks of a region differ by one pixel at most.
  const int64_t blocks = found[1] - found[0], all = pixels(conv, region), first = all * (block - *found) / blocks;
  out.count = static_cast<int>(all * (block - *found + 1) / blocks - first);
  out.rows = &rows, out.columns = &columns;

  const int64_t step = conv.pooled ? 2 : 1;
  const int64_t height = conv.out_height / step, width = conv.out_width / step;
  int64_t column = first % columns.count, row = first / columns.count % rows.count;
  int64_t image = first / columns.count / rows.count;
  const uintptr_t x_step = times(step * conv.stride[1], conv.column_step);
  for (int i = 0; i < out.count;) {
    const int64_t oh = rows.first + row, ow = columns.first + column;
    const int64_t ih = oh * step * conv.stride[0], iw = ow * step * conv.stride[1];
    uintptr_t x = reinterpret_cast<uintptr_t>(conv.x) + times(image, conv.image_step) + times(ih, conv.row_step) +
                  times(iw, conv.column_step);
    int64_t y = ((image * height + oh) * width + ow) * conv.out_channels;
    int64_t residual = ((image * conv.out_height + oh * step) * conv.out_width + ow * step) * conv.out_channels;
    const int end = static_cast<int>(std::min<int64_t>(out.count, i + columns.count - column));
    for (; i < end; ++i) {
      out.x[i] = x, out.out[i] = y, out.residual[i] = residual;
      x += x_step, y += conv.out_channels, residual += step * conv.out_channels;
    }
    column = 0;
    if (++row < rows.count) continue;
    row = 0;
    ++image;
  }
  std::fill_n(out.x + out.count, max_pixels(1), out.x[out.count - 1]);
  std::fill_n(out.out + out.count, max_pixels(1), out.out[out.count - 1]);
  std::fill_n(out.residual + out.count, max_pixels(1), out.residual[out.count - 1]);
}

}  // namespace lhc

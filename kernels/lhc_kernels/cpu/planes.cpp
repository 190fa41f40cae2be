#include "planes.h"

#include <algorithm>

namespace lhc {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows of planes that `rows` output rows read, in one phase.
int64_t plane_rows(const Conv& conv, int64_t rows) {
  return rows + (conv.kernel[0] - 1) * conv.dilation[0] / conv.stride[0];
}

// Phases that the kernel's rows use: with stride 2 and dilation 2 all of them are even.
int64_t phase_count(const Conv& conv) {
  int64_t last = 0;
  for (int64_t r = 0; r < conv.kernel[0]; ++r)
    last = std::max(last, r * conv.dilation[0] % conv.stride[0]);
  return last + 1;
}

// Whether a run of so many pixels leaves less than an eighth of its vectors' lanes idle.
bool fills_vectors(int64_t pixels) { return ceil_div(pixels, kLanes) * kLanes * 8 <= pixels * 9; }

void clear_rows(const Planes& planes, const Group& group, int64_t width, int64_t first, int64_t end, float* out) {
  const int64_t pieces = planes.side_by_side ? 1 : group.images;
  const int64_t row = planes.side_by_side ? planes.row_step : width;
  for (int64_t n = 0; n < pieces; ++n, out += planes.image_step)
    std::fill(out + first * row, out + end * row, 0.0f);
}

// Whole cache lines, an odd number of them: planes a multiple of 4096 bytes apart would share a few cache
// sets. One vector of slack: narrow rows are written as whole vectors, and lanes past the last pixel are read.
int64_t plane_pitch(int64_t pixels) {
  return (ceil_div(pixels + kLanes, 16) | 1) * 16;
}

// A rectangle of a copy: up to kLanes columns of rows whose input rows exist.
struct Rectangle {
  int64_t outer, inner;                // rows of all images, in the order in which they lie in the copy
  int64_t outer_step, inner_step;      // of the input, in floats
  int64_t outer_pitch, inner_pitch;    // of the copy
  int64_t first, count, stride;        // input columns first, first + stride, ...
  Mask lanes, near, far;               // lanes to write; floats to read, of the first kLanes and of the next
};

// Copies a rectangle; columns that do not exist are zero.
template <int kStride>
void copy_rectangle(const Rectangle rectangle, int64_t input_width, const float* x, float* out) {
  const Rectangle& r = rectangle;
  for (int64_t i = 0; i < r.outer; ++i, x += r.outer_step, out += r.outer_pitch) {
    const float* from = x + r.first;
    float* to = out;
    for (int64_t n = 0; n < r.inner; ++n, from += r.inner_step, to += r.inner_pitch) {
      if constexpr (kFreeMasks && kStride == 1) {
        store(to, load(from, r.near), r.lanes);
      } else if constexpr (kFreeMasks && kStride == 2) {
        store(to, load_even(from, r.near, r.far), r.lanes);
      } else {
        for (int64_t j = 0, column = r.first; j < r.count; ++j, column += r.stride)
          to[j] = column >= 0 && column < input_width ? from[j * r.stride] : 0.0f;
      }
    }
  }
}

}  // namespace

bool keeps_layout(const Conv& conv) {
  const bool bordered = conv.kernel[0] * conv.kernel[1] > 1 || conv.top || conv.left;
  if (conv.stride[0] != 1 || conv.stride[1] != 1 || conv.out_width != conv.width) return false;
  // Without masks the last vector of a plane would read past the end of the input.
  if (!kFreeMasks && (bordered || conv.out_height * conv.out_width % kLanes)) return false;
  if (!bordered && conv.out_height != conv.height) return false;
  return conv.batch == 1 || fills_vectors(conv.out_height * conv.out_width);
}

bool reads_directly(const Conv& conv) {
  if (!keeps_layout(conv)) return false;
  const bool crowded = conv.height * conv.width % kCrowdedFloats == 0 && conv.kernel[0] * conv.kernel[1] > 1;
  if (!kSpreads || !crowded) return true;
  // A copy pays where each row is copied about once: the rows that a band shares with the next are few.
  const int64_t shared = (conv.kernel[0] - 1) * conv.dilation[0];
  return 2 * shared > std::min(conv.height, kPlanesFloats / (conv.channels * conv.width) - shared);
}

Planes plan_planes(const Conv& conv, const Group& group) {
  Planes planes{};
  planes.direct = reads_directly(conv);
  planes.keeps_layout = keeps_layout(conv);
  planes.run_pixels = group.rows * conv.out_width;
  planes.side_by_side = !planes.keeps_layout && group.images > 1 && !fills_vectors(planes.run_pixels);
  planes.runs = planes.side_by_side ? 1 : group.images;
  if (planes.direct) {
    planes.channel_step = conv.height * conv.width;
    planes.run_step = conv.channels * planes.channel_step;
  } else {
    planes.copies = planes.keeps_layout ? 1 : conv.kernel[1];
    planes.phases = phase_count(conv);
    planes.rows = plane_rows(conv, group.rows);
    planes.row_step = planes.side_by_side ? group.images * conv.out_width : conv.out_width;
    planes.image_step = planes.side_by_side ? conv.out_width : planes.rows * conv.out_width;
    planes.channel_step = plane_pitch(group.images * planes.rows * conv.out_width);
    planes.run_step = planes.image_step;
    if (planes.side_by_side) planes.run_pixels *= group.images;
  }

  const int64_t in_blocks = ceil_div(conv.channels, conv.in_block);
  for (int64_t r = 0; r < conv.kernel[0]; ++r) {
    for (int64_t s = 0; s < conv.kernel[1]; ++s) {
      const int64_t down = r * conv.dilation[0];
      int64_t offset;
      if (planes.direct) {
        offset = (down - conv.top) * conv.width + s * conv.dilation[1] - conv.left;
      } else if (planes.keeps_layout) {
        offset = down * planes.row_step + s * conv.dilation[1] - conv.left;
      } else {
        const int64_t copy = s * planes.phases + down % conv.stride[0];
        offset = copy * conv.channels * planes.channel_step + down / conv.stride[0] * planes.row_step;
      }
      for (int64_t b = 0; b < in_blocks; ++b) {
        const int64_t first = b * conv.in_block;
        const int64_t channels = std::min(conv.in_block, conv.channels - first);
        planes.steps.push_back({offset + first * planes.channel_step, static_cast<int32_t>(channels),
                                static_cast<int32_t>(r * conv.kernel[1] + s)});
      }
    }
  }
  return planes;
}

int64_t planes_size(const Conv& conv, const Group& group) {
  const int64_t pixels = plane_rows(conv, group.rows) * group.images * conv.out_width;
  const int64_t copies = keeps_layout(conv) ? 1 : conv.kernel[1];
  return copies * phase_count(conv) * conv.channels * plane_pitch(pixels);
}

void fill_channel(const Conv& conv, const Planes& planes, const Group& group, int64_t channel, float* data) {
  const int64_t image_size = conv.channels * conv.height * conv.width, stride = conv.stride[0];
  const float* x = conv.x + group.image * image_size + channel * conv.height * conv.width;
  Rectangle r{};
  r.stride = conv.stride[1];
  for (int64_t phase = 0; phase < planes.phases; ++phase) {
    // The plane's row i is the input's row i * stride + top.
    const int64_t top = group.row * stride + phase - conv.top;
    const int64_t above = std::clamp<int64_t>(top < 0 ? ceil_div(-top, stride) : 0, 0, planes.rows);
    const int64_t end =
        std::clamp<int64_t>(top < conv.height ? ceil_div(conv.height - top, stride) : 0, above, planes.rows);
    if (planes.side_by_side) {
      r.outer = end - above, r.outer_step = stride * conv.width, r.outer_pitch = planes.row_step;
      r.inner = group.images, r.inner_step = image_size, r.inner_pitch = planes.image_step;
    } else {
      r.outer = group.images, r.outer_step = image_size, r.outer_pitch = planes.image_step;
      r.inner = end - above, r.inner_step = stride * conv.width, r.inner_pitch = planes.row_step;
    }
    for (int64_t copy = 0; copy < planes.copies; ++copy) {
      float* out = data + ((copy * planes.phases + phase) * conv.channels + channel) * planes.channel_step;
      clear_rows(planes, group, conv.out_width, 0, above, out);
      clear_rows(planes, group, conv.out_width, end, planes.rows, out);
      if (planes.keeps_layout) {
        for (int64_t n = 0; n < group.images; ++n)
          std::copy_n(x + n * image_size + (above + top) * conv.width, (end - above) * conv.width,
                      out + n * planes.image_step + above * planes.row_step);
        continue;
      }
      for (int64_t begin = 0; begin < conv.out_width; begin += kLanes) {
        r.first = begin * r.stride + copy * conv.dilation[1] - conv.left;
        r.count = std::min<int64_t>(kLanes, conv.out_width - begin);
        // Rows that are less than a vector are written as a whole one, which is faster. What is too much is zero: rows
        // are written in ascending order over it, and rows of zeros were cleared before.
        r.lanes = first_lanes(conv.out_width < kLanes ? kLanes : r.count);
        const int64_t span = r.count * r.stride;
        r.near = first_lanes(span) & within(counting(), r.first, conv.width);
        r.far = first_lanes(std::max<int64_t>(span - kLanes, 0)) & within(counting(), r.first + kLanes, conv.width);
        const float* rows = x + (above * stride + top) * conv.width;
        float* to = out + above * planes.row_step + begin;
        if (r.stride == 1)
          copy_rectangle<1>(r, conv.width, rows, to);
        else if (r.stride == 2)
          copy_rectangle<2>(r, conv.width, rows, to);
        else
          copy_rectangle<0>(r, conv.width, rows, to);
      }
    }
  }
}

}  // namespace lhc

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

// Whole cache lines, an odd number of them: planes a multiple of 4096 bytes apart would share a few cache
// sets. One vector of slack: rows are written in whole vectors, and lanes past the last pixel are read.
int64_t plane_pitch(int64_t pixels) {
  return (ceil_div(pixels + kLanes, 16) | 1) * 16;
}

// Up to kLanes columns of every row of one copy, from column `begin` on: input columns first, first + stride, ...
struct Columns {
  int64_t begin, count, first, stride;
  Mask out, near, far;  // lanes to write; floats to read, of the first kLanes and of the next
};

Columns plan_columns(const Conv& conv, int64_t copy, int64_t begin) {
  Columns columns{begin, std::min<int64_t>(kLanes, conv.out_width - begin), 0, conv.stride[1], 0, 0, 0};
  columns.first = begin * conv.stride[1] + copy * conv.dilation[1] - conv.left;
  columns.out = first_lanes(columns.count);
  columns.near = within(counting(), columns.first, conv.width);
  columns.far = within(counting(), columns.first + kLanes, conv.width);
  return columns;
}

// Copies the columns of one input row; zero where they do not exist.
inline void copy_columns(const Conv& conv, const Columns& columns, const float* row, float* out) {
  const float* from = row + columns.first;
  if (kFreeMasks && columns.stride == 1) {
    store(out, load(from, columns.near), columns.out);
  } else if (kFreeMasks && columns.stride == 2) {
    store(out, load_even(from, columns.near, columns.far), columns.out);
  } else {
    for (int64_t j = 0; j < columns.count; ++j) {
      const int64_t column = columns.first + j * columns.stride;
      out[j] = column >= 0 && column < conv.width ? row[column] : 0.0f;
    }
  }
}

}  // namespace

bool reads_directly(const Conv& conv) {
  const bool bordered = conv.kernel[0] * conv.kernel[1] > 1 || conv.top || conv.left;
  if (conv.stride[0] != 1 || conv.stride[1] != 1 || conv.out_width != conv.width) return false;
  if (bordered && !kFreeMasks) return false;
  if (!bordered && conv.out_height != conv.height) return false;
  // A last vector of few pixels wastes the more, the smaller the image; past that, copying pays.
  const int64_t pixels = conv.out_height * conv.out_width;
  const int64_t lanes = ceil_div(pixels, kLanes) * kLanes;
  return conv.batch == 1 || lanes * 8 <= pixels * 9;
}

Planes plan_planes(const Conv& conv, const Group& group) {
  Planes planes{};
  planes.direct = reads_directly(conv);
  planes.copies = conv.kernel[1];
  planes.phases = phase_count(conv);
  planes.rows = plane_rows(conv, group.rows);
  planes.pitch = group.images * conv.out_width;
  planes.plane = plane_pitch(planes.rows * planes.pitch);
  planes.lanes = planes.direct ? conv.out_height * conv.out_width : group.rows * planes.pitch;
  planes.channel_step = planes.direct ? conv.height * conv.width : planes.plane;

  const int64_t in_blocks = ceil_div(conv.channels, conv.in_block);
  for (int64_t r = 0; r < conv.kernel[0]; ++r) {
    for (int64_t s = 0; s < conv.kernel[1]; ++s) {
      const int64_t down = r * conv.dilation[0];
      int64_t offset;
      if (planes.direct) {
        offset = (down - conv.top) * conv.width + s * conv.dilation[1] - conv.left;
      } else {
        const int64_t copy = s * planes.phases + down % conv.stride[0];
        offset = copy * conv.channels * planes.plane + down / conv.stride[0] * planes.pitch;
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
  if (reads_directly(conv)) return 0;
  const int64_t pixels = plane_rows(conv, group.rows) * group.images * conv.out_width;
  return conv.kernel[1] * phase_count(conv) * conv.channels * plane_pitch(pixels);
}

void fill_channel(const Conv& conv, const Planes& planes, const Group& group, int64_t channel, float* data) {
  const int64_t image_size = conv.channels * conv.height * conv.width;
  const float* x = conv.x + group.image * image_size + channel * conv.height * conv.width;
  for (int64_t copy = 0; copy < planes.copies; ++copy) {
    float* base = data + (copy * planes.phases * conv.channels + channel) * planes.plane;
    // Columns outside, rows inside: what depends on the columns is worked out once for all narrow rows.
    for (int64_t begin = 0; begin < conv.out_width; begin += kLanes) {
      const Columns columns = plan_columns(conv, copy, begin);
      for (int64_t phase = 0; phase < planes.phases; ++phase) {
        for (int64_t i = 0; i < planes.rows; ++i) {
          float* out = base + phase * conv.channels * planes.plane + i * planes.pitch + begin;
          const int64_t row = (group.row + i) * conv.stride[0] + phase - conv.top;
          if (row < 0 || row >= conv.height) {
            if (begin == 0) std::fill(out, out + planes.pitch, 0.0f);
            continue;
          }
          for (int64_t n = 0; n < group.images; ++n)
            copy_columns(conv, columns, x + n * image_size + row * conv.width, out + n * conv.out_width);
        }
      }
    }
  }
}

}  // namespace lhc

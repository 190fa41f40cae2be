#include "operands.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "vectors.h"

namespace lhc {
namespace {

// Sizes are multiplied in 64 bits, added and counted in 32.
constexpr int64_t kMaxSize = int64_t{1} << 30;

// An int8 product is at most 2^14: so many of them fit into int32.
constexpr int64_t kMostProducts = (int64_t{1} << 17) - 1;

bool is_served(at::ScalarType type) {
  return type == at::kFloat || type == at::kHalf || type == at::kBFloat16 || (kHasFours && type == at::kChar);
}

bool takes_pairs(const at::Tensor& weight, int64_t channels) {
  return kHasPairs && weight.scalar_type() == at::kBFloat16 && weight.size(1) % 2 == 0 && channels % 2 == 0;
}

// [E, in_block, tile_width] as [E, in_block / 2, tile_width, 2], and back.
at::Tensor in_pairs_of(const at::Tensor& weight) {
  return weight.reshape({weight.size(0), weight.size(1) / 2, 2, weight.size(2)}).transpose(2, 3).contiguous();
}
at::Tensor out_of_pairs(const at::Tensor& weight) {
  return weight.transpose(2, 3).reshape({weight.size(0), weight.size(1) * 2, weight.size(2)});
}

at::Tensor in_fours_of(const at::Tensor& weight) {
  const int64_t entries = weight.size(0), rows = (weight.size(1) + 3) / 4, width = weight.size(2);
  const at::Tensor padded = at::zeros({entries, rows * 4, width}, weight.options());
  padded.narrow(1, 0, weight.size(1)).copy_(weight);
  const at::Tensor fours = padded.view({entries, rows, 4, width}).transpose(2, 3);
  const at::Tensor sums = at::empty({entries, 1, width}, weight.options().dtype(at::kInt));
  sums.copy_(weight.sum(at::IntArrayRef{1}, true, at::kInt).mul(-128));
  return at::cat({fours, sums.view(at::kChar).view({entries, 1, width, 4})}, 1);
}

// Whether all elements lie inside the storage, which may have been resized.
bool is_whole(const at::Tensor& t) {
  if (t.numel() == 0) return true;
  int64_t last = t.storage_offset(), reach = 0;
  for (int64_t i = 0; i < t.dim(); ++i)
    if (__builtin_mul_overflow(t.size(i) - 1, t.stride(i), &reach) || __builtin_add_overflow(last, reach, &last))
      return false;
  return last < static_cast<int64_t>(t.storage().nbytes() / t.itemsize());
}

template <size_t N>
bool read_list(const c10::IValue& value, int64_t least, int64_t (&out)[N]) {
  const auto list = value.toIntList();
  if (list.size() != N) return false;
  for (size_t i = 0; i < N; ++i)
    if ((out[i] = list.get(i)) < least || out[i] > kMaxSize) return false;
  return true;
}

bool read_vector(const c10::IValue& value, const Call& call, at::Tensor& kept, const float*& out) {
  if (value.isNone()) return true;
  const at::Tensor& given = value.toTensor();
  const int64_t count = call.conv.out_channels;
  if (!is_host(given) || given.scalar_type() != call.result || given.dim() != 1 || given.size(0) != count) return false;
  kept = given.to(at::kFloat).contiguous();
  out = kept.const_data_ptr<float>();
  return true;
}

// A copy behind which three bytes more may be read.
at::Tensor with_room(const at::Tensor& t) {
  const int64_t c = t.size(1), h = t.size(2), w = t.size(3);
  const at::Tensor memory = at::empty({t.numel() + 3}, t.options());
  return memory.as_strided(t.sizes(), {h * w * c, 1, w * c, c}).copy_(t);
}

// All but the tables' values.
bool read_tables(const c10::IValue& value, Call& call) {
  const auto tables = value.toListRef();
  if (tables.size() != 3) return false;
  for (size_t i = 0; i < 3; ++i) {
    call.tables[i] = tables[i].toTensor();
    if (!is_host(call.tables[i]) || call.tables[i].scalar_type() != at::kInt) return false;
  }
  Conv& conv = call.conv;
  conv.tiles = call.tables[0].numel() - 1;
  return call.tables[0].dim() == 1 && conv.tiles >= 0 &&
         call.tables[1].sizes() == c10::IntArrayRef({call.weight.size(0) + 1}) &&
         call.tables[2].sizes() == c10::IntArrayRef({conv.tiles, conv.tile_width});
}

// The output's size, before pooling.
bool read_geometry(const torch::jit::Stack& stack, Conv& conv) {
  const auto argument = [&](Argument i) -> const c10::IValue& { return torch::jit::peek(stack, i, kArguments); };
  int64_t padding[4];
  if (!read_list(argument(kKernelSize), 1, conv.kernel) || !read_list(argument(kStride), 1, conv.stride) ||
      !read_list(argument(kDilation), 1, conv.dilation) || !read_list(argument(kPadding), 0, padding))
    return false;
  conv.top = padding[0], conv.left = padding[2];
  const int64_t rows = conv.height + padding[0] + padding[1] - conv.dilation[0] * (conv.kernel[0] - 1) - 1;
  const int64_t columns = conv.width + padding[2] + padding[3] - conv.dilation[1] * (conv.kernel[1] - 1) - 1;
  if (rows < 0 || columns < 0) return false;
  conv.out_height = rows / conv.stride[0] + 1, conv.out_width = columns / conv.stride[1] + 1;
  return std::max(conv.out_height, conv.out_width) <= kMaxSize;
}

bool read_step(const c10::IValue& value, Conv& conv) {
  if (value.isNone()) return true;
  const at::Tensor& given = value.toTensor();
  if (conv.unit != 4 || !is_host(given) || given.scalar_type() != at::kFloat || given.numel() != 1) return false;
  conv.out_factor = 1.0f / *given.const_data_ptr<float>();
  return conv.out_factor != 0;
}

bool read_epilogue(const torch::jit::Stack& stack, Call& call) {
  const auto argument = [&](Argument i) -> const c10::IValue& { return torch::jit::peek(stack, i, kArguments); };
  Conv& conv = call.conv;
  const auto &activation = argument(kActivation).toStringRef(), &pool = argument(kPool).toStringRef();
  conv.activation = activation == "relu"   ? Activation::kRelu
                    : activation == "silu" ? Activation::kSilu
                                           : Activation::kNone;
  conv.pooled = pool == "max2x2";
  if ((conv.activation == Activation::kNone && activation != "none") || (!conv.pooled && pool != "none") ||
      (conv.pooled && (conv.out_height < 2 || conv.out_width < 2)))
    return false;
  return read_vector(argument(kBias), call, call.bias, conv.bias) &&
         read_vector(argument(kScale), call, call.scale, conv.scale) && (conv.unit != 4 || conv.scale) &&
         read_step(argument(kOutStep), conv);
}

bool read_residual(const c10::IValue& value, Call& call) {
  if (value.isNone()) return true;
  const Conv& conv = call.conv;
  const at::Tensor& given = value.toTensor();
  if (!is_host(given) || given.scalar_type() != call.result ||
      given.sizes() != c10::IntArrayRef({conv.batch, conv.out_channels, conv.out_height, conv.out_width}))
    return false;
  const auto type = conv.unit == 2 ? at::kBFloat16 : at::kFloat;
  const int64_t row = conv.out_width * conv.out_channels;
  const bool fits = given.strides() == c10::IntArrayRef({conv.out_height * row, 1, row, conv.out_channels});
  call.residual = fits && given.scalar_type() == type ? given : converted(given, type);
  call.conv.residual = call.residual.const_data_ptr();
  return true;
}

bool read_fours(const at::Tensor& given, Call& call) {
  call.conv.unit = 4;
  if (given.dim() == 4 && given.size(3) == 4 && given.size(1) > 1) {
    call.weight = given.contiguous();
    call.conv.in_block = (given.size(1) - 1) * 4;
  } else if (given.dim() == 3) {
    call.weight = in_fours_of(given);
    call.conv.in_block = given.size(1);
  } else {
    return false;
  }
  call.own_weight = !call.weight.is_same(given);
  call.conv.tile_width = given.size(2);
  return true;
}

// Four kinds of weight: as packed, in x's type; prepared, in float32; prepared, in pairs; prepared, in fours.
bool read_weight(const at::Tensor& given, Call& call) {
  const at::ScalarType type = given.scalar_type();
  if (!is_host(given) || (type != call.type && (type != at::kFloat || call.type == at::kChar))) return false;
  if (type == at::kChar) return read_fours(given, call);
  if (given.dim() == 4 && type == at::kBFloat16 && given.size(3) == 2)
    call.weight = kHasPairs && call.conv.channels % 2 == 0 ? given.contiguous()
                                                           : prepare_weight(out_of_pairs(given), call.conv.channels);
  else if (given.dim() == 3)
    call.weight = prepare_weight(given, call.conv.channels);
  else
    return false;
  call.own_weight = !call.weight.is_same(given);
  call.conv.unit = call.weight.dim() == 4 ? 2 : 1;
  call.conv.in_block = call.weight.size(1) * call.conv.unit, call.conv.tile_width = call.weight.size(2);
  return true;
}

}  // namespace

bool is_host(const at::Tensor& t) { return t.device().is_cpu() && t.layout() == at::kStrided && is_whole(t); }

at::Tensor converted(const at::Tensor& t, at::ScalarType type) {
  const auto format = at::MemoryFormat::ChannelsLast;
  return at::empty(t.sizes(), t.options().dtype(type).memory_format(format)).copy_(t);
}

at::Tensor prepare_weight(const at::Tensor& weight, int64_t channels) {
  TORCH_CHECK(weight.dim() == 3 && is_host(weight) && is_served(weight.scalar_type()), "native_weight: the weight is ",
              weight.scalar_type(), " of ", weight.dim(),
              " dimensions; expected [E, in_block, tile_width] in float32, float16, bfloat16 or, where the processor "
              "has VNNI, int8, in host memory");
  if (weight.scalar_type() == at::kChar) return weight.size(1) % 4 == 0 ? in_fours_of(weight) : weight;
  return takes_pairs(weight, channels) ? in_pairs_of(weight) : weight.to(at::kFloat).contiguous();
}

bool read(const torch::jit::Stack& stack, Call& call) {
  const auto argument = [&](Argument i) -> const c10::IValue& { return torch::jit::peek(stack, i, kArguments); };
  Conv& conv = call.conv;
  const at::Tensor &x = argument(kX).toTensor(), &weight = argument(kWeight).toTensor();
  call.type = x.scalar_type(), call.result = call.type == at::kChar ? at::kFloat : call.type;
  if (!is_served(call.type) || !is_host(x) || x.dim() != 4) return false;
  for (int64_t size : x.sizes())
    if (size > kMaxSize) return false;
  conv.batch = x.size(0), conv.channels = x.size(1), conv.height = x.size(2), conv.width = x.size(3);

  if (!read_weight(weight, call)) return false;
  conv.out_channels = argument(kOutChannels).toInt();
  for (int64_t size : {conv.channels, conv.in_block, conv.tile_width, conv.out_channels})
    if (size < 1 || size > kMaxSize) return false;
  if (!read_geometry(stack, conv) || !read_tables(argument(kTables), call) || !read_epilogue(stack, call) ||
      !read_residual(argument(kResidual), call))
    return false;

  if (conv.unit == 4 && conv.kernel[0] * conv.kernel[1] > kMostProducts / conv.channels) return false;
  const auto type = conv.unit == 4 ? at::kChar : conv.unit == 2 ? at::kBFloat16 : at::kFloat;
  const bool adjacent = x.stride(1) == 1 || conv.channels == 1;
  if (conv.unit == 4 && (conv.channels % 4 != 0 || conv.in_block % 4 != 0))
    call.x = with_room(x);
  else
    call.x = adjacent && call.type == type ? x : converted(x, type);
  const int64_t bytes = call.x.itemsize();
  conv.image_step = call.x.stride(0) * bytes, conv.row_step = call.x.stride(2) * bytes;
  conv.column_step = call.x.stride(3) * bytes;
  conv.x = call.x.const_data_ptr(), conv.weight = call.weight.const_data_ptr();
  return true;
}

}  // namespace lhc

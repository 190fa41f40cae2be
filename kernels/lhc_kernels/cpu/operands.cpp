#include "operands.h"

#include <ATen/ops/empty.h>

#include <algorithm>

#include "vectors.h"

namespace lhc {
namespace {

// Sizes are multiplied in 64 bits, added and counted in 32.
constexpr int64_t kMaxSize = int64_t{1} << 30;

bool is_served(at::ScalarType type) { return type == at::kFloat || type == at::kHalf || type == at::kBFloat16; }

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

// Whether all elements lie inside the storage, which may have been resized.
bool is_whole(const at::Tensor& t) {
  if (t.numel() == 0) return true;
  int64_t last = t.storage_offset(), reach = 0;
  for (int64_t i = 0; i < t.dim(); ++i)
    if (__builtin_mul_overflow(t.size(i) - 1, t.stride(i), &reach) || __builtin_add_overflow(last, reach, &last))
      return false;
  return last < static_cast<int64_t>(t.storage().nbytes() / t.itemsize());
}

bool is_host(const at::Tensor& t) { return t.device().is_cpu() && t.layout() == at::kStrided && is_whole(t); }

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
  if (!is_host(given) || given.scalar_type() != call.type || given.dim() != 1 || given.size(0) != count) return false;
  kept = given.to(at::kFloat).contiguous();
  out = kept.const_data_ptr<float>();
  return true;
}

// The tensor in another type, its channels adjacent.
at::Tensor converted(const at::Tensor& t, at::ScalarType type) {
  const auto format = at::MemoryFormat::ChannelsLast;
  return at::empty(t.sizes(), t.options().dtype(type).memory_format(format)).copy_(t);
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
         read_vector(argument(kScale), call, call.scale, conv.scale);
}

bool read_residual(const c10::IValue& value, Call& call) {
  if (value.isNone()) return true;
  const Conv& conv = call.conv;
  const at::Tensor& given = value.toTensor();
  if (!is_host(given) || given.scalar_type() != call.type ||
      given.sizes() != c10::IntArrayRef({conv.batch, conv.out_channels, conv.out_height, conv.out_width}))
    return false;
  const auto type = conv.pairs ? at::kBFloat16 : at::kFloat;
  const int64_t row = conv.out_width * conv.out_channels;
  const bool fits = given.strides() == c10::IntArrayRef({conv.out_height * row, 1, row, conv.out_channels});
  call.residual = fits && given.scalar_type() == type ? given : converted(given, type);
  call.conv.residual = call.residual.const_data_ptr();
  return true;
}

// Three kinds of weight: as packed, in x's type; prepared, in float32; prepared, in pairs.
bool read_weight(const at::Tensor& given, Call& call) {
  const at::ScalarType type = given.scalar_type();
  if (!is_host(given) || (type != call.type && type != at::kFloat)) return false;
  if (given.dim() == 4 && type == at::kBFloat16 && given.size(3) == 2)
    call.weight = kHasPairs && call.conv.channels % 2 == 0 ? given.contiguous()
                                                           : prepare_weight(out_of_pairs(given), call.conv.channels);
  else if (given.dim() == 3)
    call.weight = prepare_weight(given, call.conv.channels);
  else
    return false;
  call.own_weight = !call.weight.is_same(given);
  call.conv.pairs = call.weight.dim() == 4;
  call.conv.in_block = call.weight.size(1) * (call.conv.pairs ? 2 : 1), call.conv.tile_width = call.weight.size(2);
  return true;
}

}  // namespace

at::Tensor prepare_weight(const at::Tensor& weight, int64_t channels) {
  TORCH_CHECK(weight.dim() == 3 && is_host(weight) && is_served(weight.scalar_type()), "native_weight: the weight is ",
              weight.scalar_type(), " of ", weight.dim(),
              " dimensions; expected [E, in_block, tile_width] in float32, float16 or bfloat16, in host memory");
  return takes_pairs(weight, channels) ? in_pairs_of(weight) : weight.to(at::kFloat).contiguous();
}

bool read(const torch::jit::Stack& stack, Call& call) {
  const auto argument = [&](Argument i) -> const c10::IValue& { return torch::jit::peek(stack, i, kArguments); };
  Conv& conv = call.conv;
  const at::Tensor &x = argument(kX).toTensor(), &weight = argument(kWeight).toTensor();
  call.type = x.scalar_type();
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

  const auto type = conv.pairs ? at::kBFloat16 : at::kFloat;
  const bool adjacent = x.stride(1) == 1 || conv.channels == 1;
  call.x = adjacent && call.type == type ? x : converted(x, type);
  const int64_t bytes = call.x.itemsize();
  conv.image_step = call.x.stride(0) * bytes, conv.row_step = call.x.stride(2) * bytes;
  conv.column_step = call.x.stride(3) * bytes;
  conv.x = call.x.const_data_ptr(), conv.weight = call.weight.const_data_ptr();
  return true;
}

}  // namespace lhc

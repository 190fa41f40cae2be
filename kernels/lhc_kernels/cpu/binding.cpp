// The CPU implementation of torch.ops.lhc.grouped_conv2d: runs backend "native" itself, and hands every other
// call to the Python implementation, which also words the complaint about a call that does not fit.

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/silu.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <vector>

#include "conv.h"
#include "pool.h"

namespace {

using Stack = torch::jit::Stack;

// The arguments in the schema's order.
enum Argument {
  kX, kWeight, kTables, kBias, kResidual, kScale, kOutChannels, kKernelSize, kStride, kPadding, kDilation,
  kActivation, kPool, kLayout, kBackend, kConfig, kArguments
};

void run_python(Stack* stack) {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("lhc::grouped_conv2d_python", "");
  op.callBoxed(stack);
}

struct Work {
  const std::function<void()>& run;
  std::exception_ptr error;
  std::atomic_flag failed = ATOMIC_FLAG_INIT;
};

void run_threads(int workers, const std::function<void()>& run) {
  // The stable function reaches torch's own pool; at::parallel_for is inlined here and, compiled without
  // OpenMP, would run serially. It reports a failure by a number, so the exception goes around it.
  Work work{run, nullptr};
  torch_parallel_for(
      0, workers, 1,
      [](int64_t, int64_t, void* context) {
        Work& work = *static_cast<Work*>(context);
        try {
          work.run();
        } catch (...) {
          if (!work.failed.test_and_set()) work.error = std::current_exception();
        }
      },
      &work);
  if (work.error) std::rethrow_exception(work.error);
}

bool is_host(const at::Tensor& t, at::ScalarType type) {
  return t.device().is_cpu() && t.layout() == at::kStrided && t.scalar_type() == type;
}

bool is_served(at::ScalarType type) {
  return type == at::kFloat || type == at::kHalf || type == at::kBFloat16;
}

// Contiguous and in float32, in which everything is computed; the tensor itself where it is that already.
at::Tensor computable(const at::Tensor& t) {
  return t.scalar_type() == at::kFloat && t.is_contiguous() ? t : t.to(at::kFloat).contiguous();
}

// Whether the values of the tables fit the layer: no index may reach foreign memory, and every filter must be
// computed once.
bool tables_fit(const lhc::Conv& conv, int64_t entry_count) {
  const int64_t possible =
      conv.kernel[0] * conv.kernel[1] * ((conv.channels + conv.in_block - 1) / conv.in_block);
  if (conv.tile_ptr[0] != 0 || conv.tile_ptr[conv.tiles] != entry_count) return false;
  for (int64_t t = 0; t < conv.tiles; ++t)
    if (conv.tile_ptr[t] > conv.tile_ptr[t + 1]) return false;
  for (int64_t e = 0; e < entry_count; ++e)
    if (conv.entries[e] < 0 || conv.entries[e] >= possible) return false;
  std::vector<bool> seen(conv.out_channels, false);
  int64_t found = 0;
  for (int64_t i = 0; i < conv.tiles * conv.tile_width; ++i) {
    const int32_t f = conv.filters[i];
    if (f < 0) continue;
    if (f >= conv.out_channels || seen[f]) return false;
    seen[f] = true;
    ++found;
  }
  return found == conv.out_channels;
}

// What a call keeps alive while it runs.
struct Call {
  lhc::Conv conv{};
  at::Tensor x, weight, tables[3], bias, scale, residual;
  at::ScalarType type = at::kFloat;  // of x and of the result
  bool silu = false, pooled = false, channels_last = false;
};

// Sizes are multiplied in 64 bits and added in 32.
constexpr int64_t kMaxSize = int64_t{1} << 30;

template <size_t N>
bool read_list(const c10::IValue& value, int64_t least, int64_t (&out)[N]) {
  const auto list = value.toIntList();
  if (list.size() != N) return false;
  for (size_t i = 0; i < N; ++i)
    if ((out[i] = list.get(i)) < least || out[i] > kMaxSize) return false;
  return true;
}

bool read_optional(const c10::IValue& value, at::ScalarType type, c10::IntArrayRef shape, at::Tensor& kept,
                   const float*& out) {
  if (value.isNone()) return true;
  const at::Tensor& given = value.toTensor();
  if (!is_host(given, type) || given.sizes() != shape) return false;
  kept = computable(given);
  out = kept.const_data_ptr<float>();
  return true;
}

// Reads the arguments of a native call; false where they do not fit.
bool read(const Stack& stack, Call& call) {
  const auto argument = [&](Argument i) -> const c10::IValue& { return torch::jit::peek(stack, i, kArguments); };
  lhc::Conv& conv = call.conv;
  const at::Tensor &x = argument(kX).toTensor(), &weight = argument(kWeight).toTensor();
  call.type = x.scalar_type();
  if (!is_served(call.type) || !is_host(x, call.type) || x.dim() != 4) return false;
  if (!is_host(weight, call.type) || weight.dim() != 3) return false;
  conv.batch = x.size(0), conv.channels = x.size(1), conv.height = x.size(2), conv.width = x.size(3);
  conv.in_block = weight.size(1), conv.tile_width = weight.size(2);
  conv.out_channels = argument(kOutChannels).toInt();
  if (conv.channels < 1 || conv.in_block < 1 || conv.tile_width < 1 || conv.out_channels < 1) return false;

  int64_t padding[4];
  if (!read_list(argument(kKernelSize), 1, conv.kernel) || !read_list(argument(kStride), 1, conv.stride) ||
      !read_list(argument(kDilation), 1, conv.dilation) || !read_list(argument(kPadding), 0, padding))
    return false;
  conv.top = padding[0], conv.left = padding[2];
  const int64_t rows = conv.height + padding[0] + padding[1] - conv.dilation[0] * (conv.kernel[0] - 1) - 1;
  const int64_t columns = conv.width + padding[2] + padding[3] - conv.dilation[1] * (conv.kernel[1] - 1) - 1;
  if (rows < 0 || columns < 0 || std::max(rows, columns) >= kMaxSize) return false;
  conv.out_height = rows / conv.stride[0] + 1, conv.out_width = columns / conv.stride[1] + 1;

  const auto tables = argument(kTables).toTensorVector();
  if (tables.size() != 3) return false;
  for (int i = 0; i < 3; ++i) {
    if (!is_host(tables[i], at::kInt)) return false;
    call.tables[i] = tables[i].contiguous();
  }
  const int64_t entries = weight.size(0), tiles = tables[0].numel() - 1;
  if (tables[0].dim() != 1 || tiles < 0 || tables[1].sizes() != c10::IntArrayRef({entries + 1}) ||
      tables[2].sizes() != c10::IntArrayRef({tiles, conv.tile_width}))
    return false;
  conv.tiles = tiles;
  conv.tile_ptr = call.tables[0].const_data_ptr<int32_t>();
  conv.entries = call.tables[1].const_data_ptr<int32_t>();
  conv.filters = call.tables[2].const_data_ptr<int32_t>();
  if (!tables_fit(conv, entries)) return false;

  const auto &activation = argument(kActivation).toStringRef(), &pool = argument(kPool).toStringRef();
  const auto& layout = argument(kLayout).toStringRef();
  conv.relu = activation == "relu";
  call.silu = activation == "silu";
  call.pooled = pool == "max2x2";
  call.channels_last = layout == "channels_last";
  if ((!conv.relu && !call.silu && activation != "none") || (!call.pooled && pool != "none") ||
      (!call.channels_last && layout != "contiguous") ||
      (call.pooled && (conv.out_height < 2 || conv.out_width < 2)))
    return false;
  if (!read_optional(argument(kBias), call.type, {conv.out_channels}, call.bias, conv.bias) ||
      !read_optional(argument(kScale), call.type, {conv.out_channels}, call.scale, conv.scale) ||
      !read_optional(argument(kResidual), call.type,
                     {conv.batch, conv.out_channels, conv.out_height, conv.out_width}, call.residual, conv.residual))
    return false;
  call.x = computable(x), call.weight = computable(weight);
  conv.x = call.x.const_data_ptr<float>(), conv.weight = call.weight.const_data_ptr<float>();
  return true;
}

void grouped_conv2d(const c10::OperatorHandle&, c10::DispatchKeySet, Stack* stack) {
  Call call;
  if (torch::jit::peek(*stack, kBackend, kArguments).toStringRef() != "native" || !read(*stack, call))
    return run_python(stack);
  lhc::Conv& conv = call.conv;
  const auto options = call.x.options();
  uint32_t count = 1;
  torch_get_num_threads(&count);
  const lhc::Threads threads{static_cast<int>(count), run_threads};
  const auto empty = [&](int64_t height, int64_t width) {
    return at::empty({conv.batch, conv.out_channels, height, width}, options);
  };
  const int64_t pooled_height = conv.out_height / 2, pooled_width = conv.out_width / 2;
  at::Tensor y;
  if (call.pooled && !call.silu && lhc::pools_in_bands(conv)) {
    y = empty(pooled_height, pooled_width);
    conv.y = y.mutable_data_ptr<float>();
    lhc::pooled_conv2d(conv, threads);
  } else {
    y = empty(conv.out_height, conv.out_width);
    conv.y = y.mutable_data_ptr<float>();
    lhc::grouped_conv2d(conv, threads);
    if (call.silu) at::silu_(y);
    if (call.pooled) {
      const at::Tensor pooled = empty(pooled_height, pooled_width);
      lhc::max_pool_2x2(conv.y, conv.batch * conv.out_channels, conv.out_height, conv.out_width,
                        pooled.mutable_data_ptr<float>(), pooled_height * pooled_width, threads);
      y = pooled;
    }
  }
  const auto format = call.channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  if (call.channels_last || call.type != at::kFloat)
    y = at::empty(y.sizes(), options.dtype(call.type).memory_format(format)).copy_(y);
  torch::jit::drop(*stack, kArguments);
  torch::jit::push(*stack, std::move(y));
}

}  // namespace

TORCH_LIBRARY_IMPL(lhc, CPU, library) {
  library.impl("grouped_conv2d", torch::CppFunction::makeFromBoxedFunction<&grouped_conv2d>());
}

// From the operator's boxed arguments to a Conv whose every size and pointer has been checked, and to its tables'
// indices, which are checked when they are prepared.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/stack.h>

#include <memory>

#include "prepared.h"

namespace lhc {

// The operator's arguments in the schema's order.
enum Argument {
  kX,
  kWeight,
  kTables,
  kBias,
  kResidual,
  kScale,
  kOutChannels,
  kKernelSize,
  kStride,
  kPadding,
  kDilation,
  kActivation,
  kPool,
  kBackend,
  kConfig,
  kArguments
};

// What a call keeps alive while it runs.
struct Call {
  Conv conv{};
  at::Tensor x, weight, residual, bias, scale;
  at::Tensor tables[3];              // as the operator is given them: tile_ptr, entries, filters
  at::ScalarType type = at::kFloat;  // of the operator's x and result
  bool own_weight = false;           // whether `weight` is another tensor than the operator is given
};

// Reads the arguments of a native call, all but the values of its tables; false where they do not fit.
bool read(const torch::jit::Stack& stack, Call& call);

// Checks and decodes the tables' values, or finds what an earlier call with these very tensors and sizes has decoded
// (by the tensors' identity and version); null where they do not fit the layer.
std::shared_ptr<const Prepared> prepare(const Call& call);

// [E, in_block, tile_width] in float32, float16 or bfloat16 as this processor's kernel reads it fastest for inputs of
// so many channels: in float32, or bfloat16 in pairs of channels, [E, in_block / 2, tile_width, 2].
at::Tensor prepare_weight(const at::Tensor& weight, int64_t channels);

}  // namespace lhc

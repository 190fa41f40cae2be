// From the operator's boxed arguments to a Conv whose every size, index and pointer has been checked.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/stack.h>

#include <vector>

#include "conv.h"

namespace lhc {

// The operator's arguments in the schema's order.
enum Argument {
  kX, kWeight, kTables, kBias, kResidual, kScale, kOutChannels, kKernelSize, kStride, kPadding, kDilation,
  kActivation, kPool, kBackend, kConfig, kArguments
};

// What a call keeps alive while it runs.
struct Call {
  Conv conv{};
  at::Tensor x, weight, residual;
  std::vector<int32_t> tables[3];    // copies: the tensors may be written to while the call runs
  std::vector<float> bias, scale;
  at::ScalarType type = at::kFloat;  // of the operator's x and result
};

// Reads the arguments of a native call; false where they do not fit.
bool read(const torch::jit::Stack& stack, Call& call);

// [E, in_block, tile_width] in float32, float16 or bfloat16 as this processor's kernel reads it fastest for inputs of
// so many channels: in float32, or bfloat16 in pairs of channels, [E, in_block / 2, tile_width, 2].
at::Tensor prepare_weight(const at::Tensor& weight, int64_t channels);

}  // namespace lhc

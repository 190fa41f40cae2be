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
  kOutStep,
  kArguments
};

// What a call keeps alive while it runs.
struct Call {
  Conv conv{};
  at::Tensor x, weight, residual, bias, scale;
  at::Tensor tables[3];                // as the operator is given them: tile_ptr, entries, filters
  at::ScalarType type = at::kFloat;    // of the operator's x
  at::ScalarType result = at::kFloat;  // and of its bias, residual and result, if that does not stay in int8
  bool own_weight = false;             // whether `weight` is another tensor than the operator is given
};

// Reads the arguments of a native call, all but the values of its tables; false where they do not fit.
bool read(const torch::jit::Stack& stack, Call& call);

// Checks and decodes the tables' values, or finds what an earlier call with these very tensors and sizes has decoded
// (by the tensors' identity and version); null where they do not fit the layer.
std::shared_ptr<const Prepared> prepare(const Call& call);

// [E, in_block, tile_width] in float32, float16, bfloat16 or int8 as this processor's kernel reads it fastest for
// inputs of so many channels: in float32; bfloat16 in pairs of channels, [E, in_block / 2, tile_width, 2]; int8 in
// fours and with sums, [E, in_block / 4 + 1, tile_width, 4], as it is where 4 does not divide in_block. See Conv.
at::Tensor prepare_weight(const at::Tensor& weight, int64_t channels);

// The tensor in another type, its channels adjacent; [N, C, H, W].
at::Tensor converted(const at::Tensor& t, at::ScalarType type);

// Whether a tensor is dense, in host memory, and inside of its storage, which may have been resized.
bool is_host(const at::Tensor& t);

}  // namespace lhc

// The CPU implementation of torch.ops.lhc.grouped_conv2d: runs backend "native" itself, and hands every other
// call to the Python implementation, which also words the complaint about a call that does not fit.

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/library.h>

#include <atomic>
#include <exception>

#include "operands.h"
#include "quantise.h"
#include "vectors.h"

namespace {

void run_python(torch::jit::Stack* stack) {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("lhc::grouped_conv2d_python", "");
  op.callBoxed(stack);
}

struct Work {
  const std::function<void(int)>& run;
  std::exception_ptr error;
  std::atomic_flag failed = ATOMIC_FLAG_INIT;
};

void run_threads(int workers, const std::function<void(int)>& run) {
  // The stable function reaches torch's own pool; at::parallel_for is inlined here and, compiled without
  // OpenMP, would run serially. It reports a failure by a number, so the exception goes around it.
  Work work{run, nullptr};
  torch_parallel_for(
      0, workers, 1,
      [](int64_t begin, int64_t end, void* context) {
        Work& work = *static_cast<Work*>(context);
        try {
          for (int64_t worker = begin; worker < end; ++worker) work.run(static_cast<int>(worker));
        } catch (...) {
          if (!work.failed.test_and_set()) work.error = std::current_exception();
        }
      },
      &work);
  if (work.error) std::rethrow_exception(work.error);
}

lhc::Threads own_threads() {
  uint32_t count = 1;
  torch_get_num_threads(&count);
  return {static_cast<int>(count), run_threads};
}

at::Tensor quantise(const at::Tensor& x, const at::Tensor& step) {
  TORCH_CHECK(
      x.dim() == 4 && lhc::is_host(x) && lhc::is_host(step) && step.scalar_type() == at::kFloat && step.numel() == 1,
      "quantise: expected x [N, C, H, W] and a step of one float32, in host memory");
  const auto format = at::MemoryFormat::ChannelsLast;
  const bool fits = x.scalar_type() == at::kFloat && x.is_contiguous(format);
  const at::Tensor values = fits ? x : lhc::converted(x, at::kFloat);
  at::Tensor y = at::empty(x.sizes(), x.options().dtype(at::kChar).memory_format(format));
  lhc::quantise(values.const_data_ptr<float>(), y.mutable_data_ptr<int8_t>(), x.numel(),
                1.0f / *step.const_data_ptr<float>(), own_threads());
  return y;
}

// What the kernel writes.
at::ScalarType kept_type(const lhc::Conv& conv) {
  return conv.unit == 2 ? at::kBFloat16 : conv.out_factor != 0 ? at::kChar : at::kFloat;
}

void grouped_conv2d(const c10::OperatorHandle&, c10::DispatchKeySet, torch::jit::Stack* stack) {
  lhc::Call call;
  if (torch::jit::peek(*stack, lhc::kBackend, lhc::kArguments).toStringRef() != "native" || !lhc::read(*stack, call))
    return run_python(stack);
  const auto prepared = lhc::prepare(call);
  if (!prepared) return run_python(stack);
  lhc::Conv& conv = call.conv;
  const int64_t step = conv.pooled ? 2 : 1;
  at::Tensor y = at::empty({conv.batch, conv.out_channels, conv.out_height / step, conv.out_width / step},
                           call.x.options().dtype(kept_type(conv)).memory_format(at::MemoryFormat::ChannelsLast));
  conv.y = y.mutable_data_ptr();
  if (conv.batch > 0) lhc::grouped_conv2d(conv, *prepared, own_threads());
  if (y.scalar_type() != at::kChar && y.scalar_type() != call.result) y = y.to(call.result);
  torch::jit::drop(*stack, lhc::kArguments);
  torch::jit::push(*stack, std::move(y));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(lhc, library) {
  library.def("native_weight(Tensor weight, int channels) -> Tensor");
  library.def("native_int8() -> bool", [] { return lhc::kHasFours; });
}

TORCH_LIBRARY_IMPL(lhc, CPU, library) {
  library.impl("grouped_conv2d", torch::CppFunction::makeFromBoxedFunction<&grouped_conv2d>());
  library.impl("native_weight", lhc::prepare_weight);
  library.impl("quantise", quantise);
}

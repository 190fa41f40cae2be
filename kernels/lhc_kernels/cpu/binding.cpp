// The CPU implementation of torch.ops.lhc.grouped_conv2d: runs backend "native" itself, and hands every other
// call to the Python implementation, which also words the complaint about a call that does not fit.

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/library.h>

#include <atomic>
#include <exception>

#include "operands.h"

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

void grouped_conv2d(const c10::OperatorHandle&, c10::DispatchKeySet, torch::jit::Stack* stack) {
  lhc::Call call;
  if (torch::jit::peek(*stack, lhc::kBackend, lhc::kArguments).toStringRef() != "native" || !lhc::read(*stack, call))
    return run_python(stack);
  const auto prepared = lhc::prepare(call);
  if (!prepared) return run_python(stack);
  lhc::Conv& conv = call.conv;
  uint32_t count = 1;
  torch_get_num_threads(&count);
  const int64_t step = conv.pooled ? 2 : 1;
  at::Tensor y = at::empty({conv.batch, conv.out_channels, conv.out_height / step, conv.out_width / step},
                           call.x.options().memory_format(at::MemoryFormat::ChannelsLast));
  conv.y = y.mutable_data_ptr();
  if (conv.batch > 0) lhc::grouped_conv2d(conv, *prepared, {static_cast<int>(count), run_threads});
  if (y.scalar_type() != call.type) y = y.to(call.type);
  torch::jit::drop(*stack, lhc::kArguments);
  torch::jit::push(*stack, std::move(y));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(lhc, library) { library.def("native_weight(Tensor weight, int channels) -> Tensor"); }

TORCH_LIBRARY_IMPL(lhc, CPU, library) {
  library.impl("grouped_conv2d", torch::CppFunction::makeFromBoxedFunction<&grouped_conv2d>());
  library.impl("native_weight", lhc::prepare_weight);
}

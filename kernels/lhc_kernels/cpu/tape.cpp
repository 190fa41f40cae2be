#include "tape.h"

#include <ATen/record_function.h>
#include <torch/library.h>

#include <algorithm>
#include <memory>
#include <unordered_map>
#include <unordered_set>

namespace lhc {

// Watches one thread. torch tells every observer of operators (its profiler is one) what is called with what;
// calls that an operator makes by itself come between its beginning and its end, and are not recorded.
class Recorder {
 public:
  Recorder(c10::intrusive_ptr<Tape> tape, const std::vector<at::Tensor>& inputs) : tape_(std::move(tape)) {
    for (const at::Tensor& input : inputs) slot_of(input);
    TORCH_CHECK(kept_.size() == inputs.size(), "an input is given twice");
    tape_->input_count_ = inputs.size();
    handle_ = at::addThreadLocalCallback(at::RecordFunctionCallback(&begin, &end)
                                             .needsInputs(true)
                                             .needsOutputs(true)
                                             .scopes({at::RecordScope::FUNCTION}));
  }

  ~Recorder() { at::removeCallback(handle_); }

  std::string finish(const std::vector<at::Tensor>& outputs, const std::vector<at::Tensor>& constants) {
    tape_->outputs_.clear();
    for (const at::Tensor& output : outputs) {
      const auto slot = slots_.find(output.unsafeGetTensorImpl());
      if (slot != slots_.end()) {
        tape_->outputs_.emplace_back(static_cast<int64_t>(slot->second));
      } else {
        note_constant(output, "the network");
        tape_->outputs_.emplace_back(output);
      }
    }
    tape_->slot_count_ = kept_.size();
    free_early();
    for (const at::Tensor& constant : constants) foreign_.erase(constant.unsafeGetTensorImpl());
    if (problem_.empty() && !foreign_.empty())
      problem_ = foreign_.begin()->second + " uses a tensor that is none of the network's";
    return problem_;
  }

  static thread_local std::unique_ptr<Recorder> current;

 private:
  // Calls without an operator's name are labels that somebody put around operators.
  static std::unique_ptr<at::ObserverContext> begin(const at::RecordFunction& call) {
    if (current && call.operator_name() && current->depth_++ == 0)
      current->arguments_.assign(call.inputs().begin(), call.inputs().end());
    return nullptr;
  }

  static void end(const at::RecordFunction& call, at::ObserverContext*) {
    if (!current || !call.operator_name() || --current->depth_ > 0) return;
    try {
      current->add(call);
    } catch (const std::exception& error) {  // torch would swallow it, and the call would be missing
      current->problem_ = error.what();
    }
  }

  void add(const at::RecordFunction& call) {
    const auto op = c10::Dispatcher::singleton().findSchema(*call.operator_name());
    TORCH_CHECK(op, "an operator that is not registered");
    const auto& returns = op->schema().returns();
    if (op->schema().arguments().size() != arguments_.size() || returns.size() != call.outputs().size())
      return refuse(*op);
    Tape::Step step{*op, std::move(arguments_), {}, {}, {}};
    for (size_t i = 0; i < step.constants.size(); ++i) {
      c10::IValue& value = step.constants[i];
      if (value.isTensor()) {
        if (place(step, value.toTensor(), i, -1)) value = c10::IValue();
      } else if (value.isTensorList()) {
        auto list = value.toTensorList().copy();
        for (size_t e = 0; e < list.size(); ++e)
          if (place(step, list.get(e), i, static_cast<int64_t>(e))) list.set(e, at::Tensor());
        value = list;
      } else if (value.isList() && has_tensors(value)) {
        return refuse(*op);
      }
    }
    for (const c10::IValue& value : call.outputs()) {
      if (!value.isTensor()) return refuse(*op);
      step.results.push_back(slot_of(value.toTensor()));
    }
    tape_->steps_.push_back(std::move(step));
  }

  void refuse(const c10::OperatorHandle& op) {
    if (problem_.empty()) problem_ = "its call of " + c10::toString(op.operator_name()) + " cannot be replayed";
  }

  static bool has_tensors(const c10::IValue& list) {
    const auto values = list.toListRef();
    return std::any_of(values.begin(), values.end(), [](const c10::IValue& v) { return v.isTensor(); });
  }

  bool place(Tape::Step& step, const at::Tensor& tensor, size_t argument, int64_t element) {
    if (!tensor.defined()) return false;
    const auto slot = slots_.find(tensor.unsafeGetTensorImpl());
    if (slot == slots_.end()) {
      note_constant(tensor, c10::toString(step.op.operator_name()));
      return false;
    }
    step.places.push_back({argument, element, slot->second});
    return true;
  }

  // Keeps in mind a tensor of unknown origin; a number that Python passed as a tensor is none.
  void note_constant(const at::Tensor& tensor, const std::string& user) {
    if (tensor.unsafeGetTensorImpl()->is_wrapped_number()) return;
    if (foreign_.emplace(tensor.unsafeGetTensorImpl(), user).second) strangers_.push_back(tensor);
  }

  size_t slot_of(const at::Tensor& tensor) {
    const auto [slot, is_new] = slots_.emplace(tensor.unsafeGetTensorImpl(), kept_.size());
    if (is_new) kept_.emplace_back(tensor.getIntrusivePtr());
    return slot->second;
  }

  // Tells every step which slots it is the last to read.
  void free_early() {
    std::unordered_set<size_t> needed;
    for (const c10::IValue& output : tape_->outputs_)
      if (output.isInt()) needed.insert(static_cast<size_t>(output.toInt()));
    for (auto step = tape_->steps_.rbegin(); step != tape_->steps_.rend(); ++step) {
      const auto release = [&](size_t slot) {
        if (needed.insert(slot).second) step->freed.push_back(slot);
      };
      for (size_t slot : step->results) release(slot);
      for (const Tape::Place& place : step->places) release(place.slot);
    }
  }

  c10::intrusive_ptr<Tape> tape_;
  at::CallbackHandle handle_;
  int64_t depth_ = 0;
  std::vector<c10::IValue> arguments_;
  // Held, so that no address is used twice; weakly, so that tensors give their memory back as soon as ever.
  std::vector<c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>> kept_;
  std::vector<at::Tensor> strangers_;
  std::unordered_map<const c10::TensorImpl*, size_t> slots_;
  std::unordered_map<const c10::TensorImpl*, std::string> foreign_;  // constants, and which operator uses them
  std::string problem_;
};

thread_local std::unique_ptr<Recorder> Recorder::current;

void Tape::start(std::vector<at::Tensor> inputs) {
  TORCH_CHECK(!Recorder::current, "this thread records already");
  TORCH_CHECK(steps_.empty(), "a tape is recorded once");
  Recorder::current = std::make_unique<Recorder>(c10::intrusive_ptr<Tape>::reclaim_copy(this), inputs);
}

std::string Tape::stop(std::vector<at::Tensor> outputs, std::vector<at::Tensor> constants) {
  TORCH_CHECK(Recorder::current, "this thread records nothing");
  const auto recorder = std::move(Recorder::current);  // ended, whatever happens now
  return recorder->finish(outputs, constants);
}

void Tape::abandon() { Recorder::current.reset(); }

std::vector<at::Tensor> Tape::run(std::vector<at::Tensor> inputs) const {
  TORCH_CHECK(inputs.size() == input_count_, "recorded with ", input_count_, " inputs, run with ", inputs.size());
  std::vector<at::Tensor> slots(slot_count_);
  std::move(inputs.begin(), inputs.end(), slots.begin());
  torch::jit::Stack stack;
  for (const Step& step : steps_) {
    stack = step.constants;
    for (const Place& place : step.places) {
      if (place.element < 0) {
        stack[place.argument] = slots[place.slot];
        continue;
      }
      auto list = stack[place.argument].toTensorList();
      if (list.is(step.constants[place.argument].toTensorList())) list = list.copy();
      list.set(static_cast<size_t>(place.element), slots[place.slot]);
      stack[place.argument] = list;
    }
    step.op.callBoxed(&stack);
    for (size_t i = 0; i < step.results.size(); ++i) slots[step.results[i]] = std::move(stack[i]).toTensor();
    stack.clear();
    for (size_t slot : step.freed) slots[slot].reset();
  }
  std::vector<at::Tensor> outputs;
  for (const c10::IValue& output : outputs_)
    outputs.push_back(output.isInt() ? slots[static_cast<size_t>(output.toInt())] : output.toTensor());
  return outputs;
}

TORCH_LIBRARY_FRAGMENT(lhc, library) {
  library.class_<Tape>("Tape")
      .def(torch::init<>())
      .def("start", &Tape::start)
      .def("stop", &Tape::stop)
      .def("abandon", &Tape::abandon)
      .def("run", &Tape::run);
}

}  // namespace lhc

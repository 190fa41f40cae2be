// A recording of the operators that a network calls, which calls them again without Python in between.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/custom_class.h>

#include <string>
#include <vector>

namespace lhc {

// Tensors made while a network runs, and its inputs, live in numbered slots; all else that an operator is given
// (weights, sizes, names) is a constant of the recording. Replaying is safe from several threads at once.
class Tape : public torch::CustomClassHolder {
 public:
  // Records what this thread calls from now on.
  void start(std::vector<at::Tensor> inputs);

  // Ends the recording. Returns why it cannot be replayed, or "" if it can: an operator was given, or the outputs
  // hold, a tensor that came neither from an input nor from an operator and is none of `constants`.
  std::string stop(std::vector<at::Tensor> outputs, std::vector<at::Tensor> constants);

  // Ends the recording after a failure: nothing can be replayed.
  void abandon();

  // Calls the recorded operators on inputs of the recorded shapes and types; returns the outputs.
  std::vector<at::Tensor> run(std::vector<at::Tensor> inputs) const;

 private:
  friend class Recorder;

  // An argument, or one element of a list of tensors, that comes from a slot.
  struct Place {
    size_t argument;
    int64_t element;  // -1: the argument itself
    size_t slot;
  };

  struct Step {
    c10::OperatorHandle op;
    std::vector<c10::IValue> constants;  // one for each argument; none where it comes from a slot
    std::vector<Place> places;
    std::vector<size_t> results;  // slot of each returned tensor
    std::vector<size_t> freed;    // slots that no later step reads
  };

  std::vector<Step> steps_;
  size_t input_count_ = 0, slot_count_ = 0;
  std::vector<c10::IValue> outputs_;  // a tensor that is a constant, or the number of a slot
};

}  // namespace lhc

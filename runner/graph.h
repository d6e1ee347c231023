// decode on CUDA again and again, over states that it holds: one launch a token.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <optional>
#include <vector>

#include "package.h"

namespace flacompile {

class DecodeGraph {
 public:
  // The states, which an earlier call gave, are used up. The package has to live as long.
  DecodeGraph(Package& package, std::vector<at::Tensor> states);

  // Makes it ready to be called.
  void capture();
  // token [B, 1] int64 -> logits [B, vocabulary], which the next call overwrites. Nothing waits for
  // values to be looked at: a token that is not in the vocabulary gives logits that are no numbers.
  at::Tensor operator()(const at::Tensor& token);
  // What the graph holds: one token, and every tensor where it was.
  at::Tensor step(const at::Tensor& token);

 private:
  Package& package_;
  std::vector<at::Tensor> states_;
  at::Tensor token_, logits_;
  std::optional<int64_t> left_;
  std::function<void()> launch_;
};

}  // namespace flacompile

// How a token is drawn from logits, as flacompile/runner.py draws it: the same ones for a seed.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <vector>

#include "package.h"

namespace flacompile {

// temperature 0 takes the most likely token. Of the others only the most likely ones are kept, up to
// the first at which their probabilities sum to top_p, and those equal to it.
struct Sampling {
  double temperature = 0, top_p = 1;
  int64_t seed = 0;
};

class Sampler {
 public:
  // Throws Refused for numbers out of range.
  explicit Sampler(const Sampling& sampling);
  // logits [1, vocabulary] -> token [1, 1]. Throws Refused for logits that are not numbers.
  at::Tensor operator()(const at::Tensor& logits);

 private:
  Sampling sampling_;
  at::Generator generator_;
};

// Calls `take` with each token that follows ids, as soon as it is drawn, until it returns false.
void generate(Package& package, const std::vector<int64_t>& ids, int64_t tokens,
              const Sampling& sampling, const std::function<bool(int64_t)>& take);

}  // namespace flacompile

#include "graph.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/_foreach_copy.h>
#include <ATen/ops/logical_or.h>
#include <ATen/ops/masked_fill.h>
#include <ATen/ops/max.h>
#include <ATen/ops/zeros.h>

#include <limits>
#include <map>

#include "cuda.h"
#include "json.h"

namespace flacompile {

DecodeGraph::DecodeGraph(Package& package, std::vector<at::Tensor> states)
    : package_(package), states_(std::move(states)) {
  const int64_t batch = states_.empty() ? 0 : states_[0].size(0);
  package_.check_states(states_, batch, 1);
  token_ = at::zeros({batch, 1}, at::dtype(at::kLong).device(package_.device()));
  const Facts& facts = package_.facts();
  if (facts.context) left_ = *facts.context - states_[facts.position].max().item<int64_t>();
}

void DecodeGraph::capture() {
  // What the first call writes in place will be written again.
  launch_ = cuda::record([&] { package_.decode_unchecked(token_, states_); },
                         [&] { logits_ = step(token_); });
}

at::Tensor DecodeGraph::operator()(const at::Tensor& token) {
  expect(token.sizes() == token_.sizes(), "token", "shape " + written(token_.sizes()),
         written(token.sizes()));
  package_.check_layout("token", token, at::kLong);
  if (left_) expect((*left_)-- > 0, "token", "a sequence with room for it", "a full one");
  token_.copy_(token);
  launch_();
  return logits_;
}

at::Tensor DecodeGraph::step(const at::Tensor& token) {
  const auto wrong = at::logical_or(token < 0, token >= package_.facts().vocabulary);
  const auto outputs = package_.decode_unchecked(at::masked_fill(token, wrong, 0), states_);
  std::map<at::ScalarType, std::pair<std::vector<at::Tensor>, std::vector<at::Tensor>>> moved;
  for (size_t i = 0; i < states_.size(); ++i) {
    if (states_[i].data_ptr() == outputs[i + 1].data_ptr()) continue;
    auto& [old, after] = moved[states_[i].scalar_type()];
    old.push_back(states_[i]);
    after.push_back(outputs[i + 1]);
  }
  for (auto& [dtype, pair] : moved) at::_foreach_copy_(pair.first, pair.second);
  return at::masked_fill(outputs[0], wrong, std::numeric_limits<float>::quiet_NaN());
}

}  // namespace flacompile

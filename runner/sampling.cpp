#include "sampling.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/cumsum.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/le.h>
#include <ATen/ops/lt.h>
#include <ATen/ops/max.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/sub.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/topk.h>
#include <ATen/ops/where.h>

#include <algorithm>
#include <cmath>
#include <optional>

#include "graph.h"
#include "json.h"

namespace flacompile {
namespace {

// The smallest probability kept of p [1, vocabulary]; found without sorting them all.
double least_kept(const at::Tensor& p, double top_p) {
  if (top_p == 1) return 0;
  const int64_t vocabulary = p.size(-1);
  for (int64_t count = 256;; count *= 16) {
    const auto most = std::get<0>(at::topk(p, std::min(count, vocabulary)));
    const auto kept = at::sum(at::cumsum(most, -1) - most < top_p).item<int64_t>();
    if (kept < count || count >= vocabulary) return most[0][kept - 1].item<double>();
  }
}

}  // namespace

Sampler::Sampler(const Sampling& sampling)
    : sampling_(sampling), generator_(at::detail::createCPUGenerator(sampling.seed)) {
  const auto& [temperature, top_p, seed] = sampling;
  const bool warm = temperature >= 0 && std::isfinite(temperature);
  expect(warm, "temperature", "0 or more", std::to_string(temperature));
  expect(top_p > 0 && top_p <= 1, "top_p", "above 0, up to 1", std::to_string(top_p));
  expect(seed >= 0, "seed", "0 or more", std::to_string(seed));
}

at::Tensor Sampler::operator()(const at::Tensor& logits) {
  const auto [best, greedy] = at::max(logits.to(at::kFloat), -1, /*keepdim=*/true);
  const double largest = best.item<double>();
  expect(std::isfinite(largest), "logits", "numbers", "a largest one of " + std::to_string(largest));
  const double uniform = at::rand({}, generator_, at::dtype(at::kDouble)).item<double>();
  if (sampling_.temperature == 0) return greedy;
  auto p = at::softmax(logits.to(at::kDouble) / sampling_.temperature, -1);
  p = at::where(p >= least_kept(p, sampling_.top_p), p, 0.0);
  const auto reached = at::cumsum(p, -1);
  return at::sum(reached <= uniform * reached.slice(-1, -1), {-1}, /*keepdim=*/true);
}

void generate(Package& package, const std::vector<int64_t>& ids, int64_t tokens,
              const Sampling& sampling, const std::function<bool(int64_t)>& take) {
  expect(tokens >= 1, "tokens", "at least 1", std::to_string(tokens));
  Sampler sample(sampling);
  auto prompt = at::empty({1, static_cast<int64_t>(ids.size())}, at::kLong);
  std::copy(ids.begin(), ids.end(), prompt.data_ptr<int64_t>());
  auto outputs = package.prefill(prompt.to(package.device()), package.begin(1));
  std::optional<DecodeGraph> graph;
  for (int64_t i = 0; i < tokens; ++i) {
    const auto token = sample(outputs[0]);
    if (!take(token.item<int64_t>()) || i + 1 == tokens) return;
    if (!graph) outputs.erase(outputs.begin());  // what is left are the states
    if (!package.device().is_cuda()) {
      outputs = package.decode(token, outputs);
    } else {
      if (!graph) graph.emplace(package, std::move(outputs)).capture();
      outputs = {(*graph)(token)};
    }
  }
}

}  // namespace flacompile

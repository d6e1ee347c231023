// What the tests ask of the library.
//   check inputs model.pt2        for each bad input, its name and the refusal
//   check graph model.pt2         whether what a DecodeGraph launches is what decode gives
//   check words tokenizer.json    for each text of stdin, the ids and what they say again
// The texts end in a zero byte, and so does each answer.
#include <ATen/TensorOperators.h>
#include <ATen/ops/argmax.h>
#include <ATen/ops/full.h>
#include <c10/core/InferenceMode.h>

#include <functional>
#include <iostream>

#include "graph.h"
#include "package.h"
#include "tokenizer.h"

using namespace flacompile;

// The same cases by the same names stand in tests/test_runner.py.
void inputs(const std::string& path) {
  Package package(path);
  const auto ids = at::full({2, 3}, 1, at::kLong), token = at::full({2, 1}, 1, at::kLong);
  const auto states = package.begin(2);
  auto with = [&](const at::Tensor& first) {
    auto changed = states;
    changed[0] = first;
    return changed;
  };
  const auto strided = states[0].transpose(-1, -2).contiguous().transpose(-1, -2);
  const std::vector<std::pair<std::string, std::function<void()>>> cases = {
      {"no tokens", [&] { package.prefill(ids.slice(1, 0, 0), states); }},
      {"no rows", [&] { package.prefill(ids.slice(0, 0, 0), states); }},
      {"one dimension", [&] { package.prefill(ids[0], states); }},
      {"int32", [&] { package.prefill(ids.to(at::kInt), states); }},
      {"strided ids", [&] { package.prefill(at::full({3, 2}, 1, at::kLong).t(), states); }},
      {"id too large", [&] { package.prefill(ids * package.facts().vocabulary, states); }},
      {"id below 0", [&] { package.prefill(-ids, states); }},
      {"other device", [&] { package.prefill(ids.to(at::kMeta), states); }},
      {"batch of begin", [&] { package.prefill(ids, package.begin(3)); }},
      {"two tokens", [&] { package.decode(ids, states); }},
      {"strided token", [&] { package.decode(ids.slice(1, 0, 1), states); }},
      {"token too large", [&] { package.decode(token * package.facts().vocabulary, states); }},
      {"no state", [&] { package.decode(token, {}); }},
      {"batch of states", [&] { package.decode(token.slice(0, 0, 1), states); }},
      {"strided state", [&] { package.decode(token, with(strided)); }},
      {"state of float64", [&] { package.decode(token, with(states[0].to(at::kDouble))); }},
      {"state of a device", [&] { package.decode(token, with(states[0].to(at::kMeta))); }},
  };
  for (const auto& [name, call] : cases) {
    std::string answer = "ran";
    try {
      call();
    } catch (const Refused& error) {
      answer = error.what();
    }
    std::cout << name << '\t' << answer << '\n';
  }
}

void graph(const std::string& path) {
  Package package(path);
  auto token = at::full({2, 1}, 1, at::kLong);
  auto outputs = package.prefill(at::full({2, 3}, 1, at::kLong), package.begin(2));
  std::vector<at::Tensor> states(outputs.begin() + 1, outputs.end()), copies;
  for (const auto& x : states) copies.push_back(x.clone());
  DecodeGraph graph(package, copies);
  for (int i = 0; i < 3; ++i) {
    outputs = package.decode(token, states);
    states.assign(outputs.begin() + 1, outputs.end());
    std::cout << (outputs[0].equal(graph.step(token)) ? "equal" : "different") << '\n';
    token = outputs[0].argmax(-1, /*keepdim=*/true);
  }
  const auto wrong = graph.step(token * 0 + package.facts().vocabulary);
  std::cout << (wrong.isnan().all().item<bool>() ? "refused" : "taken") << '\n';
}

void words(const std::string& path) {
  const Tokenizer tokenizer(path);
  for (std::string text; std::getline(std::cin, text, '\0');) {
    Writer writer(tokenizer);
    std::string again;
    for (const int64_t id : tokenizer.encode(text)) {
      std::cout << id << ' ';
      again += writer.push(id);
    }
    std::cout << '\n' << again << writer.finish() << '\0';
  }
}

int main(int argc, char** argv) {
  c10::InferenceMode guard;
  try {
    const std::string what = argc == 3 ? argv[1] : "";
    if (what == "inputs") inputs(argv[2]);
    else if (what == "graph") graph(argv[2]);
    else if (what == "words") words(argv[2]);
    else throw Refused("check: expected inputs, graph or words, and a file");
    return 0;
  } catch (const std::exception& error) {
    std::cerr << "check: " << error.what() << "\n";
    return 2;
  }
}

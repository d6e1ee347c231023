// Greedy generation from a flacompile package, without Python.
//   generate model.pt2 NEW_TOKENS ID [ID ...]
// Prints the ids of the prompt and of the new tokens on one line; the speed goes to stderr.
#include <ATen/ATen.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <chrono>
#include <iostream>
#include <string>
#include <vector>

using torch::inductor::AOTIModelPackageLoader;
using Clock = std::chrono::steady_clock;

// Zeros for every state of one sequence: "[[1, 4, 8, 8], [1]]" and "[\"float32\", \"int64\"]".
std::vector<at::Tensor> empty_states(const std::string& shapes, const std::string& dtypes) {
  std::vector<std::vector<int64_t>> sizes;
  for (size_t i = 1; (i = shapes.find_first_of("[0123456789", i)) != std::string::npos; ++i) {
    if (shapes[i] == '[') { sizes.emplace_back(); continue; }
    size_t length = 0;
    sizes.back().push_back(std::stoll(shapes.substr(i), &length));
    i += length - 1;
  }
  std::vector<at::Tensor> states;
  size_t at = 0;
  for (const auto& size : sizes) {
    const size_t begin = dtypes.find('"', at) + 1, end = dtypes.find('"', begin);
    const std::string name = dtypes.substr(begin, end - begin);
    auto dtype = name == "int64" ? at::kLong : name == "bool" ? at::kBool
               : name == "bfloat16" ? at::kBFloat16 : at::kFloat;
    states.push_back(at::zeros(size, dtype));
    at = end + 1;
  }
  return states;
}

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

int run(int argc, char** argv) {
  if (argc < 4) {
    std::cerr << "usage: generate model.pt2 NEW_TOKENS ID [ID ...]\n";
    return 2;
  }
  const int64_t count = std::stoll(argv[2]);
  std::vector<int64_t> ids;
  for (int i = 3; i < argc; ++i) ids.push_back(std::stoll(argv[i]));

  c10::InferenceMode guard;
  AOTIModelPackageLoader prefill(argv[1], "prefill"), decode(argv[1], "decode");

  // The package's code does not check what it is given: int64, contiguous, [1, T].
  auto prompt = at::empty({1, static_cast<int64_t>(ids.size())}, at::kLong);
  std::copy(ids.begin(), ids.end(), prompt.data_ptr<int64_t>());
  const int64_t vocabulary = std::stoll(prefill.get_metadata().at("vocabulary"));
  for (int64_t id : ids)
    if (id < 0 || id >= vocabulary) {
      std::cerr << "token id: expected 0 to " << vocabulary - 1 << ", got " << id << "\n";
      return 2;
    }

  auto metadata = prefill.get_metadata();
  auto inputs = empty_states(metadata.at("state_shapes"), metadata.at("state_dtypes"));
  inputs.insert(inputs.begin(), prompt);
  auto start = Clock::now();
  auto outputs = prefill.run(inputs);  // logits [1, vocabulary], then the states
  std::cerr << "prefill " << ids.size() / seconds_since(start) << " tokens/s\n";

  start = Clock::now();
  for (int64_t i = 0; i < count; ++i) {
    auto token = outputs[0].argmax(1, /*keepdim=*/true);
    ids.push_back(token.item<int64_t>());
    outputs[0] = token;
    for (auto& x : outputs) x = x.contiguous();
    if (i + 1 < count) outputs = decode.run(outputs);
  }
  if (count > 1) std::cerr << "decode " << (count - 1) / seconds_since(start) << " tokens/s\n";
  for (int64_t id : ids) std::cout << id << ' ';
  std::cout << '\n';
  return 0;
}

int main(int argc, char** argv) {
  try {
    return run(argc, argv);
  } catch (const c10::Error& error) {
    std::cerr << "generate: " << error.what_without_backtrace() << "\n";
    return 1;
  } catch (const std::exception& error) {
    std::cerr << "generate: " << error.what() << "\n";
    return 1;
  }
}

#include "package.h"

#include <ATen/cpu/Utils.h>
#include <ATen/ops/aminmax.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/cuda.h>
#include <torch/version.h>

#include <algorithm>
#include <sstream>

#include "cuda.h"
#include "json.h"

namespace flacompile {
namespace {

using torch::inductor::AOTIModelPackageLoader;
using Metadata = std::unordered_map<std::string, std::string>;

at::ScalarType dtype_of(const std::string& name) {
  static const std::vector<std::pair<std::string, at::ScalarType>> NAMES = {
      {"float32", at::kFloat},     {"float64", at::kDouble}, {"float16", at::kHalf},
      {"bfloat16", at::kBFloat16}, {"int64", at::kLong},     {"int32", at::kInt},
      {"int8", at::kChar},         {"uint8", at::kByte},     {"bool", at::kBool}};
  for (const auto& [known, dtype] : NAMES)
    if (known == name) return dtype;
  throw Refused("package: expected states of a known dtype, got " + name);
}

std::string name_of(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat: return "float32";
    case at::kDouble: return "float64";
    case at::kHalf: return "float16";
    case at::kBFloat16: return "bfloat16";
    case at::kLong: return "int64";
    case at::kInt: return "int32";
    case at::kBool: return "bool";
    default: return c10::toString(dtype);
  }
}

// What read gives; Refused if it throws.
template <class Read>
auto readable(const std::string& expected, const std::string& path, Read read) {
  try {
    return read();
  } catch (const std::exception& error) {
    const std::string reason = error.what();
    throw Refused("package: expected " + expected + ", got " + path + ": " +
                  reason.substr(0, reason.find('\n')));
  }
}

Facts read_facts(const std::string& path) {
  const Metadata texts = readable("a .pt2 package", path, [&] {
    return AOTIModelPackageLoader::load_metadata_from_package(path, "prefill");
  });
  auto fact = [&](const std::string& name) {
    const auto found = texts.find(name);
    expect(found != texts.end(), "package", "one of flacompile.export", path + " without " + name);
    return Json::parse(found->second, name);
  };
  Facts facts;
  // Without weights that lie beside it, a package would run on nothing.
  const std::string weights = texts.count("weights") ? texts.at("weights") : "null";
  expect(weights == "null", "package", "one with its weights inside", "weights in " + weights);
  const Json shapes = fact("state_shapes"), dtypes = fact("state_dtypes"), end = fact("end");
  for (const Json& id : end.array()) facts.end.push_back(id.number());
  for (const Json& shape : shapes.array()) {
    facts.state_shapes.emplace_back();
    for (const Json& size : shape.array()) facts.state_shapes.back().push_back(size.number());
  }
  for (const Json& name : dtypes.array()) facts.state_dtypes.push_back(dtype_of(name.text()));
  facts.position = fact("position").number();
  if (const Json context = fact("context"); !context.is_null()) facts.context = context.number();
  facts.vocabulary = fact("vocabulary").number();
  facts.device = fact("device").text();
  facts.torch = fact("torch").text();
  facts.capability = texts.at("AOTI_COMPUTE_CAPABILITY");
  const Json processor = fact("processor");
  for (const Json& name : processor.array()) facts.processor.push_back(name.text());
  return facts;
}

void check_machine(const Facts& facts) {
  const std::string made = facts.torch.substr(0, facts.torch.find('+')), here = TORCH_VERSION;
  expect(made == here, "package", "one made with torch " + here, "torch " + made);
  const bool known =
      facts.device == "cpu" || (facts.device == "cuda" && torch::cuda::is_available());
  expect(known, "package", "one for a device of this machine", facts.device);
  if (facts.device == "cuda") {
    const std::string has = cuda::capability();
    expect(has == facts.capability, "package", "one for compute capability " + has,
           facts.capability);
  }
  const auto capabilities = at::cpu::get_cpu_capabilities();
  std::string missing;
  for (const std::string& name : facts.processor) {
    const auto found = capabilities.find(name);
    const bool has = found != capabilities.end() && found->second.isBool() && found->second.toBool();
    if (!has) missing += (missing.empty() ? "" : ", ") + name;
  }
  expect(missing.empty(), "package", "one for this processor", "one that needs " + missing);
}

// Contiguous, for the next call: what left a convolution's window is cut off as a view.
std::vector<at::Tensor> whole(std::vector<at::Tensor> outputs) {
  for (at::Tensor& x : outputs) x = x.contiguous();
  return outputs;
}

std::pair<int64_t, int64_t> bounds(const at::Tensor& x) {
  const auto [least, most] = at::aminmax(x);
  return {least.item<int64_t>(), most.item<int64_t>()};
}

}  // namespace

std::string written(at::IntArrayRef numbers) {
  std::ostringstream out;
  out << numbers;
  return out.str();
}

// What guards threads does not go into a CUDA graph.
struct Package::Code {
  explicit Code(const std::string& path)
      : prefill(path, "prefill", /*run_single_threaded=*/true),
        decode(path, "decode", /*run_single_threaded=*/true) {}
  AOTIModelPackageLoader prefill, decode;
};

Package::Package(const std::string& path) : facts_(read_facts(path)) {
  check_machine(facts_);
  code_ = readable("one that loads", path, [&] { return std::make_unique<Code>(path); });
}

Package::~Package() = default;

std::vector<at::Tensor> Package::begin(int64_t batch_size) const {
  expect(batch_size >= 1, "batch_size", "at least 1", std::to_string(batch_size));
  std::vector<at::Tensor> states;
  for (size_t i = 0; i < facts_.state_shapes.size(); ++i) {
    std::vector<int64_t> shape = facts_.state_shapes[i];
    shape.at(0) = batch_size;
    states.push_back(at::zeros(shape, at::dtype(facts_.state_dtypes[i]).device(device())));
  }
  return states;
}

std::vector<at::Tensor> Package::prefill(const at::Tensor& ids,
                                         const std::vector<at::Tensor>& states) {
  const bool fits = ids.dim() == 2 && ids.numel() > 0;
  expect(fits, "ids", "shape [B, T], both at least 1", written(ids.sizes()));
  check_ids("ids", ids);
  check_states(states, ids.size(0), ids.size(1));
  std::vector<at::Tensor> outputs = {ids};
  outputs.insert(outputs.end(), states.begin(), states.end());
  for (const at::Tensor& piece : ids.split(PIECE, 1)) {
    outputs[0] = piece.contiguous();
    outputs = whole(code_->prefill.boxed_run(std::move(outputs)));
  }
  return outputs;
}

std::vector<at::Tensor> Package::decode(const at::Tensor& token,
                                        const std::vector<at::Tensor>& states) {
  const bool fits = token.dim() == 2 && token.size(0) > 0 && token.size(1) == 1;
  expect(fits, "token", "shape [B, 1], B at least 1", written(token.sizes()));
  check_ids("token", token);
  check_states(states, token.size(0), 1);
  return decode_unchecked(token, states);
}

std::vector<at::Tensor> Package::decode_unchecked(const at::Tensor& token,
                                                  const std::vector<at::Tensor>& states) {
  std::vector<at::Tensor> inputs = {token};
  inputs.insert(inputs.end(), states.begin(), states.end());
  return whole(code_->decode.boxed_run(std::move(inputs)));
}

void Package::check_ids(const char* name, const at::Tensor& ids) const {
  check_layout(name, ids, at::kLong);
  const auto [low, high] = bounds(ids);
  const int64_t last = facts_.vocabulary - 1;
  expect(low >= 0 && high <= last, name, "0 to " + std::to_string(last),
         std::to_string(low < 0 ? low : high));
}

void Package::check_states(const std::vector<at::Tensor>& states, int64_t batch,
                           int64_t time) const {
  const size_t count = facts_.state_shapes.size();
  expect(states.size() == count, "states", std::to_string(count) + " tensors",
         std::to_string(states.size()));
  for (size_t i = 0; i < count; ++i) {
    const std::string name = "states[" + std::to_string(i) + "]";
    std::vector<int64_t> want = facts_.state_shapes[i];
    want[0] = batch;
    expect(states[i].sizes() == want, name, "shape " + written(want), written(states[i].sizes()));
    check_layout(name, states[i], facts_.state_dtypes[i]);
  }
  if (!facts_.context) return;
  const std::string name = "states[" + std::to_string(facts_.position) + "]";
  const auto [low, high] = bounds(states.at(facts_.position));
  expect(low >= 0, name, "0 or more", std::to_string(low));
  expect(high + time <= *facts_.context, "ids",
         "at most " + std::to_string(*facts_.context) + " tokens in all",
         std::to_string(high) + " and " + std::to_string(time) + " more");
}

void Package::check_layout(const std::string& name, const at::Tensor& x,
                           at::ScalarType dtype) const {
  expect(x.scalar_type() == dtype, name, name_of(dtype), name_of(x.scalar_type()));
  const std::string kind = c10::DeviceTypeName(x.device().type(), /*lower_case=*/true);
  expect(kind == facts_.device, name, "device " + facts_.device, kind);
  expect(x.is_contiguous(), name, "a contiguous tensor", "strides " + written(x.strides()));
}

}  // namespace flacompile

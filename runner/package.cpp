#include "package.h"

#include <ATen/Version.h>
#include <ATen/ops/aminmax.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/cuda.h>
#include <torch/version.h>

#include <algorithm>
#include <sstream>

#include "json.h"

namespace flacompile {
namespace {

using torch::inductor::AOTIModelPackageLoader;
using Metadata = std::unordered_map<std::string, std::string>;

std::string written(at::IntArrayRef numbers) {
  std::ostringstream out;
  out << numbers;
  return out.str();
}

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

Metadata metadata_of(const std::string& path) {
  try {
    return AOTIModelPackageLoader::load_metadata_from_package(path, "prefill");
  } catch (const std::exception& error) {
    std::string reason = error.what();
    throw Refused("package: expected a .pt2 package, got " + path + ": " +
                  reason.substr(0, reason.find('\n')));
  }
}

Facts read_facts(const std::string& path) {
  const Metadata texts = metadata_of(path);
  auto fact = [&](const std::string& name) {
    const auto found = texts.find(name);
    expect(found != texts.end(), "package", "one of flacompile.export", path + " without " + name);
    return Json::parse(found->second, name);
  };
  Facts facts;
  const Json shapes = fact("state_shapes"), dtypes = fact("state_dtypes");
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
  facts.processor = texts.at("AOTI_CPU_ISA").substr(0, texts.at("AOTI_CPU_ISA").find(' '));
  return facts;
}

void check_machine(const Facts& facts) {
  const std::string made = facts.torch.substr(0, facts.torch.find('+')), here = TORCH_VERSION;
  expect(made == here, "package", "one made with torch " + here, "torch " + made);
  const bool known =
      facts.device == "cpu" || (facts.device == "cuda" && torch::cuda::is_available());
  expect(known, "package", "one for a device of this machine", facts.device);
  const std::vector<std::string> processors = {"DEFAULT", "AVX2", "AVX512"};  // rising
  const auto needs = std::find(processors.begin(), processors.end(), facts.processor);
  if (facts.device == "cpu" && needs != processors.end()) {
    const std::string has = at::get_cpu_capability();
    const bool fits = std::find(needs, processors.end(), has) != processors.end();
    expect(fits, "package", "one for a processor with " + has, *needs);
  }
}

void check_range(const std::string& name, const at::Tensor& x, int64_t last) {
  const auto [least, most] = at::aminmax(x);
  const int64_t low = least.item<int64_t>(), high = most.item<int64_t>();
  expect(low >= 0 && high <= last, name, "0 to " + std::to_string(last),
         std::to_string(low < 0 ? low : high));
}

}  // namespace

struct Package::Code {
  explicit Code(const std::string& path) : prefill(path, "prefill"), decode(path, "decode") {}
  AOTIModelPackageLoader prefill, decode;
};

Package::Package(const std::string& path) : facts_(read_facts(path)) {
  check_machine(facts_);
  code_ = std::make_unique<Code>(path);
}

Package::~Package() = default;

std::vector<at::Tensor> Package::prefill(const at::Tensor& ids) {
  const bool fits = ids.dim() == 2 && ids.numel() > 0;
  expect(fits, "ids", "shape [B, T], both at least 1", written(ids.sizes()));
  check_ids("ids", ids);
  if (facts_.context)
    expect(ids.size(1) <= *facts_.context, "ids",
           "at most " + std::to_string(*facts_.context) + " tokens", std::to_string(ids.size(1)));
  return code_->prefill.run({ids});
}

std::vector<at::Tensor> Package::decode(const at::Tensor& token,
                                        const std::vector<at::Tensor>& states) {
  const bool fits = token.dim() == 2 && token.size(0) > 0 && token.size(1) == 1;
  expect(fits, "token", "shape [B, 1], B at least 1", written(token.sizes()));
  check_ids("token", token);
  check_states(states, token.size(0));
  std::vector<at::Tensor> inputs = {token};
  inputs.insert(inputs.end(), states.begin(), states.end());
  return code_->decode.boxed_run(std::move(inputs));
}

void Package::check_ids(const char* name, const at::Tensor& ids) const {
  check_layout(name, ids, at::kLong);
  check_range(name, ids, facts_.vocabulary - 1);
}

void Package::check_states(const std::vector<at::Tensor>& states, int64_t batch) const {
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
  if (facts_.context)
    check_range("states[" + std::to_string(facts_.position) + "]", states.at(facts_.position),
                *facts_.context - 1);
}

void Package::check_layout(const std::string& name, const at::Tensor& x,
                           at::ScalarType dtype) const {
  expect(x.scalar_type() == dtype, name, name_of(dtype), name_of(x.scalar_type()));
  const std::string kind = c10::DeviceTypeName(x.device().type(), /*lower_case=*/true);
  expect(kind == facts_.device, name, "device " + facts_.device, kind);
  expect(x.is_contiguous(), name, "a contiguous tensor", "strides " + written(x.strides()));
}

}  // namespace flacompile

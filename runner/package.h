// A package of flacompile.export: its metadata is checked before its code is loaded, and every
// input before its code sees it. AOTInductor does neither.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace flacompile {

// The metadata that flacompile.export writes; export.md says what each is.
struct Facts {
  std::vector<std::vector<int64_t>> state_shapes;
  std::vector<at::ScalarType> state_dtypes;
  int64_t position = 0;
  std::optional<int64_t> context;
  int64_t vocabulary = 0;
  std::string device, torch, processor;
};

class Package {
 public:
  // Throws Refused for what is no package, or one for another device, processor or torch.
  explicit Package(const std::string& path);
  ~Package();

  // ids [B, T] int64 -> logits of the last token [B, vocabulary], then the states.
  std::vector<at::Tensor> prefill(const at::Tensor& ids);
  // token [B, 1] int64 and the states, all of one batch -> logits, then the next states.
  std::vector<at::Tensor> decode(const at::Tensor& token, const std::vector<at::Tensor>& states);

  const Facts& facts() const { return facts_; }
  at::Device device() const { return at::Device(facts_.device); }

 private:
  void check_ids(const char* name, const at::Tensor& ids) const;
  void check_states(const std::vector<at::Tensor>& states, int64_t batch) const;
  void check_layout(const std::string& name, const at::Tensor& x, at::ScalarType dtype) const;

  struct Code;
  Facts facts_;
  std::unique_ptr<Code> code_;
};

}  // namespace flacompile

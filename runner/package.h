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

constexpr int64_t PIECE = 8192;  // tokens of a prompt that are read at once

// The metadata that flacompile.export writes; export.md says what each is.
struct Facts {
  std::vector<std::vector<int64_t>> state_shapes;
  std::vector<at::ScalarType> state_dtypes;
  int64_t position = 0;
  std::optional<int64_t> context;
  int64_t vocabulary = 0;
  std::vector<int64_t> end;
  std::string device, torch, capability;
  std::vector<std::string> processor;  // instructions that its code asks for
};

std::string written(at::IntArrayRef numbers);  // "[2, 1]"

class Package {
 public:
  // Throws Refused for what is no package, or one for another device, processor or torch.
  explicit Package(const std::string& path);
  ~Package();

  // The states before the first token: zeros.
  std::vector<at::Tensor> begin(int64_t batch_size) const;
  // ids [B, T] int64 and the states -> logits of the last token [B, vocabulary], then the next
  // states. The states are used up. Many tokens are read in pieces, in the memory of one piece.
  std::vector<at::Tensor> prefill(const at::Tensor& ids, const std::vector<at::Tensor>& states);
  // As prefill for token [B, 1], faster.
  std::vector<at::Tensor> decode(const at::Tensor& token, const std::vector<at::Tensor>& states);
  // The same for what was checked: wrong input gives wrong numbers.
  std::vector<at::Tensor> decode_unchecked(const at::Tensor& token,
                                           const std::vector<at::Tensor>& states);

  const Facts& facts() const { return facts_; }
  at::Device device() const { return at::Device(facts_.device); }

  // Throw Refused for states of another batch or without room for as many tokens, and for another
  // dtype, device or order of elements.
  void check_states(const std::vector<at::Tensor>& states, int64_t batch, int64_t time) const;
  void check_layout(const std::string& name, const at::Tensor& x, at::ScalarType dtype) const;

 private:
  void check_ids(const char* name, const at::Tensor& ids) const;

  struct Code;
  Facts facts_;
  std::unique_ptr<Code> code_;
};

}  // namespace flacompile

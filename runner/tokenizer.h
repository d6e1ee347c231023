// The tokenizer.json of a model, as far as it is BPE: bytes (GPT-2, Llama 3, Qwen) and
// characters with a mark for spaces (Llama 2, Mistral). Anything else in the file is refused.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "json.h"
#include "text.h"
#include "words.h"

namespace flacompile {

class Tokenizer {
 public:
  // Throws Refused for a file that cannot be read, or asks for what is not here.
  explicit Tokenizer(const std::string& path);

  // The ids of a text, with those that the file puts around every text.
  std::vector<int64_t> encode(std::string_view text) const;
  // One more than the largest id.
  int64_t size() const { return static_cast<int64_t>(tokens_.size()); }

 private:
  friend class Writer;
  struct Token {
    std::string text;   // as in the vocabulary
    std::string bytes;  // what it adds to a text; nothing for a special one
  };
  struct Added {
    std::u32string text;
    int64_t id;
    bool normalized;
  };
  struct Merge {
    int rank;
    int64_t id;
  };

  void read_model(const Json& model);
  void read_added(const Json& added, bool normalizes);
  void read_normalizer(const Json& step);
  void read_cuts(const Json& step);
  void read_frame(const Json& step);
  void read_decoder(const Json& step);
  std::string bytes_of(const std::string& token) const;

  Token& token(int64_t id);
  void encode_apart(std::u32string_view text, bool normalized, bool first,
                    std::vector<int64_t>& ids) const;
  std::u32string normalize(std::u32string_view text) const;
  Words cut(const std::u32string& text, bool first) const;
  void merge(const std::u32string& word, std::vector<int64_t>& ids) const;
  void add_character(char32_t code, std::vector<int64_t>& ids) const;

  std::vector<Token> tokens_;
  std::unordered_map<std::string, int64_t> ids_;
  std::unordered_map<uint64_t, Merge> merges_;
  std::vector<Added> added_;
  std::vector<Json> normalizers_, cuts_;
  std::vector<int64_t> before_, after_;
  int64_t unknown_ = -1;
  bool fuse_unknown_ = false, byte_fallback_ = false, ignore_merges_ = false;
  bool byte_level_ = false, strips_space_ = false;
  char32_t mark_ = 0;  // stands for a space
};

// Ids in, text out as soon as its characters are whole.
class Writer {
 public:
  explicit Writer(const Tokenizer& tokenizer) : tokenizer_(tokenizer) {}
  std::string push(int64_t id);
  std::string finish() { return utf8_.finish(); }

 private:
  const Tokenizer& tokenizer_;
  Utf8Stream utf8_;
  bool begun_ = false;
};

}  // namespace flacompile

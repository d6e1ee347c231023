#include "tokenizer.h"

#include <algorithm>
#include <array>
#include <fstream>
#include <iterator>
#include <queue>
#include <tuple>

namespace flacompile {
namespace {

// The character that stands for each byte in a byte-level vocabulary: itself where it prints.
const std::array<char32_t, 256>& byte_characters() {
  static const auto table = [] {
    std::array<char32_t, 256> characters{};
    char32_t next = 256;
    for (int b = 0; b < 256; ++b) {
      const bool prints = (b >= '!' && b <= '~') || (b >= 0xA1 && b <= 0xAC) || b >= 0xAE;
      characters[b] = prints ? b : next++;
    }
    return characters;
  }();
  return table;
}

std::string byte_token(unsigned char byte) {
  static constexpr std::string_view DIGITS = "0123456789ABCDEF";
  return std::string("<0x") + DIGITS[byte >> 4] + DIGITS[byte & 15] + ">";
}

uint64_t pair_key(int64_t left, int64_t right) {
  return static_cast<uint64_t>(left) << 32 | static_cast<uint32_t>(right);
}

std::string read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::string content{std::istreambuf_iterator<char>(file), {}};
  expect(file.good() && !content.empty(), "tokenizer", "a tokenizer.json", path);
  return content;
}

// The steps of a Sequence, or the one step itself; none of null.
std::vector<Json> steps(const Json& step, std::string_view key) {
  if (step.is_null()) return {};
  if (step.type() != "Sequence") return {step};
  std::vector<Json> all;
  for (const Json& inner : step[key].array())
    for (Json& one : steps(inner, key)) all.push_back(std::move(one));
  return all;
}

[[noreturn]] void refuse(const std::string& part, const std::string& known, const Json& step) {
  throw Refused("tokenizer: expected " + part + " of " + known + ", got " + step.type());
}

void require_absent(const Json& object, std::initializer_list<const char*> keys) {
  for (const char* key : keys) {
    const Json& found = object[key];
    const bool empty = found.is_null() || (std::holds_alternative<bool>(found.value) &&
                                           !found.boolean()) ||
                       (std::holds_alternative<std::string>(found.value) && found.text().empty());
    expect(empty, "tokenizer", std::string("no ") + key, "one");
  }
}

}  // namespace

Tokenizer::Tokenizer(const std::string& path) {
  const Json file = Json::parse(read_file(path), "tokenizer");
  read_model(file["model"]);
  for (const Json& step : steps(file["normalizer"], "normalizers")) read_normalizer(step);
  for (const Json& step : steps(file["pre_tokenizer"], "pretokenizers")) read_cuts(step);
  for (const Json& step : steps(file["post_processor"], "processors")) read_frame(step);
  for (const Json& step : steps(file["decoder"], "decoders")) read_decoder(step);
  for (Token& token : tokens_) token.bytes = bytes_of(token.text);
  if (!file["added_tokens"].is_null()) read_added(file["added_tokens"], !normalizers_.empty());
}

Tokenizer::Token& Tokenizer::token(int64_t id) {
  expect(id >= 0 && id < 1 << 24, "tokenizer", "ids from 0 to 2^24", std::to_string(id));
  if (id >= size()) tokens_.resize(id + 1);
  return tokens_[id];
}

void Tokenizer::read_model(const Json& model) {
  const std::string type = model["type"].is_null() ? "BPE" : model.type();
  expect(type == "BPE", "tokenizer", "a model of BPE", type);
  require_absent(model, {"dropout", "continuing_subword_prefix", "end_of_word_suffix"});
  byte_fallback_ = model.flag("byte_fallback", false);
  ignore_merges_ = model.flag("ignore_merges", false);
  fuse_unknown_ = model.flag("fuse_unk", false);
  for (const auto& [text, id] : model["vocab"].object()) {
    ids_[text] = id.number();
    token(id.number()).text = text;
  }
  if (!model["unk_token"].is_null()) unknown_ = ids_.at(model["unk_token"].text());
  int rank = 0;
  for (const Json& merge : model["merges"].array()) {
    std::string left, right;
    if (const auto* pair = std::get_if<Json::Array>(&merge.value)) {
      expect(pair->size() == 2, "tokenizer", "merges of two", std::to_string(pair->size()));
      left = (*pair)[0].text(), right = (*pair)[1].text();
    } else {
      const size_t space = merge.text().find(' ');
      expect(space != std::string::npos, "tokenizer", "merges of two", merge.text());
      left = merge.text().substr(0, space), right = merge.text().substr(space + 1);
    }
    const bool known = ids_.count(left) && ids_.count(right) && ids_.count(left + right);
    expect(known, "tokenizer", "merges of its tokens", left + " " + right);
    merges_.insert_or_assign(pair_key(ids_[left], ids_[right]), Merge{rank++, ids_[left + right]});
  }
}

void Tokenizer::read_added(const Json& added, bool normalizes) {
  for (const Json& one : added.array()) {
    require_absent(one, {"single_word", "lstrip", "rstrip"});
    const std::string& text = one["content"].text();
    const int64_t id = one["id"].number();
    const bool normalized = one.flag("normalized", false);
    expect(!(normalizes && normalized), "tokenizer", "added tokens that are not normalized", text);
    const std::string bytes = one.flag("special", false) ? "" : bytes_of(text);
    token(id) = {text, bytes};
    if (!text.empty()) added_.push_back({from_utf8(text, "tokenizer"), id, normalized});
  }
}

void Tokenizer::read_normalizer(const Json& step) {
  const std::string type = step.type();
  if (type == "Replace") step["pattern"]["String"].text();
  else if (type != "NFC" && type != "Prepend") refuse("a normalizer", "NFC, Prepend, Replace", step);
  normalizers_.push_back(step);
}

void Tokenizer::read_cuts(const Json& step) {
  const std::string type = step.type();
  if (type == "ByteLevel") {
    byte_level_ = true;
  } else if (type == "Split") {
    const std::string& pattern = step["pattern"]["Regex"].text();
    const std::string& behavior = step["behavior"].text();
    expect(is_known_pattern(pattern), "tokenizer", "a pattern known here", pattern);
    const bool whole = step.flag("invert", false) ? behavior == "Removed" : behavior == "Isolated";
    expect(whole, "tokenizer", "a split into all that matches", behavior);
  } else if (type == "Metaspace") {
    mark_ = from_utf8(step["replacement"].text(), "tokenizer").at(0);
  } else if (type != "Digits") {
    refuse("a pre_tokenizer", "ByteLevel, Split, Metaspace, Digits", step);
  }
  cuts_.push_back(step);
}

void Tokenizer::read_frame(const Json& step) {
  const std::string type = step.type();
  if (type == "ByteLevel") return;  // moves offsets, which nobody asks for
  if (type != "TemplateProcessing")
    refuse("a post_processor", "ByteLevel, TemplateProcessing", step);
  std::vector<int64_t>* side = &before_;
  for (const Json& part : step["single"].array()) {
    if (!part["Sequence"].is_null()) {
      side = &after_;
      continue;
    }
    const std::string& name = part["SpecialToken"]["id"].text();
    for (const Json& id : step["special_tokens"][name]["ids"].array())
      side->push_back(id.number());
  }
}

void Tokenizer::read_decoder(const Json& step) {
  const std::string type = step.type();
  if (type == "Replace") {
    const std::string& content = step["content"].text();
    expect(content == " ", "tokenizer", "a decoder that writes spaces", content);
    mark_ = from_utf8(step["pattern"]["String"].text(), "tokenizer").at(0);
  } else if (type == "Metaspace") {
    mark_ = from_utf8(step["replacement"].text(), "tokenizer").at(0);
    strips_space_ = step["prepend_scheme"].is_null() || step["prepend_scheme"].text() != "never";
  } else if (type == "Strip") {
    const bool one = step["content"].text() == " " && step["start"].number() == 1 &&
                     step["stop"].number() == 0;
    expect(one, "tokenizer", "a decoder that strips one leading space", "another");
    strips_space_ = true;
  } else if (type != "ByteLevel" && type != "ByteFallback" && type != "Fuse") {
    refuse("a decoder", "ByteLevel, Replace, ByteFallback, Fuse, Strip, Metaspace", step);
  }
}

std::string Tokenizer::bytes_of(const std::string& token) const {
  std::string bytes;
  const std::u32string text = from_utf8(token, "tokenizer");
  if (byte_level_) {
    const auto& characters = byte_characters();
    for (const char32_t code : text) {
      const auto found = std::find(characters.begin(), characters.end(), code);
      if (found == characters.end()) return token;  // an added token, as it stands
      bytes += static_cast<char>(found - characters.begin());
    }
    return bytes;
  }
  if (byte_fallback_ && token.size() == 6 && token.starts_with("<0x") && token[5] == '>')
    return {static_cast<char>(std::stoi(token.substr(3, 2), nullptr, 16))};
  for (const char32_t code : text) append_utf8(bytes, mark_ && code == mark_ ? U' ' : code);
  return bytes;
}

std::vector<int64_t> Tokenizer::encode(std::string_view text) const {
  std::vector<int64_t> ids = before_;
  encode_apart(from_utf8(text, "text"), false, true, ids);
  ids.insert(ids.end(), after_.begin(), after_.end());
  return ids;
}

// Added tokens come first, the longest at each place: those of the text as it stands, then those of
// the normalized text between them.
void Tokenizer::encode_apart(std::u32string_view text, bool normalized, bool first,
                             std::vector<int64_t>& ids) const {
  auto between = [&](std::u32string_view part, bool begins) {
    if (part.empty()) return;
    if (!normalized) return encode_apart(normalize(part), true, begins, ids);
    for (const std::u32string& word : cut(std::u32string(part), begins)) merge(word, ids);
  };
  size_t start = 0;
  for (size_t at = 0; at < text.size();) {
    const Added* longest = nullptr;
    for (const Added& one : added_)
      if (one.normalized == normalized && text.substr(at, one.text.size()) == one.text &&
          (!longest || one.text.size() > longest->text.size()))
        longest = &one;
    if (!longest) {
      ++at;
      continue;
    }
    between(text.substr(start, at - start), first && start == 0);
    ids.push_back(longest->id);
    start = at += longest->text.size();
  }
  between(text.substr(start), first && start == 0);
}

std::u32string Tokenizer::normalize(std::u32string_view text) const {
  std::u32string result(text);
  for (const Json& step : normalizers_) {
    const std::string type = step.type();
    if (type == "NFC") {
      for (const char32_t code : result)
        expect(is_nfc(code), "text", "characters that NFC leaves alone", to_utf8({&code, 1}));
    } else if (type == "Prepend") {
      result = from_utf8(step["prepend"].text(), "tokenizer") + result;
    } else {
      const auto from = from_utf8(step["pattern"]["String"].text(), "tokenizer");
      const auto to = from_utf8(step["content"].text(), "tokenizer");
      for (size_t at = 0; (at = result.find(from, at)) != result.npos; at += to.size())
        result.replace(at, from.size(), to);
    }
  }
  return result;
}

Words Tokenizer::cut(const std::u32string& text, bool first) const {
  Words words = {text};
  for (const Json& step : cuts_) {
    const std::string type = step.type();
    Words finer;
    for (std::u32string& word : words) {
      Words parts;
      if (type == "ByteLevel") {
        if (step.flag("add_prefix_space", true) && word[0] != ' ') word.insert(0, 1, ' ');
        parts = step.flag("use_regex", true) ? gpt2_words(word) : Words{word};
        for (std::u32string& part : parts) {
          std::u32string characters;
          for (const unsigned char byte : to_utf8(part)) characters += byte_characters()[byte];
          part = std::move(characters);
        }
      } else if (type == "Split") {
        parts = pattern_words(word, step["pattern"]["Regex"].text());
      } else if (type == "Digits") {
        parts = number_words(word, step.flag("individual_digits", false));
      } else {
        std::replace(word.begin(), word.end(), U' ', mark_);
        const Json& scheme = step["prepend_scheme"];
        const bool always = scheme.is_null() || scheme.text() == "always";
        if ((always || (scheme.text() == "first" && first)) && word[0] != mark_)
          word.insert(0, 1, mark_);
        parts = step.flag("split", true) ? marked_words(word, mark_) : Words{word};
      }
      std::move(parts.begin(), parts.end(), std::back_inserter(finer));
    }
    words = std::move(finer);
  }
  return words;
}

void Tokenizer::add_character(char32_t code, std::vector<int64_t>& ids) const {
  const std::string text = to_utf8({&code, 1});
  if (const auto found = ids_.find(text); found != ids_.end()) return ids.push_back(found->second);
  if (byte_fallback_) {
    std::vector<int64_t> bytes;
    for (const unsigned char byte : text)
      if (const auto found = ids_.find(byte_token(byte)); found != ids_.end())
        bytes.push_back(found->second);
    if (bytes.size() == text.size()) {
      ids.insert(ids.end(), bytes.begin(), bytes.end());
      return;
    }
  }
  if (unknown_ < 0) return;  // a model without such a token leaves the character out
  if (!(fuse_unknown_ && !ids.empty() && ids.back() == unknown_)) ids.push_back(unknown_);
}

// The pair of the lowest rank is merged, the leftmost of several, until there is none.
void Tokenizer::merge(const std::u32string& word, std::vector<int64_t>& ids) const {
  if (ignore_merges_)
    if (const auto found = ids_.find(to_utf8(word)); found != ids_.end())
      return ids.push_back(found->second);
  std::vector<int64_t> symbols;
  for (const char32_t code : word) add_character(code, symbols);
  const int count = static_cast<int>(symbols.size());
  std::vector<int> next(count), before(count);
  for (int i = 0; i < count; ++i) next[i] = i + 1, before[i] = i - 1;

  using Candidate = std::tuple<int, int, int64_t, int64_t>;  // rank, place, left, right
  std::priority_queue<Candidate, std::vector<Candidate>, std::greater<>> queue;
  auto offer = [&](int i) {
    if (i < 0 || next[i] >= count) return;
    const int64_t left = symbols[i], right = symbols[next[i]];
    const auto found = merges_.find(pair_key(left, right));
    if (found != merges_.end()) queue.emplace(found->second.rank, i, left, right);
  };
  for (int i = 0; i < count; ++i) offer(i);
  while (!queue.empty()) {
    const auto [rank, i, left, right] = queue.top();
    queue.pop();
    if (symbols[i] != left || next[i] >= count || symbols[next[i]] != right) continue;  // merged
    symbols[i] = merges_.at(pair_key(left, right)).id;
    symbols[next[i]] = -1;
    next[i] = next[next[i]];
    if (next[i] < count) before[next[i]] = i;
    offer(before[i]);
    offer(i);
  }
  for (int i = 0; i < count; i = next[i]) ids.push_back(symbols[i]);
}

std::string Writer::push(int64_t id) {
  if (id < 0 || id >= tokenizer_.size()) return "";  // a row that the vocabulary was padded by
  std::string_view bytes = tokenizer_.tokens_[id].bytes;
  if (bytes.empty()) return "";
  if (!begun_ && tokenizer_.strips_space_ && bytes[0] == ' ') bytes.remove_prefix(1);
  begun_ = true;
  return utf8_.push(bytes);
}

}  // namespace flacompile

#include "json.h"

#include <charconv>
#include <cstdint>

#include "text.h"

namespace flacompile {
namespace {

constexpr int DEEPEST = 200;

class Reader {
 public:
  Reader(std::string_view text, const std::string& name) : text_(text), name_(name) {}

  Json whole() {
    Json value = read(0);
    skip();
    require(at_ == text_.size(), "nothing more");
    return value;
  }

 private:
  void require(bool fits, const char* expected) const {
    expect(fits, name_, std::string("JSON with ") + expected + " at byte " + std::to_string(at_),
           at_ < text_.size() ? "\"" + std::string(text_.substr(at_, 8)) + "\"" : "its end");
  }

  void skip() {
    while (at_ < text_.size() && std::string_view(" \t\r\n").find(text_[at_]) != text_.npos) ++at_;
  }

  bool take(std::string_view word) {
    if (text_.substr(at_, word.size()) != word) return false;
    at_ += word.size();
    return true;
  }

  Json read(int depth) {
    require(depth < DEEPEST, "less nesting");
    skip();
    if (take("null")) return {};
    if (take("true")) return {true};
    if (take("false")) return {false};
    if (take("{")) return {members(depth)};
    if (take("[")) return {elements(depth)};
    if (take("\"")) return {string()};
    return {number()};
  }

  Json::Object members(int depth) {
    Json::Object result;
    for (skip(); !take("}");) {
      if (!result.empty()) require(take(","), "a comma");
      skip();
      require(take("\""), "a key");
      std::string key = string();
      skip();
      require(take(":"), "a colon");
      result.emplace_back(std::move(key), read(depth + 1));
      skip();
    }
    return result;
  }

  Json::Array elements(int depth) {
    Json::Array result;
    for (skip(); !take("]");) {
      if (!result.empty()) require(take(","), "a comma");
      result.push_back(read(depth + 1));
      skip();
    }
    return result;
  }

  double number() {
    double value = 0;
    const char* end = text_.data() + text_.size();
    const auto [next, error] = std::from_chars(text_.data() + at_, end, value);
    require(error == std::errc(), "a value");
    at_ = next - text_.data();
    return value;
  }

  // What follows the first quote, up to and with the last.
  std::string string() {
    std::string result;
    while (!take("\"")) {
      require(at_ < text_.size(), "a closing quote");
      if (take("\\")) escaped(result);
      else result += text_[at_++];
    }
    return result;
  }

  void escaped(std::string& result) {
    static constexpr std::string_view NAMES = "\"\\/bfnrt", MEANT = "\"\\/\b\f\n\r\t";
    require(at_ < text_.size(), "an escape");
    const size_t i = NAMES.find(text_[at_]);
    if (i != NAMES.npos) {
      ++at_;
      result += MEANT[i];
      return;
    }
    uint32_t code = unit();
    if (code >> 10 == 0xD800 >> 10) {  // the first half of a pair
      const uint32_t low = unit();
      require(low >> 10 == 0xDC00 >> 10, "a pair of surrogates");
      code = 0x10000 + ((code & 0x3FF) << 10) + (low & 0x3FF);
    }
    append_utf8(result, code);
  }

  uint32_t unit() {
    if (text_[at_] == '\\') ++at_;
    require(take("u") && at_ + 4 <= text_.size(), "an escape");
    uint32_t code = 0;
    const char* start = text_.data() + at_;
    const auto [next, error] = std::from_chars(start, start + 4, code, 16);
    require(error == std::errc() && next == start + 4, "four hexadecimal digits");
    at_ += 4;
    return code;
  }

  std::string_view text_;
  std::string name_;
  size_t at_ = 0;
};

}  // namespace

Json Json::parse(std::string_view text, const std::string& name) {
  return Reader(text, name).whole();
}

const Json& Json::operator[](std::string_view key) const {
  static const Json null;
  if (is_null()) return null;
  for (const auto& [name, member] : object())
    if (name == key) return member;
  return null;
}

std::string Json::type() const {
  return is_null() ? "null" : (*this)["type"].text();
}

bool Json::flag(std::string_view key, bool otherwise) const {
  const Json& found = (*this)[key];
  return found.is_null() ? otherwise : found.boolean();
}

}  // namespace flacompile

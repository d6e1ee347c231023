#include "text.h"

#include "json.h"

namespace flacompile {
namespace {

constexpr std::string_view UNKNOWN = "\xEF\xBF\xBD";  // U+FFFD

enum class Kind { whole, cut, wrong };
struct Scan {
  Kind kind;
  size_t size;
};

// The character at the start of bytes (not empty), or as much of one as stands there.
Scan scan(std::string_view bytes) {
  const unsigned char first = bytes[0];
  if (first < 0x80) return {Kind::whole, 1};
  if (first < 0xC2 || first > 0xF4) return {Kind::wrong, 1};
  const size_t size = first < 0xE0 ? 2 : first < 0xF0 ? 3 : 4;
  unsigned char low = 0x80, high = 0xBF;  // of the second byte
  if (first == 0xE0) low = 0xA0;
  if (first == 0xED) high = 0x9F;
  if (first == 0xF0) low = 0x90;
  if (first == 0xF4) high = 0x8F;
  for (size_t i = 1; i < size; ++i, low = 0x80, high = 0xBF) {
    if (i == bytes.size()) return {Kind::cut, i};
    const unsigned char next = bytes[i];
    if (next < low || next > high) return {Kind::wrong, i};
  }
  return {Kind::whole, size};
}

}  // namespace

void append_utf8(std::string& text, uint32_t code) {
  if (code < 0x80) {
    text += static_cast<char>(code);
    return;
  }
  const int more = code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
  text += static_cast<char>((0xFF00 >> (more + 1) & 0xFF) | code >> 6 * more);
  for (int i = more - 1; i >= 0; --i) text += static_cast<char>(0x80 | (code >> 6 * i & 0x3F));
}

std::string to_utf8(std::u32string_view text) {
  std::string result;
  for (const char32_t code : text) append_utf8(result, code);
  return result;
}

std::u32string from_utf8(std::string_view bytes, const std::string& name) {
  std::u32string result;
  for (size_t at = 0; at < bytes.size();) {
    const auto [kind, size] = scan(bytes.substr(at));
    expect(kind == Kind::whole, name, "UTF-8", "something else at byte " + std::to_string(at));
    char32_t code = static_cast<unsigned char>(bytes[at]) & (size == 1 ? 0x7F : 0x7F >> size);
    for (size_t i = 1; i < size; ++i) code = code << 6 | (bytes[at + i] & 0x3F);
    result += code;
    at += size;
  }
  return result;
}

std::string Utf8Stream::push(std::string_view bytes) {
  held_ += bytes;
  std::string result;
  size_t at = 0;
  while (at < held_.size()) {
    const auto [kind, size] = scan(std::string_view(held_).substr(at));
    if (kind == Kind::cut) break;
    result += kind == Kind::whole ? std::string_view(held_).substr(at, size) : UNKNOWN;
    at += size;
  }
  held_.erase(0, at);
  return result;
}

std::string Utf8Stream::finish() {
  const bool some = !held_.empty();
  held_.clear();
  return some ? std::string(UNKNOWN) : "";
}

}  // namespace flacompile

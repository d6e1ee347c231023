// UTF-8, whole and as it comes.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace flacompile {

void append_utf8(std::string& text, uint32_t code);
std::string to_utf8(std::u32string_view text);
// Throws Refused, naming `name`, for bytes that are no UTF-8.
std::u32string from_utf8(std::string_view bytes, const std::string& name);

// Bytes in, whole characters out; U+FFFD stands for what is no UTF-8.
class Utf8Stream {
 public:
  std::string push(std::string_view bytes);
  // What is still held: the beginning of a character.
  std::string finish();

 private:
  std::string held_;
};

}  // namespace flacompile

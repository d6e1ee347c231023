#include "words.h"

#include <algorithm>
#include <iterator>

#include "json.h"
#include "unicode.h"

namespace flacompile {
namespace {

using Text = std::u32string_view;

const std::string GPT2 =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";
const std::string LLAMA3_HEAD = R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N})";
const std::string LLAMA3_TAIL = R"(| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
const std::string LLAMA3 = LLAMA3_HEAD + "{1,3}" + LLAMA3_TAIL, QWEN2 = LLAMA3_HEAD + LLAMA3_TAIL;

template <size_t N>
bool among(const Range (&ranges)[N], char32_t code) {
  const auto after = std::upper_bound(std::begin(ranges), std::end(ranges), code,
                                      [](char32_t c, const Range& r) { return c < r.first; });
  return after != std::begin(ranges) && code <= std::prev(after)->last;
}

bool is_letter(char32_t c) { return among(LETTERS, c); }
bool is_number(char32_t c) { return among(NUMBERS, c); }
bool is_newline(char32_t c) { return c == '\r' || c == '\n'; }
bool is_space(char32_t c) {
  return (c >= 9 && c <= 13) || c == 32 || c == 0x85 || c == 0xA0 || c == 0x1680 ||
         (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F ||
         c == 0x205F || c == 0x3000;
}
bool is_other(char32_t c) { return !is_space(c) && !is_letter(c) && !is_number(c); }

// One past the run of `is` that begins at `at`.
template <class Is>
size_t run(Text text, size_t at, Is is) {
  while (at < text.size() && is(text[at])) ++at;
  return at;
}

// One past 's, 't, 're, 've, 'm, 'll or 'd; `at` where there is none.
size_t contraction(Text text, size_t at, bool any_case) {
  auto letter = [&](size_t i) -> char32_t {
    if (i >= text.size()) return 0;
    const char32_t c = text[i];
    if (!any_case) return c;
    if (c == 0x17F) return 's';  // the long s
    return c >= 'A' && c <= 'Z' ? c + 32 : c;
  };
  if (text[at] != '\'') return at;
  const char32_t first = letter(at + 1), second = letter(at + 2);
  if (first == 's' || first == 't' || first == 'm' || first == 'd') return at + 2;
  const bool two = ((first == 'r' || first == 'v') && second == 'e') ||
                   (first == 'l' && second == 'l');
  return two ? at + 3 : at;
}

// \s+(?!\S)|\s+ : a space before a word is left to the word.
size_t spaces(Text text, size_t at) {
  const size_t end = run(text, at, is_space);
  return end < text.size() && end - at > 1 ? end - 1 : end;
}

template <class End>
Words cut(Text text, End end_of) {
  Words words;
  for (size_t at = 0; at < text.size();) {
    const size_t end = end_of(at);
    words.emplace_back(text.substr(at, end - at));
    at = end;
  }
  return words;
}

}  // namespace

bool is_nfc(char32_t code) { return !among(NOT_NFC, code); }

Words gpt2_words(Text text) {
  return cut(text, [&](size_t at) {
    if (const size_t end = contraction(text, at, false); end > at) return end;
    const size_t word = at + (text[at] == ' ' && at + 1 < text.size() ? 1 : 0);
    if (is_letter(text[word])) return run(text, word, is_letter);
    if (is_number(text[word])) return run(text, word, is_number);
    if (is_other(text[word])) return run(text, word, is_other);
    return spaces(text, at);
  });
}

Words llama3_words(Text text, size_t longest_number) {
  return cut(text, [&](size_t at) {
    if (const size_t end = contraction(text, at, true); end > at) return end;
    const char32_t c = text[at];
    const bool joins = !is_newline(c) && !is_letter(c) && !is_number(c);
    const size_t word = at + (joins && at + 1 < text.size() ? 1 : 0);
    if (is_letter(text[word])) return run(text, word, is_letter);
    if (is_number(c)) return std::min(run(text, at, is_number), at + longest_number);
    const size_t mark = at + (c == ' ' && at + 1 < text.size() ? 1 : 0);
    if (is_other(text[mark])) return run(text, run(text, mark, is_other), is_newline);
    size_t end = run(text, at, is_space);
    while (end > at && !is_newline(text[end - 1])) --end;
    return end > at ? end : spaces(text, at);
  });
}

Words number_words(Text text, bool single) {
  return cut(text, [&](size_t at) {
    if (!is_number(text[at])) return run(text, at, [](char32_t c) { return !is_number(c); });
    return single ? at + 1 : run(text, at, is_number);
  });
}

Words marked_words(Text text, char32_t mark) {
  return cut(text, [&](size_t at) {
    return run(text, at + 1, [&](char32_t c) { return c != mark; });
  });
}

bool is_known_pattern(const std::string& pattern) {
  return pattern == GPT2 || pattern == LLAMA3 || pattern == QWEN2;
}

Words pattern_words(Text text, const std::string& pattern) {
  if (pattern == GPT2) return gpt2_words(text);
  if (pattern == LLAMA3) return llama3_words(text, 3);
  if (pattern == QWEN2) return llama3_words(text, 1);
  throw Refused("tokenizer: expected a pattern known here, got " + pattern);
}

}  // namespace flacompile

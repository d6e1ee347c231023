// Where a tokenizer cuts text before it merges: the regular expressions that published tokenizers
// use, each as a matcher of its own.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace flacompile {

using Words = std::vector<std::u32string>;

bool is_nfc(char32_t code);  // false where NFC may change it

// The pieces that match one after the other: all of the text.
Words gpt2_words(std::u32string_view text);
Words llama3_words(std::u32string_view text, size_t longest_number);
// Numbers apart from the rest, digit by digit or each as a whole.
Words number_words(std::u32string_view text, bool single);
// Before each mark.
Words marked_words(std::u32string_view text, char32_t mark);
// By the regular expression of a tokenizer.json. Throws Refused for one not known here.
Words pattern_words(std::u32string_view text, const std::string& pattern);
bool is_known_pattern(const std::string& pattern);

}  // namespace flacompile

// JSON, read whole: what the metadata of a package and a tokenizer.json are written in.
#pragma once

#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

namespace flacompile {

// What was given cannot be used: "name: expected ..., got ...".
struct Refused : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

inline void expect(bool fits, const std::string& name, const std::string& expected,
                   const std::string& got) {
  if (!fits) throw Refused(name + ": expected " + expected + ", got " + got);
}

class Json {
 public:
  using Array = std::vector<Json>;
  using Object = std::vector<std::pair<std::string, Json>>;

  // Throws Refused, naming `name`, for text that is no JSON.
  static Json parse(std::string_view text, const std::string& name);

  bool is_null() const { return std::holds_alternative<std::monostate>(value); }
  // Throw Refused for a value of another kind.
  bool boolean() const { return as<bool>("true or false"); }
  double number() const { return as<double>("a number"); }
  const std::string& text() const { return as<std::string>("a string"); }
  const Array& array() const { return as<Array>("an array"); }
  const Object& object() const { return as<Object>("an object"); }

  // The member of an object; null where there is none.
  const Json& operator[](std::string_view key) const;
  // The text of the member "type"; "null" for null.
  std::string type() const;
  // The member as a bool, or what it is by default.
  bool flag(std::string_view key, bool otherwise) const;

  std::variant<std::monostate, bool, double, std::string, Array, Object> value;

 private:
  template <class T>
  const T& as(const char* expected) const {
    const T* found = std::get_if<T>(&value);
    expect(found != nullptr, "json", expected, "another kind of value");
    return *found;
  }
};

}  // namespace flacompile

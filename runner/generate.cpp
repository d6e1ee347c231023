// Continues a text, or token ids, by a package, without Python.
//   generate model.pt2 --tokenizer tokenizer.json --prompt TEXT [options]
//   generate model.pt2 --ids 3,1,4 [options]
// Text or ids go to stdout as they come, the speed to stderr. The exit status is 2 for what was
// given and cannot be used, 1 for what failed.
#include <c10/core/InferenceMode.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <exception>
#include <iostream>
#include <map>
#include <optional>
#include <set>

#include "json.h"
#include "package.h"
#include "sampling.h"
#include "tokenizer.h"

using namespace flacompile;
using Clock = std::chrono::steady_clock;

constexpr const char* USAGE =
    "usage: generate model.pt2 (--tokenizer tokenizer.json --prompt TEXT | --ids 3,1,4)\n"
    "       [--tokens 64] [--temperature 0] [--top-p 1] [--seed 0]\n";

using Options = std::map<std::string, std::string>;

template <class Number>
Number read_number(const std::string& name, const std::string& text) {
  Number value{};
  const char* end = text.data() + text.size();
  const auto [next, error] = std::from_chars(text.data(), end, value);
  expect(error == std::errc() && next == end, name, "a number", "\"" + text + "\"");
  return value;
}

std::vector<int64_t> read_ids(const std::string& name, const std::string& text) {
  std::vector<int64_t> ids;
  for (size_t at = 0; at <= text.size();) {
    const size_t comma = std::min(text.find(',', at), text.size());
    ids.push_back(read_number<int64_t>(name, text.substr(at, comma - at)));
    at = comma + 1;
  }
  return ids;
}

Options read_options(int argc, char** argv) {
  static const std::set<std::string> NAMES = {"tokenizer", "prompt", "ids",  "tokens",
                                              "temperature", "top-p", "seed"};
  Options options;
  for (int i = 2; i < argc; i += 2) {
    const std::string given = argv[i], name = given.substr(std::min<size_t>(2, given.size()));
    expect(given == "--" + name && NAMES.count(name), "option", "one of the usage", given);
    expect(i + 1 < argc, name, "a value", "none");
    options[name] = argv[i + 1];
  }
  const bool text = options.count("prompt") && options.count("tokenizer") && !options.count("ids");
  const bool ids = options.count("ids") && !options.count("prompt");
  expect(text || ids, "prompt", "--prompt with --tokenizer, or --ids", "other options");
  return options;
}

template <class Number>
Number option(const Options& options, const std::string& name, Number otherwise) {
  const auto found = options.find(name);
  return found == options.end() ? otherwise : read_number<Number>(name, found->second);
}

double seconds_between(Clock::time_point from, Clock::time_point to) {
  return std::chrono::duration<double>(to - from).count();
}

void say(const std::string& text) { std::cout << text << std::flush; }

void run(const std::string& path, const Options& options) {
  c10::InferenceMode guard;
  const Sampling sampling{option(options, "temperature", 0.0), option(options, "top-p", 1.0),
                          option<int64_t>(options, "seed", 0)};
  const auto tokens = option<int64_t>(options, "tokens", 64);

  std::optional<Tokenizer> tokenizer;
  std::optional<Writer> writer;
  if (options.count("prompt")) writer.emplace(tokenizer.emplace(options.at("tokenizer")));
  const std::vector<int64_t> ids =
      tokenizer ? tokenizer->encode(options.at("prompt")) : read_ids("ids", options.at("ids"));
  Package package(path);
  if (tokenizer)
    expect(tokenizer->size() <= package.facts().vocabulary, "tokenizer",
           "at most " + std::to_string(package.facts().vocabulary) + " tokens",
           std::to_string(tokenizer->size()));

  const std::vector<int64_t>& end = package.facts().end;
  bool begun = false;
  auto show = [&](int64_t id) {
    say(writer ? writer->push(id) : (begun ? " " : "") + std::to_string(id));
    begun = true;
  };
  std::vector<Clock::time_point> times = {Clock::now()};
  generate(package, ids, tokens, sampling, [&](int64_t id) {
    if (times.size() == 1)
      for (const int64_t given : ids) show(given);
    times.push_back(Clock::now());
    show(id);
    return std::find(end.begin(), end.end(), id) == end.end();
  });
  say((writer ? writer->finish() : "") + "\n");

  std::cerr << "prefill " << ids.size() / seconds_between(times[0], times[1]) << " tokens/s";
  if (times.size() > 2)
    std::cerr << ", decode " << (times.size() - 2) / seconds_between(times[1], times.back())
              << " tokens/s";
  std::cerr << "\n";
}

int main(int argc, char** argv) {
  if (argc < 2 || argv[1][0] == '-') {
    std::cerr << USAGE;
    return 2;
  }
  try {
    run(argv[1], read_options(argc, argv));
    return 0;
  } catch (const Refused& error) {
    std::cerr << "generate: " << error.what() << "\n";
    return 2;
  } catch (const c10::Error& error) {
    std::cerr << "generate: " << error.what_without_backtrace() << "\n";
  } catch (const std::exception& error) {
    std::cerr << "generate: " << error.what() << "\n";
  }
  return 1;
}

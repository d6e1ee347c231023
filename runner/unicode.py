"""Writes unicode.h: python runner/unicode.py > runner/unicode.h"""

import sys
import unicodedata

CODES = [c for c in range(sys.maxunicode + 1) if not 0xD800 <= c < 0xE000]


def seconds() -> set[int]:
    """What NFC may join to the character before it."""
    found = {*range(0x1161, 0x1176), *range(0x11A8, 0x11C3)}  # Hangul vowels and finals
    for code in CODES:
        parts = unicodedata.decomposition(chr(code)).split()
        if len(parts) == 2 and not parts[0].startswith("<"):
            found.add(int(parts[1], 16))
    return found


def ranges(name: str, codes: set[int]) -> str:
    """A sorted array of the first and last of each run."""
    bounds: list[list[int]] = []
    for code in sorted(codes):
        if bounds and bounds[-1][1] == code - 1:
            bounds[-1][1] = code
        else:
            bounds.append([code, code])
    words = [f"{{{first:#x},{last:#x}}}," for first, last in bounds]
    lines = [" ".join(words[i : i + 5]) for i in range(0, len(words), 5)]
    return f"constexpr Range {name}[] = {{\n" + "\n".join(lines) + "\n};\n"


def main() -> None:
    kinds = {code: unicodedata.category(chr(code))[0] for code in CODES}
    joined = seconds()
    moved = {
        code
        for code in CODES
        if code in joined
        or unicodedata.combining(chr(code))
        or unicodedata.normalize("NFC", chr(code)) != chr(code)
    }
    print(f"// Unicode {unicodedata.unidata_version}; made by unicode.py.")
    print("#pragma once\n\nnamespace flacompile {\n\nstruct Range {\n  char32_t first, last;\n};\n")
    print(ranges("LETTERS", {code for code in CODES if kinds[code] == "L"}))
    print(ranges("NUMBERS", {code for code in CODES if kinds[code] == "N"}))
    print("// What NFC may change, alone or among others.")
    print(ranges("NOT_NFC", moved))
    print("}  // namespace flacompile")


if __name__ == "__main__":
    main()

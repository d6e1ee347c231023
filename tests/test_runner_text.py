"""The tokenizers of the runner in C++: ids and text as the library has them that wrote the file."""

import json
import random
import subprocess
import unicodedata

import pytest
from tokenizer_files import sentencepiece, teacher
from tokenizers import Tokenizer, pre_tokenizers

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("export")]  # where the programs are built


def cuts(*steps):
    """A sequence of pre-tokenizers."""
    return json.loads(pre_tokenizers.Sequence(list(steps)).__getstate__())


def split(numbers):
    """Llama 3's, and Qwen's with one digit a word."""
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + numbers + r"| ?"
        r"[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    step = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {"type": "Sequence", "pretokenizers": [step, level | {"use_regex": False}]}


def marked():
    """As Llama 2 has it today: no normalizer, the mark as a pre-tokenizer."""
    content = sentencepiece(300, byte_fallback=False)
    mark = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": True}
    return content | {"normalizer": None, "pre_tokenizer": mark, "decoder": mark}


TOKENIZERS = {
    "GPT-2": teacher,
    "GPT-2, a space first": lambda: teacher(
        pre_tokenizer=cuts(pre_tokenizers.ByteLevel(add_prefix_space=True))
    ),
    "SmolLM2": lambda: teacher(
        pre_tokenizer=cuts(
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        )
    ),
    "Llama 3": lambda: teacher(pre_tokenizer=split("{1,3}")),
    "Qwen": lambda: teacher(pre_tokenizer=split("")),
    "Llama 2": lambda: sentencepiece(600, byte_fallback=True),
    "Llama 2, marked": marked,
}


def texts():
    """Edge cases, then 300 of random characters, most of them those that cuts look at."""
    draw = random.Random(0)
    edges = "aZsS tTrevmldLLẞſ''''   \t\n\r\n\n1234567890.,!?-ÀÉéü你好🎉½²٣\u00a0\u2003\u3000\u0085"
    known = [
        c for c in range(1, 0x110000) if unicodedata.category(chr(c)) not in ("Cn", "Co", "Cs")
    ]
    yield from ("Return the ", "I'll, he'S", "a  b\n\n c\r\n  d 12345", "<bos>x<eos> y", " ")
    for _ in range(300):
        length = draw.randint(1, 40)
        codes = [edges if draw.random() < 0.8 else known for _ in range(length)]
        yield "".join(c if isinstance(c := draw.choice(x), str) else chr(c) for x in codes)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_cpp_reads_tokenizers(name, cpp, tmp_path):
    """Ids and text as the library has them that wrote the file."""
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(TOKENIZERS[name]()), encoding="utf-8")
    tokenizer, given = Tokenizer.from_file(str(path)), list(texts())
    done = subprocess.run(
        [str(cpp / "check"), "words", str(path)],
        input="".join(text + "\0" for text in given).encode(), capture_output=True,
    )  # fmt: skip
    answers = done.stdout.decode().split("\0")[:-1]
    assert len(answers) == len(given), done.stderr
    for text, answer in zip(given, answers, strict=True):
        ids, again = answer.split("\n", 1)
        want = tokenizer.encode(text).ids
        assert [int(i) for i in ids.split()] == want, repr(text)
        assert again == tokenizer.decode(want), repr(text)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"model": {"type": "Unigram", "vocab": []}}, "expected a model of BPE, got Unigram"),
        ({"normalizer": {"type": "Lowercase"}}, "expected a normalizer of .*, got Lowercase"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "expected a pre_tokenizer of .*, got White"),
        (
            {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "x"}, "behavior": "Isolated"}},
            "expected a pattern known here, got x",
        ),
        ({"post_processor": {"type": "BertProcessing"}}, "expected a post_processor of"),
        ({"decoder": {"type": "WordPiece"}}, "expected a decoder of .*, got WordPiece"),
        ({"normalizer": {"type": "NFC"}}, "text: expected characters that NFC leaves alone"),
    ],
)
def test_cpp_refuses_other_tokenizers(parts, message, cpp, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(teacher(**parts)), encoding="utf-8")
    done = subprocess.run(
        [str(cpp / "check"), "words", str(path)],
        input="e\u0301\0".encode(), capture_output=True, text=False,
    )  # fmt: skip
    assert done.returncode == 2 and not done.stdout
    with pytest.raises(ValueError, match=message):
        raise ValueError(done.stderr.decode())

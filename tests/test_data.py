"""What data becomes: the same tokens from any kind of file, rows that a step number fixes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from flacompile.data import Corpus, DataOptions, Reader, own_samples, read, samples

TEACHER = Path(__file__).parent / "teacher"
TEXTS = ["One.", "Two words.", "And a third,\nof two lines.", "The last."]
ROWS = [{"text": text, "n": i} for i, text in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TEACHER, local_files_only=True)


def write_parquet(path: Path) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    return path


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def jsonl(rows: list[dict]) -> str:
    return "\n".join(json.dumps(row) for row in rows) + "\n"


SOURCES = {
    "text": lambda d: write(d / "a.txt", "\n\n \n".join(TEXTS) + "\n"),
    "json lines": lambda d: str(write(d / "a.jsonl", jsonl(ROWS))),
    "parquet": lambda d: write_parquet(d / "a.parquet"),
    "a list of files": lambda d: [
        write(d / "a.jsonl", jsonl(ROWS[:2])),
        write(d / "b.txt", "\n\n".join(TEXTS[2:])),
    ],
    "a pattern": lambda d: (
        (
            write(d / "a.jsonl", jsonl(ROWS[:2])),
            write(d / "b.jsonl", jsonl(ROWS[2:])),
        )
        and str(d / "*.jsonl")
    ),
    "a dataset": lambda d: datasets.Dataset.from_list(ROWS),
    "a stream": lambda d: datasets.Dataset.from_list(ROWS).to_iterable_dataset(),
    "rows": lambda d: iter(ROWS),
}


def tokens_of(tokenizer) -> list[list[int]]:
    encoded = tokenizer(TEXTS, add_special_tokens=False)["input_ids"]
    return [[tokenizer.bos_token_id, *ids] for ids in encoded]


@pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES)
def test_any_source_gives_the_same_tokens(make, tokenizer, tmp_path):
    want = tokens_of(tokenizer)
    got = read(make(tmp_path), tokenizer)
    assert got.tokens.tolist() == [t for ids in want for t in ids]
    assert [len(x) for x in want] == got.starts.diff(append=torch.tensor([len(got)])).tolist()
    limited = read(make(tmp_path), tokenizer, DataOptions(limit=7))
    assert limited.tokens.tolist() == got.tokens[:7].tolist()
    assert limited.starts.tolist() == [s for s in got.starts.tolist() if s < 7]


class NoBos:
    """A tokenizer whose documents end rather than begin."""

    bos_token_id, eos_token_id = None, 9

    def __call__(self, texts, add_special_tokens):
        return {"input_ids": [[len(word) for word in text.split()] for text in texts]}


def test_documents_without_bos_end_with_eos():
    got = read([{"x": "a bb"}, {"x": [4, 4]}, {"x": "ccc"}], NoBos(), DataOptions(field="x"))
    assert got.tokens.tolist() == [1, 2, 9, 4, 4, 3, 9] and got.starts.tolist() == [0, 3, 5]


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "int32", "int64"])
@pytest.mark.parametrize("suffix", [".npy", ".bin"])
def test_token_files_stay_on_the_disk(suffix, dtype, tmp_path):
    want, path = np.arange(300, dtype=dtype) % 50, tmp_path / f"a{suffix}"
    np.save(path, want) if suffix == ".npy" else want.tofile(path)
    got = read(path, options=DataOptions(dtype=dtype))
    assert got.tokens.tolist() == want.tolist()
    assert got.tokens.element_size() == want.itemsize
    assert got.fingerprint() == Corpus(torch.from_numpy(want.astype("int64"))).fingerprint()
    assert got.fingerprint() != got[:299].fingerprint()
    twice = read([path, path], options=DataOptions(dtype=dtype))
    assert twice.tokens.tolist() == [*want.tolist(), *want.tolist()]


BAD = {
    "no file": (lambda d: d / "a.jsonl", "data: expected a text file, got .*a.jsonl"),
    "no match": (lambda d: str(d / "*.txt"), r"data: expected a text file, got .*\*.txt"),
    "no list": (lambda d: [], "data: expected at least one file"),
    "no JSON": (lambda d: write(d / "a.jsonl", '{"text": "x"}\n{'), "JSON in line 2 of .*a.jsonl"),
    "no field": (lambda d: write(d / "a.jsonl", '{"a": 1}'), "field: expected 'text' in line 1"),
    "no text": (lambda d: [{"text": 1.5}], "field: expected a text or token ids in 'text'"),
    "no parquet": (lambda d: write(d / "a.parquet", "x"), "expected a parquet file, got"),
    "no array": (lambda d: write(d / "a.npy", "x"), "data: expected tokens in .*a.npy"),
    "no rows": (lambda d: 3, "data: expected files, rows or tokens, got int"),
    "empty": (lambda d: iter([]), "data: expected text in the rows"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "message"), BAD.values(), ids=BAD)
def test_bad_source_is_named(make, message, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=message):
        read(make(tmp_path), tokenizer)


def test_missing_column_is_named(tmp_path, tokenizer):
    with pytest.raises(ValueError, match=r"field: expected a column of .* \(text, n\), got body"):
        read(write_parquet(tmp_path / "a.parquet"), tokenizer, DataOptions(field="body"))


def test_pyarrow_that_is_not_there(tmp_path, tokenizer, monkeypatch):
    path = write_parquet(tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"the package pyarrow .* flacompile\[data\]"):
        read(path, tokenizer)


def test_a_stream_is_read_once(tokenizer, tmp_path):
    record, read_rows = tmp_path / "stream.pt", []

    def stream(rows=ROWS):
        for row in rows:
            read_rows.append(row["n"])
            yield row

    want = read(stream(), tokenizer, record=record)
    assert read_rows == [0, 1, 2, 3]
    got = read(stream(), tokenizer, record=record)
    assert read_rows[4:] == [0], "only what tells the stream from others"
    assert got.tokens.equal(want.tokens) and got.starts.equal(want.starts)
    before = record.read_bytes()
    with pytest.raises(ValueError, match=r"data: expected the stream .*stream\.pt"):
        read(stream(ROWS[1:]), tokenizer, record=record)
    assert record.read_bytes() == before


def test_a_part_knows_its_documents():
    corpus = Corpus(torch.arange(100), torch.tensor([0, 10, 40, 95]))
    part = corpus[30:96]
    assert part.tokens.equal(torch.arange(30, 96)) and part.starts.tolist() == [0, 10, 65]
    train, heldout = corpus.split(0.2, 10, 10)
    assert len(train) == 80 and heldout.tokens.equal(torch.arange(80, 100))
    with pytest.raises(ValueError, match=r"at least 90 train tokens .* got 80; give more"):
        corpus.split(0.2, 90, 10)


def ids_of(reader: Reader, steps: range) -> torch.Tensor:
    return torch.cat([b.ids for step in steps for b in reader.batches(step)])


def test_an_epoch_is_every_row_once():
    reader = Reader(Corpus(torch.arange(109)), 10, 3)
    epoch = ids_of(reader, range(reader.rows // 3))
    assert (epoch.diff() == 1).all()
    assert epoch.flatten().unique().numel() == 90 == epoch.numel()
    following = ids_of(reader, range(3, 6))
    assert following.flatten().unique().numel() == 90
    assert not epoch.equal(following)
    assert not epoch.equal(ids_of(Reader(reader.corpus, 10, 3, seed=1), range(3)))


def test_a_short_corpus_is_one_row():
    got = ids_of(Reader(Corpus(torch.arange(10)), 10, 2), range(2))
    assert got.equal(torch.arange(10).expand(4, 10))


@pytest.mark.parametrize(("accumulate", "world_size"), [(1, 1), (2, 1), (1, 4), (3, 2)])
def test_processes_and_parts_share_the_rows_of_a_step(accumulate, world_size):
    corpus = Corpus(torch.arange(1000))
    want = Reader(corpus, 7, 12).batches(5)[0].ids
    parts = [
        Reader(corpus, 7, 12, accumulate=accumulate, rank=rank, world_size=world_size).batches(5)
        for rank in range(world_size)
    ]
    assert all(len(part) == accumulate for part in parts)
    got = torch.cat([parts[rank][i].ids for i in range(accumulate) for rank in range(world_size)])
    assert got.equal(want)


def test_uneven_shares_are_refused():
    with pytest.raises(ValueError, match=r"batch_size: expected a multiple .* 2 times .* 3, got 8"):
        Reader(Corpus(torch.arange(100)), 5, 8, accumulate=2, world_size=3)


@pytest.mark.parametrize("known", [True, False], ids=["starts", "separator"])
def test_packed_rows_know_their_documents(known):
    tokens = torch.randint(1, 50, (400,), generator=torch.Generator().manual_seed(0))
    starts = torch.tensor([0, 3, 4, 50, 51, 52, 130, 260, 390])
    tokens[starts] = 0
    corpus = Corpus(tokens, starts if known else None)
    reader = Reader(corpus, 32, 4, documents=True, separator=None if known else 0)
    for step in range(3):
        (batch,) = reader.batches(step)
        bounds, position = [], []
        for row in batch.ids.tolist():
            for i, token in enumerate(row):
                new = i == 0 or token == 0
                position.append(0 if new else position[-1] + 1)
                bounds += [len(position) - 1] if new else []
        assert batch.position_ids.flatten().tolist() == position
        assert batch.cu_seqlens.tolist() == [*bounds, 128]


def test_documents_without_bounds_are_refused():
    with pytest.raises(ValueError, match=r"data: expected documents whose bounds are known"):
        Reader(Corpus(torch.arange(100)), 5, 4, documents=True)


def test_tokens_outside_the_vocabulary_are_refused():
    reader = Reader(Corpus(torch.arange(100)), 50, 1, vocabulary=80)
    with pytest.raises(ValueError, match=r"data: expected token ids from 0 to 79, got \d+ to \d+"):
        ids_of(reader, range(2))


def test_own_samples_are_taken_up_again(tmp_path, monkeypatch):
    monkeypatch.setattr(samples, "TOGETHER", 8)
    teacher = AutoModelForCausalLM.from_pretrained(TEACHER, local_files_only=True).eval()
    arguments = {"sequence_length": 12, "temperature": 1.5, "seed": 3}
    want = own_samples(teacher, 100, folder=tmp_path / "a", **arguments)
    lengths = want.starts.diff(append=torch.tensor([len(want)]))
    assert len(want) >= 100 and lengths.max() == 12
    assert (want.tokens[want.starts] == 0).all()
    files = sorted((tmp_path / "a").glob("*.pt"))
    files[-1].unlink()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    got = own_samples(teacher, 100, folder=tmp_path / "a", **arguments)
    assert torch.get_rng_state().equal(state)
    assert got.tokens.equal(want.tokens) and got.starts.equal(want.starts) and len(files) > 1
    with pytest.raises(ValueError, match="to hold samples of this model"):
        own_samples(teacher, 10, folder=tmp_path / "a", **{**arguments, "seed": 4})


def test_own_samples_end_with_eos(tmp_path, monkeypatch):
    monkeypatch.setattr(samples, "TOGETHER", 8)
    teacher = AutoModelForCausalLM.from_pretrained(TEACHER, local_files_only=True).eval()
    teacher.generation_config.eos_token_id = list(range(1, 200))
    got = own_samples(teacher, 60, 20, tmp_path, temperature=2.0)
    last = torch.cat([got.starts[1:], torch.tensor([len(got)])]) - 1
    ends = (got.tokens >= 1) & (got.tokens < 200)
    whole = got.starts.diff(append=torch.tensor([len(got)])) < 20
    assert ends[last][whole].all() and whole.any()
    assert ends.sum() == ends[last].sum(), "nothing follows the end"

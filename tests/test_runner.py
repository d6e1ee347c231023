"""The runners of packages, in Python and C++: the same refusals, tokens and text."""

import json
import subprocess
import zipfile
from importlib import import_module
from pathlib import Path

import pytest
import torch
from tokenizer_files import sentencepiece

from flacompile import runner
from flacompile.cli import main
from flacompile.runner import DecodeGraph, Package, Sampler, Sampling, choose, generate
from flacompile.slots import Slots
from flacompile.text import pieces

ROOT = Path(__file__).parents[1]
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
WARM = Sampling(temperature=1.5, top_p=0.9, seed=3)

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("export")]  # where the package is made


@pytest.fixture(scope="module")
def loaded(exported):
    return Package(exported.path)


def run(*command):
    """A finished process; its locale and threads are those of the tests."""
    return subprocess.run(list(map(str, command)), capture_output=True, encoding="utf-8")


def bad_inputs(package):
    """By the same names as in runner/check.cpp."""
    ids, token = torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 1, dtype=torch.int64)
    states, vocabulary = package.begin(2), package.facts["vocabulary"]
    first, rest = states[0], states[1:]
    strided = first.transpose(-1, -2).contiguous().transpose(-1, -2)
    return {
        "no tokens": lambda: package.prefill(ids[:, :0]),
        "no rows": lambda: package.prefill(ids[:0], states),
        "one dimension": lambda: package.prefill(ids[0]),
        "int32": lambda: package.prefill(ids.int()),
        "strided ids": lambda: package.prefill(torch.ones(3, 2, dtype=torch.int64).t()),
        "id too large": lambda: package.prefill(ids * vocabulary),
        "id below 0": lambda: package.prefill(-ids),
        "other device": lambda: package.prefill(ids.to("meta")),
        "batch of begin": lambda: package.prefill(ids, package.begin(3)),
        "two tokens": lambda: package.decode(ids, states),
        "strided token": lambda: package.decode(ids[:, :1], states),
        "token too large": lambda: package.decode(token * vocabulary, states),
        "no state": lambda: package.decode(token, ()),
        "batch of states": lambda: package.decode(token[:1], states),
        "strided state": lambda: package.decode(token, (strided, *rest)),
        "state of float64": lambda: package.decode(token, (first.double(), *rest)),
        "state of a device": lambda: package.decode(token, (first.to("meta"), *rest)),
    }


def test_bad_input_is_refused_alike(package, loaded, cpp):
    refusals = {}
    for name, call in bad_inputs(loaded).items():
        with pytest.raises(ValueError, match=r"^\S+: expected .*, got ") as refused:
            call()
        refusals[name] = str(refused.value)
    done = run(cpp / "check", "inputs", package)
    assert dict(line.split("\t") for line in done.stdout.splitlines()) == refusals, done.stderr


@pytest.mark.parametrize(
    ("fact", "value", "message"),
    [
        ("torch", '"1.13.1+cpu"', "package: expected one made with torch .*, got torch 1.13.1"),
        ("device", '"mps"', "package: expected one for a device of this machine, got mps"),
        ("processor", '["avx512_4fmaps"]', "package: expected one for this processor, got one"),
        ("vocabulary", None, "package: expected one of flacompile.export, got .*vocabulary"),
        ("code", None, "package: expected one that loads, got"),
        (None, None, "package: expected a .pt2 package, got .*zip"),
    ],
)
def test_other_packages_are_refused(fact, value, message, package, cpp, tmp_path):
    """Those of another machine are made by changing what the metadata says; one has no code."""
    other = tmp_path / "other.pt2"
    if fact is None:
        other.write_bytes(package.read_bytes()[:5000])
    else:
        with zipfile.ZipFile(package) as old, zipfile.ZipFile(other, "w") as new:
            names = [x for x in old.namelist() if not (fact == "code" and x.endswith(".so"))]
            for name in names:
                content = old.read(name)
                if name.endswith("_metadata.json"):
                    facts = {k: v for k, v in json.loads(content).items() if k != fact}
                    content = json.dumps(facts | ({fact: value} if value else {}))
                new.writestr(name, content)
    with pytest.raises(ValueError, match=message):
        Package(other)
    done = run(cpp / "generate", other, "--ids", "1")
    assert done.returncode == 2
    with pytest.raises(ValueError, match=message):
        raise ValueError(done.stderr)


def test_greedy_tokens_are_those_of_the_model(exported, loaded):
    output = exported.model.generate(
        torch.tensor([PROMPT]), max_new_tokens=12, do_sample=False, eos_token_id=None
    )
    assert PROMPT + list(generate(loaded, PROMPT, tokens=12)) == output[0].tolist()


@torch.inference_mode()
def test_a_graph_holds_what_decode_does(package, loaded, cpp):
    """What it launches, that is, in both runners; the launch needs CUDA."""
    assert run(cpp / "check", "graph", package).stdout.split() == ["equal"] * 3 + ["refused"]
    ids = torch.tensor([PROMPT, PROMPT[::-1]])
    logits, *states = loaded.prefill(ids)
    graph = DecodeGraph(loaded, [x.clone() for x in states])
    for _ in range(3):
        token = logits.argmax(-1, keepdim=True)
        logits, *states = loaded.decode(token, states)
        graph._token.copy_(token)
        assert torch.equal(graph.step(), logits)
    graph._token[1] = loaded.facts["vocabulary"]
    got = graph.step()
    assert got[0].isfinite().all() and got[1].isnan().all()
    states[loaded.facts["position"]].fill_(1200)
    with pytest.raises(
        ValueError, match="ids: expected at most 1200 tokens in all, got 1200 and 1"
    ):
        DecodeGraph(loaded, states)


def test_a_package_of_another_gpu_is_refused(loaded, monkeypatch):
    facts = loaded.facts | {"device": "cuda", "AOTI_COMPUTE_CAPABILITY": "80"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    with pytest.raises(ValueError, match="package: expected one for compute capability 90, got 80"):
        runner.check_machine(facts)
    runner.check_machine(facts | {"AOTI_COMPUTE_CAPABILITY": "90"})


def test_a_full_sequence_is_refused(loaded):
    states = loaded.begin(1)
    states[loaded.facts["position"]].fill_(1199)
    token = torch.tensor([[1]])
    with pytest.raises(ValueError, match="ids: expected at most 1200 tokens in all, got 1199 and"):
        loaded.prefill(torch.tensor([[1, 2]]), states)
    states[loaded.facts["position"]].fill_(-1)
    with pytest.raises(ValueError, match=r"states\[\d+\]: expected 0 or more, got -1"):
        loaded.decode(token, states)


@pytest.mark.parametrize("sampling", [Sampling(), WARM, Sampling(1.0, 0.5, 9)])
def test_same_tokens_from_cpp(sampling, package, loaded, cpp):
    want = list(generate(loaded, PROMPT, tokens=12, sampling=sampling, stop=loaded.facts["end"]))
    done = run(
        cpp / "generate", package, "--ids", ",".join(map(str, PROMPT)), "--tokens", 12,
        "--temperature", sampling.temperature, "--top-p", sampling.top_p, "--seed", sampling.seed,
    )  # fmt: skip
    assert [int(i) for i in done.stdout.split()] == PROMPT + want, done.stderr
    assert "prefill" in done.stderr and "tokens/s" in done.stderr


def test_runs_where_flacompile_cannot_be_imported(package, loaded, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    ids, speed = import_module("demo").run_package(package, PROMPT, 12)
    stop = loaded.facts["end"]
    assert ids == PROMPT + list(generate(loaded, PROMPT, tokens=12, stop=stop))
    assert "decode" in speed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ids", "1,x"], 'ids: expected a number, got "x"'),
        (["--ids", "1", "--tokens", "0"], "tokens: expected at least 1, got 0"),
        (["--ids", "1", "--temperature", "-1"], "temperature: expected 0 or more, got -1"),
        (["--ids", "1", "--temperature", "nan"], "temperature: expected 0 or more, got nan"),
        (["--ids", "1", "--top-p", "0"], "top_p: expected above 0, up to 1, got 0"),
        (["--ids", "1", "--seed", "-1"], "seed: expected 0 or more, got -1"),
        (["--ids", "1", "--idz", "1"], "option: expected one of the usage, got --idz"),
        (["--prompt", "a"], "prompt: expected --prompt with --tokenizer, or --ids"),
        (["--prompt", "a", "--tokenizer", "/nowhere"], "tokenizer: expected a tokenizer.json"),
    ],
)
def test_bad_options_are_refused_by_cpp(options, message, package, cpp):
    done = run(cpp / "generate", package, *options)
    assert done.returncode == 2 and message in done.stderr and not done.stdout


def test_long_prompts_are_read_in_pieces(loaded, monkeypatch):
    ids = torch.tensor([PROMPT * 20, PROMPT[::-1] * 20])
    want = loaded.prefill(ids)
    monkeypatch.setattr(runner, "PIECE", 64)
    for a, b in zip(loaded.prefill(ids), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_slots_of_a_package(loaded):
    """Sequences that come and go beside others get the tokens that each gets alone."""
    prompts = [PROMPT[i:] for i in range(6)]
    samplings = [Sampling(temperature=i % 2, seed=i) for i in range(6)]
    alone = [
        list(generate(loaded, ids, tokens=3 + i, sampling=sampling))
        for i, (ids, sampling) in enumerate(zip(prompts, samplings, strict=True))
    ]
    slots, sequences = Slots(loaded, 3), []
    for i, (ids, sampling) in enumerate(zip(prompts, samplings, strict=True)):
        while not slots.free:
            slots.step()
        sequences.append(slots.admit(ids, tokens=3 + i, sampling=sampling))
        slots.step()
    while slots.free < 3:
        slots.step()
    assert [one.tokens for one in sequences] == alone


def test_same_text_from_cpp_and_the_command(package, cpp, tmp_path, capfd):
    """Streamed from a prompt, by a tokenizer as small as the model's vocabulary."""
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(sentencepiece(60, byte_fallback=False)), encoding="utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    options = ["--prompt", "to be", "--tokens", "9", "--temperature", "1", "--seed", "5"]
    assert main(["generate", str(tmp_path), "--package", str(package), *options]) == 0
    said = capfd.readouterr()
    done = run(cpp / "generate", package, "--tokenizer", path, *options)
    assert done.returncode == 0, done.stderr
    assert said.out.startswith("to be") and len(said.out) > 10 and done.stdout == said.out
    assert "decode" in said.err and "tokens/s" in said.err


def test_text_comes_in_whole_characters():
    """A character of several tokens is said once it is whole; what never gets whole, at last."""
    tokens = [b"a", b"\xe4", b"\xbd\xa0", b" b", b"\xf0\x9f"]

    def decode(ids):
        return b"".join(tokens[i] for i in ids).decode(errors="replace")

    assert list(pieces(decode, range(5))) == ["a", "你", " b", "\ufffd"]


def test_choose():
    logits = torch.tensor([[0.1, 0.2, 0.4, 0.3]]).log().expand(3, -1)

    def drawn(sampling, count=2000):
        sampler = Sampler(sampling)
        picks = torch.cat([choose(logits[:1], [sampler]) for _ in range(count)])
        return picks.flatten().bincount(minlength=4) / count

    assert drawn(Sampling()).tolist() == [0, 0, 1, 0]
    want = {1.0: [0.1, 0.2, 0.4, 0.3], 0.6: [0, 0, 4 / 7, 3 / 7], 0.1: [0, 0, 1, 0]}
    for top_p, shares in want.items():
        got = drawn(Sampling(temperature=1.0, top_p=top_p))
        torch.testing.assert_close(got, torch.tensor(shares).float(), rtol=0, atol=0.04)
    cold = drawn(Sampling(temperature=0.5))
    torch.testing.assert_close(cold[2] / cold[3], torch.tensor(16 / 9), rtol=0.25, atol=0)

    kinds = [Sampling(), Sampling(1.0, seed=1), Sampling(2.0, 0.8, seed=2)]
    together = choose(logits, [Sampler(kind) for kind in kinds])
    for row, kind in zip(together, kinds, strict=True):
        assert torch.equal(row[None], choose(logits[:1], [Sampler(kind)]))
    for broken in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="logits: expected numbers"):
            choose(logits[:1] * 0 + broken, [Sampler(Sampling())])


@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.99])
def test_the_least_kept_is_that_of_a_sort(top_p):
    """Also where more are kept than are looked at first."""
    p = torch.rand(3, 6000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    p = (p * torch.tensor([[1.0], [4.0], [200.0]])).softmax(-1)
    falling = p.sort(-1, descending=True).values
    kept = (falling.cumsum(-1) - falling < top_p).sum(-1, keepdim=True)
    got = runner._least_kept(p, torch.full((3, 1), top_p, dtype=torch.float64))
    assert torch.equal(got, falling.gather(-1, kept - 1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -1.0}, "temperature: expected 0 or more, got -1.0"),
        ({"temperature": float("nan")}, "temperature: expected 0 or more, got nan"),
        ({"top_p": 0.0}, "top_p: expected above 0, up to 1, got 0.0"),
        ({"seed": -1}, "seed: expected 0 or more, got -1"),
    ],
)
def test_sampling_is_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**arguments)

"""A package run without the model that it came from: checked input, sampling, text as it comes.

AOTInductor does not check what it is given, so all is checked here: a strided token, another dtype
or the states of another batch would run and give wrong numbers. This file imports torch alone and
may be copied; as a program it takes and prints token ids:

    python runner.py model.pt2 --ids 3,1,4 --tokens 20

``runner/`` is the same in C++, with the same messages and, for the same seed, the same tokens.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FACTS = (
    "state_shapes", "state_dtypes", "position", "context", "vocabulary", "end", "tokenizer",
    "device", "processor", "torch",
)  # fmt: skip
PIECE = 8192  # tokens of a prompt that are read at once


class Package:
    """``prefill`` and ``decode`` of a ``.pt2`` package that ``flacompile.export`` wrote.

    Its metadata is checked before its code is loaded, and every input before its code sees it. No
    such package, or one for another device, processor or torch, is a ValueError. One thread at a
    time may use it.
    """

    def __init__(self, path: str | Path) -> None:
        from torch.export.pt2_archive._package import load_pt2

        self.facts = read_facts(path)
        check_machine(self.facts)
        self.device = torch.device(self.facts["device"])
        self._dtypes = [getattr(torch, name) for name in self.facts["state_dtypes"]]
        try:
            # load_package would load both twice; what guards threads does not go into a CUDA graph
            loaded = load_pt2(str(path), run_single_threaded=True).aoti_runners
        except RuntimeError as error:
            raise ValueError(f"package: expected one that loads, got {path}: {error}") from error
        self._prefill, self._decode = (loaded[name].loader.run for name in ("prefill", "decode"))

    def begin(self, batch_size: int) -> tuple[Tensor, ...]:
        """The states before the first token: zeros."""
        expect(batch_size >= 1, "batch_size", "at least 1", batch_size)
        return tuple(
            torch.zeros(batch_size, *shape[1:], dtype=dtype, device=self.device)
            for shape, dtype in zip(self.facts["state_shapes"], self._dtypes, strict=True)
        )

    def prefill(self, ids: Tensor, states: Sequence[Tensor] | None = None) -> tuple[Tensor, ...]:
        """T more tokens of B sequences. Many are read in pieces, in the memory of one piece.

        Args:
            ids: [B, T] int64, T >= 1.
            states: what an earlier call gave, used up by this one; None before the first.

        Returns:
            Logits after the last token [B, vocabulary], then the states.

        Raises:
            ValueError: another shape, dtype, layout or device; ids not in the vocabulary; or more
                tokens than a sequence may have.
        """
        shape = list(ids.shape)
        fits = len(shape) == 2 and min(shape) > 0
        expect(fits, "ids", "shape [B, T], both at least 1", shape)
        self._check_ids("ids", ids)
        states = self.begin(shape[0]) if states is None else states
        self.check_states(states, *shape)
        outputs = [ids, *states]
        for piece in ids.split(PIECE, 1):
            outputs = whole(self._prefill([piece.contiguous(), *outputs[1:]]))
        return tuple(outputs)

    def decode(self, token: Tensor, states: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """One more token of each sequence, [B, 1] int64: as ``prefill``, faster."""
        shape = list(token.shape)
        fits = len(shape) == 2 and shape[0] > 0 and shape[1] == 1
        expect(fits, "token", "shape [B, 1], B at least 1", shape)
        self._check_ids("token", token)
        self.check_states(states, *shape)
        return tuple(self.decode_unchecked(token, states))

    def decode_unchecked(self, token: Tensor, states: Sequence[Tensor]) -> list[Tensor]:
        """As ``decode``, for what was checked: wrong input gives wrong numbers."""
        return whole(self._decode([token, *states]))

    def _check_ids(self, name: str, ids: Tensor) -> None:
        self.check_layout(name, ids, torch.int64)
        low, high = torch.stack(ids.aminmax()).tolist()
        last = self.facts["vocabulary"] - 1
        expect(low >= 0 and high <= last, name, f"0 to {last}", low if low < 0 else high)

    def check_states(self, states: Sequence[Tensor], batch: int, time: int) -> None:
        """Raises ValueError unless they are of this batch and have room for as many tokens."""
        shapes = self.facts["state_shapes"]
        expect(len(states) == len(shapes), "states", f"{len(shapes)} tensors", len(states))
        for i, (state, shape) in enumerate(zip(states, shapes, strict=True)):
            want, got = [batch, *shape[1:]], list(state.shape)
            expect(got == want, f"states[{i}]", f"shape {want}", got)
            self.check_layout(f"states[{i}]", state, self._dtypes[i])
        context = self.facts["context"]
        if context is not None:
            i = self.facts["position"]
            low, high = torch.stack(states[i].aminmax()).tolist()
            expect(low >= 0, f"states[{i}]", "0 or more", low)
            fits = high + time <= context
            expect(fits, "ids", f"at most {context} tokens in all", f"{high} and {time} more")

    def check_layout(self, name: str, x: Tensor, dtype: torch.dtype) -> None:
        """Raises ValueError for another dtype, device or order of elements."""
        expect(x.dtype == dtype, name, type_name(dtype), type_name(x.dtype))
        expect(x.device.type == self.device.type, name, f"device {self.device.type}", x.device.type)
        expect(x.is_contiguous(), name, "a contiguous tensor", f"strides {list(x.stride())}")


class DecodeGraph:
    """``decode`` on CUDA again and again, over states that it holds: one launch a token.

    Nothing waits for values to be looked at. So a token that is not in the vocabulary gives logits
    that are no numbers, which ``choose`` refuses. States that an earlier call gave are used up.
    """

    def __init__(self, package: Package, states: Sequence[Tensor]) -> None:
        batch = len(states[0]) if states else 0
        package.check_states(states, batch, 1)
        self._package, self._states = package, list(states)
        self._token = torch.zeros(batch, 1, dtype=torch.int64, device=package.device)
        position, context = states[package.facts["position"]], package.facts["context"]
        self._left = None if context is None else context - int(position.max())

    @torch.inference_mode()
    def capture(self) -> DecodeGraph:
        """Itself, ready to be called."""
        side, self._graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # loads kernels; what is written will be written again
            self._package.decode_unchecked(self._token, self._states)
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(self._graph):
            self._logits = self.step()
        return self

    @torch.inference_mode()
    def __call__(self, token: Tensor) -> Tensor:
        """Token [B, 1] int64 -> logits [B, vocabulary], which the next call overwrites."""
        shape, got = list(self._token.shape), list(token.shape)
        expect(got == shape, "token", f"shape {shape}", got)
        self._package.check_layout("token", token, torch.int64)
        if self._left is not None:
            expect(self._left > 0, "token", "a sequence with room for it", "a full one")
            self._left -= 1
        self._token.copy_(token)
        self._graph.replay()
        return self._logits

    def step(self) -> Tensor:
        """One token, and every tensor where it was: what the graph holds."""
        wrong = (self._token < 0) | (self._token >= self._package.facts["vocabulary"])
        token = self._token.masked_fill(wrong, 0)
        logits, *after = self._package.decode_unchecked(token, self._states)
        pairs = zip(self._states, after, strict=True)
        moved = [(old, new) for old, new in pairs if old.data_ptr() != new.data_ptr()]
        for dtype in {old.dtype for old, _ in moved}:  # one kernel each
            old, new = zip(*(pair for pair in moved if pair[0].dtype == dtype), strict=True)
            torch._foreach_copy_(old, new)
        return logits.masked_fill(wrong, float("nan"))


def whole(outputs: Sequence[Tensor]) -> list[Tensor]:
    """Contiguous, for the next call: what left a convolution's window is cut off as a view."""
    return [x.contiguous() for x in outputs]


def expect(fits: bool, name: str, expected: object, got: object) -> None:
    """Raises the ValueError that every refusal here is."""
    if not fits:
        raise ValueError(f"{name}: expected {expected}, got {got}")


def type_name(dtype: torch.dtype) -> str:
    """ "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")


def read_facts(path: str | Path) -> dict[str, Any]:
    """The metadata of a package: those of FACTS, and what AOTInductor adds.

    Raises:
        ValueError: not a package that ``flacompile.export`` wrote.
    """
    loader: Any = torch._C._aoti.AOTIModelPackageLoader  # type: ignore[attr-defined]
    try:
        texts = loader.load_metadata_from_package(str(path), "prefill")
    except RuntimeError as error:
        raise ValueError(f"package: expected a .pt2 package, got {path}: {error}") from error
    missing = [name for name in FACTS if name not in texts]
    expect(not missing, "package", "one of flacompile.export", f"{path} without {missing}")
    weights = texts.get("weights", "null")  # without those beside it, it would run on nothing
    expect(weights == "null", "package", "one with its weights inside", f"weights in {weights}")
    return texts | {name: json.loads(texts[name]) for name in FACTS}


def check_machine(facts: dict[str, Any]) -> None:
    """Raises ValueError if a package with these facts would not run right here."""
    made, here = (v.split("+")[0] for v in (facts["torch"], torch.__version__))
    expect(made == here, "package", f"one made with torch {here}", f"torch {made}")
    device = facts["device"]
    known = device == "cpu" or (device == "cuda" and torch.cuda.is_available())
    expect(known, "package", "one for a device of this machine", device)
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        has, needs = f"{major}{minor}", facts["AOTI_COMPUTE_CAPABILITY"]
        expect(has == needs, "package", f"one for compute capability {has}", needs)
    has = torch.cpu.get_capabilities()
    missing = ", ".join(name for name in facts["processor"] if not has.get(name))
    expect(not missing, "package", "one for this processor", f"one that needs {missing}")


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from logits.

    temperature divides the logits, and 0 takes the most likely token. Of the others only the most
    likely ones are kept, up to the first at which their probabilities sum to top_p, and those equal
    to it (nucleus sampling, Holtzman et al. 2019, arXiv 1904.09751). The seed is that of one
    sequence.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        expect(0 <= self.temperature < float("inf"), "temperature", "0 or more", self.temperature)
        expect(0 < self.top_p <= 1, "top_p", "above 0, up to 1", self.top_p)
        expect(0 <= self.seed < 2**63, "seed", "0 or more", self.seed)


GREEDY = Sampling()


class Sampler:
    """Draws the tokens of one sequence: the same ones in any batch."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._generator = torch.Generator().manual_seed(sampling.seed)

    def row(self) -> tuple[float, float, float]:
        """Temperature, top_p and the next random number, for ``choose``."""
        number = torch.rand((), generator=self._generator, dtype=torch.float64).item()
        return self.sampling.temperature, self.sampling.top_p, number


def choose(logits: Tensor, samplers: Sequence[Sampler]) -> Tensor:
    """The next token of each sequence.

    With the probabilities p, zero for those not kept, and u uniform in [0, 1), it is the first
    token at which the sum of p exceeds u Σ p. No order among equals enters, so that no batch
    changes a token.

    Args:
        logits: [B, vocabulary].
        samplers: B of them; each gives one random number.

    Returns:
        Tokens [B, 1].

    Raises:
        ValueError: logits that are not numbers.
    """
    best, greedy = logits.float().max(-1)
    expect(bool(best.isfinite().all()), "logits", "numbers", f"a largest one of {best.tolist()}")
    rows = [sampler.row() for sampler in samplers]
    if not any(temperature for temperature, _, _ in rows):
        return greedy[:, None]
    numbers = torch.tensor(rows, dtype=torch.float64, device=logits.device)
    temperature, top_p, uniform = numbers.t()[..., None]  # [B, 1] each
    warm = torch.where(temperature > 0, temperature, 1.0)
    p = (logits.double() / warm).softmax(-1)
    p = torch.where(p >= _least_kept(p, top_p), p, 0.0)
    reached = p.cumsum(-1)
    token = (reached <= uniform * reached[:, -1:]).sum(-1, keepdim=True)
    return torch.where(temperature > 0, token, greedy[:, None])


def _least_kept(p: Tensor, top_p: Tensor) -> Tensor:
    """The smallest probability [B, 1] kept of p [B, vocabulary]; found without sorting them all."""
    count, vocabulary = 256, p.shape[-1]
    while True:
        most = p.topk(min(count, vocabulary)).values
        kept = (most.cumsum(-1) - most < top_p).sum(-1, keepdim=True)
        if count >= vocabulary or bool(((kept < count) | (top_p == 1)).all()):
            return torch.where(top_p < 1, most.gather(-1, kept - 1), 0.0)
        count *= 16


def generate(
    package: Package,
    ids: Sequence[int],
    *,
    tokens: int,
    sampling: Sampling = GREEDY,
    stop: Iterable[int] = (),
) -> Iterator[int]:
    """Yields the tokens that follow ids, each as soon as it is drawn, up to one of ``stop``.

    Args:
        package: what continues.
        ids: the prompt, at least one.
        tokens: the most tokens to draw.
        sampling: how each is drawn.
        stop: tokens that end the text; the one met is the last to be yielded.
    """
    expect(tokens >= 1, "tokens", "at least 1", tokens)
    sampler, stop = Sampler(sampling), frozenset(stop)
    prompt = torch.tensor([list(ids)], dtype=torch.int64, device=package.device)
    logits, *states = package.prefill(prompt)
    graph = None
    for i in range(tokens):
        token = choose(logits, [sampler])
        yield (new := int(token))
        if new in stop or i + 1 == tokens:
            return
        if package.device.type == "cuda":
            graph = graph or DecodeGraph(package, states).capture()
            logits = graph(token)
        else:
            logits, *states = package.decode(token, states)


class Clock:
    """Passes tokens on and measures: tokens/s of the prompt, and of what follows its first one."""

    def __init__(self, prompt: int) -> None:
        self._prompt = prompt
        self._times: list[float] = []

    def timed(self, tokens: Iterable[int]) -> Iterator[int]:
        """The same tokens."""
        self._times = [time.perf_counter()]
        for token in tokens:
            self._times.append(time.perf_counter())
            yield token

    def __str__(self) -> str:
        start, first, *rest = self._times
        text = f"prefill {self._prompt / (first - start):.1f} tokens/s"
        return text + (f", decode {len(rest) / (rest[-1] - first):.1f} tokens/s" if rest else "")


def sampling_options(options: argparse.ArgumentParser) -> None:
    """Adds those that every program over a package has."""
    options.add_argument("--tokens", type=int, default=64, help="new tokens; default: %(default)s")
    options.add_argument("--temperature", type=float, default=0.0, help="default 0: the likeliest")
    options.add_argument("--top-p", type=float, default=1.0, help="probability kept; default: all")
    options.add_argument("--seed", type=int, default=0, help="of the sampling; default: 0")


def main() -> int:
    """Ids in, ids and tokens/s out."""
    options = argparse.ArgumentParser(description="Continue token ids by a package.")
    options.add_argument("package", help="a .pt2 file")
    options.add_argument("--ids", required=True, help="the prompt, such as 3,1,4")
    sampling_options(options)
    chosen = options.parse_args()
    try:
        ids = [int(i) for i in chosen.ids.split(",")]
        sampling = Sampling(chosen.temperature, chosen.top_p, chosen.seed)
        package, clock = Package(chosen.package), Clock(len(ids))
        stop = package.facts["end"]
        tokens = generate(package, ids, tokens=chosen.tokens, sampling=sampling, stop=stop)
        ids += clock.timed(tokens)
    except ValueError as error:
        print(f"runner: {error}", file=sys.stderr)
        return 2
    print(*ids)
    print(clock, file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""A running batch that sequences join and leave: each has a slot, a row of every state.

    admit:   state_i[slot] = prefill(prompt)_i
    step:    rows = the slots in use;  state_i[rows] = decode(token[rows], state_i[rows])_i
    leave:   state_i[slot] = NaN

The states do not grow, so a slot is as large for the first token as for the millionth. The rows are
filled up to the next of a few batch sizes, so what decode compiles for are those and no others;
while all slots are in use nothing is copied. There is no server here: when to admit whom is for the
caller to say.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from flacompile.runner import GREEDY, Sampler, Sampling, choose, expect, whole


class Steps(Protocol):
    """What runs a model: a ``Package``, or a module's prefill and decode of the same form."""

    device: torch.device

    def prefill(self, ids: Tensor) -> Sequence[Tensor]:
        """Logits of the last token and the states, of prompts [B, T]."""
        ...

    def decode(self, token: Tensor, states: Sequence[Tensor]) -> Sequence[Tensor]:
        """The same after one token more, [B, 1]."""
        ...


class Running:
    """One sequence of a batch: its prompt, the tokens drawn so far, and whether it is done.

    ``failed`` says that it ended because its logits were no numbers.
    """

    def __init__(
        self, prompt: Sequence[int], tokens: int, sampling: Sampling, stop: Iterable[int]
    ) -> None:
        self.prompt = tuple(prompt)
        self.tokens: list[int] = []
        self.done = self.failed = False
        self._limit, self._stop = tokens, frozenset(stop)
        self.sampler = Sampler(sampling)

    def add(self, token: int) -> None:
        """One more token; perhaps the last."""
        self.tokens.append(token)
        self.done = token in self._stop or len(self.tokens) == self._limit


class Slots:
    """A batch of up to ``size`` sequences, stepped together.

    A sequence's tokens are those that ``generate`` draws for it alone, whoever shares the batch.

    Args:
        steps: prefill and decode; both are called in inference mode.
        size: the number of slots.
        batch_sizes: those that decode may be called with, rising up to ``size``. Default: the
            powers of two below ``size``, and ``size``.
    """

    def __init__(
        self, steps: Steps, size: int, *, batch_sizes: Sequence[int] | None = None
    ) -> None:
        expect(size >= 1, "size", "at least 1", size)
        if batch_sizes is None:
            batch_sizes = [*(2**i for i in range((size - 1).bit_length())), size]
        rising = list(batch_sizes) == sorted({*batch_sizes, size}) and min(batch_sizes) >= 1
        expect(rising, "batch_sizes", f"rising numbers up to {size}", list(batch_sizes))
        self._steps, self._batch_sizes = steps, tuple(batch_sizes)
        self._states: list[Tensor] | None = None  # [size, ...] each, from the first prefill on
        with torch.inference_mode():  # as all that is made of it later
            self._token = torch.zeros(size, 1, dtype=torch.int64, device=steps.device)
        self._running: dict[int, Running] = {}  # by slot
        self._free = list(range(size))[::-1]

    @property
    def free(self) -> int:
        """How many sequences may be admitted."""
        return len(self._free)

    @torch.inference_mode()
    def admit(
        self,
        prompt: Sequence[int],
        *,
        tokens: int,
        sampling: Sampling = GREEDY,
        stop: Iterable[int] = (),
    ) -> Running:
        """Starts a sequence in a free slot, and draws its first token.

        Args:
            prompt: ids, at least one.
            tokens: the most tokens to draw.
            sampling: how each is drawn.
            stop: tokens that end it.

        Raises:
            ValueError: no slot is free, or what ``prefill`` refuses; then nothing has changed.
        """
        expect(tokens >= 1, "tokens", "at least 1", tokens)
        expect(bool(self._free), "admit", "a free slot", f"{len(self._running)} of as many taken")
        sequence = Running(prompt, tokens, sampling, stop)
        ids = torch.tensor([sequence.prompt], dtype=torch.int64, device=self._steps.device)
        logits, *states = self._steps.prefill(ids)
        token = choose(logits, [sequence.sampler])
        if self._states is None:
            size = self._token.shape[0]
            self._states = [x.new_empty(size, *x.shape[1:]) for x in states]
            for slot in self._free:
                self._clear(slot)
        slot = self._free.pop()
        for rows, row in zip(self._states, states, strict=True):
            rows[slot] = row[0]
        self._running[slot] = sequence
        self._token[slot] = token[0]
        self._add([slot], token)
        return sequence

    @torch.inference_mode()
    def step(self) -> list[Running]:
        """Draws one token of every sequence that runs; returns them. Those done then leave."""
        slots = sorted(self._running)
        if not slots:
            return []
        stepped = [self._running[slot] for slot in slots]
        states = self._states
        assert states is not None  # whoever runs was admitted
        if self._free:
            logits = self._decode_some(slots, states)
        else:
            logits, *after = self._steps.decode(self._token, states)
            self._states = whole(after)
        fine = logits.float().amax(-1).isfinite()
        for slot in [s for s, numbers in zip(slots, fine.tolist(), strict=True) if not numbers]:
            self._running[slot].failed = self._running[slot].done = True
            self._leave(slot)
        slots = [slot for slot in slots if slot in self._running]
        if slots:
            token = choose(logits[fine], [self._running[slot].sampler for slot in slots])
            self._token[torch.tensor(slots, device=token.device)] = token
            self._add(slots, token)
        return stepped

    def _decode_some(self, slots: list[int], states: list[Tensor]) -> Tensor:
        """Logits of these slots; their states are stepped."""
        size = next(n for n in self._batch_sizes if n >= len(slots))
        rows = torch.tensor(slots + slots[-1:] * (size - len(slots)), device=self._token.device)
        logits, *after = self._steps.decode(self._token[rows], [x[rows] for x in states])
        rows = rows[: len(slots)]
        for old, new in zip(states, after, strict=True):
            old[rows] = new[: len(slots)]
        return logits[: len(slots)]

    @torch.inference_mode()
    def cancel(self, sequence: Running) -> None:
        """Ends a sequence; its slot is free at once. One that is done already stays as it is."""
        if not sequence.done:
            slot = next((s for s, x in self._running.items() if x is sequence), None)
            expect(slot is not None, "sequence", "one of this batch", "another")
            sequence.done = True
            self._leave(slot)  # type: ignore[arg-type]

    def _add(self, slots: Sequence[int], token: Tensor) -> None:
        for slot, new in zip(slots, token[:, 0].tolist(), strict=True):
            self._running[slot].add(new)
            if self._running[slot].done:
                self._leave(slot)

    def _leave(self, slot: int) -> None:
        del self._running[slot]
        self._clear(slot)
        self._free.append(slot)

    def _clear(self, slot: int) -> None:
        """NaN, so that nothing can read a freed slot and go unseen."""
        for x in self._states or []:
            x[slot] = float("nan") if x.is_floating_point() else 0

"""What every mixer shares: the contract, where tokens stand, states, and attention's projections.

A mixer maps x [B, T, D] and a state to y [B, T, D] and the next state. Padding may stand anywhere:
rows are first moved so that real tokens come first, which makes it inert for anything causal.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from flacompile.blocks import tokens_at
from flacompile.ops import context, linear_attn, linear_attn_step
from flacompile.ops.validate import check_shape, expect

if TYPE_CHECKING:
    from flacompile.passes.sites import AttentionSite, AttentionWeights


class RecurrentState(NamedTuple):
    """What a recurrent mixer carries from call to call.

    recurrent, what the primitive carries, fp32, most often one [N, H, K, V]; conv, the last inputs
    of each short convolution [N, W - 1, C], or (); position [N] int64, the number of tokens seen.
    """

    recurrent: tuple[Tensor, ...]
    conv: tuple[Tensor, ...]
    position: Tensor


class Tokens(NamedTuple):
    """Where the tokens of one call stand. Real tokens come first in each row.

    position [B, T] counts from the state's; end [N] is the position after the call. lengths [B] is
    set with a mask; cu_seqlens [N + 1], segment [T] and since [T] (the sequence of a token, and its
    distance from the start of it) are set for a pack.
    """

    position: Tensor
    end: Tensor
    lengths: Tensor | None = None
    cu_seqlens: Tensor | None = None
    segment: Tensor | None = None
    since: Tensor | None = None

    @classmethod
    def of(
        cls, x: Tensor, seen: Tensor | None, lengths: Tensor | None, cu_seqlens: Tensor | None
    ) -> Tokens:
        """For x [B, T, ...] after ``seen`` [N] tokens."""
        time = torch.arange(x.shape[1], device=x.device)
        if cu_seqlens is not None:
            cu_seqlens = cu_seqlens.long()
            seen = torch.zeros_like(cu_seqlens[1:]) if seen is None else seen
            segment = torch.searchsorted(cu_seqlens, time, right=True) - 1
            since = time - cu_seqlens[segment]
            position = (seen[segment] + since)[None]
            return cls(position, seen + cu_seqlens.diff(), None, cu_seqlens, segment, since)
        seen = time.new_zeros(x.shape[0]) if seen is None else seen
        if context.active():
            seen = seen + context.tokens_before(x.shape[1], x.device)
        return cls(
            seen[:, None] + time, seen + (x.shape[1] if lengths is None else lengths), lengths
        )

    def real(self, x: Tensor) -> tuple[Tensor, ...]:
        """Which tokens of x [B, T, ...] are no padding, [B, T] bool, where there may be some."""
        if self.lengths is None:
            return ()
        return (torch.arange(x.shape[1], device=x.device) < self.lengths[:, None],)

    def zero_padding(self, x: Tensor) -> Tensor:
        """x [B, T, ...] with zeros at padding."""
        for real in self.real(x):
            x = torch.where(real.reshape(*real.shape, *[1] * (x.ndim - 2)), x, 0.0)
        return x


class Mixer(nn.Module):
    """(x, state) -> (y, state). Subclasses define Config, State, ``sequence`` and ``step``."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """mixer: the class that it is the Config of."""

        mixer: ClassVar[type[Mixer]]
        hidden_size: int

    State: ClassVar[type] = RecurrentState
    replaced: tuple[float, ...] = ()  # shares for ``set_replaced``, neutral first
    weights_read: ClassVar[tuple[str, ...]] = ()  # linear layers that are not only called

    def __init_subclass__(cls) -> None:
        if "Config" in vars(cls):
            cls.Config.mixer = cls

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    def forward(
        self,
        x: Tensor,
        state: Any = None,
        *,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Any]:
        """Mixes T tokens.

        Args:
            x: [B, T, D].
            state: of N sequences, from ``init_state`` or an earlier call; None is the empty one.
            mask: [B, T] bool or 0/1, True at real tokens; y is zero at the others.
            cu_seqlens: [N + 1] bounds of the sequences packed in x; then B is 1.

        Returns:
            y [B, T, D] and the state after the last token of each sequence.
        """
        self.validate(x, state, mask, cu_seqlens)
        if x.shape[1] == 0:
            return self.without_tokens(x, state, cu_seqlens)
        return in_order(self.sequence, x, state, mask, cu_seqlens)

    def without_tokens(
        self, x: Tensor, state: Any, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Any]:
        """``forward`` for T = 0: y [B, 0, D], and the state as it was."""
        sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        return x, self.init_state(sequences, device=x.device) if state is None else state

    @abstractmethod
    def sequence(self, x: Tensor, state: Any, tokens: Tokens) -> tuple[Tensor, Any]:
        """``forward`` on validated input whose padding comes last: project, mix, project."""

    @abstractmethod
    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """One token: x [B, D] -> y [B, D], and the next state. As ``forward`` with T = 1."""

    @abstractmethod
    def init_state(self, batch_size: int, *, device: torch.device | None = None) -> Any:
        """The state of ``batch_size`` sequences that have not begun."""

    @abstractmethod
    def validate_state(self, state: Any, num_sequences: int) -> None:
        """As ``validate``, for the state of that many sequences."""

    @classmethod
    @abstractmethod
    def config_for(cls, site: AttentionSite) -> Config:
        """What a conversion of this attention uses."""

    @abstractmethod
    def load_attention(self, weights: AttentionWeights) -> None:
        """Takes over an attention's weights; ``config_for`` made this mixer for it."""

    @property
    def keeps_size(self) -> bool:
        """Whether the state has the size at any token that it has at the first."""
        return True

    @property
    def output_layer(self) -> nn.Linear:
        """The last projection; its columns stand in the order of the heads."""
        return self.o_proj  # type: ignore[return-value]

    @property
    def layers_by_head(self) -> list[nn.Linear]:
        """Layers whose rows stand in the order of the heads: tensor parallelism splits them."""
        layers = [layer for layer in self.children() if isinstance(layer, nn.Linear)]
        return [layer for layer in layers if layer is not self.output_layer]

    @property
    def output_heads(self) -> int:
        """Number of heads that ``output_layer`` adds up."""
        return self.config.num_heads  # type: ignore[attr-defined]

    @property
    def neutral_half_life(self) -> Tensor:
        """Where a conversion starts with half-lives: [H] in tokens, from 8 to 128 over the heads.

        A mixer that can be given others has ``set_half_life``, which takes as many.
        """
        return torch.logspace(3, 7, self.output_heads, base=2)

    @property
    def decay_groups(self) -> list[range]:
        """The heads of ``output_layer`` that share each decay of ``set_half_life``."""
        return [range(h, h + 1) for h in range(self.output_heads)]

    @torch.no_grad()
    def scale_heads(self, scale: Tensor) -> None:
        """Multiplies what each head adds to the output by scale [H], in ``output_layer``."""
        check_shape("scale", scale, (self.output_heads,))
        weight = self.output_layer.weight
        weight.mul_(scale.to(weight).repeat_interleave(weight.shape[1] // self.output_heads))

    def validate(
        self, x: Tensor, state: Any, mask: Tensor | None, cu_seqlens: Tensor | None
    ) -> None:
        """Raises ValueError, naming the argument, for whatever does not fit this mixer."""
        expect(x.ndim == 3, "x", "shape [B, T, D]", tuple(x.shape))
        if context.active():
            expect(
                isinstance(self, RecurrentMixer),
                "mixer",
                "a recurrent one in context_parallel",
                type(self),
            )
            for name, given in (("state", state), ("mask", mask), ("cu_seqlens", cu_seqlens)):
                expect(given is None, name, "None in context_parallel", type(given))
        width = self.config.hidden_size
        expect(x.shape[2] == width, "x", f"a last dimension of {width}", tuple(x.shape))
        num_sequences = x.shape[0]
        if mask is not None:
            expect(cu_seqlens is None, "mask", "None with cu_seqlens", tuple(mask.shape))
            check_shape("mask", mask, tuple(x.shape[:2]))
        if cu_seqlens is not None:
            expect(cu_seqlens.ndim == 1, "cu_seqlens", "shape [N + 1]", tuple(cu_seqlens.shape))
            integer = cu_seqlens.dtype in (torch.int32, torch.int64)
            expect(integer, "cu_seqlens", "int32 or int64", cu_seqlens.dtype)
            expect(cu_seqlens.shape[0] > 1, "cu_seqlens", "at least one sequence", "none")
            expect(x.shape[0] == 1, "x", "a batch of 1 with cu_seqlens", x.shape[0])
            num_sequences = cu_seqlens.shape[0] - 1
        if state is not None:
            name = self.State.__name__
            expect(isinstance(state, self.State), "state", name, type(state).__name__)
            self.validate_state(state, num_sequences)

    def validate_step(self, x: Tensor, state: Any) -> None:
        """As ``validate``, for ``step``."""
        expect(x.ndim == 2, "x", "shape [B, D]", tuple(x.shape))
        expect(state is not None, "state", self.State.__name__, None)
        self.validate(x[:, None], state, None, None)


class RecurrentMixer(Mixer):
    """A mixer whose state has a fixed size. Subclasses define project, output and the shapes.

    ``mix`` and ``mix_step`` call ``linear_attn`` on the first ``num_inputs`` inputs, of (q, k, v,
    gk, gv); a mixer of another primitive overrides both. What else ``output`` needs may follow.
    """

    scale: float | None = None
    num_inputs: int = 5

    @property
    @abstractmethod
    def recurrent_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shape of each recurrent tensor for one sequence, most often one (H, K, V)."""

    @property
    def conv_shapes(self) -> tuple[tuple[int, int], ...]:
        """(W - 1, C) of each tensor of inputs that the state keeps."""
        return ()

    @abstractmethod
    def project(
        self, x: Tensor, conv: tuple[Tensor, ...] | None, tokens: Tokens
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """x [B, T, D] -> the inputs of ``mix``, inert at padding, and the next conv state."""

    @abstractmethod
    def output(self, o: Tensor, x: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
        """o [B, T, H, V], the mixer's input x and those of ``mix`` -> y [B, T, D]."""

    def mix(
        self,
        inputs: tuple[Tensor, ...],
        state: tuple[Tensor, ...] | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Inputs [B, T, H, *] -> o [B, T, H, V] and the recurrent state."""
        first = None if state is None else state[0]
        o, last = linear_attn(
            *inputs[: self.num_inputs], scale=self.scale, state=first, cu_seqlens=cu_seqlens
        )
        return o, (last,)

    def mix_step(
        self, inputs: tuple[Tensor, ...], state: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Inputs [B, H, *] -> o [B, H, V] and the recurrent state."""
        o, last = linear_attn_step(*inputs[: self.num_inputs], scale=self.scale, state=state[0])
        return o, (last,)

    def sequence(
        self, x: Tensor, state: RecurrentState | None, tokens: Tokens
    ) -> tuple[Tensor, RecurrentState]:
        """``project``, ``mix`` and ``output``, with the state of each read and written."""
        conv, recurrent = (None, None) if state is None else (state.conv, state.recurrent)
        inputs, conv = self.project(x, conv, tokens)
        o, recurrent = self.mix(inputs, recurrent, tokens.cu_seqlens)
        return self.output(o, x, inputs), RecurrentState(recurrent, conv, tokens.end)

    def step(self, x: Tensor, state: RecurrentState) -> tuple[Tensor, RecurrentState]:
        """``advance``, once x [B, D] and the state are seen to fit."""
        self.validate_step(x, state)
        return self.advance(x, state)

    def advance(self, x: Tensor, state: RecurrentState) -> tuple[Tensor, RecurrentState]:
        """``step`` on validated input."""
        x = x[:, None]
        tokens = Tokens.of(x, state.position, None, None)
        inputs, conv = self.project(x, state.conv, tokens)
        o, recurrent = self.mix_step(tuple(i[:, 0] for i in inputs), state.recurrent)
        y = self.output(o[:, None], x, inputs)[:, 0]
        return y, RecurrentState(recurrent, conv, tokens.end)

    def init_state(self, batch_size: int, *, device: torch.device | None = None) -> RecurrentState:
        """Zeros: the recurrent ones in fp32 at least, what a conv keeps in the weights' dtype."""
        weight = next(self.parameters())
        device = weight.device if device is None else device
        accumulator = torch.promote_types(weight.dtype, torch.float32)
        return RecurrentState(
            tuple(
                torch.zeros(batch_size, *shape, dtype=accumulator, device=device)
                for shape in self.recurrent_shapes
            ),
            tuple(
                torch.zeros(batch_size, *shape, dtype=weight.dtype, device=device)
                for shape in self.conv_shapes
            ),
            torch.zeros(batch_size, dtype=torch.int64, device=device),
        )

    def validate_state(self, state: RecurrentState, num_sequences: int) -> None:
        """Number, shapes and, of the recurrent tensors, the dtype."""
        check_shape("state.position", state.position, (num_sequences,))
        accumulator = torch.promote_types(next(self.parameters()).dtype, torch.float32)
        for name, parts, shapes in (
            ("state.recurrent", state.recurrent, self.recurrent_shapes),
            ("state.conv", state.conv, self.conv_shapes),
        ):
            expect(len(parts) == len(shapes), name, f"{len(shapes)} tensors", len(parts))
            for i, (part, shape) in enumerate(zip(parts, shapes, strict=True)):
                check_shape(f"{name}[{i}]", part, (num_sequences, *shape))
        for i, part in enumerate(state.recurrent):
            expect(part.dtype == accumulator, f"state.recurrent[{i}]", str(accumulator), part.dtype)


def in_order(
    sequence: Callable[[Tensor, Any, Tokens], tuple[Tensor, Any]],
    x: Tensor,
    state: Any,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Any]:
    """``sequence`` on rows x [B, T, C] whose padding was moved to the end; y is moved back."""
    seen = None if state is None else state.position
    if mask is None:
        return sequence(x, state, Tokens.of(x, seen, None, cu_seqlens))
    mask = mask.bool()
    lengths = mask.sum(1)
    target = torch.where(mask, mask.cumsum(1), lengths[:, None] + (~mask).cumsum(1)) - 1
    x = tokens_at(x, target.argsort(1))
    y, state = sequence(x, state, Tokens.of(x, seen, lengths, None))
    y = tokens_at(y, target)
    return torch.where(mask[..., None], y, 0.0), state

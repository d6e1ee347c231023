"""Put a mixer where an attention stood, in the module tree, and take it out again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from .sites import AttentionSite
from .torch_modules import take_place

Route = Literal["mixer", "original", "zero"]


class Call(NamedTuple):
    """What a mixer needs from a call of the attention it replaces.

    Args:
        x: hidden states [B, T, D].
        state: the mixer's state, or None to start.
        mask: [B, T], True where the token is real, or None.
        cache: where the convention will put the next state, its own affair.
    """

    x: Tensor
    state: Any = None
    mask: Tensor | None = None
    cache: Any = None


class Convention(Protocol):
    """How a model calls its attention: reads the call, writes the result back."""

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """What a call of the attention asks of a mixer."""
        ...

    def write(self, call: Call, y: Tensor, state: Any) -> Any:
        """What the attention would have returned, y and the state in their places."""
        ...

    def output(self, result: Any) -> Tensor:
        """y out of what the attention returned."""
        ...


@dataclass(frozen=True)
class PlainConvention:
    """No cache: x in, y out in the shape the original returned it.

    Entries of a returned tuple other than y are None. The one mask that is read is PyTorch's
    key_padding_mask, [B, T], True or -inf at padding. With `time_first` the model's x and y are
    [T, B, D].
    """

    x_arg: int | str = 0
    num_results: int | None = None
    result_index: int = 0
    time_first: bool = False

    @classmethod
    def of(cls, site: AttentionSite) -> PlainConvention:
        """The convention that was recorded when the site was found."""
        return cls(site.x_arg, site.num_results, site.result_index, site.time_first)

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """x, batch first, and the padding."""
        x = kwargs[self.x_arg] if isinstance(self.x_arg, str) else args[self.x_arg]
        padding = kwargs.get("key_padding_mask")
        mask = None if padding is None else padding.to(torch.bool).logical_not()
        return Call(x.transpose(0, 1) if self.time_first else x, mask=mask)

    def write(self, call: Call, y: Tensor, state: Any) -> Any:
        """y as the attention returned it, among Nones; the state is dropped."""
        y = y.transpose(0, 1) if self.time_first else y
        if self.num_results is None:
            return y
        return tuple(y if i == self.result_index else None for i in range(self.num_results))

    def output(self, result: Any) -> Tensor:
        """y out of what the attention returned: the inverse of ``write``."""
        y = result if self.num_results is None else result[self.result_index]
        return y.transpose(0, 1) if self.time_first else y


class SwappedAttention(nn.Module):
    """Stands where the attention stood: y, state = mixer(x, state, mask=mask).

    Args:
        mixer: module with the mixers' forward.
        original: the attention that stood here, the teacher; None once it is given up.
        convention: reads and writes the model's calls.

    `route` says who answers: "mixer", "original" (called just as before), or "zero" (nothing is
    added to the residual stream, the floor to compare against).
    """

    def __init__(self, mixer: nn.Module, original: nn.Module | None, convention: Convention):
        super().__init__()
        self.mixer = mixer
        self.original = original
        self.convention = convention
        self.route: Route = "mixer"
        self.cu_seqlens: Tensor | None = None  # see ``packed``
        self.trained: tuple[nn.Parameter, ...] = ()  # of the original, before it was frozen

    # The attention's callers decide these arguments, so this signature is open.
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the attention's callers call, by the route: mixer, original or zero."""
        if self.route == "original":
            if self.original is None:
                raise ValueError(
                    "route: expected 'mixer' or 'zero', as finalize dropped the original, "
                    "got 'original'"
                )
            return self.original(*args, **kwargs)
        call = self.convention.read(args, kwargs)
        if self.route == "zero":
            return self.convention.write(call, torch.zeros_like(call.x), call.state)
        if call.state is not None and call.mask is None and call.x.shape[1] == 1:
            y, state = self.mixer.step(call.x[:, 0], call.state)
            return self.convention.write(call, y[:, None], state)
        y, state = self.mix(call.x, call.state, call.mask)
        return self.convention.write(call, y, state)

    def mix(self, x: Tensor, state: Any = None, mask: Tensor | None = None) -> tuple[Tensor, Any]:
        """What the mixer makes of x [B, T, D]; packed rows, laid end to end, have no padding."""
        if self.cu_seqlens is None:
            return self.mixer(x, state, mask=mask)
        y, state = self.mixer(x.flatten(0, 1)[None], state, cu_seqlens=self.cu_seqlens)
        return y.view(x.shape), state

    def extra_repr(self) -> str:
        """The route, where the model is printed."""
        return f"route={self.route!r}"


def swap_attention(
    model: nn.Module, site: AttentionSite, mixer: nn.Module, convention: Convention | None = None
) -> SwappedAttention:
    """Replaces the module at site.path, in place, and returns what stands there now.

    The original is kept, frozen, as the teacher.

    Args:
        convention: None for the plain one recorded in the site.
    """
    if site.inline is not None:
        raise ValueError(
            f"site: expected one with a module of its own, got one inline in {site.path!r}; "
            "outline_sites makes that module"
        )
    original = model.get_submodule(site.path)
    if isinstance(original, SwappedAttention):
        raise ValueError(
            f"site.path: expected an attention, got {site.path}, already swapped; "
            "restore_attention puts it back"
        )
    swapped = SwappedAttention(mixer, original, convention or PlainConvention.of(site))
    take_place(swapped, original)
    swapped.train(original.training)
    swapped.trained = tuple(p for p in original.parameters() if p.requires_grad)
    original.requires_grad_(False)
    model.set_submodule(site.path, swapped, strict=True)
    return swapped


def restore_attention(model: nn.Module, path: str) -> nn.Module:
    """Puts the original back where swap_attention took it, unfrozen as it was, and returns it."""
    swapped = model.get_submodule(path)
    if not isinstance(swapped, SwappedAttention) or swapped.original is None:
        raise ValueError(
            f"path: expected a swap that kept its original, got {path}: {swapped}; "
            "what was finalized cannot be put back"
        )
    for parameter in swapped.trained:
        parameter.requires_grad_(True)
    model.set_submodule(path, swapped.original, strict=True)
    return swapped.original


def swapped(model: nn.Module) -> dict[str, SwappedAttention]:
    """Every converted attention of a model by its path, in order."""
    return {n: m for n, m in model.named_modules() if isinstance(m, SwappedAttention)}


@contextmanager
def routed(model: nn.Module, route: Route) -> Iterator[None]:
    """Inside the block every converted attention answers by this route."""
    before: list[tuple[SwappedAttention, Route]] = [
        (layer, layer.route) for layer in swapped(model).values()
    ]
    for layer, _ in before:
        layer.route = route
    try:
        yield
    finally:
        for layer, old in before:
            layer.route = old


@contextmanager
def packed(model: nn.Module, cu_seqlens: Tensor | None) -> Iterator[None]:
    """Inside the block rows are packs of documents, which mixers keep apart.

    Args:
        cu_seqlens: bounds of the documents in the rows [B, T] laid end to end, [N + 1]; every row
            begins one. None: rows are sequences.
    """
    layers = swapped(model).values()
    for layer in layers:
        layer.cu_seqlens = cu_seqlens
    try:
        yield
    finally:
        for layer in layers:
            layer.cu_seqlens = None


def student_state(model: nn.Module) -> dict[str, Tensor]:
    """The model's tensors without the attention that was kept aside."""
    return {k: v for k, v in model.state_dict().items() if ".original." not in k}

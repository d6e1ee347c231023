"""How tensor parallelism may split each op: DTensor's sharding rules, as a table.

An op is written as the axes of its tensors. Split over an axis, every tensor that has it is split
there; an input that lacks it is whole on every rank, and an output that lacks it is the gradient of
such an input, a sum over the ranks. The axes that can be split are the batch, B, and the heads, H,
or the channels, C: no element of another row or head is ever read. Any other split is gathered.

Channels or heads of a group, G, share an input. Groups are split with them where they go evenly to
the ranks, or where each is of one head, and are whole where there is but one group.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

# inputs -> outputs; a dot is no tensor
AXES = {
    "linear_attn_forward": "BTGK BTGK BTHV BTHK BTHV BHKV . . -> BTHV BHKV",
    "linear_attn_backward": "BTGK BTGK BTHV BTHK BTHV BHKV . . BHKV BTHV BHKV"
    " -> BTGK BTGK BTHV BTHK BTHV BHKV",
    "quadratic_attn_forward": "BTHK BTHK BTHV BT BHFV . . . -> BTHV BHFV BTH",
    "quadratic_attn_backward": "BTHK BTHK BTHV BT BHFV . . BTHV BTH BTHV BHFV"
    " -> BTHK BTHK BTHV BHFV",
    "delta_rule_forward": "BTHK BTHK BTHV BTHK BTH BHKV . . -> BTHV BHKV BTHV",
    "delta_rule_backward": "BTHK BTHK BTHV BTHK BTH BHKV . . BTHV BHKV BTHV BHKV"
    " -> BTHK BTHK BTHV BTHK BTH BHKV",
    "dplr_forward": "BTHK BTHK BTHV BTHK BTHK BTHK BHKV . . -> BTHV BHKV BTHV",
    "dplr_backward": "BTHK BTHK BTHV BTHK BTHK BTHK BHKV . . BTHV BHKV BTHV BHKV"
    " -> BTHK BTHK BTHV BTHK BTHK BTHK BHKV",
    "scan_forward": "BTC BTC BC . -> BTC BC",
    "scan_backward": "BTC BC . BTC BTC BC -> BTC BTC BC",
    "selective_scan_forward": "BTC BTC CN BTGN BTGN BCN . . -> BTC BCN BTCN",
    "selective_scan_backward": "BTC BTC CN BTGN BTGN . BTCN BTC BCN . -> BTC BTC CN BTGN BTGN BCN",
    "conv_forward": "BTC CW C BWC . -> BTC BWC",
    "conv_backward": "BTC CW C BWC . BTC BWC -> BTC CW C BWC",
}

Rule = tuple[list[Placement | None], list[Placement | None]]


def rules(op: str, *args: Any) -> list[Rule]:
    """What a split of one dimension of the mesh may be: placements of the outputs and the inputs.

    Args:
        op: a name in ``AXES``.
        args: those of the op, with a specification in place of each tensor.
    """
    inputs, outputs = (side.split() for side in AXES[op].split(" -> "))
    packed = any(a == "." and hasattr(x, "shape") for a, x in zip(inputs, args, strict=True))
    splits = ["", *([] if packed else ["B"]), *_channels(inputs, args)]

    # A gradient stands where its input does; that of an input which is not there is empty.
    empty = {i for i, x in enumerate(args) if x is None and inputs[i] != "."}

    def place(axes: str, split: str, missing: Placement) -> Placement:
        """Split along the first of these axes that a tensor has, or as ``missing`` says."""
        at = [i for i, axis in enumerate(axes) if axis in split]
        return Shard(at[0]) if at else missing if split else Replicate()

    return [
        (
            [
                Replicate() if i in empty else place(axes, split, Partial())
                for i, axes in enumerate(outputs)
            ],
            [
                place(axes, split, Replicate()) if hasattr(x, "shape") else None
                for axes, x in zip(inputs, args, strict=True)
            ],
        )
        for split in splits
    ]


def _channels(inputs: list[str], args: tuple[Any, ...]) -> list[str]:
    """The axes that are split with the heads or channels, if these can be."""
    split = "H" if any("H" in axes for axes in inputs) else "C"
    grouped = [x for axes, x in zip(inputs, args, strict=True) if "G" in axes]
    if not grouped:
        return [split]
    groups = grouped[0].shape[2]
    alone = split == "H" and groups == args[inputs.index("BTHV")].shape[2]
    if groups == 1 and not alone:
        return [split]
    return [split + "G"] if alone or groups % grouped[0].mesh.size() == 0 else []


def placed(args: tuple[Any, ...]) -> tuple[Any, ...] | list[Any]:
    """The arguments of an op; all its tensors are DTensors if the first one is.

    Autograd makes plain zeros for missing gradients: those are whole on every rank.
    """
    if not isinstance(args[0], DTensor):
        return args
    mesh = args[0].device_mesh
    whole = [Replicate()] * mesh.ndim

    def known(x: Any) -> Any:
        """A plain tensor as one that every process of the mesh has whole."""
        plain = isinstance(x, Tensor) and not isinstance(x, DTensor)
        return DTensor.from_local(x, mesh, whole, run_check=False) if plain else x

    return [known(x) for x in args]


for _name in AXES:
    for _op in (_name, f"{_name}_cuda"):
        if hasattr(torch.ops.flacompile, _op):  # quadratic_attn has kernels alone
            _overload = getattr(torch.ops.flacompile, _op).default
            register_sharding(_overload)(partial(rules, _name))

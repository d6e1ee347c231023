"""Writes published_models.json: config.json, state dict and logits of the published classes.

    TRITON_INTERPRET=1 python tests/published_models.py

Needs flash-linear-attention and a CPU, where Triton interprets its kernels. Each tiny model with
random weights is saved by the published class, read by ``flacompile.lm``, and compared weight by
weight before it is written down.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from flacompile import lm

PATH = Path(__file__).parent / "published_models.json"
SMALL = {"vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 2}
GATED = SMALL | {"intermediate_size": 80}
HYBRID = {"layers": [1], "num_heads": 4, "num_kv_heads": 2}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
TINY: dict[str, list[dict[str, Any]]] = {
    "abc": [GATED | {"num_heads": 2, "num_slots": 8, "attn": HYBRID}],
    "bitnet": [GATED | {"num_heads": 4, "num_kv_heads": 2}],
    "delta_net": [
        GATED | {"num_heads": 2},
        GATED | {"num_heads": 2, "expand_k": 0.5, "use_gate": True, "allow_neg_eigval": True},
    ],
    "gated_deltanet": [
        GATED | {"num_heads": 2, "head_dim": 16, "attn": HYBRID},
        GATED | {"num_heads": 2, "num_v_heads": 4, "head_dim": 16, "use_gate": False},
    ],
    "gated_deltaproduct": [
        GATED | {"num_heads": 2, "head_dim": 16},
        GATED
        | {"num_heads": 2, "head_dim": 16, "num_householder": 2, "use_forget_gate": True},
    ],
    "gla": [
        SMALL | {"num_heads": 2, "hidden_ratio": 3, "tie_word_embeddings": True},
        GATED
        | {"num_heads": 4, "num_kv_heads": 2, "use_short_conv": True, "clamp_min": -2.0}
        | {"attn": [HYBRID, {"layers": [2], "num_heads": 2, "window_size": 5, "qkv_bias": True}]}
        | {"num_hidden_layers": 3},
    ],
    "hgrn": [GATED, GATED | {"expand_ratio": 2, "use_short_conv": True, "use_lower_bound": False}],
    "hgrn2": [
        GATED | {"expand_ratio": 16},
        GATED | {"expand_ratio": 32, "attn": HYBRID | {"layers": [0]}},
    ],
    "lightnet": [GATED | {"expand_ratio": 16, "gate_low_rank_dim": 8, "use_short_conv": True}],
    "linear_attn": [
        GATED | {"num_heads": 2, "feature_map": "hedgehog", "norm_feature_map": True},
        GATED | {"num_heads": 4, "num_kv_heads": 2, "norm_q": True, "norm_k": True},
    ],
    "mamba": [SMALL | {"state_size": 4, "use_bias": True}],
    "mamba2": [
        SMALL | {"state_size": 8, "head_dim": 16, "n_groups": groups} for groups in (1, 2)
    ],
    "mla": [
        GATED
        | {"num_heads": 2, "q_lora_rank": 24, "kv_lora_rank": 16, "v_head_dim": 16}
        | {"qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "qk_head_dim": 24}
        | {"rope_scaling": scaling}
        for scaling in (None, YARN)
    ],
    "rwkv6": [
        SMALL | {"num_heads": 2, "proj_low_rank_dim": 4, "gate_low_rank_dim": 8},
        SMALL | {"num_heads": 2, "norm_first": False, "norm_bias": False, "attn": HYBRID},
    ],
    "rwkv7": [
        SMALL | {"head_dim": 32},
        SMALL | {"num_heads": 4, "head_dim": None, "norm_first": False},
    ],
    "samba": [SMALL | {"attn": HYBRID | {"window_size": 8}, "hidden_ratio": 2}],
    "transformer": [GATED | {"num_heads": 4, "num_kv_heads": 2, "qkv_bias": True, "qk_norm": True}],
}  # fmt: skip


UNLIKE = {  # (type, case) whose logits are not written down
    ("abc", 0): "the interpreter does not run its kernel",
    ("lightnet", 0): "the interpreter does not run its kernel",
    ("mamba2", 1): "the published fallback repeats groups in another order than its kernel",
    ("mla", 1): "the published layer leaves YaRN out",
}
IDS = torch.arange(1, 13)[None]
KEPT = 16  # logits of the last token that are written down


def weights(shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    """Random ones, of norms around one."""
    torch.manual_seed(0)
    return {
        name: torch.randn(shape) * 0.3 + name.endswith("norm.weight")
        for name, shape in shapes.items()
    }


class Driver:
    """What the published library and Triton ask of a GPU's driver; no kernel is timed."""

    def get_current_device(self) -> int:
        return 0

    def get_benchmarker(self) -> Callable[..., list[float]]:
        return lambda kernel, quantiles: [1.0 for _ in quantiles]


def softmax(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, window_size: tuple[int, int], **_: Any
) -> Tensor:
    """flash-attn's function; tensors [B, T, H, K]."""
    assert causal
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    time = torch.arange(q.shape[2])
    age = time[:, None] - time
    mask = (age >= 0) & ((age <= window_size[0]) | (window_size[0] < 0))
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True).transpose(1, 2)


def interpret() -> None:
    """Imports the published library for a CPU."""
    sys.modules["flash_attn"] = flash = ModuleType("flash_attn")
    flash.flash_attn_func = softmax  # type: ignore[attr-defined]
    flash.flash_attn_varlen_func = None  # type: ignore[attr-defined]
    import_module("fla.models")  # asks for CUDA if there is a driver by now
    import_module("triton.runtime").driver.set_active(Driver())


def published(model_type: str, **fields: Any) -> PreTrainedModel:
    """The published model, built on the current device."""
    module = import_module(f"fla.models.{model_type}")
    stem = lm.KINDS[model_type].stem
    return getattr(module, f"{stem}ForCausalLM")(getattr(module, f"{stem}Config")(**fields))


def entry(model: PreTrainedModel) -> dict[str, Any]:
    config = json.loads(model.config.to_json_string())
    tied = {"lm_head.weight"} if config.get("tie_word_embeddings") else set()
    shapes = {name: list(x.shape) for name, x in model.state_dict().items() if name not in tied}
    return {"config": config, "state_dict": shapes}


def check(model: PreTrainedModel) -> None:
    """What the published class saves, ours reads."""
    with tempfile.TemporaryDirectory() as path:
        model.save_pretrained(path)
        ours = lm.from_pretrained(path).state_dict()
    want = model.state_dict()
    assert ours.keys() == want.keys(), ours.keys() ^ want.keys()
    assert all(ours[name].equal(want[name]) for name in want)


@torch.no_grad()
def logits(model: PreTrainedModel) -> list[float]:
    last = model.eval()(IDS, use_cache=False).logits[0, -1, :KEPT]
    return [float(f"{x:.7g}") for x in last.tolist()]


def main() -> None:
    warnings.simplefilter("ignore")
    disable_progress_bar()
    interpret()
    made: dict[str, list[dict[str, Any]]] = {}
    for model_type, cases in TINY.items():
        with torch.device("meta"):
            made[model_type] = [entry(published(model_type, **DEFAULT.get(model_type, DEPTH)))]
        for i, fields in enumerate(cases):
            model = published(model_type, **fields)
            written = entry(model)
            model.load_state_dict(weights(written["state_dict"]), strict=False)
            check(model)
            if (model_type, i) not in UNLIKE:
                written["logits"] = logits(model)
            made[model_type].append(written)
        print(model_type, len(cases))
    lines = json.dumps(made, separators=(",", ": ")).replace('{"config"', '\n{"config"')
    PATH.write_text(lines + "\n")


DEPTH = {"num_hidden_layers": 1}
DEFAULT = {"rwkv7": {"num_hidden_layers": 2}, "samba": DEPTH | {"attn": None}}

if __name__ == "__main__":
    main()

"""Models that cannot be looked at are refused by name, and stay as they were."""

from types import SimpleNamespace

import pytest
import torch
from models import MODELS
from torch import Tensor, nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import flacompile
from flacompile.passes.find_attention import find_attention


class Packed(nn.Module):
    """A linear layer whose weight is a method, as of packed integers, or a buffer of them."""

    def __init__(self, method: bool):
        super().__init__()
        if method:
            self.weight = lambda: torch.zeros(32, 32)
        else:
            self.register_buffer("weight", torch.zeros(32, 32, dtype=torch.uint8))


def unusable(kind: str) -> nn.Module:
    """A model whose weights are not numbers to be read."""
    model = MODELS["handwritten"]().model
    if kind == "on no device":
        return model.to("meta")
    if kind == "a wrapper":
        quantize_(model, Int8WeightOnlyConfig())
    elif kind == "of integers":
        model.blocks[1].mlp[0].weight = nn.Parameter(torch.zeros(8).to(torch.int8), False)
    elif kind == "told by the model":
        model.hf_quantizer, model.config = object(), SimpleNamespace(quantization_config="4 bits")
    else:
        model.blocks[1].mlp[0] = Packed(kind == "a method")
    return model


UNUSABLE = {
    "on no device": r"weights in memory, got tokens\.weight on the meta device; load them first",
    "a wrapper": r"plain floating-point weights, got Int8Tensor in .*qkv\.weight; convert before",
    "of integers": r"got torch\.int8 in blocks\.1\.mlp\.0\.weight",
    "a method": r"got Packed in blocks\.1\.mlp\.0\.weight",
    "a buffer": r"got torch\.uint8 in blocks\.1\.mlp\.0\.weight",
    "told by the model": "not quantised, got 4 bits; convert before",
}


@pytest.mark.parametrize(("kind", "message"), UNUSABLE.items(), ids=UNUSABLE)
def test_models_without_plain_weights_are_refused(kind, message):
    model = unusable(kind)
    modules = dict(model.named_modules())
    with pytest.raises(ValueError, match=f"model: expected .*{message}"):
        flacompile.convert(model, example_inputs=MODELS["handwritten"]().inputs)
    assert dict(model.named_modules()) == modules


class Branching(nn.Linear):
    """Which way it takes depends on numbers."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > 0 else x


def test_a_model_that_cannot_be_captured_is_refused():
    message = "model: expected one that torch.export captures on the example, got GuardOn"
    with pytest.raises(ValueError, match=message):
        find_attention(Branching(8, 8), (torch.randn(2, 8),))

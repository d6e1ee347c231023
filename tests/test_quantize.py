"""quantize_: BitNet trains as torchao does, and Ternary gives its values at two bits a weight."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchao.prototype.quantization.int4.inference_workflow import PrototypeInt4WeightOnlyConfig
from torchao.prototype.quantized_training.bitnet import BitNetTrainingConfig
from torchao.prototype.safetensors.safetensors_support import (
    flatten_tensor_state_dict,
    unflatten_tensor_state_dict,
)
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig
from torchao.quantization import quantize_ as torchao_quantize_

from flacompile import BitNet, Ternary, quantize_
from flacompile.layers.bitattn import BitLinear
from flacompile.quantize import TernaryTensor

INT4 = PrototypeInt4WeightOnlyConfig(group_size=32, set_inductor_config=False)


def strided(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    layer.weight = nn.Parameter(torch.randn(inputs, outputs).t())
    return layer


MODELS = {
    "biases": lambda: nn.Sequential(nn.Linear(30, 64), nn.ReLU(), nn.Linear(64, 9)),
    "no biases": lambda: nn.Sequential(nn.Linear(32, 16, bias=False), nn.Linear(16, 5, bias=False)),
    "norms": lambda: nn.Sequential(BitLinear(20, 33), BitLinear(33, 7, bias=True, norm_eps=1e-6)),
    "one row": lambda: nn.Sequential(nn.Linear(16, 1)),
    "strided": lambda: nn.Sequential(strided(24, 10), strided(10, 6)),
}
over_models = pytest.mark.parametrize("name", MODELS)


def model(name: str) -> nn.Sequential:
    torch.manual_seed(0)
    return MODELS[name]()


def x_of(module: nn.Sequential, *rows: int) -> torch.Tensor:
    return torch.randn(*(rows or (3, 5)), module[0].in_features)


@over_models
def test_bitnet_is_torchaos(name):
    ours, theirs = quantize_(model(name), BitNet()), model(name)
    if name == "norms":
        theirs[0].rounds = theirs[1].rounds = False
    torchao_quantize_(theirs, BitNetTrainingConfig())
    x = x_of(ours)
    (got := ours(x)).sin().sum().backward()
    (want := theirs(x)).sin().sum().backward()
    assert torch.equal(got, want)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


@over_models
def test_inference_is_the_training_forward(name):
    """Bit for bit, and the same whether the weights were trained with rounding or are plain."""
    trained = quantize_(model(name), BitNet())
    x = x_of(trained)
    want = trained(x).detach()
    assert torch.equal(quantize_(trained, Ternary())(x), want)
    assert torch.equal(quantize_(model(name), Ternary())(x), want)


def test_a_layer_with_a_norm_keeps_its_arithmetic():
    """What it rounds in floating point is what its quantised weight rounds in integers."""
    x, plain = torch.randn(4, 20), model("norms")
    got = quantize_(model("norms"), Ternary())(x)
    torch.testing.assert_close(got, plain(x), atol=1e-5, rtol=1e-5)


def test_inputs_and_gradients_of_any_strides_train():
    layers = quantize_(model("biases"), BitNet())
    x = x_of(layers, 4, 6).requires_grad_()
    want = torch.autograd.grad(layers(x).transpose(0, 1).contiguous().sin().sum(), x)[0]
    turned = x.detach().transpose(0, 1).requires_grad_()
    got = torch.autograd.grad(layers(turned).transpose(0, 1).sin().sum(), turned)[0]
    assert torch.equal(got.transpose(0, 1), want)


@pytest.mark.parametrize("config", [BitNet(), Ternary()])
def test_autocast(config):
    layers = quantize_(model("biases"), config)
    x = x_of(layers)
    with torch.autocast("cpu", torch.bfloat16):
        low = layers(x)
    assert low.dtype == torch.bfloat16
    assert (low.float() - layers(x)).norm() < 0.05 * low.norm()


def test_bits():
    layers = quantize_(nn.Sequential(nn.Linear(512, 64)), Ternary())
    weight = layers[0].weight
    assert weight.packed.nbytes + weight.scale.nbytes <= 2.1 / 8 * weight.numel()
    assert weight.dequantize().unique().numel() == 3


def test_saved_and_loaded(tmp_path):
    from safetensors.torch import load_file, save_file

    source = quantize_(model("biases"), Ternary())
    x = x_of(source)
    state, buffer = source.state_dict(), io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    tensors, metadata = flatten_tensor_state_dict(state)
    save_file(tensors, tmp_path / "model.safetensors")
    again, rest = unflatten_tensor_state_dict(load_file(tmp_path / "model.safetensors"), metadata)
    assert not rest
    for loaded in (torch.load(buffer), again, copy.deepcopy(source).state_dict()):
        other = quantize_(nn.Sequential(nn.Linear(30, 64), nn.ReLU(), nn.Linear(64, 9)), Ternary())
        other.load_state_dict(loaded)
        assert torch.equal(other(x), source(x))
    plain = model("biases").state_dict()
    assert list(quantize_(model("biases"), BitNet()).state_dict()) == list(plain)


def test_another_dtype():
    layers = quantize_(model("biases"), Ternary()).bfloat16()
    assert layers[0].weight.dtype == torch.bfloat16 and layers[0].weight.scale.dtype == torch.float
    assert layers(x_of(layers).bfloat16()).dtype == torch.bfloat16


def test_compiled_and_exported():
    """One graph; the export's weights are plain tensors, and its values those of the model."""
    from flacompile.passes.decompose import decompose

    layers = quantize_(model("biases"), Ternary()).requires_grad_(False)
    x = x_of(layers, 2)
    compiled = torch.compile(layers, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layers(x))
    program = decompose(torch.export.export(layers, (x,)))
    assert {type(w) for w in program.state_dict.values()} <= {torch.Tensor, nn.Parameter}
    assert torch.equal(program.module()(x), layers(x))


@pytest.mark.parametrize(
    ("config", "bound"),
    [
        (Int8WeightOnlyConfig(), 0.05),
        (Int8DynamicActivationInt8WeightConfig(), 0.05),
        (INT4, 0.2),
    ],
)
def test_configs_of_torchao_pass(config, bound):
    layers = model("no biases")
    x = x_of(layers)
    want = layers(x)
    got = quantize_(layers, config, lambda module, name: name == "0")(x)
    assert type(layers[0].weight) is not nn.Parameter and type(layers[1].weight) is nn.Parameter
    assert 0 < (got - want).norm() < bound * want.norm()


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.proj, self.head = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 9)
        self.head.weight = self.embedding.weight


def test_the_default_leaves_tied_weights():
    found = quantize_(Tied(), Ternary())
    assert isinstance(found.proj.weight, TernaryTensor)
    assert found.head.weight is found.embedding.weight


def everything(module: nn.Module, name: str) -> bool:
    return name == "0"


@pytest.mark.parametrize(
    ("module", "config", "filter_fn", "message"),
    [
        (nn.ReLU(), Ternary(), None, "filter_fn: expected to choose at least one"),
        (nn.Linear(4, 4), "int4", None, "config: expected a config"),
        (nn.Sequential(nn.ReLU()), BitNet(), everything, "0: expected a linear layer"),
        (nn.Sequential(nn.Linear(4, 4, device="meta")), BitNet(), None, "0.weight: expected"),
        (Tied(), Ternary(), lambda m, name: name == "head", "head.weight: expected a weight"),
        (nn.Sequential(BitLinear(9, 4)), Int8WeightOnlyConfig(), None, "0.weight: expected BitNet"),
        (
            nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 4)), INT4, None,
            r"1.weight: expected a shape that PrototypeInt4WeightOnlyConfig takes, got \(4, 32\)",
        ),
        (quantize_(nn.Linear(4, 4), Ternary()), Ternary(), None, "weight: expected a plain"),
        (quantize_(nn.Linear(4, 4), BitNet()), BitNet(), None, "weight: expected a plain"),
        (quantize_(nn.Linear(4, 4), Ternary()), BitNet(), None, "weight: expected a plain"),
    ],
)  # fmt: skip
def test_what_cannot_be_quantised_is_named(module, config, filter_fn, message):
    before = {name: id(p) for name, p in module.named_parameters()}
    with pytest.raises(ValueError, match=message):
        quantize_(module, config, filter_fn)
    assert before == {name: id(p) for name, p in module.named_parameters()}


def test_a_wrong_width_is_named():
    layer = quantize_(nn.Linear(16, 4), Ternary())
    with pytest.raises(ValueError, match=r"input: expected shape \[..., 16\]"):
        layer(torch.zeros(2, 12))
    with pytest.raises(ValueError, match="packed: expected the device of x"):
        F.linear(torch.zeros(2, 16), layer.weight.to("meta"))

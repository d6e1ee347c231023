"""Two ONNX graphs of one model: its values without torch, and errors for wrong calls."""

import json
import re
import subprocess
import sys
from pathlib import Path

import onnxruntime
import pytest
import torch
from models import VOCAB, llama

import flacompile
from flacompile.export import onnx
from flacompile.export.gate import compare, references
from flacompile.layers import MIXERS

pytestmark = pytest.mark.xdist_group("onnx")  # its fixtures are long in the making

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "runtimes.md").read_text()
PROMPT, TOKENS = [3, 1, 4, 1, 5, 9, 2, 6], 12


def converted(mixer):
    model = llama(max_position_embeddings=8192, num_hidden_layers=1)().model
    return flacompile.finalize(flacompile.convert(model, mixer=mixer)).eval()


@pytest.fixture(scope="module", params=["simple_gla", "attn"])
def exported(request, tmp_path_factory):
    """A model, what ``export_onnx`` returned, and the folder."""
    model = converted(request.param)
    folder = tmp_path_factory.mktemp("onnx") / "model"
    return model, flacompile.export_onnx(model, folder, max_length=128), folder


@pytest.fixture(scope="module")
def graphs(exported):
    return {name: onnx.load_graph(exported[2] / f"{name}.onnx") for name in ("prefill", "decode")}


@pytest.mark.slow
def test_three_files_and_every_weight_once(exported):
    model, facts, folder = exported
    assert 0 < max(facts["errors"].values()) < 1e-5
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert sorted(sizes) == ["decode.onnx", "prefill.onnx", "weights.bin"]
    assert [path.name for path in folder.parent.iterdir()] == ["model"]  # nothing partial is left
    large = [p.nbytes for p in model.parameters() if p.nbytes >= onnx.SMALL]
    assert sum(large) <= sizes["weights.bin"] < 1.5 * sum(large)  # and masks
    for name in ("prefill.onnx", "decode.onnx"):
        assert str(ROOT).encode() not in (folder / name).read_bytes()
    kept = onnxruntime.InferenceSession(folder / "decode.onnx").get_modelmeta()
    read = {key: json.loads(text) for key, text in kept.custom_metadata_map.items()}
    want = {key: fact for key, fact in facts.items() if key != "errors"}
    assert read == json.loads(json.dumps(want))


@pytest.mark.slow
def test_generates_where_there_is_no_torch(exported):
    """By the runner that the page shows."""
    model, _, folder = exported
    runner = re.search(r"^```py\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)[1]
    command = [sys.executable, "-c", f"{runner}\nassert 'torch' not in sys.modules"]
    arguments = [str(folder), str(TOKENS), *map(str, PROMPT)]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=True)
    ids = torch.tensor([PROMPT])
    want = model.generate(ids, max_new_tokens=TOKENS, do_sample=False, eos_token_id=None)
    assert [int(i) for i in done.stdout.split()] == want[0].tolist()


@pytest.mark.slow
def test_wrong_calls_are_errors(exported, graphs):
    facts = exported[1]
    prefill, decode = graphs["prefill"], graphs["decode"]
    shapes = zip(facts["state_shapes"], facts["state_dtypes"], strict=True)
    states = [torch.zeros(shape, dtype=getattr(torch, dtype)) for shape, dtype in shapes]
    ids = torch.tensor([PROMPT])
    out_of_range = "indices element out of data bounds"
    cases = [
        (prefill, ids - 2, states, out_of_range),  # -1 would be the last token
        (prefill, ids + VOCAB, states, out_of_range),
        (prefill, ids.repeat(2, 1), states, out_of_range),  # states would be broadcast
        (prefill, torch.zeros(1, onnx.LONGEST + 1, dtype=torch.long), states, out_of_range),
        (prefill, ids[:, :0], states, None),
        (prefill, ids.int(), states, "Unexpected input data type"),
        (decode, ids, states, "invalid dimensions"),
        (decode, ids[:, :1], [x.double() for x in states], "Unexpected input data type"),
    ]
    for graph, tokens, given, message in cases:
        with pytest.raises(Exception, match=message):
            graph(tokens, tuple(given))


@pytest.mark.slow
def test_the_gate_sees_wrong_values(exported, graphs):
    model, facts, _ = exported
    with torch.no_grad():
        weight = model.model.layers[0].mlp.down_proj.weight
        weight.mul_(1.01)
        cases = references(model, (65,), 128)
        weight.div_(1.01)
    shapes = list(zip(facts["state_shapes"], facts["state_dtypes"], strict=True))

    def begin(batch):
        return tuple(torch.zeros(batch, *s[1:], dtype=getattr(torch, d)) for s, d in shapes)

    with pytest.raises(ValueError, match="package: expected the model's values within"):
        compare(graphs, begin, cases)


def test_refusals(tmp_path):
    model = converted("linear_attn")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="folder: expected a new or an empty folder, got"):
        flacompile.export_onnx(model, tmp_path / "taken")
    with pytest.raises(ValueError, match="model: expected fp32 on a CPU, got torch"):
        flacompile.export_onnx(converted("linear_attn").bfloat16(), tmp_path / "new")
    with pytest.raises(ValueError, match="max_length: expected a number of tokens"):
        flacompile.export_onnx(converted("attn"), tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_the_page_has_a_row_for_every_mixer():
    rows = re.findall(r"^\| `(\w+)` \|(.*)\|$", PAGE, re.MULTILINE)
    assert [name for name, _ in rows] == list(MIXERS)
    assert all(cell.strip() for _, cells in rows for cell in cells.split("|"))

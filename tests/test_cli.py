"""The command line over the same verbs, on the tiny teacher."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import flacompile
from flacompile.cli import main, read_keep

TEACHER = Path(__file__).parent / "teacher"


def test_distill_then_generate(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text((TEACHER / "train.txt").read_text(encoding="utf-8")[:60_000], encoding="utf-8")
    out = tmp_path / "student"
    steps = ["--align-steps", "4", "--logits-steps", "2", "--batch-size", "2", "--length", "64"]
    hybrid = ["--keep", "auto:1", "--keep-after", "1", "--window", "8"]
    assert main(["distill", str(TEACHER), str(text), str(out), *hybrid, *steps]) == 0
    printed = capsys.readouterr().out
    assert "Share closed" in printed and printed.count("self_attn: kept, a gain of") == 1
    assert printed.count("-> gla and softmax over 8 tokens") == 4
    assert {"config.json", "log.jsonl", "losses.png", "distill.md"} <= {
        p.name for p in out.iterdir()
    }
    first = [json.loads(line) for line in (out / "aligned/log.jsonl").read_text().splitlines()]
    assert [(r["stage"], r["step"]) for r in first] == [("align", 1)]
    assert main(["generate", str(out), "--prompt", "Return the", "--tokens", "5"]) == 0
    assert "Return the" in capsys.readouterr().out


def test_a_conversion_is_fitted_to_the_data_and_trained_on_the_device(monkeypatch, tmp_path):
    """Not to random tokens; and never to what is held out."""
    tokens, seen = torch.arange(2000) % 50, {}
    np.save(tmp_path / "a.npy", tokens.numpy())

    def convert(model, mixer, *, calibration, **_):
        seen["calibration"] = torch.cat(list(calibration))

    def distill(model, data, *_, **__):
        seen["device"] = next(model.parameters()).device.type
        raise ValueError("far enough")

    monkeypatch.setattr(flacompile, "convert", convert)
    monkeypatch.setattr(flacompile, "report", lambda model: "")
    monkeypatch.setattr(flacompile, "distill", distill)
    command = ["distill", str(TEACHER), str(tmp_path / "a.npy"), str(tmp_path)]
    assert main([*command, "--length", "64", "--device", "meta"]) == 2
    assert seen["calibration"].equal(tokens[: 1900 // 64 * 64].view(-1, 64))
    assert seen["device"] == "meta"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert", "/nowhere", "out"], "model: expected a folder or a .gguf file"),
        (["convert", str(TEACHER), "out", "--mixer", "gal"], "mixer: expected one of abc, attn"),
        (
            ["convert", str(TEACHER), "out", "--keep", "a"],
            "keep: expected a share, indices or one of auto, recall",
        ),
        (["distill", str(TEACHER), "/nowhere", "out"], "data: expected a text file"),
        (["export", "/nowhere", "model.pt2"], "path: expected a folder with a config.json"),
    ],
)
def test_errors_are_one_line_and_a_status(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert not list(tmp_path.iterdir())


def test_keep():
    assert read_keep("0.25") == 0.25
    assert read_keep("0,5,-1") == [0, 5, -1]
    assert read_keep("auto:2") == "auto:2" and read_keep("recall") == "recall"
    assert read_keep("") == []


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"{verb} " in shown for verb in ("convert", "distill", "eval", "export", "generate"))

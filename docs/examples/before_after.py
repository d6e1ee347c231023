"""A pretrained model before and after a conversion, without training: loss and a continuation.

    python docs/examples/before_after.py MODEL text.txt [--mixer gla] [--prompt "..."]

MODEL is a folder that transformers reads, or a .gguf file. The first 1024 tokens calibrate; the
loss is of tokens 4096 to 5119.
"""

import argparse
import time
from pathlib import Path

import torch

import flacompile
from flacompile.cli import read_model

KINDS = {
    "the mixer alone": {},
    "beside a window of 64": {"window": 64},
    "so, but 1 layer in 4 kept": {"keep": 0.25, "window": 64},
}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("model")
    options.add_argument("text", type=Path)
    options.add_argument("--mixer", default="gla")
    options.add_argument("--prompt", default="The capital of France is")
    options = options.parse_args()
    model, tokenizer = read_model(options.model)
    text = options.text.read_text(encoding="utf-8")[:40000]
    ids = tokenizer(text, return_tensors="pt")["input_ids"][0]
    if len(ids) < 5120:
        raise ValueError(f"text: expected at least 5120 tokens, got {len(ids)}")
    calibration, heldout = ids[:1024].view(4, 256), ids[4096:5120].view(4, 256)
    prompt = tokenizer(options.prompt, return_tensors="pt")["input_ids"]

    @torch.no_grad()
    def show(name: str, seconds: float) -> None:
        nll = sum(model(row[None], labels=row[None]).loss.item() for row in heldout) / 4
        said = model.generate(prompt, max_new_tokens=20, do_sample=False)[0]
        print(f"| {name} | {seconds:.0f} | {nll:.2f} | {tokenizer.decode(said)!r} |", flush=True)

    print("| model | seconds to convert | nll | continuation |\n|---|---|---|---|")
    show("the original", 0.0)
    for name, how in KINDS.items():
        begin = time.perf_counter()
        flacompile.convert(model, options.mixer, calibration=[calibration], **how)
        show(name, time.perf_counter() - begin)
        flacompile.unconvert(model)


if __name__ == "__main__":
    main()

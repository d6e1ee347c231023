"""Convert, compile, train: a loop in plain PyTorch.

    python docs/examples/train.py [--steps 20] [--mixer simple_gla] [--backend inductor]

A converted model is an nn.Module like any other. This loop learns the text itself;
``flacompile.distill`` learns the teacher, which keeps more of it (docs/distill.md).
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import flacompile

TEACHER = Path(__file__).parents[2] / "tests" / "teacher"
ROWS, LENGTH = 8, 64


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--steps", type=int, default=20)
    options.add_argument("--mixer", default="simple_gla")
    options.add_argument("--backend", default="inductor", help="of torch.compile")
    options = options.parse_args()

    model = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    text = (TEACHER / "train.txt").read_text()[:100_000]
    ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]
    rows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)

    flacompile.convert(model, options.mixer, calibration=[rows[:ROWS]])
    flacompile.finalize(model)  # no teacher is needed here
    compiled = torch.compile(model, fullgraph=True, backend=options.backend)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    for step in range(options.steps):
        batch = rows[torch.randint(len(rows), (ROWS,))]
        loss = compiled(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: {loss.item():.3f}", flush=True)


if __name__ == "__main__":
    main()

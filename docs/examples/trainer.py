"""A converted model under transformers' Trainer, saved and read back.

python docs/examples/trainer.py [--steps 20] [--out out/trainer]
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import flacompile

TEACHER = Path(__file__).parents[2] / "tests" / "teacher"
LENGTH = 64


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--steps", type=int, default=20)
    options.add_argument("--out", type=Path, default=Path("out/trainer"))
    options = options.parse_args()

    model = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    text = (TEACHER / "train.txt").read_text()[:100_000]
    ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]
    rows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)

    # finalize drops the teacher, which the optimizer and the checkpoint should not see.
    flacompile.convert(model, "simple_gla", calibration=[rows[:8]])
    flacompile.finalize(model)
    arguments = TrainingArguments(
        str(options.out),
        max_steps=options.steps,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to=[],
    )
    trainer = Trainer(model, arguments, train_dataset=[{"input_ids": r, "labels": r} for r in rows])
    print(trainer.train().metrics)
    trainer.save_model()

    again = flacompile.load(options.out).to(rows.device)
    with torch.no_grad():
        torch.testing.assert_close(again(rows[:1]).logits, model.cpu().eval()(rows[:1]).logits)


if __name__ == "__main__":
    main()

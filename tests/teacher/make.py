"""Train the tiny teacher: a Llama of a million parameters, on text that every Python carries.

corpus.py collects the corpus. Left out: what a teacher for tests does not need (dropout, mixed
precision, several devices).

    python tests/teacher/make.py --out out/teacher --minutes 9.5
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
from corpus import documents, excerpt, split
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS, EOS = "<bos>", "<eos>"
VOCAB_SIZE, SEQUENCE, BATCH = 1024, 256, 8
PEAK_RATE, WARM_UP, SAVE_EVERY = 3e-3, 0.05, 30.0  # SAVE_EVERY and all times in seconds
HELDOUT_BYTES, TRAIN_BYTES = 80_000, 350_000


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE; a text is preceded by `<bos>`, as in training."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BOS, EOS],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS)


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """`<bos> text <eos>` of every document, one after the other: [T]."""
    rows = tokenizer(texts)["input_ids"]
    return torch.tensor([i for row in rows for i in (*row, tokenizer.eos_token_id)])


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The untrained teacher: 5 layers of width 128, 8 query heads on 4 key heads."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        initializer_range=0.05,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def windows(ids: Tensor, step: int) -> Tensor:
    """The batch of a step, [BATCH, SEQUENCE]: a function of the step, so that a run can resume."""
    steps = (len(ids) // SEQUENCE - 1) // BATCH
    epoch, index = divmod(step, steps)
    generator = torch.Generator().manual_seed(epoch)
    first = int(torch.randint(SEQUENCE, (), generator=generator))
    order = torch.randperm(steps * BATCH, generator=generator)
    rows = ids[first:][: steps * BATCH * SEQUENCE].view(-1, SEQUENCE)
    return rows[order[index * BATCH : (index + 1) * BATCH]]


def learning_rate(progress: float) -> float:
    """Linear warm-up, then a cosine down to zero, over the share of the time that has passed."""
    if progress < WARM_UP:
        return PEAK_RATE * max(progress, 1e-3) / WARM_UP
    return PEAK_RATE * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def save(path: Path, model: LlamaForCausalLM, optimizer: torch.optim.AdamW, run: dict) -> None:
    """Write a checkpoint beside its place, then rename it: no run leaves half a file."""
    part = path.with_suffix(".part")
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "run": run}
    torch.save(state, part)
    part.replace(path)


def train(model: LlamaForCausalLM, ids: Tensor, seconds: float, path: Path, resume: bool) -> dict:
    """Train for `seconds` of wall time, those before a resume included; returns step and time."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
    run = {"step": 0, "seconds": 0.0}
    if resume:
        state = torch.load(path)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        run = state["run"]
    saved, start = run["seconds"], time.monotonic() - run["seconds"]
    with tqdm(total=round(seconds), initial=round(saved), unit="s") as bar:
        while run["seconds"] < seconds:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(run["seconds"] / seconds)
            batch = windows(ids, run["step"])
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            run = {"step": run["step"] + 1, "seconds": time.monotonic() - start}
            bar.update(round(run["seconds"]) - bar.n)
            bar.set_postfix(step=run["step"], loss=f"{loss.item():.3f}", refresh=False)
            if run["seconds"] - saved > SAVE_EVERY:
                save(path, model, optimizer, run)
                saved = run["seconds"]
    save(path, model, optimizer, run)
    return run


@torch.no_grad()
def mean_nll(model: LlamaForCausalLM, ids: Tensor) -> float:
    """Mean nll per token in nats, over windows of SEQUENCE tokens without overlap."""
    rows = ids[: len(ids) // SEQUENCE * SEQUENCE].view(-1, SEQUENCE)
    losses = [model(input_ids=row, labels=row).loss.item() * len(row) for row in rows.split(32)]
    return sum(losses) / len(rows)


def export(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Weights in fp16, to be loaded as fp32, and the tokenizer."""
    model.half().save_pretrained(out)
    model.float().config.dtype = torch.float32
    model.config.save_pretrained(out)
    tokenizer.save_pretrained(out)


def figures(out: Path, run: dict, heldout: list[str]) -> dict:
    """What the README reports, measured on the written files."""
    model = LlamaForCausalLM.from_pretrained(out)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out)
    ids = encode(tokenizer, heldout)
    nll = mean_nll(model, ids)
    num_bytes = sum(len(text.encode()) for text in heldout)
    shipped = tokenizer((out / "heldout.txt").read_text("utf-8"), return_tensors="pt").input_ids[0]
    prompt = torch.tensor([[tokenizer.bos_token_id]])
    sample = model.generate(prompt, do_sample=True, top_k=50, temperature=0.7, max_new_tokens=300)
    return run | {
        "parameters": model.num_parameters(),
        "tokens_seen": run["step"] * BATCH * SEQUENCE,
        "heldout_tokens": len(ids),
        "heldout_nll": nll,
        "heldout_bits_per_byte": nll * len(ids) / math.log(2) / num_bytes,
        "shipped_nll": mean_nll(model, shipped[:8192]),
        "sample": tokenizer.decode(sample[0], skip_special_tokens=True),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--minutes", type=float, default=10.0, help="wall time of the training")
    parser.add_argument("--resume", action="store_true", help="go on from OUT/checkpoint.pt")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)

    texts, heldout = split(documents())
    (args.out / "heldout.txt").write_text(excerpt(heldout, HELDOUT_BYTES), "utf-8")
    (args.out / "train.txt").write_text(excerpt(texts, TRAIN_BYTES), "utf-8")
    tokenizer = train_tokenizer(texts)
    ids = encode(tokenizer, texts)
    model = build_model(tokenizer)
    run = train(model, ids, args.minutes * 60, args.out / "checkpoint.pt", args.resume)
    export(model, tokenizer, args.out)
    print(json.dumps(figures(args.out, run | {"train_tokens": len(ids)}, heldout), indent=2))


if __name__ == "__main__":
    main()

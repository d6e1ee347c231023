"""A converted model split over processes by FSDP2, trained by a plain loop.

    torchrun --nproc-per-node 2 docs/examples/fsdp2.py [--steps 20]

On GPUs where there are any, else on CPU processes. To distil over devices no script is needed:
``torchrun -m flacompile distill`` does this and more (docs/parallel.md).
"""

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import init_device_mesh
from transformers import AutoModelForCausalLM, AutoTokenizer

import flacompile

TEACHER = Path(__file__).parents[2] / "tests" / "teacher"
ROWS, LENGTH = 8, 64  # of one process


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--steps", type=int, default=20)
    options = options.parse_args()
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    dist.init_process_group()
    rank, size = dist.get_rank(), dist.get_world_size()

    model = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    text = (TEACHER / "train.txt").read_text()[:100_000]
    ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]
    rows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)

    torch.manual_seed(0)  # the same model everywhere: convert first, then split
    flacompile.convert(model, "simple_gla", calibration=[rows[:ROWS]])
    flacompile.finalize(model)
    mesh = init_device_mesh(device.type, (size,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    for step in range(options.steps):
        first = (step * size + rank) * ROWS % (len(rows) - ROWS)
        batch = rows[first : first + ROWS].to(device)
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(loss.detach_())
        if rank == 0:
            print(f"step {step}: {loss.item() / size:.3f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

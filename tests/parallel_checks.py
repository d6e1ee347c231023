"""What two processes do together, each check against one process that has everything.

``run`` starts the processes once for all of ``CHECKS``: name -> function of a mesh of two ranks.
"""

from __future__ import annotations

import datetime
import json
import os
import traceback
from dataclasses import replace
from functools import partial, partialmethod
from importlib import import_module
from pathlib import Path
from unittest.mock import patch as patched

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from mixer_cases import SIZES, variants
from mixer_inputs import WIDTH
from models import MODELS
from op_cases import OPS, Draw, error, function, gradients, leaves, tokens
from torch._dynamo.utils import counters
from torch.distributed.tensor import (
    DeviceMesh,
    DTensor,
    Replicate,
    Shard,
    distribute_tensor,
    init_device_mesh,
)
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import flacompile
from flacompile.distill import Recipe, Stage, processes
from flacompile.distill.log import read_json_lines
from flacompile.distill.prepare import compiled
from flacompile.layers import MIXERS
from flacompile.ops.sharding import AXES
from flacompile.parallel import MixerParallel, context_parallel, tensor_parallel_plan
from flacompile.passes.swap_attention import student_state

TIME, CUT = 29, 13  # tokens in all, and those of rank 0
BOUND = 1e-12
SPLIT = ["gla", "mamba2", "rwkv7", "gated_deltaproduct"]  # one of every op, and of every layout
IN_TURN = ["mamba", "mamba2", "rwkv6", "rwkv7", "hgrn", "abc", "gla"]  # all that look back


def random(*shape):
    generator = torch.Generator().manual_seed(len(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def own(mesh):
    """The tokens of this rank."""
    return slice(0, CUT) if mesh.get_local_rank() == 0 else slice(CUT, None)


def full(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def alike(what, got, want):
    """Trees of tensors; next to zero where one process has zero but for rounding."""
    assert got.shape == want.shape, what
    assert (got - want).norm() <= BOUND * (1 + want.norm()), what


def sharded(x, axes, split, mesh):
    """x split where one of the axes ``split`` is, a leaf."""
    at = [i for i, axis in enumerate(axes) if axis in split and x.shape[i] > 1]
    return distribute_tensor(x.detach(), mesh, [Shard(at[0]) if at else Replicate()])


def ops_run_on_their_part(split):
    """Without a message in the forward, and with the gradients of one process."""

    def check(mesh: DeviceMesh):
        for name, op in OPS.items():
            first = AXES.get(f"{name}_forward", "BTHK BTHK BTHV BTHK BTH BHKV ->")
            axes = [x for x in first.split(" -> ")[0].split() if len(x) > 1 or x == "C"]
            for variant in [*op.variants][:: 3 if name == "linear_attn" else 2]:
                want_args = leaves(op.tensors(variant, Draw(2, TIME, 0.3)))
                want = function(name)(*want_args[:-1], **op.options, state=want_args[-1])
                args = leaves(
                    [
                        x if x is None else sharded(x, letters, split, mesh)
                        for x, letters in zip(want_args, axes, strict=False)
                    ]
                )
                with CommDebugMode() as messages:
                    got = function(name)(*args[:-1], **op.options, state=args[-1])
                assert messages.get_total_counts() == 0, (name, variant)
                got = tuple(map(full, got))
                found = zip(
                    (*got, *gradients(got, args)),
                    (*want, *gradients(want, want_args)),
                    strict=True,
                )
                for i, (a, b) in enumerate(found):
                    assert b is None or error(full(a), b) < BOUND, (name, variant, i)

    return check


def kernels_run_on_their_part(mesh: DeviceMesh):
    """Those of quadratic_attn, which has no op of its own on a CPU, interpreted."""
    op, module = OPS["quadratic_attn"], import_module("flacompile.ops.quadratic_attn")
    draw = Draw(2, TIME, 0.3)
    want_args, mask = leaves(op.variants["None"](draw)[:3]), draw.at_tokens() < 0.5
    want = function("quadratic_attn")(*want_args, **op.options, mask=mask)
    want = *want, *gradients(want, want_args)
    for split in "BH":
        *args, part = (sharded(x, "BTH"[: x.ndim], split, mesh) for x in (*want_args, mask))
        args = leaves(args)
        taken = patched.object(module, "in_registers", lambda q, gk: True)
        with taken, CommDebugMode() as messages:
            got = function("quadratic_attn")(*args, **op.options, mask=part)
        assert messages.get_total_counts() == 0, split
        assert all(x.placements[0].is_shard() for x in got), split
        got = tuple(map(full, got))
        for i, (a, b) in enumerate(zip((*got, *gradients(got, args)), want, strict=True)):
            assert error(full(a), b) < 1e-5, (split, i)


def ops_take_the_state_of_the_rank_before(mesh: DeviceMesh):
    last = mesh.get_local_rank() == mesh.size() - 1
    for name, op in OPS.items():
        for variant in op.variants:
            args = leaves(op.tensors(variant, Draw(2, TIME, 0.3)))
            local = tokens(name, args[:-1], own(mesh))
            first = torch.zeros_like(args[-1]) if mesh.get_local_rank() else args[-1]
            local = leaves([*local, first])
            y, final = function(name)(*args[:-1], **op.options, state=args[-1])
            with context_parallel(mesh):
                y_own, final_own = function(name)(*local[:-1], **op.options, state=local[-1])
            alike((name, variant), y_own, y[:, own(mesh)])
            if last:
                alike((name, variant), final_own, final)
            weight, weight_final = random(*y.shape), random(*final.shape)
            want = (y * weight).sum() + (final * weight_final).sum()
            got = (y_own * weight[:, own(mesh)]).sum() + last * (final_own * weight_final).sum()
            names, found = (*op.names, "state"), (grads(got, local), grads(want, args))
            for key, a, b in zip(names, *found, strict=True):
                if b is None or (key == "state" and mesh.get_local_rank()):
                    continue
                if key in op.weights:
                    dist.all_reduce(a)
                elif key != "state":
                    b = b[:, own(mesh)]
                alike((name, variant, key), a, b)


def grads(loss, args):
    given = [x for x in args if x is not None]
    found = iter(torch.autograd.grad(loss, given, materialize_grads=True, allow_unused=True))
    return [x if x is None else next(found) for x in args]


def mixer(name):
    """As a conversion makes it where that is a variant, with no weight at zero."""
    fields = variants(name)
    fields = fields.get("converted", next(iter(fields.values())))
    torch.manual_seed(0)
    sizes = {"num_heads": 4} | SIZES.get(name, {}) if name != "mamba2" else SIZES[name]
    made = MIXERS[name](MIXERS[name].Config(hidden_size=WIDTH, **(sizes | fields))).double()
    for parameter in made.parameters():
        parameter.data.add_(0.1 * random(*parameter.shape))
    return made


def trained(module, x, weight):
    """y, the state, and the gradients of x and of the parameters, whole."""
    x = x.detach().requires_grad_()
    y, state = module(x)
    (y * weight).sum().backward()
    found = {k: full(p.grad) for k, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    return y.detach(), state, found | {"x": x.grad}


def mixers_are_split_by_heads(mesh: DeviceMesh):
    for name in SPLIT:
        module, x, weight = mixer(name), random(2, TIME, WIDTH), random(2, TIME, WIDTH).cos()
        y, state, want = trained(module, x, weight)
        step, _ = module.step(x[:, 0], state)
        parallelize_module(module, mesh, MixerParallel())
        y_split, state, found = trained(module, x, weight)
        for key in want:
            alike((name, key), found[key], want[key])
        alike(name, y_split, y)
        alike(name, module.step(x[:, 0], state)[0], step)


def mixers_take_the_state_of_the_rank_before(mesh: DeviceMesh):
    for name in IN_TURN:
        module, x, weight = mixer(name), random(2, TIME, WIDTH), random(2, TIME, WIDTH).cos()
        y, _, want = trained(module, x, weight)
        with context_parallel(mesh):
            y_own, _, found = trained(module, x[:, own(mesh)], weight[:, own(mesh)])
        alike(name, y_own, y[:, own(mesh)])
        x_own = found.pop("x")
        alike(name, x_own, want.pop("x")[:, own(mesh)])
        for key in want:
            dist.all_reduce(found[key])
            alike((name, key), found[key], want[key])
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    with context_parallel(mesh):
        found_compiled = trained(compiled, x[:, own(mesh)], weight[:, own(mesh)])
    alike("compiled", found_compiled[0], y_own)
    alike("compiled", found_compiled[2]["x"], x_own)


def converted(name):
    model, (ids,), _ = MODELS[name]()
    return flacompile.finalize(flacompile.convert(model.double(), "gla")), ids


def a_converted_model_is_split_like_the_original(mesh: DeviceMesh):
    model, ids = converted("llama")
    want = model(ids).logits
    want.square().mean().backward()
    gradient = {k: p.grad for k, p in model.named_parameters()}
    model.zero_grad()
    plan = tensor_parallel_plan(model) | {
        "model.layers.*.mlp.gate_proj": ColwiseParallel(),
        "model.layers.*.mlp.up_proj": ColwiseParallel(),
        "model.layers.*.mlp.down_proj": RowwiseParallel(),
    }
    parallelize_module(model, mesh, plan)
    part = model.model.layers[0].self_attn.mixer.q_proj.weight
    assert part.to_local().numel() * mesh.size() == part.numel()
    logits = model(ids).logits
    alike("logits", logits, want)
    logits.square().mean().backward()
    for key, p in model.named_parameters():
        alike(key, full(p.grad), gradient[key])
    ids = ids[:, :5]
    with torch.no_grad():
        longer = model.generate(ids, max_new_tokens=4, do_sample=False)
        for t in range(5, 9):
            assert longer[:, t].equal(model(longer[:, :t]).logits[:, -1].argmax(-1))


def a_shared_mixer_is_compiled_whole(mesh: DeviceMesh):
    """FSDP's own hooks stand outside of the graph; the sizes of a config are no variables in it."""
    module, x, weight = mixer("gla"), random(2, TIME, WIDTH), random(2, TIME, WIDTH).cos()
    y, _, want = trained(module, x, weight)
    processes._split(module, mesh)
    counters.clear()
    by_dynamo = partialmethod(torch.nn.Module.compile, backend="aot_eager")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Module, "compile", by_dynamo)
        with compiled([module]):
            y_compiled, _, found = trained(module, x, weight / mesh.size())
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    alike("y", y_compiled, y)
    for key in want:
        alike(key, found[key] * (mesh.size() if key == "x" else 1), want[key])


def a_converted_model_reads_a_part_of_the_sequence(mesh: DeviceMesh):
    model, ids = converted("llama")
    want = model(ids).logits
    with context_parallel(mesh):
        logits = model(ids[:, own(mesh)], use_cache=False).logits
    alike("logits", logits, want[:, own(mesh)])


def what_cannot_be_split_is_refused(mesh: DeviceMesh):
    q, x = torch.ones(1, 4, 2, 3), torch.ones(1, 4, WIDTH, dtype=torch.float64)
    with context_parallel(mesh):
        with pytest.raises(ValueError, match="got softmax attention"):
            F.scaled_dot_product_attention(q, q, q, is_causal=True)
        with pytest.raises(ValueError, match="cu_seqlens: expected None in context_parallel"):
            flacompile.ops.linear_attn(q, q, q, cu_seqlens=torch.tensor([0, 1, 4]))
        with pytest.raises(ValueError, match="x: expected at least 3 tokens"):
            flacompile.ops.conv(q[:, :2, 0], torch.ones(3, 4))
        with pytest.raises(ValueError, match="mixer: expected a recurrent one"):
            mixer("attn")(x)
        with pytest.raises(ValueError, match="mask: expected None"):
            mixer("gla")(x, mask=torch.ones(1, 4))
        with pytest.raises(ValueError, match="one context at a time"), context_parallel(mesh):
            pass
        with pytest.raises(ValueError, match="got a DTensor"):
            flacompile.ops.linear_attn(*[distribute_tensor(q, mesh, [Replicate()])] * 3)
    with pytest.raises(ValueError, match="device_mesh: expected a divisor of the 3 heads"):
        config = MIXERS["hgrn2"].Config(hidden_size=WIDTH, expand_ratio=16)
        parallelize_module(MIXERS["hgrn2"](config), mesh, MixerParallel())
    with pytest.raises(ValueError, match="device_mesh: expected a divisor of the 3 groups"):
        config = MIXERS["mamba2"].Config(hidden_size=WIDTH, **SIZES["mamba2"], n_groups=3)
        parallelize_module(MIXERS["mamba2"](config), mesh, MixerParallel())
    with pytest.raises(ValueError, match="module: expected a recurrent mixer, got Attention"):
        parallelize_module(mixer("attn"), mesh, MixerParallel())


TOGETHER = Recipe(
    align=Stage(steps=2),
    logits=Stage(steps=4, mixer_lr=1e-3, rest_lr=3e-4),
    sequence_length=16,
    batch_size=2,
    eval_tokens=64,
    checkpoint_every=1,
    activation_checkpointing=True,
)
IN_PARTS = replace(
    TOGETHER,
    align=replace(TOGETHER.align, accumulate=2),
    logits=replace(TOGETHER.logits, accumulate=2),
)


def distilled(out: str, recipe: Recipe):
    tokens = torch.randint(0, 61, (800,), generator=torch.Generator().manual_seed(3))
    model = flacompile.convert(MODELS["llama"]().model, "gla", init="neutral")
    flacompile.distill(model, tokens, recipe, out=out)
    return student_state(model)


def prepare():
    """Runs of one process: of the rows in two parts, of all at once, and one that is stopped."""
    torch.save(distilled("in parts", IN_PARTS), "in parts/weights.pt")
    torch.save(distilled("at once", TOGETHER), "at once/weights.pt")
    step, steps = torch.optim.AdamW.step, []

    def stop(self, *args, **kwargs):
        steps.append(1)
        if len(steps) == 5:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch.optim.AdamW, "step", stop)
        distilled("stopped", TOGETHER)


def is_the_run(out: str, reference: str, mesh: DeviceMesh):
    """Losses, norms of gradients and weights of a run in two processes."""
    weights = distilled(out, TOGETHER)
    got, want = (read_json_lines(Path(folder) / "log.jsonl") for folder in (out, reference))
    assert [(r["stage"], r["step"]) for r in got] == [(r["stage"], r["step"]) for r in want]
    for a, b in zip(got, want, strict=True):
        assert (a["loss"], a["norm"]) == pytest.approx((b["loss"], b["norm"]), rel=1e-4), (a, b)
    for key, x in torch.load(f"{reference}/weights.pt").items():
        assert (weights[key] - x).norm() <= 1e-4 * (1 + x.norm()), key


CHECKS = {
    "ops split by batch": ops_run_on_their_part("B"),
    "ops split by heads": ops_run_on_their_part("HCG"),
    "kernels split": kernels_run_on_their_part,
    "ops in turn": ops_take_the_state_of_the_rank_before,
    "mixers split by heads": mixers_are_split_by_heads,
    "mixers in turn": mixers_take_the_state_of_the_rank_before,
    "model split by heads": a_converted_model_is_split_like_the_original,
    "compiled": a_shared_mixer_is_compiled_whole,
    "model in turn": a_converted_model_reads_a_part_of_the_sequence,
    "refusals": what_cannot_be_split_is_refused,
    "distillation": partial(is_the_run, "together", "in parts"),
    "distillation that one process began": partial(is_the_run, "stopped", "at once"),
}


def _work(rank: int, size: int, folder: Path):
    torch.set_num_threads(1)
    os.chdir(folder)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=60),
    )
    mesh = init_device_mesh("cpu", (size,))
    results = {}
    for name, check in CHECKS.items():
        try:
            check(mesh)
            results[name] = ""
        except BaseException:
            results[name] = traceback.format_exc()
    (folder / f"{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


def run(folder: Path, size: int = 2) -> dict[str, str]:
    """What failed in each check, in any process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        prepare()
        patch.setenv("TRITON_INTERPRET", "1")  # the mesh is of CPUs, whatever stands beside them
        torch.multiprocessing.spawn(_work, (size, folder), size)
    found = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(size)]
    return {name: "\n".join(filter(None, (x[name] for x in found))) for name in CHECKS}

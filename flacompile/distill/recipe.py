"""What a distillation does, as data.

The order and the objectives are those that the field has converged on (RADLADS, Goldstein et al.
2025; HALO, arXiv 2601.22156): align every mixer, match the logits, lengthen the context. What is
published as harmful is not offered: no adapters in place of weights, no stage without its turn.
``Recipe()`` has sizes and rates that work from a laptop up to one GPU; ``PRESETS`` has the
published ones.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from flacompile.data import DataOptions
from flacompile.ops.validate import expect

Schedule = Literal["cosine", "linear", "constant", "wsd"]
STAGES = ("align", "logits", "long")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage: how long, on what rows, and at which rates.

    Attributes:
        steps: optimizer steps; with ``minutes`` set, at most so many. 0 leaves the stage out.
        minutes: wall time after the first step, in which much is compiled; the next few fix the
            number of steps, which a machine that slows down shortens. None: ``steps`` alone
            decides, and runs repeat bit for bit.
        mixer_lr: peak learning rate of the new mixers (AdamW).
        rest_lr: peak learning rate of everything else; 0 freezes it, which costs quality in any
            stage but align.
        schedule: of the rate after the warmup: "cosine" or "linear" down to ``final``; "constant";
            "wsd" is constant (stable) and falls in a line over the last ``decay`` of the steps.
        warmup: share of the steps in which the rate rises in a line to its peak.
        decay: share of the steps in which "wsd" falls.
        final: share of the peak rate that is left at the end.
        weight_decay: AdamW's, of matrices only.
        clip: largest norm of all gradients together; 0 does not clip.
        target: what logits and long learn: the "teacher"'s distribution, forward KL, or the "data",
            cross-entropy of the next token.
        sequence_length: tokens of one row, T; None: the recipe's.
        batch_size: rows of one step, B; None: the recipe's.
        accumulate: parts in which the rows of a step are run, one after the other.
        target_loss: the stage ends when the mean loss, over some twenty steps, is at most this.
        patience: the stage ends when that mean has not fallen for so many steps.
    """

    steps: int = 1000
    minutes: float | None = None
    mixer_lr: float = 3e-3
    rest_lr: float = 0.0
    schedule: Schedule = "cosine"
    warmup: float = 0.05
    decay: float = 0.2
    final: float = 0.1
    weight_decay: float = 0.0
    clip: float = 1.0
    target: Literal["teacher", "data"] = "teacher"
    sequence_length: int | None = None
    batch_size: int | None = None
    accumulate: int = 1
    target_loss: float | None = None
    patience: int | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "mixer_lr", "rest_lr", "weight_decay", "clip"):
            expect(getattr(self, name) >= 0, name, "at least 0", getattr(self, name))
        for name in ("warmup", "decay", "final"):
            value = getattr(self, name)
            expect(0 <= value <= 1, name, "a share from 0 to 1", value)
        for name in ("sequence_length", "batch_size", "accumulate", "patience"):
            value = getattr(self, name)
            expect(value is None or value >= 1, name, "at least 1", value)
        _expect_one_of("schedule", self.schedule, ("cosine", "linear", "constant", "wsd"))
        _expect_one_of("target", self.target, ("teacher", "data"))


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Three stages over one stream of tokens.

    Attributes:
        align: every mixer learns its attention's output from that attention's own input, all
            layers in one teacher pass; relative squared error.
        logits: the whole model learns the teacher's next-token distribution; forward KL.
        long: the same on fewer, longer rows; left out by default.
        data: how the data is read.
        sequence_length: tokens of one row, T.
        batch_size: rows of one step, B, over all processes and parts.
        heldout: share of the tokens, at their end, that is never trained on.
        eval_tokens: held-out tokens that the metrics read.
        checkpoint_every: steps between checkpoints (an interrupted run loses at most so many).
        compile: run mixers and blocks through torch.compile. "auto": on a GPU, where it pays from
            the first minutes; not on a CPU, where compiling takes minutes and gains little.
        precision: "fp32", or "bf16": autocast, over weights that are always fp32 as they train.
            "auto": bf16 on a GPU, fp32 on a CPU.
        activation_checkpointing: keep only the blocks' inputs for the backward, which runs them
            again: less memory, about a third more time.
        tied: embeddings that the head shares: "untie" trains the two apart and then shares the
            embeddings again, discarding the head (RADLADS, section 8); "keep" trains them as one.
        seed: of the order of the data and of the teacher's samples.
    """

    align: Stage = field(default_factory=lambda: Stage(steps=300))
    logits: Stage = field(default_factory=lambda: Stage(steps=300, mixer_lr=1e-3, rest_lr=3e-4))
    long: Stage = field(
        default_factory=lambda: Stage(
            steps=0, mixer_lr=3e-4, rest_lr=1e-4, sequence_length=512, batch_size=4
        )
    )
    data: DataOptions = field(default_factory=DataOptions)
    sequence_length: int = 128
    batch_size: int = 16
    heldout: float = 0.05
    eval_tokens: int = 8192
    checkpoint_every: int = 50
    compile: bool | Literal["auto"] = "auto"
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    activation_checkpointing: bool = False
    tied: Literal["untie", "keep"] = "untie"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("sequence_length", "batch_size", "eval_tokens", "checkpoint_every"):
            expect(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        expect(0 < self.heldout < 1, "heldout", "a share between 0 and 1", self.heldout)
        _expect_one_of("compile", self.compile, (True, False, "auto"))
        _expect_one_of("precision", self.precision, ("auto", "bf16", "fp32"))
        _expect_one_of("tied", self.tied, ("untie", "keep"))
        expect(self.align.target == "teacher", "align.target", "'teacher'", self.align.target)
        for name, stage in self.stages.items():
            parts = f"{name}.batch_size: expected a multiple of accumulate = {stage.accumulate}"
            if stage.batch_size is not None and stage.batch_size % stage.accumulate:
                raise ValueError(f"{parts}, got {stage.batch_size}")

    @property
    def stages(self) -> dict[str, Stage]:
        """The stages in their order, with nothing left to the recipe."""
        return {
            name: replace(
                getattr(self, name),
                sequence_length=getattr(self, name).sequence_length or self.sequence_length,
                batch_size=getattr(self, name).batch_size or self.batch_size,
            )
            for name in STAGES
        }


def _expect_one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    expect(value in allowed, name, f"one of {', '.join(map(repr, allowed))}", repr(value))


PRESETS: dict[str, Recipe] = {
    "small": Recipe(),
    # Goldstein et al. 2025 (arXiv 2505.03005), table 2, 7B: 100M, 700M and 100M tokens.
    "radlads": Recipe(
        align=Stage(
            steps=6104, mixer_lr=1e-3, final=0.01, sequence_length=512, batch_size=32, warmup=0.0
        ),
        logits=Stage(
            steps=14242, mixer_lr=1e-5, rest_lr=1e-5, schedule="constant", sequence_length=512,
            batch_size=96, warmup=0.0,
        ),
        long=Stage(
            steps=64, mixer_lr=1e-5, rest_lr=1e-5, schedule="constant", target="data",
            sequence_length=16384, batch_size=96, warmup=0.0,
        ),
    ),
    # HALO (arXiv 2601.22156), from its published configs: 328M, 983M and 1.05B tokens.
    "halo": Recipe(
        align=Stage(steps=20000, mixer_lr=1e-3, final=0.01, sequence_length=512, batch_size=32),
        logits=Stage(
            steps=20000, mixer_lr=1e-4, rest_lr=1e-4, sequence_length=512, batch_size=96
        ),
        long=Stage(
            steps=500, mixer_lr=1e-5, rest_lr=1e-5, schedule="constant", target="data",
            sequence_length=16384, batch_size=128,
        ),
    ),
}  # fmt: skip

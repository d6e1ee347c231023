"""What a distillation does, as data. Defaults follow RADLADS (Goldstein et al. 2025) in order and
objective; learning rates and sizes are those that work from a laptop up to one GPU."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage: how long, and at which rates.

    Attributes:
        steps: optimizer steps; with ``minutes`` set, at most so many.
        minutes: wall time; the first few steps fix the number of steps, which a machine that slows
            down shortens. None: ``steps`` alone decides, and runs repeat bit for bit.
        mixer_lr: peak learning rate of the new mixers (AdamW).
        rest_lr: peak learning rate of everything else; 0 freezes it.
        warmup: share of the steps in which the rate rises to its peak; it then falls as a cosine
            to a tenth of it.
    """

    steps: int = 1000
    minutes: float | None = None
    mixer_lr: float = 3e-3
    rest_lr: float = 0.0
    warmup: float = 0.05


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Two stages over one stream of tokens.

    Attributes:
        align: every mixer learns its attention's output from that attention's own input, all
            layers in one teacher pass; relative squared error.
        logits: the whole model learns the teacher's next-token distribution; forward KL.
        sequence_length: tokens of one row, T.
        batch_size: rows of one step, B.
        heldout: share of the tokens, at their end, that is never trained on.
        eval_tokens: held-out tokens that the metrics read.
        checkpoint_every: steps between checkpoints (an interrupted run loses at most so many).
        compile: run the mixers and the student through torch.compile.
        seed: of the order of the data.
    """

    align: Stage = field(default_factory=lambda: Stage(steps=300))
    logits: Stage = field(default_factory=lambda: Stage(steps=300, mixer_lr=1e-3, rest_lr=3e-4))
    sequence_length: int = 128
    batch_size: int = 16
    heldout: float = 0.05
    eval_tokens: int = 8192
    checkpoint_every: int = 50
    compile: bool = False
    seed: int = 0

"""A mixer of your own, without touching the package: a subclass, a name, a conversion.

    python docs/examples/custom_mixer.py

Simple gated linear attention whose heads forget no faster than a given half-life:

    S_t = e^g_t S_{t-1} + k_t v_t^T        g_t = max(log σ(w x_t + b) / normalizer, -ln 2 / h)

docs/extend.md writes one from the ground up, and says what a mixer of the package needs besides.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import flacompile
from flacompile.layers import MIXERS, SimpleGatedLinearAttention

TEACHER = Path(__file__).parents[2] / "tests" / "teacher"


class Patient(SimpleGatedLinearAttention):
    """A floor under the decay."""

    @dataclass(frozen=True, kw_only=True)
    class Config(SimpleGatedLinearAttention.Config):
        half_life: float = 4.0

    config: Config

    def decay(self, x: Tensor) -> Tensor:
        return super().decay(x).clamp_min(-math.log(2) / self.config.half_life)


def main() -> None:
    torch.manual_seed(0)
    MIXERS["patient"] = Patient  # so that convert, the command line and saved models know it

    mixer = Patient(Patient.Config(hidden_size=64, num_heads=4, half_life=8.0))
    with torch.no_grad():
        mixer.gk_proj.bias.fill_(-1e3)  # forget at once; the floor forbids it
        g = mixer.decay(torch.randn(1, 5, 64))
    print("half-life", (-math.log(2) / g).unique().item())

    model = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32)
    flacompile.convert(model, Patient.Config(half_life=8.0))
    print(flacompile.report(model))
    ids = torch.randint(1024, (1, 9))
    print(model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0).tolist())


if __name__ == "__main__":
    main()

"""Mamba and Mamba-2 against transformers' own, from their start, and as what attention becomes."""

from __future__ import annotations

import math

import pytest
import torch
from mixer_inputs import close
from test_mixer_conversion import attention_weights, convert, heads, site
from textbook import rotate
from transformers import Mamba2Config, MambaConfig
from transformers.models.mamba.modeling_mamba import MambaMixer
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from flacompile.layers import MIXERS

NAMES = ["mamba", "mamba2"]
THEIRS = {  # their mixer, its config, ours
    "mamba": (
        MambaMixer,
        MambaConfig(
            hidden_size=32, intermediate_size=64, state_size=8, time_step_rank=5,
            num_hidden_layers=1, use_mambapy=False,
        ),
        {"hidden_size": 32, "intermediate_size": 64, "state_size": 8, "dt_rank": 5},
    ),
    "mamba2": (
        Mamba2Mixer,
        Mamba2Config(
            hidden_size=32, num_heads=8, head_dim=8, n_groups=2, state_size=16,
            chunk_size=16, num_hidden_layers=1, time_step_limit=(0.001, 0.5),
        ),
        {"hidden_size": 32, "head_dim": 8, "n_groups": 2, "state_size": 16, "dt_limit": (0.001, 0.5)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_values_of_transformers(name):
    cls, their_config, fields = THEIRS[name]
    torch.manual_seed(0)
    theirs = cls(their_config, layer_idx=0).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.4)
    ours = MIXERS[name](MIXERS[name].Config(**fields))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x, mask = torch.randn(2, 37, 32), torch.ones(2, 37, dtype=torch.int64)
    assert close(ours(x)[0], theirs(x))
    mask[0, :6] = 0  # padding to the left, as they have it
    y = ours(x, mask=mask)[0]
    assert close(y[mask == 1], theirs(x, attention_mask=mask)[mask == 1])

"""The gated delta rule.

    S_t = (1 - beta_t k_t k_t^T) diag(e^g_t) S_{t-1} + beta_t k_t v_t^T        o_t = scale q_t S_t

The primitive behind DeltaNet (Yang et al. 2024), Gated DeltaNet, DeltaProduct and KDA. It is the
op of ``dplr`` with a single write: u_t = beta_t v_t + S_{t-1}^T a_t with a_t = -beta_t e^g_t k_t.
"""

import torch
from torch import Tensor

from flacompile.ops.dplr import run
from flacompile.ops.validate import check_delta_rule


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    *,
    scale: float | None = None,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """o_t = scale q_t S_t, S_t the decayed state corrected at k_t towards v_t by beta_t.

    Under autocast all but g and the state are taken in the autocast dtype; sums are fp32 always.

    Args:
        q, k: [B, T, H, K], one floating dtype for q, k and v. The state stays bounded where
            beta |k|^2 <= 2: k is normalised as a rule.
        v: [B, T, H, V].
        g: natural-log decay, <= 0, fp32: [B, T, H] (one number a head), [B, T, H, K] or None.
        beta: [B, T, H], any floating dtype.
        scale: factor on the output; None is K^-0.5.
        state: the state before the first token, [N, H, K, V] fp32; None is zero. N is B, or the
            number of packed sequences.
        cu_seqlens: bounds of the packed sequences, [N + 1], int32 or int64, first 0, last T; then
            B is 1. Sequences may be empty.

    Returns:
        o [B, T, H, V] in the dtype of v, and the final state [N, H, K, V].

    Raises:
        ValueError: a shape, dtype or device that does not fit; on the CPU also g > 0.
    """
    device = q.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        q, k, v, beta = (x.to(dtype) for x in (q, k, v, beta))
    check_delta_rule(q, k, v, g, beta, state, cu_seqlens)
    accumulator = torch.promote_types(q.dtype, torch.float32)
    beta = beta.to(accumulator)[..., None]
    erase = -beta * k
    if g is not None:
        erase = erase * (g if g.ndim == 4 else g[..., None]).to(accumulator).exp()
    return run(q, k, beta * v, g, erase, None, scale, state, cu_seqlens)


def delta_rule_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    *,
    scale: float | None = None,
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    """One token of ``delta_rule`` in plain PyTorch.

    Args:
        q, k: [B, H, K].
        v: [B, H, V].
        g: [B, H], [B, H, K] or None.
        beta: [B, H].
        scale: factor on the output; None is K^-0.5.
        state: [B, H, K, V] fp32.

    Returns:
        o [B, H, V] in the dtype of v, and the new state.
    """
    dtype = v.dtype
    q, k, v = (x.to(state.dtype)[..., None, :] for x in (q, k, v))
    if g is not None:
        state = state * g.to(state.dtype).exp().reshape(*q.shape[:2], -1, 1)
    state = state + k.mT * (beta.to(state.dtype)[..., None, None] * (v - k @ state))
    o = (q @ state)[..., 0, :] * (q.shape[-1] ** -0.5 if scale is None else scale)
    return o.to(dtype), state

"""Checks that every op makes before any work: what was expected and what came, by name."""

import torch
from torch import Tensor


def expect(condition: bool, name: str, expected: str, got: object) -> None:
    """Raises ValueError naming the argument unless the condition holds."""
    if not condition:
        raise ValueError(f"{name}: expected {expected}, got {got}")


def check_shape(name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless x has this shape."""
    expect(tuple(x.shape) == shape, name, f"shape {shape}", tuple(x.shape))


def check_log_decay(name: str, g: Tensor | None) -> None:
    """Raises ValueError for a g above 0. It reads g, which on a GPU would wait for the device."""
    if g is not None and g.numel() and g.max() > 0:
        raise ValueError(
            f"{name}: expected a log decay <= 0, got a maximum of {g.max():.4g}; "
            "logsigmoid and -softplus give one"
        )


def check_qkv(q: Tensor, k: Tensor, v: Tensor, *, shared: bool = False) -> None:
    """q and k [B, T, H, K], v [B, T, H, V], one floating dtype, one device.

    shared: q and k may have fewer heads, each for as many of v.
    """
    expect(q.ndim == 4, "q", "shape [B, T, H, K]", tuple(q.shape))
    expect(q.is_floating_point(), "q", "a floating dtype", q.dtype)
    check_shape("k", k, tuple(q.shape))
    expect(v.ndim == 4, "v", "shape [B, T, H, V]", tuple(v.shape))
    groups, heads = q.shape[2], v.shape[2]
    if shared:
        expect(groups > 0 and heads % groups == 0, "v", f"heads by the {groups} of q", heads)
    check_shape("v", v, (*q.shape[:2], heads if shared else groups, v.shape[3]))
    for name, x in (("k", k), ("v", v)):
        expect(x.dtype == q.dtype, name, f"the dtype of q, {q.dtype}", x.dtype)
        expect(x.device == q.device, name, f"the device of q, {q.device}", x.device)
    expect(q.device.type in ("cpu", "cuda"), "q", "a CPU or CUDA tensor", q.device)


def check_decay(name: str, g: Tensor | None, v: Tensor, dim: int | None) -> None:
    """A log decay: one number a head of v [B, T, H, V], or one of each of ``dim`` channels.

    No dim: heads share q and k, and have one number each.
    """
    if g is None:
        return
    heads = tuple(v.shape[:3])
    channels = "where heads share q and k" if dim is None else f"or {(*heads, dim)}"
    fits = tuple(g.shape) in (heads, (*heads, dim))
    expect(fits, name, f"shape {heads} {channels}", tuple(g.shape))
    expect(g.is_floating_point(), name, "a floating dtype", g.dtype)
    expect(g.device == v.device, name, f"the device of q, {v.device}", g.device)


def check_sequences(
    x: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    state_shape: tuple[int, ...],
    *,
    name: str = "q",
    dtype: torch.dtype | None = None,
) -> None:
    """A state [N, *state_shape] and the bounds of packed sequences [N + 1], for x called ``name``.

    The state has that dtype; None is fp32, float64 where x is that.
    """
    sequences = x.shape[0]
    if cu_seqlens is not None:
        expect(cu_seqlens.ndim == 1, "cu_seqlens", "shape [N + 1]", tuple(cu_seqlens.shape))
        integers = (torch.int32, torch.int64)
        expect(cu_seqlens.dtype in integers, "cu_seqlens", "int32 or int64", cu_seqlens.dtype)
        expect(cu_seqlens.device == x.device, "cu_seqlens", f"device {x.device}", cu_seqlens.device)
        expect(x.shape[0] == 1, name, "a batch of 1 with cu_seqlens", x.shape[0])
        expect(cu_seqlens.shape[0] > 1, "cu_seqlens", "at least one sequence", "none")
        sequences = cu_seqlens.shape[0] - 1
    if state is not None:
        check_shape("state", state, (sequences, *state_shape))
        dtype = torch.promote_types(x.dtype, torch.float32) if dtype is None else dtype
        expect(state.dtype == dtype, "state", str(dtype), state.dtype)
        expect(state.device == x.device, "state", f"device {x.device}", state.device)


def check_linear_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gk: Tensor | None,
    gv: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    """Everything ``linear_attn`` can know without reading a value."""
    check_qkv(q, k, v, shared=True)
    shared = q.shape[2] != v.shape[2]
    check_decay("gk", gk, v, None if shared else q.shape[3])
    check_decay("gv", gv, v, None if shared else v.shape[3])
    check_sequences(q, state, cu_seqlens, (v.shape[2], q.shape[3], v.shape[3]))


def check_quadratic_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gk: Tensor | None,
    state: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    num_features: int,
) -> None:
    """Everything ``quadratic_attn`` can know without reading a value."""
    check_qkv(q, k, v)
    if gk is not None:
        check_like("gk", gk, tuple(q.shape[:3]), "q", q)
    if mask is not None:
        check_shape("mask", mask, tuple(q.shape[:2]))
        expect(mask.dtype == torch.bool, "mask", "bool", mask.dtype)
        expect(mask.device == q.device, "mask", f"the device of q, {q.device}", mask.device)
    check_sequences(q, state, cu_seqlens, (q.shape[2], num_features, v.shape[3] + 1))


def check_first(name: str, x: Tensor, axes: str) -> None:
    """The argument that the others are measured by: these axes, floating, on a device of ours."""
    expect(x.ndim == len(axes.split()), name, f"shape [{', '.join(axes.split())}]", tuple(x.shape))
    expect(x.is_floating_point(), name, "a floating dtype", x.dtype)
    expect(x.device.type in ("cpu", "cuda"), name, "a CPU or CUDA tensor", x.device)


def check_like(name: str, x: Tensor, shape: tuple[int, ...], first: str, like: Tensor) -> None:
    """A floating tensor of that shape, on the device of the argument called ``first``."""
    check_shape(name, x, shape)
    expect(x.is_floating_point(), name, "a floating dtype", x.dtype)
    expect(x.device == like.device, name, f"the device of {first}, {like.device}", x.device)


def check_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    """Everything ``conv`` can know without reading a value."""
    check_first("x", x, "B T C")
    channels = x.shape[2]
    filters = weight.ndim == 2 and weight.shape[0] == channels and weight.shape[1] > 0
    expect(filters, "weight", f"shape ({channels}, W) with W > 0", tuple(weight.shape))
    for name, w in (("weight", weight), ("bias", bias)):
        if w is not None:
            expect(w.is_floating_point(), name, "a floating dtype", w.dtype)
            expect(w.device == x.device, name, f"the device of x, {x.device}", w.device)
    if bias is not None:
        check_shape("bias", bias, (channels,))
    past = (weight.shape[1] - 1, channels)
    check_sequences(x, state, cu_seqlens, past, name="x", dtype=x.dtype)


def check_scan(g: Tensor, x: Tensor, state: Tensor | None, cu_seqlens: Tensor | None) -> None:
    """Everything ``scan`` can know without reading a value."""
    check_first("x", x, "B T D")
    check_like("g", g, tuple(x.shape), "x", x)
    check_sequences(x, state, cu_seqlens, (x.shape[2],), name="x")


def check_selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    """Everything ``selective_scan`` can know without reading a value."""
    check_first("u", u, "B T D")
    channels = u.shape[2]
    check_like("dt", dt, tuple(u.shape), "u", u)
    expect(A.ndim == 2, "A", f"shape ({channels}, N)", tuple(A.shape))
    check_like("A", A, (channels, A.shape[1]), "u", u)
    expect(B.ndim == 4, "B", "shape [B, T, G, N]", tuple(B.shape))
    groups = B.shape[2]
    expect(groups > 0 and channels % groups == 0, "B", f"G to divide {channels}", groups)
    check_like("B", B, (*u.shape[:2], groups, A.shape[1]), "u", u)
    check_like("C", C, tuple(B.shape), "u", u)
    for name, x in (("B", B), ("C", C)):
        expect(x.dtype == u.dtype, name, f"the dtype of u, {u.dtype}", x.dtype)
    check_sequences(u, state, cu_seqlens, tuple(A.shape), name="u")


def check_dplr(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    low_rank: dict[str, Tensor],
    state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    """Everything ``dplr`` can know without reading a value; low_rank is a and b by name."""
    check_qkv(q, k, v)
    for name, x in low_rank.items():
        check_like(name, x, tuple(q.shape), "q", q)
    check_decay("g", g, v, q.shape[3])
    check_sequences(q, state, cu_seqlens, (q.shape[2], q.shape[3], v.shape[3]))


def check_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    """Everything ``delta_rule`` can know without reading a value."""
    check_dplr(q, k, v, g, {}, state, cu_seqlens)
    check_like("beta", beta, tuple(q.shape[:3]), "q", q)


def bytes_of_ternary(K: int) -> int:
    """P / 4, the bytes of a packed row of K weights: whole groups of 16."""
    return 16 * -(-K // 64)


def check_ternary_linear(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None) -> None:
    """Everything ``ternary_linear`` can know without reading a value."""
    expect(x.ndim > 0, "x", "shape [..., K]", tuple(x.shape))
    expect(x.is_floating_point(), "x", "a floating dtype", x.dtype)
    expect(x.device.type in ("cpu", "cuda"), "x", "a CPU or CUDA tensor", x.device)
    quarter = bytes_of_ternary(x.shape[-1])
    fits = packed.ndim == 2 and packed.shape[1] == quarter and packed.is_contiguous()
    expect(fits, "packed", f"contiguous, shape [N, {quarter}]", tuple(packed.shape))
    expect(packed.dtype == torch.uint8, "packed", "uint8", packed.dtype)
    check_shape("scale", scale, ())
    expect(scale.dtype == torch.float32, "scale", "float32", scale.dtype)
    for name, w in (("packed", packed), ("scale", scale)):
        expect(w.device == x.device, name, f"the device of x, {x.device}", w.device)
    if bias is not None:
        check_like("bias", bias, (packed.shape[0],), "x", x)

"""Each mixer as its paper writes it: a loop over tokens, read against the equations.

No code of the mixers is used, only their parameters and configs. Differentiable, any dtype. Adding
a mixer to the registry asks for its loop here, of at most 12 lines, in ``TEXTBOOK``.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from textbook_parts import GATES, conv, gated_output, identity, linear, qkv, rms, rotate, σ

from flacompile.layers import MIXERS


def decayed(m, x, g):
    """S = diag(e^g) S + k v^T, o = scale q S."""
    q, k, v = qkv(m, x)
    if m.config.feature_map == "relu":
        q, k = q.relu(), k.relu()
    scale, S, o = m.config.scale or q.shape[-1] ** -0.5, 0.0, []
    for t in range(x.shape[1]):
        S = g[:, t].exp()[..., None] * S + k[:, t, :, :, None] * v[:, t, :, None, :]
        o.append(scale * (q[:, t, :, None] @ S)[..., 0, :])
    return gated_output(m, torch.stack(o, 1), x)


def gla(m, x):
    c, (down, up) = m.config, m.gk_proj
    g = torch.sigmoid(up(down(x))).log() / c.gate_logit_normalizer
    g = g if c.clamp_min is None else g.clamp(min=c.clamp_min)
    kv_heads = c.num_kv_heads or c.num_heads
    g = g.view(*x.shape[:2], kv_heads, -1).repeat_interleave(c.num_heads // kv_heads, 2)
    return decayed(m, x, g)


def simple_gla(m, x):
    g = torch.sigmoid(m.gk_proj(x)).log() / m.config.gate_logit_normalizer
    return decayed(m, x, g[..., None])


def linear_attn(m, x):
    (q, k, v), c, o = qkv(m, x), m.config, []
    φ = FEATURE_MAPS[c.feature_map]
    q, k = φ(q, m.feature_map_q), φ(k, m.feature_map_k)
    q = q / (q.sum(-1, keepdim=True) + 1e-4) if c.norm_q else q
    k = k / (k.sum(-1, keepdim=True) + 1e-4) if c.norm_k else k
    for t in range(x.shape[1]):
        a = torch.einsum("bhk,bshk->bhs", q[:, t], k[:, : t + 1]) * (c.scale or q.shape[-1] ** -0.5)
        a = a * aged(m, t) if c.use_decay else a
        a = a / (a.sum(-1, keepdim=True) + 1e-10) if c.do_feature_map_norm else a
        o.append(torch.einsum("bhs,bshv->bhv", a, v[:, : t + 1]))
    o = torch.stack(o, 1)
    return m.o_proj((rms(o, m.norm.weight) if c.output_norm == "rmsnorm" else o).flatten(2))


def dpfp(x, _):
    r = torch.cat((x, -x), -1).relu()
    return torch.cat([r * torch.cat((r[..., -j:], r[..., :-j]), -1) for j in (1, 2, 3, 4)], -1)


FEATURE_MAPS = {  # of x and the parameters f
    "elu": lambda x, f: F.elu(x) + 1,
    "dpfp": dpfp,
    "t2r": lambda x, f: f.layer(x).relu(),
    "elementwise_product": lambda x, f: f.layer1(x) * f.layer2(x),
    "hedgehog": lambda x, f: torch.cat((2 * f.layer(x), -2 * f.layer(x)), -1).softmax(-1),
}


def softmax(m, q, k, v, scale):
    """o_t = Σ_s softmax_s(scale q_t·k_s) v_s over the window, scores under the cap."""
    o, window, c = [], m.config.window_size or q.shape[1], m.config.logit_softcapping
    for t in range(q.shape[1]):
        near = slice(max(0, t + 1 - window), t + 1)
        scores = scale * torch.einsum("bhk,bshk->bhs", q[:, t], k[:, near])
        scores = scores if c is None else c * torch.tanh(scores / c)
        o.append(torch.einsum("bhs,bshv->bhv", scores.softmax(-1), v[:, near]))
    return linear(m.o_proj, torch.stack(o, 1).flatten(2))


def attn(m, x):
    q, k, v = qkv(m, x)
    return softmax(m, q, k, v, m.config.scale or q.shape[-1] ** -0.5)


def mla(m, x):
    c, yarn, H, N = m.config, m.config.rope_scaling, m.config.num_heads, m.config.qk_nope_head_dim
    latent = m.kv_proj[0](x)
    latent = rms(latent, m.kv_proj[1].weight, c.norm_eps) if c.latent_norm else latent
    q = x if c.q_lora_rank is None else rms(m.q_proj[0](x), m.q_proj[1].weight, c.norm_eps)
    q = (m.q_proj if c.q_lora_rank is None else m.q_proj[2])(q).unflatten(-1, (H, -1))
    k, v = m.kv_proj[2](latent).unflatten(-1, (H, -1)).tensor_split([N], -1)
    turn = (lambda y: rotate(y, m.rotary)) if m.rotary else identity
    q = torch.cat((q[..., :N], turn(q[..., N:])), -1)
    k = torch.cat((k, turn(m.k_rope(x)[:, :, None]).expand(-1, -1, H, -1)), -1)
    sharpness = 1 + 0.1 * yarn.mscale_all_dim * math.log(yarn.factor) if yarn else 1
    return softmax(m, q, k, v, c.scale or q.shape[-1] ** -0.5 * sharpness**2)


def over_time(m, x, t):
    """softmax_s(x_s - r (t - s)) over s <= t; r only where a conversion has it."""
    r = 0 if m.running.log_rate is None else m.running.log_rate.exp()
    return (x[:, : t + 1] - r * torch.arange(t, -1, -1)[:, None, None]).softmax(1)


def abc(m, x):
    c, o = m.config, []
    q, k, v = qkv(m, x, gate=F.silu if c.use_input_gate else identity)
    s = m.s_proj(x).view(*x.shape[:2], c.num_heads, -1)
    s = s if c.clamp_max is None else s.clamp(c.clamp_min, c.clamp_max)
    for t in range(x.shape[1]):
        α = over_time(m, s, t)
        keys, values = (torch.einsum("bshm,bshx->bhmx", α, y[:, : t + 1]) for y in (k, v))
        scores = torch.einsum("bhmk,bhk->bhm", keys, q[:, t]) * (c.scale or q.shape[-1] ** -0.5)
        o.append(torch.einsum("bhm,bhmv->bhv", scores.softmax(-1), values))
    o = rms(torch.stack(o, 1), m.g_norm.weight) if c.use_norm else torch.stack(o, 1)
    return m.o_proj(o.flatten(2) * (F.silu(m.g_proj(x)) if c.use_output_gate else 1))


def lightnet(m, x):
    (q, k, v), c, o = qkv(m, x, conv_act=identity), m.config, []
    k = torch.cat((k, -k), -1) if c.mirrored else k
    q = torch.cat((q, -q), -1).softmax(-1) if c.mirrored else F.silu(q)
    for t in range(x.shape[1]):
        S = torch.einsum("bshk,bshv->bhkv", over_time(m, k, t), v[:, : t + 1])
        o.append(torch.einsum("bhk,bhkv->bhv", q[:, t], S) * (c.scale or q.shape[-1] ** -0.5))
    o = torch.stack(o, 1).flatten(2)
    o = rms(o, m.g_norm.weight) if c.output_norm else o
    return m.o_proj(o * F.silu(m.g_proj(x)) if c.use_output_gate else o)


def stream(m, x, count, dim, name=None):
    """x [B, T, G dim] -> [B, T, count, dim], each group for heads in a row; B, C as k, q are."""
    x = x.unflatten(-1, (-1, dim))
    if name and m.config.qk_norm:
        n = getattr(m, name)
        flat = x if n.weight.numel() == dim else x.flatten(2)
        x = rms(flat, n.weight, n.eps, n.offset).view_as(x)
    x = rotate(x, m.rotary) if name and m.rotary is not None else x
    return x.repeat_interleave(count // x.shape[2], 2)


def ssm(m, u, dt, A, B, C):
    """h = e^(dt A) h + dt u B^T, y = h C + D u; u [B, T, H, P], A [H, P, N] or of ones."""
    h, y, D = 0.0, [], m.D.view(u.shape[2], -1)
    for t in range(u.shape[1]):
        h = (dt[:, t, ..., None] * A).exp() * h + (dt * u)[:, t, ..., None] * B[:, t, :, None]
        y.append(m.config.scale * (h * C[:, t, :, None]).sum(-1) + D * u[:, t])
    return torch.stack(y, 1).flatten(2)


def mamba(m, x):
    c, (width, N), H = m.config, m.A_log.shape, m.config.num_heads or 1
    act, kv_heads, y = getattr(F, c.hidden_act), c.num_kv_heads or H, m.in_proj(x)
    u, z = y.split((width // H * kv_heads, y.shape[-1] - width // H * kv_heads), -1)
    u = conv(u, m.conv1d.weight, m.conv1d.bias, act) if c.use_short_conv else u
    y = m.x_proj(x if c.num_heads else u)
    dt, B, C = y.split((y.shape[-1] - (kv_heads + H) * N, kv_heads * N, H * N), -1)
    dt = F.softplus(m.dt_proj(dt)).unflatten(-1, (H, -1))
    B, C = stream(m, B, H, N, "B_norm"), stream(m, C, H, N, "C_norm")
    y = ssm(m, stream(m, u, H, width // H), dt, -m.A_log.exp().view(H, -1, N), B, C)
    return m.out_proj(y * act(z) if c.use_output_gate else y)


def mamba2(m, x):
    c, H, y = m.config, len(m.A_log), m.in_proj(x)
    P, G, N = c.head_dim, c.num_kv_heads or c.n_groups, c.state_size
    Z = H * P * c.use_output_gate
    z, u, dt = y.split((Z, y.shape[-1] - Z - H, H), -1)
    u = conv(u, m.conv1d.weight, m.conv1d.bias) if c.use_short_conv else u
    u, B, C = u.split((u.shape[-1] - (G + c.n_groups) * N, G * N, c.n_groups * N), -1)
    dt = F.softplus(dt + m.dt_bias).clamp(*c.dt_limit)[..., None]
    u, B = stream(m, u, H, P), stream(m, B, H, N, "B_norm")
    gates = (1.0, F.silu(z) if Z else 1.0)[:: 1 if c.norm_before_gate else -1]
    y = ssm(m, u, dt, -m.A_log.exp()[:, None, None], B, stream(m, C, H, N, "C_norm")) * gates[0]
    y = rms(y.unflatten(-1, (c.n_groups, -1)), 1).flatten(2) * m.norm.weight if c.rmsnorm else y
    return m.out_proj(y * gates[1])


def aged(m, t):
    """e^{-r (t - s)} for s = 0..t, [H, t + 1]."""
    return (-m.log_rate.exp()[:, None] * torch.arange(t, -1, -1)).exp()


def features(m, x, φ, normalise=identity):
    """o = Σ w v / (Σ w + eps), w = φ(scale q)·φ(k)."""
    (q, k, v), c, o = qkv(m, x), m.config, []
    q, k = φ(normalise(q) * (c.scale or q.shape[-1] ** -0.5)), φ(normalise(k))
    for t in range(x.shape[1]):
        w = torch.einsum("bhf,bshf->bhs", q[:, t], k[:, : t + 1])
        w = w * aged(m, t) if c.use_decay else w
        o.append(torch.einsum("bhs,bshv->bhv", w, v[:, : t + 1]) / (w.sum(-1, True) + c.eps))
    return m.o_proj(torch.stack(o, 1).flatten(2))


def outer(x):
    return (x[..., None] * x[..., None, :]).flatten(-2)


def based(m, x):
    return features(m, x, lambda y: torch.cat((1 + 0 * y[..., :1], y, outer(y) / 2**0.5), -1))


def rebased(m, x):
    c, f = m.config, m.feature_map
    one = c.offset**0.5  # (offset + a)² is that of a channel more

    def normalise(y):
        mean, var = y.mean(-1, keepdim=True), y.var(-1, keepdim=True, unbiased=False)
        y = (y - mean) / (var + 1e-5).sqrt() if c.normalize else y
        return y * (f.gamma if c.use_gamma else 1) + (f.beta if c.use_beta else 0)

    return features(m, x, lambda y: outer(torch.cat((y, one + 0 * y[..., :1]), -1)), normalise)


def delta(q, k, v, α, β):
    """S = α S, then S = S + β k (v - k S)^T for each of n steps, o = q S."""
    S, H, o = q.new_zeros(len(q), *q.shape[2:], v.shape[3]), q.shape[2], []
    for t in range(q.shape[1]):
        S = α[:, t] * S
        for j in range(0, k.shape[2], H):
            k_j, v_j, β_j = (y[:, t, j : j + H, None] for y in (k, v, β))
            S = S + β_j * k_j.mT @ (v_j - k_j @ S)
        o.append((q[:, t, :, None] @ S)[..., 0, :])
    return torch.stack(o, 1)


def gated_delta(m, x):
    c, act = m.config, {"silu": F.silu, "identity": identity}
    q, k, v = qkv(m, x, gate=identity if c.use_short_conv else act[c.activation])
    q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
    β = σ(m.b_proj(x))[..., None] * (2 if c.allow_neg_eigval else 1)
    α = x.new_ones(*x.shape[:2], 1)
    if getattr(c, "use_forget_gate", True):
        α = (-m.A_log.exp() * F.softplus(m.a_proj(x) + m.dt_bias)).exp()
    o = delta(q * (c.scale or q.shape[-1] ** -0.5), k, v, α[..., None, None], β)
    o = (rms(o, m.o_norm.weight) if c.output_norm else o).flatten(2)
    gate = c.use_gate if hasattr(c, "use_gate") else c.use_output_gate
    return m.o_proj(o * F.silu(m.g_proj(x)) if gate else o)


def given(m, x, **streams):
    """``qkv`` of projections [B, T, H *] that are there already."""
    projections = {f"{name}_proj": lambda _, y=y: y for name, y in streams.items()}
    names = [name for name in ("config", "rotary", "q_norm", "k_norm") if hasattr(m, name)]
    return qkv(SimpleNamespace(**projections, **{name: getattr(m, name) for name in names}), x)


def before(x):
    """x_{t-1}, zero at first."""
    return torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), 1)


def rwkv_output(m, o, eps, bonus, gate):
    """W_o [(GroupNorm(scale o) + bonus) ⊙ gate], norm and gate where they are on."""
    o = torch.stack(o, 1) * (m.config.scale or 1)
    if m.config.output_norm:
        o = o - o.mean(-1, keepdim=True)
        o = o / (o.square().mean(-1, keepdim=True) + eps).sqrt()
    if m.config.output_norm and m.config.elementwise_affine:
        o = o * m.g_norm.weight.view(o.shape[2:]) + m.g_norm.bias.view(o.shape[2:])
    o = (o + bonus).flatten(2)
    return m.o_proj(o * gate() if m.config.use_output_gate else o)


def rwkv6(m, x):
    δ, (first, _, last), S, o = before(x) - x, m.x_proj, 0.0, []
    low = torch.tanh(first.linear(x + δ * first.mu)).view(*x.shape[:2], 5, -1)
    mix = torch.einsum("btir,dir->ibtd", low, last.weight.view(x.shape[2], 5, -1))
    xr, xw, xk, xv, xg = (x + δ * (m.x_bias[i] + mix[i]) for i in range(5))
    r, k, v = given(m, x, q=m.r_proj.linear(xr), k=m.k_proj.linear(xk), v=m.v_proj.linear(xv))
    w = -m.w_proj.linear.lora(xw).exp().view_as(r)
    for t in range(x.shape[1]):
        kv = k[:, t, :, :, None] * v[:, t, :, None]
        o.append((r[:, t, :, None] @ (S + m.bonus[..., None] * kv))[:, :, 0])
        S = w[:, t, :, :, None].exp() * S + kv
    return rwkv_output(m, o, 1e-5, 0, lambda: GATES[m.config.gate_fn](m.g_proj.linear(xg)))


def moved(q, k, v, A):
    """S = A S + k v^T; o = q S, one a token."""
    S, o = torch.zeros_like(k[:, 0, :, :, None]), []
    for t in range(q.shape[1]):
        S = A[:, t] @ S + k[:, t, :, :, None] * v[:, t, :, None]
        o.append((q[:, t, :, None] @ S)[:, :, 0])
    return o


def rwkv7(m, x, v_first=None):
    mixes = [getattr(m, f"x_{i}") for i in "rwkvag" if hasattr(m, f"x_{i}")]
    xr, xw, xk, xv, xa, *xg = (x + (before(x) - x) * mix for mix in mixes)
    v = m.v_proj(xv) if v_first is None else m.v_proj(xv).lerp(v_first, σ(m.v_lora.lora(xv)))
    r, k, v = given(m, x, q=m.r_proj(xr), k=m.k_proj(xk), v=v)
    a, κ = σ(m.a_lora.lora(xa)).view_as(k), k * m.k_k.view(k.shape[2:])
    κ, k = κ / (κ.square().sum(-1, True) + 1e-6).sqrt(), k * (1 + (a - 1) * m.k_a.view_as(k[0, 0]))
    w = (-σ(m.w_lora.lora(xw)) / math.e**0.5).view_as(k).exp()
    o = moved(r, k, v, torch.diag_embed(w) - (κ * a)[..., None] * κ[..., None, :])
    bonus = (r * k * m.r_k).sum(-1, keepdim=True) * v
    return rwkv_output(m, o, k.shape[-1] * 1e-5, bonus, lambda: m.g_lora.lora(*xg))


def convolved(m, x, name):
    """W x of that name, through its convolution where there is one."""
    y = getattr(m, f"{name}_proj")(x)
    if m.config.use_short_conv:
        layer = getattr(m, f"{name}_conv1d")
        y = conv(y, layer.weight, layer.bias, identity)
    return y


def forget_gate(m, x):
    lb = m.forget.lower_bound.to(x.dtype)
    return lb + (1 - lb) * σ(convolved(m, x, "f"))


def hgrn(m, x):
    act = F.silu if m.config.activation == "silu" else identity
    f, i, h, y = forget_gate(m, x), act(convolved(m, x, "i")), 0.0, []
    for t in range(x.shape[1]):
        h = f[:, t] * h + (1 - f[:, t]) * i[:, t]
        y.append(h)
    y = torch.stack(y, 1)
    y = rms(y, m.g_norm.weight) if m.config.output_norm else y
    return m.o_proj(y * F.silu(m.g_proj(x)))


def hgrn2(m, x):
    c, f, S, o = m.config, forget_gate(m, x), 0.0, []
    H, K = c.num_heads, f.shape[-1] // (c.num_kv_heads or c.num_heads)
    q, v = convolved(m, x, "q"), convolved(m, x, "i")
    q = stream(m, F.silu(q) if c.feature_map == "silu" else q, H, K, "q_norm")
    v = stream(m, v, H, m.o_proj.in_features // H)
    k, f = stream(m, 1 - f if c.tie_keys else m.k_proj(x), H, K, "k_norm"), stream(m, f, H, K)
    k = k if c.tie_keys else k * (1 - f)
    for t in range(x.shape[1]):
        S = f[:, t, :, :, None] * S + k[:, t, :, :, None] * v[:, t, :, None]
        o.append((q[:, t, :, None] @ S)[:, :, 0] * (c.scale or K**-0.5))
    o = torch.stack(o, 1).flatten(2)
    return m.o_proj(rms(o, m.g_norm.weight) if c.output_norm else o)


def hybrid(m, x):
    """The parts end in the identity: their loops give o."""
    name = next(name for name, cls in MIXERS.items() if type(m.linear) is cls)
    a, b, s = attn(m.softmax, x), TEXTBOOK[name](m.linear, x), σ(m.share)[:, None]
    a, b = (o.unflatten(-1, (len(s), -1)) for o in (a, b))
    return m.o_proj(torch.cat(((s * a).flatten(2), ((1 - s) * b).flatten(2)), -1))


TEXTBOOK = {
    "abc": abc,
    "lightnet": lightnet,
    "attn": attn,
    "based": based,
    "bitattn": attn,
    "gated_deltanet": gated_delta,
    "gated_deltaproduct": gated_delta,
    "gla": gla,
    "hgrn": hgrn,
    "hgrn2": hgrn2,
    "hybrid": hybrid,
    "linear_attn": linear_attn,
    "mamba": mamba,
    "mla": mla,
    "mamba2": mamba2,
    "rebased": rebased,
    "rwkv6": rwkv6,
    "rwkv7": rwkv7,
    "simple_gla": simple_gla,
}

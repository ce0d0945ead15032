"""A decoder computed from its spec in plain PyTorch: the proof that a spec says what the model is, without
any kernel."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from dschat_kernels.models import DecoderSpec, LayerSpec, LinearSpec, NormSpec, RopeSpec

ACTIVATIONS = {
    "silu": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


def norm(spec: NormSpec | None, x: torch.Tensor) -> torch.Tensor:
    if spec is None:
        return x
    weight, bias = spec.tensors()
    rows = x.unflatten(-1, (spec.groups, -1))
    if spec.kind == "layer":
        y = F.layer_norm(rows, rows.shape[-1:], None, None, spec.eps)
    else:
        y = rows * torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + spec.eps)
    y = y if weight is None else y * (spec.weight_offset + weight)
    return (y if bias is None else y + bias).flatten(-2)


def linear(spec: LinearSpec, x: torch.Tensor) -> torch.Tensor:
    y = F.linear(x, spec.module.weight) if spec.weight_only else spec.module(x)  # type: ignore[arg-type]
    if spec.rows is None:
        return y
    rows = [spec.rows] if isinstance(spec.rows[0], int) else spec.rows
    return torch.cat([y[..., begin:end] for begin, end in rows], dim=-1)


def rotate(spec: RopeSpec | None, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """x: [T, heads, D]."""
    if spec is None:
        return x
    angle = positions[:, None].float() * spec.inv_freq
    cos, sin = (f(angle)[:, None] * spec.scaling for f in (torch.cos, torch.sin))
    half, rest = spec.rotary_dim // 2, x[..., spec.rotary_dim :]
    if spec.style == "half":
        a, b = x[..., :half], x[..., half : 2 * half]
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)
    a, b = x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2]
    return torch.cat([torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2), rest], dim=-1)


def biases(slopes: torch.Tensor, positions: torch.Tensor, scale: float) -> torch.Tensor:
    """ALiBi [heads, positions] of slopes [heads, 1]; negative slopes stand for Falcon's, in bfloat16."""
    rounded = (-slopes).bfloat16() * positions.bfloat16()
    return torch.where(slopes < 0, rounded.float() * scale, slopes * positions)


def attention(spec: DecoderSpec, layer: LayerSpec, x: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(len(x))
    q = norm(layer.q_norm, linear(layer.q, x)).view(len(x), spec.num_heads, spec.head_dim)
    k = norm(layer.k_norm, linear(layer.k, x)).view(len(x), spec.num_kv_heads, spec.head_dim)
    v = linear(layer.v, x).view(len(x), spec.num_kv_heads, spec.head_dim)
    q, k = rotate(layer.rope, q, positions), rotate(layer.rope, k, positions)
    k, v = (t.repeat_interleave(spec.num_heads // spec.num_kv_heads, 1) for t in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * layer.scale
    if spec.attn_softcap is not None:
        scores = spec.attn_softcap * torch.tanh(scores / spec.attn_softcap)
    if spec.alibi is not None:
        scores = scores + biases(torch.tensor(spec.alibi)[:, None], positions, layer.scale)[:, None]
    distance = positions[:, None] - positions[None, :]
    seen = (distance >= 0) & (distance < (layer.window or len(x)))
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    out = linear(layer.o, torch.einsum("hqk,khd->qhd", weights.to(v.dtype), v).flatten(1))
    return layer.residual_scale * norm(layer.attn_out_norm, out)


def mlp(layer: LayerSpec, x: torch.Tensor) -> torch.Tensor:
    act, up = ACTIVATIONS[layer.activation], linear(layer.up, x)
    out = linear(layer.down, act(up) if layer.gate is None else act(linear(layer.gate, x)) * up)
    return layer.residual_scale * norm(layer.mlp_out_norm, out)


def walk(spec: DecoderSpec, ids: torch.Tensor) -> torch.Tensor:
    """Logits [T, vocab] (hidden states without a head) of one unpadded row of ids [T]."""
    assert isinstance(spec.embed.weight, torch.Tensor)
    x = F.embedding(ids, spec.embed.weight) * spec.embed_scale
    if spec.project_in is not None:
        x = linear(spec.project_in, x)
    if spec.positions is not None:
        assert isinstance(spec.positions.weight, nn.Parameter)
        x = x + spec.positions.weight[torch.arange(len(ids)) + spec.position_offset]
    x = norm(spec.embed_norm, x)
    for layer in spec.layers:
        if layer.order == "post":
            x = norm(layer.attn_norm, x + attention(spec, layer, x))
            x = norm(layer.mlp_norm, x + mlp(layer, x))
            continue
        n = norm(layer.attn_norm, x)
        if layer.order == "parallel":
            m = n if layer.mlp_norm is None else norm(layer.mlp_norm, x)
            x = x + attention(spec, layer, n) + mlp(layer, m)
            continue
        x = (n if layer.residual_from_norm else x) + attention(spec, layer, n)
        m = norm(layer.mlp_norm, x)
        x = (m if layer.residual_from_norm else x) + mlp(layer, m)
    x = norm(spec.final_norm, x)
    if spec.project_out is not None:
        x = linear(spec.project_out, x)
    if spec.lm_head is None:
        return x
    logits = linear(spec.lm_head, x) * spec.logit_scale
    cap = spec.logit_softcap
    return logits if cap is None else cap * torch.tanh(logits / cap)

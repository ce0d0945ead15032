"""A decoder computed from its spec in plain PyTorch: the proof that a spec says what the model is, without
any kernel."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from dschat_kernels.models import DecoderSpec, LinearSpec, NormSpec, RopeSpec

ACTIVATIONS = {
    "silu": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


def norm(spec: NormSpec, x: torch.Tensor) -> torch.Tensor:
    weight, bias = spec.tensors()
    if spec.kind == "layer":
        return F.layer_norm(x, x.shape[-1:], weight, bias, spec.eps)
    assert weight is not None and bias is None
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + spec.eps) * (spec.weight_offset + weight)


def linear(spec: LinearSpec, x: torch.Tensor) -> torch.Tensor:
    y = spec.module(x)
    return y if spec.rows is None else y[..., spec.rows[0] : spec.rows[1]]


def rotate(spec: RopeSpec, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """x: [T, heads, D]."""
    angle = positions[:, None].float() * spec.inv_freq
    cos, sin = (f(angle)[:, None] * spec.scaling for f in (torch.cos, torch.sin))
    assert spec.style == "half"
    half = spec.rotary_dim // 2
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


def walk(spec: DecoderSpec, ids: torch.Tensor) -> torch.Tensor:
    """Logits [T, vocab] (hidden states without a head) of one unpadded row of ids [T]."""
    positions = torch.arange(len(ids))
    x = spec.embed(ids)
    if spec.project_in is not None:
        x = linear(spec.project_in, x)
    if spec.positions is not None:
        assert isinstance(spec.positions.weight, nn.Parameter)
        x = x + spec.positions.weight[positions + spec.position_offset]
    distance = positions[:, None] - positions[None, :]
    for layer in spec.layers:
        pre = layer.norm_position == "pre"
        h = norm(layer.attn_norm, x) if pre else x
        q = linear(layer.q, h).view(-1, spec.num_heads, spec.head_dim)
        k, v = (linear(p, h).view(-1, spec.num_kv_heads, spec.head_dim) for p in (layer.k, layer.v))
        if spec.rope is not None:
            q, k = rotate(spec.rope, q, positions), rotate(spec.rope, k, positions)
        k, v = (t.repeat_interleave(spec.num_heads // spec.num_kv_heads, 1) for t in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * layer.scale
        seen = (distance >= 0) & (distance < (layer.window or len(ids)))
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        x = x + linear(layer.o, torch.einsum("hqk,khd->qhd", weights, v).flatten(1))
        x = x if pre else norm(layer.attn_norm, x)
        h = norm(layer.mlp_norm, x) if pre else x
        act, up = ACTIVATIONS[layer.activation], linear(layer.up, h)
        x = x + linear(layer.down, act(up) if layer.gate is None else act(linear(layer.gate, h)) * up)
        x = x if pre else norm(layer.mlp_norm, x)
    if spec.final_norm is not None:
        x = norm(spec.final_norm, x)
    if spec.project_out is not None:
        x = linear(spec.project_out, x)
    return x if spec.lm_head is None else linear(spec.lm_head, x)

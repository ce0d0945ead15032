"""Linear layer with a low-rank side path (LoRA), and the fusion of such an update into a weight.

    lora_linear   y = round(x W^T + b + scale * (x A^T) B^T)       one pass; the side path is float32 throughout
    fuse_lora     W' = round(W + scale * B A)                      accumulated in float32, rounded once, W untouched

and the gradients of the two factors, of a side path as of a fused weight:

    low_rank_grads   dA = scale (dy B)^T x      dB = scale dy^T (x A^T)      in float32, rounded to the factors' dtype

The op of torch.library also gives its float32 scale (dy B), with which `lora_linear` adds the side path's part of the
gradient of x, (scale dy B) A, to the base's, dy W, by `fuse_lora`. That product of the base alone is PyTorch's.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, https://arxiv.org/abs/2106.09685
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dschat_kernels.ops._common import (
    DTYPES,
    LIBRARY,
    as_rows,
    check,
    check_device,
    check_tensor,
    check_vector,
    implementation,
    kernels,
    ptr,
    register,
    resolve_backend,
    runs_on_cuda,
    widen,
)
from dschat_kernels.packing import PackedLinear


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    *,
    backend: str | None = None,
) -> Tensor:
    """x [..., k], weight [n, k], bias [n] or None, lora_a [rank, k], lora_b [n, rank] -> [..., n] of x's dtype.

    weight has the dtype of x; lora_a and lora_b may be float32 or that dtype. Differentiable in x, lora_a and lora_b;
    weight and bias are the frozen base and get no gradient.

    Raises ValueError or TypeError for wrong shapes, dtypes, devices and backends.
    """
    _check_lora("lora_linear", weight, lora_a, lora_b)
    check_tensor("lora_linear", "x", x)
    check(
        x.dim() > 0 and x.shape[-1] == weight.shape[1],
        f"lora_linear: x has shape {list(x.shape)}; the last dimension must be {weight.shape[1]}, as in weight.",
    )
    check(
        x.dtype == weight.dtype,
        f"lora_linear: x is {x.dtype} and weight {weight.dtype}; give one dtype.",
        TypeError,
    )
    check_device("lora_linear", "weight", weight, x)
    if bias is not None:
        check_vector("lora_linear", "bias", bias, x, weight.shape[0])
    check(
        not (weight.requires_grad or (bias is not None and bias.requires_grad)),
        "lora_linear: weight or bias requires a gradient; freeze the base (requires_grad_(False)) or use F.linear.",
    )
    backend = resolve_backend("lora_linear", backend, x, weight, lora_a, lora_b)
    if backend == "reference":
        return lora_linear_reference(x, weight, bias, lora_a, lora_b, scale)
    op = implementation("lora_linear", backend, x, weight, lora_a, lora_b)
    return op(x, weight, bias, lora_a, lora_b, scale)


def lora_linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scale: float
) -> Tensor:
    """The specification, in plain PyTorch."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    v = x.to(wide)
    y = v @ weight.to(wide).t()
    if bias is not None:
        y = y + bias.to(wide)
    return (y + (v @ lora_a.to(wide).t() * scale) @ lora_b.to(wide).t()).to(x.dtype)


def fuse_lora(
    weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float, *, backend: str | None = None
) -> Tensor:
    """round(weight + scale * lora_b @ lora_a) as a new [n, k] tensor of weight's dtype; nothing is written in place.

    weight [n, k] (any strides), lora_a [rank, k], lora_b [n, rank]. Forward only.
    """
    _check_lora("fuse_lora", weight, lora_a, lora_b)
    backend = resolve_backend("fuse_lora", backend, weight, lora_a, lora_b)
    if backend == "reference":
        return fuse_lora_reference(weight, lora_a, lora_b, scale)
    op = implementation("fuse_lora", backend, weight, lora_a, lora_b)
    return op(weight, lora_a, lora_b, scale)


def fuse_lora_reference(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    """The specification, in plain PyTorch."""
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return (weight.to(wide) + scale * (lora_b.to(wide) @ lora_a.to(wide))).to(weight.dtype)


def low_rank_grads(
    x: Tensor, dy: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of lora_a [rank, k] and lora_b [n, rank], in their dtypes, from x [T, k] and dy [T, n] of one dtype.

    Raises ValueError or TypeError for wrong shapes, dtypes, devices and backends.
    """
    op = "low_rank_grads"
    for name, tensor in (("x", x), ("dy", dy), ("lora_a", lora_a), ("lora_b", lora_b)):
        check_tensor(op, name, tensor)
        check(tensor.dim() == 2, f"{op}: {name} has shape {list(tensor.shape)}; give a matrix.")
        check_device(op, name, tensor, x)
    rank = lora_a.shape[0]
    check(
        len(x) == len(dy)
        and lora_a.shape[1] == x.shape[1]
        and lora_b.shape == (dy.shape[1], rank)
        and rank > 0,
        f"{op}: x {list(x.shape)}, dy {list(dy.shape)}, lora_a {list(lora_a.shape)} and lora_b {list(lora_b.shape)} do "
        "not fit; give [T, k], [T, n], [rank, k] and [n, rank].",
    )
    check(x.dtype == dy.dtype, f"{op}: x is {x.dtype} and dy {dy.dtype}; give one dtype.", TypeError)
    backend = resolve_backend(op, backend, x, dy)
    if backend == "reference":
        return low_rank_grads_reference(x, dy, lora_a, lora_b, scale)
    d_a, d_b, _ = implementation(op, backend, x, dy, lora_a, lora_b)(x, dy, lora_a, lora_b, scale)
    return d_a, d_b


def low_rank_grads_reference(
    x: Tensor, dy: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """The specification, in plain PyTorch."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    x, dy, a, b = x.to(wide), dy.to(wide), lora_a.to(wide), lora_b.to(wide)
    d_a = scale * (dy @ b).t() @ x
    d_b = scale * (dy.t() @ (x @ a.t()))
    return d_a.to(lora_a.dtype), d_b.to(lora_b.dtype)


def _check_lora(op: str, weight: Tensor, lora_a: Tensor, lora_b: Tensor) -> None:
    for name, tensor in (("weight", weight), ("lora_a", lora_a), ("lora_b", lora_b)):
        check_tensor(op, name, tensor)
        check(tensor.dim() == 2, f"{op}: {name} has shape {list(tensor.shape)}; give a matrix.")
    n, k = weight.shape
    rank = lora_a.shape[0]
    check(
        lora_a.shape[1] == k and tuple(lora_b.shape) == (n, rank) and rank > 0,
        f"{op}: weight {list(weight.shape)}, lora_a {list(lora_a.shape)} and lora_b {list(lora_b.shape)} do not fit; "
        f"give lora_a [rank, {k}] and lora_b [{n}, rank].",
    )
    check_device(op, "lora_a", lora_a, weight)
    check_device(op, "lora_b", lora_b, weight)


# ------------------------------------------------------------------------------------------- torch.library

LIBRARY.define(
    "lora_linear(Tensor x, Tensor weight, Tensor? bias, Tensor lora_a, Tensor lora_b, float scale) -> Tensor"
)
LIBRARY.define("fuse_lora(Tensor weight, Tensor lora_a, Tensor lora_b, float scale) -> Tensor")
LIBRARY.define(
    "low_rank_grads(Tensor x, Tensor dy, Tensor lora_a, Tensor lora_b, float scale) -> (Tensor da, Tensor db, Tensor "
    "inner)"
)


def _lora_linear_cpu(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scale: float
) -> Tensor:
    if runs_on_cuda():
        return _lora_linear_cuda(x, weight, bias, lora_a, lora_b, scale)
    base = PackedLinear.from_weight(weight, bias)
    a = PackedLinear.from_weight(lora_a.detach().float())
    b = PackedLinear.from_weight(lora_b.detach().float())
    rows, stride = as_rows(x)
    n, k = weight.shape
    y = torch.empty(*x.shape[:-1], n, dtype=x.dtype, device=x.device)
    kernels().lora_linear(
        DTYPES[x.dtype], ptr(rows), stride, rows.shape[0], ptr(base.panels), ptr(base.bias), n, k, ptr(a.panels),
        ptr(b.panels), lora_a.shape[0], scale, ptr(y), n,
    )  # fmt: skip
    return y


def _lora_linear_cuda(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scale: float
) -> Tensor:
    """The dense weights as they are, and the side path's x A^T in a float32 [rows, rank]."""
    weight, bias = weight.contiguous(), widen(bias)
    a, b = lora_a.detach().float().contiguous(), lora_b.detach().float().contiguous()
    rows, stride = as_rows(x)
    n, k = weight.shape
    y = torch.empty(*x.shape[:-1], n, dtype=x.dtype, device=x.device)
    side = torch.empty(rows.shape[0], a.shape[0], dtype=torch.float32, device=x.device)
    kernels().lora_linear(
        DTYPES[x.dtype], ptr(rows), stride, rows.shape[0], ptr(weight), ptr(bias), n, k, ptr(a), ptr(b), a.shape[0],
        scale, ptr(side), ptr(y),
    )  # fmt: skip
    return y


def _fuse_lora_cpu(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    a, b = lora_a.detach().float().contiguous(), lora_b.detach().float().contiguous()
    out = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    if runs_on_cuda():
        kernels().fuse_lora(
            DTYPES[weight.dtype],
            ptr(weight),
            *weight.shape,
            *weight.stride(),
            ptr(a),
            ptr(b),
            a.shape[0],
            scale,
            ptr(out),
        )
        return out
    matrix = (ptr(weight), *weight.shape, *weight.stride(), [(ptr(a), ptr(b), a.shape[0], scale)])
    kernels().fuse_lora(DTYPES[weight.dtype], DTYPES[weight.dtype], matrix, ptr(out))
    return out


def _lora_linear_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scale: float
) -> Tensor:
    return torch.empty(*x.shape[:-1], weight.shape[0], dtype=x.dtype, device=x.device)


def _fuse_lora_fake(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    return torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)


def _low_rank_grads_cpu(
    x: Tensor, dy: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    a, b_t = lora_a.detach().float().contiguous(), lora_b.detach().float().t().contiguous()
    (rows, x_stride), (grads, dy_stride) = as_rows(x), as_rows(dy)
    (tokens, k), (rank, n) = rows.shape, b_t.shape
    d_a, d_b = (torch.zeros(rank, size, dtype=torch.float32, device=x.device) for size in (k, n))
    inner = torch.empty(2, tokens, rank, dtype=torch.float32, device=x.device)
    scratch = []  # cuda: sums of blocks of rows
    if runs_on_cuda():
        blocks = -(-tokens // kernels().outer_rows)
        scratch.append(torch.empty(blocks * rank * max(n, k), dtype=torch.float32, device=x.device))
    kernels().low_rank_grads(
        DTYPES[x.dtype], ptr(rows), x_stride, ptr(grads), dy_stride, tokens, n, k, rank, ptr(a), ptr(b_t), scale,
        ptr(inner), ptr(d_a), ptr(d_b), *map(ptr, scratch),
    )  # fmt: skip
    return d_a.to(lora_a.dtype), d_b.t().contiguous().to(lora_b.dtype), inner[0]


def _low_rank_grads_fake(
    x: Tensor, dy: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    inner = x.new_empty(x.shape[0], lora_a.shape[0], dtype=torch.float32)
    return lora_a.new_empty(lora_a.shape), lora_b.new_empty(lora_b.shape), inner


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, lora_a, lora_b, ctx.scale = inputs
    ctx.save_for_backward(x, weight, lora_a, lora_b)


def _grad(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """dx = dy W + scale (dy B) A,  dA = scale (dy B)^T x,  dB = scale dy^T (x A^T); the side path in float32."""
    x, weight, lora_a, lora_b = ctx.saved_tensors
    rows, grads = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    d_a, d_b, inner = ctx.ops.low_rank_grads(rows, grads, lora_a, lora_b, ctx.scale)
    dx = None
    if ctx.needs_input_grad[0]:
        dx = ctx.ops.fuse_lora(grads @ weight, lora_a, inner, 1.0).view(x.shape)
    return dx, None, None, d_a, d_b, None


register("lora_linear", _lora_linear_cpu, _lora_linear_fake, _save, _grad)
register("fuse_lora", _fuse_lora_cpu, _fuse_lora_fake)
register("low_rank_grads", _low_rank_grads_cpu, _low_rank_grads_fake)

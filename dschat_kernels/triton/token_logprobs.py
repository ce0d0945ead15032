"""Log-probabilities, entropies and gaps of given tokens; the formulas are in dschat_kernels/ops/token_logprobs.py.

Logits are computed a block of rows at a time by the kernel of `linear`, and reduced by the rule of _logsumexp: they
have the bits of the rollout's, and no tensor of all rows and the vocabulary exists. The backward recomputes blocks of
rows and vocabulary; its products are of float32, and the gradients are rounded once at the end.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dschat_kernels.triton._gemm import matmul
from dschat_kernels.triton._launch import Config, aligned, as_rows, float32, launch, no_tensor
from dschat_kernels.triton._logsumexp import row_sums
from dschat_kernels.triton._math import softcapped, tanh
from dschat_kernels.triton._rows import column_sum
from dschat_kernels.triton.linear import linear

LOGITS_BYTES = 64 << 20
"""The forward's block of logits."""
ROW_BLOCK, VOCAB_BLOCK = 512, 4096
"""The backward's: 8 MiB of float32."""


@triton.jit
def _logprobs(
    logits,
    targets,
    logprob,
    lse_out,
    entropy,
    gap,
    row_m,
    row_l,
    row_w,
    vocab,
    inverse,
    softcap,
    ENTROPY: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    l = tl.load(row_l + row)
    m = tl.load(row_m + row)
    lse = m + tl.log(l)
    z = tl.load(logits + row * vocab + tl.load(targets + row))
    if softcap is not None:
        z = softcapped(z, softcap)
    z = z * inverse
    tl.store(logprob + row, z - lse)
    tl.store(lse_out + row, lse)
    tl.store(gap + row, tl.where(l == l, m - z, l))
    if ENTROPY:
        tl.store(entropy + row, tl.log(l) + tl.load(row_w + row) / l)


@triton.jit
def _logit_grad(
    logits, targets, dlogprob, dentropy, lse, entropy, first, columns, inverse, softcap, BLOCK: tl.constexpr
):
    """dz_v = dlogprob (1[v = target] - p_v) - dentropy p_v (log p_v + entropy), through temperature and softcap, in the
    place of a block of logits whose first column is `first` of the vocabulary."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    place = logits + row * columns + column
    z = tl.load(place, mask=inside, other=float("-inf"))
    slope = inverse
    if softcap is not None:
        t = tanh(z / softcap)
        z = softcap * t
        slope = inverse * (1.0 - t * t)
    log_p = z * inverse - tl.load(lse + row)
    p = tl.exp(log_p)
    g = tl.load(dlogprob + row)
    dz = -p * g
    if dentropy is not None:
        rest = p * tl.load(dentropy + row) * (log_p + tl.load(entropy + row))
        dz -= tl.where(p == 0.0, 0.0, rest)  # log p may be -inf
    dz += tl.where(first + column == tl.load(targets + row), g, 0.0)
    tl.store(place, dz * slope, mask=inside)


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float,
    logit_softcap: float | None,
    with_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (tokens, size), vocab, device = hidden.shape, weight.shape[0], hidden.device
    rows, _ = as_rows(hidden)
    weight, targets = weight.detach().contiguous(), targets.to(torch.int64).contiguous()
    logprob, lse, gap = (torch.empty(tokens, dtype=torch.float32, device=device) for _ in range(3))
    entropy = torch.empty(tokens if with_entropy else 0, dtype=torch.float32, device=device)
    step = max(1, LOGITS_BYTES // (4 * vocab))
    for begin in range(0, tokens, step):
        block = slice(begin, begin + step)
        logits = linear(rows[block], weight, bias, vocab, size, False, "none", None, True)
        sums = row_sums(logits, vocab, _inverse(temperature), logit_softcap, with_entropy)
        launch(
            _logprobs, (len(logits),),
            {
                "logits": logits, "targets": targets[block], "logprob": logprob[block], "lse_out": lse[block],
                "entropy": entropy[block] if with_entropy else None, "gap": gap[block],
                "row_m": sums.m, "row_l": sums.l, "row_w": sums.w,
                "vocab": vocab, "inverse": _inverse(temperature), "softcap": logit_softcap, "ENTROPY": with_entropy,
            },
            Config(num_warps=1, num_stages=1, fp_fusion=False),  # as row_sums, and sample
        )  # fmt: skip
    return logprob, lse, entropy, gap


def _inverse(temperature: float) -> float:
    """As `sample` inverts it."""
    return float(1.0 / torch.tensor(temperature, dtype=torch.float32, device="cpu"))


def token_logprobs_backward(
    dlogprob: Tensor,
    dentropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    lse: Tensor,
    entropy: Tensor,
    temperature: float,
    logit_softcap: float | None,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    (tokens, size), vocab, device = hidden.shape, weight.shape[0], hidden.device
    rows, _ = as_rows(hidden)
    weight, targets = weight.detach().contiguous(), targets.to(torch.int64).contiguous()
    wide_bias = float32(bias)
    rows_given = {"dlogprob": float32(dlogprob), "dentropy": float32(dentropy), "lse": aligned(lse)}
    rows_given["entropy"] = None if dentropy is None else aligned(entropy)
    dh = torch.zeros(tokens, size, dtype=torch.float32, device=device) if wanted[0] else None
    dw = torch.zeros_like(weight) if wanted[1] else None
    db = torch.zeros(vocab, dtype=torch.float32, device=device) if wanted[2] and bias is not None else None
    for v0 in range(0, vocab, VOCAB_BLOCK):
        v1 = min(v0 + VOCAB_BLOCK, vocab)
        w = weight[v0:v1]
        dw_block = torch.zeros(w.shape, dtype=torch.float32, device=device)
        for r0 in range(0, tokens, ROW_BLOCK):
            block = slice(r0, r0 + ROW_BLOCK)
            bias_block = None if wide_bias is None else wide_bias[v0:v1]
            dz = linear(rows[block], w, bias_block, v1 - v0, size, False, "none", None, True)
            launch(
                _logit_grad, (len(dz), -(-(v1 - v0) // 1024)),
                {
                    "logits": dz, "targets": targets[block], "first": v0, "columns": v1 - v0,
                    "inverse": _inverse(temperature), "softcap": logit_softcap,
                    **{name: None if t is None else t[block] for name, t in rows_given.items()},
                },
                Config({"BLOCK": 1024}, num_warps=4, num_stages=1),
            )  # fmt: skip
            if dh is not None:
                matmul(dz, w, dh[block], add=True)
            if wanted[1]:
                matmul(dz.t(), rows[block], dw_block, add=True)
            if db is not None:
                db[v0:v1] += column_sum(dz, v1 - v0, device)
        if dw is not None:
            dw[v0:v1] = dw_block
    return (
        no_tensor(hidden) if dh is None else dh.to(hidden.dtype),
        no_tensor(weight) if dw is None else dw,
        no_tensor(weight) if db is None or bias is None else db.to(bias.dtype),
    )

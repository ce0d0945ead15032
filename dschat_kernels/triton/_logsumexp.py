"""The one rule for log-probabilities over a vocabulary, shared by sample and token_logprobs so that the rollout and the
training forward give the same bits for the same logits.

    z       = logit * inverse_temperature                                   (float32, after a softcap)
    chunk   = entries [1024 c, 1024 c + 1024) of the vocabulary:  m_c = max z,  l_c = sum of exp(z - m_c)
    row     = m = max m_c,  l = sum of l_c exp(m_c - m)
    log p   = z_t - (m + log l)

A program computes a chunk, so that few rows fill a GPU too; another adds up the chunks of a row. Entries of -inf weigh
nothing. A NaN or +inf entry makes l NaN; a row of nothing but -inf has l = 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dschat_kernels.triton._launch import Config, launch
from dschat_kernels.triton._math import softcapped

VOCAB_CHUNK = 1024
CHUNK_BLOCK = 128
"""Chunks of a row that are loaded at once where they are added up."""


@triton.jit
def chunk_of(logits, start, vocab, inverse, softcap, CHUNK: tl.constexpr):
    """z of a chunk of a row; -inf past its end."""
    index = start + tl.arange(0, CHUNK)
    z = tl.load(logits + index, mask=index < vocab, other=float("-inf")).to(tl.float32)
    if softcap is not None:
        z = softcapped(z, softcap)
    return tl.where(index < vocab, z * inverse, float("-inf"))


@triton.jit
def _chunk_sums(
    logits, chunk_m, chunk_l, chunk_w, vocab, stride, chunks, inverse, softcap,
    ENTROPY: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """m_c, l_c and, with ENTROPY, w_c = sum of exp(z - m_c) (m_c - z)."""
    at = tl.program_id(0)
    row, chunk = at // chunks, at % chunks
    z = chunk_of(logits + row.to(tl.int64) * stride, chunk * CHUNK, vocab, inverse, softcap, CHUNK)
    top = tl.max(z, 0)
    # Against -inf every difference would be NaN; against 0 masked entries give 0, and a NaN still shows.
    below = tl.where(top == float("-inf"), 0.0, top) - z
    p = tl.exp(-below)
    tl.store(chunk_m + at, top)
    tl.store(chunk_l + at, tl.sum(p, 0))
    if ENTROPY:
        tl.store(chunk_w + at, tl.sum(tl.where(p > 0.0, p * below, 0.0), 0))


@triton.jit
def _row_sums(
    chunk_m, chunk_l, chunk_w, row_m, row_l, row_w, chunks, ENTROPY: tl.constexpr, BLOCK: tl.constexpr
):
    """m, l and, with ENTROPY, w = sum of exp(z - m) (m - z) of a row, whose entropy is log l + w / l."""
    row = tl.program_id(0)
    first = row.to(tl.int64) * chunks
    at = tl.arange(0, BLOCK)
    tops = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, chunks, BLOCK):
        there = start + at < chunks
        tops = tl.maximum(tops, tl.load(chunk_m + first + start + at, mask=there, other=float("-inf")))
    m = tl.max(tops, 0)
    pivot = tl.where(m == float("-inf"), 0.0, m)
    sums = tl.zeros([BLOCK], tl.float32)
    weighted = tl.zeros([BLOCK], tl.float32)
    for start in range(0, chunks, BLOCK):
        there = start + at < chunks
        top = tl.load(chunk_m + first + start + at, mask=there, other=float("-inf"))
        l = tl.load(chunk_l + first + start + at, mask=there, other=0.0)
        scale = tl.exp(top - pivot)
        sums += l * scale
        if ENTROPY:
            w = tl.load(chunk_w + first + start + at, mask=there, other=0.0)
            weighted += tl.where(l == 0.0, 0.0, w + l * (pivot - top)) * scale
    tl.store(row_m + row, m)
    tl.store(row_l + row, tl.sum(sums, 0))
    if ENTROPY:
        tl.store(row_w + row, tl.sum(weighted, 0))


class RowSums(NamedTuple):
    """Of rows and of their chunks [rows, chunks], float32; w is of an entropy that was asked for."""

    m: Tensor
    l: Tensor
    w: Tensor | None
    chunk_m: Tensor
    chunk_l: Tensor


def row_sums(
    logits: Tensor, stride: int, inverse: float, softcap: float | None = None, entropy: bool = False
) -> RowSums:
    """The sums of every row of logits [rows, vocab]."""
    rows, vocab = logits.shape
    chunks = -(-vocab // VOCAB_CHUNK)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=logits.device)

    chunk_m, chunk_l = empty(rows, chunks), empty(rows, chunks)
    of_chunks = {"chunk_m": chunk_m, "chunk_l": chunk_l, "chunk_w": empty(rows, chunks) if entropy else None,
                 "chunks": chunks, "ENTROPY": entropy}  # fmt: skip
    m, l, w = empty(rows), empty(rows), empty(rows) if entropy else None
    # Not fused: what is subtracted from z / temperature has been rounded.
    launch(
        _chunk_sums, (rows * chunks,),
        {**of_chunks, "logits": logits, "vocab": vocab, "stride": stride, "inverse": inverse, "softcap": softcap},
        Config({"CHUNK": VOCAB_CHUNK}, num_warps=4, num_stages=1, fp_fusion=False),
    )  # fmt: skip
    launch(
        _row_sums, (rows,), {**of_chunks, "row_m": m, "row_l": l, "row_w": w},
        Config({"BLOCK": CHUNK_BLOCK}, num_warps=4, num_stages=1, fp_fusion=False),
    )  # fmt: skip
    return RowSums(m, l, w, chunk_m, chunk_l)

"""The one rule for log-probabilities over a vocabulary, shared by sample and token_logprobs so that the rollout and the
training forward give the same bits for the same logits.

    z       = logit * inverse_temperature                                   (float32, after a softcap)
    chunk   = entries [1024 c, 1024 c + 1024) of the vocabulary:  m_c = max z,  l_c = sum of exp(z - m_c)
    fold    = chunks from left to right:  m' = max(m, m_c),  l' = l exp(m - m') + l_c exp(m_c - m')
    log p   = z_t - (m + log l)

Entries of -inf weigh nothing. A NaN or +inf entry makes l NaN; a row of nothing but -inf has l = 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dschat_kernels.triton._math import softcapped

VOCAB_CHUNK = 1024


@triton.jit
def chunk_of(logits, start, vocab, inverse, softcap, CHUNK: tl.constexpr):
    """z of a chunk of a row; -inf past its end."""
    index = start + tl.arange(0, CHUNK)
    z = tl.load(logits + index, mask=index < vocab, other=float("-inf")).to(tl.float32)
    if softcap is not None:
        z = softcapped(z, softcap)
    return tl.where(index < vocab, z * inverse, float("-inf"))


@triton.jit
def _shifted(weighted, l, shift):
    """sum of p (m + shift - z) from sum of p (m - z) and l = sum of p; of nothing, where shift is infinite, 0."""
    return weighted + tl.where(l == 0.0, 0.0, shift * l)


@triton.jit
def row_logsumexp(logits, vocab, inverse, softcap, ENTROPY: tl.constexpr, CHUNK: tl.constexpr):
    """m, l and, with ENTROPY, w = sum of exp(z - m) (m - z) of a row, whose entropy is log l + w / l."""
    m = float("-inf")
    l = 0.0
    weighted = 0.0
    for start in range(0, vocab, CHUNK):
        z = chunk_of(logits, start, vocab, inverse, softcap, CHUNK)
        top = tl.max(z, 0)
        # Against -inf every difference would be NaN; against 0 masked entries give 0, and a NaN still shows.
        below = tl.where(top == float("-inf"), 0.0, top) - z
        p = tl.exp(-below)
        sums = tl.sum(p, 0)
        new_m = tl.maximum(m, top)
        pivot = tl.where(new_m == float("-inf"), 0.0, new_m)
        old = tl.exp(m - pivot)
        new = tl.where(top == float("-inf"), 1.0, tl.exp(top - pivot))
        if ENTROPY:
            of_chunk = tl.sum(tl.where(p > 0.0, p * below, 0.0), 0)
            weighted = _shifted(weighted, l, new_m - m) * old + _shifted(of_chunk, sums, new_m - top) * new
        l = l * old + sums * new
        m = new_m
    return m, l, weighted

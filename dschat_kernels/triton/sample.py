"""One token a row from logits; the rule is in dschat_kernels/ops/sample.py, the random numbers are those of the CPU.

A program owns a row and passes over it a few times. Thresholds are found by halving over the order-preserving integer
code of z, four bits a pass: the k-th largest z by counting, the last token of top_p by weighing, so nothing is sorted
and any vocabulary fits. Weights are float32 and their sums float64, as on the CPU, in order of index.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from dschat_kernels.ops.sample import raise_for_bad_rows
from dschat_kernels.triton._launch import Config, as_rows, launch
from dschat_kernels.triton._logsumexp import VOCAB_CHUNK, chunk_of, row_logsumexp


@triton.jit
def _code(z):
    """Integers from 0 below 2^32 in the order of z; both zeros have one."""
    bits = (z + 0.0).to(tl.int32, bitcast=True)
    flipped = tl.where(bits < 0, ~bits, bits ^ (-2147483648))
    return flipped.to(tl.uint32, bitcast=True).to(tl.int64)


@triton.jit
def _measures(logits, start, vocab, inverse, m, low, WEIGH: tl.constexpr, CHUNK: tl.constexpr):
    """Codes of a chunk, and what its entries count for: 1, or their weight where their code is at least low."""
    z = chunk_of(logits, start, vocab, inverse, None, CHUNK)
    index = start + tl.arange(0, CHUNK)
    code = _code(z)
    if WEIGH:
        size = tl.where(code >= low, tl.exp(z - m), 0.0).to(tl.float64)
    else:
        size = tl.where(index < vocab, 1.0, 0.0).to(tl.float64)
    return code, size


@triton.jit
def _threshold(logits, vocab, inverse, m, low, target, WEIGH: tl.constexpr, CHUNK: tl.constexpr):
    """The largest code t such that the entries of code >= t measure at least target, the measure of those beyond t, and
    that of one entry of code t."""
    found = tl.full([], 0, tl.int64)
    step = tl.arange(0, 16).to(tl.int64)
    for digit in range(8):
        cuts = found + (step << (28 - 4 * digit))
        above = tl.zeros([16], tl.float64)
        for start in range(0, vocab, CHUNK):
            code, size = _measures(logits, start, vocab, inverse, m, low, WEIGH, CHUNK)
            above += tl.sum(tl.where(code[None, :] >= cuts[:, None], size[None, :], 0.0), 1)
        # The measure falls with the cut: the last that suffices, the first where rounding leaves none.
        found = tl.max(tl.where((above >= target) | (step == 0), cuts, 0), 0)
    beyond = tl.full([], 0.0, tl.float64)
    one = tl.full([], 0.0, tl.float64)
    for start in range(0, vocab, CHUNK):
        code, size = _measures(logits, start, vocab, inverse, m, low, WEIGH, CHUNK)
        beyond += tl.sum(tl.where(code > found, size, 0.0), 0)
        one = tl.maximum(one, tl.max(tl.where(code == found, size, 0.0), 0))
    return found, beyond, one


@triton.jit
def _weight(logits, start, vocab, inverse, m, low, last, min_p, CHUNK: tl.constexpr):
    """Weights of a chunk: of entries with code > low, or code = low up to index last; at least min_p."""
    z = chunk_of(logits, start, vocab, inverse, None, CHUNK)
    index = start + tl.arange(0, CHUNK)
    code = _code(z)
    w = tl.exp(z - m)
    kept = ((code > low) | ((code == low) & (index <= last))) & (w >= min_p)
    return tl.where(kept, w, 0.0)


@triton.jit
def _tie(logits, vocab, inverse, low, count, CHUNK: tl.constexpr):
    """Index of the count-th entry of code low, the last one where there are fewer."""
    before = tl.full([], 0, tl.int32)
    at = tl.full([], 0, tl.int32)
    for start in range(0, vocab, CHUNK):
        z = chunk_of(logits, start, vocab, inverse, None, CHUNK)
        index = start + tl.arange(0, CHUNK)
        here = (_code(z) == low) & (index < vocab)
        rank = before + tl.cumsum(here.to(tl.int32), 0)
        at = tl.maximum(at, tl.max(tl.where(here & (rank <= count), index, 0), 0))
        before += tl.sum(here.to(tl.int32), 0)
    return at


@triton.jit
def _uniform(seed, stream, position):
    """53 bits of Philox4x32-10 in [0, 1)."""
    seed = seed.to(tl.int64)
    c0 = (stream & 0xFFFFFFFF).to(tl.uint32)
    c1 = ((stream >> 32) & 0xFFFFFFFF).to(tl.uint32)
    c2 = (position & 0xFFFFFFFF).to(tl.uint32)
    c3 = ((position >> 32) & 0xFFFFFFFF).to(tl.uint32)
    k0 = (seed & 0xFFFFFFFF).to(tl.uint32)
    k1 = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    w0, w1, _w2, _w3 = tl.philox_impl(c0, c1, c2, c3, k0, k1)
    bits = (w0.to(tl.int64) >> 5 << 26) | (w1.to(tl.int64) >> 6)
    return bits.to(tl.float64) * 1.1102230246251565e-16  # 2^-53


@triton.jit(do_not_specialize=["top_k", "seed"])
def _sample(
    logits, streams, positions, tokens, log_probs, vocab, stride, inverse, top_k, top_p, top_p_rest, min_p, seed,
    GREEDY: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    m, l, _weighted = row_logsumexp(logits, vocab, inverse, None, False, CHUNK)
    token = tl.full([], 0, tl.int64)
    if (l != l) | (m == float("inf")):
        token -= 1
    elif l == 0.0:
        token -= 2
    elif GREEDY:
        best = vocab
        for start in range(0, vocab, CHUNK):
            z = chunk_of(logits, start, vocab, inverse, None, CHUNK)
            best = tl.minimum(best, tl.min(tl.where(z == m, start + tl.arange(0, CHUNK), vocab), 0))
        token += best
    else:
        low = tl.full([], -1, tl.int64)
        last = vocab
        if TOP_K:
            low, _beyond, _one = _threshold(
                logits, vocab, inverse, m, low, top_k.to(tl.float64), False, CHUNK
            )
        if TOP_P:
            mass = tl.full([], 0.0, tl.float64)
            for start in range(0, vocab, CHUNK):
                _code_of, size = _measures(logits, start, vocab, inverse, m, low, True, CHUNK)
                mass += tl.sum(size, 0)
            target = tl.maximum(
                (tl.full([], 0.0, tl.float64) + top_p + top_p_rest) * mass, 2.2250738585072014e-308
            )
            low, beyond, one = _threshold(logits, vocab, inverse, m, low, target, True, CHUNK)
            # Of entries with just the last code, in order of index, those stay whose predecessors weigh too little.
            ties = tl.minimum(tl.ceil((target - beyond) / tl.maximum(one, 1e-300)), 2147483647.0).to(tl.int32)
            last = _tie(logits, vocab, inverse, low, ties, CHUNK)
        mass = tl.full([], 0.0, tl.float64)
        for start in range(0, vocab, CHUNK):
            w = _weight(logits, start, vocab, inverse, m, low, last, min_p, CHUNK)
            mass += tl.max(tl.cumsum(w.to(tl.float64), 0), 0)
        target = _uniform(seed, tl.load(streams + row), tl.load(positions + row)) * mass
        before = tl.full([], 0.0, tl.float64)
        found = tl.full([], 0, tl.int1)
        chosen = tl.full([], 0, tl.int32)
        for start in range(0, vocab, CHUNK):
            w = _weight(logits, start, vocab, inverse, m, low, last, min_p, CHUNK)
            index = start + tl.arange(0, CHUNK)
            running = before + tl.cumsum(w.to(tl.float64), 0)
            hit = tl.min(tl.where((running > target) & (w > 0.0), index, vocab), 0)
            heaviest = tl.max(tl.where(w > 0.0, index, 0), 0)
            # Rounding may leave the target at the very end: then the last entry with weight has it.
            chosen = tl.where(found, chosen, tl.where(hit < vocab, hit, tl.maximum(chosen, heaviest)))
            found = found | (hit < vocab)
            before = tl.max(running, 0)
        token += chosen
    z = tl.load(logits + tl.maximum(token, 0)).to(tl.float32) * inverse
    tl.store(tokens + row, token)
    tl.store(log_probs + row, tl.where(token < 0, float("nan"), z - (m + tl.log(l))))


def _float_from_above(value: float) -> float:
    """The smallest float32 not below value, so that a float32 weight compares as it would in float64."""
    rounded = torch.tensor(value, dtype=torch.float32)
    if float(rounded) < value:
        rounded = torch.nextafter(rounded, torch.tensor(math.inf))
    return float(rounded)


def sample(
    logits: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    seed: int,
    streams: Tensor | None,
    positions: Tensor | None,
) -> tuple[Tensor, Tensor]:
    rows, stride = as_rows(logits)
    count, vocab = rows.shape
    tokens = torch.empty(count, dtype=torch.int64, device=rows.device)
    log_probs = torch.empty(count, dtype=torch.float32, device=rows.device)
    greedy = temperature == 0.0
    top_p_high = float(torch.tensor(top_p, dtype=torch.float32))
    launch(
        _sample, (count,),
        {
            "logits": rows, "streams": None if streams is None else streams.contiguous(),
            "positions": None if positions is None else positions.contiguous(), "tokens": tokens,
            "log_probs": log_probs, "vocab": vocab, "stride": stride,
            "inverse": 1.0 if greedy else float(1.0 / torch.tensor(temperature, dtype=torch.float32)),
            "top_k": top_k if top_k < vocab else 0, "top_p": top_p_high, "top_p_rest": top_p - top_p_high,
            "min_p": _float_from_above(min_p), "seed": seed,
            "GREEDY": greedy, "TOP_K": 0 < top_k < vocab, "TOP_P": top_p < 1.0, "CHUNK": VOCAB_CHUNK,
        },
        Config(num_warps=8, num_stages=1, fp_fusion=False),  # as the log-probs of token_logprobs
    )  # fmt: skip
    raise_for_bad_rows(tokens, temperature)
    return tokens, log_probs

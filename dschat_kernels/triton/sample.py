"""One token a row from logits; the rule is in dschat_kernels/ops/sample.py, the random numbers are those of the CPU.

The vocabulary is cut among programs, so that a few rows fill a GPU. Thresholds are found over the order-preserving
integer code of z, four bits a pass: the k-th largest z by counting, the last token of top_p by weighing, so nothing is
sorted and any vocabulary fits. A pass measures its part of a row beyond each of 16 cuts; the next one adds up the parts
and takes the sixteenth that the target falls in. A draw spends its number on the chunks of 1024 first, then inside one.
Weights are float32 and their sums float64, as on the CPU; every sum has an order that only the vocabulary decides.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from dschat_kernels.ops.sample import raise_for_bad_rows
from dschat_kernels.triton._launch import Config, as_rows, launch
from dschat_kernels.triton._logsumexp import CHUNK_BLOCK, VOCAB_CHUNK, RowSums, chunk_of, row_sums

PART = 4096
"""Entries of the vocabulary that one program measures in a pass."""


@triton.jit
def _code(z):
    """Integers from 0 below 2^32 in the order of z; both zeros have one."""
    bits = (z + 0.0).to(tl.int32, bitcast=True)
    flipped = tl.where(bits < 0, ~bits, bits ^ (-2147483648))
    return flipped.to(tl.uint32, bitcast=True).to(tl.int64)


@triton.jit
def _value(code):
    """The z of a code."""
    bits = code.to(tl.uint32).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ (-2147483648), ~bits).to(tl.float32, bitcast=True)


@triton.jit
def _settled(measures, parts, code, beyond, target, shift):
    """Of an interval of 16 << shift codes from `code` and the measure beyond it, the same of the sixteenth that the
    target falls in; and what is measured from `code` on."""
    step = tl.arange(0, 16)
    some = tl.arange(0, 64)
    sums = tl.zeros([64, 16], tl.float64)
    for start in range(0, parts, 64):
        part = (start + some)[:, None]
        sums += tl.load(measures + part * 16 + step[None, :], mask=part < parts, other=0.0)
    above = tl.sum(sums, 0) + beyond
    # The measure falls with the cut: the last that suffices, the first where rounding leaves none.
    digit = tl.max(tl.where((above >= target) | (step == 0), step, 0), 0)
    rest = tl.sum(tl.where(step == digit + 1, above, 0.0), 0)
    whole = tl.sum(tl.where(step == 0, above, 0.0), 0)
    return code + (digit.to(tl.int64) << shift), tl.where(digit == 15, beyond, rest), whole


@triton.jit
def _first_target(whole, top_k, top_p, top_p_rest, WEIGH: tl.constexpr):
    """What the entries that stay must measure at least, of `whole`; the first one stays."""
    if WEIGH:
        share = tl.full([], 0.0, tl.float64) + top_p + top_p_rest
        target = tl.maximum(share * whole, 2.2250738585072014e-308)
    else:
        target = top_k.to(tl.float64)
    return target


@triton.jit(do_not_specialize=["top_k", "shift"])
def _narrow(
    logits, row_m, lows, measures, codes, beyonds, targets, out, codes_out, beyonds_out, targets_out, vocab, stride,
    parts, inverse, top_k, top_p, top_p_rest, shift,
    WEIGH: tl.constexpr, SECOND: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A pass over one part of one row. It settles the pass before, whose `measures` and interval (`codes`, `beyonds`,
    `targets`) it gets, and measures the entries of the interval from each of its 16 cuts on, which are 1 << shift
    apart: their number, or their weight where their code is at least that in `lows`."""
    at = tl.program_id(0)
    row, part = (at // parts).to(tl.int64), at % parts
    code = tl.full([], 0, tl.int64)
    if measures is not None:
        beyond = tl.full([], 0.0, tl.float64)
        target = tl.full([], float("-inf"), tl.float64)
        if not SECOND:
            code += tl.load(codes + row)
            beyond += tl.load(beyonds + row)
            target = tl.load(targets + row)
        before = measures + row * parts * 16
        if SECOND:  # the first pass has measured all
            _found, _past, whole = _settled(before, parts, code, beyond, target, shift + 4)
            target = _first_target(whole, top_k, top_p, top_p_rest, WEIGH)
        code, beyond, _whole = _settled(before, parts, code, beyond, target, shift + 4)
        if part == 0:
            tl.store(codes_out + row, code)
            tl.store(beyonds_out + row, beyond)
            tl.store(targets_out + row, target)
    low = tl.full([], 0, tl.int64)
    if lows is not None:
        low += tl.load(lows + row)
    m = 0.0
    if WEIGH:
        m = tl.load(row_m + row)
    logits += row * stride
    step = tl.arange(0, 16)
    sums = tl.zeros([16, BLOCK], tl.float64 if WEIGH else tl.int32)
    for start in range(part * PART, tl.minimum(part * PART + PART, vocab), BLOCK):
        z = chunk_of(logits, start, vocab, inverse, None, BLOCK)
        index = start + tl.arange(0, BLOCK)
        this = _code(z)
        place = (this - code) >> shift
        inside = (index < vocab) & (place >= 0) & (place < 16) & (this >= low)
        digit = tl.where(inside, place, -1).to(tl.int32)
        if tl.max(inside.to(tl.int32), 0) > 0:
            size = tl.exp(z - m).to(tl.float64) if WEIGH else tl.full([BLOCK], 1, tl.int32)
            sums += tl.where(digit[None, :] >= step[:, None], size[None, :], 0)
    tl.store(out + at.to(tl.int64) * 16 + step, tl.sum(sums, 1).to(tl.float64))


@triton.jit
def _threshold(measures, codes, beyonds, targets, row_m, low, ties, parts, WEIGH: tl.constexpr):
    """Settles the last pass: the largest code such that the entries from it on measure the target; and how many of the
    entries with just this code stay, those of the lowest index: with WEIGH as many as the target asks for."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    code, beyond, _whole = _settled(
        measures + row * parts * 16, parts, tl.load(codes + row), tl.load(beyonds + row), target, 0
    )
    tl.store(low + row, code)
    if WEIGH:
        one = tl.exp(_value(code) - tl.load(row_m + row)).to(tl.float64)
        count = tl.ceil((target - beyond) / tl.maximum(one, 1e-300))
        tl.store(ties + row, tl.minimum(tl.maximum(count, 1.0), 2147483647.0).to(tl.int32))


@triton.jit
def _chunk_masses(
    logits, row_m, low, masses, counts, vocab, stride, chunks, inverse, min_p, CHUNK: tl.constexpr
):  # fmt: skip
    """The weight of a chunk's entries with a code beyond that in `low` and at least min_p, and the number of those with
    just that code."""
    at = tl.program_id(0)
    row, chunk = (at // chunks).to(tl.int64), at % chunks
    z = chunk_of(logits + row * stride, chunk * CHUNK, vocab, inverse, None, CHUNK)
    there = chunk * CHUNK + tl.arange(0, CHUNK) < vocab
    code, least = _code(z), tl.load(low + row)
    w = tl.exp(z - tl.load(row_m + row))
    tl.store(masses + at, tl.sum(tl.where((code > least) & (w >= min_p), w, 0.0).to(tl.float64), 0))
    tl.store(counts + at, tl.sum((there & (code == least)).to(tl.int32), 0))


@triton.jit
def _masses(at, there, before, m, chunk_m, chunk_l, masses, counts, low, ties, min_p):
    """Weights of some chunks of a row, and the entries with the last code up to each: `before` them, and in them."""
    if masses is None:
        scale = tl.exp(tl.load(chunk_m + at, mask=there, other=float("-inf")) - m)
        mass = tl.load(chunk_l + at, mask=there, other=0.0).to(tl.float64) * scale.to(tl.float64)
        ranks = tl.zeros(at.shape, tl.int32)
    else:
        n = tl.load(counts + at, mask=there, other=0)
        ranks = before + tl.cumsum(n, 0)
        one = tl.exp(_value(low) - m)
        stay = tl.minimum(n, tl.maximum(ties - (ranks - n), 0))
        mass = tl.load(masses + at, mask=there, other=0.0)
        mass += stay.to(tl.float64) * tl.where(one >= min_p, one, 0.0).to(tl.float64)
    return mass, ranks


@triton.jit(do_not_specialize=["seed"])
def _draw(
    logits, streams, positions, tokens, log_probs, row_m, row_l, chunk_m, chunk_l, masses, counts, lows, ties_in, vocab,
    stride, chunks, inverse, min_p, seed, GREEDY: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The token of a row, and its log-prob. `masses` None: nothing is filtered."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    first = row * chunks
    at = tl.arange(0, BLOCK)
    m = tl.load(row_m + row)
    l = tl.load(row_l + row)
    token = tl.full([], 0, tl.int64)
    if (l != l) | (m == float("inf")):
        token -= 1
    elif l == 0.0:
        token -= 2
    elif GREEDY:
        chunk = chunks
        for start in range(0, chunks, BLOCK):
            top = tl.load(chunk_m + first + start + at, mask=start + at < chunks, other=float("-inf"))
            chunk = tl.minimum(chunk, tl.min(tl.where(top == m, start + at, chunks), 0))
        z = chunk_of(logits, chunk * CHUNK, vocab, inverse, None, CHUNK)
        index = chunk * CHUNK + tl.arange(0, CHUNK)
        token += tl.min(tl.where(z == m, index, vocab), 0)
    else:
        low = tl.full([], 0, tl.int64)
        ties = 2147483647
        if masses is not None:
            low += tl.load(lows + row)
            if ties_in is not None:
                ties = tl.load(ties_in + row)
        whole = tl.full([], 0.0, tl.float64)
        ranked = tl.full([], 0, tl.int32)
        for start in range(0, chunks, BLOCK):
            mass, ranks = _masses(
                first + start + at,
                start + at < chunks,
                ranked,
                m,
                chunk_m,
                chunk_l,
                masses,
                counts,
                low,
                ties,
                min_p,
            )
            whole += tl.max(tl.cumsum(mass, 0), 0)
            ranked = tl.max(ranks, 0)
        target = _uniform(seed, tl.load(streams + row), tl.load(positions + row)) * whole
        # The first chunk whose running weight exceeds the target. Rounding may leave the target at the very end: then
        # the last one with weight.
        found = tl.full([], 0, tl.int1)
        chosen = tl.full([], 0, tl.int32)
        share = tl.full([], 1.0, tl.float64)
        left = ties  # entries of the last code that stay, from this chunk on
        reached = tl.full([], 0.0, tl.float64)
        ranked = tl.full([], 0, tl.int32)
        for start in range(0, chunks, BLOCK):
            mass, ranks = _masses(
                first + start + at,
                start + at < chunks,
                ranked,
                m,
                chunk_m,
                chunk_l,
                masses,
                counts,
                low,
                ties,
                min_p,
            )
            running = reached + tl.cumsum(mass, 0)
            hit = tl.min(tl.where((running > target) & (mass > 0.0), at, BLOCK), 0)
            last = tl.max(tl.where(mass > 0.0, at, -1), 0)
            here = tl.where(hit < BLOCK, hit, last)
            if (not found) & (here >= 0):
                found = hit < BLOCK
                chosen = start + here
                size = tl.sum(tl.where(at == here, mass, 0.0), 0)
                before = tl.sum(tl.where(at == here, running, 0.0), 0) - size
                share = (target - before) / size
                if masses is not None:
                    n = tl.load(counts + first + chosen)
                    left = ties - (tl.sum(tl.where(at == here, ranks, 0), 0) - n)
            reached = tl.max(running, 0)
            ranked = tl.max(ranks, 0)
        z = chunk_of(logits, chosen * CHUNK, vocab, inverse, None, CHUNK)
        index = chosen * CHUNK + tl.arange(0, CHUNK)
        if masses is None:
            w = tl.exp(z - tl.load(chunk_m + first + chosen))
        else:
            code = _code(z)
            rank = tl.cumsum(((index < vocab) & (code == low)).to(tl.int32), 0)
            w = tl.exp(z - m)
            w = tl.where(((code > low) | ((code == low) & (rank <= left))) & (w >= min_p), w, 0.0)
        running = tl.cumsum(w.to(tl.float64), 0)
        hit = tl.min(tl.where((running > share * tl.max(running, 0)) & (w > 0.0), index, vocab), 0)
        heaviest = tl.max(tl.where(w > 0.0, index, 0), 0)
        token += tl.where(hit < vocab, hit, heaviest)
    z = tl.load(logits + tl.maximum(token, 0)).to(tl.float32) * inverse
    tl.store(tokens + row, token)
    tl.store(log_probs + row, tl.where(token < 0, float("nan"), z - (m + tl.log(l))))


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


def _float_from_above(value: float) -> float:
    """The smallest float32 not below value, so that a float32 weight compares as it would in float64."""
    rounded = torch.tensor(value, dtype=torch.float32, device="cpu")
    if float(rounded) < value:
        rounded = torch.nextafter(rounded, torch.tensor(math.inf, device="cpu"))
    return float(rounded)


def _search(
    logits: Tensor,
    stride: int,
    inverse: float,
    m: Tensor | None,
    lows: Tensor | None,
    top_k: int,
    top_p: float,
) -> tuple[Tensor, Tensor | None]:
    """(lowest code that stays, how many entries of this code stay; None: all) of every row: for the top_k largest z,
    or, with m, for top_p of the weight of the entries whose code is at least that in `lows`."""
    (rows, vocab), device = logits.shape, logits.device
    parts = -(-vocab // PART)
    top_p_high = float(torch.tensor(top_p, dtype=torch.float32, device="cpu"))
    measures = torch.empty(2, rows, parts, 16, dtype=torch.float64, device=device)
    codes = torch.empty(2, rows, dtype=torch.int64, device=device)
    beyonds, targets = (torch.empty(2, rows, dtype=torch.float64, device=device) for _ in range(2))
    weigh = m is not None
    for number in range(8):
        this, before = number % 2, 1 - number % 2
        launch(
            _narrow, (rows * parts,),
            {
                "logits": logits, "row_m": m, "lows": lows, "measures": measures[before] if number else None,
                "codes": codes[before], "beyonds": beyonds[before], "targets": targets[before], "out": measures[this],
                "codes_out": codes[this], "beyonds_out": beyonds[this], "targets_out": targets[this], "vocab": vocab,
                "stride": stride, "parts": parts, "inverse": inverse, "top_k": top_k, "top_p": top_p_high,
                "top_p_rest": top_p - top_p_high, "shift": 28 - 4 * number, "WEIGH": weigh, "SECOND": number == 1,
            },
            # Sums of 16 cuts are 4 numbers a thread: with more, compilers keep some of them in memory.
            Config({"PART": PART, "BLOCK": 128}, num_warps=16, num_stages=1, fp_fusion=False),
        )  # fmt: skip
    low = torch.empty(rows, dtype=torch.int64, device=device)
    ties = torch.empty(rows, dtype=torch.int32, device=device) if weigh else None
    launch(
        _threshold, (rows,),
        {
            "measures": measures[1], "codes": codes[1], "beyonds": beyonds[1], "targets": targets[1], "row_m": m,
            "low": low, "ties": ties, "parts": parts, "WEIGH": weigh,
        },
        Config(num_warps=4, num_stages=1, fp_fusion=False),
    )  # fmt: skip
    return low, ties


def _filtered(
    logits: Tensor, stride: int, inverse: float, sums: RowSums, top_k: int, top_p: float, min_p: float
) -> dict[str, Tensor | None]:
    """What `_draw` takes of the entries that stay."""
    (rows, vocab), chunks = logits.shape, sums.chunk_m.shape[1]
    low, ties = None, None
    if top_k:
        low, ties = _search(logits, stride, inverse, None, None, top_k, 1.0)
    if top_p < 1.0:
        low, ties = _search(logits, stride, inverse, sums.m, low, 0, top_p)
    if low is None:
        low = torch.zeros(rows, dtype=torch.int64, device=logits.device)
    masses = torch.empty(rows, chunks, dtype=torch.float64, device=logits.device)
    counts = torch.empty(rows, chunks, dtype=torch.int32, device=logits.device)
    launch(
        _chunk_masses, (rows * chunks,),
        {
            "logits": logits, "row_m": sums.m, "low": low, "masses": masses, "counts": counts, "vocab": vocab,
            "stride": stride, "chunks": chunks, "inverse": inverse, "min_p": min_p,
        },
        Config({"CHUNK": VOCAB_CHUNK}, num_warps=4, num_stages=1, fp_fusion=False),
    )  # fmt: skip
    return {"masses": masses, "counts": counts, "lows": low, "ties_in": ties}


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
    inverse = 1.0 if greedy else float(1.0 / torch.tensor(temperature, dtype=torch.float32, device="cpu"))
    top_k, min_p = top_k if top_k < vocab else 0, _float_from_above(min_p)
    sums = row_sums(rows, stride, inverse)
    kept: dict[str, Tensor | None] = dict.fromkeys(("masses", "counts", "lows", "ties_in"))
    if not greedy and (top_k or top_p < 1.0 or min_p > 0.0):
        kept = _filtered(rows, stride, inverse, sums, top_k, top_p, min_p)
    launch(
        _draw, (count,),
        {
            "logits": rows, "streams": None if streams is None else streams.contiguous(),
            "positions": None if positions is None else positions.contiguous(), "tokens": tokens,
            "log_probs": log_probs, "row_m": sums.m, "row_l": sums.l, "chunk_m": sums.chunk_m,
            "chunk_l": sums.chunk_l, **kept, "vocab": vocab, "stride": stride, "chunks": sums.chunk_m.shape[1],
            "inverse": inverse, "min_p": min_p, "seed": seed, "GREEDY": greedy,
        },
        Config({"CHUNK": VOCAB_CHUNK, "BLOCK": CHUNK_BLOCK}, num_warps=4, num_stages=1, fp_fusion=False),
    )  # fmt: skip
    raise_for_bad_rows(tokens, temperature)
    return tokens, log_probs

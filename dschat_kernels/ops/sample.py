"""One token a row from logits, with its log-probability.

    z     = logits / temperature
    kept  = all tokens
            -> top_k: z >= the k-th largest z (ties stay) -> top_p: the fewest tokens in order of falling z
            (ties: rising index) whose probability reaches top_p -> min_p: tokens at least min_p times as
            probable as the most probable one
    token = inverse distribution function of softmax(z over kept), in order of index, at
            u = Philox4x32-10(key = seed, counter = (stream, position))
    log_prob = log_softmax(z)[token], over the whole row

The filters and their order are those of HF's logits warpers. A draw is a pure function of a row's logits, the
seed, its stream and its position: the batch, the order of the rows and the number of threads cannot matter.
Temperature 0 is greedy: the largest logit, the lowest index among equals, with its log-prob at temperature 1.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. Holtzman et al., "The curious case of
neural text degeneration", 2020 (top-p), https://arxiv.org/abs/1904.09751. Nguyen et al., "Turning up the
heat: min-p sampling", 2024, https://arxiv.org/abs/2407.01082.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dschat_kernels.ops import _common
from dschat_kernels.ops._common import (
    DTYPES,
    LIBRARY,
    as_rows,
    check,
    check_device,
    check_tensor,
    implementation,
    kernels,
    ptr,
    register,
    resolve_backend,
)

_NOT_FINITE, _ALL_MASKED = -1, -2  # csrc/cpu/sample.h, in place of a token


def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 0,
    streams: Tensor | None = None,
    positions: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Tokens int64 [rows] and their log-probs float32 [rows] from logits [rows, vocab]; see the module.

    streams and positions, int64 [rows], number the random draws: give every sequence a stream of its own and
    every token of it a position. They may be None for temperature 0. top_k 0, top_p 1 and min_p 0 are off.
    Entries of -inf are never drawn. Not differentiable.

    Raises ValueError or TypeError for wrong shapes, dtypes, devices and settings, and ValueError naming the
    row where a row has a NaN or an infinite logit, or allows no token.
    """
    check_tensor("sample", "logits", logits)
    check(
        logits.dim() == 2 and 0 < logits.shape[1] < 2**31,
        f"sample: logits has shape {list(logits.shape)}; give [rows, vocab] with 0 < vocab < 2^31.",
    )
    check_draw(temperature, top_k, top_p, min_p, seed, streams, positions, logits.shape[0])
    for name, numbers in (("streams", streams), ("positions", positions)):
        if numbers is not None:
            check_device("sample", name, numbers, logits)
    logits = logits.detach()
    backend = resolve_backend("sample", backend, logits)
    if backend == "reference":
        return sample_reference(
            logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed,
            streams=streams, positions=positions,
        )  # fmt: skip
    op = implementation("sample", backend, logits, streams, positions)
    return op(logits, temperature, top_k, top_p, min_p, seed, streams, positions)


def check_draw(
    temperature: float, top_k: int, top_p: float, min_p: float, seed: int, streams: Tensor | None,
    positions: Tensor | None, rows: int,
) -> None:  # fmt: skip
    """Raises ValueError or TypeError for settings that `rows` rows cannot be sampled with."""
    # Written so that NaN fails.
    check(
        0.0 <= temperature < float("inf"),
        f"sample: temperature is {temperature}; give a number from 0 (greedy).",
    )
    check(top_k >= 0, f"sample: top_k is {top_k}; give a number of tokens, or 0 for no limit.")
    check(0.0 <= top_p <= 1.0, f"sample: top_p is {top_p}; give a probability from 0 to 1 (off).")
    check(0.0 <= min_p <= 1.0, f"sample: min_p is {min_p}; give a share from 0 (off) to 1.")
    check(0 <= seed < 2**63, f"sample: seed is {seed}; give a whole number from 0 to 2^63 - 1.")
    for name, numbers in (("streams", streams), ("positions", positions)):
        if numbers is None:
            check(
                temperature == 0.0, f"sample: {name} is None at temperature {temperature}; give int64 [rows]."
            )
            continue
        check_tensor("sample", name, numbers, floating=False)
        check(
            numbers.dtype == torch.int64,
            f"sample: {name} has dtype {numbers.dtype}; give torch.int64.",
            TypeError,
        )
        check(
            numbers.shape == (rows,),
            f"sample: {name} has shape {list(numbers.shape)}; give [{rows}], one a row of logits.",
        )


def philox_uniform(seed: int, stream: int, position: int) -> float:
    """The number in [0, 1) of a draw: 53 bits of Philox4x32-10, key = seed, counter = (stream, position)."""
    low = 0xFFFFFFFF
    key = [seed & low, seed >> 32 & low]
    word = [stream & low, stream >> 32 & low, position & low, position >> 32 & low]
    for _ in range(10):
        a, b = 0xD2511F53 * word[0], 0xCD9E8D57 * word[2]
        word = [b >> 32 ^ word[1] ^ key[0], b & low, a >> 32 ^ word[3] ^ key[1], a & low]
        key = [key[0] + 0x9E3779B9 & low, key[1] + 0xBB67AE85 & low]
    return ((word[0] >> 5 << 26) + (word[1] >> 6)) * 2.0**-53


def kept_tokens(z: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Which tokens the filters keep: bool, shaped like z [rows, vocab], the logits at the sampling
    temperature."""
    z = z.double()
    kept = torch.ones_like(z, dtype=torch.bool)
    if 0 < top_k < z.shape[1]:
        kept &= z >= z.topk(top_k, -1).values[:, -1:]
    if top_p < 1.0:
        ordered, index = z.masked_fill(~kept, float("-inf")).sort(dim=-1, descending=True, stable=True)
        probability = ordered.softmax(-1)
        stays = probability.cumsum(-1) - probability < top_p
        stays[:, 0] = True
        kept &= torch.zeros_like(kept).scatter(1, index, stays)
    if min_p > 0.0:
        kept &= (z - z.amax(-1, keepdim=True)).exp() >= min_p
    return kept


def sample_reference(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 0,
    streams: Tensor | None = None,
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The specification, in plain PyTorch: float64 but for z, which has the bits of the kernel's."""
    rows = logits.shape[0]
    if logits.dtype == torch.float64:
        z = logits / (temperature or 1.0)
    else:
        inverse = 1.0 / torch.tensor(temperature or 1.0, dtype=torch.float32, device=logits.device)
        z = (logits.float() * inverse).double()
    status = torch.zeros(rows, dtype=torch.int64, device=logits.device)
    status[(z == float("-inf")).all(-1)] = _ALL_MASKED
    status[(z.isnan() | (z == float("inf"))).any(-1)] = _NOT_FINITE
    raise_for_bad_rows(status, temperature)
    if temperature == 0.0:
        tokens = (z == z.amax(-1, keepdim=True)).long().argmax(-1)
    else:
        assert streams is not None and positions is not None
        weight = (z - z.amax(-1, keepdim=True)).exp() * kept_tokens(z, top_k, top_p, min_p)
        u = [philox_uniform(seed, s, p) for s, p in zip(streams.tolist(), positions.tolist(), strict=True)]
        running = weight.cumsum(-1)
        target = torch.tensor(u, dtype=torch.float64, device=z.device)[:, None] * running[:, -1:]
        tokens = (running <= target).sum(-1)
    log_probs = z.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    return tokens, log_probs.float()


def raise_for_bad_rows(tokens: Tensor, temperature: float) -> None:
    """Raises for a row whose token is one of the two marks above. While a graph is captured nobody can look: who
    replays it calls this on what came out."""
    if _common.is_capturing(tokens):
        return
    if not bool((tokens < 0).any()):
        return
    row = int((tokens < 0).long().argmax())
    if tokens[row] == _ALL_MASKED:
        raise ValueError(f"sample: every logit of row {row} is -inf; leave at least one token allowed.")
    raise ValueError(
        f"sample: row {row} of logits has a NaN or is infinite at temperature {temperature}; "
        "check the model's weights and the temperature."
    )


# ------------------------------------------------------------------------------------------- torch.library

LIBRARY.define(
    "sample(Tensor logits, float temperature, int top_k, float top_p, float min_p, int seed, "
    "Tensor? streams, Tensor? positions) -> (Tensor tokens, Tensor log_probs)"
)


def _forward_cpu(
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
    streams = None if streams is None else streams.contiguous()
    positions = None if positions is None else positions.contiguous()
    tokens = torch.empty(rows.shape[0], dtype=torch.int64, device=rows.device)
    log_probs = torch.empty(rows.shape[0], dtype=torch.float32, device=rows.device)
    kernels().sample(
        DTYPES[logits.dtype], ptr(rows), rows.shape[0], rows.shape[1], stride, temperature, top_k, top_p,
        min_p, seed, ptr(streams), ptr(positions), ptr(tokens), ptr(log_probs),
    )  # fmt: skip
    raise_for_bad_rows(tokens, temperature)
    return tokens, log_probs


def _forward_fake(
    logits: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    seed: int,
    streams: Tensor | None,
    positions: Tensor | None,
) -> tuple[Tensor, Tensor]:
    rows = logits.shape[0]
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    return tokens, torch.empty(rows, dtype=torch.float32, device=logits.device)


register("sample", _forward_cpu, _forward_fake)

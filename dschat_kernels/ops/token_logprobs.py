"""Log-probabilities, entropies and gaps of given tokens from hidden states and the head, without a [T, V] tensor.

    logit = hidden . weight_v + bias_v                       float32, summed over the hidden size in order
    logit = softcap * tanh(logit / softcap)                  where logit_softcap is given (Gemma 2)
    z     = logit * (1 / temperature)
    logprob[t] = z[target_t] - logsumexp(z)         entropy[t] = logsumexp(z) - sum_v softmax(z)_v z_v
    gap[t]     = max_v z_v - z[target_t]

A gap costs nothing: the logsumexp has the largest z. It is the difference of two of a row's float32 z, so that it is
0 where the target has the largest z or ties with it (an argmax takes the first of a tie) and nowhere else. The
difference of two log-probs would not do: taking the logsumexp from neighbours rounds them to one number.

The cpu backend walks over the vocabulary in chunks of 1024 and folds them by the rule of
csrc/cpu/logsumexp.h; its logits have the bits of `linear` and its log-probabilities those of `sample`, so
that the ratio of a rollout to its recomputation is exactly one. The backward recomputes logits block by
block; a block's gradient is rounded to the dtype of the weight before its products, whose sums are float32 and
are rounded once at the end. (Where the gradient of a bias is wanted, all of it is float32 on the CPU; on cuda that
gradient is summed before anything is rounded.) So beside the gradients a backward takes the gradient of 2048 logits a
row, on cuda twice where the head is trained too, and float32 sums of the gradient by hidden states.

Where the hidden states alone have a gradient (a frozen head), the forward leaves d logprob / d hidden, summed
in float32 while a chunk's logits are there (csrc/cpu/token_logprobs_gradient.h), and the backward scales its
rows: two products with the head instead of three. A gradient of the entropies still recomputes the logits.

Fused linear cross-entropy: Hsu et al., "Liger Kernel", 2024, https://arxiv.org/abs/2410.10989
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from dschat_kernels.ops._common import (
    DTYPES,
    LIBRARY,
    as_rows,
    check,
    check_device,
    check_tensor,
    implementation,
    kernels,
    no_tensor,
    ptr,
    register,
    resolve_backend,
    row_scratch,
    runs_on_cuda,
    widen,
)
from dschat_kernels.packing import PANEL

BLOCK = 2048
"""Entries of the vocabulary whose logits' gradients exist at a time, for all rows, in the backward of C++ and CUDA; a
multiple of 32, or a row's sums would depend on it."""


@overload
def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = ...,
    bias: Tensor | None = ...,
    logit_softcap: float | None = ...,
    return_entropy: Literal[False] = ...,
    return_gap: Literal[False] = ...,
    backend: str | None = ...,
) -> Tensor: ...
@overload
def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = ...,
    bias: Tensor | None = ...,
    logit_softcap: float | None = ...,
    return_entropy: Literal[True],
    return_gap: Literal[False] = ...,
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...
@overload
def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = ...,
    bias: Tensor | None = ...,
    logit_softcap: float | None = ...,
    return_entropy: bool,
    return_gap: Literal[False] = ...,
    backend: str | None = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...
@overload
def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = ...,
    bias: Tensor | None = ...,
    logit_softcap: float | None = ...,
    return_entropy: bool = ...,
    return_gap: bool,
    backend: str | None = ...,
) -> Tensor | tuple[Tensor, ...]: ...


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    logit_softcap: float | None = None,
    return_entropy: bool = False,
    return_gap: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Log-probability of targets [T] under the head weight [V, H] (bias [V]) at hidden [T, H]. -> float32 [T]

    With return_entropy also the entropy of every row's distribution, float32 [T], and with return_gap last how far
    every target is below the likeliest token, float32 [T]: 0 exactly where no token is likelier, NaN where the
    log-prob is. (float64 in: float64 out, by the reference.) Differentiable in hidden, weight and bias, but for the
    gaps. weight has the dtype of hidden.

    Raises ValueError or TypeError for wrong shapes, dtypes and devices, a target outside 0 .. V - 1, and a
    temperature that is not positive.
    """
    op = "token_logprobs"
    check_tensor(op, "hidden", hidden)
    check_tensor(op, "weight", weight)
    check(
        hidden.dim() == 2
        and weight.dim() == 2
        and hidden.shape[1] == weight.shape[1] > 0
        and weight.shape[0] > 0,
        f"{op}: hidden has shape {list(hidden.shape)} and weight {list(weight.shape)}; give [T, H] and [V, "
        f"H].",
    )
    check(
        hidden.dtype == weight.dtype,
        f"{op}: hidden is {hidden.dtype} and weight is {weight.dtype}; give one dtype.",
        TypeError,
    )
    check_device(op, "weight", weight, hidden)
    check_tensor(op, "targets", targets, floating=False)
    check(
        targets.dtype in (torch.int32, torch.int64),
        f"{op}: targets has dtype {targets.dtype}; give int64.",
        TypeError,
    )
    check(
        targets.shape == hidden.shape[:1],
        f"{op}: targets has shape {list(targets.shape)}; give [{hidden.shape[0]}], one token a row of "
        f"hidden.",
    )
    check_device(op, "targets", targets, hidden)
    if bias is not None:
        check_tensor(op, "bias", bias)
        check(
            bias.shape == weight.shape[:1],
            f"{op}: bias has shape {list(bias.shape)}; give [{weight.shape[0]}], one number a row of weight.",
        )
        check_device(op, "bias", bias, hidden)
    check(
        0.0 < temperature < float("inf"),
        f"{op}: temperature is {temperature}; give a positive number (greedy log-probabilities are those at "
        f"1).",
    )
    check(
        logit_softcap is None or 0.0 < logit_softcap < float("inf"),
        f"{op}: logit_softcap is {logit_softcap}; give a positive number or None.",
    )
    if targets.numel():
        low, high = int(targets.min()), int(targets.max())
        check(
            low >= 0 and high < weight.shape[0],
            f"{op}: target {low if low < 0 else high} is outside the vocabulary of {weight.shape[0]}; mask "
            f"padding out "
            "before the call.",
        )
    backend = resolve_backend(op, backend, hidden, weight)
    if backend == "reference":
        return token_logprobs_reference(
            hidden,
            weight,
            targets,
            temperature=temperature,
            bias=bias,
            logit_softcap=logit_softcap,
            return_entropy=return_entropy,
            return_gap=return_gap,
        )
    name = "token_logprobs"
    if backend == "cpu" and _only_hidden_has_gradient(hidden, weight, bias):
        name = "token_logprobs_gradient"
    call = implementation(name, backend, hidden, weight, bias)
    logprob, _, entropy, gap, *_ = call(
        hidden, weight, targets, bias, float(temperature), logit_softcap, return_entropy
    )
    return _one_or_all([logprob] + [entropy] * return_entropy + [gap] * return_gap)


def _one_or_all(found: list[Tensor]) -> Tensor | tuple[Tensor, ...]:
    return tuple(found) if len(found) > 1 else found[0]


def _only_hidden_has_gradient(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    trained = weight.requires_grad or (bias is not None and bias.requires_grad)
    return torch.is_grad_enabled() and hidden.requires_grad and not trained


def token_logprobs_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    logit_softcap: float | None = None,
    return_entropy: bool = False,
    return_gap: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """The specification, in plain PyTorch (with a [T, V] tensor)."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    logits = hidden.to(wide) @ weight.to(wide).t()
    if bias is not None:
        logits = logits + bias.to(wide)
    if logit_softcap:
        logits = logit_softcap * torch.tanh(logits / logit_softcap)
    z, at = logits / temperature, targets.long()[:, None]
    log_p = z.log_softmax(-1)
    found = [log_p.gather(1, at)[:, 0]]
    if return_entropy:
        found.append(-(log_p.exp() * log_p).sum(-1))
    if return_gap:
        gap = z.detach().amax(-1) - z.detach().gather(1, at)[:, 0]
        found.append(gap.masked_fill(found[0].isnan(), float("nan")))
    return _one_or_all(found)


# --------------------------------------------------------------------------------------- torch.library

LIBRARY.define(
    "token_logprobs(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, float temperature, "
    "float? logit_softcap, bool with_entropy) -> (Tensor logprob, Tensor lse, Tensor entropy, Tensor gap)"
)
LIBRARY.define(
    "token_logprobs_gradient(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, float temperature, "
    "float? logit_softcap, bool with_entropy) -> (Tensor logprob, Tensor lse, Tensor entropy, Tensor gap, "
    "Tensor gradient)"
)
LIBRARY.define(
    "token_logprobs_backward(Tensor dlogprob, Tensor? dentropy, Tensor hidden, Tensor weight, Tensor "
    "targets, "
    "Tensor? bias, Tensor lse, Tensor entropy, float temperature, float? logit_softcap, bool[3] wanted) "
    "-> (Tensor dhidden, Tensor dweight, Tensor dbias)"
)


def _forward_cpu(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float,
    logit_softcap: float | None,
    with_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, stride = as_rows(hidden)
    weight, targets = weight.contiguous(), targets.to(torch.int64).contiguous()
    bias = None if bias is None else bias.to(torch.float32).contiguous()
    tokens, size = hidden.shape
    logprob, lse, entropy, gap = _forward_fake(
        hidden, weight, targets, bias, temperature, logit_softcap, with_entropy
    )
    last = gap
    if runs_on_cuda():  # scratch: three numbers a row and chunk of the vocabulary, and then the gaps
        chunks = -(-weight.shape[0] // kernels().vocab_chunk)
        last = torch.empty(tokens * (3 * chunks + 1), dtype=torch.float32, device=hidden.device)
    kernels().token_logprobs(
        DTYPES[hidden.dtype], ptr(rows), stride, ptr(weight), ptr(bias), ptr(targets), tokens, size,
        weight.shape[0], temperature, logit_softcap or 0.0, ptr(logprob), ptr(lse), ptr(entropy) if
        with_entropy else 0, ptr(last),
    )  # fmt: skip
    if last is not gap:
        gap.copy_(last[len(last) - tokens :])
    return logprob, lse, entropy, gap


def _forward_fake(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float,
    logit_softcap: float | None,
    with_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens = hidden.shape[0]
    logprob, lse, entropy, gap = (
        torch.empty(n, dtype=torch.float32, device=hidden.device)
        for n in (tokens, tokens, tokens if with_entropy else 0, tokens)
    )
    return logprob, lse, entropy, gap


def _gradient_cpu(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float,
    logit_softcap: float | None,
    with_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`_forward_cpu`, and d logprob / d hidden, float32 [T, H]: csrc/cpu/token_logprobs_gradient.h."""
    rows, stride = as_rows(hidden)
    weight, targets = weight.contiguous(), targets.to(torch.int64).contiguous()
    bias = widen(bias)
    tokens, size = hidden.shape
    logprob, lse, entropy, gap, gradient = _gradient_fake(
        hidden, weight, targets, bias, temperature, logit_softcap, with_entropy
    )
    dtype = DTYPES[hidden.dtype]
    panels = torch.empty(
        kernels().token_logprobs_gradient_panels(dtype, size), dtype=hidden.dtype, device=hidden.device
    )
    kernels().token_logprobs_gradient(
        dtype, ptr(rows), stride, ptr(weight), ptr(bias), ptr(targets), tokens, size, weight.shape[0], temperature,
        logit_softcap or 0.0, ptr(logprob), ptr(lse), ptr(entropy) if with_entropy else 0, ptr(gap),
        ptr(gradient), ptr(panels),
    )  # fmt: skip
    return logprob, lse, entropy, gap, gradient


def _gradient_fake(hidden: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return *_forward_fake(hidden, *others), torch.empty(
        hidden.shape, dtype=torch.float32, device=hidden.device
    )


def _backward_cpu(
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
    """Block by block by csrc/cpu/token_logprobs_backward.h."""
    if runs_on_cuda():
        return _backward_cuda(
            dlogprob,
            dentropy,
            hidden,
            weight,
            targets,
            bias,
            lse,
            entropy,
            temperature,
            logit_softcap,
            wanted,
        )
    (tokens, size), vocab = hidden.shape, weight.shape[0]
    want_bias = wanted[2] and bias is not None
    # A bias is float32, and its gradient a sum over all rows: rounded terms would not do.
    compute = torch.float32 if want_bias else hidden.dtype
    h, stride = as_rows(hidden.detach().to(compute))
    w = weight.detach().to(compute).contiguous()
    targets = targets.to(torch.int64).contiguous()
    offsets, d_logprob, d_entropy = widen(bias), widen(dlogprob), widen(dentropy)
    dh = torch.zeros(tokens, size, dtype=torch.float32, device=h.device) if wanted[0] else None
    dw = torch.empty_like(w) if wanted[1] else None
    db = torch.empty(vocab, dtype=torch.float32, device=h.device) if want_bias else None
    module, dtype = kernels(), DTYPES[compute]
    block = min(BLOCK, vocab)
    panels = torch.empty(
        module.token_logprobs_backward_panels(dtype, size, block), dtype=compute, device=h.device
    )
    dlogits = torch.empty(tokens, -(-block // PANEL) * PANEL, dtype=compute, device=h.device)
    for first in range(0, vocab, block):
        count = min(block, vocab - first)
        rows = slice(first, first + count)
        module.token_logprobs_backward(
            dtype, ptr(h), stride, ptr(w[rows]), 0 if offsets is None else ptr(offsets[rows]), ptr(targets), tokens,
            size, first, count, ptr(d_logprob), ptr(d_entropy), ptr(lse), ptr(entropy), temperature,
            logit_softcap or 0.0, ptr(dlogits), dlogits.shape[1], ptr(dh), ptr(panels),
        )  # fmt: skip
        if dw is not None:
            torch.mm(dlogits[:, :count].t(), h, out=dw[rows])
        if db is not None:
            db[rows] = dlogits[:, :count].sum(0)
    return (
        no_tensor(hidden) if dh is None else dh.to(hidden.dtype),
        no_tensor(weight) if dw is None else dw.to(weight.dtype),
        no_tensor(weight) if db is None or bias is None else db.to(bias.dtype),
    )


def _backward_cuda(
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
    """By csrc/cuda/token_logprobs_backward.cu, which goes over the vocabulary in blocks by itself."""
    (tokens, size), vocab = hidden.shape, weight.shape[0]
    h, stride = as_rows(hidden.detach())
    w, targets, offsets = weight.detach().contiguous(), targets.to(torch.int64).contiguous(), widen(bias)
    d_logprob, d_entropy = widen(dlogprob), widen(dentropy)
    assert d_logprob is not None
    half = hidden.dtype == torch.float16
    scales = _float16_scales(d_logprob, d_entropy, temperature) if half else None
    dh = torch.empty(tokens, size, dtype=hidden.dtype, device=h.device) if wanted[0] else None
    dw = torch.empty(vocab, size, dtype=hidden.dtype, device=h.device) if wanted[1] else None
    db = torch.empty(vocab, dtype=torch.float32, device=h.device) if wanted[2] and bias is not None else None
    block, module = min(BLOCK, vocab), kernels()
    dlogits = torch.empty(tokens, -(-block // 8) * 8, dtype=hidden.dtype, device=h.device)
    transposed, sums = None, None
    if dw is not None:
        transposed = torch.empty(block, -(-tokens // 8) * 8, dtype=hidden.dtype, device=h.device)
    if dh is not None and block < vocab:
        sums = torch.empty(tokens, size, dtype=torch.float32, device=h.device)
    partial = None if db is None else row_scratch(module, h, tokens, block, 1)
    module.token_logprobs_backward(
        DTYPES[hidden.dtype], ptr(h), stride, ptr(w), ptr(offsets), ptr(targets), tokens, size, vocab, ptr(d_logprob),
        ptr(d_entropy), ptr(lse), ptr(entropy), temperature, logit_softcap or 0.0, ptr(scales), block, ptr(dlogits),
        ptr(transposed), ptr(sums), ptr(partial), ptr(dh), ptr(dw), ptr(db),
    )  # fmt: skip
    return (
        no_tensor(hidden) if dh is None else dh,
        no_tensor(weight) if dw is None else dw,
        no_tensor(weight) if db is None or bias is None else db.to(bias.dtype),
    )


def _float16_scales(d_logprob: Tensor, d_entropy: Tensor | None, temperature: float) -> Tensor:
    """Powers of two by which float16 holds the gradients of logits, which are as small as a probability: one for each
    row, by which its largest comes near 2^10, and the one for all rows."""
    largest = d_logprob.abs()
    if d_entropy is not None:  # p (log p + entropy) is below the log of the vocabulary
        largest = largest + 16.0 * d_entropy.abs()
    exponents = 10 - torch.frexp(largest / temperature)[1].clamp(-100, 100)
    if len(exponents):
        exponents = torch.cat([exponents, exponents.amin()[None]])
    return (exponents.to(torch.int32) + 127 << 23).view(torch.float32)  # the bits of 2^exponent


def _backward_fake(
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
    return (
        hidden.new_empty(hidden.shape) if wanted[0] else no_tensor(hidden),
        weight.new_empty(weight.shape) if wanted[1] else no_tensor(weight),
        bias.new_empty(bias.shape) if wanted[2] and bias is not None else no_tensor(weight),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    hidden, weight, targets, bias, ctx.temperature, ctx.logit_softcap, ctx.with_entropy = inputs
    _, lse, entropy, gap = output
    ctx.mark_non_differentiable(lse, gap)
    ctx.save_for_backward(hidden, weight, targets, bias, lse, entropy)


def _grad(ctx: Any, dlogprob: Tensor, _: Tensor, dentropy: Tensor, __: Tensor) -> tuple[Tensor | None, ...]:
    hidden, weight, targets, bias, lse, entropy = ctx.saved_tensors
    wanted = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3]]
    grads = ctx.ops.token_logprobs_backward(
        dlogprob,
        dentropy if ctx.with_entropy else None,
        hidden,
        weight,
        targets,
        bias,
        lse,
        entropy,
        ctx.temperature,
        ctx.logit_softcap,
        wanted,
    )
    dh, dw, db = (grad if want else None for grad, want in zip(grads, wanted, strict=True))
    return dh, dw, None, db, None, None, None


def _save_gradient(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
) -> None:
    hidden, weight, targets, bias, ctx.temperature, ctx.logit_softcap, with_entropy = inputs
    _, lse, entropy, gap, gradient = output
    ctx.mark_non_differentiable(lse, gap, gradient)
    ctx.set_materialize_grads(False)  # None, not zeros, for entropies that are only looked at
    ctx.dtype = hidden.dtype
    again = (hidden, weight, targets, bias, lse, entropy) if with_entropy else ()
    ctx.save_for_backward(gradient, *again)


def _scale_gradient(
    ctx: Any, dlogprob: Tensor | None, _: Any, dentropy: Tensor | None, *__: Any
) -> tuple[Tensor | None, ...]:
    gradient, *again = ctx.saved_tensors
    if dentropy is not None and again:
        dlogprob = torch.zeros_like(dentropy) if dlogprob is None else dlogprob
        dh: Tensor | None = ctx.ops.token_logprobs_backward(
            dlogprob, dentropy, *again, ctx.temperature, ctx.logit_softcap, [True, False, False]
        )[0]
    else:
        dh = None if dlogprob is None else (dlogprob[:, None] * gradient).to(ctx.dtype)
    return dh, None, None, None, None, None, None


register("token_logprobs", _forward_cpu, _forward_fake, _save, _grad)
register("token_logprobs_gradient", _gradient_cpu, _gradient_fake, _save_gradient, _scale_gradient)
register("token_logprobs_backward", _backward_cpu, _backward_fake)

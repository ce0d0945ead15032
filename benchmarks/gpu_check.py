"""One command for the owner of a GPU: build, test, measure, and one report to send back (`make gpu-check`).

    python -m benchmarks.gpu_check --output gpu-check         everything; some twenty minutes
    python -m benchmarks.gpu_check --parts build,kernels --dtypes bfloat16 --only attention      some of it
    python -m benchmarks.gpu_check --dry-run                  the same code on the CPU with tiny shapes: no GPU figure

It compiles csrc/cuda, runs the tests marked `gpu`, compares every kernel with float64 and times it against PyTorch
eager, torch.compile and the peers that are installed, generates against Hugging Face, whose own `generate` is patched
too, and writes report.json and report.md. A kernel's time is the median of launches between CUDA events, the L2 cache
overwritten before each; its bytes are the least that the op must move, its share is of the bandwidth or the matrix rate
that this run measured. What fails is written down with its error and does not stop the rest; the exit status says
whether all was well. Both files are written anew after every row, so a run that is cut short has reported what it did.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import math
import platform
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dschat_kernels as dk
from benchmarks import gpu_sources
from dschat_kernels.cache import PagedKVCache
from dschat_kernels.ops._common import capturing, implementation
from dschat_kernels.ops.lora_linear import low_rank_grads
from dschat_kernels.ops.rope_append import rope_append_reference
from dschat_kernels.packing import PackedLinear

ROOT = Path(__file__).resolve().parents[1]
PEERS = ("flash-attn", "liger-kernel", "flashinfer-python", "vllm", "deepspeed")
UNCHECKED = ("cuda", "triton")
"""Backends on which ops over the cache are called as the engine calls them, without checks that wait for the GPU."""
PARTS = ("build", "tests", "kernels", "generation")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
SLACK = 2.0
"""Largest error of a kernel against float64, in multiples of PyTorch's own (plus a floor of one rounding)."""


@dataclass(frozen=True)
class Sizes:
    """Widths of a Llama of 8 B parameters; the dry run has its own."""

    hidden: int = 4096
    intermediate: int = 14336
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    vocab: int = 128256
    rows: tuple[int, ...] = (16, 4096)
    prompts: tuple[int, int] = (4, 1024)
    decode: tuple[int, int] = (32, 2048)
    repeats: int = 50


DRY = Sizes(64, 96, 4, 2, 16, 130, (3,), (2, 9), (2, 70), 2)


@dataclass(frozen=True)
class Machine:
    """Where the run happens: its device, the backends to measure and how time is taken."""

    device: torch.device
    backends: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    sizes: Sizes
    dry: bool
    compile: bool = True  # also time torch.compile, which takes seconds a case

    def times(self, work: Callable[[], Any], repeats: int) -> list[float]:
        """Seconds of each of `repeats` calls."""
        for _ in range(1 if self.dry else 5):
            work()
        return self._on_cpu(work, repeats) if self.dry else self._on_gpu(work, repeats)

    @staticmethod
    def _on_cpu(work: Callable[[], Any], repeats: int) -> list[float]:
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - start)
        return seconds

    def _on_gpu(self, work: Callable[[], Any], repeats: int) -> list[float]:
        flush = torch.empty(256 * 2**20, dtype=torch.uint8, device=self.device)  # more than any L2
        pairs = []
        for _ in range(repeats):
            flush.zero_()
            torch.cuda._sleep(2_000_000)  # about 1 ms, in which the CPU gets ahead: launches are not measured
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            end.record()
            pairs.append((start, end))
        torch.cuda.synchronize(self.device)
        return [start.elapsed_time(end) / 1e3 for start, end in pairs]


def spread(seconds: list[float]) -> dict[str, float]:
    """Median and the tenth and ninetieth percentiles, in microseconds."""
    ordered = sorted(seconds)
    last = len(ordered) - 1
    low, high = (ordered[round(q * last)] for q in (0.1, 0.9))
    return {"median_us": 1e6 * statistics.median(ordered), "low_us": 1e6 * low, "high_us": 1e6 * high}


# --------------------------------------------------------------------------------------------------- kernels


@dataclass
class Case:
    """One op at one shape. eager: the formula in PyTorch on `inputs`. ours: the op on a backend, on the same values.
    exact: whether the results are indices, which must be equal: to those of `expected`, where the formula draws by
    numbers of its own, else to the formula's. peers: libraries by name, each a maker of a call, which raises
    ImportError where the library is missing."""

    op: str
    shape: str
    inputs: list[Tensor]
    eager: Callable[..., Any]
    ours: Callable[[str], Any]
    bytes: float
    flops: float = 0.0
    exact: bool = False
    expected: Callable[[], Any] | None = None
    peers: dict[str, Callable[[], Callable[[], Any]]] = field(default_factory=dict)


def first(result: Any) -> Tensor:
    """The result that is compared: the first of several."""
    value: Tensor = result[0] if isinstance(result, tuple) else result
    return value


def cases(machine: Machine, dtype: torch.dtype) -> Iterator[Case]:
    """Every op of the package."""
    generator = torch.Generator(machine.device).manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(*shape, device=machine.device, generator=generator) * scale
        return values.to(dtype)

    for rows in machine.sizes.rows:
        yield from row_cases(machine.sizes, rows, normal, dtype)
        yield from matrix_cases(machine, rows, normal, dtype)
    yield from cache_cases(machine, normal, dtype)
    yield from head_cases(machine, normal, dtype)


def row_cases(s: Sizes, rows: int, normal: Any, dtype: torch.dtype) -> Iterator[Case]:
    size = dtype.itemsize
    x, residual, weight, bias = (
        normal(rows, s.hidden), normal(rows, s.hidden), normal(s.hidden), normal(s.hidden)
    )  # fmt: skip
    shape, activations = f"{rows}x{s.hidden}", rows * s.hidden * size

    def rms(x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], weight, 1e-5)

    yield Case(
        "rms_norm", shape, [x, weight], rms, lambda b: dk.rms_norm(x, weight, 1e-5, backend=b), 2 * activations,
        peers={
            "liger-kernel": lambda: liger("LigerRMSNormFunction", x, weight, 1e-5),
            "flashinfer-python": lambda: flashinfer("rmsnorm", x, weight, 1e-5),
            "vllm": lambda: vllm_rms_norm(x, weight, 1e-5),
        },
    )  # fmt: skip
    yield Case(
        "rms_norm + residual", shape, [x, residual, weight], lambda x, r, w: rms(x + r, w),
        lambda b: dk.rms_norm(x, weight, 1e-5, residual=residual, backend=b), 4 * activations,
    )  # fmt: skip
    yield Case(
        "layer_norm", shape, [x, weight, bias], lambda x, w, b: F.layer_norm(x, x.shape[-1:], w, b),
        lambda b: dk.layer_norm(x, weight, bias, backend=b), 2 * activations,
    )  # fmt: skip
    yield Case(
        "bias_act", shape, [x, bias], lambda x, b: F.gelu(x + b, approximate="tanh"),
        lambda b: dk.bias_act(x, bias, "gelu_tanh", backend=b), 2 * activations,
    )  # fmt: skip
    gate, up = normal(rows, s.intermediate), normal(rows, s.intermediate)
    yield Case(
        "gated_act", f"{rows}x{s.intermediate}", [gate, up], lambda g, u: F.silu(g) * u,
        lambda b: dk.gated_act(gate, up, "silu", backend=b), 3 * gate.numel() * size,
        peers={"liger-kernel": lambda: liger("LigerSiLUMulFunction", gate, up)},
    )  # fmt: skip

    def trained(norm: Callable[..., Any]) -> Any:
        leaves = [t.detach().requires_grad_() for t in (x, weight)]
        norm(*leaves).backward(residual.to(leaves[0].dtype))
        return leaves[0].grad

    def trained_rms(x: Tensor, weight: Tensor, dy: Tensor) -> Any:
        leaves = [t.detach().requires_grad_() for t in (x, weight)]
        rms(*leaves).backward(dy)
        return leaves[0].grad

    yield Case(
        "rms_norm forward + backward", shape, [x, weight, residual], trained_rms,
        lambda b: trained(lambda x, w: dk.rms_norm(x, w, 1e-5, backend=b)), 5 * activations,
    )  # fmt: skip


def matrix_cases(machine: Machine, rows: int, normal: Any, dtype: torch.dtype) -> Iterator[Case]:
    s, size = machine.sizes, dtype.itemsize
    x, weight = normal(rows, s.hidden), normal(s.intermediate, s.hidden, scale=s.hidden**-0.5)
    moved = (x.numel() + weight.numel() + rows * s.intermediate) * size
    flops = 2.0 * rows * weight.numel()
    packed = PackedLinear.from_weight(weight, dense=machine.backends[0] in UNCHECKED or None)
    shape = f"{rows}x{s.hidden} -> {s.intermediate}"
    yield Case(
        "linear", shape, [x, weight], F.linear, lambda b: dk.linear(x, packed, backend=b), moved, flops
    )
    integers = PackedLinear.from_weight(
        weight, weights="int8", dense=machine.backends[0] in UNCHECKED or None
    )
    # PyTorch multiplies by the same integers in x's dtype: what quantising loses does not count.
    values, scales = integers.stored().to(dtype), integers.plain_scales()
    assert scales is not None
    yield Case(
        "linear_int8", shape, [x, values, scales],
        lambda x, q, s: (F.linear(x, q).to(torch.promote_types(x.dtype, torch.float32)) * s).to(x.dtype),
        lambda b: dk.linear(x, integers, backend=b), moved - weight.numel() * (size - 1), flops,
    )  # fmt: skip
    a, b_ = normal(16, s.hidden, scale=s.hidden**-0.5), normal(s.intermediate, 16, scale=0.25)
    yield Case(
        "lora_linear", f"{shape}, rank 16", [x, weight, a, b_],
        lambda x, w, a, b: F.linear(x, w) + 2.0 * F.linear(F.linear(x, a), b),
        lambda b: dk.lora_linear(x, weight, None, a, b_, 2.0, backend=b), moved, flops,
    )  # fmt: skip
    dy = normal(rows, s.intermediate)
    yield Case(
        "low_rank_grads", f"{shape}, rank 16", [x, dy, a, b_],
        lambda x, dy, a, b: (2.0 * (dy @ b).t() @ x, 2.0 * dy.t() @ (x @ a.t())),
        lambda b: low_rank_grads(x, dy, a, b_, 2.0, backend=b), 2 * (x.numel() + dy.numel()) * size,
        4.0 * 16 * (x.numel() + dy.numel()),
    )  # fmt: skip
    if rows == s.rows[0]:
        yield Case(
            "fuse_lora", f"{s.intermediate}x{s.hidden}, rank 16", [weight, a, b_],
            lambda w, a, b: w + 2.0 * (b @ a), lambda b: dk.fuse_lora(weight, a, b_, 2.0, backend=b),
            2 * weight.numel() * size,
        )  # fmt: skip


def filled_cache(machine: Machine, rows: int, tokens: int, k: Tensor, v: Tensor) -> PagedKVCache:
    """A cache of one layer whose slots hold k and v, [rows, Hkv, tokens, D]."""
    s = machine.sizes
    pages = -(-tokens // 64)
    cache = PagedKVCache(1, s.kv_heads, s.head_dim, rows * pages, rows, pages, k.dtype, machine.device)
    cache.prepare_append(range(rows), tokens)
    for row in range(rows):
        cache.write(row, 0, 0, k[row], v[row])
    cache.advance(range(rows), tokens)
    cache.sync()
    return cache


def cache_cases(machine: Machine, normal: Any, dtype: torch.dtype) -> Iterator[Case]:
    s, device, size = machine.sizes, machine.device, dtype.itemsize
    scale = s.head_dim**-0.5
    for op, (rows, tokens), queries in (
        ("attention", s.prompts, s.prompts[1]),
        ("attention_decode", s.decode, 1),
    ):
        q = normal(rows, s.heads, queries, s.head_dim)
        k, v = (normal(rows, s.kv_heads, tokens, s.head_dim) for _ in range(2))
        cache = filled_cache(machine, rows, tokens, k, v)
        packed = q.transpose(1, 2).reshape(rows * queries, s.heads, s.head_dim).contiguous()
        bounds = torch.arange(0, rows * queries + 1, queries, dtype=torch.int32, device=device)
        lens = torch.full((rows,), tokens, dtype=torch.int32, device=device)

        def eager(
            q: Tensor, k: Tensor, v: Tensor, causal: bool = queries > 1, shape: Any = packed.shape
        ) -> Tensor:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True, scale=scale)
            return y.transpose(1, 2).reshape(shape)

        def ours(
            b: str, op: str = op, q: Tensor = packed, cache: Any = cache, cu: Any = bounds, lens: Any = lens
        ) -> Any:
            where = (q, cache.k[0], cache.v[0], cache.block_table, cu, lens)
            if b in UNCHECKED:
                splits = (0,) if op == "attention_decode" else ()
                return implementation(op, b, q)(*where, None, scale, None, None, None, *splits)
            run = dk.attention if op == "attention" else dk.attention_decode
            return run(*where, scale=scale, backend=b)

        pairs = queries * (queries + 1) / 2 if queries > 1 else tokens
        yield Case(
            op, f"{rows} rows of {tokens}, {s.heads}/{s.kv_heads} heads of {s.head_dim}", [q, k, v], eager, ours,
            (2 * q.numel() + k.numel() + v.numel()) * size, 4.0 * rows * s.heads * pairs * s.head_dim,
            peers={"flash-attn": lambda q=q, k=k, v=v, n=queries: flash_attention(q, k, v, n > 1)},
        )  # fmt: skip
    rows = s.decode[0]
    q, k, v = (normal(rows, heads, s.head_dim) for heads in (s.heads, s.kv_heads, s.kv_heads))
    cache = filled_cache(machine, rows, 1, k[:, :, None], v[:, :, None])
    cos, sin = (torch.rand(64, s.head_dim // 2, device=device) for _ in range(2))
    slots = torch.arange(rows, dtype=torch.int32, device=device)
    places = torch.zeros(rows, dtype=torch.int32, device=device)
    where = (q, k, v, cos, sin, places, slots, cache.k[0], cache.v[0], cache.block_table)

    def rotate(b: str) -> Any:
        if b in UNCHECKED:
            return implementation("rope_append", b, q)(*where, s.head_dim, "half")
        return dk.rope_append(*where, backend=b)

    yield Case(
        "rope_append", f"{rows} rows, {s.heads}/{s.kv_heads} heads of {s.head_dim}", [q],
        lambda q: rope_append_reference(q, k.to(q.dtype), v.to(q.dtype), cos, sin, places, slots,
                                        cache.k[0].to(q.dtype), cache.v[0].to(q.dtype), cache.block_table),
        rotate, (2 * q.numel() + 4 * k.numel()) * size,
    )  # fmt: skip


def head_cases(machine: Machine, normal: Any, dtype: torch.dtype) -> Iterator[Case]:
    s, device, size = machine.sizes, machine.device, dtype.itemsize
    rows = s.decode[0]
    # No two of a row are equal, or PyTorch's choice among equals would be compared.
    logits = torch.stack([torch.randperm(s.vocab, device=device) for _ in range(rows)]).float() / 4096
    numbers = torch.arange(rows, device=device)

    def draw(b: str, temperature: float, top_k: int, top_p: float = 1.0) -> Tensor:
        with capturing():  # as the engine calls it: without looking at the tokens
            return dk.sample(
                logits, temperature=temperature, top_k=top_k, top_p=top_p, streams=numbers, positions=numbers,
                backend=b,
            )[0]  # fmt: skip

    yield Case(
        "sample, greedy", f"{rows}x{s.vocab}", [logits], lambda z: z.argmax(-1),
        lambda b: draw(b, 0.0, 0), logits.numel() * 4, exact=True,
    )  # fmt: skip
    yield Case(
        "sample, top-k 1 at temperature 1", f"{rows}x{s.vocab}", [logits], lambda z: z.topk(1).indices[:, 0],
        lambda b: draw(b, 1.0, 1), logits.numel() * 4, exact=True,
    )  # fmt: skip
    for top_k, top_p in ((0, 1.0), (50, 1.0), (0, 0.9), (50, 0.9)):
        yield Case(
            f"sample, top-k {top_k or 'off'}, top-p {top_p if top_p < 1 else 'off'}", f"{rows}x{s.vocab}", [logits],
            lambda z, k=top_k, p=top_p: torch_sample(z, k, p),
            lambda b, k=top_k, p=top_p: draw(b, 1.0, k, p), logits.numel() * 4, exact=True,
            expected=lambda k=top_k, p=top_p: draw("reference", 1.0, k, p),
            peers={"flashinfer-python": lambda k=top_k, p=top_p: flashinfer_sample(logits, k or s.vocab, p)},
        )  # fmt: skip
    rows = 4 * s.decode[0]
    hidden, weight = normal(rows, s.hidden), normal(s.vocab, s.hidden, scale=s.hidden**-0.5)
    targets = torch.arange(rows, device=device) % s.vocab

    def eager(hidden: Tensor, weight: Tensor) -> Tensor:
        return F.linear(hidden, weight).to(torch.promote_types(hidden.dtype, torch.float32)).log_softmax(-1)[
            torch.arange(rows, device=device), targets
        ]  # fmt: skip

    yield Case(
        "token_logprobs", f"{rows}x{s.hidden}, vocabulary {s.vocab}", [hidden, weight], eager,
        lambda b: dk.token_logprobs(hidden, weight, targets, backend=b),
        (hidden.numel() + weight.numel()) * size, 2.0 * rows * weight.numel(),
    )  # fmt: skip

    def trained(logprobs: Callable[..., Tensor], hidden: Tensor, weight: Tensor) -> Any:
        leaves = [t.detach().requires_grad_() for t in (hidden, weight)]
        logprobs(*leaves).sum().backward()
        return leaves[0].grad, leaves[1].grad

    yield Case(  # logits twice, and two products with their gradients
        "token_logprobs forward + backward", f"{rows}x{s.hidden}, vocabulary {s.vocab}", [hidden, weight],
        lambda h, w: trained(eager, h, w),
        lambda b: trained(lambda h, w: dk.token_logprobs(h, w, targets, backend=b), hidden, weight),
        4 * (hidden.numel() + weight.numel()) * size, 8.0 * rows * weight.numel(),
    )  # fmt: skip


def torch_sample(z: Tensor, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """PyTorch's way to what `sample` gives: the largest by topk, the most probable by a sort, a draw by multinomial,
    and the log-probs of the tokens under all of a row."""
    kept = z
    if top_k:
        kept = kept.masked_fill(kept < kept.topk(top_k).values[:, -1:], -math.inf)
    if top_p < 1.0:
        ordered, index = kept.sort(dim=-1, descending=True)
        probability = ordered.softmax(-1)
        falls = probability.cumsum(-1) - probability >= top_p
        kept = kept.masked_fill(torch.zeros_like(falls).scatter(1, index, falls), -math.inf)
    tokens = torch.multinomial(kept.softmax(-1), 1)
    return tokens[:, 0], z.log_softmax(-1).gather(1, tokens)[:, 0]


# Peers. Their interfaces are theirs: where a call fails, the report has its error.


def liger(name: str, *arguments: Any) -> Callable[[], Any]:
    import liger_kernel.ops.rms_norm
    import liger_kernel.ops.swiglu

    module = liger_kernel.ops.rms_norm if "RMS" in name else liger_kernel.ops.swiglu
    return lambda: getattr(module, name).apply(*arguments)


def flashinfer(name: str, *arguments: Any) -> Callable[[], Any]:
    import flashinfer as library

    return lambda: getattr(library, name)(*arguments)


def flashinfer_sample(logits: Tensor, top_k: int, top_p: float) -> Callable[[], Any]:
    from flashinfer import sampling

    return lambda: sampling.top_k_top_p_sampling_from_logits(logits, top_k, top_p)


def vllm_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Callable[[], Any]:
    from vllm import _custom_ops

    out = torch.empty_like(x)
    return lambda: _custom_ops.rms_norm(out, x, weight, eps)


def flash_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Callable[[], Any]:
    from flash_attn import flash_attn_func

    q, k, v = (t.transpose(1, 2).contiguous() for t in (q, k, v))
    return lambda: flash_attn_func(q, k, v, causal=causal)


def error_of(ours: Any, case: Case) -> dict[str, Any]:
    """Distance of a result to float64, beside PyTorch's own in the same dtype; `good` is the project's criterion."""
    own = first(case.expected() if case.expected else case.eager(*case.inputs))
    got = first(ours)
    if case.exact:
        return {"good": bool(torch.equal(got, own))}
    exact = first(case.eager(*(t.double() if t.dtype.is_floating_point else t for t in case.inputs)))
    error, theirs = (float((t.double() - exact).abs().max()) for t in (got, own))
    eps = max(torch.finfo(case.inputs[0].dtype).eps, torch.finfo(got.dtype).eps)
    floor = (2.0 if eps < 1e-6 else 0.5) * eps * float(exact.abs().max())
    return {"error": error, "torch_error": theirs, "good": bool(error <= SLACK * theirs + floor)}


def measure(machine: Machine, case: Case, dtype: torch.dtype, peaks: dict[str, float]) -> dict[str, Any]:
    """A row of the report: every side's time, and for our backends the error and the share of the peak."""
    row: dict[str, Any] = {
        "op": case.op, "shape": case.shape, "dtype": str(dtype).removeprefix("torch."), "bytes": case.bytes,
        "flops": case.flops, "sides": {},
    }  # fmt: skip
    sides: dict[str, Callable[[], Callable[[], Any]]] = {
        b: (lambda b=b: lambda: case.ours(b)) for b in machine.backends
    }
    sides["torch eager"] = lambda: lambda: case.eager(*case.inputs)
    if not machine.dry:
        sides |= {"torch.compile": lambda: compiled(case)} if machine.compile else {}
        sides |= case.peers
    for name, make in sides.items():
        row["sides"][name] = attempt(lambda name=name, make=make: side(machine, case, name, make(), peaks))
    return row


def compiled(case: Case) -> Callable[[], Any]:
    function = torch.compile(case.eager, dynamic=False)
    return lambda: function(*case.inputs)


def side(
    machine: Machine, case: Case, name: str, work: Callable[[], Any], peaks: dict[str, float]
) -> dict[str, Any]:
    found: dict[str, Any] = error_of(work(), case) if name in machine.backends else {}
    found |= spread(machine.times(work, machine.sizes.repeats))
    seconds = found["median_us"] / 1e6
    found["gb_per_s"] = case.bytes / seconds / 1e9
    least = max(case.bytes / peaks["bytes_per_s"], case.flops / peaks["flops_per_s"])
    found["share_of_peak"] = least / seconds
    return found


def attempt(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `work` gives, or its error: one library must not end the report."""
    try:
        return work()
    except ImportError as error:
        return {"missing": str(error)}
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}", "trace": traceback.format_exc(limit=-4)}


def measured_peaks(machine: Machine) -> dict[str, float]:
    """Bytes a second of a copy that no cache holds, and operations a second of a large bfloat16 product."""
    n, side_length = (2**20, 128) if machine.dry else (2**29, 8192)
    source = torch.ones(n, dtype=torch.uint8, device=machine.device)
    target = torch.empty_like(source)
    a = torch.randn(
        side_length, side_length, device=machine.device
    ).bfloat16()  # equal numbers would run faster
    repeats = 2 if machine.dry else 10
    copying = statistics.median(machine.times(lambda: target.copy_(source), repeats))
    product = statistics.median(machine.times(lambda: a @ a, repeats))
    return {"bytes_per_s": 2 * n / copying, "flops_per_s": 2 * side_length**3 / product}


# ------------------------------------------------------------------------------------------------ generation


def generation_model(path: str | None, machine: Machine) -> nn.Module:
    from transformers import AutoModelForCausalLM, LlamaConfig

    dtype = torch.float32 if machine.dry else torch.bfloat16
    if path is not None:
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(machine.device).eval()
    config = LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, vocab_size=128256, max_position_embeddings=8192, dtype=dtype,
    )  # fmt: skip
    with torch.device(machine.device):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def generation(machine: Machine, path: str | None) -> Iterator[dict[str, Any]]:
    """Greedy tokens a second, prefill included, EOS ignored: our backends with and without graphs, Hugging Face, and
    its `generate` patched. Last in float32, where all of ours must have Hugging Face's tokens."""
    model: Any = generation_model(path, machine)
    vocab = model.get_input_embeddings().weight.shape[0]
    narrow, wide = ((1, 128, 256), (32, 256, 256), (64, 128, 256)), ((4, 128, 64),)
    for dtype, shapes in (
        ((torch.float32, ((2, 5, 4),)),) if machine.dry else ((model.dtype, narrow), (torch.float32, wide))
    ):
        model = model.to(dtype)
        for shape in shapes:
            yield generation_row(machine, model, vocab, *shape)


def generation_row(
    machine: Machine, model: Any, vocab: int, batch: int, prompt: int, new: int
) -> dict[str, Any]:
    ids = torch.randint(vocab, (batch, prompt), generator=torch.Generator().manual_seed(1))
    dtype = str(model.dtype).removeprefix("torch.")
    row: dict[str, Any] = {"batch": batch, "prompt": prompt, "new": new, "dtype": dtype, "sides": {}}
    tokens: dict[str, Tensor] = {}
    for name, make in generators(machine, model, ids.to(machine.device), new).items():
        print(f"generation of batch {batch} in {dtype}, {name}", file=sys.stderr, flush=True)
        row["sides"][name] = attempt(
            lambda name=name, make=make: speed(machine, make(), batch * new, name, tokens)
        )
    return row


def generators(machine: Machine, model: Any, ids: Tensor, new: int) -> dict[str, Callable[[], Any]]:
    """Makers, by side, of a call that generates `new` tokens for ids and returns them. Hugging Face comes first: the
    others are compared with it."""
    sides: dict[str, Callable[[], Any]] = {"HF eager": lambda: hf(model, ids, new)}
    for backend in machine.backends:
        if not machine.dry:
            sides[f"{backend}, graphs"] = lambda b=backend: ours(model, b, True, ids, new)
        sides[backend] = lambda b=backend: ours(model, b, False, ids, new)
        sides[f"{backend}, HF patched"] = lambda b=backend: patched(model, b, ids, new)
    if not machine.dry:
        if machine.compile:
            sides["HF static cache + compile"] = lambda: hf(model, ids, new, cache_implementation="static")
        sides["DeepSpeed"] = lambda: deepspeed(model, ids, new)
    return sides


def ours(model: Any, backend: str, graphs: bool, ids: Tensor, new: int) -> Callable[[], Tensor]:
    from dschat import HybridEngine, SamplingConfig

    engine = HybridEngine(model, backend=backend, max_slots=len(ids), cuda_graphs=graphs)
    sampling = SamplingConfig(max_new_tokens=new, temperature=0.0)

    def work() -> Tensor:
        rollout = engine.generate(ids, None, sampling)
        if graphs and rollout.stats.graph_steps != rollout.stats.steps:
            raise RuntimeError(engine.graphs.reason if engine.graphs else "the engine made no CUDA graphs")
        return rollout.completion_ids

    return work


def hf(model: Any, ids: Tensor, new: int, **options: Any) -> Callable[[], Tensor]:
    def work() -> Tensor:
        out: Tensor = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False,
            eos_token_id=None, pad_token_id=0, **options,
        )  # fmt: skip
        return out[:, ids.shape[1] :]

    return work


def patched(model: Any, backend: str, ids: Tensor, new: int) -> Callable[[], Tensor]:
    """Hugging Face's own `generate` with our kernels in a copy of the model."""
    import copy

    model = copy.deepcopy(model)
    patch = dk.patch(model, backend=backend)
    generate = hf(model, ids, new)

    def work() -> Tensor:
        out = generate()
        if notes := patch.report().notes:
            raise RuntimeError(f"left to transformers: {'; '.join(notes)}")
        return out

    return work


def deepspeed(model: Any, ids: Tensor, new: int) -> Callable[[], Tensor]:
    """DeepSpeed's own kernels, in a copy of the model."""
    import copy

    import deepspeed as library

    engine = library.init_inference(copy.deepcopy(model), dtype=model.dtype, replace_with_kernel_inject=True)
    return hf(engine.module, ids, new)


def speed(
    machine: Machine, work: Callable[[], Tensor], count: int, name: str, tokens: dict[str, Tensor]
) -> dict[str, Any]:
    """Tokens a second of the median of three runs, after one that warms up."""
    tokens[name] = work()
    seconds = []
    for _ in range(1 if machine.dry else 3):
        start = time.perf_counter()
        work()
        if not machine.dry:
            torch.cuda.synchronize(machine.device)
        seconds.append(time.perf_counter() - start)
    found = {"tokens_per_s": count / statistics.median(seconds), **spread(seconds)}
    if "HF eager" in tokens:
        other = tokens["HF eager"]
        found["tokens_of_hf"] = float((tokens[name] == other).float().mean())
    return found


# ---------------------------------------------------------------------------------------------------- report


def environment(machine: Machine) -> dict[str, Any]:
    """Versions, the GPU and its clocks, and the commit."""
    facts: dict[str, Any] = {
        "python": platform.python_version(), "torch": torch.__version__, "cuda of torch": torch.version.cuda,
        "commit": output_of(["git", "rev-parse", "HEAD"]), "nvcc": output_of(["nvcc", "--version"]),
    }  # fmt: skip
    for name in ("triton", "transformers", *PEERS):
        try:
            facts[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            facts[name] = None
    if not machine.dry:
        properties = torch.cuda.get_device_properties(machine.device)
        facts["gpu"] = properties.name
        facts["capability"] = f"sm_{properties.major}{properties.minor}"
        facts["memory"] = properties.total_memory
        query = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"
        facts["nvidia-smi"] = output_of(["nvidia-smi", f"--query-gpu={query}", "--format=csv"])
    return facts


def output_of(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def built(machine: Machine) -> dict[str, Any]:
    """The CUDA library of this GPU, compiled now or found ready."""
    from dschat_kernels import build

    start = time.perf_counter()
    if not machine.dry:
        build.load_cuda(torch.cuda.get_device_capability(machine.device))
    return {
        "seconds": time.perf_counter() - start,
        "backends": dk.backends(compile=not machine.dry).to_dict(),
    }


def tested(machine: Machine) -> dict[str, Any]:
    """The tests marked `gpu`; a dry run only collects them."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist") and not machine.dry:
        command += ["-n", "4"]
    chosen = ["tests/cuda/test_graphs.py", "--collect-only"] if machine.dry else ["tests"]
    done = subprocess.run([*command, *chosen], capture_output=True, text=True, cwd=ROOT)
    lines = done.stdout.strip().splitlines()
    found: dict[str, Any] = {"status": done.returncode, "summary": lines[-1] if lines else done.stderr[-500:]}
    if done.returncode:
        found["failed"] = done.stdout[-8000:]
    return found


def failures(report: dict[str, Any]) -> list[str]:
    """One line for everything that is not as it should be; peers are not ours."""
    found = [
        f"{name}: {report[name]['failed']}"
        for name in ("build", "tests", "peaks")
        if "failed" in report[name]
    ]
    ours = report["backends"]
    for row in report["kernels"]:
        what = f"{row['op']} {row['shape']} {row['dtype']}"
        for name in ours:
            cell = row["sides"][name]
            if "failed" in cell or "missing" in cell:
                found.append(f"{what}, {name}: {cell.get('failed') or cell['missing']}")
            elif not cell["good"]:
                found.append(f"{what}, {name}: {wrong(cell)}")
    for row in report["generation"]:
        for name, cell in row.get("sides", {}).items():
            if name.split(",")[0] not in ours:
                continue
            what = f"generation of batch {row['batch']} in {row['dtype']}, {name}"
            if "failed" in cell or "missing" in cell:
                found.append(f"{what}: {cell.get('failed') or cell['missing']}")
            elif row["dtype"] == "float32" and cell.get("tokens_of_hf") != 1.0:
                share = f"{cell['tokens_of_hf']:.1%}" if "tokens_of_hf" in cell else "an unknown share"
                found.append(f"{what}: {share} of the tokens are Hugging Face's")
        if "failed" in row:
            found.append(f"generation: {row['failed']}")
    return found


def wrong(cell: dict[str, Any]) -> str:
    if "error" not in cell:
        return "other indices than PyTorch's"
    return f"error {cell['error']:.3g} against float64, PyTorch's own is {cell['torch_error']:.3g}"


def markdown(report: dict[str, Any]) -> str:
    """The report to read; everything is in the JSON beside it."""
    facts = report["environment"]
    where = (
        "the CPU: a DRY RUN, no figure here is a GPU's"
        if report["dry_run"]
        else f"{facts['gpu']}, {facts['capability']}"
    )
    peaks = report["peaks"]
    lines = [
        f"# GPU check on {where}", "",
        *(f"- {name}: {' '.join(str(value).split())}" for name, value in facts.items() if value is not None),
        f"- build: {report['build'].get('seconds', math.nan):.0f} s; tests: {report['tests'].get('summary')}",
        f"- measured peaks: {peaks.get('bytes_per_s', math.nan) / 1e9:.0f} GB/s, "
        f"{peaks.get('flops_per_s', math.nan) / 1e12:.2f} TFLOP/s in bfloat16", "",
        "## What is not as it should be", "", *(f"- {line}" for line in report["failures"] or ["nothing"]), "",
        "## Kernels", "",
        "Median [10th-90th percentile] in microseconds; in brackets GB/s and the share of the measured peak.", "",
    ]  # fmt: skip
    names = list(dict.fromkeys(name for row in report["kernels"] for name in row["sides"]))
    lines += [f"| op | shape | dtype | {' | '.join(names)} |", "| --- " * (3 + len(names)) + "|"]
    for row in report["kernels"]:
        cells = [kernel_cell(row["sides"].get(name)) for name in names]
        lines.append(f"| {row['op']} | {row['shape']} | {row['dtype']} | {' | '.join(cells)} |")
    lines += ["", "## Generation", "", "Tokens a second, prefill included.", ""]
    for row in report["generation"]:
        if "sides" not in row:
            continue
        lines += [f"Batch {row['batch']}, {row['prompt']} + {row['new']} tokens, {row['dtype']}:", ""]
        for name, cell in row["sides"].items():
            said = (
                f"{cell['tokens_per_s']:.0f}"
                if "tokens_per_s" in cell
                else cell.get("failed") or cell["missing"]
            )
            if row["dtype"] == "float32" and "tokens_of_hf" in cell:
                said += f", {cell['tokens_of_hf']:.1%} of the tokens are HF's"
            lines.append(f"- {name}: {said}")
        lines.append("")
    return "\n".join(lines) + "\n"


def kernel_cell(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return "-"
    if "median_us" not in cell:
        return "not installed" if "missing" in cell else "failed"
    time_of = f"{cell['median_us']:.1f} [{cell['low_us']:.1f}-{cell['high_us']:.1f}]"
    mark = "" if cell.get("good", True) else " WRONG"
    return f"{time_of} ({cell['gb_per_s']:.0f}, {100 * cell['share_of_peak']:.0f} %){mark}"


def kernels(machine: Machine, only: str, peaks: dict[str, float]) -> Iterator[dict[str, Any]]:
    for dtype in machine.dtypes:
        for case in cases(machine, dtype):
            if only in case.op:
                print(f"{case.op} {case.shape} {dtype}", file=sys.stderr, flush=True)
                yield measure(machine, case, dtype, peaks)


def this_machine(dry: bool) -> Machine:
    if dry:
        backends = ("cpu",) if dk.backends()["cpu"].runs else ("reference",)
        return Machine(torch.device("cpu"), backends, (torch.float32,), DRY, True)
    if not torch.cuda.is_available():
        sys.exit(
            "gpu_check: PyTorch finds no NVIDIA GPU on this machine; --dry-run runs the same code on the CPU."
        )
    device = torch.device("cuda", torch.cuda.current_device())
    return Machine(device, ("cuda", "triton"), tuple(DTYPES.values()), Sizes(), False)


def names(known: Iterable[str]) -> Callable[[str], list[str]]:
    """Reads "a,b" of the known names."""

    def read(text: str) -> list[str]:
        chosen = [name.strip() for name in text.split(",")]
        if unknown := [name for name in chosen if name not in known]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(known)}")
        return chosen

    return read


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--output", type=Path, default=Path("gpu-check"), help="folder of report.json and report.md"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="tiny shapes on the CPU: shows that the script runs"
    )
    parser.add_argument(
        "--model", help="folder of a model to generate with; default: random weights of 1.2 B parameters"
    )
    parser.add_argument("--only", default="", help="kernels whose op contains this")
    parser.add_argument("--parts", type=names(PARTS), default=list(PARTS), help=f"some of {','.join(PARTS)}")
    parser.add_argument("--dtypes", type=names(DTYPES), help=f"some of {','.join(DTYPES)}; default: all")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=True,
        help="whether torch.compile is timed too, which compiles for seconds a case",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    machine = this_machine(options.dry_run)
    if options.dtypes:
        machine = replace(machine, dtypes=tuple(DTYPES[name] for name in options.dtypes))
    machine = replace(machine, compile=options.compile)
    path = options.model or (str(ROOT / "tests/data/stories260k") if machine.dry else None)
    report = run(machine, options.parts, options.only, path, options.output)
    print(
        f"{options.output / 'report.md'} and report.json: send both. {len(report['failures'])} things are wrong."
    )
    return 1 if report["failures"] else 0


def run(machine: Machine, parts: list[str], only: str, path: str | None, folder: Path) -> dict[str, Any]:
    """The report of these parts, written to `folder` after every step."""
    report: dict[str, Any] = {
        "dry_run": machine.dry, "backends": list(machine.backends), "environment": environment(machine),
        "sources": gpu_sources.fingerprints(),
        "build": {}, "tests": {}, "peaks": {}, "kernels": [], "generation": [],
    }  # fmt: skip
    for name, work in (("build", built), ("tests", tested), ("peaks", measured_peaks)):
        if name in parts or name == "peaks":
            report[name] = attempt(lambda work=work: work(machine))
            write(report, folder)
    peaks = {"bytes_per_s": math.nan, "flops_per_s": math.nan} | report["peaks"]
    if "kernels" in parts:
        for row in kernels(machine, only, peaks):
            report["kernels"].append(row)
            write(report, folder)
    if "generation" in parts:
        with torch.no_grad():
            report["generation"].append(attempt(lambda: add_generation(machine, path, report, folder)))
        report["generation"] = [row for row in report["generation"] if row]
    write(report, folder)
    return report


def add_generation(
    machine: Machine, path: str | None, report: dict[str, Any], folder: Path
) -> dict[str, Any]:
    for row in generation(machine, path):
        report["generation"].append(row)
        write(report, folder)
    return {}


def write(report: dict[str, Any], folder: Path) -> None:
    """report.json and report.md of what is known so far."""
    report["failures"] = failures(report)
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (("report.json", json.dumps(report, indent=2)), ("report.md", markdown(report))):
        (folder / f"{name}.new").write_text(text)
        (folder / f"{name}.new").replace(folder / name)


if __name__ == "__main__":
    sys.exit(main())

"""What the kernels of csrc/cuda move: every one of them, in the checking build of csrc/cuda_emulation, on small shapes.

    python -m tests.cuda.traffic        prints the table, and writes it to tests/cuda/traffic.json

A row holds, of one launch:
  least       bytes that the algorithm must move, by the formula of its tiling, which the row states
  moved       bytes that blocks read and write over `least`; what a block reads again, its first-level cache holds
  once        `moved`, but over the bytes of the launch, each once: above 1, blocks read what other blocks read
  asked       bytes that warps ask for over `least`: what a block reads again counts again, lanes of one load do not
  efficiency  of the 32-byte sectors that warps' loads and stores touch, the percentage that each of them uses
  ways        passes of an access of shared memory: their mean and the worst (1: no bank conflicts); 0: none accessed

Names in a formula: s is the bytes of an element of the inputs, the others are the sizes that the row states. float16 is
not measured: it moves what bfloat16 does. test_traffic.py holds the kernels to the table.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path[:0] = [str(Path(__file__).parent)]

from emulated import CSRC, checked_cuda  # noqa: E402

from benchmarks import gpu_static  # noqa: E402
from dschat_kernels.cache import PagedKVCache  # noqa: E402
from dschat_kernels.ops.attention import attention, packed_attention  # noqa: E402
from dschat_kernels.ops.attention_decode import attention_decode  # noqa: E402
from dschat_kernels.ops.bias_act import bias_act  # noqa: E402
from dschat_kernels.ops.gated_act import gated_act  # noqa: E402
from dschat_kernels.ops.layer_norm import layer_norm  # noqa: E402
from dschat_kernels.ops.linear import linear  # noqa: E402
from dschat_kernels.ops.lora_linear import fuse_lora, lora_linear, low_rank_grads  # noqa: E402
from dschat_kernels.ops.rms_norm import rms_norm  # noqa: E402
from dschat_kernels.ops.rope_append import rope, rope_append  # noqa: E402
from dschat_kernels.ops.sample import sample  # noqa: E402
from dschat_kernels.ops.token_logprobs import token_logprobs  # noqa: E402
from dschat_kernels.packing import PackedLinear, ResolvedLinear  # noqa: E402
from tests.paged import cumulative, make_batch  # noqa: E402

TABLE = Path(__file__).with_name("traffic.json")
DTYPES = (torch.bfloat16, torch.float32)
FORMULA = re.compile(r"[\w\s+*/()]+")


@dataclass
class Case:
    """One call; `least` has the formula of a kernel that it launches, by the name without dtypes."""

    name: str
    call: Callable[[], Any]
    sizes: dict[str, int]
    least: dict[str, str]
    backward: bool = False


def least(formula: str, sizes: dict[str, int]) -> int:
    """The value of a row's formula: sizes, sums, products and quotients."""
    assert FORMULA.fullmatch(formula), formula
    return round(eval(formula, {"__builtins__": {}}, sizes))


def dump(table: dict[str, Any]) -> str:
    """JSON with a line a row."""
    lines = []
    for kernel, rows in table.items():
        inside = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
        lines.append(f" {json.dumps(kernel)}: {{\n{inside}\n }}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def cases(dtype: torch.dtype) -> list[Case]:
    return [*_streaming(dtype), *_rotary(dtype), *_products(dtype), *_attention(dtype), *_vocabulary(dtype)]


def _random(dtype: torch.dtype) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    return draw


def _streaming(dtype: torch.dtype) -> list[Case]:
    """Matrices [r, h] and float32 vectors [h], which every row reads. Gradients of vectors: blocks of 64 x 128."""
    t, r, h, s = _random(dtype), 64, 1024, dtype.itemsize
    x, other, w, b = (tensor.requires_grad_() for tensor in (t(r, h), t(r, h), t(h), t(h)))
    sizes = {"r": r, "h": h, "s": s}
    column = {"total_sums": "4 * h * r / 64 + 4 * h"}
    partial = " + 4 * h * r / 64"
    found = [
        Case("rms_norm", lambda: rms_norm(x, w, backend="cuda"), sizes, {
            "forward": "r * (2 * s * h + 4 * h + 4)", "backward": "r * (3 * s * h + 4 * h + 4)",
            "partial_sums<ScaleTerm>": "2 * s * r * h + 4 * r * h / 128" + partial, **column,
        }, True),
        Case("rms_norm + residual", lambda: rms_norm(x, w, residual=other, backend="cuda"), sizes,
             {"forward": "r * (4 * s * h + 4 * h + 4)"}),
        Case("layer_norm", lambda: layer_norm(x, w, b, backend="cuda"), sizes, {
            "forward": "r * (2 * s * h + 8 * h + 8)", "backward": "r * (3 * s * h + 4 * h + 8)",
            "partial_sums<WeightTerm>": "2 * s * r * h + 8 * r * h / 128" + partial,
            "partial_sums<BiasTerm>": "s * r * h" + partial, **column,
        }, True),
        Case("layer_norm, no weight", lambda: layer_norm(x, None, None, residual=other, backend="cuda"), sizes,
             {"forward": "r * (4 * s * h + 8)"}),
        Case("bias_act", lambda: bias_act(x, w, "gelu", backend="cuda"), sizes, {
            "forward": "r * (2 * s * h + 4 * h)", "backward": "r * (3 * s * h + 4 * h)",
            "partial_sums<BiasTerm>": "2 * s * r * h + 4 * h * r / 64" + partial, **column,
        }, True),
        Case("bias_act, no bias", lambda: bias_act(x, None, "gelu", backend="cuda"), sizes,
             {"forward": "2 * s * r * h"}),
        Case("gated_act", lambda: gated_act(x, other, "silu", gate_bias=w, up_bias=b, backend="cuda"), sizes, {
            "forward": "r * (3 * s * h + 8 * h)", "backward": "r * (5 * s * h + 8 * h)",
            "partial_sums<BiasTerm<true>>": "3 * s * r * h + 8 * h * r / 64" + partial,
            "partial_sums<BiasTerm<false>>": "2 * s * r * h + 4 * h * r / 64" + partial, **column,
        }, True),
        Case("gated_act, no bias", lambda: gated_act(x, other, "silu", backend="cuda"), sizes,
             {"forward": "3 * s * r * h"}),
    ]  # fmt: skip
    if dtype != torch.float32:
        wide = t(h, dtype=torch.float32).requires_grad_()
        found.append(
            Case("rms_norm, float32 weight", lambda: rms_norm(x, wide, backend="cuda"), sizes, {
                "forward": "r * (s * h + 8 * h + 4)", "backward": "r * (2 * s * h + 8 * h + 4)",
                "partial_sums<ScaleTerm>": "(s + 4) * r * h + 4 * r * h / 128" + partial, **column,
            }, True)
        )  # fmt: skip
    return found


def _rotary(dtype: torch.dtype) -> list[Case]:
    """A block has one head of a token, and reads the angles for itself; a token's key goes to a page of its own."""
    t, tokens, heads, kv, dim = _random(dtype), 16, 4, 2, 128
    angle = torch.rand(80, dim // 2)
    cos, sin = angle.cos(), angle.sin()
    positions, slots = torch.arange(tokens) * 3, torch.arange(tokens)
    q, k, v = t(tokens, heads, dim), t(tokens, kv, dim), t(tokens, kv, dim)
    cache = PagedKVCache(1, kv, dim, tokens, tokens, 1, dtype)
    cache.prepare_append(list(range(tokens)), [64] * tokens)
    cache.sync()
    sizes = {"t": tokens, "d": dim, "s": dtype.itemsize}
    rotate = {"rotate_all": "t * heads * (2 * s * d + 4 * d + 4)"}
    return [
        Case("rope", lambda: rope(q, cos, sin, positions, backend="cuda"), {**sizes, "heads": heads}, rotate),
        Case("rope_append",
             lambda: rope_append(q, k, v, cos, sin, positions, slots, cache.k[0], cache.v[0], cache.block_table,
                                 backend="cuda"),
             {**sizes, "heads": heads, "kv": kv},
             {**rotate, "append_all": "t * kv * (4 * s * d + 4 * d + 12)"}),
    ]  # fmt: skip


def _products(dtype: torch.dtype) -> list[Case]:
    """Tiles of R rows by 64 columns; each reads its rows of both sides."""
    t, n, k, rank = _random(dtype), 128, 256, 8
    weight, bias = t(n, k), t(n, dtype=torch.float32)
    packed = PackedLinear.from_parts([ResolvedLinear(weight, bias.to(dtype), ())], dense=True)
    a, b = t(rank, k, dtype=torch.float32), t(n, rank, dtype=torch.float32)
    product = "s * r * k * n / 64 + s * n * k * r / R + s * r * n + 4 * n * r / R"
    integers = PackedLinear.from_parts([ResolvedLinear(weight, bias, ())], dtype, dense=True, weights="int8")
    found = []
    for rows, height in ((16, 16), (128, 64)):
        x, residual = t(rows, k), t(rows, n)
        sizes = {"r": rows, "n": n, "k": k, "s": dtype.itemsize, "R": height}
        tiles = f"linear_tiles<{height // 16}>"
        found += [
            Case("linear + residual", lambda x=x, y=residual: linear(x, packed, residual=y, backend="cuda"), sizes,
                 {tiles: f"{product} + s * r * n"}),
            Case("linear_int8", lambda x=x: linear(x, integers, backend="cuda"), sizes,
                 {tiles.replace(">", ", signed char>"):
                  "s * r * k * n / 64 + n * k * r / R + s * r * n + 8 * n * r / R"}),
            Case("lora_linear", lambda x=x: lora_linear(x, weight, bias.to(dtype), a, b, 0.5, backend="cuda"),
                 {**sizes, "rank": rank},
                 {tiles: f"{product} + 4 * rank * (r * n / 64 + n * r / R)",
                  "side_inputs": "r * (s * k + 4 * rank * k + 4 * rank)"}),
        ]  # fmt: skip
    sizes = {"n": n, "k": k, "s": dtype.itemsize, "rank": rank}
    fuse = "2 * s * n * k + 4 * rank * (n * k / 8 + n * k / 128)"  # blocks of 8 rows by 128 columns
    found.append(
        Case("fuse_lora", lambda: fuse_lora(weight, a, b, 0.5, backend="cuda"), sizes, {"fuse": fuse})
    )
    return [*found, *_factor_gradients(dtype)]


def _factor_gradients(dtype: torch.dtype) -> list[Case]:
    """A block of project has 16 rows, one of outer 256 rows, 128 columns and 8 of the rank. x and dy are of one size,
    that the rows of a table are."""
    t, rows, size, rank = _random(dtype), 512, 256, 16
    x, dy, factor = t(rows, size), t(rows, size), t(rank, size, dtype=torch.float32)
    blocks = "4 * k * rank * r / 256"  # of sums
    return [
        Case("low_rank_grads", lambda: low_rank_grads(x, dy, factor, factor.t(), 0.5, backend="cuda"),
             {"r": rows, "k": size, "rank": rank, "s": dtype.itemsize},
             {"project": "r * (s * k + 4 * rank) + 4 * rank * k * r / 16",
              "outer": f"s * r * k * rank / 8 + 4 * r * rank * k / 128 + {blocks}",
              "total_sums": f"{blocks} + 4 * k * rank"})
    ]  # fmt: skip


def _attention(dtype: torch.dtype) -> list[Case]:
    """Heads of 2 kv heads; prefill of one page in B blocks a kv head, decoding over pages that have a block each."""
    found, heads, kv, s = [], 8, 2, dtype.itemsize
    tokens, rows, pages = 64, 2, 4
    for dim in (32, 64, 128, 256):
        prompt = make_batch([tokens], [tokens], heads, kv, dim, dtype)
        wide = dim > 128
        block = (16 if wide else 32) if dtype == torch.float32 else 64  # rows of a block: heads of tokens
        sizes = {"t": tokens, "heads": heads, "kv": kv, "d": dim, "s": s}
        prefill = {**sizes, "B": tokens * heads // kv // block, "parts": 2 if wide else 1}
        warps = 2 if wide and dtype == torch.float32 else 4
        page_of_all = "parts * kv * s * d * (64 * B + t * (B + 1) / 2)"
        found.append(
            Case("attention", lambda p=prompt: attention(*p.arguments, scale=0.1, backend="cuda"), prefill,
                 {f"attention_tiles<{dim}, {warps}, false>": f"{page_of_all} + (parts + 1) * s * t * heads * d"})
        )  # fmt: skip
        batch = make_batch([1] * rows, [64 * pages] * rows, heads, kv, dim, dtype)
        del sizes["t"]
        found.append(
            Case("attention_decode",
                 lambda b=batch: attention_decode(*b.arguments, scale=0.1, num_splits=pages, backend="cuda"),
                 {**sizes, "r": rows, "pages": pages},
                 {f"attention_tiles<{dim}, 1, true>":
                      "r * pages * (kv * 2 * 64 * s * d + heads * s * d + heads * 4 * (d + 2))",
                  "fold_partials": "r * heads * (pages * 4 * (d + 2) + s * d)"})
        )  # fmt: skip
    t = _random(dtype)
    for dim, tokens in ((64, 64), (128, 64), (256, 32)) if dtype != torch.float32 else ((64, 48),):
        sizes = {"t": tokens, "heads": heads, "kv": kv, "d": dim, "s": s}
        passes = {
            "query_gradients": "heads * (t * (3 * s * d + 8) + s * d * t * (t + 1))",
            "key_gradients": "4 * kv * t * s * d + heads * (2 * s * d + 8) * t * (t + 1) / 2",
        }
        if (
            dtype != torch.float32
        ):  # the tokens are one block's; it computes `out` dimensions of the gradients
            sizes |= {"qout": min(dim, 128), "kout": 64}
            passes = {
                f"query_tiles<{dim}, {min(dim, 128)}>": "heads * t * (4 * s * d * d / qout + s * d + 8)",
                f"key_tiles<{dim}, 64>": "t * (2 * kv * s * d * (1 + d / kout) + heads * (2 * s * d + 8) * d / kout)",
            }
        qkv = [t(tokens, n, dim).requires_grad_() for n in (heads, kv, kv)]
        cu = cumulative([tokens])
        found.append(
            Case("packed_attention", lambda qkv=qkv, cu=cu: packed_attention(*qkv, cu, scale=0.1, backend="cuda"),
                 sizes, passes, True)
        )  # fmt: skip
    return found


def _vocabulary(dtype: torch.dtype) -> list[Case]:
    """A block of sample has a row of logits; one of token_logprobs R rows and a chunk of 256 of the vocabulary."""
    t, rows, vocab = _random(dtype), 2, 4096
    logits, numbers = t(rows, vocab), torch.arange(rows)
    sizes = {"r": rows, "v": vocab, "s": dtype.itemsize}
    options: dict[str, dict[str, Any]] = {
        "sample": {}, "sample, greedy": {"temperature": 0.0},
        "sample, filters": {"top_k": 50, "top_p": 0.9, "min_p": 0.01},
    }  # fmt: skip
    found = [
        Case(name, lambda o=o: sample(logits, streams=numbers, positions=numbers, backend="cuda", **o), sizes,
             {"sample_rows": "r * (s * v + 12)"})
        for name, o in options.items()
    ]  # fmt: skip
    size = 64
    weight, bias = t(vocab // 4, size), t(vocab // 4)
    for count, height in ((16, 16), (64, 64)):
        hidden, targets = t(count, size), torch.arange(count)
        found.append(
            Case("token_logprobs",
                 lambda h=hidden, n=targets: token_logprobs(h, weight, n, bias=bias, return_entropy=True,
                                                            backend="cuda"),
                 {"r": count, "v": vocab // 4, "k": size, "s": dtype.itemsize, "R": height},
                 {f"chunk_sums<{height // 16}>":
                      "s * k * (r * v / 256 + v * r / R) + 4 * v * r / R + 20 * r * v / 256 + 4 * r",
                  "fold_chunks": "r * (12 * v / 256 + 20)"})
        )  # fmt: skip
    return [*found, *_head_gradients(dtype)]


def _head_gradients(dtype: torch.dtype) -> list[Case]:
    """Tiles of 64 x 64 in all products; the kernel of the products is measured by the gradient of the head."""
    t, rows, size, vocab = _random(dtype), 128, 192, 256
    hidden, targets = t(rows, size), torch.arange(rows)
    weight, bias = t(vocab, size).requires_grad_(), t(vocab, dtype=torch.float32).requires_grad_()
    return [
        Case("token_logprobs", lambda: token_logprobs(hidden, weight, targets, bias=bias, backend="cuda"),
             {"r": rows, "v": vocab, "k": size, "s": dtype.itemsize},
             {"logit_gradients": "2 * s * k * r * v / 64 + 2 * s * r * v + r * v / 64 * (4 + 16) + 4 * v * r / 64",
              "product_tiles": "2 * s * k * r * v / 64 + s * k * v",
              "total_sums": "4 * v * r / 64 + 4 * v"}, True)
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------------------- measuring

SOURCES = {"rope": "rope_append", "fuse_lora": "lora_linear"}
TYPES = re.compile(r"\b(?:float|__nv_bfloat16|__half)\b(?:, )?")


def source_of(launcher: str) -> str:
    """The file of a launcher, without its suffix."""
    stem = SOURCES.get(launcher, launcher)
    return stem if (CSRC / "cuda" / f"{stem}.cu").exists() else stem.removesuffix("_backward")


def kernel_name(text: str) -> str:
    """As resources.json has it, of what the emulation's name_of says."""
    found = re.search(r"kernel = (.*)\]$", text)
    assert found, text
    return re.sub(r"\{anonymous\}::|dschat::cuda::", "", found[1])


def plain(kernel: str) -> str:
    """A kernel without its dtypes."""
    return re.sub(",? *>", ">", TYPES.sub("", kernel)).replace("<>", "")


def measure_case(case: Case) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(source: kernel, case, row) of the kernels that a case names; others that it launches are other cases'."""
    with checked_cuda() as checked:
        out = case.call()
        if case.backward:
            outs = list(out) if isinstance(out, tuple) else [out]
            torch.autograd.backward(outs, [torch.ones_like(o) for o in outs])
    launched = {(source_of(launcher), kernel_name(text), plain(kernel_name(text))): counts
                for launcher, text, counts in checked.kernels}  # fmt: skip
    assert case.least.keys() <= {name for _, _, name in launched}, f"{case.name} launches {sorted(launched)}"
    for (source, kernel, name), counts in launched.items():
        if name in case.least:
            yield f"{source}: {kernel}", case.name, row(case.least[name], case.sizes, counts)


def row(formula: str, sizes: dict[str, int], counts: dict[str, int]) -> dict[str, Any]:
    """A row of the table."""
    minimum, requests = least(formula, sizes), counts["shared_requests"]
    return {
        "sizes": {name: value for name, value in sizes.items() if re.search(rf"\b{name}\b", formula)},
        "formula": formula,
        "least": minimum,
        "moved": round(counts["moved_bytes"] / minimum, 3),
        "once": round(counts["moved_bytes"] / counts["once_bytes"], 3),
        "asked": round(counts["used_bytes"] / minimum, 3),
        "efficiency": round(100 * counts["used_bytes"] / (32 * counts["sectors"]), 1),
        "ways": round(counts["shared_passes"] / requests, 2) if requests else 0,
        "worst": counts["worst_passes"],
    }


def problems(kernel: str, rows: dict[str, dict[str, Any]], expected: dict[str, dict[str, Any]]) -> list[str]:
    """What a kernel does worse than the table; a little is left for compilers that order loads differently."""
    wrong = []
    for case in rows.keys() | expected.keys():
        if case not in rows or case not in expected:
            wrong.append(f"{kernel} in {case} came or went in the table: run the command that writes it")
            continue
        found, before = rows[case], expected[case]
        if found["least"] != before["least"]:
            wrong.append(
                f"{kernel} in {case} has another formula in the table: run the command that writes it"
            )
        worse = [name for name in ("moved", "once", "asked") if found[name] > before[name] + 0.005]
        worse += ["efficiency"] * (found["efficiency"] < before["efficiency"] - 0.5)
        worse += [name for name in ("ways", "worst") if found[name] > before[name]]
        if worse:
            wrong.append(f"{kernel} in {case} is worse in {worse}: {found}, was {before}")
    return wrong


def place(case: str, row: dict[str, Any]) -> str:
    """What a row is called under its kernel."""
    return f"{case}, {' '.join(f'{name}={value}' for name, value in row['sizes'].items())}"


def measure(dtype: torch.dtype) -> dict[str, dict[str, dict[str, Any]]]:
    """The table's rows of a dtype, by kernel and case."""
    torch.manual_seed(0)
    table: dict[str, dict[str, dict[str, Any]]] = {}
    for case in cases(dtype):
        for kernel, name, found in measure_case(case):
            rows = table.setdefault(kernel, {})
            assert rows.setdefault(place(name, found), found) == found, f"{kernel} in {name} has two measures"
    return table


if __name__ == "__main__":
    measured = {}
    for dtype in DTYPES:
        for kernel, rows in measure(dtype).items():
            measured.setdefault(kernel, {}).update(rows)
    measured = dict(sorted(measured.items()))
    TABLE.write_text(dump(measured))
    print("\n".join(gpu_static.traffic_lines(measured)))

"""What Triton's kernels move: their compiled code (sm_80) in the checking build of csrc/cuda_emulation, small shapes.

    python -m tests.triton_kernels.traffic        writes tests/triton_kernels/traffic.json

Rows are those of tests/cuda/traffic.py, which says what they mean; formulas are of these kernels' own tiling, in the
configuration that is launched without tuning. test_traffic.py holds the kernels to the table.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dschat_kernels.cache import PagedKVCache
from dschat_kernels.ops._common import offered
from dschat_kernels.ops.bias_act import bias_act
from dschat_kernels.ops.gated_act import gated_act
from dschat_kernels.ops.layer_norm import layer_norm
from dschat_kernels.ops.rms_norm import rms_norm
from dschat_kernels.ops.rope_append import rope, rope_append
from tests.cuda.traffic import DTYPES, Case, dump, place, row

from tests.cuda.ptx.compiled import counted_triton  # isort: skip  (finds what tests.cuda.traffic puts on the path)

TABLE = Path(__file__).with_name("traffic.json")
NAMES = {torch.bfloat16: "bfloat16", torch.float32: "float32"}


def cases(dtype: torch.dtype) -> list[Case]:
    """Rows [r, h], a program each, and float32 vectors [h] that each reads; in backwards a program has 32 rows.
    Of rope a program has a token's heads, of queries or of keys and values."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()

    r, h, tokens, heads, dim = 64, 1024, 16, 4, 128
    x, other, w, b, q = draw(r, h), draw(r, h), draw(h), draw(h), draw(tokens, heads, dim).detach()
    angle = torch.rand(80, dim // 2, generator=generator)
    cos, sin, positions = angle.cos(), angle.sin(), torch.arange(tokens) * 3
    kv = 2
    k, v = (draw(tokens, kv, dim).detach() for _ in range(2))
    cache = PagedKVCache(1, kv, dim, tokens, tokens, 1, dtype)
    cache.prepare_append(list(range(tokens)), [64] * tokens)
    cache.sync()
    sizes = {"r": r, "h": h, "s": dtype.itemsize}
    column = {"_rows: _column_sum": "4 * h * r / 32 + 4 * h"}
    return [
        Case("rms_norm", lambda: rms_norm(x, w, backend="triton"), sizes, {
            "rms_norm: _forward": "r * (2 * s * h + 4 * h + 4)",
            "rms_norm: _backward": "r * (3 * s * h + 4) + 8 * h * r / 32", **column,
        }, True),
        Case("rms_norm + residual", lambda: rms_norm(x, w, residual=other, backend="triton"), sizes,
             {"rms_norm: _forward": "r * (4 * s * h + 4 * h + 4)"}),
        Case("layer_norm", lambda: layer_norm(x, w, b, backend="triton"), sizes, {
            "layer_norm: _forward": "r * (2 * s * h + 8 * h + 8)",
            "layer_norm: _backward": "r * (3 * s * h + 8) + 12 * h * r / 32", **column,
        }, True),
        Case("bias_act", lambda: bias_act(x, w, "gelu", backend="triton"), sizes, {
            "bias_act: _forward": "r * (2 * s * h + 4 * h)",
            "bias_act: _backward": "3 * s * r * h + 8 * h * r / 32", **column,
        }, True),
        Case("bias_act, no bias", lambda: bias_act(x, None, "gelu", backend="triton"), sizes,
             {"bias_act: _forward": "2 * s * r * h"}),
        Case("gated_act", lambda: gated_act(x, other, "silu", gate_bias=w, up_bias=b, backend="triton"), sizes, {
            "gated_act: _forward": "r * (3 * s * h + 8 * h)",
            "gated_act: _backward": "5 * s * r * h + 16 * h * r / 32", **column,
        }, True),
        Case("gated_act, no bias", lambda: gated_act(x, other, "silu", backend="triton"), sizes,
             {"gated_act: _forward": "3 * s * r * h"}),
        Case("rope", lambda: rope(q, cos, sin, positions, backend="triton"),
             {"t": tokens, "heads": heads, "d": dim, "s": dtype.itemsize},
             {"rope_append: _rope": "t * (2 * s * heads * d + 4 * d + 4)"}),
        Case("rope_append",
             lambda: rope_append(q, k, v, cos, sin, positions, torch.arange(tokens), cache.k[0], cache.v[0],
                                 cache.block_table, backend="triton"),
             {"t": tokens, "heads": heads, "kv": kv, "d": dim, "s": dtype.itemsize},
             {"rope_append: _append": "t * (2 * s * heads * d + 4 * d + 4) + t * (4 * s * kv * d + 4 * d + 12)"}),
    ]  # fmt: skip


def measure(dtype: torch.dtype) -> dict[str, dict[str, dict[str, Any]]]:
    """The table's rows of a dtype, by kernel and case."""
    offered("triton")
    table: dict[str, dict[str, dict[str, Any]]] = {}
    for case in cases(dtype):
        with counted_triton() as counted:
            out = case.call()
            if case.backward:
                torch.autograd.backward([out], [torch.ones_like(out)])
        launched = dict(counted)
        assert case.least.keys() <= launched.keys(), f"{case.name} launches {sorted(launched)}"
        for kernel in case.least:
            found = row(case.least[kernel], case.sizes, launched[kernel])
            rows = table.setdefault(f"{kernel}, {NAMES[dtype]}", {})
            rows[place(case.name, found)] = found
    return table


if __name__ == "__main__":
    measured: dict[str, dict[str, dict[str, Any]]] = {}
    for dtype in DTYPES:
        measured |= measure(dtype)
    TABLE.write_text(dump(dict(sorted(measured.items()))))
    print(TABLE.read_text())

"""Weights as the rollout reads them: packed in panels, LoRA fused, rebuilt only when something changed.

`resolve_linear` finds what a projection computes right now (weight, bias, the active LoRA adapters).
`PackedLinear` holds one packed matrix, `W + sum of scale * B A` accumulated in float32 and rounded once, to the
rollout's dtype or to int8 with a scale a row, so the training weight is only read. A digest says whether a
tensor's bytes changed; a tensor's version counter cannot (fused optimizers and `.data` bypass it).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import triton
from .huge_pages import huge_zeros
from .models.spec import LinearSpec, Unsupported
from .ops._common import native, ptr
from .quantise import quantise

PANEL = 32
"""Output columns of a panel (csrc/cpu/linear.h)."""
DTYPES = {torch.float32: 0, torch.bfloat16: 1}
"""Dtypes that can be packed, with their number in the binding."""
WEIGHTS = ("model", "int8", "int8_dynamic")
"""How packs hold weights: in the rollout's dtype; as int8 with a float32 scale an output column; or so, and the
activations they meet are quantised too (`quantised_rows`). Their places are their numbers in the binding."""
QUANT_GROUP = 64
"""Neighbouring activations that share a scale (csrc/cpu/gemm_int8.h)."""
DIGEST_BLOCK = 2**16
"""Bytes that native kernels hash by themselves where the tensor is no matrix."""
DIGEST_PIECE = 2**24
"""Words of 4 bytes that `digests` takes at a time without native kernels."""
QUANTISE_PIECE = 2**24
"""Elements that dense packs quantise at a time: what lies between, in float32, stays small beside a head."""


@dataclass(frozen=True)
class LoraUpdate:
    """One adapter's update `scale * b @ a`; a: [rank, in], b: [out, rank]."""

    a: Tensor
    b: Tensor
    scale: float


@dataclass(frozen=True)
class ResolvedLinear:
    """What a projection computes now: x @ (weight + sum of updates)^T + bias. weight: [out, in] view of the
    parameter. scales: float32 [out], what a weight of integers is multiplied by (int8.py)."""

    weight: Tensor
    bias: Tensor | None
    updates: tuple[LoraUpdate, ...]
    scales: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        """Everything the projection is computed from, the weight first."""
        found = [self.weight] + [t for t in (self.bias, self.scales) if t is not None]
        return found + [t for u in self.updates for t in (u.a, u.b)]

    def rows(self, begin: int, end: int) -> ResolvedLinear:
        """The projection to some of the outputs; views."""
        bias, scales = (None if t is None else t[begin:end] for t in (self.bias, self.scales))
        updates = tuple(LoraUpdate(u.a, u.b[begin:end], u.scale) for u in self.updates)
        return ResolvedLinear(self.weight[begin:end], bias, updates, scales)

    def base(self) -> Tensor:
        """The weight without updates, float32 (the parameter itself where it is)."""
        weight = self.weight.detach().float()
        return weight if self.scales is None else weight * self.scales[:, None]


def is_lora(module: nn.Module) -> bool:
    """Whether `module` is a PEFT LoRA layer (told by its parts: peft need not be installed)."""
    return hasattr(module, "lora_A") and hasattr(module, "lora_B") and hasattr(module, "get_base_layer")


def _lora_updates(module: Any, name: str) -> tuple[LoraUpdate, ...]:
    if module.disable_adapters or module.merged:  # merged: the base weight already holds them
        return ()
    updates = []
    for adapter in module.active_adapters:
        if adapter not in module.lora_A:
            continue  # this adapter leaves this projection alone
        if getattr(module, "use_dora", {}).get(adapter, False):
            raise Unsupported(
                f"{name} uses DoRA in adapter {adapter!r}, which is not a plain low-rank update: "
                "merge it first."
            )
        a, b = module.lora_A[adapter], module.lora_B[adapter]
        if getattr(b, "bias", None) is not None:
            raise Unsupported(
                f"{name} has a LoRA bias in adapter {adapter!r}: train it with lora_bias=False."
            )
        updates.append(LoraUpdate(a.weight, b.weight, float(module.scaling[adapter])))
    return tuple(updates)


def resolve_linear(spec: LinearSpec, name: str = "linear") -> ResolvedLinear:
    """Weight, bias and active LoRA updates of a projection as they are at this moment.

    Raises:
        Unsupported: the module is neither a plain linear layer nor plain LoRA around one.
    """
    module: Any = spec.module
    updates: tuple[LoraUpdate, ...] = ()
    if is_lora(module):
        updates = _lora_updates(module, name)
        module = module.get_base_layer()
    kind = type(module).__name__
    if kind not in ("Linear", "FalconLinear", "Conv1D", "NonDynamicallyQuantizableLinear", "Int8Linear"):
        raise Unsupported(f"{name} is a {kind}: only nn.Linear, Conv1D and LoRA around them can be packed.")
    scales = module.scales if kind == "Int8Linear" else None
    weight = module.weight.t() if kind == "Conv1D" else module.weight
    bias = None if spec.weight_only else module.bias
    whole = ResolvedLinear(weight, bias, updates, scales)
    return whole if spec.rows is None else whole.rows(*spec.rows)


def digests(tensors: Sequence[Tensor]) -> list[int]:
    """64-bit digest of each tensor's bytes; changing any one 4-byte word of a tensor always changes its digest. On the
    CPU all are made in one native call."""
    module: Any = native()
    held = [_in_one_piece(t.detach()) for t in tensors]
    here = [t for t in held if module is not None and t.device.type == "cpu"]
    found = iter(module.digest([_buffer(t, module.digest_rows) for t in here]) if here else ())
    return [
        int(next(found)) if module is not None and t.device.type == "cpu" else _torch_digest(t) for t in held
    ]


def _in_one_piece(data: Tensor) -> Tensor:
    if data.is_contiguous():
        return data
    return data.t() if data.dim() == 2 and data.t().is_contiguous() else data.contiguous()


def _buffer(data: Tensor, rows: int) -> tuple[int, int, int]:
    """Address, bytes and the bytes of a block. A matrix's block is `rows` of its rows, as packing comes by them."""
    size = data.element_size()
    block = rows * data.shape[1] * size if data.dim() == 2 and data.shape[1] else DIGEST_BLOCK
    return ptr(data), data.numel() * size, block


def _torch_digest(data: Tensor) -> int:
    flat = data.reshape(-1).view(torch.uint8)
    words = (nn.functional.pad(flat, (0, -len(flat) % 4)) if len(flat) % 4 else flat).view(torch.int32)
    if data.device.type in triton.DEVICES and triton.installed():
        return triton.digest(words)
    total = torch.zeros((), dtype=torch.int64, device=data.device)
    for begin in range(0, len(words), DIGEST_PIECE):  # a piece at a time bounds the memory
        part = words[begin : begin + DIGEST_PIECE].to(torch.int64)
        # A word's change is below 2^32 and its factor odd: their product is not 0 modulo 2^64.
        factors = torch.arange(begin, begin + len(part), dtype=torch.int64, device=data.device)
        for multiplier in (0x1E3779B97F4A7C15, 0x3F58476D1CE4E5B9):
            factors = (factors + 0x632BE59BD9B4E019) * multiplier
            factors = factors ^ (factors >> 29)
        total += (part * (factors | 1)).sum()
    return int(total)


def quantised_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Activations [rows, k] as "int8_dynamic" products take them: `quantise` of every group of QUANT_GROUP.

    Returns (values int8 [rows, groups, QUANT_GROUP], zero past k; scales float32 [rows, groups]).
    """
    x = nn.functional.pad(x.float(), (0, -x.shape[1] % QUANT_GROUP))
    groups = x.shape[1] // QUANT_GROUP
    values, scales = quantise(x.reshape(-1, QUANT_GROUP))
    return values.view(-1, groups, QUANT_GROUP), scales.view(-1, groups)


def fused_weight(part: ResolvedLinear, dtype: torch.dtype) -> Tensor:
    """round(W + sum of scale * B A) as a dense [out, in] tensor of `dtype`, accumulated in float32."""
    weight = part.base()
    for update in part.updates:
        weight = weight + update.scale * (update.b.detach().float() @ update.a.detach().float())
    return weight.to(dtype)


def check_weights(weights: str) -> None:
    """Raises ValueError for another name than those of WEIGHTS."""
    if weights not in WEIGHTS:
        raise ValueError(f"weights is {weights!r}: give one of {', '.join(map(repr, WEIGHTS))}.")


class PackedLinear:
    """One matrix for `ops.linear`: several projections below each other (q, k, v), or a gate/up pair.

    For the cpu backend `panels` holds the packed layout and `dense` is None; otherwise `dense` is the
    fused [n, k] matrix (a gated pair: [2 n, k], gate first) and `panels` is None. With int8 weights either of
    them holds the integers, and `scales` (float32, in the order of `bias`) what they are multiplied by.

    Args:
        shapes: (out, in) of the parts; all `in` equal.
        dtype: float32 or bfloat16 (dense: float16 too), of the packed weights and of the activations they meet.
        weights: one of WEIGHTS.
        gated: exactly two parts of one shape, gate and up; the result has `out` of one of them.
        dense: keep the matrix dense, as GPUs want it; None: where there are no native kernels, or not on the CPU.
        device: of the packed weights.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        dtype: torch.dtype,
        *,
        gated: bool = False,
        has_bias: bool = False,
        weights: str = "model",
        dense: bool | None = None,
        device: torch.device | str = "cpu",
    ):
        module: Any = native()
        dense = (module is None or torch.device(device).type != "cpu") if dense is None else dense
        if dtype not in DTYPES and not (dense and dtype == torch.float16):
            raise TypeError(f"weights cannot be packed as {dtype}: use torch.float32 or torch.bfloat16.")
        check_weights(weights)
        ks = {k for _, k in shapes}
        if len(ks) != 1 or (gated and (len(shapes) != 2 or shapes[0] != shapes[1])):
            raise ValueError(
                f"parts of shapes {list(shapes)} cannot be packed together: "
                "give equal widths (gated: two alike)."
            )
        self.shapes = [tuple(s) for s in shapes]
        self.dtype = dtype
        self.weights = weights
        self.gated = gated
        self.k = ks.pop()
        self.n = shapes[0][0] if gated else sum(n for n, _ in shapes)
        half = PANEL // 2
        self.num_panels = -(-self.n // half) if gated else -(-self.n // PANEL)
        self.total = sum(n for n, _ in shapes)
        entries = self.total if dense else self.num_panels * PANEL
        self.bias = torch.zeros(entries, dtype=torch.float32, device=device) if has_bias else None
        self.fills = 0
        """Times the pack was written; what read it once can tell whether it still holds the same weight."""
        self.scales = torch.zeros(entries, dtype=torch.float32, device=device) if weights != "model" else None
        held = torch.int8 if weights != "model" else dtype
        self.panels: Tensor | None = None
        self.dense: Tensor | None = None
        if not dense:
            # k, padded where tiles, pairs or fours of depths need it
            self.depth = module.panel_depth(DTYPES[dtype], WEIGHTS.index(weights), self.k)
            self.panels = huge_zeros(self.num_panels * self.depth * PANEL, held, share=True)
        else:
            self.dense = torch.empty(self.total, self.k, dtype=held, device=device)

    @classmethod
    def from_parts(
        cls,
        parts: Sequence[ResolvedLinear],
        dtype: torch.dtype | None = None,
        *,
        gated: bool = False,
        weights: str = "model",
        dense: bool | None = None,
    ) -> PackedLinear:
        """Allocates and fills a pack for `parts`; dtype defaults to that of the weights."""
        packed = cls(
            [(p.weight.shape[0], p.weight.shape[1]) for p in parts],
            dtype or (parts[0].weight.dtype if parts[0].scales is None else torch.float32),
            gated=gated,
            has_bias=any(p.bias is not None for p in parts),
            weights=weights,
            dense=dense,
            device=parts[0].weight.device,
        )
        packed.fill(parts)
        return packed

    @classmethod
    def from_weight(
        cls,
        weight: Tensor,
        bias: Tensor | None = None,
        dtype: torch.dtype | None = None,
        *,
        weights: str = "model",
        dense: bool | None = None,
    ) -> PackedLinear:
        """Packs one plain weight [out, in]."""
        return cls.from_parts([ResolvedLinear(weight, bias, ())], dtype, weights=weights, dense=dense)

    @property
    def nbytes(self) -> int:
        held = [t for t in (self.panels, self.dense, self.scales, self.bias) if t is not None]
        return sum(t.numel() * t.element_size() for t in held)

    def fits(self, parts: Sequence[ResolvedLinear]) -> bool:
        """Whether `fill(parts)` can write here: same shapes, and a place for every bias."""
        shapes = [tuple(p.weight.shape) for p in parts]
        return shapes == self.shapes and (self.bias is not None or all(p.bias is None for p in parts))

    def fill(self, parts: Sequence[ResolvedLinear], digest: bool = False) -> list[int]:
        """Writes the parts' present values into the pack, in place: pointers to it stay good.

        Returns:
            With `digest`, those of the parts' weights where they come with packing (the weights are then read once);
            else nothing.

        Raises:
            ValueError: shapes or biases the pack has no place for. TypeError: a dtype that cannot be packed.
        """
        if not self.fits(parts):
            shapes = [tuple(p.weight.shape) for p in parts]
            biases = sum(p.bias is not None for p in parts)
            held = "with" if self.bias is not None else "without"
            raise ValueError(
                f"the pack was made for shapes {self.shapes} {held} bias, not for {shapes} with "
                f"{biases} biases: make a new one."
            )
        dtypes = {p.weight.dtype for p in parts if p.scales is None}
        if len(dtypes) > 1 or not dtypes <= {*DTYPES, torch.float16}:
            raise TypeError(
                f"weights of dtype {', '.join(sorted(map(str, dtypes)))} cannot be packed together: "
                "use torch.float32, torch.bfloat16 or torch.float16, one for all."
            )
        self.fills += 1
        if self.bias is not None:
            self.bias.copy_(self._panel_order(parts))
        if self.panels is None:
            assert self.dense is not None
            if self.scales is None:
                torch.cat([fused_weight(p, self.dtype) for p in parts], out=self.dense)
            else:
                self._quantise(parts, self.dense, self.scales)
            return []
        return self._pack(parts, self.panels, digest)

    def _quantise(self, parts: Sequence[ResolvedLinear], dense: Tensor, scales: Tensor) -> None:
        step = max(1, QUANTISE_PIECE // max(1, self.k))
        pieces = [
            p.rows(i, min(i + step, n)) for p in parts for n in [len(p.weight)] for i in range(0, n, step)
        ]
        begin = 0
        for piece in pieces:
            end = begin + len(piece.weight)
            dense[begin:end], scales[begin:end] = quantise(fused_weight(piece, torch.float32))
            begin = end

    def _pack(self, parts: Sequence[ResolvedLinear], panels: Tensor, digest: bool) -> list[int]:
        module: Any = native()
        keep: list[Tensor] = []  # temporaries stay alive until the kernel has read them
        matrices = []
        direct = all(p.scales is None and p.weight.dtype in DTYPES for p in parts)  # what the kernels read
        for part in parts:
            weight = part.weight.detach() if direct else part.base()
            updates = []
            for update in part.updates:
                a, b = (t.detach().to(torch.float32).contiguous() for t in (update.a, update.b))
                keep += [a, b]
                updates.append((ptr(a), ptr(b), a.shape[0], update.scale))
            keep.append(weight)
            matrices.append((ptr(weight), *weight.shape, *weight.stride(), updates))
        found: list[int] = module.pack_linear(
            DTYPES[keep[-1].dtype], DTYPES[self.dtype], matrices, self.gated, WEIGHTS.index(self.weights), ptr(panels),
            ptr(self.scales), digest and direct,
        )  # fmt: skip
        return found

    def to_dense(self) -> Tensor:
        """The fused matrix [n, k] (a gated pair: [2 n, k], gate first) that the pack stands for, bit for
        bit; of int8 weights scale * value, rounded to float32."""
        scales = self.plain_scales()
        return self.stored() if scales is None else self.stored().float() * scales[:, None]

    def stored(self) -> Tensor:
        """The matrix in the order of `to_dense` as it is stored: of int8 weights the integers."""
        if self.dense is not None:
            return self.dense.clone()
        assert self.panels is not None
        half, count = PANEL // 2, self.num_panels
        rows = self.panels.view(count, self.depth, PANEL)  # csrc/cpu/gemm.h: panel_place
        module: Any = native()
        if self.weights == "int8_dynamic":  # csrc/cpu/gemm_int8.h: fours of depths, values + 128
            rows = (rows.view(torch.uint8).to(torch.int16) - 128).to(torch.int8)
            rows = (
                rows.view(count, self.depth // 4, PANEL, 4).transpose(2, 3).reshape(count, self.depth, PANEL)
            )
        elif self.dtype == torch.bfloat16 and module.depth_pairs:
            rows = (
                rows.view(count, self.depth // 2, PANEL, 2).transpose(2, 3).reshape(count, self.depth, PANEL)
            )
        elif self.dtype == torch.bfloat16 and self.scales is None:  # pairs (c, c + 16) -> columns in order
            rows = rows.view(count, self.depth, half, 2).transpose(2, 3).reshape(count, self.depth, PANEL)
        rows = rows[:, : self.k]
        rows = rows.transpose(1, 2)
        if self.gated:
            halves = rows.reshape(self.num_panels, 2, PANEL // 2, self.k)
            return torch.cat([halves[:, i].reshape(-1, self.k)[: self.n] for i in range(2)])
        return rows.reshape(-1, self.k)[: self.n].contiguous()

    def transposed_panels(self) -> Tensor:
        """Panels of the transposed matrix, [k, total], for the product dx = dy W: a fresh tensor of the cpu's layout.

        Its depths are the parts' rows one below the other (a gated pair: gate's, then up's).
        """
        module: Any = native()
        if self.panels is None or self.scales is not None:
            held = "dense" if self.panels is None else "int8"
            raise ValueError(f"the pack is {held}: only panels of the model's dtype can be transposed.")
        depth = module.panel_depth(DTYPES[self.dtype], WEIGHTS.index("model"), self.total)
        out = torch.empty(-(-self.k // PANEL) * depth * PANEL, dtype=self.dtype, device=self.panels.device)
        module.transpose_panels(DTYPES[self.dtype], ptr(self.panels), self.n, self.k, self.gated, ptr(out))
        return out

    def plain_bias(self) -> Tensor | None:
        """The bias in output order (a gated pair: gate's, then up's), float32."""
        return self._plain(self.bias)

    def plain_scales(self) -> Tensor | None:
        """The scales of int8 weights in the same order."""
        return self._plain(self.scales)

    def _plain(self, columns: Tensor | None) -> Tensor | None:
        if columns is None or self.panels is None:
            return columns
        if not self.gated:
            return columns[: self.n]
        halves = columns.view(self.num_panels, 2, PANEL // 2)
        return torch.cat([halves[:, i].reshape(-1)[: self.n] for i in range(2)])

    def _panel_order(self, parts: Sequence[ResolvedLinear]) -> Tensor:
        columns = [
            torch.zeros(p.weight.shape[0], dtype=torch.float32, device=p.weight.device)
            if p.bias is None
            else p.bias.detach().float()
            for p in parts
        ]
        if self.panels is None:
            return torch.cat(columns)
        out = torch.zeros(self.num_panels * PANEL, dtype=torch.float32, device="cpu")
        if self.gated:
            halves = out.view(self.num_panels, 2, PANEL // 2)
            for i, column in enumerate(columns):
                padded = out.new_zeros(self.num_panels * PANEL // 2)
                padded[: self.n] = column
                halves[:, i] = padded.view(self.num_panels, PANEL // 2)
        else:
            out[: self.n] = torch.cat(columns)
        return out

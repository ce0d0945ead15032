"""What a patch did to every module, as text, as a dict and as a table of `rich`; and what a decode step costs.

A decode step of one row reads every packed weight once. That, over the bandwidth of the machine, is the time that no
kernel can beat; keys and values of the context come on top.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from torch import nn

from .backends import known_bandwidth, read_bandwidth
from .models.source import mechanism, original_class
from .packing import resolve_linear
from .plan import Decoder


@dataclass(frozen=True)
class Entry:
    """One module: `status` is "patched" (its class was swapped), "decoder" (transformers' module in training,
    part of the fused decoder in generate) or "left" (transformers' everywhere).

    `mechanism`: what its forward was recognised as ("" for plain torch modules and unknown code). `pack_bytes`: its
    share of the packs (0 before the first generation). `read_bytes`: what a decode step of one row reads of it.
    """

    module: str
    kind: str
    status: Literal["patched", "decoder", "left"]
    op: str = ""
    backend: str = ""
    reason: str = ""
    mechanism: str = ""
    pack_bytes: int = 0
    read_bytes: int = 0


_COLUMNS = ("module", "count", "class", "mechanism", "status", "decode reads", "op or reason")


@dataclass
class Report:
    """What a patch did to every module. `notes` are forwards that went to transformers since, each said
    once. `bandwidth`: bytes a second that this machine reads, None where it was not measured."""

    model: str
    active: bool
    backend: str
    decoder: str
    entries: list[Entry]
    notes: list[str] = field(default_factory=list)
    bandwidth: float | None = None

    @property
    def pack_bytes(self) -> int:
        """Bytes of the packs beside the model's weights; 0 before the first generation."""
        return sum(entry.pack_bytes for entry in self.entries)

    @property
    def read_bytes(self) -> int:
        """Bytes that a decode step of one row reads, its keys and values aside."""
        return sum(entry.read_bytes for entry in self.entries)

    @property
    def decode_ms(self) -> float | None:
        """Milliseconds a token that reading them takes; None where the bandwidth was not measured."""
        return None if self.bandwidth is None else 1e3 * self.read_bytes / self.bandwidth

    def to_dict(self) -> dict[str, Any]:
        """Plain types, as for JSON."""
        totals = {name: getattr(self, name) for name in ("pack_bytes", "read_bytes", "decode_ms")}
        return {**asdict(self), **totals}

    def count(self, status: str) -> int:
        return sum(entry.status == status for entry in self.entries)

    def __str__(self) -> str:
        rows = [_COLUMNS, *self._rows()]
        widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS) - 1)]
        lines = self._head()
        for row in rows:
            cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
            lines.append("  ".join([*cells, row[-1]]).rstrip())
        return "\n".join([*lines, *self._tail()])

    def __rich__(self) -> Any:
        """A table for `rich.print`."""
        from rich.table import Table

        table = Table(*_COLUMNS, title="\n".join(self._head()), caption="\n".join(self._tail()) or None)
        styles = {"patched": "green", "decoder": "green", "left": "yellow"}
        for row in self._rows():
            table.add_row(*row, style=styles[row[4]])
        return table

    def _head(self) -> list[str]:
        lines = [
            f"{self.model}: {'patched' if self.active else 'patch undone'}, backend {self.backend}",
            f"generate and forwards without gradients: {self.decoder}",
        ]
        if self.read_bytes:
            packs = _size(self.pack_bytes) if self.pack_bytes else "made at the first generation"
            speed = "" if self.bandwidth is None else (
                f", {self.decode_ms:.3g} ms a token at {self.bandwidth / 1e9:.1f} GB/s"
            )  # fmt: skip
            lines.append(f"packs: {packs}; a decode step of one row reads {_size(self.read_bytes)}{speed}")
        return lines

    def _tail(self) -> list[str]:
        return [f"note: {note}" for note in self.notes]

    def _rows(self) -> list[tuple[str, ...]]:
        """Modules that differ in numbers only share a row."""
        groups: dict[tuple[str, ...], list[Entry]] = {}
        for e in self.entries:
            text = f"{e.op} ({e.backend})" if e.backend else e.op
            text = ": ".join(part for part in (text, e.reason) if part)
            module = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", e.module)
            key = (module, e.kind, e.mechanism, e.status, re.sub(r"\.\d+\.", ".*.", text))
            groups.setdefault(key, []).append(e)
        return [
            (module, str(len(own)), kind, what or "-", status, _size(sum(e.read_bytes for e in own)), text)
            for (module, kind, what, status, text), own in groups.items()
        ]


def _size(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} B" if count else "-"


def make_report(
    model: nn.Module, entries: list[Entry], fused: Decoder | None, measure: bool, **fields: Any
) -> Report:
    """The report of a patch, from what it did to the modules and from its fused decoder (None: there is none)."""
    costs = _Costs(model, fused) if fused is not None else None
    modules = dict(model.named_modules())
    done = []
    for entry in entries:
        module = modules.get(entry.module)
        kind = (mechanism(module) or "") if module is not None else ""
        entry = replace(entry, mechanism=kind)
        done.append(entry if costs is None else costs.fill(entry))
    bandwidth = read_bandwidth() if measure else known_bandwidth()
    return Report(model=original_class(model).__name__, entries=done, bandwidth=bandwidth, **fields)


class _Costs:
    """Bytes of the decoder, by module."""

    def __init__(self, model: nn.Module, decoder: Decoder):
        self.packs: dict[str, float] = {}
        self.reads: dict[str, float] = {}
        names = {id(module): name for name, module in model.named_modules()}
        size = decoder.dtype.itemsize
        for group in decoder.groups.values():
            weights = [resolve_linear(spec).weight for spec in group.specs]
            total = sum(weight.numel() for weight in weights)
            for spec, weight in zip(group.specs, weights, strict=True):
                share = group.packed.nbytes * weight.numel() / total if group.packed else 0.0
                name = names.get(id(spec.module), "")
                self.packs[name] = self.packs.get(name, 0.0) + share
                self.reads[name] = self.reads.get(name, 0.0) + (share or weight.numel() * size)
        for norm in decoder.spec.norms():
            name = names.get(id(norm.module), "")
            self.reads[name] = self.reads.get(name, 0.0) + sum(4 * t.numel() for t in norm.sources())
        for table in (decoder.spec.embed, decoder.spec.positions):
            if table is not None:
                rows: Any = table.weight
                self.reads[names.get(id(table), "")] = rows.shape[1] * size

    def fill(self, entry: Entry) -> Entry:
        packs, reads = (round(costs.get(entry.module, 0.0)) for costs in (self.packs, self.reads))
        return replace(entry, pack_bytes=packs, read_bytes=reads)

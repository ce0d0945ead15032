"""What the ops on rows share: the configuration of a row, and sums over rows in a fixed order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dschat_kernels.triton._launch import Config, launch, next_power_of_2

ROWS = 32
"""Rows whose gradients one program adds up; part of the definition of a weight gradient's bits."""
MAX_WIDTH = 65536
COLUMNS = 256
"""Columns of a program of column_sum."""


def row_config(op: str, width: int) -> Config:
    """A whole row in one program."""
    if width > MAX_WIDTH:
        raise ValueError(
            f"{op}: a row has {width} entries and the triton backend takes {MAX_WIDTH}; use 'reference'."
        )
    block = next_power_of_2(width)
    return Config({"BLOCK": block}, num_warps=min(16, max(1, block // 512)), num_stages=1)


def row_options(config: Config) -> list[Config]:
    """Other numbers of warps for a row, to be timed."""
    return [
        Config(config.blocks, warps, config.num_stages)
        for warps in (config.num_warps * 2, config.num_warps // 2)
        if 1 <= warps <= 16
    ]


@triton.jit(do_not_specialize=["blocks"])
def _column_sum(partial, out, blocks, columns, COLUMNS: tl.constexpr):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < columns
    total = tl.zeros([COLUMNS], tl.float32)
    place = partial + column
    for _ in range(blocks):
        total += tl.load(place, mask=inside, other=0.0)
        place += columns
    tl.store(out + column, total, mask=inside)


def partial_sums(
    rows: int, columns: int, device: torch.device, *wanted: bool
) -> tuple[int, list[Tensor | None]]:
    """Blocks of ROWS rows, and for each gradient that is wanted float32 [blocks, columns] for its partial sums."""
    blocks = -(-rows // ROWS)
    return blocks, [
        torch.empty(blocks, columns, dtype=torch.float32, device=device) if want else None for want in wanted
    ]


def column_sum(partial: Tensor | None, columns: int, device: torch.device) -> Tensor:
    """Sums of partial [blocks, columns] over its blocks, in order; empty where there is nothing to sum."""
    if partial is None:
        return torch.empty(0, dtype=torch.float32, device=device)
    out = torch.empty(columns, dtype=torch.float32, device=device)
    launch(
        _column_sum, (-(-columns // COLUMNS),),
        {"partial": partial, "out": out, "blocks": partial.shape[0], "columns": columns},
        Config({"COLUMNS": COLUMNS}),
    )  # fmt: skip
    return out


def piece_config(columns: int) -> Config:
    """A piece of a row, for what needs no sum over it."""
    block = min(1024, next_power_of_2(columns))
    return Config({"BLOCK": block}, num_warps=max(1, block // 256), num_stages=1)

"""The digest of a tensor's words, by which a refresh sees what changed; formula: `dschat_kernels.packing.digests`.

Integers are added modulo 2^64, so the order does not matter.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dschat_kernels.triton._launch import Config, launch

BLOCK = 4096
PER_PROGRAM = 8
"""Blocks a program reads."""


@triton.jit
def _digest(words, sums, count, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], tl.int64)
    for block in range(BLOCKS):
        place = (program * BLOCKS + block) * BLOCK + tl.arange(0, BLOCK)
        word = tl.load(words + place, mask=place < count, other=0).to(tl.int64)
        factor = (place + 0x632BE59BD9B4E019) * 0x1E3779B97F4A7C15
        factor = factor ^ (factor >> 29)
        factor = (factor + 0x632BE59BD9B4E019) * 0x3F58476D1CE4E5B9
        factor = factor ^ (factor >> 29)
        total += word * (factor | 1)
    tl.store(sums + program, tl.sum(total, 0))


def digest(words: Tensor) -> Tensor:
    """int64 scalar, on the device of the int32 `words` [n]."""
    programs = -(-len(words) // (BLOCK * PER_PROGRAM))
    sums = torch.zeros(programs, dtype=torch.int64, device=words.device)
    launch(
        _digest, (programs,),
        {"words": words, "sums": sums, "count": len(words), "BLOCK": BLOCK, "BLOCKS": PER_PROGRAM},
        Config(num_warps=16, num_stages=1),
    )  # fmt: skip
    return sums.sum()

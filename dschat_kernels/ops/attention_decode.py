"""attention() with the keys split among threads: for few query tokens over a long context.

The formula, the arguments and the bits are those of `dschat_kernels.ops.attention`: splits are cut between
chunks of 256 keys, and chunks are folded in order whoever computed them.
"""

from __future__ import annotations

from torch import Tensor

from dschat_kernels.ops._common import LIBRARY, check, register
from dschat_kernels.ops.attention import (
    _CACHE,
    _OPTIONS,
    attention_cpu,
    attention_fake,
    attention_reference,
    run,
)


def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    cu_seqlens: Tensor,
    kv_lens: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    slots: Tensor | None = None,
    num_splits: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """`attention` of one or a few query tokens a row; num_splits key ranges a row and head (None: chosen).

    See `dschat_kernels.ops.attention.attention` for the other arguments and errors.
    """
    check(
        num_splits is None or num_splits >= 1,
        f"attention_decode: num_splits is {num_splits}; give a positive number, or None to have it chosen.",
    )
    return run(
        "attention_decode", q, k_cache, v_cache, block_table, cu_seqlens, kv_lens, scale, window, softcap,
        alibi_slopes, slots, backend, num_splits or 0,
    )  # fmt: skip


attention_decode_reference = attention_reference

LIBRARY.define(f"attention_decode({_CACHE}, {_OPTIONS}, int num_splits) -> Tensor")

register("attention_decode", attention_cpu, attention_fake)

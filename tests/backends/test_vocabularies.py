"""Triton's programs share a row of logits: vocabularies of more parts and of more chunks than one program takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dschat_kernels import sample
from dschat_kernels.ops.sample import sample_reference
from dschat_kernels.triton import installed
from tests.backends.backends import BACKENDS, Backend
from tests.paged import same_bits

COMPILED = [b.parameter() for b in BACKENDS if b.name in ("triton-sm_80", "triton-gpu")]
LAST_ONLY = 131072 + 1024 * 3 - 5  # a second block of chunks, whose last chunk is not full


@pytest.mark.skipif(not installed(), reason="Triton is not installed")
@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize(
    ("vocab", "options"),
    [
        (9001, {"top_k": 5000, "top_p": 0.9, "min_p": 1e-4}),
        (9001, {"top_p": 0.5}),
        (LAST_ONLY, {}),
        (LAST_ONLY, {"temperature": 0.0}),
        (LAST_ONLY, {"top_k": 3}),
    ],
    ids=str,
)
def test_tokens_are_the_references(backend: Backend, vocab: int, options: dict[str, Any]) -> None:
    if backend.missing:
        pytest.skip(backend.missing)
    with backend.within(), torch.device(backend.device):
        logits = (torch.randn(3, vocab) * 2).bfloat16()
        logits[1] = 0.0  # ties everywhere
        logits[2, -1] = 30.0  # the last of all
        where = {"streams": torch.arange(3), "positions": torch.arange(3), "seed": 11}
        tokens, log_probs = sample(logits, backend="triton", **where, **options)
        expected = sample_reference(logits, **where, **options)
        assert torch.equal(tokens, expected[0])
        torch.testing.assert_close(log_probs, expected[1], rtol=1e-6, atol=4e-6)
        one = {**where, "streams": where["streams"][1:2], "positions": where["positions"][1:2]}
        alone = sample(logits[1:2], backend="triton", **one, **options)
        assert torch.equal(alone[0], tokens[1:2]) and same_bits(alone[1], log_probs[1:2])

"""A real tiny Llama generates through the triton backend, in the interpreter, with HF's greedy tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dschat_kernels.models.spec import decoder_spec
from dschat_kernels.plan import Decoder
from tests.triton_kernels.interpreter import interpreter

NEW = 6


def test_greedy_tokens_are_hfs(stories_model: Any) -> None:
    prompts = [[1, 403, 407, 261, 378], [1, 410]]
    expected = [
        stories_model.generate(torch.tensor([p]), max_new_tokens=NEW, do_sample=False, eos_token_id=None)[
            0, len(p) :
        ]
        for p in prompts
    ]
    with interpreter():
        decoder = Decoder(decoder_spec(stories_model), backend="triton")
        decoder.refresh()
        cache = decoder.new_cache(2, 32)
        tokens = torch.tensor([t for p in prompts for t in p])
        logits = decoder.step(tokens, cache, [0, 1], [len(p) for p in prompts])
        picked = [logits.argmax(-1)]
        for _ in range(NEW - 1):
            picked.append(decoder.step(picked[-1], cache, [0, 1]).argmax(-1))
    assert torch.equal(torch.stack(picked, 1), torch.stack(expected))


def test_a_cpu_model_needs_another_backend(stories_model: Any) -> None:
    with pytest.raises(ValueError, match="decoder: the triton backend needs tensors on a GPU, not on cpu"):
        Decoder(decoder_spec(stories_model), backend="triton")

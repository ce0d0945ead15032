"""A whole decoder through the plan on the emulated CUDA kernels: HF's greedy tokens, and the reference's logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dschat_kernels.models import decoder_spec
from dschat_kernels.plan import Decoder
from tests.helpers import cuda_refusal


def greedy(decoder: Decoder, prompt: torch.Tensor, count: int) -> tuple[list[int], torch.Tensor]:
    """Tokens that follow the prompt, and the logits that chose them."""
    cache = decoder.new_cache(1, len(prompt) + count)
    tokens, seen, step = [], [], prompt
    for _ in range(count):
        logits = decoder.step(step, cache, [0], [len(step)])
        seen.append(logits[0])
        tokens.append(int(logits[0].argmax()))
        step = torch.tensor(tokens[-1:])
    return tokens, torch.stack(seen)


def test_greedy_tokens_are_hfs(cuda: Any, stories_model: Any, stories_tokenizer: Any) -> None:
    """float32, prompt and 12 tokens across a page of the cache."""
    text = "Once upon a time, there was a little girl named Lily. She loved to play"
    prompt = torch.tensor(stories_tokenizer(text).input_ids)
    prompt = torch.cat([prompt, prompt])[:58]
    expected = stories_model.generate(prompt[None], max_new_tokens=12, do_sample=False)[0, len(prompt) :]
    results = {}
    for backend in ("cuda", "reference"):
        decoder = Decoder(decoder_spec(stories_model), backend=backend)
        decoder.refresh()
        results[backend] = greedy(decoder, prompt, 12)
    tokens, logits = results["cuda"]
    assert tokens == expected.tolist()
    torch.testing.assert_close(logits, results["reference"][1], rtol=1e-4, atol=1e-4)


def test_a_model_on_the_cpu_is_refused_with_the_reason(stories_model: Any) -> None:
    error, message = cuda_refusal()
    with pytest.raises(error, match=f"decoder: {message}"):
        Decoder(decoder_spec(stories_model), backend="cuda")

"""Steps that feed themselves: one call of the native plan against a step and a sample at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from dschat_kernels.executors import Draw
from dschat_kernels.ops.sample import sample
from dschat_kernels.plan import Decoder
from tests.test_plan import NAMES, decoder_of, model_of, rows_of

STEPS = 9


def filled(decoder: Decoder) -> tuple[Any, list[int]]:
    """A cache that holds a prompt in each of some slots, in any order, one of them shared with a copy."""
    rows, slots = rows_of(decoder), [4, 1, 5, 0]
    cache = decoder.new_cache(7, 96)
    decoder.step(torch.cat(rows), cache, slots, [len(r) for r in rows], "none")
    cache.fork(5, 2)
    return cache, [*slots, 2]


def drawing(rows: int, **settings: Any) -> Draw:
    return Draw(**settings, streams=torch.arange(rows) * 77 + 3, positions=torch.arange(rows) * 2)


def one_by_one(decoder: Decoder, draw: Draw, steps: int) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Tokens and log-probs [steps, rows] by `step` and `ops.sample`, and the cache afterwards."""
    cache, slots = filled(decoder)
    last, tokens, log_probs = torch.arange(len(slots)) + 5, [], []
    for i in range(steps):
        settings = vars(replace(draw, positions=draw.positions + i))
        last, found = sample(decoder.step(last, cache, slots), **settings, backend=decoder.backend)
        tokens.append(last)
        log_probs.append(found)
    return torch.stack(tokens), torch.stack(log_probs), cache


@pytest.mark.parametrize(
    "settings", [{"temperature": 0.0}, {"seed": 5}, {"temperature": 0.7, "top_k": 8, "top_p": 0.9}]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_all_steps_at_once_have_the_bits_of_one_by_one(name: str, dtype: torch.dtype, settings: Any) -> None:
    check_all_steps(decoder_of(model_of(name, dtype)), settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_steps_at_once_over_an_int8_cache(dtype: torch.dtype) -> None:
    check_all_steps(decoder_of(model_of("llama", dtype), kv_cache="int8"), {"seed": 5})


def check_all_steps(decoder: Decoder, settings: Any) -> None:
    draw = drawing(5, **settings)
    tokens, log_probs, there = one_by_one(decoder, draw, STEPS)
    cache, slots = filled(decoder)
    first = decoder.decode(torch.arange(5) + 5, cache, slots, draw, 4)
    second = decoder.decode(
        first.tokens[-1], cache, slots, replace(draw, positions=draw.positions + 4), STEPS - 4
    )
    assert torch.equal(torch.cat([first.tokens, second.tokens]), tokens)
    assert torch.equal(torch.cat([first.log_probs, second.log_probs]), log_probs)
    assert first.sampling > 0.0
    assert [cache.length(s) for s in slots] == [there.length(s) for s in slots]
    for slot in slots:
        assert all(map(torch.equal, cache.gather(slot, 0), there.gather(slot, 0)))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_it_ends_with_the_step_that_draws_an_end(backend: str) -> None:
    decoder = decoder_of(model_of("stories"), backend=backend)
    draw = drawing(5, seed=5)
    tokens, _, _ = one_by_one(decoder, draw, STEPS)
    end = int(tokens[3, 2])
    last = int((tokens == end).any(1).nonzero()[0])  # the first step that has it
    cache, slots = filled(decoder)
    before, got, ids = [cache.length(s) for s in slots], [], torch.arange(5) + 5
    while not got or end not in got[-1]:
        drawn = decoder.decode(
            ids, cache, slots, replace(draw, positions=draw.positions + len(got)), STEPS, [99999, end]
        )
        got += drawn.tokens.unbind()
        ids = got[-1]
    assert torch.equal(torch.stack(got), tokens[: last + 1])
    assert [cache.length(s) for s in slots] == [n + last + 1 for n in before]


def test_one_step_at_a_time_where_the_plan_is_not_walked_natively() -> None:
    model = model_of("llama")
    tokens, log_probs, _ = one_by_one(decoder_of(model), drawing(5, seed=5), 1)
    traced = decoder_of(model)
    traced.executor.trace = lambda call, out: None
    for decoder in (traced, decoder_of(model, max_tokens=3)):
        cache, slots = filled(decoder)
        drawn = decoder.decode(torch.arange(5) + 5, cache, slots, drawing(5, seed=5), STEPS)
        assert torch.equal(drawn.tokens, tokens) and torch.equal(drawn.log_probs, log_probs)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_bad_decodes_get_a_sentence_and_change_nothing(backend: str) -> None:
    decoder = decoder_of(model_of("llama"), backend=backend)
    cache, slots = filled(decoder)
    ids, lengths = torch.arange(5) + 5, [cache.length(s) for s in slots]
    for error, words, draw, steps in (
        (ValueError, "steps is 0", drawing(5), 0),
        (ValueError, "temperature is -1", drawing(5, temperature=-1.0), 2),
        (ValueError, "streams is None", Draw(), 2),
        (ValueError, r"give \[5\]", drawing(4), 2),
        (TypeError, "dtype torch.int32", replace(drawing(5), streams=torch.zeros(5, dtype=torch.int32)), 2),
    ):
        with pytest.raises(error, match=words):
            decoder.decode(ids, cache, slots, draw, steps)
        assert [cache.length(s) for s in slots] == lengths
    with torch.no_grad():
        decoder.spec.final_norm.tensors()[0][:] = float("nan")
    decoder.refresh()
    with pytest.raises(ValueError, match="row 0 of logits has a NaN"):
        decoder.decode(ids, cache, slots, drawing(5), 3)


def test_more_steps_than_a_slot_holds_are_refused_before_the_first() -> None:
    decoder = decoder_of(model_of("llama"))
    cache, slots = filled(decoder)
    lengths = [cache.length(s) for s in slots]
    room = cache.max_length - max(lengths)
    with pytest.raises(ValueError, match="would hold 129 tokens and a slot is limited to 128"):
        decoder.decode(torch.arange(5) + 5, cache, slots, drawing(5), room + 1)
    assert [cache.length(s) for s in slots] == lengths
    assert 1 <= len(decoder.decode(torch.arange(5) + 5, cache, slots, drawing(5), room).tokens) <= room

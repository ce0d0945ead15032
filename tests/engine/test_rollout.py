"""Rollouts: what is drawn, that only (weights, prompt, sampling, seed) decide it, and how rows are scheduled."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from dschat import HybridEngine, SamplingConfig
from dschat.engine import hybrid_engine
from dschat.engine import rollout as module
from dschat.engine.rollout import (
    Rollout,
    RolloutRun,
    fit_rows,
    slot_bytes,
    slots_needed,
    stats_dict,
    step_bytes,
)
from dschat_kernels.cache import PagedKVCache
from dschat_kernels.executors import Drawn
from dschat_kernels.plan import Decoder
from tests.tiny_models import build

PROMPTS = ([5, 6, 7, 8, 9, 10], [11], [12, 13, 14], [15, 16, 17, 18], [3] * 9)
Pair = tuple[torch.Tensor, torch.Tensor]


def left(prompts: Any, extra: int = 0) -> Pair:
    """Left-padded ids with rubbish in the padding, and the mask."""
    width = max(map(len, prompts)) + extra
    ids = torch.full((len(prompts), width), 66)
    mask = torch.zeros(len(prompts), width, dtype=torch.bool)
    for i, p in enumerate(prompts):
        ids[i, width - len(p) :] = torch.tensor(p)
        mask[i, width - len(p) :] = True
    return ids, mask


@pytest.fixture(scope="module")
def engine() -> HybridEngine:
    return HybridEngine(build("llama"))


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[RolloutRun]:
    """Every run that is made."""
    made: list[RolloutRun] = []
    init = RolloutRun.__init__

    def recorded(self: RolloutRun, *args: Any, **options: Any) -> None:
        init(self, *args, **options)
        made.append(self)

    monkeypatch.setattr(RolloutRun, "__init__", recorded)
    return made


def same(a: Rollout, b: Rollout) -> bool:
    return torch.equal(a.completion_ids, b.completion_ids) and torch.equal(a.logprobs, b.logprobs)


# ------------------------------------------------------------------------------------------------ what is drawn


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2-window", "gpt2", "opt", "opt-350m"])
def test_greedy_is_hf_generate_with_left_padding(name: str) -> None:
    model = build(name)
    ids, mask = left(PROMPTS)
    ours = HybridEngine(model).generate(
        ids, mask, SamplingConfig(max_new_tokens=12, temperature=0.0, eos_token_id=2, pad_token_id=0)
    )
    hf = model.generate(
        ids, attention_mask=mask.long(), max_new_tokens=12, do_sample=False, eos_token_id=2, pad_token_id=0
    )[:, ids.shape[1] :]
    assert torch.equal(ours.completion_ids, hf)
    assert ours.input_ids.shape == ours.attention_mask.shape == (5, ids.shape[1] + hf.shape[1])


def test_a_row_is_the_same_whatever_is_around_it(engine: HybridEngine) -> None:
    sampling = SamplingConfig(max_new_tokens=9, n=3, seed=4, eos_token_id=[2, 9], top_p=0.9)
    whole = engine.generate(*left(PROMPTS), sampling)
    for slots in (1, 2, 4, 7):
        assert same(HybridEngine(engine.model, max_slots=slots).generate(*left(PROMPTS), sampling), whole)
    order = [3, 0, 4, 2, 1]
    turned = engine.generate(*left([PROMPTS[i] for i in order], extra=3), sampling)
    index = torch.tensor([3 * i + j for i in order for j in range(3)])
    assert same(turned, whole.select(index))
    fewer = SamplingConfig(max_new_tokens=9, n=1, seed=4, eos_token_id=[2, 9], top_p=0.9)
    for i, prompt in enumerate(PROMPTS):
        alone = engine.generate(torch.tensor([prompt]), None, fewer)
        width = alone.completion_ids.shape[1]
        assert torch.equal(alone.completion_ids[0], whole.completion_ids[3 * i, :width])
        assert torch.equal(alone.logprobs[0], whole.logprobs[3 * i, :width])


def test_seeds_samples_and_repeated_prompts_differ(engine: HybridEngine) -> None:
    def draw(prompts: Any, **settings: Any) -> list[tuple[int, ...]]:
        out = engine.generate(*left(prompts), SamplingConfig(max_new_tokens=12, **settings))
        return [tuple(row) for row in out.completion_ids.tolist()]

    first = draw(PROMPTS, n=2, seed=1)
    assert draw(PROMPTS, n=2, seed=1) == first
    other = draw(PROMPTS, n=2, seed=2)
    assert all(a != b for a, b in zip(first, other, strict=True))
    assert len(set(first)) == 10
    twice = draw([PROMPTS[0], PROMPTS[1], PROMPTS[0]], n=2, seed=1)
    assert len(set(twice)) == 6
    assert twice[:2] == first[:2]
    assert twice[:2] + twice[4:] == draw([PROMPTS[0]], n=4, seed=1)  # as if drawn together


def test_logprobs_are_the_softmax_at_the_temperature(engine: HybridEngine) -> None:
    for temperature in (0.0, 0.6, 1.7):
        sampling = SamplingConfig(max_new_tokens=6, temperature=temperature, top_k=20, seed=3)
        out = engine.generate(*left(PROMPTS), sampling)
        wide = build("llama").double()
        for i, prompt in enumerate(PROMPTS):
            row = torch.tensor(prompt + out.completion_ids[i].tolist())
            with torch.no_grad():
                logits = wide(row[None]).logits[0, len(prompt) - 1 : -1] / (temperature or 1.0)
            exact = logits.log_softmax(-1).gather(1, out.completion_ids[i][:, None])[:, 0]
            torch.testing.assert_close(out.logprobs[i].double(), exact, rtol=1e-4, atol=1e-4)
            ranks = (logits > logits.gather(1, out.completion_ids[i][:, None])).sum(1)
            assert int(ranks.max()) < (20 if temperature else 1)


def test_first_tokens_have_the_models_distribution(engine: HybridEngine) -> None:
    """Chi-square over 3,000 samples of one prompt and over 600 seeds; 99.99 % quantiles."""
    prompt = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        p = (engine.model(prompt).logits[0, -1].double() / 1.5).softmax(-1)  # type: ignore[operator]
    many = engine.generate(prompt, None, SamplingConfig(max_new_tokens=1, temperature=1.5, n=3000))
    seeds = [
        engine.generate(
            prompt, None, SamplingConfig(max_new_tokens=1, temperature=1.5, seed=s)
        ).completion_ids
        for s in range(600)
    ]
    for drawn in (many.completion_ids.flatten(), torch.cat(seeds).flatten()):
        order = p.argsort(descending=True)
        expected, counts = p[order] * len(drawn), torch.bincount(drawn, minlength=67)[order].double()
        big = int((expected >= 5).sum())
        expected = torch.cat([expected[:big], expected[big:].sum()[None]]).clamp_min(1e-9)
        counts = torch.cat([counts[:big], counts[big:].sum()[None]])
        chi2 = float(((counts - expected) ** 2 / expected).sum())
        freedom = len(counts) - 1
        assert freedom >= 5
        assert chi2 < freedom + 3.72 * (2 * freedom) ** 0.5 + 8, (chi2, freedom)


# --------------------------------------------------------------------------------------------------- the ends


def test_completion_mask_keeps_the_first_eos(engine: HybridEngine) -> None:
    free = engine.generate(*left(PROMPTS), SamplingConfig(max_new_tokens=30, n=4, temperature=2.0))
    assert free.completion_mask.all() and free.completion_ids.shape == (20, 30) and not free.finished.any()
    for eos, pad in ((7, 0), (7, 7), ([7, 21, 40], 7), ([7, 21, 40], None)):
        sampling = SamplingConfig(max_new_tokens=30, n=4, temperature=2.0, eos_token_id=eos, pad_token_id=pad)
        out = engine.generate(*left(PROMPTS), sampling)
        ends = {eos} if isinstance(eos, int) else set(eos)
        assert 0 < int(out.finished.sum()) < 20
        for row in range(20):
            tokens = free.completion_ids[row].tolist()  # what EOS cuts short is otherwise the same
            stop = next((i for i, t in enumerate(tokens) if t in ends), None)
            length = 30 if stop is None else stop + 1
            assert bool(out.finished[row]) == (stop is not None)
            assert out.completion_mask[row].tolist() == [
                i < length for i in range(out.completion_ids.shape[1])
            ]
            assert out.completion_ids[row, :length].tolist() == tokens[:length]
            assert (out.completion_ids[row, length:] == (0 if pad is None else pad)).all()
            assert (out.logprobs[row, length:] == 0).all()
            assert torch.equal(out.logprobs[row, :length], free.logprobs[row, :length])


def test_eos_as_the_last_allowed_token_counts_as_finished(engine: HybridEngine) -> None:
    ids, mask = left(PROMPTS[:1])
    token = int(engine.generate(ids, mask, SamplingConfig(max_new_tokens=1)).completion_ids)
    out = engine.generate(ids, mask, SamplingConfig(max_new_tokens=1, eos_token_id=token))
    assert out.finished.tolist() == [True] and out.completion_mask.tolist() == [[True]]


def test_on_token_sees_every_token_in_order(engine: HybridEngine) -> None:
    seen: dict[int, list[int]] = {}
    out = HybridEngine(engine.model, max_slots=3).generate(
        *left(PROMPTS),
        SamplingConfig(max_new_tokens=5, n=2, eos_token_id=7, temperature=2.0),
        on_token=lambda row, token: seen.setdefault(row, []).append(token),
    )
    expected = {r: out.completion_ids[r][out.completion_mask[r]].tolist() for r in range(10)}
    assert seen == expected


# -------------------------------------------------------------------------------------------------- scheduling


@pytest.mark.parametrize(("n", "max_slots"), [(1, 2), (1, 64), (4, 1), (4, 3), (4, 6), (4, 64)])
def test_prompts_are_prefilled_once_and_nothing_leaks(n: int, max_slots: int, runs: list[RolloutRun]) -> None:
    engine = HybridEngine(build("llama"), max_slots=max_slots)
    out = engine.generate(
        *left(PROMPTS), SamplingConfig(max_new_tokens=7, n=n, eos_token_id=7, temperature=2.0)
    )
    (run,) = runs
    assert out.stats.prefilled_tokens == out.stats.prompt_tokens == sum(map(len, PROMPTS))
    assert out.stats.completion_tokens == int(out.completion_mask.sum())
    assert out.stats.slots == min(max_slots, 5 * n)
    assert run.cache.free_pages == run.cache.num_pages
    assert sorted(run.free) == list(range(run.cache.num_slots))
    assert run.cache.num_slots == out.stats.slots + (n > 1)
    assert stats_dict(out.stats)["tokens_per_second"] > 0


def test_finished_rows_leave_and_waiting_rows_enter(engine: HybridEngine) -> None:
    """With two slots the steps are those of a queue: every row takes its length, two at a time."""
    sampling = SamplingConfig(max_new_tokens=20, temperature=2.0, eos_token_id=[7, 21, 40], seed=1)
    one = HybridEngine(engine.model, max_slots=1).generate(*left(PROMPTS), sampling)
    lengths = one.completion_mask.sum(1).tolist()
    assert one.stats.steps == sum(lengths) - 5  # the first token of a row needs no step
    assert len(set(lengths)) > 2
    two = HybridEngine(engine.model, max_slots=2).generate(*left(PROMPTS), sampling)
    busy = [0, 0]
    for length in lengths:
        busy.sort()
        busy[0] += length - 1
    assert two.stats.steps == max(busy)
    assert engine.generate(*left(PROMPTS), sampling).stats.steps == max(lengths) - 1


def test_samples_share_the_prompts_pages(engine: HybridEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[int] = []

    def watched(self: Decoder, tokens: torch.Tensor, cache: PagedKVCache, *given: Any) -> Drawn:
        drawn = decode(self, tokens, cache, *given)
        used.append(cache.num_pages - cache.free_pages)
        return drawn

    decode = Decoder.decode
    monkeypatch.setattr(Decoder, "decode", watched)
    prompt = torch.full((1, 100), 5)
    prompt[0, 50] = 9
    engine.generate(prompt, None, SamplingConfig(max_new_tokens=5, n=8))
    assert used[0] == 1 + 8  # the full page once, the partial one for each


def test_the_next_rollout_has_the_cache_of_the_last(
    engine: HybridEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it is large enough and small beside the free memory; what is left in it changes nothing."""
    made: list[PagedKVCache] = []

    def counted(self: Decoder, *given: Any, **named: Any) -> PagedKVCache:
        made.append(new_cache(self, *given, **named))
        return made[-1]

    new_cache = Decoder.new_cache
    monkeypatch.setattr(Decoder, "new_cache", counted)
    large, small = SamplingConfig(max_new_tokens=9, n=2, seed=3), SamplingConfig(max_new_tokens=4, seed=4)
    fresh = HybridEngine(engine.model)
    first = fresh.generate(*left(PROMPTS), large)
    assert len(made) == 1
    made[0].k.fill_(float("nan")), made[0].v[..., : made[0].head_dim].fill_(float("nan"))
    fresh.generate(*left(PROMPTS[:2]), small)
    assert same(fresh.generate(*left(PROMPTS), large), first)
    assert len(made) == 1
    fresh.generate(*left(PROMPTS), replace(large, n=3))
    assert len(made) == 2
    fresh.release()
    assert same(fresh.generate(*left(PROMPTS), large), first)
    assert len(made) == 3
    monkeypatch.setattr(hybrid_engine, "available_memory", lambda: made[2].bytes_per_page * 8)
    fresh.generate(*left(PROMPTS), large)
    fresh.generate(*left(PROMPTS), large)
    assert len(made) == 4


def test_samples_that_end_at_once_do_not_stall(engine: HybridEngine) -> None:
    """Many samples a prompt, one slot, and every sample ends with its first token."""
    one = HybridEngine(engine.model, max_slots=1)
    out = one.generate(*left(PROMPTS), SamplingConfig(max_new_tokens=1, n=8))
    assert out.completion_ids.shape == (40, 1) and out.stats.steps == 0
    assert same(out, engine.generate(*left(PROMPTS), SamplingConfig(max_new_tokens=1, n=8)))


def test_little_memory_means_fewer_rows_and_the_same_tokens(
    engine: HybridEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in (1, 3):
        sampling = SamplingConfig(max_new_tokens=8, n=n)
        plenty = engine.generate(*left(PROMPTS), sampling)
        slot, row = slot_bytes(engine.decoder, 9 + 8), step_bytes(engine.decoder, 0, 1)
        buffers = step_bytes(engine.decoder, 64, 0)
        need = slot * (2 + (n > 1)) + 2 * row + buffers
        monkeypatch.setattr(module, "available_memory", lambda need=need: int(need / 0.75) + 9)
        assert (
            engine.generate(*left(PROMPTS), sampling).stats.slots == plenty.stats.slots
        )  # it has that cache
        engine.release()
        tight = engine.generate(*left(PROMPTS), sampling)
        assert tight.stats.slots == 2 < plenty.stats.slots
        assert same(tight, plenty)
        monkeypatch.setattr(module, "available_memory", lambda: 1000)
        engine.release()
        with pytest.raises(
            MemoryError,
            match=r"one row needs 0\.\d MiB of cache and 0\.\d MiB of buffers, and 0.0 MiB may be used \(.*\): shorten",
        ):
            engine.generate(*left(PROMPTS), sampling)
        monkeypatch.undo()


def test_limits_end_rows_and_change_nothing_else(engine: HybridEngine) -> None:
    sampling = SamplingConfig(max_new_tokens=9, n=2, seed=5)
    limits = [1, 9, 4, 2, 6]
    whole = engine.generate(*left(PROMPTS), sampling)
    out = HybridEngine(engine.model, max_slots=3).generate(*left(PROMPTS), sampling, limits=limits)
    assert out.completion_mask.sum(1).tolist() == [n for n in limits for _ in range(2)]
    assert torch.equal(out.completion_ids[out.completion_mask], whole.completion_ids[out.completion_mask])
    assert torch.equal(out.logprobs[out.completion_mask], whole.logprobs[out.completion_mask])
    for bad, message in (
        ([1, 2], "limits has 2 numbers for 5 prompts"),
        ([1, 2, 3, 4, 10], "limits holds 10: give numbers from 1 to max_new_tokens, which is 9"),
        ([0, 2, 3, 4, 5], "limits holds 0"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.generate(*left(PROMPTS), sampling, limits=bad)


def test_step_bytes_is_what_the_buffers_take() -> None:
    engine = HybridEngine(build("llama-bias"), backend="cpu")
    prompts = left([[1, 2, 3] * 5, [4, 5] * 4])
    out = engine.generate(*prompts, SamplingConfig(max_new_tokens=3, n=2))
    executor: Any = engine.decoder.executor
    held = sum(b.nbytes for b in executor.buffers.values())
    logits = executor.buffers["logits"]
    idle_sel = (23 - 4) * executor.buffers["sel"][0].nbytes  # planned for every token, used by the last ones
    assert len(out) == 4 and logits.shape[0] == 4
    assert step_bytes(engine.decoder, 23, 4) == held + 2 * logits.nbytes + idle_sel


def test_slot_bytes_is_what_a_cache_takes(engine: HybridEngine) -> None:
    for dtype, kind in ((torch.float32, "auto"), (torch.bfloat16, "auto"), (torch.bfloat16, "int8")):
        decoder = HybridEngine(build("llama-bias", head_dim=20), dtype=dtype, kv_cache=kind).decoder
        for tokens in (1, 64, 65, 200):
            cache = decoder.new_cache(1, tokens)
            assert slot_bytes(decoder, tokens) == cache.num_pages * cache.bytes_per_page
            assert slot_bytes(decoder, tokens) == cache.k.nbytes + cache.v.nbytes
    assert [slots_needed(4, n) for n in (1, 2, 9)] == [4, 5, 5]


def test_unknown_memory_is_not_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "available_memory", lambda: None)
    assert fit_rows(7, 2, 2**50) == 7
    monkeypatch.undo()
    memory = module.available_memory()
    assert memory is None or memory > 0


def test_select(engine: HybridEngine) -> None:
    out = engine.generate(*left(PROMPTS), SamplingConfig(max_new_tokens=3, n=2))
    for rows in (slice(2, 5), [4, 1], torch.tensor([4, 1]), torch.arange(10) % 3 == 0):
        part = out.select(rows)
        index = rows if isinstance(rows, slice) else torch.as_tensor(rows)
        assert torch.equal(part.logprobs, out.logprobs[index]) and len(part) == len(part.finished)
        assert torch.equal(part.prompt_ids, out.prompt_ids[index]) and part.sampling is out.sampling


# -------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0: generate at least 1"),
        ({"temperature": -0.1}, r"temperature is -0\.1: give a number from 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_k": -1}, "top_k is -1: give a number of tokens, or 0"),
        ({"top_p": 0.0}, r"top_p is 0\.0: give a probability above 0"),
        ({"top_p": 1.1}, r"top_p is 1\.1"),
        ({"min_p": -0.5}, r"min_p is -0\.5: give a share"),
        ({"n": 0}, "n is 0: draw at least 1"),
        ({"seed": -1}, "seed is -1: give a whole number"),
        ({"seed": 2**63}, "seed is 9223372036854775808"),
    ],
)
def test_bad_settings_get_a_sentence(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        SamplingConfig(**settings)


def test_bad_batches_get_a_sentence(engine: HybridEngine, runs: list[RolloutRun]) -> None:
    ids, mask = left(PROMPTS)
    empty = mask.clone()
    empty[1] = False
    outside = ids.clone()
    outside[2, -1] = 67
    cases: list[tuple[type[Exception], str, Any, Any]] = [
        (ValueError, "row 1 of the batch has no token: its attention mask is all zero", ids, empty),
        (ValueError, "row 0 of the batch has no token", torch.zeros(2, 0).long(), None),
        (ValueError, "input_ids hold no prompt: give at least one row", ids[:0], mask[:0]),
        (TypeError, r"attention_mask is torch.float32: give booleans or 0 and 1", ids, mask.float()),
        (ValueError, "attention_mask holds other values than 0 and 1", ids, mask.long() * 2),
        (ValueError, r"attention_mask has shape \[5, 8\] and input_ids \[5, 9\]: give one shape", ids, mask[:, 1:]),
        (TypeError, r"input_ids are torch.int32 of shape \[5, 9\]: give int64", ids.int(), mask),
        (TypeError, r"of shape \[9\]: give int64 \[rows, columns\]", ids[0], mask[0]),
        (TypeError, "input_ids is a list: give a torch.Tensor", ids.tolist(), None),
        (TypeError, "attention_mask is a list: give a torch.Tensor", ids, mask.tolist()),
        (ValueError, "input_ids is on meta, without values: give it on the CPU or on the model's device",
         ids.to("meta"), mask),
        (ValueError, "attention_mask is on meta", ids, mask.to("meta")),
        (ValueError, "prompt 2 holds token 67, outside the vocabulary of 67: check the tokenizer", outside, mask),
        (ValueError, "prompt 2 holds token -1, outside", outside - 68 * (outside == 67), mask),
        (ValueError, "prompt 0 has 126 tokens and max_new_tokens is 3, more than the model's context of 128",
         torch.full((1, 126), 5), None),
    ]  # fmt: skip
    for error, match, bad_ids, bad_mask in cases:
        with pytest.raises(error, match=match):
            engine.generate(bad_ids, bad_mask, SamplingConfig(max_new_tokens=3))
    assert not runs
    engine.generate(torch.full((1, 125), 5), None, SamplingConfig(max_new_tokens=3))

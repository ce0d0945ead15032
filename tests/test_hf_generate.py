"""model.generate() of a patched model: transformers' loop and options, the fused decoder's logits."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from tiny_models import CONFIGS, MECHANISMS, build, randomise, stories
from transformers.activations import SiLUActivation

import dschat_kernels as dk
from dschat_kernels.hf_cache import PagedDynamicCache
from dschat_kernels.patch import Patch

NEVER = {"eos_token_id": None, "pad_token_id": 0}


def padded(vocab: int = 67, rows: int = 4, columns: int = 12) -> dict[str, torch.Tensor]:
    """A left-padded batch; the last row is full."""
    ids = torch.randint(3, vocab, (rows, columns), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    for row in range(rows - 1):
        mask[row, : columns - 2 - 3 * row] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def tokens(model: Any, inputs: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
    torch.manual_seed(0)
    return model.generate(**inputs, **{"max_new_tokens": 8, "do_sample": False, **NEVER, **options})


def fused_only(patch: Patch) -> None:
    """Nothing went to transformers' forward."""
    report = patch.report()
    assert report.decoder.startswith("fused decoder") and not report.notes, report.notes


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-4 * float(theirs.abs().max()))


@pytest.fixture(scope="module")
def models() -> Iterator[tuple[Any, Any, Patch]]:
    """The real model twice: transformers' and patched."""
    plain, model = stories(), stories()
    with dk.patch(model, strict=True) as patch:
        yield plain, model, patch


@pytest.fixture
def pair(models: tuple[Any, Any, Patch]) -> tuple[Any, Any, Patch]:
    models[2]._notes.clear()
    return models


class TestGreedy:
    @pytest.mark.parametrize("name", CONFIGS)
    def test_left_padded_batch(self, name: str) -> None:
        model, inputs = build(name), padded()
        theirs = tokens(model, inputs, output_logits=True, return_dict_in_generate=True)
        with dk.patch(model, strict=True) as patch:
            ours = tokens(model, inputs, output_logits=True, return_dict_in_generate=True)
            fused_only(patch)
        assert torch.equal(ours.sequences, theirs.sequences)
        for mine, hf in zip(ours.logits, theirs.logits, strict=True):
            assert mine.shape == hf.shape and mine.dtype == hf.dtype
            close(mine, hf)
        assert isinstance(ours.past_key_values, PagedDynamicCache)

    def test_real_weights(self, pair: tuple[Any, Any, Patch]) -> None:
        plain, model, patch = pair
        inputs = padded(512, rows=3, columns=16)
        assert torch.equal(tokens(model, inputs, max_new_tokens=50), tokens(plain, inputs, max_new_tokens=50))
        assert torch.equal(
            tokens(model, inputs, max_new_tokens=50, eos_token_id=[1, 300]),
            tokens(plain, inputs, max_new_tokens=50, eos_token_id=[1, 300]),
        )
        fused_only(patch)

    @pytest.mark.parametrize("name", ["llama", "gpt2", "opt-350m"])
    def test_reference_backend(self, name: str) -> None:
        """What runs where there is no compiler."""
        model, inputs = build(name), padded()
        theirs = tokens(model, inputs, num_beams=2)
        with dk.patch(model, strict=True, backend="reference") as patch:
            assert patch.report().decoder == "fused decoder (reference)"
            assert {e.backend for e in patch.report().entries} <= {"reference", ""}
            assert torch.equal(tokens(model, inputs, num_beams=2), theirs)
            fused_only(patch)

    def test_inferred_mask_and_no_padding(self, pair: tuple[Any, Any, Patch]) -> None:
        plain, model, patch = pair
        for inputs in ({"input_ids": padded(512)["input_ids"]}, {"input_ids": torch.tensor([[1, 403, 407]])}):
            options = {"eos_token_id": 1, "pad_token_id": 0}
            assert torch.equal(tokens(model, inputs, **options), tokens(plain, inputs, **options))
        assert torch.equal(tokens(model, {}, bos_token_id=1), tokens(plain, {}, bos_token_id=1))
        fused_only(patch)

    @pytest.mark.parametrize("name", MECHANISMS)
    def test_padded_is_unpadded_bitwise(self, name: str) -> None:
        model, inputs = build(name), padded()
        with dk.patch(model, strict=True) as patch:
            batch = tokens(model, inputs, output_logits=True, return_dict_in_generate=True)
            for row, mask in enumerate(inputs["attention_mask"].bool()):
                alone = tokens(
                    model, {"input_ids": inputs["input_ids"][row][mask][None]}, output_logits=True,
                    return_dict_in_generate=True,
                )  # fmt: skip
                assert torch.equal(alone.sequences[0, -8:], batch.sequences[row, -8:])
                for step in range(8):
                    assert torch.equal(alone.logits[step][0], batch.logits[step][row])
            fused_only(patch)


class TestOptions:
    """Everything that transformers' loop offers, on real weights: the same tokens."""

    @pytest.mark.parametrize(
        "options",
        [
            {"num_beams": 3},
            {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.5, "eos_token_id": 300},
            {"num_beams": 2, "do_sample": True},
            {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9},
            {"do_sample": True, "num_return_sequences": 3, "min_p": 0.05},
            {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
            {"min_new_tokens": 5, "eos_token_id": 300, "bad_words_ids": [[410]]},
            {"prefill_chunk_size": 5},
            {"use_cache": False},
            {"cache_implementation": "static"},
            {"max_time": 100.0, "max_length": 20, "max_new_tokens": None},
        ],
        ids=lambda o: "-".join(o),
    )
    def test_same_tokens(self, pair: tuple[Any, Any, Patch], options: dict[str, Any]) -> None:
        plain, model, _ = pair
        inputs = padded(512)
        assert torch.equal(tokens(model, inputs, **options), tokens(plain, inputs, **options))

    def test_beams_and_samples_stay_fused(self) -> None:
        model, inputs = stories(), padded(512)
        with dk.patch(model) as patch:
            tokens(model, inputs, num_beams=3, num_return_sequences=2)
            tokens(model, inputs, do_sample=True, num_return_sequences=2)
            fused_only(patch)

    @pytest.mark.parametrize("name", MECHANISMS)
    def test_beams(self, name: str) -> None:
        """Long enough for beams to part within a page and to cross into the next."""
        model, inputs = build(name), padded()
        options = {"num_beams": 4, "num_return_sequences": 4, "max_new_tokens": 60 if name == "llama" else 16}
        theirs = tokens(model, inputs, **options, output_scores=True, return_dict_in_generate=True)
        with dk.patch(model, strict=True) as patch:
            ours = tokens(model, inputs, **options, output_scores=True, return_dict_in_generate=True)
            fused_only(patch)
        assert torch.equal(ours.sequences, theirs.sequences)
        torch.testing.assert_close(ours.sequences_scores, theirs.sequences_scores, rtol=1e-4, atol=1e-4)

    def test_return_dict(self, pair: tuple[Any, Any, Patch]) -> None:
        plain, model, _ = pair
        options = {
            "output_scores": True,
            "output_logits": True,
            "return_dict_in_generate": True,
            "do_sample": True,
        }
        ours, theirs = (tokens(m, padded(512), **options) for m in (model, plain))
        assert type(ours) is type(theirs) and set(ours) == set(theirs)
        for key in ("scores", "logits"):
            for mine, hf in zip(ours[key], theirs[key], strict=True):
                torch.testing.assert_close(mine, hf, rtol=1e-4, atol=1e-4)

    def test_streamer_and_criteria_and_processor(self, pair: tuple[Any, Any, Patch]) -> None:
        plain, model, patch = pair

        class Stream(transformers.generation.streamers.BaseStreamer):
            def __init__(self) -> None:
                self.seen: list[int] = []
                self.ended = False

            def put(self, value: torch.Tensor) -> None:
                self.seen += value.flatten().tolist()

            def end(self) -> None:
                self.ended = True

        class Stop(transformers.StoppingCriteria):
            def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
                return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 9)

        class Ban(transformers.LogitsProcessor):
            def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
                return scores.index_fill(1, torch.tensor([403, 411]), float("-inf"))

        results = []
        for m in (plain, model):
            stream = Stream()
            out = tokens(
                m, {"input_ids": torch.tensor([[1, 403, 407]])}, streamer=stream, stopping_criteria=[Stop()],
                logits_processor=[Ban()],
            )  # fmt: skip
            assert stream.ended and stream.seen == out[0].tolist() and out.shape[1] == 9
            results.append(out)
        assert torch.equal(*results)
        fused_only(patch)

    def test_assisted(self) -> None:
        plain, inputs = stories(), {"input_ids": torch.tensor([[1, 403, 407, 261]])}
        theirs = tokens(plain, inputs, max_new_tokens=30)
        model, assistant = stories(), build("llama", vocab_size=512)
        with dk.patch(model):
            assert torch.equal(tokens(model, inputs, max_new_tokens=30, assistant_model=assistant), theirs)
            assert torch.equal(tokens(model, inputs, max_new_tokens=30, prompt_lookup_num_tokens=3), theirs)
            with dk.patch(assistant):
                assert torch.equal(
                    tokens(model, inputs, max_new_tokens=30, assistant_model=assistant), theirs
                )

    def test_equal_prompts_are_computed_once(self, pair: tuple[Any, Any, Patch], monkeypatch: Any) -> None:
        plain, model, patch = pair
        seen: list[int] = []
        step = type(patch.fused.decoder).step

        def counted(self: Any, ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            seen.append(ids.numel())
            return step(self, ids, *args, **kwargs)

        monkeypatch.setattr(type(patch.fused.decoder), "step", counted)
        inputs = padded(512)
        ours = tokens(model, inputs, num_return_sequences=4, do_sample=True, max_new_tokens=3)
        assert seen == [int(inputs["attention_mask"].sum()), 16, 16]
        assert torch.equal(
            ours, tokens(plain, inputs, num_return_sequences=4, do_sample=True, max_new_tokens=3)
        )


class TestForward:
    """model(...) without gradients, outside generate."""

    @pytest.mark.parametrize("name", MECHANISMS)
    @torch.no_grad()
    def test_logits_and_continuation(self, name: str) -> None:
        model, inputs = build(name), padded()
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        full = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        theirs = model(**full).logits
        with dk.patch(model, strict=True) as patch:
            ours = model(**full)
            real = mask.bool()
            close(ours.logits[real], theirs[real])
            assert not ours.logits[~real].any()
            close(model(**full, logits_to_keep=2).logits[real[:, -2:]], theirs[:, -2:][real[:, -2:]])
            keep = torch.tensor([10, 11])
            assert torch.equal(model(**full, logits_to_keep=keep).logits, ours.logits[:, keep])
            as_tuple = model(**full, return_dict=False)
            assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], ours.logits)

            # The same in three pieces, over the returned cache: the same bits, wherever the pieces begin.
            cache, pieces = None, []
            for begin, end in ((0, 7), (7, 8), (8, 12)):
                out = model(
                    input_ids=ids[:, begin:end],
                    attention_mask=mask[:, :end],
                    position_ids=positions[:, begin:end],
                    past_key_values=cache,
                )
                cache = out.past_key_values
                pieces.append(out.logits)
            if not patch.report().notes:  # a row of nothing but padding so far goes to transformers
                assert torch.equal(torch.cat(pieces, 1), ours.logits)

    @torch.no_grad()
    def test_pieces_are_bitwise_the_whole(self, pair: tuple[Any, Any, Patch]) -> None:
        _, model, patch = pair
        ids = padded(512, columns=100)["input_ids"][-1:]
        whole = model(ids).logits
        cache, pieces = None, []
        for piece in ids.split([1, 63, 1, 30, 5], 1):
            out = model(piece, past_key_values=cache)
            cache = out.past_key_values
            pieces.append(out.logits)
        assert cache.get_seq_length() == 100
        assert torch.equal(torch.cat(pieces, 1), whole)
        fused_only(patch)

    @torch.no_grad()
    def test_right_padding(self, pair: tuple[Any, Any, Patch]) -> None:
        plain, model, patch = pair
        inputs = {k: v.flip(1) for k, v in padded(512).items()}
        ours, theirs, real = model(**inputs).logits, plain(**inputs).logits, inputs["attention_mask"].bool()
        close(ours[real], theirs[real])
        fused_only(patch)

    @torch.no_grad()
    def test_cache_operations(self, pair: tuple[Any, Any, Patch]) -> None:
        """crop, select, repeat, reorder, reset and the dense form, against transformers' own cache."""
        plain, model, _ = pair
        ids = torch.randint(3, 512, (3, 70), generator=torch.Generator().manual_seed(1))
        after = torch.tensor([[5, 6]])

        def check(change: Any) -> None:
            results = []
            for m in (plain, model):
                cache = m(ids).past_key_values
                change(cache)
                rows = (
                    cache.layers[0].keys.shape[0] if type(cache) is transformers.DynamicCache else cache.rows
                )
                out = m(after.expand(rows, 2), past_key_values=cache)
                results.append(out.logits)
                assert out.past_key_values.get_seq_length() == cache.get_seq_length()
            close(results[1], results[0])

        check(lambda c: c.crop(-9))
        check(lambda c: c.batch_select_indices(torch.tensor([2, 0])))
        check(lambda c: c.batch_repeat_interleave(2))
        check(lambda c: c.reorder_cache(torch.tensor([1, 1, 0])))
        check(lambda c: (c.reorder_cache(torch.tensor([2, 0, 0])), c.crop(-70 + 3)))
        cache = model(ids).past_key_values
        with pytest.raises(ValueError, match="pass minus the number"):
            cache.crop(3)
        cache.reset()
        assert cache.get_seq_length() == 0
        assert torch.equal(model(ids, past_key_values=cache).logits, model(ids).logits)
        keys = list(plain(ids).past_key_values)
        for mine, hf in zip(model(ids).past_key_values, keys, strict=True):
            close(mine[0], hf[0])
            close(mine[1], hf[1])

    def test_over_turns(self, pair: tuple[Any, Any, Patch]) -> None:
        plain, model, patch = pair
        results = []
        for m in (plain, model):
            ids, cache = torch.tensor([[1, 403, 407]]), None
            for turn in ([410, 300], [261], []):
                out = tokens(
                    m,
                    {"input_ids": ids},
                    past_key_values=cache,
                    return_dict_in_generate=True,
                    max_new_tokens=40,
                )
                ids, cache = (
                    torch.cat([out.sequences, torch.tensor([turn], dtype=torch.int64)], 1),
                    out.past_key_values,
                )
            results.append(ids)
        assert torch.equal(*results)
        fused_only(patch)

    def test_with_gradients(self, pair: tuple[Any, Any, Patch]) -> None:
        _, model, patch = pair
        out = model(torch.tensor([[1, 2, 3]]), use_cache=True)
        assert out.logits.requires_grad and type(out.past_key_values) is transformers.DynamicCache
        fused_only(patch)


class TestStaleWeights:
    """A generation sees every change of the weights since the last one, however it was made."""

    CHANGES: dict[str, Any] = {
        "data_add": lambda m: [
            p.data.add_(0.1 * torch.sin(torch.arange(p.numel())).view_as(p)) for p in m.parameters()
        ],
        "data_copy": lambda m: m.model.layers[1].mlp.down_proj.weight.data.copy_(
            m.model.layers[1].mlp.down_proj.weight.roll(1, 0)
        ),
        "data_assign": lambda m: [
            setattr(layer.self_attn.q_proj.weight, "data", -layer.self_attn.q_proj.weight.data.clone())
            for layer in m.model.layers
        ],
        "norm": lambda m: m.model.norm.weight.data.mul_(-1),
        "embedding": lambda m: m.model.embed_tokens.weight.data.copy_(m.model.embed_tokens.weight.roll(7, 0)),
        "load_state_dict": lambda m: m.load_state_dict(build("llama", seed=9).state_dict()),
        "new_parameter": lambda m: setattr(
            m.model.layers[0].self_attn.o_proj,
            "weight",
            torch.nn.Parameter(-m.model.layers[0].self_attn.o_proj.weight),
        ),
        "new_module": lambda m: setattr(m.model.layers[0], "mlp", build("llama", seed=9).model.layers[0].mlp),
        "fused_adam": lambda m: TestStaleWeights.train(m),
        "lora": lambda m: TestStaleWeights.lora(m),
    }

    @staticmethod
    def train(model: Any) -> None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=True)
        model(input_ids=torch.arange(3, 30)[None], labels=torch.arange(3, 30)[None]).loss.backward()
        optimizer.step()

    @staticmethod
    def lora(model: Any) -> None:
        randomise(get_peft_model(model, LoraConfig(r=3, target_modules=["v_proj", "down_proj"])), 4)

    @pytest.mark.parametrize("change", CHANGES)
    def test_change(self, change: str) -> None:
        inputs, model = padded(), build("llama")
        theirs = tokens(model, inputs)
        with dk.patch(model, strict=True) as patch:
            assert torch.equal(tokens(model, inputs), theirs)
            self.CHANGES[change](model)
            plain = copy.deepcopy(model)  # a copy of a patched model is transformers' own
            changed = tokens(plain, inputs)
            assert not torch.equal(theirs, changed)
            assert torch.equal(tokens(model, inputs), changed)
            fused_only(patch)

    def test_adapter_switches(self) -> None:
        inputs = padded()
        model = get_peft_model(build("llama"), LoraConfig(r=3, target_modules="all-linear"))
        randomise(model, 4)
        model.eval()
        with_adapter = tokens(model, inputs)
        with model.disable_adapter():
            without = tokens(model, inputs)
        assert not torch.equal(with_adapter, without)
        with dk.patch(model, strict=True) as patch:
            for _ in range(2):
                assert torch.equal(tokens(model, inputs), with_adapter)
                with model.disable_adapter():
                    assert torch.equal(tokens(model, inputs), without)
            fused_only(patch)


class TestFallback:
    """What the fused forward does not cover runs transformers' forward, gives its results, leaves a note."""

    def check(self, note: str, run: Any, name: str = "llama") -> None:
        model = build(name)
        theirs = run(model)
        with dk.patch(model) as patch:
            ours = run(model)
            (found,) = patch.report().notes
            assert note in found, found
        for mine, hf in zip(ours, theirs, strict=True):
            close(mine.float(), hf.float())

    def test_output_attentions(self) -> None:
        def run(model: Any) -> Any:
            model.set_attn_implementation("eager")
            out = tokens(model, padded(), output_attentions=True, return_dict_in_generate=True)
            return [out.sequences, out.attentions[0][0], out.attentions[3][2]]

        self.check("output_attentions", run)

    def test_output_hidden_states(self) -> None:
        def run(model: Any) -> Any:
            out = tokens(model, padded(), output_hidden_states=True, return_dict_in_generate=True)
            return [out.sequences, *out.hidden_states[2]]

        self.check("output_hidden_states", run)

    def test_inputs_embeds(self) -> None:
        def run(model: Any) -> Any:
            inputs = padded()
            embeds = model.get_input_embeddings()(inputs["input_ids"])
            return [tokens(model, {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]})]

        self.check("inputs_embeds", run)

    @torch.no_grad()
    def test_mask_4d(self) -> None:
        mask = torch.full((1, 1, 6, 6), float("-inf")).triu(1)
        self.check(
            "attention_mask is not 2-D", lambda m: [m(torch.arange(3, 9)[None], attention_mask=mask).logits]
        )

    @torch.no_grad()
    def test_positions_that_skip(self) -> None:
        positions = torch.tensor([[0, 1, 5, 6, 7, 8]])
        self.check("position_ids", lambda m: [m(torch.arange(3, 9)[None], position_ids=positions).logits])

    @torch.no_grad()
    def test_padding_without_positions(self) -> None:
        """transformers counts columns then, padding included: not what the mask says."""
        inputs = padded()
        real = inputs["attention_mask"].bool()
        self.check("position_ids", lambda m: [m(**inputs).logits[real]], "gpt2")

    @torch.no_grad()
    def test_mask_with_holes_and_a_window(self) -> None:
        ids, mask = torch.arange(3, 23)[None], torch.ones(1, 20, dtype=torch.int64)
        mask[0, 9:12] = 0
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        real = mask.bool()
        self.check(
            "sliding window",
            lambda m: [m(ids, attention_mask=mask, position_ids=positions).logits[real]],
            "mistral",
        )

    @torch.no_grad()
    def test_mask_with_holes_is_fused_without_a_window(self) -> None:
        ids, mask = torch.arange(3, 23)[None], torch.ones(1, 20, dtype=torch.int64)
        mask[0, 9:12] = 0
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        model, real = build("gpt2"), mask.bool()
        theirs = model(ids, attention_mask=mask, position_ids=positions).logits[real]
        with dk.patch(model) as patch:
            close(model(ids, attention_mask=mask, position_ids=positions).logits[real], theirs)
            fused_only(patch)

    def test_static_and_foreign_caches(self) -> None:
        self.check("StaticCache", lambda m: [tokens(m, padded(), cache_implementation="static")])
        self.check(
            "DynamicCache", lambda m: [tokens(m, padded(), past_key_values=transformers.DynamicCache())]
        )

    def test_right_padded_prompts(self) -> None:
        inputs = {k: v.flip(1) for k, v in padded().items()}
        self.check("pad on the left", lambda m: [tokens(m, inputs)])

    def test_hook(self) -> None:
        def run(model: Any) -> Any:
            handle = model.model.layers[1].register_forward_hook(lambda module, args, output: 0.5 * output)
            out = tokens(model, padded())
            handle.remove()
            return [out]

        self.check("model.layers.1 has a forward hook", run)

    @torch.no_grad()
    def test_hook_in_the_middle(self) -> None:
        def run(model: Any) -> Any:
            ids = torch.arange(3, 20)[None]
            first = model(ids)
            handle = model.model.norm.register_forward_hook(lambda module, args, output: 0.5 * output)
            second = model(ids[:, :2], past_key_values=first.past_key_values)
            handle.remove()
            return [first.logits, second.logits]

        self.check("model.norm has a forward hook", run)

    def test_dropout_in_training_mode(self) -> None:
        model = build("gpt2", attn_pdrop=0.5).train()
        torch.manual_seed(1)
        theirs = tokens(model, padded())
        with dk.patch(model) as patch:
            torch.manual_seed(1)
            tokens(model, padded())
            assert (
                "training mode with dropout (transformer.h.0.attn.attn_dropout=0.5)"
                in patch.report().notes[0]
            )
            model.eval()
            assert not torch.equal(tokens(model, padded()), theirs)
            assert len(patch.report().notes) == 1

    @torch.no_grad()
    @pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "opt"])
    def test_in_the_middle_of_a_sequence(self, name: str) -> None:
        """A padded, fused prefix continued by transformers' forward, and by another model's."""
        model, inputs = build(name), padded()
        extra = torch.randint(3, 67, (4, 3), generator=torch.Generator().manual_seed(8))
        mask = torch.cat([inputs["attention_mask"], torch.ones(4, 3, dtype=torch.int64)], 1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        first = {**inputs, "position_ids": positions[:, :12]}
        then = {"input_ids": extra, "attention_mask": mask, "position_ids": positions[:, 12:]}
        theirs = model(**then, past_key_values=model(**first).past_key_values).logits
        other = build(name)
        with dk.patch(model):
            cache = model(**first).past_key_values
            out = model(**then, past_key_values=cache, output_hidden_states=True)
            assert cache.is_dense and len(out.hidden_states) == 4
            close(out.logits, theirs)
            close(other(**then, past_key_values=model(**first).past_key_values).logits, theirs)
            with dk.patch(other):
                close(other(**then, past_key_values=model(**first).past_key_values).logits, theirs)
            cache = model(**first).past_key_values
        close(model(**then, past_key_values=cache).logits, theirs)

    def test_labels(self) -> None:
        ids = torch.arange(3, 20)[None]
        with torch.no_grad():
            self.check("labels", lambda m: [m(ids, labels=ids).loss, m(ids, labels=ids).logits])

    def test_a_note_is_said_once(self) -> None:
        model = build("llama")
        with dk.patch(model) as patch:
            for _ in range(3):
                tokens(model, padded(), output_hidden_states=True)
            assert len(patch.report().notes) == 1

    def test_model_that_becomes_unsupported(self) -> None:
        def run(model: Any) -> Any:
            mlp = model.model.layers[0].mlp
            first, mlp.act_fn = tokens(model, padded()), torch.nn.Tanh()
            then, mlp.act_fn = tokens(model, padded()), SiLUActivation()
            return [first, then, tokens(model, padded())]

        self.check("model.layers.0.mlp.act_fn is Tanh", run)


class TestBadInput:
    @torch.no_grad()
    def test_past_the_learned_positions(self) -> None:
        model = build("gpt2")
        with dk.patch(model), pytest.raises(ValueError, match=r"129 tokens and the model has 128 positions"):
            model(torch.ones(1, 129, dtype=torch.int64))

    @torch.no_grad()
    def test_token_outside_the_vocabulary(self) -> None:
        model = build("llama")
        with dk.patch(model), pytest.raises(ValueError, match=r"token id 67 is outside the vocabulary of 67"):
            model(torch.tensor([[5, 67]]))


def test_ids_on_the_models_device_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU `generate` hands over ids, mask and positions there; and autocast is that of the model's device."""
    ids, asked = torch.ones(1, 3, dtype=torch.int64, device="meta"), []
    with dk.patch(build("llama")) as patch:
        fused = patch.fused
        assert fused._unsupported({"input_ids": ids}) == "input_ids is torch.int64 on meta"
        monkeypatch.setattr(fused.decoder, "device", ids.device)
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: bool(asked.append(kind)))
        assert fused._unsupported({"input_ids": ids}) is None and asked == ["meta"]
        assert fused._unsupported({"input_ids": torch.ones(1, 3).long()}) is None

"""What users do to a patched model goes on working: Trainer, accelerate, compile, several adapters, two engines."""

from __future__ import annotations

import concurrent.futures
import contextlib
import copy
import functools
import gc
import os
import pickle
import random
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.utils.prune
import transformers
from peft import LoraConfig, get_peft_model

import dschat_kernels as dk
from dschat import HybridEngine, SamplingConfig
from dschat_kernels.cache import PagedKVCache
from dschat_kernels.models.versions import cache_name
from dschat_kernels.ops.attention import packed_attention
from dschat_kernels.plan import Decoder
from tests.interrupts import interrupted, moments
from tests.tiny_models import build, randomise, stories

CACHE = cache_name()
GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def ids(rows: int = 2, columns: int = 9, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 67, (rows, columns), generator=torch.Generator().manual_seed(seed))


def same(ours: Any, theirs: Any, tolerance: float = 1e-4) -> None:
    """Two models have the same weights, to rounding."""
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name", ["gemma3", "neox"])
def test_trainer(name: str, tmp_path: Path) -> None:
    """Two steps of SGD with gradient checkpointing, and a generation between steps that sees the new weights."""
    data = [{"input_ids": row, "labels": row} for row in ids(4)]
    arguments = transformers.TrainingArguments(
        str(tmp_path), per_device_train_batch_size=2, max_steps=2, learning_rate=0.05, optim="sgd", report_to=[],
        use_cpu=True, save_strategy="no", logging_strategy="no", disable_tqdm=True, gradient_checkpointing=True,
        max_grad_norm=0.0, lr_scheduler_type="constant", dataloader_pin_memory=False,
    )  # fmt: skip
    models = [build(name), build(name)]
    before = models[1].generate(ids(), **GREEDY)
    with dk.patch(models[1], strict=True) as patch:
        for model in models:
            transformers.Trainer(model, arguments, train_dataset=data).train()
        same(*models)
        models[1].eval()
        after = models[1].generate(ids(), **GREEDY)
        assert not patch.report().notes
    assert torch.equal(after, models[0].eval().generate(ids(), **GREEDY)) and not torch.equal(after, before)


def test_accelerate() -> None:
    accelerate = pytest.importorskip("accelerate")
    models = [build("cohere"), build("cohere")]
    patch = dk.patch(models[1], strict=True)
    for model in models:
        accelerator = accelerate.Accelerator(cpu=True)
        wrapped, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        loss = wrapped(input_ids=ids(), labels=ids()).loss
        accelerator.backward(loss)
        optimizer.step()
        accelerator.free_memory()
    same(*models)
    assert torch.equal(models[1].generate(ids(), **GREEDY), models[0].generate(ids(), **GREEDY))
    patch.undo()


@pytest.mark.parametrize("name", ["qwen3", "bloom"])
def test_compiled(name: str) -> None:
    """A compiled forward is traced through transformers' modules and our ops, with its gradient."""
    model = build(name)
    theirs = model(ids(), labels=ids()).loss
    theirs.backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with dk.patch(model):
        torch._dynamo.reset()
        ours = torch.compile(model, backend="aot_eager")(ids(), labels=ids()).loss
        ours.backward()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    largest = max(float(g.abs().max()) for g in grads)
    for p, grad in zip(model.parameters(), grads, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-3, atol=1e-5 * largest)


@pytest.mark.parametrize("name", ["neox", "gemma2"])
def test_several_adapters(name: str) -> None:
    """Each adapter, none, and both at once: before the patch and added after it."""
    base = build(name)
    patch = dk.patch(base, strict=True)
    model = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear"), adapter_name="one")
    model.add_adapter("two", LoraConfig(r=3, target_modules="all-linear"))
    randomise(model, 3)
    model.eval()
    ours = []
    for adapters in (["one"], ["two"], ["one", "two"]):
        model.base_model.set_adapter(adapters)
        ours.append(model.generate(input_ids=ids(), **GREEDY))
    with model.disable_adapter():
        ours.append(model.generate(input_ids=ids(), **GREEDY))
    assert not patch.report().notes
    patch.undo()
    for adapters, mine in zip((["one"], ["two"], ["one", "two"]), ours, strict=False):
        model.base_model.set_adapter(adapters)
        assert torch.equal(mine, model.generate(input_ids=ids(), **GREEDY))
    with model.disable_adapter():
        assert torch.equal(ours[-1], model.generate(input_ids=ids(), **GREEDY))


def test_two_engines_in_a_process() -> None:
    """Engines of different families take turns; neither disturbs the other."""
    models = [build("falcon-new"), build("gemma3")]
    alone = [HybridEngine(m).generate(ids(), None, SamplingConfig(max_new_tokens=5, seed=3)) for m in models]
    engines = [HybridEngine(m) for m in models]
    for _ in range(2):
        for engine, expected in zip(engines, alone, strict=True):
            rollout = engine.generate(ids(), None, SamplingConfig(max_new_tokens=5, seed=3))
            assert torch.equal(rollout.completion_ids, expected.completion_ids)
            assert torch.equal(rollout.logprobs, expected.logprobs)


class TestDecoding:
    def test_contrastive_search_lives_in_a_repository_of_its_own(self) -> None:
        """transformers 5 has no contrastive search of its own: patched or not, it asks for trust in the hub's code."""
        model = build("qwen3")
        options: dict[str, Any] = {**GREEDY, "penalty_alpha": 0.6, "top_k": 4}
        with pytest.raises(Exception) as theirs:
            model.generate(ids(), **options)
        with dk.patch(model, strict=True), pytest.raises(type(theirs.value)) as ours:
            model.generate(ids(), **options)
        assert str(ours.value) == str(theirs.value) and "transformers-community/contrastive-search" in str(
            ours.value
        )

    def test_a_decoding_loop_of_ones_own(self) -> None:
        """Contrastive decoding (expert against amateur) as a `custom_generate` function: the same tokens, all fused."""
        amateur = build("llama", seed=4)

        def contrastive(model: Any, input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            caches: list[Any] = [None, None]
            fed = tokens = input_ids
            for _ in range(6):
                logits = []
                for i, m in enumerate((model, amateur)):
                    out = m(fed, use_cache=True, **({CACHE: caches[i]} if caches[i] is not None else {}))
                    caches[i] = out[CACHE]
                    logits.append(out.logits[:, -1].log_softmax(-1))
                allowed = logits[0] > logits[0].max(-1, keepdim=True).values - 2.0
                fed = (logits[0] - 0.5 * logits[1]).masked_fill(~allowed, -1e9).argmax(-1, keepdim=True)
                tokens = torch.cat([tokens, fed], 1)
            return tokens

        model = build("llama")
        theirs = model.generate(ids(), custom_generate=contrastive, **GREEDY)
        assert not torch.equal(theirs, model.generate(ids(), **GREEDY))
        with dk.patch(model, strict=True) as one, dk.patch(amateur, strict=True) as two:
            assert torch.equal(model.generate(ids(), custom_generate=contrastive, **GREEDY), theirs)
            assert not one.report().notes and not two.report().notes

    @pytest.mark.parametrize("name", ["mistral", "gemma3", "neox"])
    def test_static_cache_handed_in(self, name: str) -> None:
        """transformers fills it, over two turns; the tokens are those without a patch."""
        model = build(name)
        runs = []
        for patched in (False, True):
            cache = transformers.StaticCache(config=model.config, max_cache_len=40)
            with dk.patch(model, strict=True) if patched else contextlib.nullcontext() as patch:
                first = model.generate(ids(), **GREEDY, **{CACHE: cache})
                runs.append(model.generate(torch.cat([first, ids(2, 3, 5)], 1), **GREEDY, **{CACHE: cache}))
                if patch is not None:
                    assert "StaticCache that dschat did not make" in patch.report().notes[0]
        assert torch.equal(*runs)

    @pytest.mark.parametrize("name", ["qwen2-window", "gpt2"])
    def test_positions_of_ones_own(self, name: str) -> None:
        """Positions that count the mask's tokens are fused; others are transformers'."""
        model, tokens = build(name), ids()
        shifted = torch.arange(3, 12)[None].expand(2, 9)
        with torch.no_grad():
            theirs = [model(tokens, position_ids=p).logits for p in (torch.arange(9)[None], shifted)]
            with dk.patch(model, strict=True) as patch:
                ours = [model(tokens, position_ids=torch.arange(9)[None]).logits]
                assert not patch.report().notes
                ours.append(model(tokens, position_ids=shifted).logits)
                assert "position_ids does not count" in patch.report().notes[0]
        for mine, hf in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, hf, rtol=2e-4, atol=2e-4 * float(hf.abs().max()))


@pytest.mark.parametrize("name", ["olmo2", "gpt-neo"])
def test_training_under_autocast(name: str) -> None:
    """Kernels take no part under autocast: loss and gradients are transformers', bit for bit."""
    model = build(name)
    results = []
    for patched in (False, True):
        model.zero_grad()
        with dk.patch(model, strict=True) if patched else contextlib.nullcontext():
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(ids(), labels=ids()).loss
            loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@torch.no_grad()
def test_dora_is_left_alone() -> None:
    """Its projections stay PEFT's and are named; the norms around them are fused all the same."""
    model = get_peft_model(
        build("llama"), LoraConfig(r=2, target_modules=["q_proj", "down_proj"], use_dora=True)
    )
    randomise(model, 3)
    model.eval()
    theirs, tokens = model(input_ids=ids()).logits, model.generate(input_ids=ids(), **GREEDY)
    kinds = [type(m) for m in model.modules() if hasattr(m, "lora_A")]
    with dk.patch(model) as patch:
        assert [type(m) for m in model.modules() if hasattr(m, "lora_A")] == kinds
        torch.testing.assert_close(model(input_ids=ids()).logits, theirs, rtol=1e-4, atol=1e-4)
        assert torch.equal(model.generate(input_ids=ids(), **GREEDY), tokens)
        report = patch.report()
    assert "q_proj: adapter 'default' is" in report.decoder and "only plain LoRA is fused" in report.decoder
    assert report.count("patched") >= 7


@torch.no_grad()
@pytest.mark.parametrize("saved", ["lm_head", "norm"])
def test_modules_to_save_generate(saved: str) -> None:
    """A copy that PEFT trains in a module's place: the copy is what generates, fused or not."""
    model = get_peft_model(
        build("llama", tie_word_embeddings=False),
        LoraConfig(r=2, target_modules=["v_proj"], modules_to_save=[saved]),
    )
    randomise(model, 6)
    model.eval()
    theirs = model.generate(input_ids=ids(), **GREEDY)
    with model.disable_adapter():
        without = model.generate(input_ids=ids(), **GREEDY)
    assert not torch.equal(theirs, without)
    with dk.patch(model):
        assert torch.equal(model.generate(input_ids=ids(), **GREEDY), theirs)
        with model.disable_adapter():
            assert torch.equal(model.generate(input_ids=ids(), **GREEDY), without)


def logits(model: Any, tokens: torch.Tensor, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(tokens, **options).logits
    return out


def close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * float(theirs.abs().max()))


def with_adapter(name: str = "llama", **settings: Any) -> Any:
    model = get_peft_model(build(name), LoraConfig(r=4, target_modules="all-linear", **settings))
    randomise(model, 3)
    return model.eval()


def in_threads(works: list[Any]) -> None:
    """Calls all at the same time; raises what one of them raised."""
    with concurrent.futures.ThreadPoolExecutor(len(works)) as pool:
        for done in [pool.submit(work) for work in works]:
            done.result()


class TestThreads:
    """Kernels run without the GIL: two generations at a time may not meet in one buffer."""

    @staticmethod
    def works(generate: Any) -> list[Any]:
        """Four threads that generate over and over, and see what they saw when they were alone."""

        def work(prompt: torch.Tensor, expected: torch.Tensor) -> None:
            for _ in range(3):
                assert torch.equal(generate(prompt), expected)

        prompts = [torch.randint(3, 500, (2, 8 + 5 * i)) for i in range(4)]
        return [functools.partial(work, prompt, generate(prompt)) for prompt in prompts]

    def test_one_patched_model(self) -> None:
        model = stories()
        works = self.works(lambda prompt: model.generate(prompt, **{**GREEDY, "max_new_tokens": 40}))
        with dk.patch(model, strict=True) as patch:
            in_threads(works)
            assert not patch.report().notes

    def test_one_engine(self) -> None:
        engine = HybridEngine(stories())
        sampling = SamplingConfig(max_new_tokens=40, seed=1)
        in_threads(self.works(lambda prompt: engine.generate(prompt, None, sampling).completion_ids))

    def test_a_rollout_inside_a_rollout(self) -> None:
        engine, sampling = HybridEngine(build("llama")), SamplingConfig(max_new_tokens=8, seed=3)
        alone, inner = (engine.generate(ids(rows, 9, rows), None, sampling) for rows in (3, 1))

        def ask(row: int, token: int) -> None:
            again = engine.generate(ids(1, 9, 1), None, sampling)
            assert torch.equal(again.logprobs, inner.logprobs)

        together = engine.generate(ids(3, 9, 3), None, sampling, on_token=ask)
        assert torch.equal(together.completion_ids, alone.completion_ids)
        assert torch.equal(together.logprobs, alone.logprobs)

        def change(row: int, token: int) -> None:
            engine.model.lm_head.weight.data.mul_(-1)
            engine.flip()

        with pytest.raises(RuntimeError, match="packs changed in the middle of a rollout"):
            engine.generate(ids(), None, sampling, on_token=change)
        engine.generate(ids(), None, sampling)


def test_workers_of_a_data_loader() -> None:
    """Forked after a rollout, from an engine whose kernels have run on several threads."""
    engine, sampling = HybridEngine(build("llama")), SamplingConfig(max_new_tokens=5, seed=3)
    alone = [engine.generate(ids(2, 9, i), None, sampling).completion_ids for i in range(4)]

    class Rollouts(torch.utils.data.Dataset[torch.Tensor]):
        def __len__(self) -> int:
            return 4

        def __getitem__(self, i: int) -> torch.Tensor:
            return engine.generate(ids(2, 9, i), None, sampling).completion_ids

    loader = torch.utils.data.DataLoader(
        Rollouts(), batch_size=None, num_workers=2, timeout=120, multiprocessing_context="fork"
    )
    assert all(map(torch.equal, loader, alone))


class TestCaches:
    @pytest.mark.parametrize("name", ["llama", "mistral"])
    def test_a_prompts_cache_serves_several_answers(self, name: str) -> None:
        """Copied as transformers' guide copies it, pickled, and looked into."""
        model, prompt = build(name), ids(2)

        def answers() -> list[torch.Tensor]:
            with torch.no_grad():
                whole = model(prompt, use_cache=True)[CACHE]
            found = []
            for seed, other in ((5, copy.deepcopy), (6, copy.copy), (7, copy.deepcopy)):
                turn = torch.cat([prompt, ids(2, 70, seed)], 1)
                found.append(model.generate(turn, **GREEDY, **{CACHE: copy.deepcopy(other(whole))}))
            return [*found, model.generate(torch.cat([prompt, ids(2, 3, 8)], 1), **GREEDY, **{CACHE: whole})]

        table = dict(transformers.cache_utils.DYNAMIC_LAYER_TYPE_MAPPING)
        theirs, plain = answers(), model(prompt)[CACHE]
        with dk.patch(model, strict=True) as patch, torch.no_grad():
            assert all(map(torch.equal, answers(), theirs)) and not patch.report().notes
            unpickled = pickle.loads(pickle.dumps(model(prompt)[CACHE]))
            assert type(unpickled) is transformers.DynamicCache
            cache = model(prompt)[CACHE]
            assert (len(cache), cache.is_sliding) == (len(plain), plain.is_sliding)
            assert cache.layers[1].get_seq_length() == 9 and "layers were read" in patch.report().notes[0]
            for mine in (unpickled, cache):
                for layer, hf in zip(mine.layers, plain.layers, strict=True):
                    assert type(layer) is type(hf)
                    close(layer.keys, hf.keys)
                    close(layer.values, hf.values)
        assert transformers.cache_utils.DYNAMIC_LAYER_TYPE_MAPPING == table

    def test_far_more_tokens_allowed_than_memory_has(self) -> None:
        """The cache is as large as it has to be, as transformers' is."""

        class Stop(transformers.StoppingCriteria):
            def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
                return torch.full((len(input_ids),), input_ids.shape[1] >= 80)

        model, options = stories(), {**GREEDY, "max_new_tokens": 10**8, "stopping_criteria": [Stop()]}
        theirs = model.generate(ids(4), **options)
        with dk.patch(model, strict=True) as patch:
            assert torch.equal(model.generate(ids(4), **options), theirs)
            assert not patch.report().notes


class TestChangesInTheMiddle:
    """What changes between two steps of a sequence counts from the next step on."""

    def test_weights_and_adapters(self) -> None:
        def negate(model: Any) -> Any:
            with torch.no_grad():
                model.get_output_embeddings().weight.mul_(-1)

        def assign(model: Any) -> Any:
            weight = model.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight
            weight.data = weight.data.flip(0).clone()

        def off(model: Any) -> Any:
            model.base_model.disable_adapter_layers()

        def shallow(model: Any) -> Any:
            model.config.num_hidden_layers = 2

        for change in (negate, assign, off, shallow):
            results = []
            for patched in (False, True):
                model = with_adapter()
                with dk.patch(model) if patched else contextlib.nullcontext() as patch, torch.no_grad():
                    cache = model(input_ids=ids())[CACHE]
                    change(model)
                    results.append(logits(model, ids(2, 1, 5), **{CACHE: cache}))
                    if patch is not None:
                        assert patch.report().notes, change
            close(results[1], results[0])

    def test_a_processor_that_asks_the_base_model(self) -> None:
        """Contrast with the model without its adapter: the two take turns at every step."""
        model = with_adapter()

        class Contrast(transformers.LogitsProcessor):
            def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
                with model.disable_adapter():
                    return scores - 0.5 * model(input_ids=input_ids).logits[:, -1]

        options: dict[str, Any] = {**GREEDY, "output_logits": True, "return_dict_in_generate": True}
        theirs = model.generate(input_ids=ids(), logits_processor=[Contrast()], **options)
        with dk.patch(model, strict=True) as patch:
            ours = model.generate(input_ids=ids(), logits_processor=[Contrast()], **options)
            assert "middle of a sequence" in patch.report().notes[0]
        assert torch.equal(ours.sequences, theirs.sequences)
        for mine, hf in zip(ours.logits, theirs.logits, strict=True):
            close(mine, hf)

    def test_a_draft_by_the_first_layers(self) -> None:
        """`assistant_early_exit` sets config.num_hidden_layers while it drafts."""
        model, options = stories(), {**GREEDY, "max_new_tokens": 20}
        theirs = model.generate(ids(1), **options)
        with dk.patch(model, strict=True) as patch:
            assert torch.equal(model.generate(ids(1), assistant_early_exit=2, **options), theirs)
            assert "middle of a sequence" in patch.report().notes[0] and model.config.num_hidden_layers == 5
            assert torch.equal(model.generate(ids(1), **options), theirs)

    @pytest.mark.parametrize("name", ["bloom", "llama"])
    def test_a_cast(self, name: str) -> None:
        model = build(name)
        engine = HybridEngine(copy.deepcopy(model))
        with dk.patch(model, strict=True) as patch:
            logits(model, ids())
            model.to(torch.bfloat16)
            assert logits(model, ids()).dtype == torch.bfloat16 and not patch.report().notes
            assert patch.fused.decoder.dtype == torch.bfloat16
        engine.flip()
        engine.model.to(torch.bfloat16)
        rollout = engine.generate(ids(), None, SamplingConfig(max_new_tokens=3))
        assert engine.decoder.dtype == torch.bfloat16
        assert torch.equal(engine.logprobs(rollout, exact=True), rollout.logprobs)

    def test_a_forward_replaced_in_the_class(self, monkeypatch: pytest.MonkeyPatch) -> None:
        module = transformers.models.llama.modeling_llama
        model = build("llama")
        plain = copy.deepcopy(model)
        with dk.patch(model, strict=True):
            logits(model, ids())
            for kind, forward in (
                (module.LlamaMLP, lambda self, x: -x),
                (module.LlamaRMSNorm, lambda self, hidden_states: 0.5 * hidden_states),
            ):
                monkeypatch.setattr(kind, "forward", forward)
                for options in ({}, {"use_cache": False}):
                    close(logits(model, ids(), **options), logits(plain, ids(), **options))


class TestRandomness:
    def test_monte_carlo_dropout(self) -> None:
        """Only the dropouts are in training mode: answers differ, as without us."""
        model = build("gpt2", resid_pdrop=0.3).eval()
        for module in model.modules():
            module.train(isinstance(module, torch.nn.Dropout))
        torch.manual_seed(1)
        theirs = logits(model, ids())
        with dk.patch(model) as patch:
            torch.manual_seed(1)
            close(logits(model, ids()), theirs)
            assert "in training mode with dropout" in patch.report().notes[0]

    def test_dropout_that_comes_later(self) -> None:
        """The first forward already knows of it."""
        model = build("llama").train()
        with dk.patch(model):
            logits(model, ids())
            for layer in model.model.layers:
                layer.self_attn.attention_dropout = 0.5
            torch.manual_seed(1)
            ours = logits(model, ids())
        torch.manual_seed(1)
        close(ours, logits(model, ids()))

    def test_the_callers_random_numbers_are_left_alone(self) -> None:
        engine = HybridEngine(build("llama"))
        before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
        engine.logprobs(engine.generate(ids(), None, SamplingConfig(max_new_tokens=3)))
        assert torch.equal(torch.get_rng_state(), before[0])
        assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]


class TestDerivatives:
    @pytest.mark.parametrize("name", ["llama", "gpt2", "gemma", "olmo", "glm"])
    def test_second_ones(self, name: str) -> None:
        """A gradient penalty: through norms, gates and activations."""
        model = build(name)
        model.set_attn_implementation("eager")
        results = []
        for patched in (False, True):
            with dk.patch(model, strict=True) if patched else contextlib.nullcontext():
                embeds = model.get_input_embeddings()(ids()).detach().requires_grad_()
                (grad,) = torch.autograd.grad(
                    model(inputs_embeds=embeds).logits.pow(2).mean(), embeds, create_graph=True
                )
                penalty = grad.pow(2).sum()
                results.append(torch.autograd.grad(penalty, list(model.parameters()), allow_unused=True))
        largest = max(float(g.abs().max()) for g in results[0] if g is not None)
        for mine, hf in zip(*reversed(results), strict=True):
            assert (mine is None) == (hf is None)
            if hf is not None:
                torch.testing.assert_close(mine, hf, rtol=1e-3, atol=1e-4 * largest)

    def test_ops_that_have_no_second_one_say_so(self) -> None:
        """Instead of a gradient that has no graph; the reference, which the sentence names, has it."""
        x, weight, a, b = (torch.randn(n, 8).requires_grad_() for n in (5, 8, 2, 8))
        heads, cu = torch.randn(5, 2, 4).requires_grad_(), torch.tensor([0, 5], dtype=torch.int32)
        calls: dict[str, tuple[Any, Any]] = {
            "token_logprobs": (lambda **how: dk.token_logprobs(x, weight, torch.arange(5), **how), x),
            "lora_linear": (
                lambda **how: dk.lora_linear(x, weight.detach(), None, a, b[:, :2], 0.5, **how),
                x,
            ),
            "packed_attention": (
                lambda **how: packed_attention(heads, heads, heads, cu, scale=0.5, **how),
                heads,
            ),
        }
        for name, (op, leaf) in calls.items():
            with pytest.raises(NotImplementedError, match=f"{name}.* has no second derivative"):
                torch.autograd.grad(op().pow(2).sum(), leaf, create_graph=True)
            (first,) = torch.autograd.grad(op(backend="reference").pow(2).sum(), leaf, create_graph=True)
            (second,) = torch.autograd.grad(first.pow(2).sum(), leaf)
            assert second.abs().max() > 0
            torch.testing.assert_close(
                torch.autograd.grad(op().pow(2).sum(), leaf)[0], first, rtol=1e-4, atol=1e-5
            )

    def test_transforms(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """torch.func, forward mode and traces go through transformers' own code."""
        # DeepSpeed at stage 3, in a test before this one, leaves a linear that transformers cannot transform either.
        monkeypatch.setattr(torch.nn.functional, "linear", torch._C._nn.linear)
        model = build("llama", tie_word_embeddings=False)
        model.set_attn_implementation("eager")
        weights = {name: p.detach() for name, p in model.named_parameters()}
        tangents = {name: 0.1 * torch.cos(p) for name, p in weights.items()}
        call = torch.func.functional_call

        def loss(p: Any, tokens: torch.Tensor) -> Any:
            return call(model, p, (tokens,), {"use_cache": False}).logits.pow(2).mean()

        class Logits(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.model = model

            def forward(self, tokens: torch.Tensor) -> Any:
                return self.model(tokens, use_cache=False).logits

        def run() -> list[torch.Tensor]:
            grads = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, ids(2)[:, None])
            _, slope = torch.func.jvp(lambda p: loss(p, ids()), (weights,), (tangents,))
            with torch.no_grad():
                batched = torch.func.vmap(lambda t: model(t[None]).logits)(ids(3))
                with torch.autograd.forward_ad.dual_level() as _:
                    dual = torch.autograd.forward_ad.make_dual
                    out = call(model, {n: dual(p, tangents[n]) for n, p in weights.items()}, (ids(),)).logits
                    tangent = torch.autograd.forward_ad.unpack_dual(out).tangent
                traced = torch.jit.trace(Logits(), ids(), check_trace=False)(ids(2, 9, 3))
            return [*grads.values(), slope, batched, tangent, traced]

        theirs = run()
        with dk.patch(model, strict=True):
            ours = run()
        for mine, hf in zip(ours, theirs, strict=True):
            close(mine, hf, 1e-3)


class Twice(torch.Tensor):
    """A weight that is not what its memory says, like a quantised or a sharded one."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> Twice:
        made: Twice = torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype)
        made.held = held
        return made

    def __init__(self, held: torch.Tensor) -> None:
        pass

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return Twice(args[0].held)
        args = [2 * a.held if isinstance(a, Twice) else a for a in args]
        return func(*args, **(kwargs or {}))


class TestWhatOthersPutIn:
    @pytest.mark.parametrize("place", ["model.layers.0.mlp.up_proj", "model.norm", "lm_head"])
    def test_weights_that_are_no_plain_tensors(self, place: str) -> None:
        """In an nn.Linear as ever: refused before anything reads their memory, also when they come later."""
        for later in (False, True):
            model = build("llama", tie_word_embeddings=False)
            with contextlib.ExitStack() as stack:
                if later:
                    patch = stack.enter_context(dk.patch(model, strict=True))
                    logits(model, ids())
                module = model.get_submodule(place)
                module.weight = torch.nn.Parameter(Twice(module.weight.detach()), requires_grad=False)
                if not later:
                    theirs = logits(model, ids())
                    patch = stack.enter_context(dk.patch(model))
                close(logits(model, ids()), theirs)
                said = patch.report().notes[0] if later else patch.report().decoder
                assert "Twice, and only plain tensors are fused" in said
        with pytest.raises(ValueError, match="only plain tensors are fused"):
            HybridEngine(model)

    def test_hooks_that_a_rollout_would_pass_by(self) -> None:
        model = build("llama")
        engine = HybridEngine(model)
        rollout = engine.generate(ids(), None, SamplingConfig(max_new_tokens=3))
        handle = model.model.layers[1].register_forward_hook(lambda module, args, output: 0.5 * output)
        for work in (
            lambda: engine.generate(ids(), None, rollout.sampling),
            lambda: engine.logprobs(rollout),
        ):
            with pytest.raises(ValueError, match=r"model.layers.1 has a forward hook .*: remove the hook"):
                work()
        handle.remove()
        torch.nn.utils.prune.l1_unstructured(model.model.layers[0].mlp.down_proj, "weight", 0.5)
        with pytest.raises(ValueError, match=r"down_proj has a forward hook .*L1Unstructured"):
            engine.generate(ids(), None, rollout.sampling)

    def test_hooks_that_change_no_value(self) -> None:
        """PEFT's and transformers' own for gradient checkpointing."""
        base = build("llama")
        base.gradient_checkpointing_enable({"use_reentrant": True})
        model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"])).eval()
        assert model.get_input_embeddings()._forward_hooks
        with dk.patch(model, strict=True) as patch:
            model.generate(input_ids=ids(), **GREEDY)
            assert not patch.report().notes
        HybridEngine(model).generate(ids(), None, SamplingConfig(max_new_tokens=2))

    def test_backward_hooks_of_an_activation(self) -> None:
        results = []
        for patched in (False, True):
            model = build("llama")
            for layer in model.model.layers:
                layer.mlp.act_fn.register_full_backward_hook(lambda module, grads, _: (1.5 * grads[0],))
            with dk.patch(model) if patched else contextlib.nullcontext():
                model(ids(), labels=ids()).loss.backward()
            results.append([p.grad for p in model.parameters()])
        for mine, hf in zip(*reversed(results), strict=True):
            close(mine, hf)

    @pytest.mark.parametrize("removed_first", [True, False])
    def test_undo_below_accelerates_hooks(self, removed_first: bool) -> None:
        """They keep the forward that they found, and put it back as an attribute."""
        hooks = pytest.importorskip("accelerate.hooks")
        model = build("llama")
        expected = logits(model, ids())
        patch = dk.patch(model)
        held = [model, model.model.norm, model.model.layers[0].mlp]
        for module in held:
            hooks.add_hook_to_module(module, hooks.AlignDevicesHook("cpu"))
        if removed_first:
            hooks.remove_hook_from_module(model, recurse=True)
        patch.undo()
        for module in held:
            kept = vars(module)["forward" if removed_first else "_old_forward"]
            assert kept.__func__ is type(module).forward
        assert torch.equal(logits(model, ids()), expected)

    def test_replicas(self) -> None:
        """DataParallel copies the dictionary of a module, and gives the copy weights of its own."""
        model = build("llama")
        with dk.patch(model):
            replica = model._replicate_for_data_parallel()
            replica.lm_head = copy.deepcopy(model.lm_head)
            with torch.no_grad():
                replica.lm_head.weight.mul_(2)
            close(logits(replica, ids()), 2 * logits(model, ids()))

    def test_an_engine_is_not_copied(self) -> None:
        with pytest.raises(TypeError, match="HybridEngine cannot be copied or pickled: copy its model"):
            copy.deepcopy(HybridEngine(build("llama")))


class TestInterrupts:
    """Ctrl-C anywhere leaves an engine or a model that goes on as if the call had not been made."""

    PACKING = (
        "refresh", "_refresh_part", "_refresh_group", "_refresh_tables", "_remember", "_rebind", "fill", "_refill",
    )  # fmt: skip
    STEPS = (
        "rope_tables", "_reserve", "decode", "prepare_append", "_grow", "_take", "_share", "_drop", "flip",
        "_make_decoder", "_roll_out",
    )  # fmt: skip

    @pytest.mark.parametrize("adapter", [False, True])
    def test_engine(self, adapter: bool) -> None:
        """In a rollout that packs other weights and grows every buffer; afterwards with those weights, or with the ones
        before."""
        model = with_adapter() if adapter else build("gpt2")
        weights = [{k: (1 + 0.1 * i) * v for k, v in model.state_dict().items()} for i in range(2)]
        small, large = (ids(1, 3), 1), (ids(2, 19, 3), 2)

        def generate(engine: HybridEngine, what: tuple[torch.Tensor, int]) -> torch.Tensor:
            return engine.generate(
                what[0], None, SamplingConfig(max_new_tokens=3, n=what[1], seed=3)
            ).logprobs

        def begun() -> HybridEngine:
            model.load_state_dict(weights[0])
            engine = HybridEngine(model)
            generate(engine, small)
            model.load_state_dict(weights[1])
            return engine

        expected = []
        for held in weights:
            model.load_state_dict(held)
            expected.append([generate(HybridEngine(model), what) for what in (small, large)])
        engine = begun()
        where = self.PACKING if adapter else (*self.PACKING, *self.STEPS)
        for line, time in moments(lambda e=engine: generate(e, large), "", *where):
            engine = begun()
            assert interrupted(lambda e=engine: generate(e, large), line, time), line
            assert gc.isenabled() and not engine._rolling_out.locked(), line
            now = line[1] % 2
            model.load_state_dict(weights[now])
            for what, alone in zip((small, large), expected[now], strict=True):
                assert torch.equal(generate(engine, what), alone), line

    @pytest.mark.parametrize("exact", [False, True])
    def test_training(self, exact: bool) -> None:
        model = with_adapter()
        held = copy.deepcopy(model.state_dict())
        engine = HybridEngine(model, torch.optim.SGD(model.parameters(), lr=0.1), exact=exact)
        rollout = engine.generate(ids(), None, SamplingConfig(max_new_tokens=4, seed=3))

        def train() -> torch.Tensor:
            engine.backward(-engine.logprobs(rollout).sum())
            engine.step(1.0)
            return engine.generate(ids(), None, rollout.sampling).logprobs

        expected = train()
        model.load_state_dict(held)
        where = ("backward", "exact_weight", "ready", "apply", "step")
        for line, time in list(moments(train, "", *where)):
            model.load_state_dict(held)
            assert interrupted(train, line, time), line
            model.load_state_dict(held)
            engine.optimizer.zero_grad()
            assert torch.equal(train(), expected), line

    def test_patched_model(self) -> None:
        """In `generate`, with other weights than those of the packs."""
        model = build("llama")
        weights = [{k: (1 + 0.1 * i) * v for k, v in model.state_dict().items()} for i in range(2)]

        def generate() -> torch.Tensor:
            options = {**GREEDY, "max_new_tokens": 3, "output_logits": True, "return_dict_in_generate": True}
            return model.generate(ids(3), **options).logits[-1]

        with dk.patch(model, strict=True) as patch:
            expected = []
            for held in weights:
                model.load_state_dict(held)
                expected.append(generate())
            for i, (line, time) in enumerate(
                moments(generate, "", *self.PACKING, "describe", "_hook", "open", "wrote")
            ):
                model.load_state_dict(weights[i % 2])
                interrupted(generate, line, time)
                model.load_state_dict(weights[i // 2 % 2])
                assert torch.equal(generate(), expected[i // 2 % 2]), line
            assert not patch.report().notes

    def test_patch_and_undo(self) -> None:
        """Half a patch is taken out again; half an undo is brought to its end by the next."""
        model = build("llama")
        classes = [type(module) for module in model.modules()]

        def plain() -> bool:
            return [type(m) for m in model.modules()] == classes and "_dschat_patch" not in vars(model)

        for line, time in list(moments(lambda: dk.patch(model).undo(), "patch.py")):
            made: list[Any] = []

            def both(made: list[Any] = made) -> None:
                made.append(dk.patch(model))
                made[0].undo()

            assert interrupted(both, line, time), line
            if made:
                made[0].undo()
            elif not plain():  # the call had ended, but for giving its result
                dk.patch(model).undo()
            assert plain(), line


class TestModes:
    """What is global in torch, around the first use of a model, or between two."""

    MODES = {
        "inference_mode": torch.inference_mode,
        "no_grad": torch.no_grad,
        "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        "float64": lambda: switched(torch.set_default_dtype, torch.float64, torch.float32),
        "deterministic": lambda: switched(torch.use_deterministic_algorithms, True, False),
        "one thread": lambda: switched(torch.set_num_threads, 1, torch.get_num_threads()),
    }

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("exact", [False, True])
    def test_engine(self, mode: str, exact: bool) -> None:
        """A rollout in a mode is the same, and trains; the next one outside sees all that was trained."""
        model = build("gpt2")
        sampling = SamplingConfig(max_new_tokens=5, n=2, seed=3)
        alone = HybridEngine(model).generate(ids(), None, sampling)
        engine = HybridEngine(model, torch.optim.SGD(model.parameters(), lr=0.1), exact=exact)
        with self.MODES[mode]():
            rollout = engine.generate(ids(), None, sampling)
        assert torch.equal(rollout.logprobs, alone.logprobs)
        engine.backward(engine.logprobs(rollout).sum())
        engine.step()
        after = engine.generate(ids(), None, sampling)
        assert torch.equal(after.logprobs, HybridEngine(model).generate(ids(), None, sampling).logprobs)
        assert not torch.equal(after.logprobs, alone.logprobs)

    @pytest.mark.parametrize("mode", MODES)
    def test_patched_model(self, mode: str) -> None:
        model, other = build("gpt2"), build("gpt2", seed=5)
        weights = [copy.deepcopy(m.state_dict()) for m in (model, other)]
        patch = dk.patch(model, strict=True)
        for held in weights:
            for within in (self.MODES[mode], contextlib.nullcontext):
                model.load_state_dict(held)
                other.load_state_dict(held)
                with within():
                    assert torch.equal(model.generate(ids(), **GREEDY), other.generate(ids(), **GREEDY))
        assert patch.report().notes == (
            ["a forward ran transformers' own code: autocast is on"] if mode == "autocast" else []
        )


@contextlib.contextmanager
def switched(switch: Any, on: Any, off: Any) -> Any:
    switch(on)
    try:
        yield
    finally:
        switch(off)


class TestMemory:
    def test_an_engine_goes_with_its_last_reference(self) -> None:
        """And gigabytes of packs with it: no cycle of references waits for a garbage collection."""
        model = build("llama")
        gc.collect()
        gc.disable()
        try:
            for exact in (False, True):
                engine = HybridEngine(model, torch.optim.SGD(model.parameters(), lr=0.1), exact=exact)
                rollout = engine.generate(ids(), None, SamplingConfig(max_new_tokens=3))
                engine.backward(engine.logprobs(rollout).sum())
                engine.step()
                held = [weakref.ref(x) for x in (engine, engine.decoder, engine.decoder.packed("lm_head"))]
                del engine, rollout
                assert [one() for one in held] == [None] * 3
        finally:
            gc.enable()

    def test_nothing_grows(self) -> None:
        """Generations, steps, patches, engines and models made and dropped: as many objects, descriptors and threads
        after ten rounds as before."""
        model = with_adapter()
        engine = HybridEngine(model, torch.optim.SGD(model.parameters(), lr=1e-3))
        base = build("llama")

        def round() -> None:
            rollout = engine.generate(ids(), None, SamplingConfig(max_new_tokens=3, n=2))
            engine.backward(engine.logprobs(rollout).sum())
            engine.step(1.0)
            with dk.patch(base):
                base.generate(ids(), **GREEDY)
                HybridEngine(base).generate(ids(), None, rollout.sampling)
            dropped = build("llama")
            dk.patch(dropped).model.generate(ids(), **GREEDY)

        def count() -> list[int]:
            gc.collect()
            kinds = (torch.Tensor, torch.nn.Module, Decoder, PagedKVCache)
            objects = gc.get_objects()
            found = [sum(issubclass(type(x), kind) for x in objects) for kind in kinds]
            return [*found, threading.active_count(), len(os.listdir("/proc/self/fd"))]

        for _ in range(2):
            round()
        before = count()
        for _ in range(10):
            round()
        assert count() == before

"""What users do to a patched model goes on working: Trainer, accelerate, compile, several adapters, two engines."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

import dschat_kernels as dk
from dschat import HybridEngine, SamplingConfig
from dschat_kernels.models.versions import cache_name
from tests.tiny_models import build, randomise

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

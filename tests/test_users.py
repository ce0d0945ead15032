"""What users do to a patched model goes on working: Trainer, accelerate, compile, several adapters, two engines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

import dschat_kernels as dk
from dschat import HybridEngine, SamplingConfig
from tests.tiny_models import build, randomise

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

"""DPO: the loss is that of its formula on Hugging Face's log-probs, the cached reference is the live one."""

from __future__ import annotations

import math

import pytest
import torch
from helpers_rlhf import Killed, numbers, same_weights
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dschat.config import ConfigError, DPOConfig
from dschat.engine import HybridEngine
from dschat.engine.packed import PackedModel
from dschat.rlhf import conversations, data, dpo, losses, models, reading

F64 = torch.float64


def run(base: dict, **keys):
    return dpo.train(
        DPOConfig(**{**base, "batch_size": 4, "learning_rate": 3e-3, "epochs": 2, "lora_r": 4, **keys})
    )


@pytest.fixture
def examples(pairs, stories_tokenizer):
    records, stats = reading.read([pairs])
    return data.pair_examples(records, conversations.Encoder(stories_tokenizer), stats)


def hf_logprob(model, prompt, answer) -> float:
    """Sum of an answer's log-probs by Hugging Face, one row, no padding."""
    ids = torch.tensor([prompt + answer])
    with torch.no_grad():
        logp = model(ids).logits[0].double().log_softmax(-1)
    return sum(float(logp[len(prompt) - 1 + i, token]) for i, token in enumerate(answer))


@pytest.mark.parametrize("kind", ["sigmoid", "ipo"])
def test_loss_is_the_formula_on_hugging_faces_log_probs(kind, examples, new_stories_model):
    """Packed rows of both answers against a loop over HF forwards in float64 log-softmax."""
    policy, reference = new_stories_model(), new_stories_model()
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for p in policy.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=generator))
    config = DPOConfig(loss=kind, beta=0.3, label_smoothing=0.0 if kind == "ipo" else 0.1, batch_size=3)
    source = dpo.Reference(config, reference, 0, torch.device("cpu"))
    source.frozen = HybridEngine(reference)
    found = dpo.evaluate(HybridEngine(policy), source, examples[:5], 0, config)
    logged = dpo.accumulate(HybridEngine(policy), source, examples[:5], range(5), 0, config)
    total, right = 0.0, 0.0
    sums = {"logps/chosen": 0.0, "logps/rejected": 0.0, "rewards/chosen": 0.0, "rewards/rejected": 0.0}
    for e in examples[:5]:
        gains = []
        for side, answer in zip(("chosen", "rejected"), e.answers, strict=True):
            logp = hf_logprob(policy, e.prompt_ids, answer)
            gain = logp - hf_logprob(reference, e.prompt_ids, answer)
            n = len(answer) if kind == "ipo" else 1
            sums[f"logps/{side}"] += logp / n / 5
            sums[f"rewards/{side}"] += 0.3 * gain / n / 5
            gains.append(gain / len(answer) if kind == "ipo" else gain)
        gap = gains[0] - gains[1]
        right += gap > 0
        if kind == "ipo":
            total += (gap - 1 / 0.6) ** 2
        else:
            total += 0.9 * math.log1p(math.exp(-0.3 * gap)) + 0.1 * math.log1p(math.exp(0.3 * gap))
    assert found["loss"] == pytest.approx(total / 5, rel=1e-4)
    assert found["accuracy"] == logged["accuracy"] == pytest.approx(right / 5)
    assert {k: logged[k] for k in sums} == pytest.approx(sums, rel=1e-4)


def test_gradient_of_the_loss():
    """d loss / d log-probs against finite differences, and the well-known weight sigmoid(-h) * beta."""
    g = torch.Generator().manual_seed(4)
    c, r, rc, rr = (torch.randn(6, generator=g, dtype=F64) for _ in range(4))
    for kind, smoothing in (("sigmoid", 0.0), ("sigmoid", 0.1), ("ipo", 0.0)):
        x, y = c.clone().requires_grad_(), r.clone().requires_grad_()
        assert torch.autograd.gradcheck(
            lambda a, b, k=kind, s=smoothing: losses.dpo_loss(a, b, rc, rr, 0.3, kind=k, label_smoothing=s)[
                0
            ],
            (x, y),
        )
    x = c.clone().requires_grad_()
    (grad,) = torch.autograd.grad(losses.dpo_loss(x, r, rc, rr, 0.3)[0], x)
    h = 0.3 * ((c - rc) - (r - rr))
    torch.testing.assert_close(grad, -0.3 * torch.sigmoid(-h) / 6, rtol=1e-10, atol=1e-12)


def test_only_answers_reach_the_head_and_nothing_is_padding(examples, stories_model, monkeypatch):
    seen = []
    original = PackedModel.token_logprobs

    def spy(self, rows, select, targets, **kw):
        seen.append((len(rows.ids), len(select)))
        return original(self, rows, select, targets, **kw)

    monkeypatch.setattr(PackedModel, "token_logprobs", spy)
    dpo.pair_logprobs(HybridEngine(stories_model), examples[:4], 0, mean=False)
    answers = [a for e in examples[:4] for a in e.answers]
    prompts = sum(2 * len(e.prompt_ids) for e in examples[:4])
    # The last token of an answer predicts nothing, so it is not fed.
    assert seen == [(prompts + sum(len(a) - 1 for a in answers), sum(len(a) for a in answers))]


@pytest.mark.parametrize("lora_r", [0, 4])
def test_cached_reference_is_the_live_one(lora_r, base, tmp_path):
    """checklist 2.1 #19: adapter off, or a frozen copy, against log-probs computed once before training."""
    for cached in (True, False):
        folder = str(tmp_path / str(cached))
        run(base, lora_r=lora_r, cache_reference=cached, output_dir=folder, eval_data=base["data"])
    a, b = numbers(tmp_path / "True"), numbers(tmp_path / "False")
    for x, y in zip(a, b, strict=True):
        assert x == pytest.approx(y, rel=2e-3, abs=1e-5)
    assert a[0]["loss"] == pytest.approx(math.log(2), abs=1e-5), "policy and reference are one at the start"
    assert len(list((tmp_path / "True" / "reference").iterdir())) == 1
    assert not (tmp_path / "False" / "reference").exists()


def test_another_reference(base, tmp_path, stories_dir, examples):
    """A model of its own as reference: its log-probs are what is cached."""
    model = AutoModelForCausalLM.from_pretrained(stories_dir)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.1)
    models.save_model(model, models.load_tokenizer(str(stories_dir)), tmp_path / "other", merge=True)
    run(base, reference=str(tmp_path / "other"), max_steps=1, dtype="float32")
    (file,) = (tmp_path / "run" / "reference").iterdir()
    expected = dpo.pair_logprobs(HybridEngine(model.eval()), examples, 0, mean=False)
    torch.testing.assert_close(load_file(file)["train"], torch.stack(expected).detach(), rtol=1e-4, atol=1e-4)


def test_it_learns_and_loads(base, tmp_path):
    result = run(base, learning_rate=1e-2, epochs=4, eval_data=base["data"])
    assert result["eval_accuracy"] == 1.0 and result["eval_margin"] > 0.5 and result["eval_loss"] < 0.5
    lines = numbers(tmp_path / "run")
    assert (
        lines[-1]["rewards/margins"] > lines[0]["rewards/margins"]
        and lines[-1]["loss"] < 0.6 * lines[0]["loss"]
    )
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")


def test_accumulation_changes_nothing(base, tmp_path):
    """checklist 2.1 #16: 4 pairs at once or one by one."""
    seen = []
    for size in (4, 1):
        folder = tmp_path / str(size)
        run(base, batch_size=size, gradient_accumulation_steps=4 // size, output_dir=str(folder), max_steps=3)
        seen.append([(v["loss"], v["grad_norm"]) for v in numbers(folder)])
    for a, b in zip(*seen, strict=True):
        assert a == pytest.approx(b, rel=2e-3)


@pytest.mark.parametrize("more", [{"lora_r": 0}, {"lora_r": 2, "loss": "ipo", "cache_reference": False}])
def test_resumed_equals_straight(base, tmp_path, kill_after, more):
    """checklist 2.1 #25: the reference of a resumed run is still the policy of the start."""
    straight = run(base, **more, output_dir=str(tmp_path / "straight"))
    for at in (1, 4):
        kill_after(at)
        with pytest.raises(Killed):
            run(base, **more)
    for file in (tmp_path / "run").glob("reference/*"):
        file.unlink()  # a lost cache is made again from the model that the config names
    kill_after(None)
    resumed = run(base, **more)
    assert {k: v for k, v in resumed.items() if k not in ("seconds", "written")} == {
        k: v for k, v in straight.items() if k not in ("seconds", "written")
    }
    assert numbers(tmp_path / "run") == numbers(tmp_path / "straight")
    assert same_weights(tmp_path / "run" / "model", tmp_path / "straight" / "model")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"loss": "ipo", "label_smoothing": 0.1}, "loss is ipo, which has none; set label_smoothing to 0"),
        ({"beta": 0}, "beta is 0.0, but it must be greater than 0"),
        ({"label_smoothing": 0.5}, "label_smoothing is 0.5, but it must be at least 0 and below 0.5"),
        ({"loss": "hinge"}, "loss is 'hinge', but it must be one of sigmoid, ipo"),
    ],
)
def test_bad_settings(keys, message):
    with pytest.raises(ConfigError, match=message):
        DPOConfig(**keys)

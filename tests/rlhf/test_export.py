"""What a run writes loads with plain Hugging Face and PEFT, and is what was trained; the best step is written."""

from __future__ import annotations

import os

import peft
import pytest
import torch
import transformers
from helpers_rlhf import numbers

from dschat.config import ConfigError, PPOConfig, RewardConfig, SFTConfig
from dschat.rlhf import batching, conversations, data, models, online, ppo, reading, reward, sft
from dschat.rlhf import checkpoint as K
from dschat.rlhf.metrics import read_lines

SMALL = {"lora_r": 2, "batch_size": 4, "max_steps": 4, "learning_rate": 1e-2}
ONLINE = {
    **SMALL,
    "prompts_per_step": 2,
    "samples_per_prompt": 2,
    "max_new_tokens": 6,
    "critic_learning_rate": 1e-2,
}


def longer(prompts, completions, **columns):
    return [len(c) / 10 for c in completions]


@pytest.mark.parametrize("lora_r", [2, 0])
def test_policy_and_adapter_load(base, stories_dir, tmp_path, lora_r):
    more = {"response": "chosen", "max_length": 64, "lora_r": lora_r}
    sft.train(SFTConfig(**{**base, **SMALL, **more}))
    folder = tmp_path / "run"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    ids = tokenizer("Once upon a time", return_tensors="pt")["input_ids"]
    assert not any(p.suffix in (".bin", ".pt", ".pkl") for p in folder.rglob("*"))
    if lora_r:
        plain = transformers.AutoModelForCausalLM.from_pretrained(stories_dir, dtype=torch.float32)
        adapted = peft.PeftModel.from_pretrained(plain, folder / "adapter").eval()
        torch.testing.assert_close(adapted(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)
        again = peft.AutoPeftModelForCausalLM.from_pretrained(folder / "adapter", dtype=torch.float32).eval()
        assert torch.equal(again(ids).logits, adapted(ids).logits)
    else:
        assert not (folder / "adapter").exists()


def test_reward_model_loads(base, tmp_path, stories_tokenizer):
    """Hugging Face's own classifier, one padded row at a time, gives the scores that ours reads packed."""
    reward.train(RewardConfig(**{**base, **SMALL, "max_length": 64}))
    folder = tmp_path / "run" / "model"
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32
    ).eval()
    scorer = models.Scorer(models.load_scorer(str(folder), torch.float32))
    encoder = conversations.Encoder(stories_tokenizer)
    records, stats = reading.read(base["data"])
    examples = data.pair_examples(records, encoder, stats)[:4]
    batch = batching.Sequences.of(
        [e.prompt_ids for e in examples], [e.answers[0] for e in examples], encoder.pad_id
    )
    ours = scorer.rate(batch)
    for i, e in enumerate(examples):
        score = model(torch.tensor([[*e.prompt_ids, *e.answers[0]]])).logits[0, 0]
        theirs = (score - model.config.reward_mean) / model.config.reward_std
        torch.testing.assert_close(ours[i], theirs.detach(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("update", ["head", "lora", "all"])
def test_critic_loads(base, tmp_path, monkeypatch, update):
    """The written classifier's score at every token is the value that the critic gave there at the end."""
    kept = {}
    original = online._conclude

    def conclude(run, trainer, *args):
        rollout = trainer.generate(kept["examples"], 1, 5)
        with torch.no_grad():
            kept["rollout"], kept["values"] = rollout, trainer.critic.values(rollout).clone()
        return original(run, trainer, *args)

    collect = online.Trainer.collect

    def remember(self, examples, *args):
        kept["examples"] = examples
        return collect(self, examples, *args)

    monkeypatch.setattr(online, "_conclude", conclude)
    monkeypatch.setattr(online.Trainer, "collect", remember)
    result = ppo.train(PPOConfig(**{**base, **ONLINE, "critic_update": update}), rewards=(longer,))
    folder = tmp_path / "run" / "critic"
    assert str(folder / "model") in result["written"] and (folder / "adapter").exists() == (update == "lora")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder / "model", dtype=torch.float32
    ).eval()
    rollout = kept["rollout"]
    assert kept["values"].abs().max() > 1e-3
    for row in range(len(rollout)):
        ids = rollout.input_ids[row][rollout.attention_mask[row]]
        count = int(rollout.completion_mask[row].sum())
        with torch.no_grad():
            hidden = model.model(input_ids=ids[None]).last_hidden_state[0]
            values = model.score(hidden)[-count - 1 : -1, 0]
        torch.testing.assert_close(values, kept["values"][row][:count], atol=1e-3, rtol=1e-3)
    if update == "head":
        again = PPOConfig(
            **{**base, **ONLINE, "critic": str(folder), "output_dir": str(tmp_path / "next"), "max_steps": 1}
        )
        ppo.train(again, rewards=(longer,))


def test_save_critic_can_be_left_out(base, tmp_path):
    ppo.train(PPOConfig(**{**base, **ONLINE, "max_steps": 1, "save_critic": False}), rewards=(longer,))
    assert not (tmp_path / "run" / "critic").exists()


# ------------------------------------------------------------------------------------------------ the best step


def test_best_step_stays_and_is_written(base, tmp_path):
    """A learning rate that ruins the model after the second step: rotation keeps the best, and that is written."""
    more = {"response": "chosen", "max_length": 64, "eval_every": 1, "max_steps": 5, "keep_checkpoints": 1}
    more |= {
        "best_metric": "eval/loss",
        "best_is": "lowest",
        "eval_data": base["data"],
        "learning_rate": 0.05,
    }
    more |= {"lr_schedule": "constant", "lora_r": 0}
    result = sft.train(SFTConfig(**{**base, **SMALL, **more}))
    held = {n["step"]: n["eval/loss"] for n in numbers(tmp_path / "run")}
    best = min(held, key=held.get)
    assert 1 <= best < 5, held
    assert result["best"] == {"metric": "eval/loss", "step": best, "value": held[best]}
    kept = sorted(os.listdir(tmp_path / "run" / "checkpoints"))
    assert kept == [f"step-{best:06d}", "step-000005"]
    tensors, _, _ = K.load(tmp_path / "run" / "checkpoints" / kept[0])
    written = models.load_policy(str(tmp_path / "run"), torch.float32)
    for name, parameter in written.named_parameters():
        assert torch.equal(parameter, tensors[f"policy.{name}"]), name


def test_best_answers_are_those_of_the_best_step(base, tmp_path):
    """PPO's comparison before and after is about the weights that are written."""
    more = {
        "eval_data": base["data"],
        "max_eval_rows": 3,
        "eval_every": 1,
        "best_metric": "eval/score",
        "exact": True,
    }
    result = ppo.train(PPOConfig(**{**base, **ONLINE, **more, "best_is": "lowest"}), rewards=(longer,))
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    lowest = min(line["eval/score"] for line in lines)
    assert result["best"]["value"] == lowest and result["held_out"]["after"] == pytest.approx(lowest)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"best_metric": "eval/loss"}, "keeps the worst; set best_is to lowest"),
        ({"best_metric": "eval/accuracy"}, "nothing is held out; give eval_data or eval_split"),
    ],
)
def test_best_settings_that_cannot_be(more, message):
    with pytest.raises(ConfigError, match=message):
        SFTConfig(**more)


def test_best_metric_that_is_not_logged(base):
    more = {"response": "chosen", "max_length": 64, "best_metric": "score", "max_steps": 1}
    with pytest.raises(
        ConfigError, match=r"best_metric is score, which sft does not log; use one of loss, .*grad_norm"
    ):
        sft.train(SFTConfig(**{**base, **SMALL, **more}))

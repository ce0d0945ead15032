"""The pretraining mix, the averaged actor, and reward models with a tokenizer of their own."""

from __future__ import annotations

import json

import pytest
import torch
from helpers_rlhf import Killed, numbers, same_weights
from test_grpo import keys, short
from transformers import AutoModelForCausalLM

from dschat.config import ConfigError, GRPOConfig, PPOConfig
from dschat.engine import HybridEngine
from dschat.rlhf import batching, conversations, grpo, models, ppo, reading
from dschat.rlhf.pretraining import PretrainingMix, WeightAverage
from dschat.rlhf.rewards import OwnTokenizer, Rewards, load_sources


@pytest.fixture
def text(tmp_path) -> str:
    path = tmp_path / "text.jsonl"
    rows = [{"text": f"Once upon a time there was a {a}. The {a} was happy."} for a in ("cat", "dog", "fox")]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def test_mix_adds_the_gradient_of_plain_language_modelling(text, new_stories_model, stories_tokenizer):
    """coef * Hugging Face's own loss on the block, on top of what is there already."""
    model = new_stories_model().requires_grad_(True)
    encoder = conversations.Encoder(stories_tokenizer)
    config = GRPOConfig(unsup_data=[text], unsup_coef=0.5, unsup_length=12, batch_size=2)
    mix = PretrainingMix(config, encoder)
    ids = [
        i for r in reading.read([text])[0]
        for i in [*stories_tokenizer(r.columns["text"], add_special_tokens=False)["input_ids"], encoder.eos_id]
    ]  # fmt: skip
    assert [i for b in mix.blocks for i in b] == ids[: len(ids) // 12 * 12] and len(mix.blocks) > 3
    engine = HybridEngine(model)
    found = mix.backward(engine, step=3, minibatch=1)
    weight = model.model.layers[0].mlp.up_proj.weight
    ours = weight.grad.clone()
    # Which blocks were drawn is found by trying all pairs against Hugging Face.
    matches = []
    for i in range(len(mix.blocks)):
        for j in range(i):
            model.zero_grad()
            batch = torch.tensor([list(mix.blocks[i]), list(mix.blocks[j])])
            loss = 0.5 * model(batch, labels=batch).loss
            if float(loss.detach()) == pytest.approx(0.5 * found["unsup/loss"], rel=1e-5):
                loss.backward()
                matches.append(weight.grad.clone())
    assert len(matches) == 1
    torch.testing.assert_close(ours, matches[0], rtol=1e-3, atol=1e-6)
    before = {mix.backward(engine, s, m)["unsup/loss"] for s in range(2) for m in range(3)}
    assert len(before) > 1 and mix.backward(engine, 3, 1) == found, "a function of step and minibatch"


def test_mix_keeps_the_text_likely(base, text, tmp_path, stories_tokenizer):
    """A policy that is paid for nonsense forgets its stories; with the mix it does not."""
    nats = {}
    for coef in (0.0, 4.0):
        more = {"unsup_data": [text], "unsup_coef": coef} if coef else {}
        folder = tmp_path / str(coef)
        config = GRPOConfig(
            **keys(base, **more, learning_rate=1e-2, max_steps=6, kl_coef=0.0, unsup_length=16,
                   output_dir=str(folder))
        )  # fmt: skip
        grpo.train(config, rewards=(short,))
        assert ("unsup/loss" in numbers(folder)[0]) == bool(coef)
        model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
        ids = torch.tensor(
            [stories_tokenizer("Once upon a time there was a cat. The cat was happy.")["input_ids"]]
        )
        with torch.no_grad():
            nats[coef] = float(model(ids, labels=ids).loss)
    assert nats[4.0] < nats[0.0] - 0.2


def test_average_is_the_recursion():
    module = torch.nn.Linear(2, 2)
    average = WeightAverage(module, 0.9)
    expected = [p.detach().clone() for p in module.parameters()]
    for _ in range(3):
        with torch.no_grad():
            for i, p in enumerate(module.parameters()):
                p.add_(1.0)
                expected[i] = 0.9 * expected[i] + 0.1 * p
        average.update(module)
    for p, e in zip(average.of(module).parameters(), expected, strict=True):
        torch.testing.assert_close(p.detach(), e)


@pytest.mark.parametrize("lora_r", [0, 4])
def test_average_and_mix_resume_bit_for_bit(base, tmp_path, text, kill_after, lora_r):
    """checklist 2.1 #25: both are part of the checkpoint; the average is a model of its own."""
    more = {
        "ema_decay": 0.5, "unsup_data": [text], "unsup_coef": 1.0, "unsup_length": 8, "lora_r": lora_r,
        "critic_update": "head",
    }  # fmt: skip

    def run(folder):
        ppo.train(PPOConfig(**keys(base, **more, output_dir=str(tmp_path / folder))), rewards=(short,))

    run("straight")
    kill_after(2)
    with pytest.raises(Killed):
        run("again")
    kill_after(None)
    run("again")
    assert numbers(tmp_path / "again") == numbers(tmp_path / "straight")
    for part in ("model", "ema/model"):
        assert same_weights(tmp_path / "again" / part, tmp_path / "straight" / part)
    final, mean = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "again" / part).model.layers[0].mlp.up_proj.weight
        for part in ("model", "ema/model")
    )
    assert not torch.equal(final, mean)


@pytest.mark.parametrize(
    ("keys_", "message"),
    [
        ({"unsup_coef": 1.0}, "unsup_coef is 1.0 and unsup_data \\[\\]; give both"),
        ({"ema_decay": 1.0}, "ema_decay is 1.0, but it must be at least 0 and below 1"),
        ({"lr_schedule": "exponential"}, "set lr_final to 0.1"),
        ({"lora_learning_rate": 0}, "lora_learning_rate is 0.0, but it must be greater than 0"),
    ],
)
def test_bad_settings(keys_, message):
    with pytest.raises(ConfigError, match=message):
        PPOConfig(**keys_)


def test_too_little_text(text, stories_tokenizer):
    config = GRPOConfig(unsup_data=[text], unsup_coef=1.0, unsup_length=5000)
    with pytest.raises(ConfigError, match=r"less than one block of unsup_length 5000; lower unsup_length to"):
        PretrainingMix(config, conversations.Encoder(stories_tokenizer))


# -------------------------------------------------------------------------------------------------- tokenizers


@pytest.fixture
def other_model(tmp_path, stories_dir, stories_tokenizer):
    """A scorer whose tokenizer numbers the same pieces otherwise: two of them change places."""
    folder = tmp_path / "other"
    models.save_model(models.load_scorer(str(stories_dir), torch.float32, 3), stories_tokenizer, folder, True)
    path = folder / "model" / "tokenizer.json"
    content = json.loads(path.read_text())
    vocab = content["model"]["vocab"]
    names = {i: piece for piece, i in vocab.items()}
    a, b = stories_tokenizer("there was a happy dog.", add_special_tokens=False)["input_ids"][:2]
    vocab[names[a]], vocab[names[b]] = b, a
    path.write_text(json.dumps(content))
    return str(folder)


def test_reward_model_with_its_own_tokenizer(other_model, base, stories_tokenizer, stories_dir, tmp_path):
    """Answers are decoded and encoded anew: the score is that of the text in the reward model's own tokens."""
    encoder = conversations.Encoder(stories_tokenizer)
    config = GRPOConfig(**keys(base, reward=[other_model]))
    sources, loaded = load_sources(config, torch.float32, (), encoder)
    assert isinstance(sources[0][1], OwnTokenizer) and not loaded
    own = conversations.Encoder(models.load_tokenizer(other_model))
    texts = ["there was a happy dog.", "a cat"]
    assert own.completion(texts[0]) != encoder.completion(texts[0])
    found, valid, _ = Rewards(sources)(None, ["Once upon a time", "Tom"], texts, {})
    scorer = models.Scorer(models.load_scorer(other_model, torch.float32))
    rows = batching.Sequences.of(
        [own.prompt("Once upon a time"), own.prompt("Tom")], [own.completion(t) for t in texts], 0
    )
    torch.testing.assert_close(found, scorer.rate(rows), rtol=1e-4, atol=1e-5)
    assert valid.all()
    like = tmp_path / "like"
    models.save_model(models.load_scorer(str(stories_dir), torch.float32, 3), stories_tokenizer, like, True)
    same, kept = load_sources(GRPOConfig(**keys(base, reward=[str(like)])), torch.float32, (), encoder)
    assert not isinstance(same[0][1], OwnTokenizer) and kept


def test_other_tokenizers_where_tokens_must_agree(other_model, base):
    with pytest.raises(
        ConfigError, match=r"critic .* has another tokenizer than the policy, but the critic reads"
    ):
        ppo.train(PPOConfig(**keys(base, critic=other_model)), rewards=(short,))
    with pytest.raises(
        ConfigError, match=r"reference .* has another tokenizer than the policy, but log-probs"
    ):
        grpo.train(GRPOConfig(**keys(base, reference=other_model)), rewards=(short,))

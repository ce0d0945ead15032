"""SFT and reward stages: the right loss, learning, exact resume, files that load elsewhere, bad input."""

from __future__ import annotations

import contextlib
import json
import math
import os
from pathlib import Path

import pytest
import torch
from helpers_rlhf import Killed, numbers, same_weights
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from dschat.config import ConfigError, DPOConfig, RewardConfig, SFTConfig
from dschat.engine import HybridEngine
from dschat.rlhf import batching, conversations, data, dpo, losses, models, reading, reward, sft
from dschat.rlhf.checkpoint import CheckpointError, latest
from dschat.rlhf.run import learning_rate, make_optimizer, set_lr

STAGES = {"sft": (SFTConfig, sft.train), "reward": (RewardConfig, reward.train)}


def run(stage: str, base: dict, **keys):
    cls, train = STAGES[stage]
    return train(cls(**{**base, "batch_size": 4, "learning_rate": 3e-3, "epochs": 2, **keys}))


# --------------------------------------------------------------------------------------------------- the loss


def test_sft_loss_is_hugging_faces_on_the_responses(new_stories_model, stories_tokenizer):
    """checklist 2.1 #1, #15, #16: only response tokens count, end of turn included; equal to HF row by row,
    any batch.
    """
    model = new_stories_model()
    encoder = conversations.Encoder(stories_tokenizer)
    texts = [
        ("Once upon a time", "there was a cat."),
        ("Tom", "ran."),
        ("One day", "it rained a lot, so they slept."),
    ]
    examples = [data.Example(encoder.prompt(p), [encoder.completion(a)], p) for p, a in texts]
    losses = []
    for e in examples:
        ids = torch.tensor([e.prompt_ids + e.answers[0]])
        labels = ids.clone()
        labels[0, : len(e.prompt_ids)] = -100
        with torch.no_grad():
            losses.append((float(model(ids, labels=labels).loss), len(e.answers[0])))
    engine = HybridEngine(model)
    tokens = sum(n for _, n in losses)
    for size in (1, 2, 3):
        config = SFTConfig(batch_size=size)
        expected = sum(x * n for x, n in losses) / tokens
        assert sft.evaluate(engine, examples, 0, config)["loss"] == pytest.approx(expected, rel=1e-4)
        config.aggregation = "sequence"
        assert sft.evaluate(engine, examples, 0, config)["loss"] == pytest.approx(
            sum(x for x, _ in losses) / 3, rel=1e-4
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_token_accuracy_is_the_share_of_hugging_faces_argmax(dtype, new_stories_model):
    """Of training and held-out responses in any batch, packed rows of several turns whose learnt words alone count, and
    of DPO's chosen answers. Every third token is the second likeliest; learnt are those where no rounding decides which
    is the likeliest."""
    generator, model = torch.Generator().manual_seed(2), new_stories_model().to(dtype)
    examples, right, count = [], 0, 0
    for length, said in ((9, 14), (3, 5), (20, 30), (6, 1)):
        prompt, answer, learnt = torch.randint(3, 200, (length,), generator=generator).tolist(), [], []
        for i in range(said):
            with torch.no_grad():
                logits = model(torch.tensor([prompt + answer])).logits[0, -1]
            (first, second), best = logits.topk(2)[0].tolist(), logits.topk(2)[1].tolist()
            answer.append(best[i % 3 == 1])
            learnt.append(first - second > 0.3 and i % 5 != 2)
            count, right = count + learnt[-1], right + (learnt[-1] and int(logits.argmax()) == answer[-1])
        examples.append(data.Example(prompt, [answer, answer[::-1]], "", learnt=[learnt, [True] * said]))
    assert 10 < right < count - 5 and len([own for e in examples for own in e.learnt_of(0) if not own]) > 5
    engine = HybridEngine(model)
    for size in (1, 3, 4):
        for aggregation in ("token", "sequence"):
            config = SFTConfig(batch_size=size, aggregation=aggregation)
            for found in (
                sft.evaluate(engine, examples, 0, config), sft.accumulate(engine, examples, 0, config)
            ):  # fmt: skip
                assert found["mean_token_accuracy"] == pytest.approx(right / count, rel=1e-9)
        config = DPOConfig(batch_size=size)
        reference = dpo.Reference(config, model, 0, torch.device("cpu"))
        reference.frozen = engine
        for found in (
            dpo.evaluate(engine, reference, examples, 0, config),
            dpo.accumulate(engine, reference, examples, range(4), 0, config),
        ):
            assert found["mean_token_accuracy"] == right / count


def test_others_words_within_an_answer_are_not_learnt(new_stories_model):
    """The loss of an answer of several turns is Hugging Face's with the user's turn labelled -100."""
    model = new_stories_model()
    answer, learnt = [40, 41, 2, 50, 51, 52, 60, 2], [True] * 3 + [False] * 3 + [True] * 2
    example = data.Example([1, 30, 31], [answer], "", learnt=[learnt])
    labels = [-100] * 3 + [i if own else -100 for i, own in zip(answer, learnt, strict=True)]
    with torch.no_grad():
        expected = float(model(torch.tensor([[1, 30, 31, *answer]]), labels=torch.tensor([labels])).loss)
    for aggregation in ("token", "sequence"):
        found = sft.evaluate(HybridEngine(model), [example], 0, SFTConfig(aggregation=aggregation))
        assert found["loss"] == pytest.approx(expected, rel=1e-4)
    chosen, rejected = dpo.pair_logprobs(
        HybridEngine(model.requires_grad_(False)),
        [data.Example([1, 30, 31], [answer] * 2, "", learnt=[learnt, [True] * 8])],
        0,
        mean=True,
    )
    assert float(chosen) == pytest.approx(-expected, rel=1e-4) and float(rejected) != pytest.approx(
        -expected, rel=1e-3
    )


@pytest.mark.parametrize("stage", STAGES)
def test_accumulation_changes_nothing(stage, base, tmp_path):
    """checklist 2.1 #16: 1 x 4 and 4 x 1 rows take the same steps, but for rounding."""
    seen = []
    for batch_size, accumulation in ((4, 1), (1, 4)):
        keys = {"batch_size": batch_size, "gradient_accumulation_steps": accumulation, "lora_r": 2}
        run(stage, base, **keys, output_dir=str(tmp_path / f"{batch_size}"))
        seen.append([line["loss"] for line in numbers(tmp_path / f"{batch_size}")])
    assert seen[0] == pytest.approx(seen[1], rel=1e-3)


def test_batches_filled_to_a_number_of_tokens():
    """Every row once, no batch over the limit, close to as few as can be, and the seed alone decides which."""
    lengths = [int(x) for x in torch.randint(1, 65, (500,), generator=torch.Generator().manual_seed(0))]
    found = batching.fill(lengths, 100, seed=3)
    assert sorted(i for batch in found for i in batch) == list(range(500))
    sizes = [sum(lengths[i] for i in batch) for batch in found]
    assert max(sizes) <= 100 and len(found) <= 1.03 * sum(lengths) / 100
    assert found == batching.fill(lengths, 100, seed=3) != batching.fill(lengths, 100, seed=4)
    assert batching.fill([5, 5], 5, seed=0) in ([[0], [1]], [[1], [0]]) and batching.fill([], 5, seed=0) == []


def test_filled_batches_take_the_steps_of_their_rows_alone(base, tmp_path, monkeypatch):
    """max_tokens_per_batch: loss and gradient of each step are those of its rows one by one, and all rows are seen in
    an epoch."""
    keys = {"lora_r": 2, "max_length": 40, "max_tokens_per_batch": 60, "gradient_accumulation_steps": 2}
    seen, original = [], sft.accumulate

    def spy(engine, examples, pad_id, config, pieces=None):
        found = original(engine, examples, pad_id, config, pieces)
        gradients = [p.grad.clone() for p in engine.model.parameters() if p.grad is not None]
        engine.model.zero_grad()
        alone = original(engine, examples, pad_id, config, [[e] for e in examples])
        again = [p.grad for p in engine.model.parameters() if p.grad is not None]
        assert alone == pytest.approx(found, rel=1e-5)
        for one, other in zip(gradients, again, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)
        assert pieces and all(sum(len(e.prompt_ids) + len(e.answers[0]) for e in p) <= 60 for p in pieces)
        seen.append([e.where for e in examples])
        return found

    monkeypatch.setattr(sft, "accumulate", spy)
    result = run("sft", base, **keys, output_dir=str(tmp_path / "straight"))
    monkeypatch.undo()
    half = len(seen) // 2
    assert result["steps"] == len(seen)
    for epoch in (seen[:half], seen[half:]):
        assert sorted(w for rows in epoch for w in rows) == sorted({w for rows in seen for w in rows})
    assert len({w for rows in seen for w in rows}) == 12 and seen[:half] != seen[half:]


def test_filled_batches_resume(base, tmp_path, kill_after):
    keys = {"lora_r": 2, "max_length": 40, "max_tokens_per_batch": 60}
    run("sft", base, **keys, output_dir=str(tmp_path / "straight"))
    kill_after(3)
    with pytest.raises(Killed):
        run("sft", base, **keys)
    kill_after(None)
    run("sft", base, **keys)
    assert numbers(tmp_path / "run") == numbers(tmp_path / "straight")
    assert same_weights(tmp_path / "run" / "model", tmp_path / "straight" / "model")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"max_tokens_per_batch": 100},
            "max_tokens_per_batch is 100, less than max_length 512; set it to 512",
        ),
        ({"max_tokens_per_batch": -1}, "max_tokens_per_batch is -1, but it must be 0 or more"),
        (
            {"max_tokens_per_batch": 600, "stream": True},
            "max_tokens_per_batch is 600 and stream true, .* leave out",
        ),
    ],
)
def test_limits_that_cannot_be(keys, message):
    with pytest.raises(ConfigError, match=message):
        SFTConfig(**keys)


# -------------------------------------------------------------------------------------------- what is written


def test_sft_learns_and_loads(base, tmp_path):
    result = run("sft", base, lora_r=4, learning_rate=1e-2, epochs=4, eval_data=base["data"], eval_every=3)
    lines = numbers(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(1, 13)) and lines[-1]["loss"] < 0.7 * lines[0][
        "loss"
    ]
    assert [line["step"] for line in lines if "eval/loss" in line] == [3, 6, 9, 12]
    assert result["eval_loss"] == lines[-1]["eval/loss"]
    assert result["eval_mean_token_accuracy"] == lines[-1]["eval/mean_token_accuracy"]
    assert lines[0]["mean_token_accuracy"] < lines[-1]["mean_token_accuracy"] <= 1
    assert lines[0]["learning_rate"] == 1e-2 and lines[-1]["learning_rate"] < 1e-3, "linear to 0"
    files = set(os.listdir(tmp_path / "run"))
    assert files >= {
        "config.yaml",
        "run.json",
        "metrics.jsonl",
        "checkpoints",
        "model",
        "adapter",
        "result.json",
    }
    meta = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (
        meta["seed"] == 0 and meta["versions"]["torch"] == torch.__version__ and meta["config"]["lora_r"] == 4
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").eval()
    tokenizer = models.load_tokenizer(str(tmp_path / "run"))
    encoder = conversations.Encoder(tokenizer)
    records, stats = reading.read(base["data"])
    examples = data.sft_examples(records, encoder, stats)
    found = sft.evaluate(HybridEngine(model), examples, 0, SFTConfig())
    assert found["loss"] == pytest.approx(result["eval_loss"], rel=1e-3), (
        "the merged model is the trained one"
    )


def test_reward_learns_is_normalised_and_loads(base, tmp_path):
    """checklist 2.1 #20; 2.2 reward 3, 2.2 plus 4: scores of training answers have mean 0 and
    deviation 1 after the stored ones are taken out.
    """
    result = run("reward", base, lora_r=4, learning_rate=1e-2, epochs=4, eval_data=base["data"])
    assert result["eval_accuracy"] == 1.0 and result["eval_loss"] < 0.3 and result["eval_pairs"] == 12
    assert 0 <= result["eval_longer_wins"] <= 1
    for line in numbers(tmp_path / "run"):
        assert line["min_reward"] < line["mean_reward"] < line["max_reward"] and line["margin"] <= (
            line["max_reward"] - line["min_reward"]
        )
    folder = tmp_path / "run" / "model"
    config = AutoModelForSequenceClassification.from_pretrained(folder).config
    assert (config.reward_mean, config.reward_std) == (result["reward_mean"], result["reward_std"])
    scorer = models.Scorer(models.load_scorer(str(folder), torch.float32))
    records, stats = reading.read(base["data"])
    examples = data.pair_examples(records, conversations.Encoder(models.load_tokenizer(str(folder))), stats)
    chosen, rejected = reward.pair_scores(scorer, examples, 0)
    assert (chosen > rejected).all()
    both = torch.cat([chosen, rejected]).detach()
    raw = both * result["reward_std"] + result["reward_mean"]
    told = [result[f"eval_{name}_reward"] for name in ("min", "mean", "max")]
    assert told == pytest.approx([float(x) for x in (raw.min(), raw.mean(), raw.max())], abs=1e-3)
    assert float(both.mean()) == pytest.approx(0, abs=1e-3) and float(
        both.std(correction=0)
    ) == pytest.approx(1, abs=1e-3)
    adapter = models.load_scorer(str(tmp_path / "run" / "adapter"), torch.float32)
    alone = reward.pair_scores(models.Scorer(adapter), examples, 0)
    assert torch.allclose(torch.stack(alone), torch.stack([chosen, rejected]), atol=1e-4)
    with_base = run("reward", base, normalise=False, max_steps=1, output_dir=str(tmp_path / "raw"))
    assert "reward_mean" not in with_base


def test_margins_are_used(base, tmp_path):
    losses = []
    for margin in ("", "number"):
        run("reward", base, max_steps=1, margin=margin, output_dir=str(tmp_path / f"m{margin}"))
        losses.append(numbers(tmp_path / f"m{margin}")[0]["loss"])
    assert losses[1] > losses[0] + 1, "the numbers 0 to 5 have to be won by"


# ----------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("lora_r", [0, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_resumed_equals_straight(stage, lora_r, base, tmp_path, kill_after):
    """checklist 2.1 #25: killed after a step's numbers and before its checkpoint, and started again: the
    same run.
    """
    keys = {"lora_r": lora_r, "eval_data": base["data"], "eval_every": 2}
    straight = run(stage, base, **keys, output_dir=str(tmp_path / "straight"))
    for at in (1, 4):
        kill_after(at)
        with pytest.raises(Killed):
            run(stage, base, **keys)
        newest = latest(tmp_path / "run" / "checkpoints")
        assert newest is None if at == 1 else newest.name == "step-000003", "at most the running step is lost"
    kill_after(None)
    resumed = run(stage, base, **keys)
    ignored = ("seconds", "written")
    assert {k: v for k, v in resumed.items() if k not in ignored} == {
        k: v for k, v in straight.items() if k not in ignored
    }
    assert numbers(tmp_path / "run") == numbers(tmp_path / "straight")
    for folder in ("model", "checkpoints"):
        assert same_weights(tmp_path / "run" / folder, tmp_path / "straight" / folder)
    before = os.stat(tmp_path / "run" / "result.json").st_mtime_ns
    assert run(stage, base, **keys) == resumed, "a finished run gives its result at once"
    assert os.stat(tmp_path / "run" / "result.json").st_mtime_ns == before


def test_what_a_folder_refuses(base, tmp_path):
    run("sft", base, max_steps=1)
    with pytest.raises(
        ConfigError, match=r"holds a run with learning_rate 0\.003, not 0\.5; name another output_dir"
    ):
        run("sft", base, max_steps=1, learning_rate=0.5)
    with pytest.raises(ConfigError, match="holds a run already; name another, or add --overwrite"):
        run("sft", base, max_steps=1, resume="never")
    with pytest.raises(ConfigError, match=r"holds a run of sft; name another"):
        run("reward", base, max_steps=1)
    assert run("sft", base, max_steps=1, learning_rate=0.5, overwrite=True)["steps"] == 1
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(ConfigError, match="holds files of no run, so it is not deleted"):
        run("sft", base, output_dir=str(tmp_path / "mine"), overwrite=True)
    with pytest.raises(ConfigError, match="is a file; name a folder"):
        run("sft", base, output_dir=str(tmp_path / "mine" / "thesis.txt"))


def test_corrupt_checkpoint_is_said(base, tmp_path, kill_after):
    kill_after(3)
    with pytest.raises(Killed):
        run("sft", base)
    newest = latest(tmp_path / "run" / "checkpoints")
    assert newest
    os.truncate(newest / "tensors.safetensors", 100)
    with pytest.raises(
        CheckpointError, match=r"step-000002 has a tensors\.safetensors that is not what was written"
    ):
        run("sft", base)


def test_bad_settings(base, tmp_path):
    with pytest.raises(ConfigError, match="data is empty; name at least one file"):
        run("sft", base, data=[])
    with pytest.raises(
        ConfigError,
        match=r"the gradient is (nan|inf) at step 2 of sft; lower the learning rate; the batch is in",
    ):
        run("sft", base, learning_rate=1e30, output_dir=str(tmp_path / "nan"))
    assert latest(tmp_path / "nan" / "checkpoints").name == "step-000001", "the broken weights are not saved"
    kept = json.loads((tmp_path / "nan" / "failed-step-000002" / "batch.json").read_text())
    assert len(kept["rows"]) == 4 and all("pairs.jsonl line" in row["where"] for row in kept["rows"])


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 2 / 3, 1 / 3]),
        ("cosine", [0.5, 1.0, 1.0, 0.75, 0.25]),
        ("linear 0.1", [0.5, 1.0, 1.0, 0.7, 0.4]),
        ("cosine 0.2", [0.5, 1.0, 1.0, 0.8, 0.4]),
        ("exponential 0.001", [0.5, 1.0, 1.0, 0.1, 0.01]),
    ],
)
def test_learning_rate(schedule, expected):
    """checklist 2.2 general 5: annealed to lr_final, which is 0 by default."""
    name, _, final = schedule.partition(" ")
    config = SFTConfig(warmup_steps=2, lr_schedule=name, lr_final=float(final or 0))
    assert [learning_rate(config, 1.0, s, 5) for s in range(5)] == pytest.approx(expected)


def test_weight_decay_and_lora_groups():
    """Biases and norms do not decay; an adapter may have its own rate, and the schedule moves both."""
    module = torch.nn.ModuleDict({"lora_A": torch.nn.Linear(3, 2), "score": torch.nn.Linear(2, 1)})
    config = SFTConfig(weight_decay=0.1, learning_rate=1e-3)
    optimizer = make_optimizer(module, config, 1e-3, 4e-3)
    named = {id(p): n for n, p in module.named_parameters()}
    found = {named[id(p)]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert found == {
        "lora_A.weight": (4e-3, 0.1), "lora_A.bias": (4e-3, 0.0),
        "score.weight": (1e-3, 0.1), "score.bias": (1e-3, 0.0),
    }  # fmt: skip
    set_lr(optimizer, 5e-4)
    assert {g["lr"] for g in optimizer.param_groups} == {5e-4, 2e-3}
    assert len(make_optimizer(module, SFTConfig(), 1e-3).param_groups) == 1


def test_lora_learning_rate_is_used(base, tmp_path, stories_dir):
    """The head of a reward model trains at learning_rate, its adapter at lora_learning_rate."""
    moved = {}
    for rate in (1e-6, 1e-2):
        folder = tmp_path / str(rate)
        run("reward", base, lora_r=2, lora_learning_rate=rate, max_steps=1, output_dir=str(folder))
        tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
        moved[rate] = max(float(v.abs().max()) for k, v in tensors.items() if "lora_B" in k)
    assert moved[1e-6] < 1e-5 and moved[1e-2] > 5e-3


# --------------------------------------------------------------------------------- DeepSpeed-Chat's reward loss


def test_per_token_loss_is_a_loop_over_prefixes(stories_dir, stories_tokenizer):
    """-log sigmoid of the difference of scores as if both answers ended at t, from where they part; an answer
    that is over keeps its score.
    """
    scorer = models.Scorer(models.load_scorer(str(stories_dir), torch.float32, seed=3))
    encoder = conversations.Encoder(stories_tokenizer)
    texts = [
        ("Once", "there was a happy dog.", "there was a mad man who cried."),
        ("Tom", "ran.", "sat down."),
    ]
    examples = [
        data.Example(encoder.prompt(p), [encoder.completion(c), encoder.completion(r)], p)
        for p, c, r in texts
    ]
    loss, found = reward.pair_loss(scorer, examples, 0, RewardConfig(loss="per_token"), normalizer=2)
    total, wins = 0.0, 0.0
    for e in examples:
        chosen, rejected = e.answers
        same = next(i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b)
        terms = []
        for t in range(same, max(len(chosen), len(rejected))):
            pair = [a[: t + 1] for a in (chosen, rejected)]
            c, r = scorer.rate(batching.Sequences.of([e.prompt_ids] * 2, pair, 0)).tolist()
            terms.append(math.log1p(math.exp(r - c)))
        total += sum(terms) / len(terms)
        wins += c > r
    assert len(examples[0].answers[0]) != len(examples[0].answers[1]) and same == 0
    assert float(loss.detach()) == pytest.approx(total / 2, rel=1e-4)
    assert float(found["accuracy"]) == wins / 2


def test_per_token_loss_ignores_padding():
    """checklist 2.1 #1: garbage in masked places changes neither loss nor gradient."""
    g = torch.Generator().manual_seed(0)
    mask = torch.arange(6)[None] < torch.tensor([3, 6, 1])[:, None]
    other = torch.arange(6)[None] < torch.tensor([5, 2, 1])[:, None]
    chosen, rejected = (torch.randn(3, 6, generator=g) for _ in range(2))
    results = []
    for garbage in (0.0, float("nan")):
        c = torch.where(mask, chosen, garbage).requires_grad_()
        r = torch.where(other, rejected, garbage).requires_grad_()
        loss, _ = losses.per_token_pair_loss(c, r, mask, other, torch.tensor([1, 0, 0]))
        results.append((loss.detach(), *torch.autograd.grad(loss, (c, r))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_per_token_reward_model_learns(base):
    result = run(
        "reward", base, lora_r=4, learning_rate=1e-2, epochs=4, loss="per_token", eval_data=base["data"]
    )
    assert result["eval_accuracy"] > 0.9


def test_auto_dtype_stays_what_it_was_where_the_run_began(base, kill_after, monkeypatch):
    """A run begun on a GPU, in bfloat16, goes on in bfloat16 on a CPU where auto is float32."""
    keys = {"dtype": "auto", "max_steps": 2, "response": "chosen"}
    pick = models.pick_dtype
    for auto in (torch.bfloat16, torch.float32):
        kill_after(2 if auto == torch.bfloat16 else None)
        monkeypatch.setattr(
            models, "pick_dtype", lambda name, *_, a=auto: a if name == "auto" else pick(name)
        )
        with contextlib.suppress(Killed):
            run("sft", base, **keys)
    assert json.loads((Path(base["output_dir"]) / "run.json").read_text())["dtype"] == "bfloat16"
    written = load_file(Path(base["output_dir"]) / "model" / "model.safetensors")
    assert {t.dtype for t in written.values()} == {torch.bfloat16}

"""`dschat eval`: every number against a loop, Hugging Face or a case whose answer is known."""

from __future__ import annotations

import copy
import json
import math
import time
import tracemalloc

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from dschat import cli
from dschat.config import ConfigError, EvalConfig
from dschat.rlhf import batching, conversations, data, evals, evaluate, models, reading, reward

PROMPTS = ["Once upon a time", "One day, a girl", "Tom and his dog", "The sun was", "Lily saw"]


@pytest.fixture
def rows(tmp_path):
    """rows(list of dicts): the name of a JSONL file with them."""

    def write(values: list[dict]) -> str:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(v) + "\n" for v in values))
        return str(path)

    return write


@pytest.fixture
def config(stories_dir):
    return lambda task, **kw: EvalConfig(
        **{
            "model": str(stories_dir),
            "task": task,
            "dtype": "float32",
            "max_new_tokens": 8,
            "batch_size": 2,
            **kw,
        }
    )


@pytest.fixture
def judge(tmp_path, stories_dir, stories_tokenizer) -> str:
    """A reward model with a random head."""
    model = models.load_scorer(str(stories_dir), torch.float32, seed=3)
    models.set_scorer_padding(model, stories_tokenizer, conversations.Encoder(stories_tokenizer))
    model.config.reward_mean, model.config.reward_std = 0.25, 2.0
    models.save_model(model, stories_tokenizer, tmp_path / "judge", merge=True)
    return str(tmp_path / "judge")


# ------------------------------------------------------------------------------------------------- statistics


def test_bootstrap():
    found = evals.bootstrap([1.0, 2.0, 4.0], [1, 1, 2])
    assert found["mean"] == (1 + 2 + 8) / 4 and found["low"] < found["mean"] < found["high"]
    assert evals.bootstrap([3.0] * 9) == {"mean": 3.0, "low": 3.0, "high": 3.0, "rows": 9}
    # The deviation of a mean of 400 coin flips is 0.025, so the interval is about 0.098 wide.
    wide = evals.bootstrap([float(i % 2) for i in range(400)])
    assert wide["high"] - wide["low"] == pytest.approx(0.098, abs=0.012)
    with pytest.raises(ConfigError, match="there is no row to evaluate"):
        evals.bootstrap([])


def test_resamples_in_blocks(monkeypatch):
    """The numbers of all resamples at once, in memory that does not grow with their number."""
    generator = np.random.default_rng(3)
    values, weights = generator.normal(size=(2, 700))
    before, after = values[:300].tolist(), values[300:600].tolist()
    blocks = []
    for size in (10**9, 5_000, 1):
        monkeypatch.setattr(evaluate, "BLOCK", size)
        found = evals.bootstrap(values.tolist(), abs(weights).tolist(), 5)
        blocks.append((found, evaluate.paired_bootstrap(before, after, 7)))
    assert blocks[0] == blocks[1] == blocks[2]
    rows = np.random.default_rng(5).integers(0, 700, (evals.RESAMPLES, 700))
    drawn = (values * abs(weights))[rows].sum(1) / abs(weights)[rows].sum(1)
    assert [blocks[0][0][side] for side in ("low", "high")] == np.percentile(drawn, [2.5, 97.5]).tolist()
    monkeypatch.undo()
    many = [float(i % 3) for i in range(10_000)]
    tracemalloc.start()
    evals.bootstrap(many)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32 * 2**20, f"{peak / 2**20:.0f} MB"


def test_classification_by_hand():
    labels, p = [1, 1, 1, 0, 0, 0, 0], [0.9, 0.8, 0.3, 0.6, 0.2, 0.1, 0.05]
    found = evals.classification(labels, p, ["no", "yes"])
    assert found["accuracy"] == pytest.approx(5 / 7) and found["confusion"] == [[3, 1], [1, 2]]
    assert (found["precision"], found["recall"]) == pytest.approx((2 / 3, 2 / 3))
    assert found["f1"] == pytest.approx(2 / 3)
    pairs = [(a > b) + 0.5 * (a == b) for a, y in zip(p, labels) if y for b, z in zip(p, labels) if not z]  # noqa: B905
    assert found["auc"] == pytest.approx(sum(pairs) / len(pairs))
    assert found["roc"][0] == [0.0, 0.0] and found["roc"][-1] == [1.0, 1.0]
    assert "auc" not in evals.classification([1, 1], [0.9, 0.8], ["no", "yes"]), "one class has no ROC"


def test_calibration_by_hand():
    found = evals.calibration([1, 0, 1, 1], [0.95, 0.95, 0.55, 0.55])
    assert found["bins"] == [[pytest.approx(0.55), 1.0, 2], [pytest.approx(0.95), 0.5, 2]]
    assert found["ece"] == pytest.approx(0.5 * 0.45 + 0.5 * 0.45)
    assert found["brier"] == pytest.approx((0.05**2 + 0.95**2 + 2 * 0.45**2) / 4)
    assert found["log_loss"] == pytest.approx(-(math.log(0.95) + math.log(0.05) + 2 * math.log(0.55)) / 4)
    rng = np.random.default_rng(0)
    p = rng.random(20_000)
    assert evals.calibration((rng.random(20_000) < p).astype(int).tolist(), p.tolist())["ece"] < 0.02
    assert evals.calibration([1], [1.0])["bins"] == [[1.0, 1.0, 1]], "1 belongs to the last bin"


def test_win_rate_at_equal_length():
    """Ours wins whenever it is longer, and is longer in three of four: better only because it talks more."""
    rng = np.random.default_rng(1)
    longer = rng.random(400) < 0.75
    d = np.where(longer, 10.0, -10.0)
    lucky = rng.random(400) < np.where(longer, 0.9, 0.1)
    found = evals.win_rates(lucky.astype(float).tolist(), [0.5] * 400, d.tolist())
    assert found["win_rate"] > 0.65 and found["low"] > 0.6
    assert found["win_rate_length_controlled"] == pytest.approx(0.5, abs=0.06)
    better = evals.win_rates((rng.random(400) < 0.8).astype(float).tolist(), [0.5] * 400, d.tolist())
    assert better["win_rate_length_controlled"] == pytest.approx(better["win_rate"], abs=0.05)
    ties = evals.win_rates([1.0] * 5, [1.0] * 5, [0.0] * 5)
    assert (ties["win_rate"], ties["low"], ties["high"]) == (0.5, 0.5, 0.5)
    assert ties["win_rate_length_controlled"] == pytest.approx(0.5)
    assert evals.win_rates([1.0] * 3, [0.0] * 3, [1.0, 2.0, 3.0])["win_rate_length_controlled"] == 1.0


def test_length_control_is_scikit_learns():
    """The fit in closed steps against LogisticRegression: ordinary, one-sided, tied and separable cases."""
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(5)
    for n, share, slope in (
        (200, 0.5, 0.0),
        (200, 0.5, 9.0),
        (200, 0.01, 0.0),
        (40, 0.95, -3.0),
        (4, 0.5, 1.0),
    ):
        d = rng.normal(3.0, 20.0, n)
        wins = (
            rng.random(n) < 1 / (1 + np.exp(-np.log(share / (1 - share)) - slope * np.tanh(d / d.std())))
        ) * 1.0
        wins[:3] = 0.5, 1.0, 0.0
        x = np.tanh(d / d.std())[:, None]
        y, weight = np.repeat([1.0, 0.0], n), np.concatenate([wins, 1 - wins])
        fit = LogisticRegression(tol=1e-10, max_iter=1000).fit(
            np.concatenate([x, x]), y, sample_weight=weight
        )
        mine = evals.length_controlled(wins, d, np.arange(n)[None])
        assert mine[0] == pytest.approx(1 / (1 + np.exp(-fit.intercept_[0])), abs=1e-5)
    separable = evals.length_controlled(
        np.array([1.0, 1.0, 0.0, 0.0]), np.array([9.0, 9.0, -9.0, -9.0]), np.arange(4)[None]
    )
    assert separable[0] == pytest.approx(0.5)
    assert evals.length_controlled(np.ones(3), np.arange(3.0), np.arange(3)[None])[0] == 1.0
    assert evals.length_controlled(np.zeros(3), np.arange(3.0), np.arange(3)[None])[0] == 0.0


def test_interval_at_equal_length():
    """A win by length alone leaves 0.5 in the interval of the controlled rate, a true preference does not."""
    held = 0
    for seed in range(10):
        rng = np.random.default_rng(seed)
        d = rng.normal(5.0, 10.0, 200)
        half = [0.5] * 200

        def rates(wins, d=d, half=half):
            return evals.win_rates(wins.astype(float).tolist(), half, d.tolist())

        start = time.process_time()
        longer = rates(rng.random(200) < 1 / (1 + np.exp(-2.5 * np.tanh(d / d.std()))))
        assert time.process_time() - start < 1, "1000 resamples"
        low, high = (longer[f"win_rate_length_controlled_{side}"] for side in ("low", "high"))
        assert low < longer["win_rate_length_controlled"] < high < low + 0.3
        assert longer["win_rate"] > 0.55 and longer["low"] > 0.5, (
            "the plain rate takes length for a preference"
        )
        held += low < 0.5 < high
    assert held >= 8, "19 of 20 are promised"
    better = rates(rng.random(200) < 0.85)
    low, high = (better[f"win_rate_length_controlled_{side}"] for side in ("low", "high"))
    assert 0.5 < low < better["win_rate_length_controlled"] < high < 1
    again = rates(rng.random(200) < 2)
    assert again["win_rate_length_controlled_low"] == again["win_rate_length_controlled_high"] == 1.0
    shown = dict(evals.rows(better))
    assert shown["win_rate_length_controlled"].endswith(f"  [{low:.4g}, {high:.4g}]")
    assert "win_rate_length_controlled_low" not in shown
    values = [1.0, 0.0, 1.0, 1.0, 0.0]
    pair = [evals.win_rates(values, [0.5] * 5, [1.0, 2.0, 3.0, 4.0, 5.0], seed=s) for s in (3, 3)]
    assert pair[0] == pair[1], "seeded"
    with pytest.raises(ConfigError, match=r"the score of row 2 is nan; load the model in float32"):
        evals.win_rates([1.0, float("nan")], [0.5] * 2, [1.0, 2.0])


# ------------------------------------------------------------------------------------------------------- tasks


def test_perplexity_is_hugging_faces(config, rows, stories_model, stories_tokenizer):
    encoder = conversations.Encoder(stories_tokenizer)
    answers = [" there was a dog.", " ran.", " fell and cried.", " rose.", " a bird."]
    total, count = 0.0, 0
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        p, a = encoder.prompt(prompt), encoder.completion(answer)
        labels = torch.tensor([[-100] * len(p) + a])
        with torch.no_grad():
            total += float(stories_model(torch.tensor([p + a]), labels=labels).loss) * len(a)
        count += len(a)
    pairs = [{"prompt": p, "completion": a} for p, a in zip(PROMPTS, answers, strict=True)]
    found = evals.perplexity(config("perplexity", data=[rows(pairs)]))
    assert (
        found["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4) and found["tokens"] == count
    )
    assert found["low"] < found["perplexity"] < found["high"]

    text = "Once upon a time there was a cat. The cat was happy and ran away."
    ids = stories_tokenizer(text)["input_ids"]
    with torch.no_grad():
        loss = float(stories_model(torch.tensor([ids]), labels=torch.tensor([ids])).loss)
    found = evals.perplexity(config("perplexity", data=[rows([{"text": text}])]))
    assert found["loss"] == pytest.approx(loss, rel=1e-4) and found["tokens"] == len(ids) - 1


def test_reward_on_pairs(config, rows, judge, pairs):
    """Accuracy and log loss against scores taken one by one; the probability is that of raw scores."""
    found = evals.reward_pairs(config("reward", model=judge, data=[pairs]))
    scorer = models.Scorer(models.load_scorer(judge, torch.float32))
    encoder = conversations.Encoder(models.load_tokenizer(judge))
    wins, nats, longer = [], [], []
    for record in reading.read([pairs])[0]:
        c, r = (encoder.completion(record.columns[k]) for k in ("chosen", "rejected"))
        prompt = encoder.prompt(record.columns["prompt"])
        gap = 2.0 * float(
            scorer.rate(batching.Sequences.of([prompt], [c], 0))
            - scorer.rate(batching.Sequences.of([prompt], [r], 0))
        )
        wins.append(gap > 0)
        nats.append(math.log1p(math.exp(-gap)))
        longer.append((len(c) > len(r)) + 0.5 * (len(c) == len(r)))
    assert found["accuracy"] == sum(wins) / 12 and found["rows"] == 12
    assert found["longer_wins"] == sum(longer) / 12
    assert found["calibration"]["log_loss"] == pytest.approx(sum(nats) / 12, rel=1e-3)
    sides = found["classification"]
    assert sides["accuracy"] == pytest.approx(found["accuracy"]), "turning pairs round changes no decision"
    assert sum(map(sum, sides["confusion"])) == 12 and 0 < sum(sides["confusion"][0]) < 12


def test_a_language_model_judges_nothing(config, pairs, stories_dir):
    with pytest.raises(ConfigError, match="no trained reward model"):
        evals.reward_pairs(config("reward", data=[pairs]))


def test_answers_of_one_length_are_half_right():
    gaps = [(3, 1), (2, 2), (1, 4)]
    assert reward.longer_wins([data.Example([], [[0] * a, [0] * b], "") for a, b in gaps]) == 0.5
    assert reward.longer_wins([data.Example([], [[0] * 3, [0]], "")]) == 1.0


def test_perplexity_is_of_the_assistants_tokens(config, rows, stories_model, stories_tokenizer):
    said = [
        {"role": r, "content": c} for r, c in (("assistant", "a dog"), ("user", "and"), ("assistant", "ran"))
    ]
    tokenizer = copy.deepcopy(stories_tokenizer)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    encoder = conversations.Encoder(tokenizer)
    found = evals.perplexity(
        config("perplexity", data=[rows([{"prompt": [{"role": "user", "content": "Once"}], "completion": said}])]),
        stories_model, tokenizer,
    )  # fmt: skip
    whole = [i for text in ("a dog", "ran") for i in encoder.completion(text)]
    assert found["tokens"] == len(whole)


@pytest.mark.parametrize("labels", [1, 2])
def test_classifier(config, rows, judge, tmp_path, stories_tokenizer, stories_dir, labels):
    """Against Hugging Face one row at a time, without padding."""
    folder = judge
    if labels == 2:
        torch.manual_seed(1)
        model = AutoModelForSequenceClassification.from_pretrained(
            stories_dir, num_labels=2, label2id={"bad": 0, "good": 1}, id2label={0: "bad", 1: "good"}
        )
        model.config.pad_token_id = 0
        models.save_model(model, stories_tokenizer, tmp_path / "two", merge=True)
        folder = str(tmp_path / "two")
    values = [{"text": p, "label": ("good", "bad")[i % 2]} for i, p in enumerate(PROMPTS * 2)]
    found = evals.classify(config("classify", model=folder, data=[rows(values)]))
    model = AutoModelForSequenceClassification.from_pretrained(f"{folder}/model").eval()
    right = 0
    for v in values:
        with torch.no_grad():
            logits = model(torch.tensor([stories_tokenizer(v["text"])["input_ids"]])).logits[0]
        positive = bool(logits[0] > 0) if labels == 1 else bool(logits[1] > logits[0])
        right += positive == (v["label"] == "good")
    assert found["accuracy"] == right / 10 and found["labels"] == ["bad", "good"]
    assert sum(map(sum, found["confusion"])) == 10
    for v in values:
        v["label"] += v["text"]
    with pytest.raises(ConfigError, match=r"column label has 10 values"):
        evals.classify(config("classify", model=folder, data=[rows(values)]))


def test_classifier_of_many_classes(config, rows, tmp_path, stories_tokenizer, stories_dir):
    """Every number is scikit-learn's over Hugging Face's logits; labels by name or number; unknown ones refused."""
    from sklearn import metrics

    torch.manual_seed(1)
    names = ["bad", "fair", "good", "odd"]
    model = AutoModelForSequenceClassification.from_pretrained(
        stories_dir,
        num_labels=4,
        id2label=dict(enumerate(names)),
        label2id={n: i for i, n in enumerate(names)},
    ).eval()
    model.config.pad_token_id = 0
    models.save_model(model, stories_tokenizer, tmp_path / "four", merge=True)
    folder = str(tmp_path / "four")
    y = [0, 1, 2, 2, 1, 0, 0, 2, 1, 3, 3, 2]
    texts = [p + " and" * (i // 5) for i, p in enumerate((PROMPTS * 3)[:12])]
    values = [{"text": t, "label": names[k]} for t, k in zip(texts, y, strict=True)]
    with torch.no_grad():
        p = torch.cat(
            [model(torch.tensor([stories_tokenizer(t)["input_ids"]])).logits for t in texts]
        ).softmax(-1)
    said = p.argmax(1).tolist()
    found = evals.classify(config("classify", model=folder, data=[rows(values)]))
    assert found["labels"] == names and found["rows"] == 12 and len(set(said)) > 1
    assert found["accuracy"] == pytest.approx(metrics.accuracy_score(y, said))
    assert found["confusion"] == metrics.confusion_matrix(y, said, labels=range(4)).tolist()
    for average in ("macro", "weighted"):
        expected = metrics.precision_recall_fscore_support(y, said, average=average, zero_division=0.0)[:3]
        assert [found[average][k] for k in ("precision", "recall", "f1")] == pytest.approx(expected)
    auc = metrics.roc_auc_score(
        y, p.double().numpy() / p.double().numpy().sum(1, keepdims=True), multi_class="ovr"
    )
    assert found["auc"] == pytest.approx(auc, abs=1e-6) and "note" not in found
    shown = dict(evals.rows(found))
    assert shown["accuracy"].endswith(f"  [{found['low']:.4g}, {found['high']:.4g}]")
    assert shown["labels"] == "bad, fair, good, odd"
    confidence = p.double().max(1).values.numpy()
    right = np.array(y) == np.array(said)
    assert found["calibration"]["brier"] == pytest.approx(((confidence - right) ** 2).mean(), abs=1e-6)

    numbered = [{"text": t, "label": k} for t, k in zip(texts, y, strict=True)]
    assert (
        evals.classify(config("classify", model=folder, data=[rows(numbered)]))["confusion"]
        == found["confusion"]
    )
    fewer = evals.classify(config("classify", model=folder, data=[rows(values[:9])]))
    assert (
        fewer["note"]
        == "no row is of class odd, so the area under the ROC is the mean of the other 3 classes"
    )
    one = evals.classify(config("classify", model=folder, data=[rows(values[:1])]))
    assert one["note"] == "all rows are of class bad, so there is no ROC; give rows of other classes too"
    assert "auc" not in one and "NaN" not in json.dumps(one)
    values[0]["label"] = "great"
    with pytest.raises(
        ConfigError, match=r"column label has 1 values that model .* lacks \(great\).* bad, fair, good"
    ):
        evals.classify(config("classify", model=folder, data=[rows(values)]))
    with pytest.raises(reading.DataError, match=r"line 2 has no label; give it one, or leave the row out"):
        evals.classify(config("classify", model=folder, data=[rows([*values[1:2], {"text": "x"}])]))


def test_classes_of_one_kind(config, rows, judge):
    """A one-label model: 0 and 1 are classes by themselves, a lone name is none; no ROC is said, not NaN."""
    found = evals.classify(
        config("classify", model=judge, data=[rows([{"text": p, "label": 1} for p in PROMPTS])])
    )
    assert (
        found["confusion"][0] == [0, 0] and sum(found["confusion"][1]) == 5 and found["labels"] == ["0", "1"]
    )
    assert found["note"] == "all rows are of class 1, so there is no ROC; give rows of other classes too"
    assert dict(evals.rows(found))["note"] == found["note"] and "NaN" not in json.dumps(found)
    with pytest.raises(
        ConfigError, match=r"column label has the one value good, .* give rows of both classes"
    ):
        evals.classify(config("classify", model=judge, data=[rows([{"text": "Once", "label": "good"}])]))


def test_win_rate_of_a_model_with_itself_and_another(
    config, rows, judge, tmp_path, stories_tokenizer, new_stories_model
):
    file = rows([{"prompt": p} for p in PROMPTS])
    found = evals.win_rate(config("win_rate", data=[file], against=str(config("kl").model), judge=judge))
    assert found["win_rate"] == 0.5 and found["longer_by"] == 0, "same seeds, same answers, all ties"
    model = new_stories_model()
    with torch.no_grad():
        model.lm_head.weight.add_(0.05 * torch.randn(model.lm_head.weight.shape))
    models.save_model(model, stories_tokenizer, tmp_path / "other", merge=True)
    found = evals.win_rate(config("win_rate", data=[file], against=str(tmp_path / "other"), judge=judge))
    rows_ = found["completions"]
    assert found["win_rate"] == pytest.approx(
        sum((r["score"] > r["score_against"]) + 0.5 * (r["score"] == r["score_against"]) for r in rows_) / 5
    )
    assert found["score"] == pytest.approx(sum(r["score"] for r in rows_) / 5)
    assert any(r["answer"] != r["against"] for r in rows_)


def test_answers(config, rows, tmp_path):
    """Mean over samples and prompts, share of prompts solved at least once, rows without a score."""
    (tmp_path / "mine.py").write_text(
        "def has(prompts, completions, completion_ids, letter, **columns):\n"
        "    assert [len(ids) > 0 for ids in completion_ids] == [True] * len(completions)\n"
        "    assert all(isinstance(i, int) for ids in completion_ids for i in ids)\n"
        "    return [None if x is None else float(x in c) for c, x in zip(completions, letter)]\n"
    )
    values = [{"prompt": p, "letter": "w" if i else None} for i, p in enumerate(PROMPTS)]
    name = f"{tmp_path}/mine.py:has"
    found = evals.answers(config("answers", data=[rows(values)], verifier=[name], samples=3))
    texts = found["completions"]
    assert len(texts) == 15 and all((t["has"] is None) == (i < 3) for i, t in enumerate(texts))
    scores = [[float("w" in t["answer"]) for t in texts[i : i + 3]] for i in range(3, 15, 3)]
    assert found["has"]["mean"] == pytest.approx(sum(map(sum, scores)) / 12)
    assert found["has"]["any"] == sum(max(s) for s in scores) / 4
    assert (found["has"]["rows"], found["has"]["unjudged"]) == (4, 1)
    alone = evals.answers(config("answers", data=[rows(values[1:2])], verifier=[name], samples=3))
    assert [t["answer"] for t in alone["completions"]] == [t["answer"] for t in texts[3:6]]
    with pytest.raises(ConfigError, match="has nothing to say about any row"):
        evals.answers(config("answers", data=[rows(values[:1])], verifier=[name]))


def test_kl(config, rows, tmp_path, stories_tokenizer, new_stories_model, stories_model):
    file = rows([{"prompt": p} for p in PROMPTS])
    same = evals.kl(config("kl", data=[file], against=str(config("kl").model)))
    assert abs(same["k1"]["mean"]) < 1e-5 and same["k3"]["mean"] < 1e-7
    model = new_stories_model()
    with torch.no_grad():
        model.lm_head.weight.mul_(0.8)  # small, or k3 is all in rare tokens
    models.save_model(model, stories_tokenizer, tmp_path / "other", merge=True)
    found = evals.kl(
        config("kl", data=[file], against=str(tmp_path / "other"), samples=200, max_new_tokens=1, seed=3)
    )
    # One token only: the KL is a sum over the vocabulary, by Hugging Face.
    exact = []
    for p in PROMPTS:
        ids = torch.tensor([stories_tokenizer(p)["input_ids"]])
        with torch.no_grad():
            a, b = (m(ids).logits[0, -1].double().log_softmax(-1) for m in (stories_model, model.eval()))
        exact.append(float((a.exp() * (a - b)).sum()))
    expected = sum(exact) / len(exact)
    assert found["k3"]["low"] < expected < found["k3"]["high"]
    assert found["k1"]["low"] < expected < found["k1"]["high"] and found["k1_token"] > 0


def test_rows_over_the_limit_are_counted(config, rows, judge, stories_tokenizer, pairs):
    """Every task says what became of rows that are too long, in JSON and table; none is left out in silence."""
    encoder = conversations.Encoder(stories_tokenizer)
    records = reading.read([pairs])[0]
    sizes = [
        len(encoder.prompt(r.columns["prompt"]))
        + max(len(encoder.completion(r.columns[k])) for k in ("chosen", "rejected"))
        for r in records
    ]
    limit = sorted(sizes)[6]
    over = sum(n > limit for n in sizes)
    found = evals.reward_pairs(config("reward", model=judge, data=[pairs], max_length=limit))
    assert 0 < over < 12 and (found["rows"], found["dropped"]) == (12 - over, over)
    assert ("dropped", str(over)) in evals.rows(found)
    with pytest.raises(ConfigError, match=r"all 12 pairs are over max_length 2; raise it"):
        evals.reward_pairs(config("reward", model=judge, data=[pairs], max_length=2))

    long = {"prompt": "Once", "completion": " upon a time" * 9}
    full = {"prompt": "Once upon a time" * 9, "completion": " there"}
    file = rows([{"prompt": "Once", "completion": " was"}, long, full])
    found = evals.perplexity(config("perplexity", data=[file], max_length=12))
    assert (found["rows"], found["cut"], found["dropped"]) == (2, 1, 1), (
        "a prompt that fills the row has no response"
    )
    with pytest.raises(
        ConfigError, match=r"all 3 prompts fill max_length 1, so no response is left; raise it"
    ):
        evals.perplexity(config("perplexity", data=[file], max_length=1))
    texts = [{"text": "Once upon a time" * 9}, {"text": "Once upon"}, {"text": ""}]
    found = evals.perplexity(config("perplexity", data=[rows(texts)], max_length=12))
    assert (found["cut"], found["dropped"]) == (1, 1) and found["rows"] > 2
    with pytest.raises(
        ConfigError, match=r"none of the 1 texts has a token after its first; give longer texts"
    ):
        evals.perplexity(config("perplexity", data=[rows(texts[2:])]))
    with pytest.raises(reading.DataError, match=r"line 2: text is None, which is no text"):
        evals.perplexity(config("perplexity", data=[rows([{"text": "Once"}, {"text": None}])]))

    values = [{"text": t["text"], "label": str(i % 2)} for i, t in enumerate(texts[:2])]
    found = evals.classify(config("classify", model=judge, data=[rows(values)], max_length=12))
    assert found["cut"] == 1 and found["rows"] == 2 and ("cut", "1") in evals.rows(found)

    file = rows([{"prompt": "Once upon a time" * 9, "answer": "1"}, {"prompt": "Lily saw", "answer": "1"}])
    model = str(config("kl").model)
    assert evals.answers(config("answers", data=[file], max_length=12))["cut"] == 1
    assert evals.kl(config("kl", data=[file], max_length=12, against=model))["cut"] == 1
    found = evals.win_rate(config("win_rate", data=[file], max_length=12, against=model, judge=judge))
    assert (found["cut"], found["cut_against"]) == (1, 1)
    with pytest.raises(
        ConfigError, match=r"max_new_tokens is 512, which leaves the context of 512 .* no room"
    ):
        evals.answers(config("answers", data=[file], max_new_tokens=512))
    with pytest.raises(
        ConfigError, match=r"max_length is 600, but the context of .* is 512; use at most that"
    ):
        evals.perplexity(config("perplexity", data=[file], max_length=600))


# ------------------------------------------------------------------------------------------------ command line


def test_command_writes_table_and_json(capsys, rows, stories_dir, tmp_path):
    file = rows([{"prompt": p, "completion": " there was."} for p in PROMPTS])
    out = tmp_path / "out.json"
    argv = (
        f"eval --model {stories_dir} --task perplexity --data {file} --output {out} --dtype float32 --rows 3"
    )
    assert cli.main(argv.split()) == 0
    shown = capsys.readouterr().out
    saved = json.loads(out.read_text())
    assert saved["rows"] == 3 and saved["task"] == "perplexity" and saved["model"] == str(stories_dir)
    assert "perplexity" in shown and f"{saved['perplexity']:.4g}" in shown and "[" in shown


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--task speed", "task is 'speed', but it must be one of perplexity, reward, classify"),
        ("", "data is empty; name at least one file"),
        ("--task win_rate --data {file}", "against is empty, but task win_rate needs it"),
        ("--task win_rate --data {file} --against x", "judge is empty, but task win_rate needs it"),
        ("--task kl --data {file} --against {model} --temperature 0", "a KL is of sampled answers; use 1.0"),
        ("--task reward --data {file}", "has no column 'chosen'"),
        ("--task classify --data {file}", "has no column 'label'"),
        ("--task answers --data {file}", "verifier dschat.rlhf.verifiers:number has nothing to say"),
    ],
)
def test_bad_input(capsys, rows, stories_dir, argv, message):
    file = rows([{"prompt": "Once"}])
    words = f"--model {stories_dir} --max_new_tokens 2 " + argv.format(file=file, model=stories_dir)
    assert cli.main(["eval", *words.split()]) == 2
    assert message in capsys.readouterr().err

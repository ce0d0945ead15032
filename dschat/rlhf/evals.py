"""What `dschat eval` measures, each task a function that returns plain numbers; intervals are 95 % percentile
bootstraps over rows.

    perplexity   of responses (or of plain texts) under a model
    reward       a reward model on pairs: accuracy beside "longer wins", calibration, ROC
    classify     a classifier on labelled rows: accuracy, precision, recall, F1, confusion matrix, ROC
    win_rate     answers of two models to the same prompts, judged by a reward model; also at equal length
    answers      answers judged by verifiers (GSM8K, SVAMP, IFEval: dschat.rlhf.verifiers)
    kl           of a model to a reference, over the model's own answers

Answers come from the HybridEngine; every row has its own random stream, so a prompt's answer does not depend on
which others are asked.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .. import device as devices
from ..config import ConfigError, EvalConfig
from ..engine import HybridEngine, SamplingConfig
from ..engine.rollout import Rollout
from . import batching, conversations, data, losses, models, reading, reward
from .evaluate import resamples
from .rewards import OwnTokenizer, call_function, completion_ids, load_function, other_tokenizer, prompt_text

Result = dict[str, Any]
Array = npt.NDArray[Any]
RESAMPLES = 2000
REFITS = 1000
BINS = 10


# ------------------------------------------------------------------------------------------------- statistics


def bootstrap(values: Sequence[float], weights: Sequence[float] | None = None, seed: int = 0) -> Result:
    """Weighted mean of values with its interval, rows being resampled: {"mean", "low", "high", "rows"}."""
    v = np.asarray(values, dtype=np.float64)
    w = np.ones_like(v) if weights is None else np.asarray(weights, dtype=np.float64)
    if not len(v):
        raise ConfigError("there is no row to evaluate; give data")
    means = [
        (v * w)[rows].sum(1) / np.maximum(w[rows].sum(1), 1e-12)
        for rows in resamples(len(v), RESAMPLES, seed)
    ]
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return {"mean": float((v * w).sum() / w.sum()), "low": float(low), "high": float(high), "rows": len(v)}


def classification(labels: Sequence[int], probability: Sequence[float], names: Sequence[str]) -> Result:
    """Metrics of a two-class decision at probability 0.5 (of class 1), through scikit-learn."""
    from sklearn import metrics

    y, p = np.asarray(labels), np.asarray(probability)
    predicted = (p > 0.5).astype(int)
    precision, recall, f1, _ = metrics.precision_recall_fscore_support(
        y, predicted, average="binary", zero_division=0.0
    )
    found: Result = {
        "accuracy": float(metrics.accuracy_score(y, predicted)),
        "precision": float(precision),
        "recall": float(recall),
        "f1": float(f1),
        "confusion": metrics.confusion_matrix(y, predicted, labels=[0, 1]).tolist(),
        "labels": list(names),
    }
    if len(set(y.tolist())) == 2:
        false_rate, true_rate, _ = metrics.roc_curve(y, p)
        found["auc"] = float(metrics.roc_auc_score(y, p))
        found["roc"] = [[float(a), float(b)] for a, b in zip(false_rate, true_rate, strict=True)]
    else:
        found["note"] = _no_roc(names[int(y[0])])
    return found


def _no_roc(name: str) -> str:
    return f"all rows are of class {name}, so there is no ROC; give rows of other classes too"


def many_classes(
    labels: Sequence[int], probability: Sequence[Sequence[float]], names: Sequence[str]
) -> Result:
    """Metrics of a decision between more than two classes, through scikit-learn: the class of highest probability.

    Means over classes are over those that occur, in the labels or (for macro) in the decisions.
    """
    from sklearn import metrics

    y, p = np.asarray(labels), np.asarray(probability, dtype=np.float64)
    predicted = p.argmax(1)
    found: Result = {"accuracy": float(metrics.accuracy_score(y, predicted))}
    for average in ("macro", "weighted"):
        values = metrics.precision_recall_fscore_support(y, predicted, average=average, zero_division=0.0)[:3]
        found[average] = dict(zip(("precision", "recall", "f1"), map(float, values), strict=True))
    found["confusion"] = metrics.confusion_matrix(y, predicted, labels=range(len(names))).tolist()
    found["labels"] = list(names)
    there = sorted(set(y.tolist()))
    if len(there) == 1:
        return found | {"note": _no_roc(names[there[0]])}
    found["auc"] = float(np.mean([metrics.roc_auc_score(y == k, p[:, k]) for k in there]))
    if missing := [n for k, n in enumerate(names) if k not in there]:
        found["note"] = (
            f"no row is of class {' or '.join(missing)}, so the area under the ROC is the mean of the other "
            f"{len(there)} classes"
        )
    return found


def calibration(labels: Sequence[int], probability: Sequence[float]) -> Result:
    """Brier score, log loss, expected calibration error, and [mean probability, share that is true, rows] of
    ten equal bins of probability.
    """
    y, p = np.asarray(labels, dtype=np.float64), np.asarray(probability, dtype=np.float64)
    place = np.minimum((p * BINS).astype(int), BINS - 1)
    bins = [
        [float(p[place == b].mean()), float(y[place == b].mean()), int((place == b).sum())]
        for b in range(BINS)
        if (place == b).any()
    ]
    safe = np.clip(p, 1e-12, 1 - 1e-12)
    return {
        "brier": float(((p - y) ** 2).mean()),
        "log_loss": float(-(y * np.log(safe) + (1 - y) * np.log(1 - safe)).mean()),
        "ece": sum(abs(mean - true) * n for mean, true, n in bins) / len(y),
        "bins": bins,
    }


def win_rates(
    ours: Sequence[float], theirs: Sequence[float], lengths: Sequence[float], seed: int = 0
) -> Result:
    """Share of prompts where ours scores higher (ties half), and the same at equal length; both with intervals.

    lengths: ours minus theirs, in tokens. The interval of the controlled rate is of `length_controlled`, fitted to
    each resample anew.
    """
    _finite("score", [*ours, *theirs], len(ours))
    wins = np.array([1.0 if a > b else 0.5 if a == b else 0.0 for a, b in zip(ours, theirs, strict=True)])
    found = bootstrap(wins.tolist(), seed=seed)
    n, d = len(wins), np.asarray(lengths, dtype=np.float64)
    refits = [length_controlled(wins, d, rows) for rows in resamples(n, REFITS, seed)]
    low, high = np.percentile(np.concatenate(refits), [2.5, 97.5])
    return {
        "win_rate": found["mean"], "low": found["low"], "high": found["high"], "rows": found["rows"],
        "win_rate_length_controlled": float(length_controlled(wins, d, np.arange(n)[None])[0]),
        "win_rate_length_controlled_low": float(low), "win_rate_length_controlled_high": float(high),
        "longer_by": float(d.mean()),
    }  # fmt: skip


def length_controlled(wins: Array, lengths: Array, rows: Array) -> Array:
    """The win rate at equal length of each choice of rows [choices, n]; wins 0, 0.5 or 1.

    sigmoid(a) of the logistic regression win ~ a + b * tanh(length / deviation), b with a standard normal prior as
    scikit-learn has it, after length-controlled AlpacaEval (Dubois et al. 2024). Where all win or all lose there is
    no such a; the rate is then the mean, 1 or 0.
    """
    y, d = wins[rows], lengths[rows]
    deviation = d.std(1, keepdims=True)
    x = np.tanh(d / np.where(deviation > 0, deviation, 1.0))
    mean = y.mean(1)
    fitted = (mean > 0) & (mean < 1)
    start = np.where(fitted, mean, 0.5)
    a, b = np.log(start / (1 - start)), np.zeros(len(rows))
    for _ in range(100):
        p = 1 / (1 + np.exp(-(a[:, None] + b[:, None] * x)))
        error, weight = y - p, p * (1 - p)
        da, db = error.sum(1), (error * x).sum(1) - b
        haa, hab, hbb = weight.sum(1), (weight * x).sum(1), (weight * x * x).sum(1) + 1.0
        det = haa * hbb - hab * hab
        step = np.where(
            fitted, np.stack([hbb * da - hab * db, haa * db - hab * da]) / np.where(fitted, det, 1.0), 0.0
        )
        step /= np.maximum(1.0, np.abs(step).max(0))  # a full step from far away could go further away
        a, b = a + step[0], b + step[1]
        if np.abs(step).max() < 1e-9:
            break
    rate: Array = np.where(fitted, 1 / (1 + np.exp(-a)), mean)
    return rate


def _finite(what: str, values: Sequence[float], rows: int) -> None:
    """Raise ConfigError for a number that is none; values: once or more times `rows`."""
    bad = np.flatnonzero(~np.isfinite(np.asarray(values, dtype=np.float64)))
    if len(bad):
        raise ConfigError(
            f"the {what} of row {bad[0] % rows + 1} is {values[bad[0]]}; load the model in float32 (dtype), or "
            "train it again with a lower learning rate"
        )


# ------------------------------------------------------------------------------------------------------ models


class Generator:
    """A causal model with its tokenizer that answers prompts."""

    def __init__(self, name: str, config: EvalConfig, model: Any = None, tokenizer: Any = None) -> None:
        self.name, self.config = name, config
        tokenizer = tokenizer or models.load_tokenizer(name)
        self.encoder = conversations.Encoder(tokenizer, config.system_prompt, name)
        self.device = devices.use(config.device)
        model = model or models.load_policy(name, models.pick_dtype(config.dtype, self.device))
        model = devices.place(model, self.device)
        self.engine = HybridEngine(model, backend=config.backend)

    def prompts(self, records: Sequence[reading.Record]) -> tuple[Sequence[data.Example], int]:
        """A prompt a row, the longest ones without their beginning, and how many those are."""
        stats = reading.DataStats()
        room = self.engine.spec.context - self.config.max_new_tokens
        if room < 1:
            raise ConfigError(
                f"max_new_tokens is {self.config.max_new_tokens}, which leaves the context of "
                f"{self.engine.spec.context} of model {self.name} no room for a prompt; lower it"
            )
        limit = min(self.config.max_length, room)
        examples = data.prompt_examples(records, self.encoder, stats, max_prompt_length=limit, overlong="cut")
        return list(examples), stats.cut

    def answer(self, examples: Sequence[data.Example], samples: int = 1) -> tuple[Rollout, list[str]]:
        """A rollout over all prompts, and the texts; the samples of a prompt are neighbours."""
        ids, mask = batching.pad([e.prompt_ids for e in examples], self.encoder.pad_id, "left")
        sampling = SamplingConfig(
            max_new_tokens=self.config.max_new_tokens,
            temperature=self.config.temperature,
            n=samples,
            seed=self.config.seed,
            eos_token_id=self.encoder.stop_ids,
            pad_token_id=self.encoder.pad_id,
        )
        rollout = self.engine.generate(ids, mask, sampling)
        rows = zip(rollout.completion_ids.cpu(), rollout.completion_mask.bool().cpu(), strict=True)
        return rollout, [self.encoder.decode(row[real].tolist()) for row, real in rows]


def _scorer(name: str, config: EvalConfig, model: Any = None) -> models.Scorer:
    device = devices.use(config.device)
    model = model or models.load_scorer(name, models.pick_dtype(config.dtype, device), new_head=None)
    return models.Scorer(devices.place(model, device))


def _read(config: EvalConfig) -> list[reading.Record]:
    if not config.data:
        raise ConfigError("data is empty; name at least one file (.jsonl, .csv, .parquet) or hub data set")
    return reading.read(config.data, config.rows)[0]


def _text(record: reading.Record, name: str) -> str:
    value = record.columns.get(name)
    if not isinstance(value, str):
        raise reading.DataError(
            f"{record.where}: {name} is {value!r}, which is no text; mend the row or leave it out"
        )
    return value


def _left(
    make: Callable[..., Sequence[data.Example]], records: Sequence[reading.Record], encoder: conversations.Encoder,
    stats: reading.DataStats, config: EvalConfig, why: str,
) -> Sequence[data.Example]:  # fmt: skip
    """The examples that `make` makes. why: what is said where the length limit leaves none."""
    try:
        return make(records, encoder, stats, max_length=config.max_length)
    except reading.DataError:
        if stats.dropped < len(records):
            raise
        reason = why.format(limit=config.max_length)
        raise ConfigError(f"all {len(records)} {reason}; raise it") from None


def _other(config: EvalConfig, key: str, task: str, example: str) -> str:
    value = getattr(config, key)
    if not value:
        raise ConfigError(f"{key} is empty, but task {task} needs it; give {example}")
    return str(value)


# ------------------------------------------------------------------------------------------------------- tasks


@torch.no_grad()
def perplexity(config: EvalConfig, model: Any = None, tokenizer: Any = None) -> Result:
    """exp of the mean negative log-likelihood of a token: of the responses, or of all of column `text` but its
    first token.

    A response that is too long is cut; a row whose prompt leaves it no token is dropped. A text that is too long is
    read in pieces, each a row and without the one before; a text without a second token is dropped.
    """
    records = _read(config)
    generator = Generator(config.model, config, model, tokenizer)
    encoder, context = generator.encoder, generator.engine.spec.context
    if config.max_length > context:
        raise ConfigError(
            f"max_length is {config.max_length}, but the context of model {config.model} is {context}; "
            "use at most that"
        )
    stats = reading.DataStats()
    rows: list[data.Example] = []
    if isinstance(records[0].columns.get("text"), str) and "prompt" not in records[0].columns:
        for record in records:
            ids = list(encoder.tokenizer(_text(record, "text"))["input_ids"])
            pieces = [
                data.Example(list(b[:1]), [list(b[1:])], "")
                for b in batching.chunks(ids, config.max_length)
                if len(b) > 1
            ]
            stats.cut += len(ids) > config.max_length
            stats.dropped += not pieces
            rows += pieces
        if not rows:
            raise ConfigError(
                f"none of the {len(records)} texts has a token after its first; give longer texts, or raise "
                f"max_length {config.max_length}"
            )
    else:
        rows = list(_left(
            functools.partial(data.sft_examples, overlong="cut"), records, encoder, stats, config,
            "prompts fill max_length {limit}, so no response is left",
        ))  # fmt: skip
    sums, counts = [], []
    for piece in batching.chunks(rows, config.batch_size):
        batch, learnt = batching.answer_batch(piece, (0,), encoder.pad_id, generator.device)
        logp = generator.engine.logprobs(batch, temperature=1.0)
        sums += losses.masked_sum(-logp, learnt, dim=-1).tolist()
        counts += learnt.sum(1).tolist()
    nats = bootstrap([s / n for s, n in zip(sums, counts, strict=True)], counts, config.seed)
    return {
        "perplexity": float(np.exp(nats["mean"])), "low": float(np.exp(nats["low"])),
        "high": float(np.exp(nats["high"])), "loss": nats["mean"], "tokens": int(sum(counts)), "rows": len(rows),
        "cut": stats.cut, "dropped": stats.dropped,
    }  # fmt: skip


@torch.no_grad()
def reward_pairs(config: EvalConfig, model: Any = None, tokenizer: Any = None) -> Result:
    """A reward model on pairs. Its probability that an answer is the better one is sigmoid of the difference
    of the scores it was trained on; for the metrics of a classifier half of the pairs are turned round.
    """
    records = _read(config)
    tokenizer = tokenizer or models.load_tokenizer(config.model)
    encoder = conversations.Encoder(tokenizer, config.system_prompt, config.model)
    stats = reading.DataStats()
    pairs = _left(data.pair_examples, records, encoder, stats, config, "pairs are over max_length {limit}")
    scorer = _scorer(config.model, config, model)
    pieces = [
        reward.pair_scores(scorer, p, encoder.pad_id) for p in batching.chunks(pairs, config.batch_size)
    ]
    chosen, rejected = (torch.cat([p[i] for p in pieces]).double().cpu() for i in range(2))
    gap = (chosen - rejected) * scorer.std
    _finite("difference of the scores", gap.tolist(), len(pairs))
    right = [1.0 if g > 0 else 0.5 if g == 0 else 0.0 for g in gap.tolist()]
    turned = torch.tensor([_bit(e) for e in pairs], dtype=torch.bool, device="cpu")
    probability = torch.sigmoid(torch.where(turned, -gap, gap)).tolist()
    labels = (~turned).long().tolist()
    found = bootstrap(right, seed=config.seed)
    return {
        "accuracy": found["mean"], "low": found["low"], "high": found["high"], "rows": len(pairs),
        "dropped": stats.dropped, "longer_wins": reward.longer_wins(pairs), "margin": float(gap.mean()),
        "calibration": calibration(labels, probability),
        "classification": classification(labels, probability, ["second is better", "first is better"]),
    }  # fmt: skip


def _bit(example: data.Example) -> bool:
    """A coin that depends on the row alone."""
    text = repr((example.prompt_ids, example.answers)).encode()
    return bool(hashlib.blake2b(text, digest_size=1).digest()[0] & 1)


@torch.no_grad()
def classify(config: EvalConfig, model: Any = None, tokenizer: Any = None) -> Result:
    """A classifier on rows with `text` (or `prompt`) and `label`: a one-label model says class 1 where its
    score is above 0; one of more labels by its softmax. Calibration is of class 1, or, where there are more than two
    classes, of the decision.
    """
    import transformers

    records = _read(config)
    reading.require_columns(records, ["text", "prompt"], ["label"])
    device = devices.use(config.device)
    tokenizer = tokenizer or models.load_tokenizer(config.model)
    if model is None:
        with models.loading("classifier", config.model):
            model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
                models.resolve(config.model), dtype=models.pick_dtype(config.dtype, device),
                output_loading_info=True,
            )  # fmt: skip
            if info["missing_keys"]:
                raise ConfigError(
                    f"model {config.model} is no trained classifier, as it has no {min(info['missing_keys'])}; "
                    "name one that is"
                )
            model.eval()
    model = devices.place(model, device)
    count = int(model.config.num_labels)
    texts = [
        _text(r, "text") if "text" in r.columns else prompt_text(conversations.prompt_of(r.columns))
        for r in records
    ]
    names, labels = _classes(records, model, config.model)
    limit = _classifier_length(model, config)
    whole = [list(tokenizer(t)["input_ids"]) for t in texts]
    cut = sum(len(ids) > limit for ids in whole)
    for record, row in zip(records, whole, strict=True):
        if not row:
            raise reading.DataError(f"{record.where}: the text has no token; mend the row or leave it out")
    # The tokenizer cuts, because it keeps the tokens that have to end a row.
    tokens = [
        ids if len(ids) <= limit else list(tokenizer(t, truncation=True, max_length=limit)["input_ids"])
        for t, ids in zip(texts, whole, strict=True)
    ]
    probability: list[Any] = []
    for rows in batching.chunks(tokens, config.batch_size):
        pad_id = model.config.pad_token_id
        # Without a pad token a batched classifier cannot tell a row's end, so rows go one by one.
        for part in [list(rows)] if pad_id is not None else [[r] for r in rows]:
            ids, mask = (x.to(device) for x in batching.pad(part, pad_id or 0, "right"))
            logits = model(ids, attention_mask=mask.long()).logits.float()
            if count == 1:
                probability += logits.sigmoid()[:, 0].tolist()
            else:
                probability += (logits.softmax(-1)[:, 1] if count == 2 else logits.softmax(-1)).tolist()
    p = np.asarray(probability, dtype=np.float64)
    _finite("highest probability", p.reshape(len(labels), -1).max(1).tolist(), len(labels))
    right = p.argmax(1) == labels if count > 2 else (p > 0.5) == np.asarray(labels, dtype=bool)
    found = bootstrap(right.astype(float).tolist(), seed=config.seed)
    return {
        **(many_classes if count > 2 else classification)(labels, probability, names),
        "low": found["low"], "high": found["high"], "rows": len(labels), "cut": cut,
        "calibration": (
            calibration(right.tolist(), p.max(1).tolist()) if count > 2 else calibration(labels, probability)
        ),
    }  # fmt: skip


def _classes(records: Sequence[reading.Record], model: Any, name: str) -> tuple[list[str], list[int]]:
    """Names of the classes and the class of each row.

    A label is a name of the model's or a class's number. Where the model has no names of its own (one label, or
    LABEL_0 and so on) and the rows have a name for every class, these are taken in alphabetical order.
    """
    for record in records:
        if record.columns.get("label") is None:
            raise reading.DataError(f"{record.where} has no label; give it one, or leave the row out")
    values = [str(int(v) if isinstance(v := r.columns["label"], bool) else v) for r in records]
    given, one = sorted(set(values)), int(model.config.num_labels) == 1
    own = {int(i): str(n) for i, n in (model.config.id2label or {}).items()}
    known = ["0", "1"] if one else [own.get(i, str(i)) for i in range(int(model.config.num_labels))]
    numbers = {str(i): i for i in range(len(known))}
    unnamed = one or known == [f"LABEL_{i}" for i in range(len(known))]
    if set(given) <= set(known):
        index = {n: i for i, n in enumerate(known)}
    elif set(given) <= set(numbers):
        index = numbers
    elif unnamed and len(given) == len(known):
        known, index = given, {n: i for i, n in enumerate(given)}
    elif one and len(given) == 1:
        raise ConfigError(
            f"column label has the one value {given[0]}, which does not say what class it is; give rows of both "
            "classes, or the labels 0 and 1"
        )
    elif one:
        raise ConfigError(
            f"column label has {len(given)} values ({', '.join(given[:5])}), but model {name} has one label, which "
            "tells two classes apart; give rows of two"
        )
    else:
        lacks = [v for v in given if v not in known]
        raise ConfigError(
            f"column label has {len(lacks)} values that model {name} lacks ({', '.join(lacks[:5])}); its labels are "
            f"{', '.join(known[:20])}, or their numbers from 0"
        )
    return known, [index[v] for v in values]


def _classifier_length(model: Any, config: EvalConfig) -> int:
    """Most tokens in a row: max_length, or what the classifier has positions for."""
    return min(config.max_length, int(getattr(model.config, "max_position_embeddings", config.max_length)))


@torch.no_grad()
def win_rate(config: EvalConfig, model: Any = None, tokenizer: Any = None) -> Result:
    """Answers of `model` and of `against` to the same prompts, scored by the reward model `judge`."""
    against = _other(config, "against", "win_rate", "the model to compare with")
    judge = _other(config, "judge", "win_rate", "a reward model folder")
    records = _read(config)
    scorer = _scorer(judge, config)
    scores: list[list[float]] = []
    cut: list[int] = []
    lengths: list[Tensor] = []
    texts: list[list[str]] = []
    examples: Sequence[data.Example] = []
    for side in (Generator(config.model, config, model, tokenizer), Generator(against, config)):
        examples, shorter = side.prompts(records)
        cut.append(shorter)
        rollout, answers = side.answer(examples)
        own = other_tokenizer(judge, side.encoder.tokenizer)
        if own is None:
            rated = scorer.rate(rollout)
        else:
            encoder = conversations.Encoder(own, config.system_prompt, judge)
            rated = OwnTokenizer(scorer, encoder).rate_texts(rollout, [e.prompt for e in examples], answers)
        scorer.forget()
        scores.append(rated.tolist())
        lengths.append(rollout.completion_mask.sum(1))
        texts.append(answers)
    found = win_rates(scores[0], scores[1], (lengths[0] - lengths[1]).tolist(), config.seed)
    found["cut"], found["cut_against"] = cut
    found["score"], found["score_against"] = (float(np.mean(s)) for s in scores)
    found["completions"] = [
        {"prompt": prompt_text(e.prompt), "answer": a, "score": x, "against": b, "score_against": y}
        for e, a, x, b, y in zip(examples, texts[0], scores[0], texts[1], scores[1], strict=True)
    ]
    return found


@torch.no_grad()
def answers(config: EvalConfig, model: Any = None, tokenizer: Any = None) -> Result:
    """Mean score of each verifier over answers, `samples` of each prompt, and the share of prompts of which
    some answer scores 1.
    """
    records = _read(config)
    generator = Generator(config.model, config, model, tokenizer)
    examples, cut = generator.prompts(records)
    n = config.samples
    rollout, texts = generator.answer(examples, n)
    rows = [e for e in examples for _ in range(n)]
    names = sorted(
        {k for e in examples for k in e.columns} - {"prompt", "prompts", "completion", "completions"}
    )
    columns = {k: [e.columns.get(k) for e in rows] for k in names}
    found: Result = {"length": float(rollout.completion_mask.sum(1).float().mean())}
    found["finished"] = float(rollout.finished.float().mean())
    found["cut"] = cut
    kept: list[dict[str, Any]] = [
        {"prompt": prompt_text(e.prompt), "answer": t} for e, t in zip(rows, texts, strict=True)
    ]
    ids = completion_ids(rollout)
    for name in config.verifier:
        function = load_function(name)
        scores = call_function(function, [e.prompt for e in rows], texts, columns, ids).view(-1, n)
        said = ~torch.isnan(scores)
        if not bool(said.any()):
            raise ConfigError(f"verifier {name} has nothing to say about any row; its columns are {names}")
        keep = said.any(1)
        clean = torch.where(said, scores, torch.zeros_like(scores))
        means = (clean.sum(1) / said.sum(1).clamp(min=1))[keep]
        short = name.rpartition(":")[2]
        found[short] = bootstrap(means.tolist(), seed=config.seed)
        found[short] |= {
            "any": float((clean >= 1).any(1)[keep].float().mean()),
            "unjudged": int((~keep).sum()),
        }
        for row, score in zip(kept, scores.view(-1).tolist(), strict=True):
            row[short] = None if score != score else score
    found["completions"] = kept
    return found


@torch.no_grad()
def kl(config: EvalConfig, model: Any = None, tokenizer: Any = None) -> Result:
    """KL(model || against) of a whole answer and of a token, estimated on answers that the model samples."""
    against = _other(config, "against", "kl", "the reference model")
    if not config.temperature > 0:
        raise ConfigError(f"temperature is {config.temperature}, but a KL is of sampled answers; use 1.0")
    records = _read(config)
    generator = Generator(config.model, config, model, tokenizer)
    if other_tokenizer(against, generator.encoder.tokenizer) is not None:
        raise ConfigError(f"against {against} has another tokenizer, so its tokens cannot be compared")
    frozen = models.load_policy(against, models.pick_dtype(config.dtype, generator.device))
    reference = HybridEngine(devices.place(frozen, generator.device), backend=config.backend)
    examples, cut = generator.prompts(records)
    rollout, _ = generator.answer(examples, config.samples)

    def logprobs(engine: HybridEngine) -> Tensor:
        pieces = range(0, len(rollout), config.batch_size)
        return torch.cat([engine.logprobs(rollout.select(slice(i, i + config.batch_size))) for i in pieces])

    mask = rollout.completion_mask.bool()
    ours, theirs = logprobs(generator.engine), logprobs(reference)
    found: Result = {}
    for kind in ("k1", "k3"):
        tokens = losses.kl(ours, theirs, kind, mask)
        found[kind] = bootstrap(losses.masked_sum(tokens, mask, dim=-1).tolist(), seed=config.seed)
        found[f"{kind}_token"] = float(losses.masked_mean(tokens, mask))
    found["cut"] = cut
    return found


TASKS: dict[str, Callable[..., Result]] = {
    "perplexity": perplexity,
    "reward": reward_pairs,
    "classify": classify,
    "win_rate": win_rate,
    "answers": answers,
    "kl": kl,
}


def run(config: EvalConfig, *, model: Any = None, tokenizer: Any = None) -> Result:
    """{"model", "task", "data", the task's numbers} of the configured task."""
    devices.use(config.device)  # one that is not there is refused before anything is loaded
    found = TASKS[config.task](config, model, tokenizer)
    return {"model": config.model, "task": config.task, "data": list(config.data), **found}


def rows(result: Result) -> list[tuple[str, str]]:
    """(name, value with its interval) for a table: the plain numbers of a result, nested ones by dotted name."""
    out: list[tuple[str, str]] = []

    def show(value: float) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    def walk(prefix: str, values: Result) -> None:
        interval = f"  [{show(values['low'])}, {show(values['high'])}]" if "low" in values else ""
        for key, value in values.items():
            name, _, side = key.rpartition("_")
            if (side in ("low", "high") and name in values) or key in (
                "low",
                "high",
                "completions",
                "bins",
                "roc",
                "model",
                "task",
                "data",
            ):
                continue
            if isinstance(value, dict):
                walk(f"{prefix}{key}.", value)
            elif key == "labels":
                out.append((f"{prefix}{key}", ", ".join(value)))
            elif key == "confusion":
                out.append((f"{prefix}{key}", "  ".join(str(row) for row in value)))
            else:
                own = [show(values[f"{key}_{side}"]) for side in ("low", "high") if f"{key}_{side}" in values]
                out.append((f"{prefix}{key}", show(value) + (f"  [{', '.join(own)}]" if own else interval)))
                interval = ""  # of the first number, which is the one the interval is about

    walk("", result)
    return out

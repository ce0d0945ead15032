"""docs/checklist.md says which test guards against which known mistake; here it is checked, and here are the
tests of the rows that no other file covers.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch
from test_grpo import keys, short

from dschat.config import ConfigError, GRPOConfig, OnlineConfig, PPOConfig, RLOOConfig, StageConfig
from dschat.engine import HybridEngine, SamplingConfig
from dschat.rlhf import batching, conversations, data, grpo, models, reading
from dschat.rlhf.metrics import Metrics
from dschat.rlhf.online import RatioError

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "checklist.md").read_text()
ROWS = [
    *(f"2.1 #{i}" for i in range(1, 26)),
    *(f"2.2 general {i}" for i in range(1, 7)),
    *(f"2.2 reward {i}" for i in range(1, 4)),
    *(f"2.2 policy {i}" for i in range(1, 12)),
    "2.2 extra 1",
    *(f"2.2 plus {i}" for i in range(1, 8)),
]


# ----------------------------------------------------------------------------------------------------- the page


def named_rows() -> dict[str, set[str]]:
    """Row -> the tests whose docstring names it."""
    found: dict[str, set[str]] = {row: set() for row in ROWS}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef) or not node.name.startswith("test_"):
                continue
            text = " ".join((ast.get_docstring(node) or "").split())
            test = f"{path.relative_to(ROOT / 'tests').as_posix()}::{node.name}"
            for numbers in re.findall(r"checklist 2\.1 (#\d+(?:, #\d+)*)", text):
                for number in re.findall(r"\d+", numbers):
                    found[f"2.1 #{number}"].add(test)
            for row in re.findall(r"2\.2 (?:general|reward|policy|extra|plus) \d+", text):
                found[row].add(test)
    return found


def page_rows() -> dict[str, set[str]]:
    """Row -> the tests that the page lists for it."""
    lines = re.findall(r"^\| (2\.[12] [^|]+?) \|[^|]*\|([^|]*)\|$", PAGE, re.MULTILINE)
    assert len({row for row, _ in lines}) == len(lines), "a row stands twice"
    return {row: set(re.findall(r"`([\w/]+\.py::\w+)`", tests)) for row, tests in lines}


def test_every_row_has_a_test_that_names_it():
    named = named_rows()
    assert [row for row in ROWS if not named[row]] == []


def test_the_page_lists_exactly_the_tests_that_name_a_row():
    page, named = page_rows(), named_rows()
    assert list(page) == ROWS
    for row in ROWS:
        assert page[row] == named[row], f"{row}: the page and the docstrings differ"


def test_other_tests_on_the_page_exist():
    """Those of section 2.3 and of the engine are listed without being named in a docstring."""
    for file, name in re.findall(r"`([\w/]+\.py)::(\w+)`", PAGE):
        tree = ast.parse((ROOT / "tests" / file).read_text())
        assert name in {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}, f"{file}::{name}"


# ------------------------------------------------------------------------------------- rows without other tests


@pytest.fixture
def make(base, stories_tokenizer, tmp_path):
    """make(**keys): (GRPO trainer, collect)."""

    def build(**more):
        config = GRPOConfig(**keys(base, **more))
        model = models.make_trainable(models.load_policy(config.model, torch.float32), config, "CAUSAL_LM")
        encoder = conversations.Encoder(stories_tokenizer)
        engine = HybridEngine(model, torch.optim.AdamW(models.trainable(model)), exact=config.exact)
        trainer = grpo.GRPO.build(config, engine, encoder, None, (short,), torch.float32)
        records, stats = reading.read(config.data)
        examples = data.prompt_examples(records, encoder, stats)[::2][:3]
        metrics = Metrics(tmp_path / "m", "grpo", 1, tensorboard=False, progress=False)
        return trainer, lambda: trainer.collect(examples, 0, metrics)[0]

    return build


@pytest.mark.parametrize("cls", [PPOConfig, GRPOConfig, RLOOConfig])
@pytest.mark.parametrize("cut", [{"top_p": 0.9}, {"top_k": 50}])
def test_cut_sampling_is_refused(cls, cut):
    """checklist 2.1 #4; 2.2 general 4: sampling that does not follow the log-probs is refused, by default it is
    the full distribution, and an answer ends at EOS or at the length limit.
    """
    with pytest.raises(
        ConfigError, match="log-probs of the full distribution, which cut sampling does not follow"
    ):
        cls(**cut)
    assert (cls().top_p, cls().top_k) == (1.0, 0)


def test_log_probs_of_cut_sampling_are_the_full_softmaxes(stories_model, stories_tokenizer):
    """checklist 2.1 #4: the engine can sample with top-k; the log-probs it reports are those of the full
    distribution, as the training forward's.
    """
    ids = torch.tensor([stories_tokenizer("Once upon a time")["input_ids"]])
    engine = HybridEngine(stories_model)
    rollout = engine.generate(ids, None, SamplingConfig(max_new_tokens=6, top_k=3, top_p=0.8, n=4, seed=1))
    torch.testing.assert_close(engine.logprobs(rollout).detach(), rollout.logprobs, rtol=1e-4, atol=1e-5)


def test_missing_log_probs_are_never_zeros(make):
    """checklist 2.1 #23: every real token has a log-prob below 0; zeros in their place do not pass for them."""
    trainer, collect = make(exact=True)
    experience = collect()
    assert (experience.old_logp[experience.mask] < 0).all() and (
        experience.ref_logp[experience.mask] < 0
    ).all()
    for missing in (0.0, float("nan")):
        experience.old_logp = torch.full_like(experience.old_logp, missing)
        with pytest.raises(ConfigError) as error:
            trainer.update(experience, 0, 1)
        assert isinstance(error.value, RatioError) or "policy/loss is nan" in str(error.value)


def test_pad_is_no_end_and_long_prompts_are_cut(stories_tokenizer, stories_dir):
    """checklist 2.2 general 2: a scorer's pad id is never an id that ends an answer; a prompt that is too long
    keeps its end, where the question stands.
    """
    encoder = conversations.Encoder(stories_tokenizer)
    model = models.load_scorer(str(stories_dir), torch.float32)
    models.set_scorer_padding(model, stories_tokenizer, encoder)
    assert model.config.pad_token_id is not None and model.config.pad_token_id not in encoder.stop_ids
    whole = encoder.prompt("Once upon a time there was a cat")
    records = [reading.Record("f.jsonl line 1", {"prompt": "Once upon a time there was a cat"})]
    (cut,) = data.prompt_examples(records, encoder, reading.DataStats(), max_prompt_length=4, overlong="cut")
    assert cut.prompt_ids == whole[-4:]


def test_positions_do_not_count_padding(stories_model, stories_tokenizer):
    """checklist 2.1 #2; 2.2 general 3: log-probs of a left-padded batch are Hugging Face's of each row alone."""
    prompts = [stories_tokenizer(t)["input_ids"] for t in ("Once upon a time", "Tom", "The sun was")]
    answers = [[410, 400, 1], [405], [407, 409]]
    batch = batching.Sequences.of(prompts, answers, 0)
    found = HybridEngine(stories_model).logprobs(batch, temperature=1.0).detach()
    for i, (p, a) in enumerate(zip(prompts, answers, strict=True)):
        with torch.no_grad():
            logp = stories_model(torch.tensor([p + a])).logits[0].log_softmax(-1)
        expected = torch.stack([logp[len(p) - 1 + j, t] for j, t in enumerate(a)])
        torch.testing.assert_close(found[i, : len(a)], expected, rtol=1e-4, atol=1e-4)


def test_prompts_are_of_bounded_length():
    """checklist 2.2 policy 3: queries have a length limit, and what is done with longer ones is named and counted."""
    with pytest.raises(ConfigError, match="max_prompt_length is 0, but it must be 1 or more"):
        PPOConfig(max_prompt_length=0)
    assert PPOConfig().overlong == "drop"


def test_no_discount_by_default():
    """checklist 2.2 policy 6."""
    assert PPOConfig().gamma == 1.0


def test_minibatches_are_reshuffled_every_epoch(make, monkeypatch):
    """checklist 2.2 policy 7: batch, minibatch, micro-batch; every epoch sees every row once, in another order."""
    trainer, collect = make(ppo_epochs=3, batch_size=2, gradient_accumulation_steps=2)
    seen: list[list[int]] = []
    original = trainer.minibatch

    def spy(experience, rows, ends):
        seen.append(list(rows))
        return original(experience, rows, ends)

    monkeypatch.setattr(trainer, "minibatch", spy)
    trainer.update(collect(), 0, 1)
    assert [len(rows) for rows in seen] == [4] * 9
    epochs = [[row for rows in seen[i : i + 3] for row in rows] for i in (0, 3, 6)]
    assert all(sorted(e) == list(range(12)) for e in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_defaults_of_the_optimizer_and_of_whitening():
    """checklist 2.2 extra 1, 2.2 plus 5, 2.2 plus 7: Adam's epsilon is 1e-5, advantages are whitened, rewards
    are not; the published settings are fields.
    """
    assert StageConfig().adam_eps == 1e-5
    assert PPOConfig().whiten_advantages and not PPOConfig().whiten_rewards
    published = {
        "learning_rate": 3e-6, "temperature": 0.7, "kl_coef": 0.05, "lam": 0.95, "ppo_epochs": 4, "cliprange": 0.2,
        "cliprange_value": 0.2, "missing_eos_penalty": 1.0, "lr_schedule": "linear",
    }  # fmt: skip
    config = PPOConfig(**published)
    assert {k: getattr(config, k) for k in published} == published
    assert issubclass(PPOConfig, OnlineConfig)

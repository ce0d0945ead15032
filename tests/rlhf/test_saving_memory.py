"""What saves memory: gradient checkpointing, which changes no bit, and a frozen base of int8 under an adapter."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers_rlhf import Killed, numbers, same_weights
from safetensors.torch import load_file
from test_float16 import STAGES

from dschat.config import ConfigError, DPOConfig, GRPOConfig, PPOConfig, SFTConfig
from dschat.engine import HybridEngine
from dschat.rlhf import conversations, data, models, online, reading, sft
from dschat.rlhf.critic import AdapterOff
from dschat.rlhf.run import idle_reference
from dschat_kernels import forward


def short(prompts, completions, **columns):
    return [-len(c) / 10 for c in completions]


MODES = {
    "sft": {"lora_r": 0},
    "grpo": {"lora_r": 4, "exact": True},
    "ppo": {"lora_r": 0, "critic_update": "lora"},
}


@pytest.mark.parametrize("stage", MODES)
def test_gradient_checkpointing_changes_no_bit(stage, base, tmp_path, monkeypatch):
    """Two steps with and without: the same numbers and weights, layers computed again where it is on."""
    again: list[int] = []
    original = forward.checkpoint

    def counted(*args, **keywords):
        again.append(1)
        return original(*args, **keywords)

    monkeypatch.setattr(forward, "checkpoint", counted)
    train, cls, keys = STAGES[stage]
    more = {"rewards": (short,)} if stage in ("grpo", "ppo") else {}
    folders = []
    for on in (False, True):
        folder = str(tmp_path / f"{stage}-{on}")
        config = cls(
            **{**base, **keys, **MODES[stage], "max_steps": 2, "learning_rate": 1e-3, "output_dir": folder,
               "gradient_checkpointing": on}
        )  # fmt: skip
        train(config, **more)
        folders.append(folder)
        assert bool(again) == on
    assert numbers(folders[0]) == numbers(folders[1])
    assert same_weights(Path(folders[0]) / "model", Path(folders[1]) / "model")
    if stage == "ppo":
        assert same_weights(Path(folders[0]) / "critic", Path(folders[1]) / "critic")


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_adapters_learn_on_an_int8_base(stage, base, tmp_path, kill_after):
    """It runs, resumes to the same bits, and writes a plain model; the log says how far the rollout is."""
    train, cls, keys = STAGES[stage]
    keys = {**keys, "lora_r": 4, "base_weights": "int8", "max_steps": 4, "learning_rate": 1e-2}
    if stage == "grpo":
        keys |= {"rollout_weights": "int8", "importance_cap": 2.0, "eval_data": base["data"], "max_eval_rows": 2,
                 "compare_hf": 2}  # fmt: skip
    more = {"rewards": (short,)} if stage == "grpo" else {}
    result = train(cls(**{**base, **keys}), **more)
    lines = numbers(base["output_dir"])
    if stage == "grpo":
        assert (
            0 < lines[0]["sampling/sampling_logp_difference/mean"] < 0.05
            and result["log_prob_gap"]["mean"] > 0
        )
        assert result["speed"]["hf_tokens_per_s"] > 0, "Hugging Face ran the merged model"
    else:
        assert lines[-1]["loss"] < lines[0]["loss"]
    again = {**base, **keys, "output_dir": str(tmp_path / "again")}
    kill_after(2)
    with pytest.raises(Killed):
        train(cls(**again), **more)
    kill_after(None)
    train(cls(**again), **more)
    assert numbers(again["output_dir"]) == lines
    assert same_weights(Path(base["output_dir"]) / "model", Path(again["output_dir"]) / "model")


def test_the_written_model_is_what_was_trained(base):
    """Held-out loss of the model on disk = that of the run, whose base was int8."""
    train, cls, keys = STAGES["sft"]
    more = {
        "lora_r": 4,
        "base_weights": "int8",
        "max_steps": 3,
        "learning_rate": 1e-2,
        "eval_data": base["data"],
    }
    result = train(cls(**{**base, **keys, **more}))
    model = models.load_policy(base["output_dir"], torch.float32)
    config = cls(**{**base, **keys})
    encoder = conversations.Encoder(models.load_tokenizer(base["model"]))
    records, stats = reading.read(base["data"])
    rows = data.sft_examples(records, encoder, stats, response="chosen", max_length=64)
    loss = sft.evaluate(HybridEngine(model), rows, encoder.pad_id, config)["loss"]
    assert loss == pytest.approx(result["eval_loss"], abs=1e-5)
    folder = Path(base["output_dir"]) / "model"
    names = [n for f in folder.glob("*.safetensors") for n in load_file(f)]
    assert names and not any("scales" in n for n in names)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"lora_r": 0}, "base_weights is int8 and lora_r 0, which trains all weights; set lora_r to 8"),
        ({"lora_r": 4, "zero_stage": 2}, "base_weights is int8 with DeepSpeed, which shards no integers"),
    ],
)
def test_what_an_int8_base_cannot_be(base, keys, said):
    with pytest.raises(ConfigError, match=said):
        SFTConfig(**{**base, **keys, "base_weights": "int8"})


GPU = torch.device("cuda", 0)


def said(device, sources, **keys):
    """What a run with these reward sources says of its offloads."""
    config = PPOConfig(offload_reference=True, offload_reward=True, **keys)
    trainer = SimpleNamespace(
        config=config, engine=SimpleNamespace(device=device), rewards=SimpleNamespace(sources=sources)
    )
    return online.Trainer.idle_offloads(trainer)  # type: ignore[arg-type]


def test_an_offload_that_moves_nothing_says_so():
    scorer = models.Scorer.__new__(models.Scorer)
    shared = AdapterOff(scorer)
    cpu = torch.device("cpu")
    assert said(GPU, [("a", scorer)], lora_r=0, reward=["a"]) == []
    assert said(cpu, [("a", scorer)], lora_r=0, reward=["a"]) == [
        f"{key} has no effect on the CPU, whose memory is the host's"
        for key in ("offload_reference", "offload_reward")
    ]
    for device in (GPU, cpu):
        assert said(device, [("a", shared)], lora_r=4, reward=["a"]) == [
            "offload_reference has no effect: the reference is the policy's own weights",
            "offload_reward has no effect on a, whose weights are those of a model that trains",
        ]
    assert said(GPU, [("short", short)], reference="other", reward=["worker:short"]) == [
        "offload_reward has no effect: no reward is a model"
    ]
    cached = DPOConfig(offload_reference=True, lora_r=0)
    assert idle_reference(cached, GPU) == [
        "offload_reference has no effect: the reference is the policy's own weights"
    ]
    assert idle_reference(DPOConfig(offload_reference=True, lora_r=0, cache_reference=False), GPU) == []
    assert idle_reference(DPOConfig(reference="other"), cpu) == []


def test_a_run_says_it_once(base, tmp_path, capsys):
    train, _, keys = STAGES["grpo"]
    more = {"lora_r": 0, "max_steps": 1, "output_dir": str(tmp_path / "run"), "offload_reference": True}
    more |= {"progress": True}
    train(GRPOConfig(**{**base, **keys, **more}), rewards=(short,))
    assert capsys.readouterr().out.count("offload_reference has no effect on the CPU") == 1

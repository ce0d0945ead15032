"""Two processes and four, through DeepSpeed and without, against one process without: rollouts token for token, losses
and gradients up to rounding."""

from __future__ import annotations

import copy
import functools
import json
import math
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
import worker

from dschat.engine import zero as module
from dschat.engine.zero import ZeroSettings


@pytest.fixture(scope="module")
def alone() -> Any:
    """kind -> the same in this process, without DeepSpeed."""
    cache: dict[str, Any] = {}

    def get(kind: str) -> Any:
        if kind not in cache:
            own = worker.engine(kind, None, worker.rate(kind))
            cache[kind] = worker.train(own, 2, anew=worker.anew(kind)) | {"state": own.optimizer.state_dict()}
        return cache[kind]

    return get


@pytest.fixture
def many(spawned: Any) -> Any:
    """many(world): results of the engines of so many processes."""
    return lambda world: spawned("four", 4) if world == 4 else spawned("zero")


def bound(kind: str) -> float:
    """On the relative difference of losses and norms."""
    return 2e-2 if "bf16" in kind else 5e-3 if "f16" in kind else 1e-4


CASES = [(2, *case) for case in worker.CASES] + [(4, *case) for case in worker.FOUR]


@pytest.mark.parametrize(("world", "kind", "stage"), CASES)
def test_rollouts_are_those_of_one_process_token_for_token(many, world, kind, stage):
    """The weights that the processes hold in shards after two steps, whole in one process: the same tokens and the
    same log-probs, bit for bit. Rows are divided among the processes, and LoRA is fused while a layer is gathered."""
    found = many(world)[f"{kind}/{stage}"]
    own = worker.engine(kind, None)
    trained = {n: p for n, p in own.model.named_parameters() if p.requires_grad}
    assert trained.keys() == found["weights"].keys()
    before = own.generate(*worker.prompts(), worker.SAMPLING)
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(found["weights"][name])
    rollout = own.generate(*worker.prompts(), worker.SAMPLING)
    assert torch.equal(rollout.completion_ids, found["final"][0])
    assert torch.equal(rollout.logprobs, found["final"][1])
    assert torch.equal(before.completion_ids, found["tokens"][0])
    assert not torch.equal(before.completion_ids, rollout.completion_ids), "the steps changed something"


@pytest.mark.parametrize(("world", "kind", "stage"), CASES)
def test_losses_and_gradient_norms_are_those_of_one_process(many, alone, world, kind, stage):
    """Accumulated over backwards of unequal size, normalised by all rows: within 1e-4 in float32, 2e-2 in bfloat16,
    5e-3 in float16. (A full bfloat16 model's weights round otherwise after a step: its first step alone.)"""
    found, one = many(world)[f"{kind}/{stage}"], alone(kind)
    steps = 1 if kind == "full-bf16" else 2
    for name in ("loss", "norm"):
        close = pytest.approx(one[name][:steps], rel=bound(kind))
        assert found[name][:steps] == close, name
    assert found["norm"][0] > 0.5, "the clip has something to do"


@pytest.mark.nightly
@pytest.mark.parametrize("world", [2, 4])
def test_stage_times_lora_times_dtype_times_accumulation(spawned, world):
    """The loss curves of the whole product, of three steps, are those of one process: within 1e-4 in float32, 2e-2 in
    bfloat16 (a full bfloat16 model: of one process with DeepSpeed's float32 masters), 5e-3 in float16."""
    found, alone = spawned("product", world, processes.NIGHTLY), {}
    for kind, stage, chunk in worker.PRODUCT:
        masters = kind == "full-bf16" and stage is not None
        which = (kind, masters, chunk)
        if which not in alone:
            own = worker.engine(kind, ZeroSettings(1) if masters else None, worker.rate(kind))
            alone[which] = worker.train(own, 3, chunk, worker.anew(kind))
        close = bound(kind)
        for name in ("loss", "norm"):
            many, one = found[f"{kind}/{stage}/{chunk}"][name], alone[which][name]
            if name == "norm" and kind == "full-bf16":  # later ones are of weights that rounded otherwise
                many, one, close = many[:1], one[:1], 1e-3
            assert many == pytest.approx(one, rel=close), (kind, stage, chunk, name)


def test_plain_data_parallel_is_one_process(zero, alone):
    many, one = zero["plain"], alone("full")
    assert all(torch.equal(a, b) for a, b in zip(many["tokens"], one["tokens"], strict=True))
    assert many["loss"] == pytest.approx(one["loss"], rel=1e-4)
    assert many["norm"] == pytest.approx(one["norm"], rel=1e-4)


@pytest.mark.parametrize("stage", [2, 3])
def test_offload_changes_nothing(zero, alone, stage):
    many, one = zero[f"offload/{stage}"], alone("lora")
    assert all(torch.equal(a, b) for a, b in zip(many["tokens"], one["tokens"], strict=True))
    assert many["loss"] == pytest.approx(one["loss"], rel=1e-4)
    assert many["norm"] == pytest.approx(one["norm"], rel=1e-4)


@pytest.mark.parametrize("stage", [2, 3])
def test_exact_mode_is_exact_when_sharded(zero, stage):
    """The training forward on packs that were gathered from shards gives the rollout's bits."""
    assert zero[f"lora-exact/{stage}"]["gap"] == [0.0, 0.0]
    assert max(zero[f"lora/{stage}"]["gap"]) < 1e-4


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_state_is_whole_and_that_of_one_process(zero, alone, kind, stage):
    """A checkpoint knows neither stages nor processes: same entries, shapes and values as torch's own."""
    many, one = zero[f"{kind}/{stage}"]["state"], alone(kind)["state"]
    assert many["state"].keys() == one["state"].keys()
    for i, entry in one["state"].items():
        assert float(many["state"][i]["step"]) == float(entry["step"]) == 2
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.allclose(many["state"][i][name], entry[name], rtol=1e-2, atol=1e-5), (i, name)
    for a, b in zip(many["param_groups"], one["param_groups"], strict=True):
        assert a["params"] == b["params"] and a["weight_decay"] == b["weight_decay"] and a["lr"] == b["lr"]


@functools.cache
def skipping_alone(kind: str) -> Any:
    return worker.skipping(kind, None, True)


@pytest.mark.parametrize(("kind", "stage", "offload"), worker.SKIPS)
@pytest.mark.parametrize("world", [1, 2])
def test_an_overflow_in_float16_is_left_out_by_all(spawned, world, kind, stage, offload):
    """One process's overflow is one to all: nothing steps, and the scale falls. A step that is left out for another
    model's sake leaves it as it is. Neither leaves anything behind: the next step's norm is that of one process without
    DeepSpeed, in which nothing was left out."""
    zero = ZeroSettings(stage, offload)
    found = spawned("skips")[f"{kind}/{stage}/{offload}"] if world == 2 else worker.skipping(kind, zero, True)
    plain = skipping_alone(kind)
    overflow, skipped, stepped, last = found
    assert [s["left"] for s in found] == [[]] * 4
    assert not math.isfinite(overflow["bound"]) and overflow["overflow"] and not overflow["steps"]
    assert 0 < skipped["bound"] < math.inf and not skipped["overflow"] and not skipped["steps"]
    assert 0 < stepped["norm"] <= stepped["bound"] * (1 + 1e-6) and stepped["steps"] == {1.0}
    assert stepped["norm"] == pytest.approx(plain[2]["norm"], rel=2e-3)
    assert not math.isfinite(last["bound"]) and last["steps"] == {1.0}
    assert [s["same"] for s in found] == [True, True, False, True]
    assert [s["loss_scale"] for s in found] == [512.0, 512.0, 512.0, 256.0]
    assert [s["skipped_steps"] for s in found] == [1, 2, 2, 3] and [s["epoch"] for s in found] == [0, 0, 1, 1]


@functools.cache
def summing_alone() -> Any:
    return worker.summing(None)


@pytest.mark.parametrize(("stage", "offload"), worker.SUMS)
@pytest.mark.parametrize("world", [1, 2])
def test_gradients_that_float16_holds_but_not_their_sum(spawned, world, stage, offload):
    """Backwards of the same rows, whose largest gradient is 50,000, in every process: under ZeRO a step by their sum,
    as `ready` says; an overflow where a process adds up in float16."""
    once, thrice = summing_alone()
    assert math.isfinite(once) and not math.isfinite(thrice)
    zero = ZeroSettings(stage, offload)
    found = spawned("skips")[f"sum/{stage}/{offload}"] if world == 2 else worker.summing(zero)
    assert found == [pytest.approx(world * n * once, rel=2e-3) for n in (1, 3)]


# ------------------------------------------------------------------------------------------- one process, unspawned


def test_stage_0_has_float32_masters_too():
    """A bfloat16 model, all weights trained: the curve of stage 1, whose first step is the first; and a state that
    holds the masters, from which another engine goes on with the same bits, of whichever stage."""
    curves, states = {}, {}
    for stage in (0, 1):
        own = worker.engine("full-bf16", ZeroSettings(stage), 1e-3)
        curves[stage] = worker.train(own, 2, anew=False)
        states[stage] = own.optimizer.state_dict()
        assert float(states[stage]["state"][0]["step"]) == 2
    assert curves[0]["loss"] == pytest.approx(curves[1]["loss"], rel=1e-3)
    assert curves[0]["norm"] == pytest.approx(curves[1]["norm"], rel=1e-2)
    for i, entry in states[1]["state"].items():
        assert torch.allclose(states[0]["state"][i]["master"], entry["master"], rtol=1e-2, atol=1e-3)

    straight = worker.engine("full-bf16", ZeroSettings(0), 1e-3)
    worker.train(straight, 2, anew=False)
    weights = {n: p.detach().clone() for n, p in straight.model.named_parameters()}
    saved = copy.deepcopy(straight.optimizer.state_dict())
    after = worker.train(straight, 1)
    again = worker.engine("full-bf16", ZeroSettings(0), 1e-3)
    with torch.no_grad():
        for name, parameter in again.model.named_parameters():
            parameter.copy_(weights[name])
    again.optimizer.load_state_dict(saved)
    found = worker.train(again, 1)
    assert found["loss"] == after["loss"] and found["norm"] == after["norm"]
    for a, b in zip(again.model.parameters(), straight.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_bad_settings_are_refused_in_one_sentence(tmp_path: Path):
    def file(text: str) -> str:
        path = tmp_path / "ds.json"
        path.write_text(text)
        return str(path)

    read = ZeroSettings.read
    assert read(None, False, "") is None and read(2, True, "") == ZeroSettings(2, True)
    with pytest.raises(ValueError, match="offload is true without ZeRO: set zero_stage"):
        read(None, True, "")
    with pytest.raises(ValueError, match="offload is true and zero_stage 0: set zero_stage"):
        read(0, True, "")
    with pytest.raises(ValueError, match="which is no file"):
        read(1, False, str(tmp_path / "none.json"))
    with pytest.raises(ValueError, match=r"is not valid JSON \(line 1\)"):
        read(1, False, file("{"))
    with pytest.raises(ValueError, match="has optimizer, which is not passed on: give learning_rate"):
        read(1, False, file('{"optimizer": {"type": "Adam"}}'))
    with pytest.raises(ValueError, match="has fp16, which is not passed on: give dtype, loss_scale"):
        read(1, False, file('{"fp16": {"enabled": true}}'))
    with pytest.raises(ValueError, match=r"zero_stage is 3 and .* has stage 2: keep one"):
        read(3, False, file('{"zero_optimization": {"stage": 2}}'))


@pytest.mark.parametrize(
    ("content", "key"),
    [
        ({"communication_data_type": "fp16"}, "communication_data_type fp16"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "data_types.grad_accum_dtype bf16"),
        ({"data_types": {"param_dtype": "fp16"}}, "data_types.param_dtype fp16"),
    ],
)
def test_gradients_of_float16_are_added_up_in_float32(content, key):
    """Also where a configuration says so; one that says otherwise is refused."""
    with pytest.raises(
        ValueError, match=f"dtype is float16 and ds.json has {key}, but float16's gradients are added"
    ):
        ZeroSettings(2, config=content).require_wide_sums("ds.json")
    ZeroSettings(2, config={"communication_data_type": "fp32"}).require_wide_sums("ds.json")


def test_a_deepspeed_file_is_passed_through(tmp_path: Path):
    content = {
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 12345, "stage3_prefetch_bucket_size": "auto"},
        "comms_logger": {"enabled": True},
        "optimizer": "auto",
        "fp16": {"enabled": False},
        "train_batch_size": 64,
    }
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(content))
    with pytest.warns(UserWarning, match=r"train_batch_size of .* have no effect"):
        settings = ZeroSettings.read(None, True, str(path))
    assert settings is not None and settings.stage == 2
    config = module.deepspeed_config(settings, torch.bfloat16)
    assert config["comms_logger"] == {"enabled": True}
    assert config["zero_optimization"]["reduce_bucket_size"] == 12345
    assert config["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}
    assert "stage3_prefetch_bucket_size" not in config["zero_optimization"]
    assert (
        config["bf16"] == {"enabled": True} and "optimizer" not in config and "train_batch_size" not in config
    )


@pytest.mark.parametrize("kind", ["full", "full-bf16", "lora"])
@pytest.mark.parametrize(("stage", "offload"), [(0, False), (1, False), (2, True), (3, False)])
def test_a_gradient_that_is_not_finite_steps_nothing(kind, stage, offload):
    """`ready` says so and changes nothing, `apply` leaves weights and state as they were; the next step is a step. For
    a gradient whose square overflows, which some of DeepSpeed's norms are finite for, `ready` does not vouch."""
    own = worker.engine(kind, ZeroSettings(stage, offload), 1e-2)
    trained = [p for p in own.model.parameters() if p.requires_grad]

    def weights() -> list[torch.Tensor]:
        with module.whole(trained):
            return [p.detach().clone() for p in trained]

    rollout, before = own.generate(*worker.prompts(), worker.SAMPLING), weights()
    for factor in (float("nan"), float("inf")):
        own.backward(own.logprobs(rollout).sum() * factor)
        assert not math.isfinite(own.ready(0.5)), factor
        assert all(torch.equal(a, b) for a, b in zip(weights(), before, strict=True)), factor
        own.apply()
        assert not math.isfinite(own.stepper.norm), factor
        assert all(torch.equal(a, b) for a, b in zip(weights(), before, strict=True)), factor
        assert own.epoch == 0 and not own.optimizer.state_dict()["state"]
    own.backward(own.logprobs(rollout).mean())
    bound = own.ready(0.5)
    own.apply()
    assert 0 < own.stepper.norm <= bound < math.inf and own.epoch == 1
    assert not all(torch.equal(a, b) for a, b in zip(weights(), before, strict=True))
    own.backward(own.logprobs(rollout).sum() * 1e30)
    assert not math.isfinite(own.ready(0.5))

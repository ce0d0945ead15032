"""What a run's folder is started with again: other data, another process, damaged files, a full disk, more steps."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_rlhf import Killed, numbers, same_weights
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dschat import config as C
from dschat import config_base, config_text
from dschat.cli import main
from dschat.config import COMMANDS, ConfigError
from dschat.engine import HybridEngine
from dschat.rlhf import checkpoint, data, digests, grpo, metrics, models, ppo, reading, report, sft
from dschat.rlhf import run as run_module
from dschat.rlhf import train as pipeline

TRAINERS = {"sft": sft.train, "grpo": grpo.train, "ppo": ppo.train}
SMALL: dict[str, dict[str, Any]] = {
    "sft": {"max_length": 64, "response": "chosen", "lora_r": 2},
    "grpo": {"max_new_tokens": 6, "max_prompt_length": 16, "prompts_per_step": 2, "samples_per_prompt": 2,
             "lora_r": 2},
    "ppo": {"max_new_tokens": 6, "max_prompt_length": 16, "prompts_per_step": 4, "lora_r": 2},
}  # fmt: skip


def short(prompts: Any, completions: list[str], **_: Any) -> list[float]:
    return [-len(c) / 10 for c in completions]


def run(base: dict[str, Any], stage: str = "sft", **keys: Any) -> dict[str, Any]:
    given = {**base, "batch_size": 4, "learning_rate": 1e-3, "max_steps": 2, **SMALL[stage], **keys}
    more = {} if stage == "sft" else {"rewards": [short]}
    return TRAINERS[stage](COMMANDS[stage](**given), **more)


def contents(folder: Any) -> dict[str, bytes]:
    """Every file of a folder but the lock, to see that a refusal changed nothing."""
    found = sorted(p for p in Path(folder).rglob("*") if p.is_file() and p.name != ".lock")
    return {str(p.relative_to(folder)): p.read_bytes() for p in found}


def refused(base: dict[str, Any], said: str, stage: str = "sft", **keys: Any) -> str:
    """The one sentence that a run is refused with, which leaves its folder as it is."""
    before = contents(base["output_dir"])
    with pytest.raises((ConfigError, ValueError), match=said) as error:
        run(base, stage, **keys)
    assert contents(base["output_dir"]) == before and "\n" not in str(error.value)
    return str(error.value)


# ------------------------------------------------------------------------------------------------- other data


@pytest.mark.parametrize("which", ["data", "eval_data", "unsup_data"])
def test_other_rows_under_the_same_name(base, tmp_path, kill_after, which):
    """A run does not go on, and a finished one is not taken for done, on other rows than it began with."""
    file = tmp_path / "other.jsonl"
    original = Path(base["data"][0]).read_text()
    file.write_text(original)
    stage = "ppo" if which == "unsup_data" else "sft"
    keys: dict[str, Any] = {which: [str(file)]}
    if which == "unsup_data":
        keys |= {"unsup_coef": 1.0, "unsup_length": 16}
        file.write_text(
            "".join(json.dumps({"text": f"{word} was happy. " * 40}) + "\n" for word in ("Tom", "Lily"))
        )
        original = file.read_text()
    kill_after(2)
    with pytest.raises(Killed):
        run(base, stage, **keys)
    kill_after(None)
    file.write_text(original.replace("happy", "merry"))
    said = refused(base, r"other\.jsonl has changed since the run in .* began", stage, **keys)
    assert "put the first file back, name another output_dir, or add --overwrite" in said
    file.write_text(original)
    done = run(base, stage, **keys)
    assert run(base, stage, **keys) == done
    file.write_text(original + original)
    refused(base, r"other\.jsonl has changed", stage, **keys)
    file.unlink()
    assert run(base, stage, **keys) == done, "a finished run needs its data no more"
    file.write_text(original + original)
    assert run(base, stage, **keys, overwrite=True)["steps"] == 2


def test_a_run_of_an_older_version_has_no_digests(base, kill_after):
    kill_after(2)
    with pytest.raises(Killed):
        run(base)
    kill_after(None)
    file = Path(base["output_dir"]) / "run.json"
    about = json.loads(file.read_text())
    assert list(about.pop("data")) == base["data"] and list(about.pop("models")) == [base["model"]]
    file.write_text(json.dumps(about))
    assert run(base)["steps"] == 2
    assert {"data", "models"} <= set(json.loads(file.read_text()))


def test_another_revision_of_a_hub_data_set(base, monkeypatch, kill_after):
    """Its fingerprint, which `datasets` makes of the files, is what is kept."""
    import datasets

    class Rows(list):  # type: ignore[type-arg]
        _fingerprint = "one"

    rows = Rows(json.loads(line) for line in Path(base["data"][0]).read_text().splitlines())
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: rows)
    monkeypatch.setattr(reading, "FINGERPRINTS", {})
    keys = {"data": ["org/stories:train"]}
    kill_after(2)
    with pytest.raises(Killed):
        run(base, **keys)
    kill_after(None)
    rows._fingerprint = "two"
    refused(base, r"org/stories:train has changed since the run in .* began", **keys)
    rows._fingerprint = "one"
    assert run(base, **keys)["steps"] == 2


# ----------------------------------------------------------------------------------------------- other models


@pytest.mark.parametrize("which", ["model", "reference", "critic"])
def test_another_model_under_the_same_name(base, tmp_path, kill_after, which):
    """A run does not go on, and a finished one is not taken for done, with another model than it began with."""
    folder = tmp_path / "other"
    shutil.copytree(base["model"], folder)
    stage = "sft" if which == "model" else "ppo"
    keys: dict[str, Any] = {which: str(folder)}
    kill_after(2)
    with pytest.raises(Killed):
        run(base, stage, **keys)
    kill_after(None)
    changed = load_file(folder / "model.safetensors")
    changed["model.layers.2.mlp.up_proj.weight"][100, 3] += 1e-3
    save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
    said = refused(base, r"model .*other has changed since the run in .* began", stage, **keys)
    assert said.endswith("put the first model back, name another output_dir, or add --overwrite")
    shutil.copy(Path(base["model"]) / "model.safetensors", folder)
    done = run(base, stage, **keys)
    settings = (folder / "config.json").read_text()
    (folder / "config.json").write_text(settings.replace("1e-05", "1e-06"))
    refused(base, "model .*other has changed", stage, **keys)
    (folder / "config.json").write_text(settings)
    (folder / "README.md").write_text("about it")
    assert run(base, stage, **keys) == done
    shutil.rmtree(folder)
    assert run(base, stage, **keys) == done, "a finished run needs its models no more"


def test_what_a_digest_of_a_model_reads(tmp_path, monkeypatch):
    """Of a large file the header and three blocks of each tensor: any tensor that was written anew is told, and the
    time does not grow with the size. Of the base under an adapter the same."""
    folder = tmp_path / "model"
    folder.mkdir()
    file = folder / "model.safetensors"
    tensors = {f"layer.{i}": torch.full((300, 70), float(i)) for i in range(4)}

    def found(where: Path = folder) -> str:
        digests._digest.cache_clear()  # a clock may be too coarse for two changes
        return digests.of_folder(where)

    save_file(tensors, file)
    small = found()
    monkeypatch.setattr(digests, "WHOLE", 10_000)
    first = found()
    assert first != small
    seen = {first}
    for name in tensors:
        for place in (0, 149, 299):
            save_file({**tensors, name: tensors[name].index_fill(0, torch.tensor([place]), 0.5)}, file)
            seen.add(found())
    save_file({**tensors, "layer.0": tensors["layer.0"].view(70, 300)}, file)
    seen.add(found())
    assert len(seen) == 1 + 3 * len(tensors) + 1
    between = tensors["layer.3"].clone()
    between[80] = 0.5
    save_file({**tensors, "layer.3": between}, file)
    assert found() == first, "numbers between the blocks are not looked at, as docs/checkpoints.md says"

    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(folder)}))
    (folder / "config.json").write_text("{}")
    before = found(adapter)
    (folder / "config.json").write_text("{ }")
    assert found(adapter) != before


def test_the_digest_of_a_model_of_gigabytes_takes_no_time(tmp_path):
    places = [[i * 2**30, (i + 1) * 2**30] for i in range(8)]
    header = {str(p): {"dtype": "BF16", "shape": [2**29], "data_offsets": p} for p in places}
    raw = json.dumps(header).encode()
    with open(tmp_path / "model.safetensors", "wb") as f:
        f.write(len(raw).to_bytes(8, "little") + raw)
        f.truncate(8 + len(raw) + 8 * 2**30)  # without blocks on the disk
    start = time.process_time()
    digests.of_folder(tmp_path)
    assert time.process_time() - start < 0.5


# ------------------------------------------------------------------------------------------- two runs at once

HOLDER = """
import sys, time
from pathlib import Path
from dschat.rlhf.checkpoint import Lock
import os
lock = Lock(Path(sys.argv[1]))
if os.fork() == 0:
    time.sleep(60)
    os._exit(0)
print("held", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("begun", [True, False])
def test_a_folder_in_use(base, tmp_path, kill_after, begun):
    """Refused with the other's number; SIGKILL frees the folder at once, also where a child of the other lives on."""
    folder = Path(base["output_dir"])
    if begun:
        kill_after(2)
        with pytest.raises(Killed):
            run(base)
        kill_after(None)
    else:
        folder.mkdir()
    other = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert other.stdout and other.stdout.readline() == "held\n"
        said = rf"output_dir .*run is in use by process {other.pid}; wait for it or stop it, or name another"
        refused(base, said)
        if begun:
            refused(base, said, overwrite=True)
            stages = {"sft": {**SMALL["sft"], "output_dir": str(folder), "max_steps": 2, "batch_size": 4,
                              "learning_rate": 1e-3}}  # fmt: skip
            before = contents(folder)
            with pytest.raises(ValueError, match=said):
                pipeline.train(
                    config_base.build(C.TrainConfig, base | {"output_dir": str(tmp_path / "all")} | stages)
                )
            assert contents(folder) == before
        other.kill()
        other.wait()
        assert run(base)["steps"] == 2
        assert run(base, overwrite=True)["steps"] == 2
    finally:
        os.killpg(other.pid, signal.SIGKILL)


def test_a_run_that_another_began_meanwhile(base, monkeypatch):
    """It had looked at the folder before the other's run was there, and finished."""
    original = run_module.Run.start

    def late(self: Any, total: int) -> Any:
        if not (self.folder / "run.json").is_file():
            self.folder.mkdir(exist_ok=True)
            (self.folder / "run.json").write_text("{}")
        return original(self, total)

    monkeypatch.setattr(run_module.Run, "start", late)
    with pytest.raises(ConfigError, match=r"another process has begun a run in output_dir .* meanwhile"):
        run(base)
    assert (Path(base["output_dir"]) / "run.json").read_text() == "{}"


# ---------------------------------------------------------------------------------------------- damaged files


def test_damaged_files_of_a_run(base, kill_after):
    """Each is named with what to do, and nothing is changed; the run goes on when it is back."""
    folder = Path(base["output_dir"])
    kill_after(2)
    with pytest.raises(Killed):
        run(base)
    kill_after(None)
    state = next(folder.glob("checkpoints/step-*/state.json"))
    content = json.loads(state.read_text())
    del content["state"]["rng"]
    line = (folder / "metrics.jsonl").read_bytes()
    for file, damage, said in (
        (
            "run.json",
            b"",
            r"run\.json is damaged \(.*\); put back what it was, name another output_dir, or add",
        ),
        ("run.json", b'{"stage": "sft", "con', r"run\.json is damaged \(.*\); put back"),
        ("run.json", b"[]", r"run\.json is damaged \(it holds no object\)"),
        ("run.json", b'{"stage": "sft"}', r"run\.json is damaged \(it holds no config\)"),
        ("run.json", b"\xff\xfe", r"run\.json is damaged \("),
        (
            "metrics.jsonl",
            b'{"step": 1, "lo\n' + line,
            r"metrics\.jsonl line 1 is damaged, .*; mend or delete that",
        ),
        ("metrics.jsonl", b"\0\0\0\n" + line, r"metrics\.jsonl line 1 is damaged"),
        ("metrics.jsonl", b"7\n" + line, r"metrics\.jsonl line 1 is damaged"),
        (
            str(state.relative_to(folder)),
            json.dumps(content).encode(),
            r"damaged state\.json \(no rng\); delete",
        ),
        (
            "result.json",
            b'{"steps"',
            r"result\.json is damaged \(.*\); delete it and start again, to have it",
        ),
    ):
        before = (folder / file).read_bytes() if (folder / file).is_file() else None
        (folder / file).write_bytes(damage)
        refused(base, said)
        if file in ("run.json", "result.json") and "no config" not in said:
            with pytest.raises(ValueError, match=f"{file.replace('.', '[.]')} is damaged") as error:
                report.gather(folder)
            assert "\n" not in str(error.value)
        (folder / file).write_bytes(before) if before is not None else (folder / file).unlink()
    with open(folder / "metrics.jsonl", "ab") as f:
        f.write(b'{"step": 2, "loss": 0.')  # killed while it wrote
    assert run(base)["steps"] == 2
    assert [line["step"] for line in numbers(folder)] == [1, 2]
    (folder / "result.json").unlink()  # what the sentence about a damaged one says to do
    assert run(base)["steps"] == 2


# -------------------------------------------------------------------------------------------------- full disks


@pytest.mark.parametrize("what", ["tensors", "state", "metrics", "model", "result"])
def test_a_full_disk(base, tmp_path, monkeypatch, what):
    """One sentence; the checkpoint before is whole, nothing half-written is left, and the run goes on from there."""
    straight = run(base, output_dir=str(tmp_path / "straight"), max_steps=3)
    folder = Path(base["output_dir"])
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    where = {"tensors": "step-000003", "state": "step-000003", "metrics": "metrics.jsonl", "model": "model",
             "result": "result.json"}[what]  # fmt: skip
    with monkeypatch.context() as patch:
        calls: list[int] = []

        def fails(original: Any, error: Exception, at: int = 1) -> Any:
            def call(*args: Any, **kw: Any) -> Any:
                calls.append(1)
                if len(calls) == at:
                    raise error
                return original(*args, **kw)

            return call

        if what == "tensors":
            text = SafetensorError(
                "Error while serializing: I/O error: No space left on device (os error 28)"
            )
            patch.setattr(checkpoint, "save_file", fails(checkpoint.save_file, text, 3))
        elif what == "state":
            patch.setattr(checkpoint.json, "dumps", full_when(json.dumps, full, lambda v: v.get("step") == 3))
        elif what == "metrics":
            real = os.write
            patch.setattr(metrics.os, "write", lambda fd, b: half(real, fd, b, full))
        elif what == "model":
            patch.setattr(models, "save_model", lambda *_: in_a_folder(folder / "model", full))
        else:
            real_fsync = os.fsync
            patch.setattr(checkpoint.os, "fsync", lambda fd: no_result(real_fsync, fd, full))
        with pytest.raises(ConfigError) as error:
            run(base, max_steps=3)
    last = "step-000003" if what in ("model", "result") else "step-000002"
    said = str(error.value)
    assert f"{where} cannot be written, the disk is full; free some space; the same command goes on" in said
    assert f"after {last}" in said and "\n" not in said
    checkpoint.load(folder / "checkpoints" / last)
    assert not list(folder.rglob(".tmp-*")) and not (folder / "result.json").exists()
    again = run(base, max_steps=3)
    drop = ("seconds", "written")
    assert {k: v for k, v in again.items() if k not in drop} == {
        k: v for k, v in straight.items() if k not in drop
    }
    assert numbers(folder) == numbers(tmp_path / "straight")
    assert same_weights(folder / "model", tmp_path / "straight" / "model")


def full_when(original: Any, error: Exception, when: Any) -> Any:
    def dumps(value: Any, **kw: Any) -> str:
        if isinstance(value, dict) and "tensors" in value and when(value):
            raise error
        return str(original(value, **kw))

    return dumps


def half(real: Any, fd: int, content: bytes, error: Exception) -> int:
    """Half of step 3's line fits; what is left of it does not."""
    if b'"step": 3' in content:
        return int(real(fd, content[: len(content) // 2]))
    if not content.startswith(b"{"):
        raise error
    return int(real(fd, content))


def in_a_folder(folder: Path, error: Exception) -> None:
    with checkpoint.atomic_folder(folder) as temporary:
        (temporary / "config.json").write_text("{}")
        raise error


def no_result(real: Any, fd: int, error: Exception) -> None:
    if "result.json" in os.readlink(f"/proc/self/fd/{fd}"):
        raise error
    real(fd)


def test_a_picture_without_room(tmp_path, monkeypatch):
    """The page of a run that has ended: the sentence of a full disk too, and no half of a picture."""
    metrics.append_line(tmp_path / "metrics.jsonl", {"step": 1, "loss": 1.0})
    (tmp_path / "run.json").write_text('{"stage": "sft"}')

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(checkpoint.WriteError, match=r"curves\.png cannot be written, the disk is full; free"):
        report.write(tmp_path, "a run", [])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "run.json"]


def test_a_device_without_room(tmp_path):
    """As the kernel says it."""
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(
        checkpoint.WriteError, match=r"metrics\.jsonl cannot be written, the disk is full; free"
    ):
        metrics.append_line(tmp_path / "metrics.jsonl", {"step": 1})


def test_a_folder_that_takes_no_files(base, monkeypatch):
    """Said before a model is loaded."""
    monkeypatch.setattr(models, "load_policy", lambda *_, **__: pytest.fail("a model is loaded"))
    monkeypatch.setattr(checkpoint.os, "access", lambda path, mode: False)  # whoever runs this may be root
    with pytest.raises(
        OSError, match=r"output_dir .* cannot be written \(.* takes no files\); make it writable"
    ):
        run(base)
    assert not Path(base["output_dir"]).exists()


# ------------------------------------------------------------------------------------------------- more steps


@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_a_longer_run_is_the_straight_one(base, tmp_path, kill_after, stage, killed):
    """With a constant rate: 2 steps and then 4 = 4, bit for bit, of a finished and of a killed run."""
    keys = {"lr_schedule": "constant"}
    straight = run(base, stage, **keys, max_steps=4, output_dir=str(tmp_path / "straight"))
    if killed:
        kill_after(2)
        with pytest.raises(Killed):
            run(base, stage, **keys, max_steps=2)
        kill_after(None)
    else:
        assert run(base, stage, **keys, max_steps=2)["steps"] == 2
        kill_after(4)  # and killed again on its way: the old result is not taken for the new one
        with pytest.raises(Killed):
            run(base, stage, **keys, max_steps=4)
        kill_after(None)
    longer = run(base, stage, **keys, max_steps=4)
    drop = ("seconds", "written")
    assert {k: v for k, v in longer.items() if k not in drop} == {
        k: v for k, v in straight.items() if k not in drop
    }
    folder = tmp_path / "run"
    assert numbers(folder) == numbers(tmp_path / "straight")
    for name in ("model", "checkpoints"):
        assert same_weights(folder / name, tmp_path / "straight" / name)
    refused(
        base,
        "has taken 4 steps, more than the 3 asked for; set max_steps to more",
        stage,
        **keys,
        max_steps=3,
    )


def test_when_a_run_cannot_grow(base, tmp_path):
    run(base, lr_schedule="cosine")
    said = r"holds a run with max_steps 2, not max_steps 4, and lr_schedule cosine, by which the steps taken would"
    refused(base, said, lr_schedule="cosine", max_steps=4)
    refused(base, "not epochs 3, and lr_schedule cosine", lr_schedule="cosine", max_steps=0, epochs=3)
    assert run(base, lr_schedule="cosine", epochs=3)["steps"] == 2, "max_steps decides, so epochs may be any"
    other = base | {"output_dir": str(tmp_path / "other"), "lr_schedule": "constant", "save_every": 0}
    run(other)
    refused(other, r"finished run without checkpoints \(save_every 0\), so it cannot go on", max_steps=4)


def test_a_stage_does_not_grow_under_a_later_one(base):
    """PPO's result would be that of another SFT model."""
    folder = Path(base["output_dir"])
    small = {"batch_size": 4, "max_steps": 1, "learning_rate": 1e-3, "lr_schedule": "constant"}
    ppo = {**small, **SMALL["ppo"], "reward": ["dschat.rlhf.verifiers:number"], "lora_r": 2}
    stages = {"sft": {**small, **SMALL["sft"]}, "ppo": ppo}
    pipeline.train(config_base.build(C.TrainConfig, base | stages))
    before = contents(folder)
    stages["sft"]["max_steps"] = 2
    with pytest.raises(
        ConfigError, match=r"sft is to go on, but ppo in .* has begun from what it wrote; add --ppo"
    ):
        pipeline.train(config_base.build(C.TrainConfig, base | stages))
    assert contents(folder) == before
    stages["ppo"]["overwrite"] = True
    assert pipeline.train(config_base.build(C.TrainConfig, base | stages))["sft"]["steps"] == 2


# -------------------------------------------------------------------------------------------------- what is kept


@pytest.mark.parametrize("kept", [0, 1, 4])
def test_answers_that_are_kept(base, kept):
    """All of as many prompts of each step as asked for; the page shows those of the first and of the last step."""
    run(base, "grpo", keep_completions=kept)
    rows = metrics.read_lines(Path(base["output_dir"]) / "completions.jsonl")
    assert [row["step"] for row in rows] == [1] * 2 * min(kept, 2) + [2] * 2 * min(kept, 2)
    assert len({row["prompt"] for row in rows if row["step"] == 1}) == min(kept, 2)


def test_the_page_shows_both_ends(tmp_path):
    rows = [
        {"step": s, "prompt": "p", "completion": f"{s}.{i}", "score": 0.0}
        for s in (1, 2, 3)
        for i in range(32)
    ]
    shown = report._before_after(report.RunFiles("r", "grpo", tmp_path, completions=rows))
    assert [row["step"] for row in shown] == [1] * 10 + [3] * 10


def test_how_many_answers_cannot_be_kept(base):
    with pytest.raises(ConfigError, match="keep_completions is -1, but it must be 0 or more"):
        run(base, "grpo", keep_completions=-1)


def test_a_run_of_a_version_with_fewer_settings_goes_on(base, tmp_path):
    """What its run.json does not name it did as the default says."""
    run(base, save_every=1)
    (tmp_path / "run" / "result.json").unlink()
    file = tmp_path / "run" / "run.json"
    facts = json.loads(file.read_text())
    del facts["config"]["weight_decay"], facts["config"]["overlong"]
    file.write_text(json.dumps(facts))
    refused(base, "holds a run with overlong 'drop', not 'cut'", overlong="cut")
    assert run(base, save_every=1)["steps"] == 2


# ------------------------------------------------------------------------------------------------------ Ctrl-C


@pytest.fixture
def keyboard() -> Iterator[None]:
    """Ctrl-C as in a terminal; a background job inherits that it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def press(patch: pytest.MonkeyPatch, owner: Any, name: str, at: int) -> None:
    """Ctrl-C before the `at`-th call of a function."""
    real, calls = getattr(owner, name), []

    def call(*args: Any, **kw: Any) -> Any:
        calls.append(1)
        if len(calls) == at:
            signal.raise_signal(signal.SIGINT)
        return real(*args, **kw)

    patch.setattr(owner, name, call)


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (HybridEngine, "generate"),
        (HybridEngine, "backward"),
        (checkpoint, "save_file"),
        (metrics.Metrics, "log"),
    ],
)
def test_ctrl_c(base, tmp_path, monkeypatch, keyboard, capsys, owner, name):
    """In the third step: one sentence, exit code 130, whole checkpoints and nothing half-written; the same command goes
    on from there. Pressed again while it cleans up, it changes nothing: launchers pass on what all have got."""
    (tmp_path / "mine.py").write_text(
        "def f(completions, **_):\n    return [-len(c) / 10 for c in completions]\n"
    )
    keys = {**base, **SMALL["grpo"], "batch_size": 4, "max_steps": 3, "reward": [f"{tmp_path}/mine.py:f"]}
    command = ["grpo", "--config", str(tmp_path / "c.yaml")]
    (tmp_path / "c.yaml").write_text(config_text.dump(COMMANDS["grpo"](**keys)))
    straight = str(tmp_path / "straight")
    assert main([*command, "--output_dir", straight]) == 0
    folder = Path(base["output_dir"])
    with monkeypatch.context() as patch:
        press(patch, owner, name, at=3)
        press(patch, run_module.Run, "close", at=1)
        capsys.readouterr()
        assert main(command) == 130
    assert capsys.readouterr().err == (
        f"dschat: interrupted; the same command goes on after step-000002 ({folder})\n"
    )
    checkpoint.load(folder / "checkpoints" / "step-000002")
    assert not list(folder.rglob(".tmp-*")) and not (folder / "result.json").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert main(command) == 0
    assert numbers(folder) == numbers(straight)
    assert same_weights(folder / "model", Path(straight) / "model")


def test_ctrl_c_ends_whoever_started_runs(base, monkeypatch, keyboard):
    """A KeyboardInterrupt as everywhere, so that a loop over settings does not take it for a bad one."""
    press(monkeypatch, checkpoint, "save_file", at=1)
    with pytest.raises(KeyboardInterrupt, match="interrupted; the same command goes on from the start"):
        run(base)


def test_workers_leave_ctrl_c_to_the_run(keyboard):
    class Told:
        def attempt(self, record: Any) -> Any:
            return signal.getsignal(signal.SIGINT) == signal.SIG_IGN

    assert data._attempts(list(range(5)), Told(), 2) == [True] * 5

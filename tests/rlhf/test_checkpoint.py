"""Checkpoints: exact, atomic, rotated, never pickled, and one sentence for a broken one."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from dschat.rlhf import checkpoint as K


def trainee(seed: int = 0):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))
    model[0].weight.requires_grad_(False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    return model, torch.optim.AdamW(parameters, lr=0.01, betas=(0.8, 0.9))


def step(model, optimizer) -> float:
    x = torch.randn(4, 6) * random.random() + np.random.randn()
    loss = model(x).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def seed_all() -> None:
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    np.random.randn()  # leaves a cached second normal behind


def store(folder, n, model, optimizer, **extra):
    opt_tensors, opt_state = K.optimizer_state("optimizer", optimizer)
    rng_tensors, rng = K.rng_state()
    tensors = K.module_state("model", model) | opt_tensors | rng_tensors
    return K.save(folder, n, tensors, {"optimizer": opt_state, "rng": rng} | extra)


def test_resumed_equals_straight(tmp_path):
    """checklist 2.1 #24, #25: weights, moments and three random generators, bit for bit."""
    model, optimizer = trainee()
    seed_all()
    for _ in range(3):
        step(model, optimizer)
    path = store(tmp_path, 3, model, optimizer, value=0.1 + 0.2)
    straight = [step(model, optimizer) for _ in range(4)]
    other, fresh = trainee(seed=5)
    other[0].weight.data.copy_(model[0].weight)  # frozen: comes from the base model, not from the checkpoint
    random.seed(9), np.random.seed(9), torch.manual_seed(9)
    tensors, state, n = K.load(path)
    assert n == 3 and state["value"] == 0.1 + 0.2 and "model.0.weight" not in tensors
    K.load_module_state("model", other, tensors)
    K.load_optimizer_state("optimizer", fresh, tensors, state["optimizer"])
    K.set_rng_state(tensors, state["rng"])
    assert [step(other, fresh) for _ in range(4)] == straight
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_no_pickle_anywhere(tmp_path):
    path = store(tmp_path, 1, *trainee())
    assert sorted(os.listdir(path)) == ["state.json", "tensors.safetensors"]
    json.loads((path / "state.json").read_text())
    for name in os.listdir(path):
        assert (path / name).read_bytes()[:2] not in (b"PK", b"\x80\x02", b"\x80\x04", b"\x80\x05")


def test_rotation(tmp_path):
    for n in (1, 2, 10, 100):
        K.save(tmp_path, n, {"a": torch.ones(1)}, {}, keep=2)
    assert sorted(os.listdir(tmp_path)) == ["step-000010", "step-000100"]
    assert K.latest(tmp_path) == tmp_path / "step-000100"
    assert K.latest(tmp_path / "nowhere") is None
    K.save(tmp_path, 100, {"a": torch.zeros(1)}, {"again": True})
    assert K.load(tmp_path / "step-000100")[1] == {"again": True}, (
        "a step is written anew when a run repeats it"
    )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: os.remove(p / "state.json"), "has no state.json"),
        (lambda p: os.remove(p / "tensors.safetensors"), "has no tensors.safetensors"),
        (lambda p: (p / "state.json").write_text('{"format": 1'), "has a broken state.json"),
        (lambda p: (p / "state.json").write_text("[]"), "has a broken state.json"),
        (lambda p: (p / "state.json").write_bytes(b"\xff\xfe"), "has a broken state.json"),
        (lambda p: os.truncate(p / "tensors.safetensors", 50), "is not what was written"),
        (lambda p: flip(p / "tensors.safetensors"), "is not what was written"),
        (lambda p: newer(p / "state.json"), "has format 99, but this version reads 1"),
    ],
)
def test_broken_checkpoints(tmp_path, damage, message):
    K.save(tmp_path, 1, {"a": torch.arange(9.0)}, {})
    path = K.save(tmp_path, 2, {"a": torch.arange(9.0)}, {})
    damage(path)
    with pytest.raises(K.CheckpointError, match=message) as error:
        K.load(path)
    assert "\n" not in str(error.value) and "to go on from step-000001" in str(error.value)


def flip(path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def newer(path) -> None:
    path.write_text(path.read_text().replace('"format": 1', '"format": 99'))


def test_other_shapes_are_refused():
    model, _ = trainee()
    tensors = K.module_state("model", model)
    tensors["model.0.bias"] = torch.zeros(7)
    with pytest.raises(
        K.CheckpointError, match=r"model\.0\.bias has shape \(7,\) in the checkpoint but .* \(5,\)"
    ):
        K.load_module_state("model", model, tensors)
    del tensors["model.0.bias"]
    before = model[2].weight.clone()
    tensors["model.2.weight"] = before + 1
    with pytest.raises(K.CheckpointError, match=r"model\.0\.bias is missing"):
        K.load_module_state("model", model, tensors)
    assert torch.equal(model[2].weight, before), "nothing was copied before the check"


def test_failed_write_leaves_the_old_one(tmp_path):
    K.save(tmp_path, 1, {"a": torch.ones(2)}, {})
    with pytest.raises(TypeError):
        K.save(tmp_path, 2, {"a": torch.ones(2)}, {"not json": object()})
    assert os.listdir(tmp_path) == ["step-000001"]
    target = tmp_path / "model"
    target.mkdir()
    (target / "old").touch()
    with pytest.raises(RuntimeError), K.atomic_folder(target) as temporary:
        (temporary / "new").touch()
        raise RuntimeError
    assert os.listdir(target) == ["old"]
    with K.atomic_folder(target) as temporary:
        (temporary / "new").touch()
    assert os.listdir(target) == ["new"]


KILL_ME = """
import sys, torch
from dschat.rlhf import checkpoint as K
n = 0
while True:
    n += 1
    K.save(sys.argv[1], n, {"a": torch.full((200_000,), float(n))}, {"n": n}, keep=2)
    print(n, flush=True)
"""


@pytest.mark.parametrize("delay", [0.0, 0.003, 0.011])
def test_killed_while_writing(tmp_path, delay):
    """A kill at any moment: the newest checkpoint is whole, at most one step behind what was said to be
    saved.
    """
    process = subprocess.Popen(
        [sys.executable, "-c", KILL_ME, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    for _ in range(4):
        process.stdout.readline()
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    said = [4, *(int(line) for line in process.stdout.read().split())][-1]
    process.wait()
    newest = K.latest(tmp_path)
    assert newest
    tensors, state, n = K.load(newest)
    assert n >= said and state["n"] == n and (tensors["a"] == n).all()
    K.save(tmp_path, n + 1, {"a": torch.zeros(1)}, {})
    assert not [f for f in os.listdir(tmp_path) if f.startswith(K.TEMPORARY)], "the next save cleans up"

"""The engine and a patched model on a device that is not the CPU: nothing mixes devices, and results stay there.

tests/cuda/pretend.py is the device; PyTorch's own rules about devices hold for it. CUDA itself is marked `gpu`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dschat import HybridEngine, SamplingConfig
from dschat_kernels.cache import PagedKVCache
from tests.tiny_models import build

ROOT = Path(__file__).resolve().parents[2]


def test_there_and_here_agree() -> None:
    """Rollouts, log-probs, updates, the cache's data and `generate`; on the cuda backend graphs, and what a decode step
    sends and fetches, for llama `verify`. And the device refuses and sees what it should."""
    runs = ("llama:cuda", "gpt2:cuda", "gemma2:reference")
    done = subprocess.run(
        [sys.executable, "-m", "tests.cuda.pretend", "rules", *runs], cwd=ROOT, capture_output=True, text=True,
        timeout=600, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    said = [f"{run.split(':')[0]}: 13 results agree" for run in runs]
    assert done.stdout.splitlines() == ["rules: 37 hold", *said]


def test_the_block_table_of_a_device_is_a_mirror() -> None:
    """Every change of the books reaches it with the next sync; the meta device has no values to compare, so the mirror
    is put on the CPU here."""
    cache = PagedKVCache(1, 1, 4, 8, 3, 3, device="meta")
    assert cache.block_table.device.type == "meta"
    cache.block_table = torch.full((3, 3), -7, dtype=torch.int32)
    changes = (
        lambda: cache.prepare_append([0], 70),
        lambda: (cache.advance([0], 70), cache.fork(0, 1)),
        lambda: cache.prepare_append([1], 1),
        lambda: cache.reorder([2], [0]),
        lambda: cache.crop(0, 10),
        lambda: cache.alloc(0, 100),
        lambda: cache.free(1),
    )
    for change in changes:
        change()
        assert cache.block_table.tolist() != cache._table.tolist(), (
            "nothing changed, or nobody waited for sync"
        )
        cache.sync()
        assert cache.block_table.tolist() == cache._table.tolist()


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["reference", "cuda", "triton"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_on_a_gpu(name: str, backend: str) -> None:
    """The greedy tokens of the CPU, and log-probs, updates and a second rollout without an error."""
    ids = torch.tensor([[0, 0, 1, 3, 7], [1, 4, 6, 8, 9]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    sampling = SamplingConfig(max_new_tokens=4, temperature=0.0)
    expected = HybridEngine(build(name), backend="reference").generate(ids, mask, sampling)
    model = build(name).to("cuda")
    engine = HybridEngine(model, torch.optim.SGD(model.parameters(), lr=0.1), backend=backend)
    rollout = engine.generate(ids, mask, sampling)
    assert rollout.completion_ids.is_cuda and torch.equal(
        rollout.completion_ids.cpu(), expected.completion_ids
    )
    logprobs = engine.logprobs(rollout)
    torch.testing.assert_close(logprobs.detach(), rollout.logprobs, rtol=1e-3, atol=1e-3)
    engine.backward(-logprobs.sum())
    engine.step()
    assert engine.generate(ids, mask, sampling).completion_ids.is_cuda

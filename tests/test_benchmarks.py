"""What the scripts of benchmarks/ compute besides times: lengths, batches, random models, tables."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import growth, ragged, readme
from dschat import HybridEngine, SamplingConfig
from dschat_kernels.ops._common import constant_result

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"


def test_drawn_lengths_are_log_normal_and_repeatable() -> None:
    lengths = ragged.drawn_lengths(4000, 16, 512, seed=3)
    assert (
        lengths == ragged.drawn_lengths(4000, 16, 512, seed=3) != ragged.drawn_lengths(4000, 16, 512, seed=4)
    )
    assert min(lengths) == 16 and max(lengths) == 512
    logs = torch.tensor(lengths).double().log()
    assert abs(float(logs.median()) - torch.tensor(16.0 * 512).log().item() / 2) < 0.05
    assert 0.75 < float(logs.std()) < 0.9  # two deviations to either end, less what is cut


def test_sorted_batches_hold_every_row_once() -> None:
    lengths = [5, 1, 9, 2, 7]
    batches = ragged.sorted_batches(lengths, 2)
    assert batches == [[1, 3], [0, 4], [2]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_llama_is_a_llama_that_both_sides_run(dtype: torch.dtype) -> None:
    model = growth.random_llama("1m", dtype)
    hidden, layers, _, _, mlp, vocabulary = growth.SHAPES["1m"]
    assert {p.dtype for p in model.parameters()} == {dtype} and model.config.num_hidden_layers == layers
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.lm_head.weight.shape == (
        vocabulary,
        hidden,
    )
    assert model.model.layers[0].mlp.up_proj.weight.shape == (mlp, hidden)
    ids = torch.arange(40)[None] % vocabulary
    out = HybridEngine(model).generate(ids, None, SamplingConfig(max_new_tokens=6, temperature=0.0))
    with torch.no_grad():
        wide = model.double()(torch.cat([ids, out.completion_ids], 1)).logits[0, 39:-1].log_softmax(-1)
    expected = wide.gather(1, out.completion_ids[0, :, None])[:, 0]
    assert wide.isfinite().all() and float((expected - out.logprobs[0]).abs().max()) < 0.05
    if dtype == torch.float32:
        assert torch.equal(wide.argmax(-1), out.completion_ids[0])


def test_importing_the_kernels_leaves_dynamo_alone() -> None:
    """torch._dynamo takes longer to import than everything of ours; a decorator at the top of a module loads it."""
    code = "import sys, dschat_kernels.ops._common, dschat_kernels.cuda; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

    def function() -> int:
        return 1

    theirs = torch.compiler.assume_constant_result(lambda: 1)
    assert vars(constant_result(function)) == vars(theirs) != {}

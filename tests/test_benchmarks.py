"""What the scripts of benchmarks/ compute besides times: lengths, batches, random models, tables."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import growth, ragged, readme
from dschat import HybridEngine, SamplingConfig
from dschat_kernels.ops._common import constant_result

MACHINE = {"cpu": "a CPU", "threads": 2, "isa": "avx2", "read_gb_per_s": 20.0, "gflops": 300, "torch": "2"}
MODEL = {"type": "llama", "parameters": 134_500_000, "dtype": "bfloat16"}


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


# ------------------------------------------------------------------------------------------------ README's tables


def spread(median: float) -> dict[str, float]:
    return {"median": median, "low": median - 1, "high": median + 2}


RESULTS: dict[str, dict[str, Any]] = {
    "generate": {
        "machine": MACHINE, "model": MODEL, "versions": {"hf": "transformers 5", "vllm": "vllm 0.32, torch"},
        "rows": [
            {"batch_size": 16, "prompt_length": 128, "new_tokens": 64, "ours": spread(600), "hf": spread(120),
             "speedup": 5.0, "decode_ms": 17.5, "hf_decode_ms": 100.0, "bound_rate": 800.0, "bound_share": 0.75,
             "peers": {"vllm": {"rate": spread(300)}}, "speedups": {"vllm": 2.0}},
            {"batch_size": 1, "prompt_length": 8, "new_tokens": 4, "ours": spread(90), "hf": None, "speedup": None,
             "decode_ms": 9.5, "hf_decode_ms": None, "bound_rate": 100.0, "bound_share": 0.9, "peers": {},
             "speedups": {}},
        ],
    },
    "ragged": {
        "kind": "ragged", "machine": MACHINE, "model": MODEL,
        "workload": {"rows": 256, "slots": 32, "shortest": 16, "longest": 512, "n": 8, "sample_prompts": 4,
                     "sample_prompt": 256, "sample_new": 64},
        "ragged": {"ours": spread(500), "hf": spread(100), "ratio": 5.0, "rows_compared_alone": 32},
        "samples": {"shared": spread(10), "unshared": spread(20), "ratio": 2.0},
    },
    "growth": {
        "kind": "growth", "machine": MACHINE, "dtype": "bfloat16", "repeats": 3,
        "points": [
            {"section": section, "x": 7, "threads": 2, "parameters": 1_700_000_000, "batch": 4, "prompt": 64,
             "step_ms": 30.0, "step_bound_ms": 20.0, "step_times_bound": 1.5, "prefill_s": 1.0, "prefill_bound_s": 0.8}
            for section in ("batch", "context", "threads, batch 4", "parameters, batch 4")
        ],
    },
    "start": {
        "kind": "start", "machine": MACHINE, "dtype": "bfloat16", "repeats": 5, "import": spread(1.5),
        "dschat": spread(2.5), "hf": spread(3.5), "full": {"seconds": 0.1, "reads": 2.5},
        "lora": {"seconds": 0.2, "reads": 2.9},
    },
    "token_logprobs": {
        "kind": "token_logprobs", "machine": MACHINE,
        "rows": [{"vocabulary": 49152, "dtype": "bfloat16", "mode": "forward", "tokens": 2048, "speedup": 3.0,
                  "seconds": {"ours": 1.0, "torch": 3.0}, "peak_of_logits": {"ours": 0.1, "torch": 2.0}}],
    },
    "trl": {
        "kind": "trl", "machine": MACHINE, "versions": {"trl": "trl 1.16, transformers 5"}, "dschat": spread(20),
        "trl": spread(50), "phases": {"flip": 0.01, "update": 12.0}, "ratio": 2.5,
        "workload": {"train": "lora", "prompts": 4, "n": 8, "prompt": 128, "new": 64, "minibatch": 8,
                     "dtype": "bfloat16"},
    },
}  # fmt: skip
SHOWN = {
    "generate": ["| 16, 128 + 64 | 600 [599-602] | 120 [119-122] | **5.0** | 300 [299-302] | **2.0** | 17.5 (100) "
                 "| 800 | 75 % |", "| 1, 8 + 4 | 90 [89-92] | - | - | - | - | 9.5 | 100 | 90 % |",
                 "vllm 0.32. Median", "the three sides in turn", "300 GFLOP/s"],
    "ragged": ["HF in its best batches: 100 [99-102] | **5.0** |", "| 10.0 [9.0-12.0] | prompts not shared: 20.0"],
    "growth": ["| batch 7, prompt 64 | 2 | 30.0 | 20.0 | 1.50 | 1.00 (0.80) |", "| context 7, batch 4 |",
               "| 1700 M parameters, batch 4 |"],
    "start": ["| 0.10 s, 2.5 reads of the weights |", "| 1.50 [0.50-3.50] |"],
    "token_logprobs": ["| 49,152, bfloat16, forward | 1.00 | 3.00 | **3.0** | 10.0 % | 200 % |", "2048 tokens"],
    "trl": ["| 20.0 [19.0-22.0] | 50.0 [49.0-52.0] | **2.50** |", "Seconds of ours: update 12.0."],
}  # fmt: skip


@pytest.mark.parametrize("kind", RESULTS)
def test_tables(kind: str) -> None:
    text = readme.TABLES[kind](RESULTS[kind])
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) >= 3 and len({line.count("|") for line in rows}) == 1
    for part in SHOWN[kind]:
        assert part in text, text
    assert set(RESULTS) | {"ppo"} == set(readme.TABLES)


def test_evidence_table() -> None:
    held_out = {"prompts": 64, "before": -0.05, "after": 0.55, "change": 0.6, "kl": 2.5, "length_before": 19.0,
                "length_after": 17.0}  # fmt: skip
    other = {**held_out, "before": 0.05, "after": 0.45, "change": 0.4, "kl": 1.5, "length_after": 15.0}
    runs = [{"held_out": h, "config": {"eval_samples": 4}} for h in (held_out, other)]
    result = {"name": "grpo", "over_seeds": {"mean": 0.5, "low": 0.25, "high": 0.75}, "runs": runs}
    assert "reward model" not in readme.evidence_table([result])
    judge = {"accuracy": 0.81, "longer_wins": 0.35, "pairs": 118}
    text = readme.evidence_table([{**result, "reward_model": judge}])
    assert "| grpo | 0.00 | 0.50 | **+0.50** (+0.25 to +0.75) | +0.60, +0.40 | 2.0 | 19 -> 16 |" in text
    assert "64 held-out prompts, 4 answers each" in text
    assert (
        "accuracy on 118 held-out pairs is 81 %; going by length alone, and equal lengths right by half, gives 65 %"
        in text
    )


def test_growth_plot(tmp_path: Path) -> None:
    growth.plot(RESULTS["growth"], tmp_path / "growth.png")
    assert (tmp_path / "growth.png").read_bytes()[:4] == b"\x89PNG"

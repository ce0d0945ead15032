"""Generation throughput, ours beside Hugging Face in one run, as a share of what the machine can do.

Random prompts of exact length, greedy, EOS ignored; tokens/s = batch x generated / total time, prefill included.
Runs of the two sides alternate, so a machine that drifts drifts for both; figures are medians with their spread.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dschat_kernels.backends import backends, read_bandwidth

from .engine import HybridEngine, SamplingConfig
from .engine.verify import logprob_gap


@dataclass
class Spread:
    """Median, smallest and largest of repeated measurements."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))


@dataclass
class GenerateRow:
    """One workload. Times in seconds, decode in milliseconds a step, rates in tokens a second."""

    batch_size: int
    prompt_length: int
    new_tokens: int
    ours: Spread
    prefill: float
    decode_ms: float
    decode_gb_per_s: float
    bandwidth_share: float
    hf: Spread | None = None
    hf_prefill: float | None = None
    hf_decode_ms: float | None = None

    @property
    def speedup(self) -> float | None:
        return None if self.hf is None else self.ours.median / self.hf.median


@dataclass
class GenerateReport:
    """Everything a table needs to be read: machine, model, rows."""

    machine: dict[str, Any]
    model: dict[str, Any]
    rows: list[GenerateRow] = field(default_factory=list)

    def to_json(self) -> str:
        rows = [{**asdict(r), "speedup": r.speedup} for r in self.rows]
        return json.dumps({"machine": self.machine, "model": self.model, "rows": rows}, indent=2)

    def to_markdown(self) -> str:
        head = (
            "| batch, prompt + new | dschat tok/s | HF tok/s | ratio | prefill s (HF) | decode ms/step (HF) "
            "| GB/s | share of peak |"
        )
        lines = [head, "| --- " * 8 + "|"]
        for r in self.rows:
            hf = f"{r.hf.median:.0f} [{r.hf.low:.0f}-{r.hf.high:.0f}]" if r.hf else "-"
            ratio = f"{r.speedup:.1f}x" if r.speedup else "-"
            prefill = (
                f"{r.prefill:.2f} ({r.hf_prefill:.2f})" if r.hf_prefill is not None else f"{r.prefill:.2f}"
            )
            decode = (
                f"{r.decode_ms:.1f} ({r.hf_decode_ms:.1f})"
                if r.hf_decode_ms is not None
                else f"{r.decode_ms:.1f}"
            )
            lines.append(
                f"| {r.batch_size}, {r.prompt_length} + {r.new_tokens} "
                f"| {r.ours.median:.0f} [{r.ours.low:.0f}-{r.ours.high:.0f}] "
                f"| {hf} | {ratio} | {prefill} | {decode} | {r.decode_gb_per_s:.1f} | {100 * r.bandwidth_share:.0f} % |"
            )
        return "\n".join(lines)


def generate(
    model: nn.Module,
    workloads: Sequence[tuple[int, int, int]],
    *,
    repeats: int = 3,
    compare_hf: bool = True,
    backend: str | None = None,
    weights: str = "model",
    progress: Callable[[str], None] | None = None,
) -> GenerateReport:
    """Measures `workloads`, each (batch size, prompt length, new tokens), on a causal language model.

    Each side is warmed up once with the workload, then measured `repeats` times, the sides taking turns.
    weights: "model", or "int8": then the facts also hold how far the log-probs of a sampled rollout of the first
    workload are from those of the training forward.
    """
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}: measure at least once.")
    if not workloads:
        raise ValueError("there is no workload: give at least one (batch size, prompt length, new tokens).")
    for workload in workloads:
        if min(workload) < 1:
            raise ValueError(
                f"workload {workload}: give a batch size, prompt length and number of new tokens of at least 1."
            )
    model.eval()
    engine = HybridEngine(
        model, max_slots=max(b for b, _, _ in workloads), backend=backend, rollout_weights=weights
    )
    peak = read_bandwidth()
    report = GenerateReport(machine_facts(peak), _model_facts(engine))
    for batch, prompt, new in workloads:
        if progress is not None:
            progress(f"batch {batch}, {prompt} + {new} tokens")
        report.rows.append(_measure(engine, batch, prompt, new, repeats, compare_hf, peak))
    if weights != "model":
        batch, prompt, new = workloads[0]
        rollout = engine.generate(
            _random_prompts(engine, batch, prompt), None, SamplingConfig(max_new_tokens=new)
        )
        with torch.no_grad():
            gap = logprob_gap(engine.logprobs(rollout), rollout)
        report.model["weights"] = weights
        report.model["logprob_gap"] = {k: round(v, 5) for k, v in gap.items()}
    return report


def _random_prompts(engine: HybridEngine, batch: int, prompt: int) -> Tensor:
    return torch.randint(engine.spec.vocab_size, (batch, prompt), generator=torch.Generator().manual_seed(0))


def _measure(
    engine: HybridEngine, batch: int, prompt: int, new: int, repeats: int, compare_hf: bool, peak: float
) -> GenerateRow:
    ids = _random_prompts(engine, batch, prompt)
    sampling = SamplingConfig(max_new_tokens=new, temperature=0.0)
    engine.generate(ids, None, sampling)
    if compare_hf:
        _hf_generate(engine.model, ids, min(new, 8))
    ours, hf, hf_prefill, stats = [], [], [], []
    for _ in range(repeats):
        rollout = engine.generate(ids, None, sampling)
        stats.append(rollout.stats)
        ours.append(rollout.stats.total)
        if compare_hf:
            hf_prefill.append(_seconds(lambda: _hf_generate(engine.model, ids, 1)))
            hf.append(_seconds(lambda: _hf_generate(engine.model, ids, new)))
    decode = statistics.median((s.decode + s.sample) / max(1, s.steps) for s in stats)
    rate = _bytes_per_step(engine, batch, prompt + new / 2) / decode
    tokens = batch * new
    row = GenerateRow(
        batch, prompt, new, Spread.of([tokens / t for t in ours]), statistics.median(s.prefill for s in stats),
        1e3 * decode, rate / 1e9, rate / peak,
    )  # fmt: skip
    if compare_hf:
        row.hf = Spread.of([tokens / t for t in hf])
        row.hf_prefill = statistics.median(hf_prefill)
        row.hf_decode_ms = 1e3 * (statistics.median(hf) - row.hf_prefill) / max(1, new - 1)
    return row


@torch.no_grad()
def _hf_generate(model: Any, ids: Tensor, new: int) -> Tensor:
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False,
        pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    assert isinstance(out, Tensor) and out.shape[1] == ids.shape[1] + new
    return out


def _bytes_per_step(engine: HybridEngine, batch: int, context: float) -> float:
    """Packed weights once, and the keys and values of every row."""
    spec, size = engine.spec, engine.decoder.dtype.itemsize
    cache = 2 * len(spec.layers) * spec.num_kv_heads * spec.head_dim * size
    return engine.decoder.packed_bytes + batch * context * cache


def machine_facts(peak: float) -> dict[str, Any]:
    return {
        "cpu": _cpu_name(),
        "isa": backends()["cpu"].isa,
        "threads": torch.get_num_threads(),
        "read_gb_per_s": round(peak / 1e9, 1),
        "torch": torch.__version__,
        "backends": {row.name: row.runs for row in backends()},
    }


def _model_facts(engine: HybridEngine) -> dict[str, Any]:
    parameters = {p.data_ptr(): p.numel() for p in engine.model.parameters()}
    return {
        "type": engine.spec.model_type,
        "parameters": sum(parameters.values()),
        "dtype": str(engine.decoder.dtype).removeprefix("torch."),
    }


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _seconds(fn: Callable[[], Any]) -> float:
    start = time.perf_counter()
    fn()
    return time.perf_counter() - start

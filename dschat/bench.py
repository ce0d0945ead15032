"""Generation throughput, ours beside Hugging Face and other projects in one run, as a share of what the machine can do.

Random prompts of exact length, greedy, EOS ignored; tokens/s = batch x generated / total time, prefill included.
Runs of the sides alternate, so a machine that drifts drifts for all; figures are medians with their spread. Other
projects run in processes of their own (dschat/peers.py). The bound is that of dschat/bounds.py at the rates measured in
the same run.
"""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dschat_kernels.backends import backends, matmul_peak, read_bandwidth

from . import bounds
from . import device as devices
from .engine import HybridEngine, SamplingConfig
from .engine.verify import logprob_gap
from .peers import Here


class Side(Protocol):
    """Somebody who generates: peers.Peer, peers.Here."""

    name: str
    version: str

    def run(self, ids: list[list[int]], new: int) -> tuple[float, list[list[int]]]: ...


@dataclass
class Spread:
    """Median, smallest and largest of repeated measurements."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{self.median:.0f} [{self.low:.0f}-{self.high:.0f}]"


@dataclass
class PeerRow:
    """Another side's figures of a workload; `same_first`: share of the rows whose first token is ours."""

    rate: Spread
    prefill: float
    decode_ms: float
    same_first: float


@dataclass
class GenerateRow:
    """One workload. Times in seconds, decode in milliseconds a step, rates in tokens a second; the bound's too."""

    batch_size: int
    prompt_length: int
    new_tokens: int
    ours: Spread
    prefill: float
    decode_ms: float
    decode_gb_per_s: float
    bandwidth_share: float
    bound_rate: float = 0.0
    bound_decode_ms: float = 0.0
    bound_limit: str = ""
    hf: Spread | None = None
    hf_prefill: float | None = None
    hf_decode_ms: float | None = None
    hf_same_first: float | None = None
    peers: dict[str, PeerRow] = field(default_factory=dict)

    @property
    def speedup(self) -> float | None:
        return None if self.hf is None else self.ours.median / self.hf.median

    @property
    def bound_share(self) -> float:
        """Our rate as a share of what the machine allows."""
        return self.ours.median / self.bound_rate

    def add(self, name: str, side: PeerRow) -> None:
        """Hugging Face has fields of its own, everybody else is in `peers`."""
        if name == "hf":
            self.hf, self.hf_prefill, self.hf_decode_ms = side.rate, side.prefill, side.decode_ms
            self.hf_same_first = side.same_first
        else:
            self.peers[name] = side


@dataclass
class GenerateReport:
    """Everything a table needs to be read: machine, model, versions of the other sides, rows."""

    machine: dict[str, Any]
    model: dict[str, Any]
    rows: list[GenerateRow] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        rows = [
            {**asdict(r), "speedup": r.speedup, "bound_share": r.bound_share,
             "speedups": {name: r.ours.median / p.rate.median for name, p in r.peers.items()}}
            for r in self.rows
        ]  # fmt: skip
        return json.dumps(
            {"machine": self.machine, "model": self.model, "versions": self.versions, "rows": rows}, indent=2
        )

    def to_markdown(self) -> str:
        names = list(dict.fromkeys(name for r in self.rows for name in r.peers))
        head = ["batch, prompt + new", "dschat tok/s", "HF tok/s", "ratio"]
        head += [part for name in names for part in (f"{name} tok/s", "ratio")]
        head += [
            "prefill s (HF)",
            "decode ms/step (HF)",
            "bound tok/s",
            "share of bound",
            "GB/s",
            "share of peak",
        ]
        lines = ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
        for r in self.rows:
            cells = [f"{r.batch_size}, {r.prompt_length} + {r.new_tokens}", str(r.ours)]
            cells += [str(r.hf), f"{r.speedup:.1f}x"] if r.hf and r.speedup else ["-", "-"]
            for name in names:
                peer = r.peers.get(name)
                cells += [str(peer.rate), f"{r.ours.median / peer.rate.median:.1f}x"] if peer else ["-", "-"]
            cells.append(f"{r.prefill:.2f}" + (f" ({r.hf_prefill:.2f})" if r.hf_prefill is not None else ""))
            cells.append(
                f"{r.decode_ms:.1f}" + (f" ({r.hf_decode_ms:.1f})" if r.hf_decode_ms is not None else "")
            )
            cells += [f"{r.bound_rate:.0f}", f"{100 * r.bound_share:.0f} %"]
            cells += [f"{r.decode_gb_per_s:.1f}", f"{100 * r.bandwidth_share:.0f} %"]
            lines.append("| " + " | ".join(cells) + " |")
        return "\n".join(lines)

    def _where(self) -> str:
        return self.machine.get("gpu") or f"{self.machine['cpu']}, {self.machine['threads']} threads"

    def plot(self, path: str | Path) -> None:
        """Rates as bars, one group a workload, each beside what the machine allows."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        names = [
            "dschat",
            *dict.fromkeys(n for r in self.rows for n in ((["hf"] if r.hf else []) + [*r.peers])),
        ]
        rates = {
            name: [
                r.ours
                if name == "dschat"
                else r.hf
                if name == "hf"
                else p.rate
                if (p := r.peers.get(name))
                else None
                for r in self.rows
            ]
            for name in names
        }
        figure, axes = pyplot.subplots(figsize=(2.4 + 2.0 * len(self.rows), 4.0), layout="constrained")
        width = 0.8 / len(names)
        for i, (name, spreads) in enumerate(rates.items()):
            found = [(x, s) for x, s in enumerate(spreads) if s is not None]
            at = [x - 0.4 + (i + 0.5) * width for x, _ in found]
            medians = [s.median for _, s in found]
            errors = [[s.median - s.low for _, s in found], [s.high - s.median for _, s in found]]
            label = name if name == "dschat" else self.versions.get(name, name).split(",")[0]
            bars = axes.bar(at, medians, width * 0.92, yerr=errors, label=label, capsize=2)
            axes.bar_label(bars, [f"{m:.0f}" for m in medians], fontsize=7, padding=1)
        for x, r in enumerate(self.rows):
            axes.hlines(r.bound_rate, x - 0.4, x + 0.4, colors="black", linestyles="dashed", linewidth=1,
                        label="the machine allows" if x == 0 else None)  # fmt: skip
        labels = [f"batch {r.batch_size}\n{r.prompt_length} + {r.new_tokens} tokens" for r in self.rows]
        axes.set_xticks(range(len(self.rows)), labels)
        axes.set_ylabel("tokens/s")
        model, where = self.model, self._where()
        axes.set_title(
            f"{model['type']} {model['parameters'] / 1e6:.0f} M, {model['dtype']}, {where}", fontsize=9
        )
        figure.legend(loc="outside lower center", ncols=3, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, dpi=150)
        pyplot.close(figure)


def generate(
    model: nn.Module,
    workloads: Sequence[tuple[int, int, int]],
    *,
    repeats: int = 3,
    compare_hf: bool = True,
    peers: Sequence[Side] = (),
    backend: str | None = None,
    weights: str = "model",
    kv_cache: str = "auto",
    progress: Callable[[str], None] | None = None,
) -> GenerateReport:
    """Measures `workloads`, each (batch size, prompt length, new tokens), on a causal language model.

    Each side is warmed up once with the workload, then measured `repeats` times, the sides taking turns.
    compare_hf: Hugging Face runs in this process, unless a peer does it. peers: other sides with the same model.
    weights, kv_cache: as HybridEngine's rollout_weights and kv_cache; where one is quantised the facts also hold how
    far the log-probs of a sampled rollout of the first workload are from those of the training forward.
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
    sides = list(peers)
    if compare_hf and all(side.name != "hf" for side in sides):
        sides.insert(0, Here(model))
    engine = HybridEngine(
        model,
        max_slots=max(b for b, _, _ in workloads),
        backend=backend,
        rollout_weights=weights,
        kv_cache=kv_cache,
    )
    engine.flip()
    device = engine.device
    machine = bounds.Machine(read_bandwidth(device=device), matmul_peak(engine.decoder.dtype, device=device))
    report = GenerateReport(
        machine_facts(machine.read, device) | {"gflops": round(machine.flops / 1e9)}, model_facts(engine)
    )
    report.versions = {side.name: side.version for side in sides}
    for batch, prompt, new in workloads:
        if progress is not None:
            progress(f"batch {batch}, {prompt} + {new} tokens")
        report.rows.append(_measure(engine, sides, batch, prompt, new, repeats, machine))
    if weights != "model" or kv_cache != "auto":
        batch, prompt, new = workloads[0]
        rollout = engine.generate(
            _random_prompts(engine, batch, prompt), None, SamplingConfig(max_new_tokens=new)
        )
        with torch.no_grad():
            gap = logprob_gap(engine.logprobs(rollout), rollout)
        report.model["logprob_gap"] = {k: round(v, 5) for k, v in gap.items()}
    return report


def _random_prompts(engine: HybridEngine, batch: int, prompt: int) -> Tensor:
    return torch.randint(
        engine.spec.vocab_size, (batch, prompt), generator=torch.Generator().manual_seed(0), device="cpu"
    )


def _measure(
    engine: HybridEngine,
    sides: Sequence[Side],
    batch: int,
    prompt: int,
    new: int,
    repeats: int,
    machine: bounds.Machine,
) -> GenerateRow:
    ids = _random_prompts(engine, batch, prompt)
    sampling = SamplingConfig(max_new_tokens=new, temperature=0.0)
    rows = ids.tolist()
    first = engine.generate(ids, None, sampling).completion_ids[:, 0].tolist()
    agree = {}
    for side in sides:
        _, tokens = side.run(rows, min(new, 8))
        agree[side.name] = sum(t[0] == f for t, f in zip(tokens, first, strict=True)) / batch
    stats, whole, start = [], {s.name: [] for s in sides}, {s.name: [] for s in sides}  # type: ignore[var-annotated]
    for _ in range(repeats):
        stats.append(engine.generate(ids, None, sampling).stats)
        for side in sides:
            start[side.name].append(side.run(rows, 1)[0])
            whole[side.name].append(side.run(rows, new)[0])
    decode = statistics.median((s.decode + s.sample) / max(1, s.steps) for s in stats)
    tokens_out = batch * new
    step = bounds.decode_step(engine.decoder, [prompt + new / 2] * batch)
    row = GenerateRow(
        batch, prompt, new,
        ours=Spread.of([tokens_out / s.total for s in stats]),
        prefill=statistics.median(s.prefill for s in stats),
        decode_ms=1e3 * decode,
        decode_gb_per_s=step.bytes / decode / 1e9,
        bandwidth_share=step.bytes / decode / machine.read,
        bound_rate=tokens_out / bounds.generation_seconds(engine.decoder, machine, batch, prompt, new),
        bound_decode_ms=1e3 * step.seconds(machine),
        bound_limit=step.limit(machine),
    )  # fmt: skip
    for name, seconds in whole.items():
        before = statistics.median(start[name])
        step_ms = 1e3 * (statistics.median(seconds) - before) / max(1, new - 1)
        row.add(name, PeerRow(Spread.of([tokens_out / t for t in seconds]), before, step_ms, agree[name]))
    return row


def machine_facts(peak: float, device: torch.device = devices.CPU) -> dict[str, Any]:
    """The machine in words, with the rate at which the device's memory is read, in bytes a second."""
    gpu = {"gpu": devices.describe(device)} if device.type == "cuda" else {}
    return gpu | {
        "cpu": _cpu_name(),
        "isa": backends()["cpu"].isa,
        "threads": torch.get_num_threads(),
        "read_gb_per_s": round(peak / 1e9, 1),
        "torch": torch.__version__,
        "backends": {row.name: row.runs for row in backends()},
    }


def model_facts(engine: HybridEngine) -> dict[str, Any]:
    """What the engine's model is."""
    parameters = {p.data_ptr(): p.numel() for p in engine.model.parameters()}
    return {
        "type": engine.spec.model_type,
        "parameters": sum(parameters.values()),
        "dtype": str(engine.decoder.dtype).removeprefix("torch."),
        "weights": engine.decoder.weights,
        "kv_cache": engine.decoder.kv_cache,
    }


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()

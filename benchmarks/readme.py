"""Writes the measured tables into README.md and docs/benchmarks.md, between the markers that name them.

    python benchmarks/readme.py          benchmarks/results/*.json -> these pages
    python benchmarks/readme.py --check  exit 1 if a page does not show what the results say (CI)

`<!-- table: generate-bf16 -->` ... `<!-- end -->` shows benchmarks/results/generate-bf16.json, which
`dschat bench generate --output` wrote; results of benchmarks/*.py say by their "kind" what they are.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MARKED = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def spread(found: dict[str, float], digits: int = 0) -> str:
    """Median [smallest-largest]."""
    return f"{found['median']:.{digits}f} [{found['low']:.{digits}f}-{found['high']:.{digits}f}]"


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def machine_line(machine: dict[str, Any]) -> str:
    return f"{machine['cpu']}, {machine['threads']} threads, kernels for {machine['isa']}"


def generate_table(result: dict[str, Any]) -> str:
    """Throughput against HF and whoever else ran, and as a share of what the machine allows; one row a workload."""
    machine, model, rows = result["machine"], result["model"], result["rows"]
    others = list(dict.fromkeys(name for row in rows for name in row.get("peers", {})))
    bounded = all(row.get("bound_rate") for row in rows)
    head = ["batch, prompt + new", "dschat, tokens/s", "HF generate, tokens/s", "ratio"]
    head += [part for name in others for part in (f"{TITLES.get(name, name)}, tokens/s", "ratio")]
    head += ["decode, ms/step (HF)"] + (["the machine allows, tokens/s", "share"] if bounded else [])
    lines = []
    for row in rows:
        hf = row["hf"]
        cells = [f"{row['batch_size']}, {row['prompt_length']} + {row['new_tokens']}", spread(row["ours"])]
        cells += [spread(hf), f"**{row['speedup']:.1f}**"] if hf else ["-", "-"]
        for name in others:
            peer = row["peers"].get(name)
            cells += [spread(peer["rate"]), f"**{row['speedups'][name]:.1f}**"] if peer else ["-", "-"]
        cells.append(f"{row['decode_ms']:.1f}" + (f" ({row['hf_decode_ms']:.0f})" if hf else ""))
        if bounded:
            cells += [f"{row['bound_rate']:.0f}", f"{100 * row['bound_share']:.0f} %"]
        lines.append(cells)
    sides = f"the {('two', 'three', 'four', 'five')[len(others)]} sides in turn"
    rates = f"memory read at {machine['read_gb_per_s']} GB/s, "
    if bounded:
        rates += f"matrix products at {machine['gflops']} GFLOP/s, "
    versions = "".join(f", {version.split(',')[0]}" for version in result.get("versions", {}).values())
    return "\n".join(
        [
            *table(head, lines),
            "",
            f"{model['type']}, {model['parameters'] / 1e6:.1f} M parameters, {model['dtype']}; "
            f"{machine_line(machine)}, {rates}torch {machine['torch']}{versions}. "
            f"Median [smallest-largest] of the runs, {sides}.",
        ]
    )


TITLES = {"openvino": "OpenVINO GenAI", "vllm": "vLLM", "trl": "TRL"}


def ragged_table(result: dict[str, Any]) -> str:
    """Rows of different lengths, and samples that share their prompt."""
    work, rows, shared = result["workload"], result["ragged"], result["samples"]
    what = (
        f"{work['rows']} answers of {work['shortest']} to {work['longest']} tokens (log-normal) through "
        f"{work['slots']} slots, tokens/s"
    )
    many = (
        f"{work['sample_prompts']} prompts of {work['sample_prompt']} tokens, {work['n']} answers of "
        f"{work['sample_new']}, s"
    )
    apart = f"prompts not shared: {spread(shared['unshared'], 1)}"
    lines = [
        [what, spread(rows["ours"]), f"HF in its best batches: {spread(rows['hf'])}", f"**{rows['ratio']:.1f}**"],
        [many, spread(shared["shared"], 1), apart, f"**{shared['ratio']:.1f}**"],
    ]  # fmt: skip
    return "\n".join(
        [
            *table(["workload", "dschat", "against", "ratio"], lines),
            "",
            f"{result['model']['parameters'] / 1e6:.1f} M parameters, {result['model']['dtype']}; "
            f"{machine_line(result['machine'])}. HF's batches are sorted by the lengths of the answers, as nobody can "
            f"before generating; {rows['rows_compared_alone']} rows were generated alone too: the same tokens and "
            "log-probs, bit for bit.",
        ]
    )


def growth_table(result: dict[str, Any]) -> str:
    """Every point beside its bound."""
    names = {"batch": "batch {x}, prompt {prompt}", "context": "context {x}, batch {batch}"}
    lines = []
    for point in result["points"]:
        kind = point["section"].split(",")[0]
        what = names.get(kind, f"{point['parameters'] / 1e6:.0f} M parameters, batch {point['batch']}")
        lines.append(
            [what.format(**point), str(point["threads"]), f"{point['step_ms']:.1f}", f"{point['step_bound_ms']:.1f}",
             f"{point['step_times_bound']:.2f}", f"{point['prefill_s']:.2f} ({point['prefill_bound_s']:.2f})"]
        )  # fmt: skip
    head = ["", "threads", "decode, ms/step", "the machine allows", "times the bound", "prefill, s (bound)"]
    return "\n".join(
        [
            *table(head, lines),
            "",
            f"{result['dtype']}; {machine_line(result['machine'])}. Medians of {result['repeats']}.",
        ]
    )


def start_table(result: dict[str, Any]) -> str:
    """Import, first generate and flip."""
    full, lora = result["full"], result["lora"]
    lines = [
        ["import of dschat_kernels and all its names, after torch, s", spread(result["import"], 2)],
        ["first generate after loading, s", spread(result["dschat"], 2)],
        ["the same by Hugging Face, s", spread(result["hf"], 2)],
        [
            "flip after all weights changed",
            f"{full['seconds']:.2f} s, {full['reads']:.1f} reads of the weights",
        ],
        [
            "flip after LoRA adapters changed",
            f"{lora['seconds']:.2f} s, {lora['reads']:.1f} reads of the weights",
        ],
    ]
    text = f"{result['dtype']}; {machine_line(result['machine'])}. Fresh processes, medians of {result['repeats']}."
    return "\n".join([*table(["", ""], lines), "", text])


def token_logprobs_table(result: dict[str, Any]) -> str:
    """Speed and peak memory against log_softmax and gather."""
    lines = [
        [f"{row['vocabulary']:,}, {row['dtype']}, {row['mode']}", f"{row['seconds']['ours']:.2f}",
         f"{row['seconds']['torch']:.2f}", f"**{row['speedup']:.1f}**", f"{100 * row['peak_of_logits']['ours']:.1f} %",
         f"{100 * row['peak_of_logits']['torch']:.0f} %"]
        for row in result["rows"]
    ]  # fmt: skip
    head = ["vocabulary", "dschat, s", "PyTorch, s", "ratio", "peak memory, of the logits", "PyTorch's"]
    tokens = result["rows"][0]["tokens"]
    return "\n".join([*table(head, lines), "", f"{tokens} tokens; {machine_line(result['machine'])}."])


def trl_table(result: dict[str, Any]) -> str:
    """One GRPO iteration."""
    work, phases = result["workload"], result["phases"]
    parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in phases.items() if seconds >= 0.05)
    lines = [[f"GRPO iteration, {work['train']}, s", spread(result["dschat"], 1), spread(result["trl"], 1),
              f"**{result['ratio']:.2f}**"]]  # fmt: skip
    return "\n".join(
        [
            *table(["", "dschat", result["versions"]["trl"].split(",")[0], "ratio"], lines),
            "",
            f"{work['prompts']} prompts of {work['prompt']} tokens, {work['n']} answers of {work['new']}, minibatches "
            f"of {work['minibatch']}, {work['dtype']}; {machine_line(result['machine'])}. Seconds of ours: {parts}.",
        ]
    )


def ppo_table(result: dict[str, Any]) -> str:
    """Where a PPO iteration's time goes, ours and the plain one's."""
    machine, work, sides = result["machine"], result["workload"], result["sides"]

    def seconds(side: str, *phases: str) -> str:
        found = sum(sides[side][p]["median"] for p in phases if p in sides[side])
        return f"{found:.2f}" if found else "-"

    rows = {
        "generate: prefill": ("prefill",),
        "generate: decode and sampling": ("decode", "sample", "generate"),
        "flip (weights packed anew)": ("flip",),
        "score and values": ("score", "values"),
        "old log-probs": ("logprobs",),
        "reference log-probs": ("reference",),
        "update": ("update",),
        "**whole iteration**": ("total",),
    }
    lines = ["| phase | dschat, s | HF generate + PyTorch, s |", "| --- | --- | --- |"]
    lines += [
        f"| {name} | {seconds('dschat', *phases)} | {seconds('plain', *phases)} |"
        for name, phases in rows.items()
    ]
    what = "LoRA" if work["train"] == "lora" else "all weights trained"
    if work["exact"]:
        what += ", exact mode on our side (the rollout's log-probs are the old ones, bit for bit)"
    lines += [
        "",
        f"**{result['ratio']:.2f} times as fast.** {work['batch']} prompts of {work['prompt']} tokens, answers of "
        f"{work['new']}, minibatches of {work['minibatch']}, {work['dtype']}, {what}; {machine['cpu']}, "
        f"{machine['threads']} threads, kernels for {machine['isa']}. Medians of {work['repeats']} iterations, the "
        "sides in turn; Hugging Face's prefill is part of its generate.",
    ]
    return "\n".join(lines)


def evidence_table(results: Sequence[dict[str, Any]]) -> str:
    """Held-out scores before and after, a line a claim: means over its seeds, and every seed's change."""
    change = "change over the seeds, 95 %"
    head = ["claim", "before", "after", change, "each seed", "KL, nats", "tokens an answer"]
    lines = []
    for result in results:
        runs, over = [r["held_out"] for r in result["runs"]], result["over_seeds"]
        before, after, kl, short, long = (
            statistics.fmean(run[key] for run in runs)
            for key in ("before", "after", "kl", "length_before", "length_after")
        )
        lines.append(
            [result["name"], f"{before:.2f}", f"{after:.2f}",
             f"**{over['mean']:+.2f}** ({over['low']:+.2f} to {over['high']:+.2f})",
             ", ".join(f"{run['change']:+.2f}" for run in runs), f"{kl:.1f}", f"{short:.0f} -> {long:.0f}"]
        )  # fmt: skip
    prompts, answers = (
        "-".join(
            str(n) for n in sorted({r["runs"][0][part][key] for r in results if key in r["runs"][0][part]})
        )
        for part, key in (("held_out", "prompts"), ("config", "eval_samples"))
    )
    return "\n".join(
        [
            *table(head, lines),
            "",
            f"Mean rewards of {prompts} held-out prompts, {answers} answers each. Each seed is one observation of "
            "Student's interval; its own, a paired bootstrap over prompts, is in benchmarks/results."
            f"{_reward_model(results)}",
        ]
    )


def _reward_model(results: Sequence[dict[str, Any]]) -> str:
    judge = next((r["reward_model"] for r in results if r.get("reward_model")), None)
    if judge is None:
        return ""
    longer = max(judge["longer_wins"], 1 - judge["longer_wins"])
    return (
        f" The reward model's accuracy on {judge['pairs']} held-out pairs is {100 * judge['accuracy']:.0f} %; going by "
        f"length alone, and equal lengths right by half, gives {100 * longer:.0f} %."
    )


def render(name: str) -> str:
    folder = ROOT / "benchmarks" / "results"
    if name == "evidence":
        kept = (folder / f"evidence-{claim}.json" for claim in CLAIMS)
        return evidence_table([json.loads(path.read_text()) for path in kept if path.exists()]) + "\n"
    result = json.loads((folder / f"{name}.json").read_text())
    kind = result.get("kind", "ppo" if "sides" in result else "generate")
    return TABLES[kind](result) + "\n"


CLAIMS = ("ppo", "grpo", "rloo", "dpo", "format", "svamp")
TABLES = {
    "generate": generate_table,
    "growth": growth_table,
    "ppo": ppo_table,
    "ragged": ragged_table,
    "start": start_table,
    "token_logprobs": token_logprobs_table,
    "trl": trl_table,
}


PAGES = ("README.md", "docs/benchmarks.md")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit 1 if a page is out of date"
    )
    check = parser.parse_args().check
    stale = 0
    for name in PAGES:
        page = ROOT / name
        old = page.read_text()
        new = MARKED.sub(lambda m: m[1] + render(m["name"]) + m[3], old)
        if not check:
            page.write_text(new)
        elif new != old:
            print(
                f"{name} does not show benchmarks/results: run python benchmarks/readme.py", file=sys.stderr
            )
            stale = 1
    return stale


if __name__ == "__main__":
    sys.exit(main())

"""Writes the measured tables into README.md, between the markers that name them.

    python benchmarks/readme.py          benchmarks/results/*.json -> README.md
    python benchmarks/readme.py --check  exit 1 if README.md does not show what the results say (CI)

`<!-- table: generate-bf16 -->` ... `<!-- end -->` shows benchmarks/results/generate-bf16.json, which
`dschat bench generate --output` wrote; `ppo` shows what benchmarks/ppo_split.py wrote.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MARKED = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def generate_table(result: dict[str, Any]) -> str:
    """Throughput against HF, one row a workload."""
    machine, model = result["machine"], result["model"]
    lines = [
        "| batch, prompt + new | dschat, tokens/s | HF generate, tokens/s | ratio | decode, ms/step (HF) |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in result["rows"]:
        ours, hf = row["ours"], row["hf"]
        theirs = f"{hf['median']:.0f} [{hf['low']:.0f}-{hf['high']:.0f}]" if hf else "-"
        ratio = f"**{row['speedup']:.1f}**" if hf else "-"
        step = f"{row['decode_ms']:.1f}" + (f" ({row['hf_decode_ms']:.0f})" if hf else "")
        lines.append(
            f"| {row['batch_size']}, {row['prompt_length']} + {row['new_tokens']} | {ours['median']:.0f} "
            f"[{ours['low']:.0f}-{ours['high']:.0f}] | {theirs} | {ratio} | {step} |"
        )
    lines.append("")
    lines.append(
        f"{model['type']}, {model['parameters'] / 1e6:.1f} M parameters, {model['dtype']}; {machine['cpu']}, "
        f"{machine['threads']} threads, kernels for {machine['isa']}, memory read at {machine['read_gb_per_s']} GB/s, "
        f"torch {machine['torch']}. Median [smallest-largest] of the runs, the two sides in turn."
    )
    return "\n".join(lines)


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
    lines += [
        "",
        f"**{result['ratio']:.2f} times as fast.** {work['batch']} prompts of {work['prompt']} tokens, answers of "
        f"{work['new']}, minibatches of {work['minibatch']}, {work['dtype']}, {what}; {machine['cpu']}, "
        f"{machine['threads']} threads, kernels for {machine['isa']}. Medians of {work['repeats']} iterations, the "
        "sides in turn; Hugging Face's prefill is part of its generate.",
    ]
    return "\n".join(lines)


def render(name: str) -> str:
    path = ROOT / "benchmarks" / "results" / f"{name}.json"
    result = json.loads(path.read_text())
    return (ppo_table if "sides" in result else generate_table)(result) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit 1 if README.md is out of date"
    )
    check = parser.parse_args().check
    readme = ROOT / "README.md"
    old = readme.read_text()
    new = MARKED.sub(lambda m: m[1] + render(m["name"]) + m[3], old)
    if check:
        if new != old:
            print(
                "README.md does not show benchmarks/results: run python benchmarks/readme.py", file=sys.stderr
            )
        return int(new != old)
    readme.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())

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
    """Where a PPO iteration's time goes."""
    lines = ["| phase | seconds an iteration | share |", "| --- | --- | --- |"]
    total = sum(result["phases"].values())
    for name, seconds in result["phases"].items():
        lines.append(f"| {name} | {seconds:.2f} | {100 * seconds / total:.0f} % |")
    lines += ["", result["caption"]]
    return "\n".join(lines)


def render(name: str) -> str:
    path = ROOT / "benchmarks" / "results" / f"{name}.json"
    result = json.loads(path.read_text())
    return (ppo_table if "phases" in result else generate_table)(result) + "\n"


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

"""What it costs to begin: the import, the first generate, a flip.

    python benchmarks/start.py --output benchmarks/results/start.json
    python benchmarks/start.py --why        the slowest imports, by python -X importtime

Each number is of fresh processes, one after the other, the sides in turn; kernels are compiled before, as for everyone
who used them once.

*import*: seconds of `import dschat_kernels` and of every public name in it, after `import torch`.
*first generate*: from the loaded model to the first answer, ours (imports, engine, packing, generation) less Hugging
Face's (generation), and whole processes too.
*flip*: from changed weights to packs, in reads of the weights at the rate measured in the same process.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from dschat.bench import Spread, machine_facts
from dschat.rlhf import models
from dschat_kernels.backends import read_bandwidth

ROOT = Path(__file__).resolve().parent.parent

IMPORT = """
import json, sys, time
import torch
if with_transformers: import transformers, transformers.modeling_utils
start = time.perf_counter()
import dschat_kernels
for name in dschat_kernels.__all__:
    getattr(dschat_kernels, name)
print(json.dumps({"import": time.perf_counter() - start}))
"""

FIRST = """
import json, sys, time
start = time.perf_counter()
import torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
ids = torch.randint(model.config.vocab_size, (1, 16), generator=torch.Generator().manual_seed(0))
loaded = time.perf_counter()
if side == "dschat":
    from dschat import HybridEngine, SamplingConfig
    HybridEngine(model).generate(ids, None, SamplingConfig(max_new_tokens=8, temperature=0.0))
else:
    with torch.no_grad():
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, min_new_tokens=8, do_sample=False,
                       pad_token_id=0, eos_token_id=None)
end = time.perf_counter()
print(json.dumps({"first": end - loaded, "process": end - start}))
"""

FLIP = """
import json, time
import torch
from dschat import HybridEngine
from dschat.rlhf import models
from dschat_kernels.backends import read_bandwidth
model = models.load_policy(folder, getattr(torch, dtype))
if lora:
    import peft
    model = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules="all-linear", lora_alpha=16))
engine = HybridEngine(model)
engine.flip()
weights = engine.memory()["weights"]
changing = [p for n, p in model.named_parameters() if not lora or "lora_" in n]
times, idle = [], []
for i in range(repeats):
    with torch.no_grad():
        for p in changing:
            p.add_(0.001)
    stats = engine.flip()
    assert stats.changed, "the flip saw no change"
    times.append(stats.seconds)
    idle.append(engine.flip().seconds)
rate = read_bandwidth()
times.sort()
idle.sort()
print(json.dumps({"seconds": times[len(times) // 2], "idle": idle[len(idle) // 2], "bytes": weights, "read": rate,
                  "reads": times[len(times) // 2] * rate / weights, "packed": stats.bytes_packed,
                  "hashed": stats.bytes_hashed}))
"""


def fresh(code: str, *options: str, **values: Any) -> dict[str, Any]:
    """The JSON line that a fresh process prints."""
    text = "".join(f"{name} = {value!r}\n" for name, value in values.items()) + code
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *options, "-c", text], capture_output=True, text=True, env=env, timeout=600
    )
    if done.returncode:
        raise SystemExit(done.stderr.strip() or f"a process ended with {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found | {"stderr": done.stderr}


def slowest_imports(count: int = 15) -> list[str]:
    """Modules by cumulative time, of those that torch did not load already."""
    lines = fresh(IMPORT, "-X", "importtime", with_transformers=False)["stderr"].splitlines()
    rows = [
        line.removeprefix("import time:").split("|") for line in lines if line.startswith("import time:")
    ][1:]
    begun = [i for i, row in enumerate(rows) if row[2].strip() == "torch"]
    after = rows[begun[0] + 1 :] if begun else rows
    after.sort(key=lambda row: -int(row[1]))
    return [f"{int(row[1]) / 1e6:6.2f} s  {row[2].rstrip()[1:]}" for row in after[:count]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--why", action="store_true", help="print the slowest imports, and nothing else")
    parser.add_argument("--output", type=Path, help="write the result as JSON to this file")
    args = parser.parse_args()
    if args.why:
        print("\n".join(slowest_imports()))
        return
    dtype = str(models.pick_dtype(args.dtype)).removeprefix("torch.")
    folder = models.resolve(args.model)
    result = measure(folder, dtype, args.repeats)
    after, both = (result[key]["median"] for key in ("import", "import_after_transformers"))
    print(f"import: {after:.2f} s after torch, {both:.2f} s after torch and transformers")
    print(f"first generate: {result['first_more']:+.2f} s against Hugging Face's ({result['dschat']['median']:.2f} and "
          f"{result['hf']['median']:.2f} s)")  # fmt: skip
    for name in ("full", "lora"):
        print(
            f"flip, {name}: {result[name]['seconds']:.3f} s, {result[name]['reads']:.1f} reads of the weights"
        )
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n")


def measure(folder: str, dtype: str, repeats: int) -> dict[str, Any]:
    """Everything, by name."""
    fresh(FIRST, folder=folder, dtype=dtype, side="dschat")  # compiles the kernels if nobody did
    imports: dict[bool, list[float]] = {False: [], True: []}
    runs: dict[str, list[dict[str, Any]]] = {"dschat": [], "hf": []}
    for _ in range(repeats):
        for after, found in imports.items():
            found.append(fresh(IMPORT, with_transformers=after)["import"])
        for side, done in runs.items():
            done.append(fresh(FIRST, folder=folder, dtype=dtype, side=side))
    result: dict[str, Any] = {
        "kind": "start",
        "machine": machine_facts(read_bandwidth()),
        "dtype": dtype,
        "repeats": repeats,
        "import": vars(Spread.of(imports[False])),
        "import_after_transformers": vars(Spread.of(imports[True])),
    }
    for side, done in runs.items():
        result[side] = vars(Spread.of([d["first"] for d in done]))
        result[f"{side}_process"] = vars(Spread.of([d["process"] for d in done]))
    result["first_more"] = result["dschat"]["median"] - result["hf"]["median"]
    result["process_more"] = statistics.median(d["process"] for d in runs["dschat"]) - statistics.median(
        d["process"] for d in runs["hf"]
    )
    for name, lora in (("full", False), ("lora", True)):
        result[name] = fresh(FLIP, folder=folder, dtype=dtype, lora=lora, repeats=max(3, repeats))
        del result[name]["stderr"]
    return result


if __name__ == "__main__":
    main()

"""How the time of a token grows: with the batch, the context, the size of the model and the threads, beside its bound.

    python benchmarks/growth.py --output benchmarks/results/growth.json --plot docs/growth.png

One decode step (its sampling included) and the prefill before it, each as a multiple of what the machine allows at the
rates measured with the same number of threads (dschat/bounds.py). Weights are random where only their number matters:
`--sizes` are Llamas of the shapes of SmolLM2 with bfloat16 or float32 weights, up to 1.7 B parameters (about 7 GB with
their packs in bfloat16).
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from dschat import HybridEngine, SamplingConfig, bounds
from dschat.bench import machine_facts, model_facts
from dschat.rlhf import models
from dschat_kernels.backends import matmul_peak, read_bandwidth
from dschat_kernels.limits import use_threads

SHAPES = {  # hidden, layers, heads, kv heads, mlp, vocabulary
    "1m": (64, 4, 4, 2, 192, 512),
    "135m": (576, 30, 9, 3, 1536, 49152),
    "360m": (960, 32, 15, 5, 2560, 49152),
    "1.7b": (2048, 24, 32, 32, 8192, 49152),
}


def random_llama(size: str, dtype: torch.dtype) -> Any:
    """A Llama of a shape, with weights of the usual size that nobody trained."""
    import transformers

    hidden, layers, heads, kv_heads, mlp, vocabulary = SHAPES[size]
    config = transformers.LlamaConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
        intermediate_size=mlp, vocab_size=vocabulary, max_position_embeddings=8192, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    model = model.to(dtype).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.fill_(1.0)
        else:
            parameter.data.uniform_(-0.03, 0.03, generator=generator)
    rotary = model.model.rotary_emb  # buffers that to_empty left without values
    model.model.rotary_emb = type(rotary)(config=config)
    model.tie_weights()
    return model.eval()


def measure(
    engine: HybridEngine, machine: bounds.Machine, batch: int, prompt: int, new: int, repeats: int
) -> dict[str, Any]:
    """Decode step and prefill of a workload, and their bounds."""
    ids = torch.randint(engine.spec.vocab_size, (batch, prompt), generator=torch.Generator().manual_seed(0))
    engine.max_slots = batch
    sampling = SamplingConfig(max_new_tokens=new, temperature=0.0)
    engine.generate(ids[:, : min(prompt, 16)], None, SamplingConfig(max_new_tokens=2, temperature=0.0))
    stats = [engine.generate(ids, None, sampling).stats for _ in range(repeats)]
    step = statistics.median((s.decode + s.sample) / s.steps for s in stats)
    prefill = statistics.median(s.prefill for s in stats)
    step_work = bounds.decode_step(engine.decoder, [prompt + (new + 1) / 2] * batch)
    prefill_work = bounds.prefill(engine.decoder, [prompt] * batch)
    return {
        "batch": batch,
        "prompt": prompt,
        "new": new,
        "step_ms": 1e3 * step,
        "step_bound_ms": 1e3 * step_work.seconds(machine),
        "step_limit": step_work.limit(machine),
        "step_times_bound": step / step_work.seconds(machine),
        "token_ms": 1e3 * step / batch,
        "prefill_s": prefill,
        "prefill_bound_s": prefill_work.seconds(machine),
        "prefill_times_bound": prefill / prefill_work.seconds(machine),
    }


def points(args: argparse.Namespace, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """Every measured point; `section` says what varies, `x` is its value."""
    machines: dict[int, bounds.Machine] = {}
    for threads in args.threads:
        torch.set_num_threads(threads)
        machines[threads] = bounds.Machine(read_bandwidth(), matmul_peak(dtype))
    most = max(args.threads)
    torch.set_num_threads(most)
    engine = HybridEngine(models.load_policy(args.model, dtype))
    parameters = model_facts(engine)["parameters"]

    def point(section: str, x: float, threads: int, *work: int) -> dict[str, Any]:
        found = measure(engine, machines[threads], *work, args.repeats)
        print(f"{section} {x:g}, {threads} threads: step {found['step_ms']:.2f} ms, "
              f"{found['step_times_bound']:.2f} times its bound; prefill {found['prefill_s']:.2f} s, "
              f"{found['prefill_times_bound']:.2f} times its bound", flush=True)  # fmt: skip
        rates = {"read_gb_per_s": machines[threads].read / 1e9, "gflops": machines[threads].flops / 1e9}
        return {"section": section, "x": x, "threads": threads, "parameters": parameters} | rates | found

    for batch in args.batches:
        yield point("batch", batch, most, batch, args.prompt, args.new)
    for context in args.contexts:
        yield point(
            "context", context, most, args.context_batch, context - args.context_new, args.context_new
        )
    for threads in args.threads:
        torch.set_num_threads(threads)
        for batch in args.size_batches:
            yield point(f"threads, batch {batch}", threads, threads, batch, args.prompt, args.new)
    torch.set_num_threads(most)
    for size in args.sizes:
        del engine  # one model at a time
        gc.collect()
        engine = HybridEngine(random_llama(size, dtype))
        parameters = model_facts(engine)["parameters"]
        for batch in args.size_batches:
            yield point(f"parameters, batch {batch}", parameters, most, batch, args.prompt, args.new)


def plot(result: dict[str, Any], path: Path) -> None:
    """Step times and their bounds, a panel for each thing that varies."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    titles = {
        "batch": "rows at a time",
        "context": "tokens of context",
        "parameters": "parameters",
        "threads": "threads",
    }
    figure, panels = pyplot.subplots(1, len(titles), figsize=(12, 3.2), layout="constrained")
    for axes, (key, title) in zip(panels, titles.items(), strict=True):
        sections = dict.fromkeys(p["section"] for p in result["points"] if p["section"].split(",")[0] == key)
        for i, section in enumerate(sections):
            found = [p for p in result["points"] if p["section"] == section]
            x = [p["x"] for p in found]
            label = section.partition(", ")[2] or "dschat"
            axes.plot(x, [p["step_ms"] for p in found], "o-", color=f"C{i}", label=label, markersize=3)
            axes.plot(x, [p["step_bound_ms"] for p in found], "--", color=f"C{i}", linewidth=1,
                      label="the machine allows" if i == 0 else None)  # fmt: skip
        axes.set(yscale="log", xlabel=title)
        axes.set_xscale("log", base=2)
        ticks = sorted({p["x"] for p in result["points"] if p["section"].split(",")[0] == key})
        axes.set_xticks(ticks, [f"{x / 1e6:.0f} M" if x >= 1e5 else f"{x}" for x in ticks], fontsize=7)
        axes.minorticks_off()
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        if sections:
            axes.legend(fontsize=7, loc="best", frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("decode step, ms")
    figure.suptitle(f"{result['machine']['cpu']}, {result['dtype']}", fontsize=9)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--batches", type=numbers, default=[1, 2, 4, 8, 16, 32, 64, 128])
    parser.add_argument("--contexts", type=numbers, default=[128, 512, 1024, 2048, 4096, 8192])
    parser.add_argument("--context_batch", type=int, default=4, help="rows while the context grows")
    parser.add_argument(
        "--context_new", type=int, default=16, help="tokens decoded at the end of each context"
    )
    parser.add_argument(
        "--sizes", default="135m,360m,1.7b", help=f"random Llamas: some of {', '.join(SHAPES)}"
    )
    parser.add_argument(
        "--size_batches", type=numbers, default=[1, 16], help="rows for --sizes and --threads"
    )
    parser.add_argument("--threads", type=numbers, default=None, help="default: 1 to what may be used")
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="write the result as JSON to this file")
    parser.add_argument("--plot", type=Path, help="draw it into this picture")
    args = parser.parse_args()
    args.sizes = [size for size in args.sizes.split(",") if size]
    for size in args.sizes:
        if size not in SHAPES:
            parser.error(f"--sizes has {size!r}: give some of {', '.join(SHAPES)}")
    args.threads = args.threads or list(range(1, use_threads() + 1))
    dtype = models.pick_dtype(args.dtype)
    found = list(points(args, dtype))
    result = {
        "kind": "growth",
        "machine": machine_facts(read_bandwidth()),
        "dtype": str(dtype).removeprefix("torch."),
        "repeats": args.repeats,
        "worst": max(p["step_times_bound"] for p in found),
        "points": found,
    }
    print(f"at most {result['worst']:.2f} times the bound of a step")
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n")
    if args.plot:
        plot(result, args.plot)


if __name__ == "__main__":
    main()

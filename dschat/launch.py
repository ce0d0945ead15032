"""`dschat launch`: a command in several processes of this machine, or of several machines through DeepSpeed's launcher.

    dschat launch --num_processes 2 ppo --config ppo.yaml --zero_stage 3
    dschat launch --hostfile hosts ppo --config ppo.yaml --zero_stage 3

Local processes find each other through the environment (dschat/parallel.py). When one ends badly, the others are
given a moment to say so themselves, then stopped; none is left behind, even when the launcher is killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import IO

from . import config as configs
from .cli import EXIT_INTERRUPTED
from .config import ConfigError

USAGE = """dschat launch: a command in several processes

usage: dschat launch [--num_processes N] [--master_port P] COMMAND [--key value ...]
       dschat launch --hostfile FILE COMMAND [--key value ...]

  --num_processes  processes on this machine [GPUs of this machine, else 2]
  --master_port    port where they meet on the loopback interface [a free one]
  --hostfile       DeepSpeed's hostfile: hand over to its launcher, which starts every machine's processes"""
GRACE = 15.0
"""Seconds that processes get to end by themselves after another ended, and after being asked to."""


def main(words: Sequence[str]) -> int:
    """Runs the command; returns the exit code of the first process that ended badly, else 0."""
    if not words or words[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    flags, command = _split(words)
    if (hostfile := flags.get("hostfile")) is not None:
        return _hand_over(hostfile, command, flags)
    processes = _number(flags, "num_processes", _default_processes())
    port = _number(flags, "master_port", 0) or _free_port()
    return _Group(command, processes, port).run()


def _split(words: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """(own flags, command): the command begins at the first word that is one."""
    flags: dict[str, str] = {}
    rest = list(words)
    while rest and rest[0].startswith("--"):
        key, eq, value = rest.pop(0)[2:].partition("=")
        if key not in ("num_processes", "master_port", "hostfile"):
            raise ConfigError(
                f"--{key} is no flag of dschat launch; put flags of the command behind the command"
            )
        if not eq:
            if not rest:
                raise ConfigError(f"--{key} needs a value")
            value = rest.pop(0)
        flags[key] = value
    if (
        rest
        and rest[0] in configs.COMMANDS
        and not issubclass(configs.COMMANDS[rest[0]], configs.StageConfig)
    ):
        stages = ", ".join(c for c, kind in configs.COMMANDS.items() if issubclass(kind, configs.StageConfig))
        raise ConfigError(
            f"dschat {rest[0]} runs in one process; start it without launch, which is for {stages}"
        )
    if not rest or rest[0] not in configs.COMMANDS:
        said = f"{rest[0]!r} is no command" if rest else "there is no command to launch"
        raise ConfigError(f"{said}; write dschat launch --num_processes 2 ppo --config FILE")
    return flags, rest


def _number(flags: dict[str, str], key: str, default: int) -> int:
    text = flags.get(key, str(default))
    if not text.isdigit() or (key == "num_processes" and int(text) < 1):
        raise ConfigError(f"{key} is {text!r}, but it must be a whole number of 1 or more")
    return int(text)


def _default_processes() -> int:
    import torch

    return torch.cuda.device_count() or 2


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _hand_over(hostfile: str, command: list[str], flags: dict[str, str]) -> int:
    if not os.path.isfile(hostfile):
        raise ConfigError(
            f"hostfile {hostfile} does not exist; give a file with lines such as: worker-1 slots=8"
        )
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError("a hostfile needs DeepSpeed's launcher; run: pip install 'dschat[deepspeed]'")
    port = ["--master_port", flags["master_port"]] if "master_port" in flags else []
    return subprocess.call(hand_over_words(hostfile, command, port))


def hand_over_words(hostfile: str, command: Sequence[str], more: Sequence[str] = ()) -> list[str]:
    """The command line of DeepSpeed's launcher."""
    runner = [sys.executable, "-m", "deepspeed.launcher.runner"]
    return [*runner, "--hostfile", hostfile, *more, "--no_local_rank", "--module", "dschat", *command]


class _Group:
    """The processes of one run on this machine."""

    def __init__(self, command: list[str], processes: int, port: int):
        self.command, self.processes, self.port = command, processes, port
        self.running: dict[int, subprocess.Popen[bytes]] = {}
        self.errors: dict[int, IO[bytes]] = {}
        self.interrupted = False

    def run(self) -> int:
        previous = {s: signal.signal(s, self._asked) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            for rank in range(self.processes):
                self._start(rank)
            return self._watch()
        finally:
            self._stop()
            for number, handler in previous.items():
                signal.signal(number, handler)
            for file in self.errors.values():
                file.close()

    def _start(self, rank: int) -> None:
        threads = str(max(1, (os.cpu_count() or 1) // self.processes))
        environment = {"OMP_NUM_THREADS": threads, **os.environ}
        environment |= {
            "WORLD_SIZE": str(self.processes), "RANK": str(rank), "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(self.processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.port),
        }  # fmt: skip
        out = err = None
        if rank:  # all say the same; the lead says it
            out, err = subprocess.DEVNULL, tempfile.TemporaryFile()
            self.errors[rank] = err
        self.running[rank] = subprocess.Popen(
            [sys.executable, "-m", "dschat", *self.command], env=environment, stdout=out, stderr=err,
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        )  # fmt: skip

    def _asked(self, number: int, frame: object) -> None:
        """Ctrl-C reaches the processes by itself, from the terminal; what else ends the launcher is passed on."""
        self.interrupted |= number == signal.SIGINT
        for process in self.running.values():
            if number != signal.SIGINT or not sys.stdin.isatty():
                with contextlib.suppress(ProcessLookupError):
                    process.send_signal(number)

    def _watch(self) -> int:
        ended: dict[int, int] = {}
        deadline = float("inf")
        first: int | None = None
        while len(ended) < self.processes and time.monotonic() < deadline:
            for rank, process in self.running.items():
                if rank not in ended and (code := process.poll()) is not None:
                    ended[rank] = code
                    if code and first is None:
                        first, deadline = rank, time.monotonic() + GRACE
            time.sleep(0.05)
        if first is None:
            return 0
        if self.interrupted and ended.get(0) == EXIT_INTERRUPTED:
            return EXIT_INTERRUPTED  # the lead has said it
        code = ended[first]
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        if first:
            self.errors[first].seek(0)
            sys.stderr.write(self.errors[first].read().decode(errors="replace")[-4000:])
        if self.processes > 1:
            print(
                f"dschat: process {first} of {self.processes} {how}; the others are stopped", file=sys.stderr
            )
        return 128 - code if code < 0 else code

    def _stop(self) -> None:
        alive = [p for p in self.running.values() if p.poll() is None]
        for process in alive:
            process.terminate()
        deadline = time.monotonic() + GRACE
        for process in alive:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _end_with_parent() -> None:
    """In the child: SIGTERM when the launcher dies, however it dies (Linux: PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)

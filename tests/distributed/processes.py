"""Starts the worker in several gloo processes, with a time limit, and leaves none behind."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIMIT = 900  # seconds; many times what a run takes
NIGHTLY = 3600


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)])
    return {
        **os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1", "DSCHAT_TIMEOUT": "120", "DS_BUILD_OPS": "0", **more,
    }  # fmt: skip


def spawn(scenario: str, folder: Path, world: int = 2, limit: int = LIMIT, **more: str) -> None:
    """Runs `worker.py scenario folder` in `world` processes; raises with their output if one fails or takes long.
    more: environment."""
    port = str(free_port())
    running = []
    try:
        for rank in range(world):
            log = open(folder / f"{scenario}-{world}.{rank}.log", "w+")
            where = more | {
                "LIMIT": str(limit),
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world),
            }
            running.append(
                (subprocess.Popen(
                    [sys.executable, str(Path(__file__).with_name("worker.py")), scenario, str(folder)],
                    env=environment(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, **where), stdout=log, stderr=log,
                    cwd=ROOT,
                ), log)
            )  # fmt: skip
        for process, _ in running:
            process.wait(limit)
    finally:
        for process, _ in running:
            process.kill()
            process.wait()
    texts = []
    for process, log in running:
        log.seek(0)
        texts.append(f"exit {process.returncode}\n{log.read()[-3000:]}")
        log.close()
    if any(process.returncode for process, _ in running):
        raise AssertionError("\n\n".join(texts))

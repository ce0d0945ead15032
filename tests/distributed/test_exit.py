"""A process that has done its work ends with 0, whatever gloo's threads still hold when it ends."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from processes import environment, free_port

from dschat import parallel

NAMED = Path("/proc/self/task")
ENDING = """
import builtins, os, sys
from pathlib import Path
import torch
import torch.distributed as dist
from dschat import parallel

parallel.start(torch.device("cpu"))
builtins.kept = dist.group.WORLD  # as DeepSpeed keeps it
dist.barrier()
core = {sorted(os.sched_getaffinity(0))[0]}
for task in Path("/proc/self/task").iterdir():
    if (task / "comm").read_text().startswith("pt_gloo"):  # runs only when nobody else wants the core
        os.sched_setscheduler(int(task.name), os.SCHED_IDLE, os.sched_param(0))
    os.sched_setaffinity(int(task.name), core)
tensors = [torch.ones(4) for _ in range(6)]
works = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]
for work in works:
    work.wait()
del tensors, works, work
"""


@pytest.mark.skipif(not NAMED.exists(), reason="the system does not list threads")
def test_settling_waits_for_a_thread_of_gloo_that_runs():
    started, ended = threading.Event(), threading.Event()

    def run() -> None:
        (NAMED / str(threading.get_native_id()) / "comm").write_text("pt_gloo_runloop")
        started.set()
        until = time.monotonic() + 0.4
        while time.monotonic() < until:
            pass
        ended.set()

    thread = threading.Thread(target=run)
    thread.start()
    started.wait()
    parallel.settle()
    assert ended.is_set()
    thread.join()


@pytest.mark.skipif(not hasattr(os, "sched_setscheduler"), reason="threads cannot be held back")
def test_processes_end_well_while_gloos_threads_are_held_back():
    """Without `settle` one process in ten or so ends by SIGABRT here: eight are started, to meet it."""
    running = []
    for _ in range(4):
        port = str(free_port())
        running += [
            subprocess.Popen(
                [sys.executable, "-c", ENDING], stderr=subprocess.PIPE, text=True,
                env=environment(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=str(rank), WORLD_SIZE="2"),
            )
            for rank in range(2)
        ]  # fmt: skip
    said = [process.communicate(timeout=300)[1] for process in running]
    assert [process.returncode for process in running] == [0] * 8, said

"""Several processes that do the work of one: who does which rows, and how results come together.

Every process runs the same program on the same data and takes the same decisions; only the work on rows is
divided, and every result is put together again on every process. So a run on N processes computes what the run
on one does, up to the rounding of sums, and everything that is counted, whitened or normalised over a batch is
so over the whole one. Only the lead (rank 0) writes files and calls reward functions.

A process group comes from the environment that torchrun, `deepspeed` and `dschat launch` set (WORLD_SIZE, RANK,
LOCAL_RANK, MASTER_ADDR, MASTER_PORT). With one process every function here is the identity.
"""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
TIMEOUT = "DSCHAT_TIMEOUT"
"""Environment variable: seconds that a process waits for the others (default 1800)."""


def is_parted(error: RuntimeError) -> bool:
    """Whether a collective failed because another process has ended or is not heard of any more."""
    text = str(error).lower()
    signs = ("closed by peer", "connection", "timed out", "timeout", "broken pipe", "nccl", "gloo")
    return world() > 1 and any(sign in text for sign in signs)


def start(device: torch.device, alone: bool = False) -> None:
    """Joins the process group that the environment describes; nothing where it describes none, or one joined
    already. device: what this process computes on, which decides how tensors travel. alone: a group of one process
    then, for libraries that need a group. Raises ValueError for an incomplete description."""
    world = os.environ.get("WORLD_SIZE", "1")
    backend = "nccl" if device.type == "cuda" else "gloo"
    if dist.is_initialized():
        return
    if world == "1":
        if alone:
            os.environ.setdefault("LOCAL_RANK", "0")
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
            atexit.register(stop)
        return
    missing = [k for k in ("RANK", "MASTER_ADDR", "MASTER_PORT") if k not in os.environ]
    if missing:
        raise ValueError(
            f"WORLD_SIZE is {world}, but {' and '.join(missing)} is not set: start the run with dschat launch, "
            "torchrun or deepspeed"
        )
    dist.init_process_group(backend, timeout=_timeout())
    atexit.register(stop)


def _timeout() -> timedelta:
    return timedelta(seconds=float(os.environ.get(TIMEOUT, "1800")))


def stop() -> None:
    """Leaves the process group, if one was joined."""
    _groups.clear()
    if dist.is_initialized():
        dist.destroy_process_group()
        settle()


def settle(seconds: float = 10.0) -> None:
    """Waits until gloo's threads sleep, at most so long; returns at once where the system does not say.

    A collective is over before its thread lets go of the tensors. A thread that does so while the interpreter ends
    asks for its lock, which Python answers by ending the thread, and C++ by SIGABRT for the whole process: a run that
    had finished would look like one that failed. DeepSpeed's references to the group keep its threads alive till then.
    """
    end = time.monotonic() + seconds
    before: list[tuple[str, ...]] | None = None
    while time.monotonic() < end:
        now = _gloo_threads()
        if now == before and all(state == "S" for state, *_ in now):
            return
        before = now
        time.sleep(1e-3)  # without the interpreter's lock, so that whoever wants it has it


def _gloo_threads() -> list[tuple[str, ...]]:
    """(state, thread, how often it was switched) of each thread of gloo: one that has not run since has the same."""
    found = []
    for task in Path("/proc/self/task").glob("*"):
        try:
            lines = (task / "status").read_text().splitlines()
        except OSError:  # it has ended
            continue
        status = dict(line.split(":", 1) for line in lines if ":" in line)
        if status["Name"].strip().startswith("pt_gloo"):
            switches = [
                status[key].strip() for key in ("voluntary_ctxt_switches", "nonvoluntary_ctxt_switches")
            ]
            found.append((status["State"].split()[0], task.name, *switches))
    return sorted(found)


def world() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if world() > 1 else 0


def lead() -> bool:
    """Whether this process is the one that writes."""
    return rank() == 0


_groups: dict[int, Any] = {}


def group(size: int) -> Any:
    """The process group of this process and its neighbours, `size` from the first process on. All processes call."""
    if size not in _groups:
        for begin in range(0, world(), size):
            ranks = list(range(begin, begin + size))
            made = dist.new_group(ranks, timeout=_timeout())
            if rank() in ranks:
                _groups[size] = made
    return _groups[size]


def store() -> Any:
    """The key-value store through which the processes found each other."""
    return dist.distributed_c10d._get_default_store()


# -------------------------------------------------------------------------------------------- who does what


def counts(n: int, parts: int | None = None) -> list[int]:
    """How many of n rows each process (or of `parts` each) takes: as equal as can be, the first ones one more."""
    parts = parts or world()
    size, more = divmod(n, parts)
    return [size + (r < more) for r in range(parts)]


def share(n: int) -> slice:
    """The rows of n, neighbours of each other, that this process takes."""
    each = counts(n)
    begin = sum(each[: rank()])
    return slice(begin, begin + each[rank()])


def shares(rows: Sequence[T], size: int) -> Iterator[tuple[Sequence[T], bool]]:
    """This process's part of each `size` rows, and whether it is one: where there are fewer rows than processes it
    is the first row, which the caller computes and multiplies by 0, so that all processes take the same steps.
    """
    for i in range(0, len(rows), size):
        chunk = rows[i : i + size]
        own = chunk[share(len(chunk))]
        yield (own, True) if len(own) else (chunk[:1], False)


# ------------------------------------------------------------------------------------------- results together


def barrier() -> None:
    """Waits for all processes."""
    if world() > 1:
        total({"": 0.0})


def gather(tensor: Tensor, each: Sequence[int]) -> Tensor:
    """Rows of all processes one after the other; process r gives each[r] of them. Shapes but for the number of
    rows, and dtypes, must agree."""
    if world() == 1:
        return tensor
    most = max(each)
    own = tensor.detach().new_zeros((most, *tensor.shape[1:]))
    own[: tensor.shape[0]] = tensor.detach()
    flags = own.dtype == torch.bool
    own = own.to(torch.uint8) if flags else own
    parts = [torch.empty_like(own) for _ in each]
    dist.all_gather(parts, own)
    out = torch.cat([part[:n] for part, n in zip(parts, each, strict=True)])
    return out.bool() if flags else out


def by_rows(n: int, size: int, compute: Callable[[slice], Tensor]) -> Tensor:
    """compute(rows) for all of n rows, at most `size` at a time, each row by one process; without gradient.

    `compute` gives one row of its result for each row. All processes call it equally often.
    """
    own = share(n)
    pieces = [slice(i, min(i + size, own.stop)) for i in range(own.start, own.stop, size)]
    parts = [compute(piece) for piece in pieces]
    most = -(-max(counts(n)) // size)
    fill = [compute(slice(0, 1)) for _ in range(most - len(pieces))]
    return gather(torch.cat(parts) if parts else fill[0][:0], counts(n))


def total(values: Mapping[str, float], largest: Sequence[str] = ()) -> dict[str, float]:
    """Sums over the processes, in their order; of the names in `largest`, the largest value. A process that had no row
    may lack names."""
    out = {k: float(v) for k, v in values.items()}
    if world() == 1:
        return out
    box: list[dict[str, float]] = [{}] * world()
    dist.all_gather_object(box, out)
    names = dict.fromkeys(name for found in box for name in found)
    values_of = {name: [found[name] for found in box if name in found] for name in names}
    return {name: max(v) if name in largest else sum(v) for name, v in values_of.items()}


def from_lead(compute: Callable[[], T]) -> T:
    """What `compute` gives on the lead, on every process; what it raises there is raised everywhere."""
    if world() == 1:
        return compute()
    box: list[Any] = [None, None]
    if lead():
        try:
            box[0] = compute()
        except Exception as error:
            box[1] = error
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise box[1]
    return box[0]


def sum_gradients(parameters: Sequence[torch.nn.Parameter]) -> None:
    """Gradients summed over the processes, in place; a parameter without one counts as 0."""
    if world() == 1:
        return
    by_dtype: dict[torch.dtype, list[torch.nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        by_dtype.setdefault(parameter.dtype, []).append(parameter)
    for dtype, found in by_dtype.items():
        # bfloat16 sums would depend on the number of processes in their third digit.
        flat = torch.cat([p.grad.reshape(-1).float() for p in found if p.grad is not None])
        dist.all_reduce(flat)
        for parameter, part in zip(found, flat.split([p.numel() for p in found]), strict=True):
            assert parameter.grad is not None
            parameter.grad.copy_(part.view_as(parameter.grad).to(dtype))


def device() -> torch.device:
    """Where tensors have to be to travel between processes."""
    nccl = dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")

"""The device that a command computes on: its name in a configuration, and what has to be done there and not elsewhere.

Models are placed once, batches where they meet a model; what a run writes has no device, so a run begun on one goes
on on another.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

from .config import ConfigError

M = TypeVar("M", bound=nn.Module)
CPU = torch.device("cpu")


def resolve(name: str) -> torch.device:
    """The device of "auto", "cpu", "cuda" or "cuda:N". Raises ConfigError, one sentence, for one that is not there.

    auto: a GPU where PyTorch has one, else the CPU. Of several processes on a machine (LOCAL_RANK, LOCAL_WORLD_SIZE)
    each takes the GPU of its number; auto is the CPU, with a warning, where there are more of them than GPUs.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    rank = int(os.environ.get("LOCAL_RANK", "0")) if several else 0
    processes = max(int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if several else 1, rank + 1)
    if name == "cpu" or (name == "auto" and not gpus):
        return CPU
    if not gpus:
        built = "no CUDA" if torch.version.cuda is None else f"CUDA {torch.version.cuda}, but finds no GPU"
        raise ConfigError(
            f"device is {name}, but PyTorch {torch.__version__} has {built} here; set it to cpu"
        )
    if name in ("auto", "cuda"):
        if several and processes > gpus:
            if name == "cuda":
                raise ConfigError(
                    f"device is cuda, but this machine has {_count(gpus)} for {processes} processes; start as many "
                    "processes as GPUs, or set device to cpu"
                )
            warnings.warn(
                f"{processes} processes and {_count(gpus)}: they run on the CPU; start as many processes as GPUs",
                stacklevel=2,
            )
            return CPU
        return torch.device("cuda", rank if several else torch.cuda.current_device())
    index = int(name.partition(":")[2])
    if several:
        raise ConfigError(
            f"device is {name} for {processes} processes, which cannot share it; set it to cuda, and each takes its own"
        )
    if index >= gpus:
        known = ", ".join(f"cuda:{i}" for i in range(gpus))
        raise ConfigError(f"device is {name}, but this machine has {_count(gpus)}; use {known} or cpu")
    return torch.device("cuda", index)


def _count(gpus: int) -> str:
    return f"{gpus} GPU{'s' if gpus > 1 else ''}"


def use(name: str) -> torch.device:
    """`resolve`, and what is not told a device (kernels, process groups) takes that GPU too."""
    device = resolve(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def place(model: M, device: torch.device) -> M:
    """The model with its weights on the device."""
    return model.to(device)


def synchronize(device: torch.device) -> None:
    """Waits until a GPU has done what it was given, so that a clock read next tells the time of that."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Inside, torch's global generators of the CPU and of the device start at `seed`; afterwards they are as they were
    before."""
    gpus = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed all GPUs
        for gpu in gpus:
            with torch.cuda.device(gpu):
                torch.cuda.manual_seed(seed)
        yield


def describe(device: torch.device) -> str:
    """A GPU's name; "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type

"""Checkpoints: complete or absent, exact, and free of pickle.

A checkpoint is a folder `step-000042` with `tensors.safetensors` (trainable weights, optimizer moments,
torch's random state) and `state.json` (everything else, and the size and hash of the tensor file). It is
written under a temporary name, flushed to disk, and renamed: a kill at any moment leaves the previous
checkpoint and at most a temporary folder, which the next save removes. Floats go through JSON by their
shortest exact form, so nothing is rounded.

`atomic_folder` gives the same promise to everything else that a run writes (final models, adapters).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .. import device as devices

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

FORMAT = 1
PREFIX, TEMPORARY, LOCK = "step-", ".tmp-", ".lock"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names it and says what to do."""


class WriteError(OSError):
    """A file that cannot be written; the message names it, why, and what to do."""


# ---------------------------------------------------------------------------------------------- atomic writes

FULL = (errno.ENOSPC, errno.EDQUOT)
_CURES = {
    **dict.fromkeys(FULL, ("the disk is full", "free some space")),
    errno.EROFS: ("the file system is read-only", "make it writable or name another output_dir"),
    **dict.fromkeys(
        (errno.EACCES, errno.EPERM), ("it is not permitted", "change that or name another output_dir")
    ),
}


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what a full disk or a read-only folder makes of a write into WriteError, one sentence."""
    try:
        yield
    except WriteError:
        raise
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError):
            number = error.errno
        else:
            found = re.search(r"os error (\d+)", str(error))
            number = int(found[1]) if found else None
        if number not in _CURES:
            raise
        why, cure = _CURES[number]
        raise WriteError(f"{path} cannot be written, {why}; {cure}") from error


def require_writable(folder: Path) -> None:
    """Raise WriteError where a folder, or the one that it would be made in, takes no files."""
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not os.access(there, os.W_OK | os.X_OK):
        raise WriteError(
            f"output_dir {folder} cannot be written ({there} takes no files); make it writable or name "
            "another output_dir"
        )


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def atomic_folder(final: str | Path) -> Iterator[Path]:
    """A temporary folder beside `final` that becomes `final` when the block ends, and vanishes when it
    raises.

    Everything in it is on disk before the rename. An older `final` is replaced.
    """
    final = Path(final)
    temporary = final.parent / f"{TEMPORARY}{final.name}-{os.getpid()}"
    with writing(final), _vanishing(temporary):
        final.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        yield temporary
        for path in sorted(temporary.rglob("*"), reverse=True):
            _sync(path)
        _sync(temporary)
        old = final.parent / f"{TEMPORARY}old-{final.name}-{os.getpid()}"
        if final.exists():
            os.rename(final, old)
        os.rename(temporary, final)
        _sync(final.parent)
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _vanishing(temporary: Path) -> Iterator[None]:
    """Removes what was being written when a write fails, which also gives its space back."""
    try:
        yield
    except BaseException:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)
        raise


def atomic_text(path: str | Path, text: str) -> None:
    """Write a file so that it holds either the old or the new text."""
    atomic_bytes(path, text.encode())


def atomic_bytes(path: str | Path, content: bytes) -> None:
    """The same of bytes."""
    path = Path(path)
    temporary = path.parent / f"{TEMPORARY}{path.name}-{os.getpid()}"
    with writing(path), _vanishing(temporary):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        os.rename(temporary, path)
        _sync(path.parent)


def read_json(path: Path, cure: str) -> dict[str, Any]:
    """The object that a JSON file holds. Raises CheckpointError, one sentence with the cure, for a damaged one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged ({error}); {cure}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is damaged (it holds no object); {cure}")
    return content


# ------------------------------------------------------------------------------------------ one run at a time

_held: set[int] = set()
"""Descriptors of locked files, which a forked child gives up: one that outlives a killed run would keep its lock."""


def _let_go() -> None:
    for fd in _held:
        os.close(fd)
    _held.clear()


if fcntl is not None:
    os.register_at_fork(after_in_child=_let_go)


class Lock:
    """Keeps other processes from running in a folder; the kernel drops it when its process ends, however it ends, so
    that the file `.lock` by itself means nothing. It holds the process's number, for the sentence."""

    def __init__(self, folder: Path) -> None:
        """Raises CheckpointError where another process has it. Without locks (Windows, some network file systems, a
        folder that cannot be written) nothing is held."""
        self._fd: int | None = None
        if fcntl is None:
            return
        try:
            fd = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError:
            return
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.read(fd, 32).decode(errors="replace").strip() or "unknown"
            os.close(fd)
            raise CheckpointError(
                f"output_dir {folder} is in use by process {pid}; wait for it or stop it, or name another output_dir"
            ) from None
        except OSError:
            os.close(fd)
            return
        self._fd = fd
        _held.add(fd)
        with contextlib.suppress(OSError):  # a full disk: the lock holds, whatever its file says
            os.ftruncate(fd, 0)
            os.write(fd, f"{os.getpid()}\n".encode())

    def release(self) -> None:
        if self._fd in _held:
            _held.discard(self._fd)
            os.close(self._fd)
        self._fd = None


# --------------------------------------------------------------------------------------- states as plain data


def rng_state(device: torch.device = devices.CPU) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State of Python's, NumPy's and torch's global generators, a GPU's own too, as (tensors, JSON values)."""
    name, keys, *rest = np.random.get_state()
    version, internal, gauss = random.getstate()
    tensors = {"rng.torch": torch.get_rng_state()}
    if device.type == "cuda":
        tensors["rng.cuda"] = torch.cuda.get_rng_state(device)
    position, has_gauss, cached = rest
    numpy_state = [name, [int(k) for k in np.asarray(keys)], int(position), int(has_gauss), float(cached)]
    return tensors, {"python": [version, list(internal), gauss], "numpy": numpy_state}


def set_rng_state(
    tensors: Mapping[str, Tensor], state: Mapping[str, Any], device: torch.device = devices.CPU
) -> None:
    """Put back what `rng_state` gave, on whichever device; a GPU's generator stays as it is where none was saved."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(tensors["rng.torch"])
    if device.type == "cuda" and "rng.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["rng.cuda"], device)


def module_state(prefix: str, module: nn.Module) -> dict[str, Tensor]:
    """The trainable parameters of a module, by name. Frozen ones come back from the model that the config
    names.
    """
    return {f"{prefix}.{n}": p.detach() for n, p in module.named_parameters() if p.requires_grad}


def load_module_state(prefix: str, module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy back what `module_state` gave; names and shapes must be the same."""
    own = {f"{prefix}.{n}": p for n, p in module.named_parameters() if p.requires_grad}
    saved = {k for k in tensors if k.startswith(prefix + ".")}
    for name, parameter in own.items():
        if name not in saved or tensors[name].shape != parameter.shape:
            found = f"has shape {tuple(tensors[name].shape)}" if name in saved else "is missing"
            raise CheckpointError(
                f"{name} {found} in the checkpoint but the model needs {tuple(parameter.shape)}; "
                "resume with the settings of the first run, or use another output_dir"
            )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(tensors[name])


def optimizer_state(
    prefix: str, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as (tensors, JSON values)."""
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for index, entry in state["state"].items():
        for name, value in entry.items():
            key = f"{prefix}.{index}.{name}"
            if isinstance(value, Tensor):
                tensors[key] = value
            else:
                values[key] = value
    return tensors, {"values": values, "groups": state["param_groups"]}


def load_optimizer_state(
    prefix: str, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], saved: Mapping[str, Any]
) -> None:
    """Put back what `optimizer_state` gave."""
    entries: dict[int, dict[str, Any]] = {}
    for key, value in [*tensors.items(), *saved["values"].items()]:
        if key.startswith(prefix + "."):
            index, name = key[len(prefix) + 1 :].split(".", 1)
            entries.setdefault(int(index), {})[name] = value
    groups = [{k: tuple(v) if k == "betas" else v for k, v in g.items()} for g in saved["groups"]]
    optimizer.load_state_dict({"state": entries, "param_groups": groups})


# ------------------------------------------------------------------------------------------- save, find, load


def _hash(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "blake2b").hexdigest()


def save(
    folder: str | Path,
    step: int,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    keep: int = 2,
    best: int | None = None,
) -> Path:
    """Write checkpoint `step` into `folder`, then remove all but the newest `keep`, step `best`, and what killed runs
    left behind.
    """
    folder = Path(folder)
    for rest in folder.glob(f"{TEMPORARY}*"):
        shutil.rmtree(rest, ignore_errors=True)
    final = step_folder(folder, step)
    with atomic_folder(final) as temporary:
        path = temporary / "tensors.safetensors"
        save_file({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}, path)
        content = {
            "format": FORMAT,
            "step": step,
            "tensors": {"bytes": path.stat().st_size, "blake2b": _hash(path)},
            "state": dict(state),
        }
        (temporary / "state.json").write_text(json.dumps(content), encoding="utf-8")
    for old in _all(folder)[:-keep] if keep else []:
        if best is None or old != step_folder(folder, best):
            shutil.rmtree(old, ignore_errors=True)
    return final


def step_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return folder / f"{PREFIX}{step:06d}"


def _all(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first."""
    found = [p for p in folder.glob(f"{PREFIX}*") if p.name[len(PREFIX) :].isdigit()]
    return sorted(found, key=lambda p: int(p.name[len(PREFIX) :]))


def latest(folder: str | Path) -> Path | None:
    """The newest checkpoint in `folder`; None where there is none."""
    found = _all(Path(folder))
    return found[-1] if found else None


def load(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any], int]:
    """(tensors, state, step) of a checkpoint. Raises CheckpointError, one sentence, if it is not whole."""
    path = Path(path)
    others = [p for p in _all(path.parent) if p != path]
    cure = f"delete {path} to go on from {others[-1].name}" if others else f"delete {path} to start again"
    for name in ("state.json", "tensors.safetensors"):
        if not (path / name).is_file():
            raise CheckpointError(f"checkpoint {path} has no {name}; {cure}")
    try:
        content = json.loads((path / "state.json").read_text(encoding="utf-8"))
        wanted, version, state, step = (content[k] for k in ("tensors", "format", "state", "step"))
    except (ValueError, KeyError, TypeError, UnicodeDecodeError):
        raise CheckpointError(f"checkpoint {path} has a broken state.json; {cure}") from None
    if version != FORMAT:
        raise CheckpointError(
            f"checkpoint {path} has format {version}, but this version reads {FORMAT}; {cure}"
        )
    file = path / "tensors.safetensors"
    if file.stat().st_size != wanted["bytes"] or _hash(file) != wanted["blake2b"]:
        raise CheckpointError(
            f"checkpoint {path} has a tensors.safetensors that is not what was written; {cure}"
        )
    try:
        return load_file(file), state, int(step)
    except SafetensorError as error:
        raise CheckpointError(f"checkpoint {path} cannot be read ({error}); {cure}") from None

"""What tells the data and the models that a run reads from any others: kept in run.json, looked at when it goes on.

Of a data file all bytes count. A model can be gigabytes, so of its folder these count: the names and all bytes of its
small files (configuration, tokenizer, chat template), the names and sizes of its weight files, all bytes of those up
to WHOLE, and of larger ones the header (each tensor's name, type, shape and place) with BLOCK bytes from the
beginning, the middle and the end of every tensor. A model that was trained further, merged, or cast differs in every
tensor that this touched, and is told. What is not told: numbers changed in place in a large file, between the blocks.
"""

from __future__ import annotations

import hashlib
import json
import os
from functools import cache
from pathlib import Path
from typing import Any

from ..config import ConfigError, StageConfig
from . import models, reading
from .rewards import is_function_name

WHOLE = 64 * 2**20
BLOCK = 4096
SMALL = (".json", ".jinja", ".model", ".txt")
WEIGHTS = ".safetensors"


def of_data(config: StageConfig, read: bool) -> dict[str, str]:
    """By source of a run's data: a digest of all bytes of a file (a run reads them all in any case, and slower), of a
    hub data set its fingerprint, once it has been read. Others are left out."""
    found = reading.FINGERPRINTS if read else {}
    out = {}
    for source in (*config.data, *config.eval_data, *getattr(config, "unsup_data", ())):
        if os.path.isfile(source):
            out[source] = _of_file(Path(source), whole=True)
        elif source in found:
            out[source] = found[source]
    return out


def of_models(config: StageConfig, given: bool = False) -> dict[str, str]:
    """By name of the models that a run reads: `of_folder`. Those that are not in a folder here (a hub's, or one that
    was taken away) are left out. given: its own model is an object and no name."""
    names = [] if given else [config.model]
    names += [getattr(config, key, "") for key in ("reference", "critic")]
    names += [name for name in getattr(config, "reward", ()) if not is_function_name(name)]
    out = {}
    for name in dict.fromkeys(filter(None, names)):
        folder = _folder(name)
        if folder is not None:
            out[name] = of_folder(folder)
    return out


def of_folder(folder: Path) -> str:
    """Of a model's files, and of the model's that an adapter is on."""
    found = hashlib.blake2b(digest_size=16)
    for file in sorted(f for f in folder.iterdir() if f.suffix in (*SMALL, WEIGHTS) and f.is_file()):
        found.update(f"{file.name} {file.stat().st_size} {_of_file(file, file.suffix != WEIGHTS)};".encode())
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        try:
            name = json.loads(adapter.read_bytes()).get("base_model_name_or_path")
        except (ValueError, AttributeError):
            name = None  # damaged: who loads it says so
        under = _folder(str(name)) if name else None
        found.update(of_folder(under).encode() if under and under != folder else b"")
    return found.hexdigest()


def alike(one: str, other: str) -> bool:
    """Whether two names are of folders with the same content, as far as digests tell."""
    found = [_folder(name) for name in (one, other)]
    return None not in found and len({of_folder(f) for f in found if f}) == 1


def _folder(name: str) -> Path | None:
    try:
        folder = Path(models.resolve(name))
    except ConfigError:
        return None
    return folder if folder.is_dir() else None


def _of_file(path: Path, whole: bool) -> str:
    about = path.stat()
    return _digest(str(path.absolute()), about.st_size, about.st_mtime_ns, whole or about.st_size <= WHOLE)


@cache
def _digest(path: str, size: int, changed: int, whole: bool) -> str:
    """Of a file's bytes, or of its header and blocks. size, changed: when a digest made before is no longer the
    file's."""
    with open(path, "rb") as f:
        places = [] if whole else _places(f, size)
        if not places:
            return hashlib.file_digest(f, "blake2b").hexdigest()[:32]
        found = hashlib.blake2b(digest_size=16)
        for start, length in places:
            f.seek(start)
            found.update(f.read(length))
        return found.hexdigest()


def _places(f: Any, size: int) -> list[tuple[int, int]]:
    """(start, length) of what counts of a safetensors file; [] where its header is none."""
    ahead = 8 + int.from_bytes(f.read(8), "little")
    places = [(0, ahead)]
    try:
        header = json.loads(f.read(ahead - 8)) if ahead <= size else {}
        tensors = [about["data_offsets"] for name, about in header.items() if name != "__metadata__"]
        for start, end in sorted(tensors):
            length = min(BLOCK, end - start)
            for place in (start, (start + end - length) // 2, end - length):
                places.append((ahead + place, length))
    except (ValueError, TypeError, KeyError, AttributeError):
        tensors = []
    f.seek(0)
    return places if tensors else []

"""Token ids of rows on disk, keyed by what they were made of: the rows' content, the tokenizer, and the settings.

An entry is a folder `<key>` with `ids.safetensors` and `rows.json`; it is written under another name and renamed, so
that it is whole or absent, and checked by its hash when read. A key that has changed in anything is another entry,
so nothing has to be invalidated; a broken entry is made anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from .checkpoint import atomic_folder

FORMAT = 2

Outcome = tuple[list[int], list[list[int]], bool] | str | None
"""Of a row: (prompt ids, answers' ids, in them ~id for what is not learnt, whether they were cut), why it is bad, or
None where it is too long."""


def fingerprint(tokenizer: Any) -> str:
    """A digest of everything in a tokenizer that decides ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    special = {k: str(v) for k, v in sorted(tokenizer.special_tokens_map.items())}
    bos = [getattr(tokenizer, name, None) for name in ("add_bos_token", "add_eos_token", "add_prefix_space")]
    text = json.dumps([type(tokenizer).__name__, content, special, bos, str(tokenizer.chat_template)])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def key_of(rows: Iterable[Mapping[str, Any]], settings: Mapping[str, Any]) -> str:
    """The name of the entry for these rows, encoded with these settings."""
    digest = hashlib.blake2b(digest_size=16)
    for part in ({"format": FORMAT, **settings}, *rows):
        text = json.dumps(part, sort_keys=True, ensure_ascii=False, default=repr).encode()
        digest.update(len(text).to_bytes(8, "little") + text)
    return digest.hexdigest()


def store(folder: str | Path, key: str, outcomes: Sequence[Outcome]) -> None:
    """Write an entry; another process that was faster wins."""
    kept = [o for o in outcomes if isinstance(o, tuple)]
    rows = [ids for prompt, answers, _ in kept for ids in (prompt, *answers)]
    flat = torch.tensor([i for ids in rows for i in ids], dtype=torch.int32, device="cpu")
    content = save(
        {"ids": flat, "lengths": torch.tensor([len(ids) for ids in rows], dtype=torch.int64, device="cpu")}
    )
    told = [[len(o[1]), o[2]] if isinstance(o, tuple) else o for o in outcomes]
    about = {"blake2b": hashlib.blake2b(content).hexdigest(), "rows": told}
    final = Path(folder).expanduser() / key
    try:
        with atomic_folder(final) as temporary:
            (temporary / "ids.safetensors").write_bytes(content)
            (temporary / "rows.json").write_text(json.dumps(about), encoding="utf-8")
    except OSError:
        if find(folder, key) is None:
            raise


def find(folder: str | Path, key: str) -> list[Outcome] | None:
    """The outcomes of an entry; None where there is none that is whole."""
    final = Path(folder).expanduser() / key
    try:
        content = (final / "ids.safetensors").read_bytes()
        about = json.loads((final / "rows.json").read_text(encoding="utf-8"))
        if hashlib.blake2b(content).hexdigest() != about["blake2b"]:
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    tensors = load(content)
    rows = iter([ids.tolist() for ids in tensors["ids"].long().split(tensors["lengths"].tolist())])
    return [
        (next(rows), [next(rows) for _ in range(o[0])], bool(o[1])) if isinstance(o, list) else o
        for o in about["rows"]
    ]

"""Writes train.jsonl.gz and test.jsonl.gz: the prompts of recipes/data/polite, each with one of IFEval's instructions.

python recipes/data/format/make.py
"""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
INSTRUCTIONS: list[tuple[str, str, dict[str, Any]]] = [
    ("change_case:english_lowercase", "Answer in lowercase letters only.", {}),
    ("change_case:english_capital", "Answer in capital letters only.", {}),
    ("punctuation:no_comma", "Use no comma.", {}),
    ("startend:quotation", "Put your whole answer into double quotation marks.", {}),
    ("startend:end_checker", "End with the words: That is all.", {"end_phrase": "That is all."}),
    ("detectable_format:title", "Begin with a title in double angle brackets, such as <<title>>.", {}),
    (
        "detectable_content:postscript",
        "End with a postscript that begins with P.S.",
        {"postscript_marker": "P.S."},
    ),
    (
        "length_constraints:number_words",
        "Answer with less than 12 words.",
        {"num_words": 12, "relation": "less than"},
    ),
]


def write(name: str) -> None:
    with gzip.open(HERE.parent / "polite" / name, "rt", encoding="utf-8") as f:
        rows = [json.loads(line) for line in f]
    lines = []
    for i, row in enumerate(rows):
        kind, text, settings = INSTRUCTIONS[i % len(INSTRUCTIONS)]
        question = row["prompt"][-1]["content"]
        out = {
            "id": f"format-{hashlib.blake2b(question.encode(), digest_size=5).hexdigest()}",
            "prompt": [{"role": "user", "content": f"{question}\n\n{text}"}],
            "instruction_id_list": [kind],
            "kwargs": [settings],
        }
        lines.append(json.dumps(out, ensure_ascii=False) + "\n")
    with (
        open(HERE / name, "wb") as raw,
        gzip.GzipFile(fileobj=raw, mode="wb", filename="", mtime=0) as packed,
    ):
        packed.write("".join(lines).encode())


if __name__ == "__main__":
    for file in ("train.jsonl.gz", "test.jsonl.gz"):
        write(file)

"""What two settings hold or take is only told apart by processes of their own."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that every such benchmark has."""
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--output", default="", help="write the numbers as JSON to this file too")
    parser.add_argument("--one", default="", help=argparse.SUPPRESS)


def each(
    script: str,
    settings: Sequence[Mapping[str, Any]],
    args: Any,
    show: Callable[[dict[str, Any]], str],
    *more: str,
) -> None:
    """Runs `script` once for each setting, with its own flags, `more` and `--one SETTING`, whose last line is numbers
    as JSON; prints a line of each, and writes `args.output`."""
    rows = []
    for setting in settings:
        command = [sys.executable, script, *sys.argv[1:], *more, "--one", json.dumps(setting)]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        rows.append({**setting, **json.loads(said.splitlines()[-1])})
        print(show(rows[-1]), flush=True)
    if args.output:
        with open(args.output, "w", encoding="utf-8") as f:
            json.dump({"model": args.model, "dtype": args.dtype, "rows": rows}, f, indent=1)

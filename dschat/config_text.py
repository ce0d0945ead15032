"""Configs as text: YAML files, command-line flags, and a command's help.

`load(PPOConfig, "ppo.yaml", {"kl_coef": "0.02"})` reads a file and lays flags over it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import typing
from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from .config_base import C, Config, ConfigError, build, field_types, parts, renamed, resolve
from .deepspeed_chat import ALIASES


def _given_twice(root: Any) -> Any:
    """A key of a YAML document that its mapping has already; None where there is none."""
    waiting, met = [root], set()  # aliases: a node may stand in several places, and in itself
    while waiting:
        node = waiting.pop()
        if id(node) in met:
            continue
        met.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            waiting += node.value
        elif isinstance(node, yaml.MappingNode):
            keys: set[str] = set()
            for key, value in node.value:
                waiting.append(value)
                if isinstance(key, yaml.ScalarNode) and key.value in keys:
                    return key
                keys.add(str(key.value))
    return None


def read_yaml(path: str) -> dict[str, Any]:
    """Keys of a YAML file. Raises ConfigError for a missing or broken one."""
    if not os.path.isfile(path):
        folder = os.path.dirname(path) or "."
        there = (
            sorted(f for f in os.listdir(folder) if f.endswith((".yaml", ".yml")))
            if os.path.isdir(folder)
            else []
        )
        raise ConfigError(
            f"config file {path} does not exist" + (f"; {folder} has {', '.join(there)}" if there else "")
        )
    with open(path, "rb") as f:
        content = f.read()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{path} is not UTF-8 (byte 0x{content[error.start]:02x} at line {line}); save it as UTF-8"
        ) from None
    try:
        twice = _given_twice(yaml.compose(text, Loader=yaml.SafeLoader))
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{path}{where} is not valid YAML: {problem}") from None
    if twice is not None:
        raise ConfigError(
            f"{path} line {twice.start_mark.line + 1} gives {twice.value!r} again; keep one of the two"
        )
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold `key: value` lines, but it holds a {type(values).__name__}")
    return values


def load(
    cls: type[C],
    path: str | None = None,
    flags: Mapping[str, Any] | None = None,
    *,
    processes: int | None = None,
) -> C:
    """A config from a file with `flags` laid over it; a flag `ppo.kl_coef` reaches into a stage of a
    pipeline.

    processes: how many the run is for, which numbers "per device" are multiplied by; None: as the environment says.
    """
    values = read_yaml(path) if path else {}
    where = path or "the arguments"
    if not flags:
        return build(cls, values, where, processes)
    values = renamed(cls, values, where, processes)
    given: dict[str, str] = {}
    for flag, value in flags.items():
        if "." in flag:
            stage, _, key = flag.partition(".")
            inner = parts(cls).get(stage)
            if inner is None:
                raise ConfigError(
                    f"--{flag} names a stage {stage!r}, but the stages of dschat {cls.command} are: "
                    f"{', '.join(parts(cls)) or 'none'}"
                )
            found = resolve(inner, key, value, f"the flags of {stage}", processes)
            if found is not None:
                section = values.get(stage) or {}
                section = renamed(inner, section, f"{stage} of {where}", processes)
                values[stage] = {**section, found[0]: found[1]}
        else:
            found = resolve(cls, flag, value, "the flags", processes)
            if found is not None:
                if found[0] in given:
                    raise ConfigError(
                        f"--{flag} and --{given[found[0]]} both set {found[0]}; keep one of the two"
                    )
                given[found[0]] = flag
                values[found[0]] = found[1]
    return build(cls, values, f"{path} and the flags" if path else "the flags", processes)


def _is_list(cls: type[Config], key: str) -> bool:
    """Whether a flag names a list, in the command itself or in a stage of it: then it may be given several
    times.
    """
    types_of = field_types(cls)
    stage, dot, name = key.partition(".")
    if dot:
        inner = parts(cls).get(stage)
        types_of, key = (field_types(inner) if inner is not None else {}), name
    key = key.replace("-", "_")
    return typing.get_origin(types_of.get(ALIASES.get(key, key))) is list


def parse_flags(argv: Iterable[str], cls: type[Config]) -> dict[str, Any]:
    """`--key value`, `--key=value`, `--key a b` (a list), `--key` (true) and `--no-key` (false) as a mapping
    of texts.
    """
    flags: dict[str, Any] = {}
    current: str | None = None
    for word in argv:
        if word.startswith("--") and len(word) > 2:
            key, eq, value = word[2:].partition("=")
            if key in flags and not _is_list(cls, key):
                raise ConfigError(f"--{key} is given twice; keep one")
            if key.startswith(("no-", "no_")) and not eq and key[3:].replace("-", "_") in field_types(cls):
                flags[key[3:]] = [False]
                current = None
                continue
            flags.setdefault(key, []).extend([value] if eq else [])
            current = None if eq else key
        elif current is not None:
            flags[current].append(word)
        else:
            raise ConfigError(f"{word!r} does not belong to a flag; write --key {word}")
    return {k: v if v else True for k, v in flags.items()}


def dump(config: Config, comments: bool = False) -> str:
    """The config as YAML that `load` reads back; with comments, each key has its help text."""
    lines: list[str] = []
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if isinstance(value, Config):
            lines.append(f"{f.name}:")
            lines.extend("  " + line for line in dump(value, comments).splitlines())
            continue
        if f.name in parts(type(config)) and value is None:
            continue
        lines.append(
            f"{f.name}: {_scalar(value)}" + (f"  # {f.metadata.get('help', '')}" if comments else "")
        )
    return "\n".join(lines) + "\n"


def _scalar(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    # YAML 1.1 reads 1e-05 as a text; a number needs the dot.
    return (
        text.replace("e", ".0e", 1) if isinstance(value, float) and "e" in text and "." not in text else text
    )


def usage(cls: type[Config]) -> str:
    """Help text of a command: every flag with its default."""
    lines = [
        f"dschat {cls.command}: {cls.about}",
        "",
        f"usage: dschat {cls.command}{f' {cls.positional.upper()}' if cls.positional else ''}"
        " [--config FILE] [--key value ...]",
        "",
    ]
    rows = []
    for f in dataclasses.fields(cls):
        default = (
            f.default
            if f.default is not dataclasses.MISSING
            else f.default_factory()
            if callable(f.default_factory)
            else ""
        )
        shown = (
            ""
            if default in ("", [], None)
            else f" [{json.dumps(default) if isinstance(default, (bool, list)) else default}]"
        )
        rows.append((f"--{f.name}", f"{f.metadata.get('help', '')}{shown}"))
    if parts(cls):
        rows.append(("--STAGE.key", "a key of one stage, such as --ppo.kl_coef 0.02"))
    rows.append(("--config", "YAML file with these keys; flags win over it"))
    rows.append(("--dump-config", "print the resolved keys and stop"))
    rows.append(("--debug", "show the traceback of an error"))
    width = max(len(name) for name, _ in rows)
    lines += [f"  {name:<{width}}  {text}" for name, text in rows]
    return "\n".join(lines)

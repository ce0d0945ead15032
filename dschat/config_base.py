"""What a config is: a dataclass whose fields have types, help texts and rules, and the keys that mean a field.

Unknown keys are refused with the nearest known name; a value of the wrong type is refused in one sentence that names
key, value and what is expected. Names that DeepSpeed-Chat's scripts use are accepted where the thing exists here,
ignored with a note where it has become pointless, and refused with what replaces them where they would change the
result: the table is dschat/deepspeed_chat.py.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
import types
import typing
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

from . import deepspeed_chat
from .deepspeed_chat import ALIASES, FLAGS


class ConfigError(ValueError):
    """A configuration that cannot be run; the message is one sentence for the user."""


C = TypeVar("C", bound="Config")


def opt(default: Any, text: str) -> Any:
    """A dataclass field with its help text; a list or dict default is copied for every instance."""
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata={"help": text})
    return dataclasses.field(default=default, metadata={"help": text})


# -------------------------------------------------------------------------------------------------- the types


def _type_name(kind: Any) -> str:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join("none" if a is type(None) else _type_name(a) for a in args)
    if origin is Literal:
        return "one of " + ", ".join(str(a) for a in args)
    if origin is list:
        return f"a list (each {_type_name(args[0])})"
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    return names.get(kind, getattr(kind, "__name__", str(kind)))


def coerce(value: Any, kind: Any, key: str) -> Any:
    """`value`, from Python, YAML or a flag's text, as `kind`. Raises ConfigError naming key, value and what
    is expected.
    """
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is not list and isinstance(value, (list, tuple)) and len(value) == 1:
        value = value[0]  # a flag's values always arrive as a list
    wrong = ConfigError(f"{key} is {value!r}, but it must be {_type_name(kind)}")
    if origin in (typing.Union, types.UnionType):
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null", "~")):
            if type(None) in args:
                return None
            raise wrong
        return coerce(value, next(a for a in args if a is not type(None)), key)
    if origin is Literal:
        if value in args and not (isinstance(value, bool) and not any(a is value for a in args)):
            return value
        near = difflib.get_close_matches(str(value), [str(a) for a in args], n=1)
        raise ConfigError(f"{wrong}{f'; did you mean {near[0]}?' if near else ''}")
    if origin is list:
        values = value if isinstance(value, (list, tuple)) else [value]
        return [coerce(v, args[0], f"{key}[{i}]" if len(values) > 1 else key) for i, v in enumerate(values)]
    if dataclasses.is_dataclass(kind):
        if isinstance(value, kind):  # type: ignore[arg-type]
            return value
        if isinstance(value, Mapping):
            return build(typing.cast(Any, kind), value, where=key)
        raise wrong
    if kind is bool:
        if isinstance(value, bool):
            return value
        text = str(value).lower()
        if text in ("true", "yes", "on", "1"):
            return True
        if text in ("false", "no", "off", "0"):
            return False
        raise wrong
    if isinstance(value, bool):
        raise wrong
    if kind in (int, float):
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise wrong from None
        if not math.isfinite(number) or (kind is int and number != int(number)):
            raise wrong
        whole = kind is int and (not isinstance(value, (str, float)) or re.fullmatch(r"[+-]?\d+", str(value)))
        return int(value) if whole else kind(number)
    if kind is str:
        if isinstance(value, (str, os.PathLike)):
            return str(value)
        raise wrong
    if kind is Any or isinstance(value, kind):
        return value
    raise wrong


# -------------------------------------------------------------------------------------------- the dataclasses


def field_types(cls: type[Config]) -> dict[str, Any]:
    """Field name -> type, in order of declaration."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def parts(cls: type[Config]) -> dict[str, type[Config]]:
    """Field name -> class of the fields that are configs themselves, or none: a pipeline's stages."""
    found = {}
    for name, kind in field_types(cls).items():
        for inner in (kind, *typing.get_args(kind)):
            if isinstance(inner, type) and issubclass(inner, Config):
                found[name] = inner
    return found


def defaults(cls: type[Config]) -> dict[str, Any]:
    """Field name -> value where it is not given, without fields that must be. A run of a version that did not know a
    field did what this says."""
    out = {}
    for f in dataclasses.fields(cls):
        if f.default is not dataclasses.MISSING:
            out[f.name] = f.default
        elif f.default_factory is not dataclasses.MISSING:
            out[f.name] = f.default_factory()
    return out


@dataclass(kw_only=True)
class Config:
    """Base of all: coerces and checks its fields on construction."""

    command: ClassVar[str] = ""
    about: ClassVar[str] = ""
    positional: ClassVar[str] = ""
    """The list that words before the first flag belong to."""

    def __post_init__(self) -> None:
        for name, kind in field_types(type(self)).items():
            setattr(self, name, coerce(getattr(self, name), kind, name))
        self.check()

    def check(self) -> None:
        """Raise ConfigError for a value that cannot work. Subclasses add to it."""

    @classmethod
    def spread(cls, values: dict[str, Any], where: str, processes: int | None) -> dict[str, Any]:
        """The fields' values from those that were given: a config of several parts hands on what they share."""
        return values

    def require(self, good: bool, key: str, rule: str) -> None:
        if not good:
            raise ConfigError(f"{key} is {getattr(self, key)!r}, but it must be {rule}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they go into YAML and JSON."""
        return {
            f.name: v.to_dict() if isinstance(v := getattr(self, f.name), Config) else v
            for f in dataclasses.fields(self)
        }


def redefault(**values: Any) -> Callable[[type[C]], type[C]]:
    """Under @dataclass: other defaults for fields of the parent, whose types and help texts stay."""

    def apply(cls: type[C]) -> type[C]:
        parent: Any = cls.__mro__[1]
        kinds, known = field_types(parent), {f.name: f for f in dataclasses.fields(parent)}
        for name, value in values.items():
            cls.__annotations__[name] = kinds[name]
            setattr(cls, name, opt(value, known[name].metadata["help"]))
        return cls

    return apply


# ------------------------------------------------------------------------------------------------------ keys


def resolve(
    cls: type[Config], key: str, value: Any, where: str, processes: int | None = None
) -> tuple[str, Any] | None:
    """The field of `cls` that `key` means and its value there; None for what is ignored. processes: how many the run
    is for; None: as the environment says. Raises ConfigError for an unknown or refused key.
    """
    known = field_types(cls)
    name = key.replace("-", "_")
    flag = FLAGS.get(name)
    if name in known:
        return name, deepspeed_chat.translate(flag, value, processes) if flag is not None else value
    if flag is not None and flag.to in known:
        return flag.to, deepspeed_chat.translate(flag, value, processes)
    if flag is not None and (flag.note or deepspeed_chat.text_of(value) in flag.harmless):
        warnings.warn(f"{key} has no effect: {flag.note or 'that is so here anyway'}", stacklevel=4)
        return None
    if flag is not None and flag.instead:
        raise ConfigError(f"{key} in {where} is not supported: {flag.instead}")
    near = difflib.get_close_matches(name, [*known, *ALIASES], n=1, cutoff=0.5)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.0)
    hint = (
        f"did you mean {near[0]!r}?" if near else f"the nearest are {_listed(close)}, all are in {_help(cls)}"
    )
    raise ConfigError(f"unknown key {key!r} in {where}; {hint}")


def _listed(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _help(cls: type[Config]) -> str:
    return f"dschat {cls.command} --help"


def renamed(
    cls: type[Config], values: Mapping[str, Any], where: str, processes: int | None
) -> dict[str, Any]:
    """The same values by the names of the fields."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        found = resolve(cls, str(key), value, where, processes)
        if found is None:
            continue
        name, own = found
        if name in out:
            raise ConfigError(f"{key!r} in {where} sets {name}, which is set already; keep one of the two")
        out[name] = own
    return out


def build(
    cls: type[C], values: Mapping[str, Any], where: str = "the arguments", processes: int | None = None
) -> C:
    """A config from a mapping, with the unknown-key, alias and type rules; a pipeline's shared keys flow into its
    stages. processes: as in config_text.load.
    """
    values = cls.spread(renamed(cls, values, where, processes), where, processes)
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(f"{error} (in {where})") from None if "(in " not in str(error) else error

"""Translates a kernel's PTX, as nvcc or Triton wrote it, into C++ that runs on the fibers of csrc/cuda_emulation.

Every instruction becomes one block of C++; registers become unsigned integers of their width, so that nothing is done
to their bits that the PTX does not do. An instruction, modifier or operand that is not known is an `Untranslated`
error that names it: there is no approximation. Out of reach are wgmma, tcgen05, TMA and mbarrier (Hopper's and
Blackwell's own), named barriers, clusters and calls of functions.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

BYTES = {
    "pred": 1, "b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2, "f16": 2, "bf16": 2, "b32": 4, "u32": 4,
    "s32": 4, "f32": 4, "f16x2": 4, "bf16x2": 4, "tf32": 4, "b64": 8, "u64": 8, "s64": 8, "f64": 8, "f32x2": 8,
}  # fmt: skip
FLOATS = ("f16", "bf16", "f32", "f64")
SPECIAL = {
    "%tid": "thread", "%ctaid": "block", "%ntid": "threads", "%nctaid": "blocks",
}  # fmt: skip
LANES = {
    "%laneid": "uint32_t(t.host.lane())",
    "%warpid": "uint32_t(t.host.thread_number() / 32)",
    "%lanemask_lt": "((1u << t.host.lane()) - 1u)",
    "%lanemask_le": "((2u << t.host.lane()) - 1u)",
    "%lanemask_eq": "(1u << t.host.lane())",
    "%lanemask_gt": "(~((2u << t.host.lane()) - 1u))",
    "%lanemask_ge": "(~((1u << t.host.lane()) - 1u))",
    "WARP_SZ": "32u",
}
COMPARISONS = {
    "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "lo": "<", "ls": "<=", "hi": ">", "hs": ">=",
}  # fmt: skip
# What changes only speed, or order that one CPU thread keeps anyway.
IGNORED = {
    "membar",
    "fence",
    "prefetch",
    "prefetchu",
    "nanosleep",
    "griddepcontrol",
    "discard",
    "applypriority",
}
# Modifiers without meaning here: rounding to nearest is what C++ does, and caches are not modelled.
PLAIN = {
    "rn", "ftz", "approx", "full", "sync", "aligned", "uni", "volatile", "relaxed", "acquire", "release",
    "acq_rel", "gpu", "cta", "sys", "nc", "ca", "cg", "cs", "cv", "wb", "wt", "L1::evict_first", "L1::evict_last",
    "L1::no_allocate", "L1::evict_normal", "L2::cache_hint", "L2::128B", "L2::64B", "L2::256B", "noftz", "weak",
}  # fmt: skip


class Untranslated(Exception):
    """The PTX has something that is not known here."""


@dataclass
class Entry:
    """A kernel of a PTX module: its name and parameter types are what a launch needs."""

    name: str
    parameters: list[tuple[str, int, int]] = field(default_factory=list)  # (name, offset, bytes)
    parameter_bytes: int = 0
    source: str = ""


def entry_texts(ptx: str) -> dict[str, str]:
    """The text of every kernel, from .entry to the closing brace."""
    found, clean = {}, _without_comments(ptx)
    for match in re.finditer(r"\.entry\s+([\w$]+)", clean):
        at, depth = clean.index("{", match.end()), 0
        for place in range(at, len(clean)):
            depth += {"{": 1, "}": -1}.get(clean[place], 0)
            if not depth:
                break
        found[match[1]] = clean[match.start() : place + 1]
    return found


def translate(ptx: str, name: str) -> Entry:
    """The C++ of one kernel of a module."""
    clean = _without_comments(ptx)
    head = clean[: clean.index(".entry")] if ".entry" in clean else clean
    if re.search(r"\.func\b", clean):
        raise Untranslated("a function (.func)")
    return _Kernel(name, entry_texts(ptx)[name], head).entry


def _without_comments(ptx: str) -> str:
    text = re.sub(r"/\*.*?\*/", "", ptx, flags=re.S)
    text = re.sub(r"//[^\n]*", "", text)
    text = re.sub(r"^\s*\.(loc|file|pragma)\b[^\n]*", "", text, flags=re.M)
    return re.sub(r"\.section\s+\.\w+\s*\{.*?\n\s*\}", "", text, flags=re.S)


def _statements(body: str) -> Iterator[tuple[int, str]]:
    """(line, statement) without its semicolon; braces of scopes and labels are statements."""
    text, depth, line, began = "", 0, 1, 1
    for at, c in enumerate(body):
        line += c == "\n"
        if not text.strip():
            text, began = "", line
        if c == "{" and not text.strip():
            yield line, "{"
        elif c == "}" and depth == 0:
            yield line, "}"
            text = ""
        elif c == ";" and depth == 0:
            yield began, " ".join(text.split())
            text = ""
        elif (
            c == ":"
            and depth == 0
            and ":" not in (body[at + 1], body[at - 1])
            and re.fullmatch(r"\s*[\w$.]+", text)
        ):
            yield began, text.strip() + ":"
            text = ""
        else:
            depth += {"{": 1, "}": -1}.get(c, 0)
            text += c


def _operands(text: str) -> list[str]:
    """Split at the commas outside of brackets."""
    parts, depth = [""], 0
    for c in text:
        depth += {"{": 1, "[": 1, "(": 1, "}": -1, "]": -1, ")": -1}.get(c, 0)
        if c == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += c
    return [p.strip() for p in parts if p.strip()]


def _identifier(name: str) -> str:
    return "p_" + re.sub(r"\W", "_", name)


def _unsigned(type_: str) -> str:
    return "bool" if type_ == "pred" else f"uint{8 * BYTES[type_]}_t"


def _integer(type_: str) -> str:
    return f"{'' if type_[0] == 's' else 'u'}int{8 * BYTES[type_]}_t"


def _vector(operand: str) -> list[str]:
    return [x.strip() for x in operand.strip()[1:-1].split(",")] if operand.startswith("{") else [operand]


class _Kernel:
    def __init__(self, name: str, text: str, head: str) -> None:
        self.entry = Entry(name)
        self.registers: dict[str, str] = {}
        self.memory: dict[str, str] = {}  # C++ of the address of a variable, in its space
        self.shared_bytes = 0
        self.lines: list[str] = []
        self.line = 0
        begin = text.index("{")
        self._parameters(text[:begin])
        for match in re.finditer(r"\.extern\s+\.shared\s+[^;]*?([\w$]+)\[\]\s*;", head):
            self.memory[match[1]] = "DYNAMIC"
        constants = self._constants(head)
        for self.line, statement in _statements(text[begin + 1 : -1]):
            self._statement(statement)
        shared = -(-self.shared_bytes // 128) * 128  # where dynamic memory may begin, whatever it is made of
        body = "\n".join(self.lines)
        self.entry.source = f"""#include "cuda_emulation/ptx.h"
namespace emulation::ptx {{
namespace {{
{constants}
constexpr uint32_t DYNAMIC = {shared};
void run(const Host& host, const unsigned char* parameters, char* shared, uint32_t shared_bytes) {{
const Thread t{{host, parameters, shared, shared_bytes}};
{body}
the_end:;
}}
}}  // namespace
extern "C" __attribute__((visibility("default"))) const Kernel dschat_ptx_kernel{{
    "{name}", run, {self.entry.parameter_bytes}, {shared}}};
}}  // namespace emulation::ptx
"""

    # ------------------------------------------------------------------------------------------ declarations

    def _parameters(self, head: str) -> None:
        pointer = r"(?:\.ptr\s+(?:\.(?:const|global|local|shared)\s+)?(?:\.align\s+\d+\s+)?)?"
        pattern = rf"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+{pointer}([\w$]+)(?:\[(\d+)\])?"
        at = 0
        for align, type_, name, count in re.findall(pattern, head):
            size = BYTES[type_] * int(count or 1)
            step = int(align or BYTES[type_])
            at = -(-at // step) * step
            self.entry.parameters.append((name, at, size))
            self.memory[name] = f"reinterpret_cast<uint64_t>(t.parameters + {at})"
            at += size
        self.entry.parameter_bytes = at

    def _constants(self, head: str) -> str:
        out = []
        value = r"(?:\s*=\s*(\{[^}]*\}|[^;]+))?;"
        pattern = rf"\.(?:global|const)\s+(?:\.align\s+\d+\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d*)\])?{value}"
        for type_, name, count, given in re.findall(pattern, head):
            values = given if given.startswith("{") else "{" + given + "}"
            out.append(f"alignas(16) {_unsigned(type_)} {_identifier(name)}[{count or 1}] = {values};")
            self.memory[name] = f"reinterpret_cast<uint64_t>({_identifier(name)})"
        return "\n".join(out)

    def _declaration(self, s: str) -> None:
        if m := re.match(r"\.reg \.(\w+) (.+)", s):
            for name in _operands(m[2]):
                r = re.fullmatch(r"(.+)<(\d+)>", name)
                names = [f"{r[1]}{i}" for i in range(int(r[2]))] if r else [name]
                self.registers.update(dict.fromkeys(names, m[1]))
                self.lines.append(f"{_unsigned(m[1])} " + ", ".join(map(_identifier, names)) + ";")
        elif m := re.match(r"\.shared (?:\.align (\d+) )?\.(\w+) ([\w$]+)(?:\[(\d+)\])?$", s):
            step = int(m[1] or BYTES[m[2]])
            self.shared_bytes = -(-self.shared_bytes // step) * step
            self.memory[m[3]] = f"{self.shared_bytes}u"
            self.shared_bytes += BYTES[m[2]] * int(m[4] or 1)
        elif m := re.match(r"\.local (?:\.align (\d+) )?\.(\w+) ([\w$]+)\[(\d+)\]$", s):
            self.lines.append(f"alignas(16) char {_identifier(m[3])}[{BYTES[m[2]] * int(m[4])}];")
            self.memory[m[3]] = f"reinterpret_cast<uint64_t>({_identifier(m[3])})"
        else:
            raise Untranslated(s[:80])

    # --------------------------------------------------------------------------------------------- operands

    def bits(self, operand: str, type_: str) -> str:
        """The unsigned integer that an operand is."""
        if operand in self.registers:
            return _identifier(operand)
        if operand[0] == "!":
            return f"(!{self.bits(operand[1:], type_)})"
        if m := re.fullmatch(r"(%\w+)\.([xyz])", operand):
            return f"t.host.{SPECIAL[m[1]]}->{m[2]}"
        if operand in LANES:
            return LANES[operand]
        if operand in self.memory:
            return f"uint64_t({self.memory[operand]})"
        if m := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})", operand):
            return f"of_f64(as_f32(0x{m[1]}u))" if type_ == "f64" else f"0x{m[1]}u"
        if m := re.fullmatch(r"0[dD]([0-9a-fA-F]{16})", operand):
            return f"uint64_t(0x{m[1]}ull)"
        if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", operand):
            return f"uint64_t({int(operand.rstrip('U'), 0) % 2**64}ull)"
        raise Untranslated(f"operand {operand}")

    def read(self, operand: str, type_: str) -> str:
        bits = self.bits(operand, type_)
        if type_ == "pred":
            return f"bool({bits})"
        return f"as_{type_}({bits})" if type_ in FLOATS else f"{_integer(type_)}({bits})"

    def write(self, register: str, type_: str, value: str) -> str:
        """register = value of a type; narrower signed ones extend their sign."""
        if register == "_":
            return f"(void)({value});"
        target = _unsigned(self.registers[register])
        if type_ in FLOATS:
            return f"{_identifier(register)} = {target}(of_{type_}({value}));"
        cast = "bool" if type_ == "pred" else _integer(type_)
        wide = f"int64_t({cast}({value}))" if type_[0] == "s" else f"{cast}({value})"
        return f"{_identifier(register)} = {target}({wide});"

    def address(self, operand: str, space: str, size: int, write: bool) -> str:
        """A char* for an access of `size` bytes, checked."""
        m = re.fullmatch(r"\[\s*([^\s+]+)\s*(?:\+\s*(-?\w+))?\s*\]", operand)
        if m is None:
            raise Untranslated(f"address {operand}")
        at = f"({self.bits(m[1], 'b64')} + int64_t({int(m[2] or '0', 0)}))"
        if space == "shared":
            place = f"t.in_shared(uint32_t{at}, {size})"
        else:
            place = f"reinterpret_cast<char*>(uint64_t{at})"
        if space in ("local", "param"):
            return place
        return f"t.checked({place}, {size}, {str(write).lower()}, {self.line})"

    # ------------------------------------------------------------------------------------------- statements

    def _statement(self, s: str) -> None:
        if s in ("{", "}"):
            self.lines.append(s)
        elif not s:
            pass
        elif s.endswith(":"):
            self.lines.append(f"{_identifier(s[:-1])}:;")
        elif s.startswith("."):
            self._declaration(s)
        else:
            guard = ""
            if s.startswith("@"):
                predicate, s = s[1:].split(None, 1)
                guard = f"if ({self.bits(predicate, 'pred')}) "
            name, _, rest = s.partition(" ")
            try:
                code = self._instruction(name.split("."), _operands(rest))
            except (KeyError, IndexError, StopIteration, ValueError):
                code = ""
            if not code:
                raise Untranslated(f"the instruction {s}")
            self.lines.append(f"{guard}{{ {code} }}")

    def _instruction(self, parts: list[str], o: list[str]) -> str:
        name, mods = parts[0], [m for m in parts[1:] if m not in PLAIN]
        if name in IGNORED:
            return ";"
        method: Callable[[list[str], list[str]], str] | None = getattr(self, f"_{name}_", None)
        if method is not None:
            return method(mods, o)
        return self._arithmetic(name, mods, o)

    # control

    def _bra_(self, mods: list[str], o: list[str]) -> str:
        return f"goto {_identifier(o[0])};"

    def _ret_(self, mods: list[str], o: list[str]) -> str:
        return "goto the_end;"

    _exit_ = _ret_

    def _trap_(self, mods: list[str], o: list[str]) -> str:
        return f't.host.stop("trap in line {self.line} of the PTX");'

    def _bar_(self, mods: list[str], o: list[str]) -> str:
        if mods == ["warp"]:
            return f"t.host.sync_warp(uint32_t({self.bits(o[0], 'b32')}));"
        return "t.host.barrier();" if mods in ([], ["cta"]) and o == ["0"] else ""

    _barrier_ = _bar_

    # moves

    def _mov_(self, mods: list[str], o: list[str]) -> str:
        [type_] = mods
        if o[0].startswith("{"):
            names = _vector(o[0])
            width = 8 * BYTES[type_] // len(names)
            code = f"const uint64_t x = {self.bits(o[1], type_)};"
            return code + "".join(
                f" {_identifier(n)} = uint{width}_t(x >> {width * i});"
                for i, n in enumerate(names)
                if n != "_"
            )
        if o[1].startswith("{"):
            names = _vector(o[1])
            width, whole = 8 * BYTES[type_] // len(names), _unsigned(type_)
            parts = (
                f"{whole}(uint{width}_t({self.bits(n, type_)})) << {width * i}" for i, n in enumerate(names)
            )
            return f"{_identifier(o[0])} = {whole}(" + " | ".join(parts) + ");"
        return f"{_identifier(o[0])} = {_unsigned(type_)}({self.bits(o[1], type_)});"

    def _cvta_(self, mods: list[str], o: list[str]) -> str:
        """Addresses of shared memory are offsets, generic ones pointers; the other spaces need no conversion."""
        [*to, space, _] = mods
        shift = "" if space in ("global", "local", "param", "const") else "-" if to else "+"
        if to not in ([], ["to"]) or (shift and space != "shared"):
            return ""
        base = f" {shift} reinterpret_cast<uint64_t>(t.shared)" if shift else ""
        return f"{_identifier(o[0])} = {self.bits(o[1], 'b64')}{base};"

    SPACES = ("param", "shared", "shared::cta", "local", "const", "global")

    def _space(self, mods: list[str]) -> tuple[str, int]:
        """The address space, and how many elements an access has; both are taken out of `mods`."""
        space = next((m for m in mods if m in self.SPACES), "generic")
        count = next((int(m[1:]) for m in mods if m in ("v2", "v4", "v8")), 1)
        rest = [m for m in mods[:-1] if m != space and m != f"v{count}"]
        if rest:
            raise ValueError(rest)
        return space.removesuffix("::cta"), count

    def _ld_(self, mods: list[str], o: list[str]) -> str:
        space, count = self._space(mods)
        names, type_ = _vector(o[0]), mods[-1]
        if len(o) > 2 or len(names) != count:
            return ""
        stored = f"b{8 * BYTES[type_]}" if type_ in FLOATS else type_
        code = f"const auto* p = {self.address(o[1], space, count * BYTES[type_], False)};"
        for i, n in enumerate(names):
            code += " " + self.write(n, stored, f"load<{_integer(stored)}>(p + {i * BYTES[type_]})")
        return code

    def _st_(self, mods: list[str], o: list[str]) -> str:
        space, count = self._space(mods)
        values, type_ = _vector(o[1]), mods[-1]
        if len(o) > 2 or len(values) != count:
            return ""
        code = f"auto* p = {self.address(o[0], space, count * BYTES[type_], True)};"
        for i, v in enumerate(values):
            code += f" store(p + {i * BYTES[type_]}, {_unsigned(type_)}({self.bits(v, type_)}));"
        return code

    def _atom_(self, mods: list[str], o: list[str]) -> str:
        """Only one thread runs at a time, so reading and writing is atomic."""
        operation, type_ = mods[-2], mods[-1]
        space = next((m for m in mods if m in self.SPACES), "generic").removesuffix("::cta")
        if type_ not in ("u32", "s32", "b32", "f32", "u64", "s64", "b64", "f64"):
            return ""
        result = {
            "add": "x + b", "min": "b < x ? b : x", "max": "x < b ? b : x", "exch": "b", "and": "x & b", "or": "x | b",
            "xor": "x ^ b", "cas": f"x == b ? {self.read(o[3], type_) if len(o) > 3 else 0} : x",
        }[operation]  # fmt: skip
        code = f"auto* p = {self.address(o[1], space, BYTES[type_], True)}; "
        unsigned = _unsigned(type_)
        wrap = f"as_{type_}(load<{unsigned}>(p))" if type_ in FLOATS else f"load<{_integer(type_)}>(p)"
        back = f"of_{type_}({result})" if type_ in FLOATS else f"{unsigned}({result})"
        code += (
            f"const auto x = {wrap}; const auto b = {self.read(o[2], type_)}; store(p, {unsigned}({back})); "
        )
        return code + ("" if o[0] == "_" else self.write(o[0], type_, "x"))

    def _red_(self, mods: list[str], o: list[str]) -> str:
        return self._atom_(mods, ["_", *o])

    def _cp_(self, mods: list[str], o: list[str]) -> str:
        if mods[:1] != ["async"]:
            return ""
        if mods[1] == "commit_group":
            return "t.host.copy_commit();"
        if mods[1] == "wait_group":
            return f"t.host.copy_wait({int(o[0])});"
        if mods[1] == "wait_all":
            return "t.host.copy_commit(); t.host.copy_wait(0);"
        if mods[1:] != ["shared", "global"]:
            return ""
        size = int(o[2], 0)
        valid = f"int(uint32_t({self.bits(o[3], 'b32')}))" if len(o) > 3 else str(size)
        m = re.fullmatch(r"\[\s*([^\s+]+)\s*(?:\+\s*(-?\w+))?\s*\]", o[0])
        n = re.fullmatch(r"\[\s*([^\s+]+)\s*(?:\+\s*(-?\w+))?\s*\]", o[1])
        if m is None or n is None or len(o) > 4:
            return ""
        to = f"t.in_shared(uint32_t({self.bits(m[1], 'b64')} + int64_t({int(m[2] or '0', 0)})), {size})"
        source = f"reinterpret_cast<const char*>(uint64_t({self.bits(n[1], 'b64')} + int64_t({int(n[2] or '0', 0)})))"
        return f"t.host.copy_async({to}, {source}, {size}, {valid});"

    # warps and matrices

    def _shfl_(self, mods: list[str], o: list[str]) -> str:
        kind = {"up": "up", "down": "down", "bfly": "butterfly", "idx": "index"}[mods[0]]
        target, _, inside = o[0].partition("|")
        arguments = ", ".join(f"uint32_t({self.bits(x, 'b32')})" for x in o[1:5])
        code = f"bool inside; const uint32_t x = t.host.shuffle(Shuffle::{kind}, {arguments}, &inside); "
        return code + f"{_identifier(target)} = x;" + (f" {_identifier(inside)} = inside;" if inside else "")

    def _vote_(self, mods: list[str], o: list[str]) -> str:
        result = {"ballot": "votes", "any": "votes != 0", "all": "votes == mask"}[mods[0]]
        mask = f"const uint32_t mask = uint32_t({self.bits(o[2], 'b32')}), "
        return (
            mask + f"votes = t.host.ballot(mask, {self.read(o[1], 'pred')}); {_identifier(o[0])} = {result};"
        )

    def _redux_(self, mods: list[str], o: list[str]) -> str:
        kind = {"and": "bit_and", "or": "bit_or", "xor": "bit_xor"}.get(mods[0], mods[0])
        if kind not in ("add", "min", "max", "bit_and", "bit_or", "bit_xor") or mods[1] not in (
            "u32",
            "s32",
            "b32",
        ):
            return ""
        signed = str(mods[1] == "s32").lower()
        values = ", ".join(f"uint32_t({self.bits(x, 'b32')})" for x in o[1:])
        return f"{_identifier(o[0])} = t.host.reduce(Reduction::{kind}, {signed}, {values});"

    def _matrix(self, call: str, mods: list[str], row: str, names: list[str]) -> str:
        count = int(next(m for m in mods if m in ("x1", "x2", "x4"))[1])
        if set(mods) - {"m8n8", f"x{count}", "trans", "shared", "shared::cta", "b16"} or len(names) != count:
            return ""
        m = re.fullmatch(r"\[\s*([^\s+]+)\s*(?:\+\s*(-?\w+))?\s*\]", row)
        if m is None:
            return ""
        at = f"t.in_shared(uint32_t({self.bits(m[1], 'b64')} + int64_t({int(m[2] or '0', 0)})), 16)"
        return f"t.host.{call}(r, {at}, {count}, {str('trans' in mods).lower()});"

    def _ldmatrix_(self, mods: list[str], o: list[str]) -> str:
        names = _vector(o[0])
        code = self._matrix("load_matrix", mods, o[1], names)
        return code and f"uint32_t r[4]; {code}" + "".join(
            f" {_identifier(n)} = r[{i}];" for i, n in enumerate(names)
        )

    def _stmatrix_(self, mods: list[str], o: list[str]) -> str:
        values = _vector(o[1])
        given = ", ".join(f"uint32_t({self.bits(v, 'b32')})" for v in values)
        code = self._matrix("store_matrix", mods, o[0], values)
        return code and f"const uint32_t r[4] = {{{given}}}; {code}"

    def _mma_(self, mods: list[str], o: list[str]) -> str:
        shape, *types = (m for m in mods if m not in ("row", "col"))
        depth = int(shape.removeprefix("m16n8k"))
        kind = {"f16": "float16", "bf16": "bfloat16", "tf32": "tfloat32"}[types[1]]
        if types != ["f32", types[1], types[1], "f32"] or depth not in (
            (4, 8) if kind == "tfloat32" else (8, 16)
        ):
            return ""
        d, a, b, c = map(_vector, o)
        arrays = "".join(
            f"const uint32_t {name}[] = {{{', '.join(self.read(v, 'b32') for v in values)}}}; "
            for name, values in (("a", a), ("b", b))
        )
        code = f"float d[] = {{{', '.join(self.read(v, 'f32') for v in c)}}}; "
        code += f"t.host.mma(Element::{kind}, {depth}, d, a, b);"
        return arrays + code + "".join(" " + self.write(n, "f32", f"d[{i}]") for i, n in enumerate(d))

    # comparisons and selections

    def _setp_(self, mods: list[str], o: list[str]) -> str:
        comparison, type_ = mods[0], mods[-1]
        a, b = self.read(o[1], type_), self.read(o[2], type_)
        result = self._compared(comparison, type_)
        combined = [m for m in mods[1:-1] if m in ("and", "or", "xor")]
        if len(mods) != 2 + len(combined):
            return ""
        code = f"const auto a = {a}; const auto b = {b}; const bool r = {result}; "
        yes, no = "r", "!r"
        if combined:
            code += f"const bool q = {self.read(o[3], 'pred')}; "
            operator = {"and": "&&", "or": "||", "xor": "!="}[combined[0]]
            yes, no = f"r {operator} q", f"(!r) {operator} q"
        target, _, other = o[0].partition("|")
        return code + f"{_identifier(target)} = {yes};" + (f" {_identifier(other)} = {no};" if other else "")

    def _compared(self, comparison: str, type_: str) -> str:
        """C++ over a and b; with NaNs the ordered comparisons are false and the others (...u) true."""
        either = "(a != a || b != b)"
        if comparison == "num":
            return f"!{either}"
        if comparison == "nan":
            return either
        if type_ in FLOATS and comparison not in COMPARISONS and comparison[-1] == "u":
            return f"{either} || a {COMPARISONS[comparison[:-1]]} b"
        plain = f"a {COMPARISONS[comparison]} b"
        return f"!{either} && {plain}" if type_ in FLOATS and comparison == "ne" else plain

    def _selp_(self, mods: list[str], o: list[str]) -> str:
        whole = _unsigned(mods[-1])
        yes, no = (f"{whole}({self.bits(x, mods[-1])})" for x in o[1:3])
        return f"{_identifier(o[0])} = {self.read(o[3], 'pred')} ? {yes} : {no};"

    # bits

    def _logic(self, operator: str, mods: list[str], o: list[str]) -> str:
        a, b = (self.read(x, mods[-1]) for x in o[1:])
        return self.write(o[0], mods[-1], f"{a} {operator} {b}")

    def _and_(self, mods: list[str], o: list[str]) -> str:
        return self._logic("&", mods, o)

    def _or_(self, mods: list[str], o: list[str]) -> str:
        return self._logic("|", mods, o)

    def _xor_(self, mods: list[str], o: list[str]) -> str:
        return self._logic("^", mods, o)

    def _not_(self, mods: list[str], o: list[str]) -> str:
        operator = "!" if mods[-1] == "pred" else "~"
        return self.write(o[0], mods[-1], f"{operator}{self.read(o[1], mods[-1])}")

    def _shl_(self, mods: list[str], o: list[str]) -> str:
        value = f"shift_left({self.read(o[1], mods[-1])}, uint32_t({self.bits(o[2], 'u32')}))"
        return self.write(o[0], mods[-1], value)

    def _shr_(self, mods: list[str], o: list[str]) -> str:
        return self._shl_(mods, o).replace("shift_left", "shift_right")

    def _shf_(self, mods: list[str], o: list[str]) -> str:
        side, limit = (
            {"l": "left", "r": "right"}[mods[0]],
            {"wrap": "by & 31", "clamp": "by > 32 ? 32 : by"}[mods[1]],
        )
        low, high, by = (f"uint32_t({self.bits(x, 'b32')})" for x in o[1:])
        return f"const uint32_t by = {by}; {_identifier(o[0])} = funnel_{side}({low}, {high}, {limit});"

    def _lop3_(self, mods: list[str], o: list[str]) -> str:
        a, b, c = (f"uint32_t({self.bits(x, 'b32')})" for x in o[1:4])
        return f"{_identifier(o[0])} = lop3({a}, {b}, {c}, {int(o[4], 0)});" if mods == ["b32"] else ""

    def _prmt_(self, mods: list[str], o: list[str]) -> str:
        values = ", ".join(f"uint32_t({self.bits(x, 'b32')})" for x in o[1:])
        return f"{_identifier(o[0])} = permute({values});" if mods == ["b32"] else ""

    def _bfe_(self, mods: list[str], o: list[str]) -> str:
        at, count = (f"uint32_t({self.bits(x, 'b32')})" for x in o[2:])
        return self.write(o[0], mods[-1], f"extract_bits({self.read(o[1], mods[-1])}, {at}, {count})")

    def _bfi_(self, mods: list[str], o: list[str]) -> str:
        a, b = (self.read(x, mods[-1]) for x in o[1:3])
        at, count = (f"uint32_t({self.bits(x, 'b32')})" for x in o[3:])
        return self.write(o[0], mods[-1], f"insert_bits({a}, {b}, {at}, {count})")

    def _popc_(self, mods: list[str], o: list[str]) -> str:
        return f"{_identifier(o[0])} = uint32_t(__builtin_popcountll({self.read(o[1], mods[-1])}));"

    def _clz_(self, mods: list[str], o: list[str]) -> str:
        width = 8 * BYTES[mods[-1]]
        count = f"uint32_t(__builtin_clzll(x)) - {64 - width}"
        return f"const uint64_t x = {self.read(o[1], mods[-1])}; {_identifier(o[0])} = x ? {count} : {width};"

    def _brev_(self, mods: list[str], o: list[str]) -> str:
        loop = "for (int i = 0; i < 32; ++i) r |= (x >> i & 1u) << (31 - i);"
        code = f"const uint32_t x = {self.read(o[1], 'b32')}; uint32_t r = 0; {loop} {_identifier(o[0])} = r;"
        return code if mods == ["b32"] else ""

    # conversions

    WHOLE = {"rni": "nearbyint", "rzi": "trunc", "rmi": "floor", "rpi": "ceil"}

    def _cvt_(self, mods: list[str], o: list[str]) -> str:
        types, rest = [m for m in mods if m in BYTES], [m for m in mods if m not in BYTES]
        to, source = types
        if to in ("f16x2", "bf16x2"):
            if rest not in ([], ["relu"]) or source != "f32":
                return ""
            high, low = (
                f"std::fmax({self.read(x, 'f32')}, 0.0f)" if rest else self.read(x, "f32") for x in o[1:]
            )
            of = f"of_{to[:-2]}"
            return f"{_identifier(o[0])} = uint32_t({of}({high})) << 16 | {of}({low});"
        if to == "tf32":
            return (
                f"{_identifier(o[0])} = uint32_t({self.bits(o[1], 'b32')}) + 0x1000u & 0xffffe000u;"
                if rest == ["rna"]
                else ""
            )
        value = self.read(o[1], source)
        if source in FLOATS and to in FLOATS:
            for m in rest:
                value = f"saturated({value})" if m == "sat" else f"std::{self.WHOLE[m]}({value})"
            narrow = f"float({value})" if to != "f64" else f"double({value})"
            return self.write(o[0], to, narrow)
        if source in FLOATS:
            [rounding] = (m for m in rest if m != "sat")  # integers saturate anyway
            return self.write(
                o[0], to, f"to_integer<{_integer(to)}>(std::{self.WHOLE[rounding]}(double({value})))"
            )
        if rest:
            return ""
        return self.write(
            o[0], to, f"{'double' if to == 'f64' else 'float'}({value})" if to in FLOATS else value
        )

    # arithmetic

    FLOAT_RESULTS = {
        "add": "{0} + {1}", "sub": "{0} - {1}", "mul": "{0} * {1}", "fma": "std::fma({0}, {1}, {2})",
        "mad": "std::fma({0}, {1}, {2})", "div": "{0} / {1}", "neg": "-{0}", "abs": "std::fabs({0})",
        "min": "lesser({0}, {1})",
        "max": "greater({0}, {1})", "rcp": "1 / {0}", "sqrt": "std::sqrt({0})", "rsqrt": "1 / std::sqrt({0})",
        "sin": "std::sin({0})", "cos": "std::cos({0})", "lg2": "std::log2({0})", "ex2": "std::exp2({0})",
        "tanh": "std::tanh({0})", "copysign": "std::copysign({1}, {0})",
    }  # fmt: skip
    # Through unsigned numbers, which wrap around.
    INTEGER_RESULTS = {
        "add": "U({0}) + U({1})", "sub": "U({0}) - U({1})", "mul": "U({0}) * U({1})",
        "mad": "U({0}) * U({1}) + U({2})", "neg": "U(0) - U({0})", "abs": "{0} < 0 ? U(0) - U({0}) : U({0})",
        "min": "{0} < {1} ? {0} : {1}", "max": "{0} < {1} ? {1} : {0}", "div": "quotient({0}, {1})",
        "rem": "remainder({0}, {1})",
    }  # fmt: skip

    def _arithmetic(self, name: str, mods: list[str], o: list[str]) -> str:
        type_, rest = mods[-1], mods[:-1]
        if type_ in ("f16x2", "bf16x2"):
            return "" if rest else self._halves(name, type_[:-2], o)
        if type_ == "f32x2":
            return "" if rest else self._pairs(name, o)
        if rest == ["f32"] and type_ in ("f16", "bf16"):
            return self._mixed(name, type_, o)
        values = [self.read(x, type_) for x in o[1:]]
        if type_ in FLOATS:
            if rest == ["rm"] and name in ("fma", "mad") and type_ == "f32":
                return self.write(o[0], type_, f"fma_down({', '.join(values)})")
            if name in ("min", "max"):
                pick = {"min": "lesser", "max": "greater"}[name] + "_nan" * ("NaN" in rest)
                result = functools.reduce(lambda x, y: f"{pick}({x}, {y})", values)
            else:
                result = self.FLOAT_RESULTS[name].format(*values)
            if set(rest) - {"sat", "NaN"} or (name == "div" and type_ not in ("f32", "f64")):
                return ""
            return self.write(o[0], type_, f"saturated({result})" if "sat" in rest else result)
        if rest == ["wide"] and name in ("mul", "mad"):
            wide = type_[0] + str(16 * BYTES[type_])
            product = f"{_integer(wide)}({values[0]}) * {_integer(wide)}({values[1]})"
            if name == "mul":
                return self.write(o[0], wide, product)
            return self.write(
                o[0], wide, f"{_unsigned(wide)}({product}) + {_unsigned(wide)}({self.read(o[3], wide)})"
            )
        if rest == ["lo"] and name in ("mul", "mad"):
            rest = []
        if rest == ["hi"] and name == "mul":
            return self.write(o[0], type_, f"high_product({values[0]}, {values[1]})")
        if rest:
            return ""
        return f"using U = {_unsigned(type_)}; " + self.write(
            o[0], type_, self.INTEGER_RESULTS[name].format(*values)
        )

    def _mixed(self, name: str, half: str, o: list[str]) -> str:
        """sm_100's sums in float32, whose operands but the last are halves."""
        if name not in ("add", "sub", "fma"):
            return ""
        values = [*(self.read(x, half) for x in o[1:-1]), self.read(o[-1], "f32")]
        return self.write(o[0], "f32", self.FLOAT_RESULTS[name].format(*values))

    def _halves(self, name: str, half: str, o: list[str]) -> str:
        given = ", ".join(f"uint32_t({self.bits(x, 'b32')})" for x in o[1:])
        result = self.FLOAT_RESULTS[name].format(*(f"as_{half}({v})" for v in "abc"))
        f = f"[](uint16_t a, uint16_t b, uint16_t c) {{ (void)b, (void)c; return of_{half}({result}); }}"
        return f"{_identifier(o[0])} = both({f}, {given});"

    def _pairs(self, name: str, o: list[str]) -> str:
        values = [f"uint64_t({self.bits(x, 'b64')})" for x in o[1:]]
        low, high = (
            self.FLOAT_RESULTS[name].format(*(f"as_f32({v} >> {by})" for v in values)) for by in (0, 32)
        )
        return f"{_identifier(o[0])} = uint64_t(of_f32({high})) << 32 | of_f32({low});"

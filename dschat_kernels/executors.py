"""Who walks a plan: one step of a decoder, from the tables of its tokens and rows to its last output.

`NativeExecutor` hands the whole list to the CPU kernels, which run a step in one parallel region; `PythonExecutor`
calls the ops one by one, on any backend and device. Both can report every call (`Trace`), which is how a divergence is
found, and both give the same bits on the cpu backend. What they read of their decoder: the plan, its packs, norms and
tables.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .cache import PagedKVCache
from .ops._common import ACTIVATIONS, implementation, native, ptr
from .ops.attention import attention
from .ops.linear import linear
from .ops.rope_append import rope_append
from .ops.sample import sample
from .packing import DTYPES, WEIGHTS

if TYPE_CHECKING:
    from .plan import Decoder, OpCall

Trace = Callable[["OpCall", Tensor], None]
"""Called with every call of the plan and its output, which the next step overwrites."""


@dataclass
class StepTables:
    """The token and row tables of one step (int32 but for ids): what varies while the plan stays."""

    token_ids: np.ndarray
    positions: np.ndarray
    slot_of_token: np.ndarray
    cu_seqlens: np.ndarray
    kv_lens: np.ndarray
    slots: np.ndarray
    selected: np.ndarray

    def on(self, device: torch.device) -> StepTensors:
        """The same on a device, in one copy for each width of integers."""
        short = [self.positions, self.slot_of_token, self.cu_seqlens, self.kv_lens, self.slots]
        positions, slot_of_token, cu_seqlens, kv_lens, slots = _tensors(short, device)
        token_ids, selected = _tensors([self.token_ids, self.selected], device)
        decode = len(self.token_ids) == len(self.slots)
        return StepTensors(token_ids, positions, slot_of_token, cu_seqlens, kv_lens, slots, selected, decode)


@dataclass(frozen=True)
class StepTensors:
    """The tables of a step on the decoder's device. decode: every row has one token."""

    token_ids: Tensor
    positions: Tensor
    slot_of_token: Tensor
    cu_seqlens: Tensor
    kv_lens: Tensor
    slots: Tensor
    selected: Tensor
    decode: bool


@dataclass(frozen=True)
class Draw:
    """How rows draw their next tokens: the arguments of `ops.sample`, on the CPU."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    streams: Tensor | None = None
    positions: Tensor | None = None

    def sample(self, logits: Tensor, backend: str | None) -> tuple[Tensor, Tensor]:
        """Tokens and log-probs of one step's logits, on the CPU."""
        streams, positions = (
            None if t is None else t.to(logits.device) for t in (self.streams, self.positions)
        )
        on_device = replace(self, streams=streams, positions=positions)
        tokens, log_probs = sample(logits, **vars(on_device), backend=backend)
        return tokens.cpu(), log_probs.cpu()


@dataclass(frozen=True)
class Drawn:
    """Tokens int64 [steps, rows] and their log-probs float32 [steps, rows] on the CPU, and the seconds of sampling."""

    tokens: Tensor
    log_probs: Tensor
    sampling: float


def _tensors(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """Vectors of one dtype on `device`: parts of one copy, each at a multiple of 16 bytes, as kernels want it."""
    if device.type == "cpu":
        return [torch.from_numpy(a) for a in arrays]
    places = np.cumsum([0] + [-(-len(a) // 4) * 4 for a in arrays])
    together = np.zeros(places[-1], dtype=arrays[0].dtype)
    for a, place in zip(arrays, places.tolist(), strict=False):
        together[place : place + len(a)] = a
    moved = torch.from_numpy(together).to(device)
    return [moved[place : place + len(a)] for a, place in zip(arrays, places.tolist(), strict=False)]


class _Executor:
    """A decoder's way over its plan. The decoder holds it, and is not held by it: packs are gigabytes, and go with the
    last reference to their decoder, not some time later with a cycle of references."""

    def __init__(self, decoder: Decoder, trace: Trace | None = None):
        self._decoder = weakref.ref(decoder)
        self.trace = trace

    @property
    def decoder(self) -> Decoder:
        decoder = self._decoder()
        assert decoder is not None, "whoever walks a plan holds its decoder"
        return decoder


class NativeExecutor(_Executor):
    """Walks the plan in one call of the CPU kernels.

    With `trace` every call runs by itself and is reported with its output, which changes no bits.
    """

    def __init__(self, decoder: Decoder, trace: Trace | None = None):
        super().__init__(decoder, trace)
        self.names = list(decoder.plan.widths)
        self.buffers: dict[str, Tensor] = {}
        self.plan: Any = None
        self.capacity = {"tokens": 0, "selected": 0}

    def rebind(self) -> None:
        """Pointers changed: build the native plan anew before the next step."""
        self.plan = None

    def run(self, t: StepTables, cache: PagedKVCache, keep: bool = True) -> Tensor:
        """The last output of the plan, float32 logits [selected, vocab] where the model has a head. Without `keep`
        it is the buffer itself, which the next run overwrites: a copy's fresh pages cost more than sampling it."""
        self._reserve(len(t.token_ids), len(t.selected))
        calls = self.decoder.plan.calls
        if self.trace is not None:
            self._run_traced(t, cache)
        else:
            if self.plan is None:
                self.plan = self._build(calls)
            self._execute(self.plan, len(t.token_ids), t, cache)
        out = self.buffers[calls[-1].out][: len(t.selected)]
        return out.clone() if keep else out

    def _run_traced(self, t: StepTables, cache: PagedKVCache) -> None:
        assert self.trace is not None
        rows = len(t.token_ids)
        for call in self.decoder.plan.calls:
            self._execute(self._build([call]), rows, t, cache)
            if call.op == "select_rows":
                rows = len(t.selected)
            self.trace(call, self.buffers[call.out][:rows])

    def decode(
        self, t: StepTables, cache: PagedKVCache, draw: Draw, steps: int, ends: Sequence[int]
    ) -> Drawn:
        """See `Decoder.decode`; t: of the first step."""
        rows = len(t.slots)
        self._reserve(rows, rows)
        if self.plan is None:
            self.plan = self._build(self.decoder.plan.calls)
        vocab = self.decoder.plan.widths[self.decoder.plan.calls[-1].out]
        tokens = torch.empty(steps, rows, dtype=torch.int64, device="cpu")
        log_probs = torch.empty(steps, rows, dtype=torch.float32, device="cpu")
        streams, positions = (None if n is None else n.contiguous() for n in (draw.streams, draw.positions))
        if positions is None:
            positions = torch.zeros(rows, dtype=torch.int64, device="cpu")
        done, sampling = self.plan.decode(
            self._inputs(rows, t, cache), steps, vocab, draw.temperature, draw.top_k, draw.top_p, draw.min_p,
            draw.seed, ptr(streams), ptr(positions), list(ends), ptr(tokens), ptr(log_probs),
        )  # fmt: skip
        return Drawn(tokens[:done], log_probs[:done], sampling)

    def _execute(self, plan: Any, rows: int, t: StepTables, cache: PagedKVCache) -> None:
        plan.run(self._inputs(rows, t, cache), -1)

    @staticmethod
    def _inputs(rows: int, t: StepTables, cache: PagedKVCache) -> tuple[int, ...]:
        """What the native plan reads of a step (csrc/bindings/decoder.h: Tables)."""
        table = cache.block_table
        return (
            rows, len(t.slots), t.token_ids.ctypes.data, t.positions.ctypes.data, t.slot_of_token.ctypes.data,
            t.cu_seqlens.ctypes.data, t.kv_lens.ctypes.data, t.slots.ctypes.data, ptr(table), table.stride(0),
            ptr(cache.k), ptr(cache.v), cache.k.stride(0) * cache.k.element_size(),
            cache.v.stride(0) * cache.v.element_size(), cache.dtype == torch.int8,
            len(t.selected), t.selected.ctypes.data,
        )  # fmt: skip

    def _reserve(self, tokens: int, selected: int) -> None:
        if tokens <= self.capacity["tokens"] and selected <= self.capacity["selected"]:
            return
        tokens, selected = max(tokens, self.capacity["tokens"]), max(selected, self.capacity["selected"])
        self.plan = None  # before a buffer goes that it points to
        for name, width in self.decoder.plan.widths.items():
            rows = max(1, selected if name in ("sel", "projected", "logits") else tokens)
            dtype = torch.float32 if name == "logits" else self.decoder.dtype
            if name not in self.buffers or self.buffers[name].shape[0] < rows:
                self.buffers[name] = torch.zeros(rows, width, dtype=dtype, device="cpu")
        self.capacity = {"tokens": tokens, "selected": selected}  # once all are that large

    def _build(self, calls: Sequence[OpCall]) -> Any:
        d, spec = self.decoder, self.decoder.spec
        module: Any = native()
        plan = module.StepPlan(DTYPES[d.dtype], spec.num_heads, spec.num_kv_heads, spec.head_dim)
        index = {name: i for i, name in enumerate(self.names)}
        for name, i in index.items():
            plan.set_buffer(i, ptr(self.buffers[name]), self.buffers[name].stride(0))
        for call in calls:
            self._add(plan, call, index)
        return plan

    def _add(self, plan: Any, c: OpCall, index: dict[str, int]) -> None:
        d, spec = self.decoder, self.decoder.spec
        if c.op == "embed":
            plan.embed(index[c.out], ptr(d.embed_table), d.embed_table.shape[1])
        elif c.op == "add_positions":
            table = d.position_table
            plan.add_positions(index[c.out], ptr(table), table.shape[1], spec.position_offset)
        elif c.op == "norm":
            n = d.norms[c.weights]
            plan.norm(
                n.spec.kind == "rms", index[c.input], index[c.out], ptr(n.scale), ptr(n.shift), n.width,
                n.spec.eps, 0 if n.spec.rounding == "llama" else 1,
            )  # fmt: skip
        elif c.op == "linear":
            p = d.packed(c.weights)
            plan.linear(
                index[c.input], index[c.out], index[c.residual] if c.residual else -1,
                WEIGHTS.index(p.weights), ptr(p.panels), ptr(p.scales), ptr(p.bias), p.n, p.k, p.gated,
                ACTIVATIONS[c.activation], c.out == "logits",
            )  # fmt: skip
        elif c.op == "scale":
            plan.scale(index[c.input], index[c.out], d.plan.widths[c.out], factor(d, c))
        elif c.op == "add":
            plan.add(index[c.input], index[c.out], index[c.residual], d.plan.widths[c.out], c.scale)
        elif c.op == "softcap":
            plan.softcap(index[c.out], d.plan.widths[c.out], c.scale)
        elif c.op == "head_norm":
            n = d.norms[c.weights]
            plan.head_norm(
                n.spec.kind == "rms", index[c.out], c.column, n.spec.groups, ptr(n.scale), ptr(n.shift), n.stride,
                n.width, n.spec.eps, 0 if n.spec.rounding == "llama" else 1,
            )  # fmt: skip
        elif c.op == "rope_append":
            rope = spec.layers[c.layer].rope
            cos, sin = d.rope_of(c.layer) or (None, None)
            rotary_dim, interleaved = (rope.rotary_dim, rope.style == "interleaved") if rope else (0, False)
            plan.rope_append(index[c.input], c.layer, ptr(cos), ptr(sin), rotary_dim, interleaved)
        elif c.op == "attention":
            layer = spec.layers[c.layer]
            plan.attention(
                index[c.input], index[c.out], c.layer, layer.scale, layer.window or 0, spec.attn_softcap or 0.0,
                ptr(d.alibi),
            )  # fmt: skip
        else:
            plan.select_rows(index[c.input], index[c.out], d.plan.widths[c.out])


class PythonExecutor(_Executor):
    """Walks the plan op by op on the decoder's backend and device. `trace` receives every call and its output.

    On the triton and cuda backends the ops over the cache are called without their own checks, which would wait for
    the GPU at every call: `Decoder.step` has checked the same tables on the CPU.
    """

    def __init__(self, decoder: Decoder, trace: Trace | None = None):
        super().__init__(decoder, trace)
        self.checked = decoder.backend in ("reference", "cpu")

    def rebind(self) -> None:
        """Nothing is bound: tensors are looked up at every call."""

    def run(self, t: StepTables, cache: PagedKVCache, keep: bool = True) -> Tensor:
        """The last output of the plan, float32 logits [selected, vocab] where the model has a head. Nothing is
        overwritten, `keep` or not."""
        cache.sync()
        return self.walk(t.on(self.decoder.device), cache)

    @torch.no_grad()
    def walk(self, t: StepTensors, cache: PagedKVCache) -> Tensor:
        """`run` on tables that are there already, with a cache that is in sync."""
        buffers: dict[str, Tensor] = {}
        for call in self.decoder.plan.calls:
            buffers[call.out] = self.execute(call, buffers, t, cache)
            if self.trace is not None:
                self.trace(call, buffers[call.out])
        return buffers[self.decoder.plan.calls[-1].out]

    def execute(
        self, c: OpCall, buffers: Mapping[str, Tensor], t: StepTensors, cache: PagedKVCache
    ) -> Tensor:
        """The output of one call; `buffers` hold its inputs and stay as they are."""
        d, spec, backend = self.decoder, self.decoder.spec, self.decoder.backend
        if c.op == "embed":
            return d.embed_table[t.token_ids]
        x = buffers[c.input]
        if c.op == "add_positions":
            return x + d.position_table[t.positions.long() + spec.position_offset]
        if c.op == "select_rows":
            return x[t.selected]
        if c.op == "norm":
            return d.norms[c.weights].apply(x, backend)
        if c.op == "scale":
            return x * factor(d, c)
        if c.op == "add":
            return buffers[c.residual] + x * c.scale
        if c.op == "softcap":
            return softcap(x, c.scale, backend)
        if c.op == "head_norm":
            norm = d.norms[c.weights]
            end = c.column + norm.spec.groups * norm.width
            y = norm.apply(x[:, c.column : end], backend)
            return torch.cat([x[:, : c.column], y, x[:, end:]], dim=1)
        if c.op == "linear":
            return linear(
                x, d.packed(c.weights), activation=c.activation,
                residual=buffers[c.residual] if c.residual else None, float_output=c.out == "logits",
                backend=backend,
            )  # fmt: skip
        if c.op == "rope_append":
            return self._rope_append(c, x, t, cache)
        return self._attention(c, x, t, cache)

    def _attention(self, c: OpCall, x: Tensor, t: StepTensors, cache: PagedKVCache) -> Tensor:
        d, spec = self.decoder, self.decoder.spec
        layer, dim = spec.layers[c.layer], spec.head_dim
        q = x[:, : spec.num_heads * dim].reshape(-1, spec.num_heads, dim)
        where = (q, cache.k[c.layer], cache.v[c.layer], cache.block_table, t.cu_seqlens, t.kv_lens)
        if self.checked:
            out = attention(
                *where, scale=layer.scale, window=layer.window, softcap=spec.attn_softcap, alibi_slopes=d.alibi,
                slots=t.slots, backend=d.backend,
            )  # fmt: skip
        else:
            how = (t.slots, float(layer.scale), layer.window, spec.attn_softcap, d.alibi)
            if t.decode:
                out = implementation("attention_decode", d.backend, q, cache.k)(*where, *how, 0)
            else:
                out = implementation("attention", d.backend, q, cache.k)(*where, *how)
        return out.reshape(len(x), -1)

    def _rope_append(self, c: OpCall, x: Tensor, t: StepTensors, cache: PagedKVCache) -> Tensor:
        d, spec = self.decoder, self.decoder.spec
        heads, kv_heads, dim = spec.num_heads, spec.num_kv_heads, spec.head_dim
        q, k, v = x.view(-1, heads + 2 * kv_heads, dim).split([heads, kv_heads, kv_heads], dim=1)
        cos, sin = d.rope_of(c.layer) or (None, None)
        rope = spec.layers[c.layer].rope
        arguments = (
            q, k, v, cos, sin, t.positions, t.slot_of_token, cache.k[c.layer], cache.v[c.layer], cache.block_table
        )  # fmt: skip
        if self.checked:
            rotary: dict[str, Any] = (
                {} if rope is None else {"style": rope.style, "rotary_dim": rope.rotary_dim}
            )
            q = rope_append(*arguments, backend=d.backend, **rotary)
        else:
            style, rotary_dim = ("half", 0) if rope is None else (rope.style, rope.rotary_dim)
            q = implementation("rope_append", d.backend, q, cache.k)(*arguments, rotary_dim, style)
        return torch.cat([q.reshape(len(x), heads * dim), x[:, heads * dim :]], dim=1)


def factor(decoder: Decoder, call: OpCall) -> float:
    """The number of a `scale` call."""
    return decoder.embed_scale if call.weights == "embed" else call.scale


def softcap(x: Tensor, cap: float, backend: str | None) -> Tensor:
    """cap * tanh(x / cap) of float32 x; on the cpu backend with the tanh of its kernels."""
    module: Any = native() if backend == "cpu" else None
    if module is None:
        return cap * torch.tanh(x / cap)
    y = (x / cap).contiguous()
    module.vector_function(1, ptr(y), ptr(y), y.numel())  # csrc/cpu/vector_math.h: tanh
    return y.mul_(cap)

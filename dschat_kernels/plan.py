"""From a DecoderSpec to tokens: packs, a flat plan of op calls on preallocated buffers, and the step that walks it.

A `Plan` is a list of `OpCall`s on named buffers. Two executors walk it: `NativeExecutor` hands the whole list to the CPU
kernels, which run a step in one parallel region; `PythonExecutor` calls the public ops one by one, on any backend, and can
stop after any call, which is how a divergence is bisected. Both give the same bits on the cpu backend.

`Decoder` is what the engine and the patch use: it keeps the packs in step with the model's weights (`refresh`) and advances
ragged rows over a paged cache (`step`). Rows carry no padding.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from .cache import PAGE, PagedKVCache
from .models.spec import DecoderSpec, LayerSpec, LinearSpec, NormSpec, Unsupported
from .ops._common import ACTIVATIONS, native, ptr
from .ops.attention import attention
from .ops.layer_norm import layer_norm
from .ops.linear import linear
from .ops.rms_norm import rms_norm
from .ops.rope_append import rope_append
from .packing import DTYPES, PackedLinear, ResolvedLinear, digest, resolve_linear


@dataclass(frozen=True)
class OpCall:
    """One op on named buffers: `out = op(input, ...)`. `weights` names a pack or norm of the plan, `layer` the cache layer."""

    op: Literal["embed", "add_positions", "norm", "linear", "rope_append", "attention", "select_rows"]
    input: str
    out: str
    weights: str = ""
    residual: str = ""
    activation: str = "none"
    layer: int = 0


@dataclass(frozen=True)
class Plan:
    """`calls` in order; `widths` of the buffers, in elements a row."""

    calls: tuple[OpCall, ...]
    widths: dict[str, int]


def make_plan(spec: DecoderSpec) -> Plan:
    """The op calls of one step of `spec`.

    Buffers: x residual stream, h normalised input, qkv, ctx attention output, mid MLP hidden, sel the rows that reach the
    head, logits. The norms before the head run on the selected rows only.
    """
    hidden, heads = spec.hidden_size, spec.num_heads * spec.head_dim
    widths = {"x": hidden, "h": hidden, "qkv": heads + 2 * spec.num_kv_heads * spec.head_dim, "ctx": heads,
              "mid": spec.intermediate_size, "sel": hidden}  # fmt: skip
    calls = []
    if spec.project_in is not None:
        widths["embedded"] = spec.embed.weight.shape[1]
        calls += [OpCall("embed", "", "embedded"), OpCall("linear", "embedded", "x", "project_in")]
    else:
        calls.append(OpCall("embed", "", "x"))
    if spec.positions is not None:
        calls.append(OpCall("add_positions", "x", "x"))
    for i, layer in enumerate(spec.layers):
        calls += _layer_calls(i, layer)
    calls.append(OpCall("select_rows", "x", "sel"))
    last = "sel"
    if spec.final_norm is not None:
        calls.append(OpCall("norm", last, "h", "final_norm"))
        last = "h"
    if spec.project_out is not None:
        widths["projected"] = resolve_linear(spec.project_out).weight.shape[0]
        calls.append(OpCall("linear", last, "projected", "project_out"))
        last = "projected"
    if spec.lm_head is not None:
        widths["logits"] = spec.vocab_size
        calls.append(OpCall("linear", last, "logits", "lm_head"))
    return Plan(tuple(calls), widths)


def _layer_calls(i: int, layer: LayerSpec) -> list[OpCall]:
    pre = layer.norm_position == "pre"
    up = "gate_up" if layer.gate is not None else "up"

    def name(part: str) -> str:
        return f"layers.{i}.{part}"

    attention = [
        OpCall("linear", "h" if pre else "x", "qkv", name("qkv")),
        OpCall("rope_append", "qkv", "qkv", layer=i),
        OpCall("attention", "qkv", "ctx", layer=i),
        OpCall("linear", "ctx", "x" if pre else "h", name("o"), residual="x"),
    ]
    mlp = [
        OpCall("linear", "h" if pre else "x", "mid", name(up), activation=layer.activation),
        OpCall("linear", "mid", "x" if pre else "h", name("down"), residual="x"),
    ]
    if pre:
        return [
            OpCall("norm", "x", "h", name("attn_norm")),
            *attention,
            OpCall("norm", "x", "h", name("mlp_norm")),
            *mlp,
        ]
    return [
        *attention,
        OpCall("norm", "h", "x", name("attn_norm")),
        *mlp,
        OpCall("norm", "h", "x", name("mlp_norm")),
    ]


@dataclass
class PackedNorm:
    """A norm's float32 scale (weight_offset + weight) and bias, with the spec it came from."""

    spec: NormSpec
    width: int
    scale: Tensor | None = None
    bias: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        return [t for t in self.spec.tensors() if t is not None]

    def fill(self) -> None:
        weight, bias = self.spec.tensors()
        if weight is not None:
            value = weight.detach().float() + self.spec.weight_offset
            self.scale = value.clone() if self.scale is None else self.scale.copy_(value)
        elif self.spec.kind == "rms":
            self.scale = torch.ones(self.width)
        if bias is not None:
            self.bias = (
                bias.detach().float().clone() if self.bias is None else self.bias.copy_(bias.detach().float())
            )


@dataclass
class _Group:
    """Projections that share one pack."""

    specs: list[LinearSpec]
    gated: bool = False
    packed: PackedLinear | None = None
    key: Any = None

    def resolve(self, name: str) -> list[ResolvedLinear]:
        return [resolve_linear(s, name) for s in self.specs]


@dataclass
class RefreshStats:
    """What a refresh did: packs rewritten of all packs, bytes hashed and packed, seconds."""

    changed: int = 0
    total: int = 0
    bytes_hashed: int = 0
    bytes_packed: int = 0
    seconds: float = 0.0


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


class Decoder:
    """A fused decoder over the weights of a model.

    Args:
        spec: from `decoder_spec(model)`.
        dtype: of packs, activations and cache; default: that of the embedding. float32 or bfloat16.
        backend: None (native kernels where they are, else the reference), "cpu" or "reference".
        max_tokens: tokens of one pass over the plan; longer steps are cut, which does not change their bits.

    `epoch` counts the refreshes that changed something; a pack never serves an older epoch, because `step` runs on what
    the last `refresh` left. Call `refresh` after any change of weights, adapters or their switches.
    """

    def __init__(
        self,
        spec: DecoderSpec,
        *,
        dtype: torch.dtype | None = None,
        backend: str | None = None,
        max_tokens: int = 2048,
    ):
        weight_dtype = spec.embed.weight.dtype
        self.dtype = dtype or weight_dtype
        if self.dtype not in DTYPES:
            raise Unsupported(
                f"the model's dtype is {self.dtype}: the fused decoder runs float32 and bfloat16."
            )
        if spec.embed.weight.device.type != "cpu":
            raise Unsupported(
                f"the model is on {spec.embed.weight.device}: the fused decoder runs on the CPU in this version."
            )
        if backend not in (None, "cpu", "reference"):
            raise ValueError(f"backend is {backend!r}: use None, 'cpu' or 'reference'.")
        if backend == "cpu" and native() is None:
            raise RuntimeError(
                "backend 'cpu' was asked for and the native kernels are not available: see dschat doctor."
            )
        self.spec = spec
        self.backend = backend or ("cpu" if native() is not None else "reference")
        self.max_tokens = max_tokens
        self.plan = make_plan(spec)
        self.epoch = 0
        self.norms = {n: PackedNorm(s, spec.hidden_size) for n, s in _named_norms(spec)}
        self._groups = {n: _Group(specs, gated) for n, specs, gated in _named_groups(spec)}
        self._norm_keys: dict[str, Any] = {}
        self._table_key: Any = None
        self.embed_table = self.position_table = torch.empty(0)
        self.rope: tuple[Tensor, Tensor] | None = None
        self.executor: NativeExecutor | PythonExecutor = (
            NativeExecutor(self) if self.backend == "cpu" else PythonExecutor(self)
        )

    # ---------------------------------------------------------------------------------------------- weights

    def packed(self, name: str) -> PackedLinear:
        """The pack called `name` in the plan ("layers.0.qkv", "lm_head", ...)."""
        pack = self._groups[name].packed
        assert pack is not None, "refresh() first"
        return pack

    @property
    def packed_bytes(self) -> int:
        """Bytes that the packs take beside the model's own weights."""
        return sum(g.packed.nbytes for g in self._groups.values() if g.packed is not None)

    def refresh(self) -> RefreshStats:
        """Repacks every matrix whose weights, biases, adapters or adapter switches changed since the last call.

        Reads every weight once to see what changed; a changed one is read once more and written once.
        """
        start = time.perf_counter()
        stats = RefreshStats()
        digests: dict[tuple[int, int], int] = {}

        def key_of(tensors: Iterable[Tensor]) -> tuple[Any, ...]:
            key = []
            for t in tensors:
                place = (t.data_ptr(), t.numel() * t.element_size())
                if place not in digests:  # tied weights are read once
                    digests[place] = digest(t)
                    stats.bytes_hashed += place[1]
                key.append((digests[place], tuple(t.shape), t.dtype))
            return tuple(key)

        with torch.no_grad():
            for name, group in self._groups.items():
                parts = group.resolve(name)
                key = (
                    key_of(t for p in parts for t in p.tensors()),
                    tuple(u.scale for p in parts for u in p.updates),
                )
                stats.total += 1
                if key != group.key:
                    if group.packed is None:
                        group.packed = PackedLinear.from_parts(parts, self.dtype, gated=group.gated)
                    else:
                        group.packed.fill(parts)
                    group.key = key
                    stats.changed += 1
                    stats.bytes_packed += group.packed.nbytes
            for name, norm in self.norms.items():
                key = key_of(norm.tensors())
                stats.total += 1
                if key != self._norm_keys.get(name):
                    norm.fill()
                    self._norm_keys[name] = key
                    stats.changed += 1
            self._refresh_tables(key_of, stats)
        if stats.changed:
            self.epoch += 1
            self.executor.rebind()
        stats.seconds = time.perf_counter() - start
        return stats

    def _refresh_tables(self, key_of: Callable[[Iterable[Tensor]], Any], stats: RefreshStats) -> None:
        """Embedding and learned positions are used where they are (copied only when the dtypes differ)."""
        tables = [self.spec.embed.weight] + (
            [self.spec.positions.weight] if self.spec.positions is not None else []
        )
        in_place = all(t.dtype == self.dtype and t.is_contiguous() for t in tables)
        key = tuple((t.data_ptr(), tuple(t.shape)) for t in tables) if in_place else key_of(tables)
        if key == self._table_key:
            return
        self.embed_table, *rest = [t.detach().to(self.dtype).contiguous() for t in tables]
        self.position_table = rest[0] if rest else torch.empty(0)
        self._table_key = key
        stats.changed += 1

    def rope_tables(self, positions: int) -> tuple[Tensor, Tensor]:
        """cos and sin, float32 [>= positions, rotary_dim / 2], grown by powers of two."""
        rope = self.spec.rope
        assert rope is not None
        if self.rope is None or self.rope[0].shape[0] < positions:
            size = 1 << max(9, (positions - 1).bit_length())
            self.rope = rope.tables(size)
            self.executor.rebind()
        return self.rope

    # ------------------------------------------------------------------------------------------------ steps

    def new_cache(self, num_slots: int, max_tokens: int, num_pages: int | None = None) -> PagedKVCache:
        """A cache for `num_slots` sequences of up to `max_tokens` tokens (`num_pages` limits the pool; default: enough)."""
        spec, pages = self.spec, -(-max_tokens // PAGE)
        return PagedKVCache(
            len(spec.layers),
            spec.num_kv_heads,
            spec.head_dim,
            num_pages or num_slots * pages,
            num_slots,
            pages,
            self.dtype,
        )

    def step(
        self,
        tokens: Tensor,
        cache: PagedKVCache,
        slots: Sequence[int],
        q_lens: Sequence[int] | None = None,
        logits: Literal["last", "all", "none"] = "last",
    ) -> Tensor:
        """Appends tokens to rows of the cache and returns logits.

        Args:
            tokens: int64 [T], the new tokens of all rows one after the other.
            slots: cache slot of each row, each named once.
            q_lens: new tokens of each row, all at least 1; default: one each.
            logits: "last" gives float32 [rows, vocab] for each row's last token, "all" [T, vocab], "none" [0, vocab].
        """
        lens = np.ones(len(slots), dtype=np.int64) if q_lens is None else np.asarray(q_lens, dtype=np.int64)
        self._check_step(tokens, cache, slots, lens)
        cache.prepare_append(slots, lens.tolist())
        pieces = []
        for rows, row_lens, begin in _passes(lens, self.max_tokens):
            ids = tokens[begin : begin + int(row_lens.sum())]
            chosen = [slots[r] for r in rows]
            tables = _tables(ids, cache, chosen, row_lens, logits)
            if logits == "last":  # a cut row's logits come with its final piece
                done = np.cumsum(lens)[rows] == begin + np.cumsum(row_lens)
                tables.selected = tables.selected[done]
            if self.spec.rope is not None:
                self.rope_tables(int(tables.kv_lens.max()))
            pieces.append(self.executor.run(tables, cache))
            cache.advance(chosen, row_lens.tolist())
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _check_step(
        self, tokens: Tensor, cache: PagedKVCache, slots: Sequence[int], lens: np.ndarray
    ) -> None:
        if self.epoch == 0:
            raise RuntimeError("the decoder has no packs yet: call refresh() before step().")
        if tokens.dtype != torch.int64 or tokens.dim() != 1:
            raise TypeError(
                f"tokens are {tokens.dtype} of shape {tuple(tokens.shape)}: give int64 of shape [T]."
            )
        if (
            len(lens) != len(slots)
            or len(slots) == 0
            or (lens < 1).any()
            or int(lens.sum()) != tokens.numel()
        ):
            raise ValueError(
                f"{tokens.numel()} tokens, {len(slots)} slots and lengths {lens.tolist()} do not fit: every row needs at "
                "least one token and the lengths must add up."
            )
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self.embed_table.shape[0]:
            bad = low if low < 0 else high
            raise ValueError(
                f"token id {bad} is outside the vocabulary of {self.embed_table.shape[0]}: check the tokenizer."
            )
        if cache.dtype != self.dtype or cache.num_layers != len(self.spec.layers):
            raise ValueError(f"the cache ({cache}) was not made for this decoder: use decoder.new_cache().")
        if self.spec.positions is not None:
            longest = int((cache._lengths[list(slots)] + lens).max())
            if longest > self.spec.max_positions:
                raise ValueError(
                    f"a row would reach {longest} tokens and the model has {self.spec.max_positions} positions: shorten it."
                )


def _passes(lens: np.ndarray, limit: int) -> Iterable[tuple[list[int], np.ndarray, int]]:
    """(rows, tokens of each, first token) of passes of at most `limit` tokens; long rows are cut."""
    rows: list[int] = []
    counts: list[int] = []
    begin = used = 0
    for row, length in enumerate(lens.tolist()):
        while length:
            take = min(length, limit - used)
            rows.append(row)
            counts.append(take)
            used, length = used + take, length - take
            if used == limit:
                yield rows, np.asarray(counts), begin
                begin += used
                rows, counts, used = [], [], 0
    if rows:
        yield rows, np.asarray(counts), begin


def _tables(ids: Tensor, cache: PagedKVCache, slots: list[int], lens: np.ndarray, logits: str) -> StepTables:
    slot_array = np.asarray(slots, dtype=np.int32)
    old = cache._lengths[slot_array]
    ends = np.cumsum(lens)
    starts = ends - lens
    offsets = np.arange(int(ends[-1])) - np.repeat(starts, lens)
    if logits == "last":
        selected = ends - 1
    else:
        selected = np.arange(int(ends[-1]) if logits == "all" else 0)
    return StepTables(
        token_ids=np.ascontiguousarray(ids.numpy()),
        positions=(np.repeat(old, lens) + offsets).astype(np.int32),
        slot_of_token=np.repeat(slot_array, lens).astype(np.int32),
        cu_seqlens=np.concatenate([[0], ends]).astype(np.int32),
        kv_lens=(old + lens).astype(np.int32),
        slots=slot_array,
        selected=selected.astype(np.int64),
    )


def _named_norms(spec: DecoderSpec) -> Iterable[tuple[str, NormSpec]]:
    for i, layer in enumerate(spec.layers):
        yield f"layers.{i}.attn_norm", layer.attn_norm
        yield f"layers.{i}.mlp_norm", layer.mlp_norm
    if spec.final_norm is not None:
        yield "final_norm", spec.final_norm


def _named_groups(spec: DecoderSpec) -> Iterable[tuple[str, list[LinearSpec], bool]]:
    for name, single in (
        ("project_in", spec.project_in),
        ("project_out", spec.project_out),
        ("lm_head", spec.lm_head),
    ):
        if single is not None:
            yield name, [single], False
    for i, layer in enumerate(spec.layers):
        yield f"layers.{i}.qkv", [layer.q, layer.k, layer.v], False
        yield f"layers.{i}.o", [layer.o], False
        if layer.gate is not None:
            yield f"layers.{i}.gate_up", [layer.gate, layer.up], True
        else:
            yield f"layers.{i}.up", [layer.up], False
        yield f"layers.{i}.down", [layer.down], False


class NativeExecutor:
    """Walks the plan in one call of the CPU kernels."""

    def __init__(self, decoder: Decoder):
        self.decoder = decoder
        self.names = list(decoder.plan.widths)
        self.buffers: dict[str, Tensor] = {}
        self.plan: Any = None
        self.capacity = {"tokens": 0, "selected": 0}

    def rebind(self) -> None:
        """Pointers changed: build the native plan anew before the next step."""
        self.plan = None

    def run(self, t: StepTables, cache: PagedKVCache, limit: int = -1) -> Tensor:
        """Executes the first `limit` calls (all: -1); returns the logits, float32 [selected, vocab]."""
        self._reserve(len(t.token_ids), len(t.selected))
        if self.plan is None:
            self._build()
        table = cache.block_table
        self.plan.run(
            len(t.token_ids), len(t.slots), t.token_ids.ctypes.data, t.positions.ctypes.data, t.slot_of_token.ctypes.data,
            t.cu_seqlens.ctypes.data, t.kv_lens.ctypes.data, t.slots.ctypes.data, ptr(table), table.stride(0),
            ptr(cache.k), ptr(cache.v), cache.k.stride(0) * cache.k.element_size(), cache.v.stride(0) * cache.v.element_size(),
            len(t.selected), t.selected.ctypes.data, limit,
        )  # fmt: skip
        if "logits" not in self.buffers:
            return torch.empty(len(t.selected), 0)
        return self.buffers["logits"][: len(t.selected)].clone()

    def _reserve(self, tokens: int, selected: int) -> None:
        if tokens <= self.capacity["tokens"] and selected <= self.capacity["selected"]:
            return
        self.capacity = {
            "tokens": max(tokens, self.capacity["tokens"]),
            "selected": max(selected, self.capacity["selected"]),
        }
        for name, width in self.decoder.plan.widths.items():
            rows = max(
                self.capacity["selected"]
                if name in ("sel", "projected", "logits")
                else self.capacity["tokens"],
                1,
            )
            dtype = torch.float32 if name == "logits" else self.decoder.dtype
            if name not in self.buffers or self.buffers[name].shape[0] < rows:
                self.buffers[name] = torch.zeros(rows, width, dtype=dtype)
        self.plan = None

    def _build(self) -> None:
        d, spec = self.decoder, self.decoder.spec
        plan = native().StepPlan(DTYPES[d.dtype], spec.num_heads, spec.num_kv_heads, spec.head_dim)
        if d.rope is not None and spec.rope is not None:
            cos, sin = d.rope
            plan.set_rope(ptr(cos), ptr(sin), spec.rope.rotary_dim, spec.rope.style == "interleaved")
        plan.set_softcap(spec.attn_softcap or 0.0)
        index = {name: i for i, name in enumerate(self.names)}
        for name, i in index.items():
            plan.set_buffer(i, ptr(self.buffers[name]), self.buffers[name].stride(0))
        for c in d.plan.calls:
            if c.op == "embed":
                plan.embed(index[c.out], ptr(d.embed_table), d.embed_table.shape[1])
            elif c.op == "add_positions":
                plan.add_positions(
                    index[c.out], ptr(d.position_table), d.position_table.shape[1], spec.position_offset
                )
            elif c.op == "norm":
                n = d.norms[c.weights]
                plan.norm(
                    n.spec.kind == "rms", index[c.input], index[c.out], ptr(n.scale), ptr(n.bias), n.width, n.spec.eps,
                    0 if n.spec.rounding == "llama" else 1,
                )  # fmt: skip
            elif c.op == "linear":
                p = d.packed(c.weights)
                plan.linear(
                    index[c.input], index[c.out], index[c.residual] if c.residual else -1, ptr(p.panels), ptr(p.bias),
                    p.n, p.k, p.gated, ACTIVATIONS[c.activation], c.out == "logits",
                )  # fmt: skip
            elif c.op == "rope_append":
                plan.rope_append(index[c.input], c.layer)
            elif c.op == "attention":
                layer = spec.layers[c.layer]
                plan.attention(index[c.input], index[c.out], c.layer, layer.scale, layer.window or 0)
            else:
                plan.select_rows(index[c.input], index[c.out], d.plan.widths[c.out])
        self.plan = plan


class PythonExecutor:
    """Walks the plan with the public ops, on the decoder's backend. `trace` receives (call, output) after every call."""

    def __init__(self, decoder: Decoder, trace: Callable[[OpCall, Tensor], None] | None = None):
        self.decoder = decoder
        self.trace = trace

    def rebind(self) -> None:
        """Nothing is bound: tensors are looked up at every call."""

    @torch.no_grad()
    def run(self, t: StepTables, cache: PagedKVCache, limit: int = -1) -> Tensor:
        """Executes the first `limit` calls (all: -1); returns the last output."""
        buffers: dict[str, Tensor] = {}
        out = torch.empty(0)
        calls = self.decoder.plan.calls
        for call in calls if limit < 0 else calls[:limit]:
            out = self._execute(call, buffers, t, cache)
            buffers[call.out] = out
            if self.trace is not None:
                self.trace(call, out)
        return out

    def _execute(self, c: OpCall, buffers: dict[str, Tensor], t: StepTables, cache: PagedKVCache) -> Tensor:
        d, spec, backend = self.decoder, self.decoder.spec, self.decoder.backend
        if c.op == "embed":
            return d.embed_table[torch.from_numpy(t.token_ids)]
        x = buffers[c.input]
        if c.op == "add_positions":
            return x + d.position_table[torch.from_numpy(t.positions).long() + spec.position_offset]
        if c.op == "select_rows":
            return x[torch.from_numpy(t.selected)]
        if c.op == "norm":
            return apply_norm(d.norms[c.weights].spec, x, backend)
        if c.op == "linear":
            return linear(
                x, d.packed(c.weights), activation=c.activation, residual=buffers[c.residual] if c.residual else None,
                float_output=c.out == "logits", backend=backend,
            )  # fmt: skip
        heads, kv_heads, dim = spec.num_heads, spec.num_kv_heads, spec.head_dim
        positions, slots = torch.from_numpy(t.positions), torch.from_numpy(t.slot_of_token)
        k_cache, v_cache = cache.k[c.layer], cache.v[c.layer]
        if c.op == "rope_append":
            q, k, v = x.view(-1, heads + 2 * kv_heads, dim).split([heads, kv_heads, kv_heads], dim=1)
            cos, sin = d.rope if d.rope is not None else (None, None)
            rotary = (
                {} if spec.rope is None else {"style": spec.rope.style, "rotary_dim": spec.rope.rotary_dim}
            )
            q = rope_append(
                q,
                k,
                v,
                cos,
                sin,
                positions,
                slots,
                k_cache,
                v_cache,
                cache.block_table,
                backend=backend,
                **rotary,
            )
            return torch.cat([q.reshape(len(x), heads * dim), x[:, heads * dim :]], dim=1)
        layer = spec.layers[c.layer]
        out = attention(
            x[:, : heads * dim].reshape(-1, heads, dim), k_cache, v_cache,
            cache.block_table, torch.from_numpy(t.cu_seqlens), torch.from_numpy(t.kv_lens), scale=layer.scale,
            window=layer.window, softcap=spec.attn_softcap, slots=torch.from_numpy(t.slots), backend=backend,
        )  # fmt: skip
        return out.reshape(len(x), heads * dim)


def apply_norm(norm: NormSpec, x: Tensor, backend: str | None = None) -> Tensor:
    """The norm op that a spec describes, on x [..., hidden]; differentiable."""
    weight, bias = norm.tensors()
    if norm.kind == "layer":
        y = layer_norm(x, weight, bias, norm.eps, backend=backend)
    else:
        scale = torch.ones(x.shape[-1], dtype=x.dtype) if weight is None else weight
        y = rms_norm(
            x, scale, norm.eps, weight_offset=norm.weight_offset, rounding=norm.rounding, backend=backend
        )
    assert isinstance(y, Tensor)
    return y

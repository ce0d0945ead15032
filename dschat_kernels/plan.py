"""From a DecoderSpec to tokens: packs, a flat plan of op calls on buffers, and the steps of ragged rows.

A `Plan` is a list of `OpCall`s on named buffers. `executors.py` has who walks it: one call of the CPU kernels, or the
ops one by one on any backend and device. `graphs.DecodeGraphs` replays what the latter launches on a GPU.

`Decoder` is what the engine and the patch use: it keeps the packs in step with the model's weights
(`refresh`) and advances ragged rows over a paged cache (`step`). Rows carry no padding.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from .cache import KV_CACHES, PagedKVCache, pages_for
from .executors import Draw, Drawn, NativeExecutor, PythonExecutor, StepTables
from .models.spec import DecoderSpec, LayerSpec, LinearSpec, NormSpec, Unsupported
from .ops._common import DTYPES as OP_DTYPES
from .ops._common import is_plain, lasting_tensors, native, ptr, resolve_backend
from .ops.layer_norm import layer_norm
from .ops.rms_norm import rms_norm
from .ops.rope_append import MAX_HEAD_DIM
from .ops.sample import check_draw, raise_for_bad_rows
from .packing import DTYPES, PackedLinear, ResolvedLinear, check_weights, digests, is_lora, resolve_linear


@dataclass(frozen=True)
class OpCall:
    """One op on named buffers: `out = op(input, ...)`. `weights` names a pack or norm of the plan, `layer`
    the cache layer.

    scale: round(scale * input); add: round(residual + round(scale * input)); head_norm: a norm of the columns
    from `column` on, in place; softcap: scale * tanh(input / scale) in float32.
    """

    op: Literal[
        "embed", "add_positions", "norm", "linear", "scale", "add", "head_norm", "rope_append", "attention",
        "select_rows", "softcap",
    ]  # fmt: skip
    input: str
    out: str
    weights: str = ""
    residual: str = ""
    activation: str = "none"
    layer: int = 0
    scale: float = 1.0
    column: int = 0


@dataclass(frozen=True)
class Plan:
    """`calls` in order; `widths` of the buffers, in elements a row."""

    calls: tuple[OpCall, ...]
    widths: dict[str, int]


def make_plan(spec: DecoderSpec) -> Plan:
    """The op calls of one step of `spec`.

    Buffers: x residual stream, h normalised input, h2 that of a parallel MLP, qkv, ctx attention output, mid MLP
    hidden, branch a branch's output before its norm, sel the rows that reach the head, logits. The norms before
    the head run on the selected rows only.
    """
    hidden, heads = spec.hidden_size, spec.num_heads * spec.head_dim
    widths = {"x": hidden, "h": hidden, "qkv": heads + 2 * spec.num_kv_heads * spec.head_dim, "ctx": heads,
              "mid": spec.intermediate_size, "sel": hidden}  # fmt: skip
    calls = []
    if spec.project_in is not None:
        embed: Any = spec.embed
        widths["embedded"] = embed.weight.shape[1]
        calls += [OpCall("embed", "", "embedded"), OpCall("linear", "embedded", "x", "project_in")]
    else:
        calls.append(OpCall("embed", "", "x"))
    if spec.embed_scale != 1.0:
        calls.append(OpCall("scale", "x", "x", "embed", scale=spec.embed_scale))
    if spec.positions is not None:
        calls.append(OpCall("add_positions", "x", "x"))
    if spec.embed_norm is not None:
        calls.append(OpCall("norm", "x", "x", "embed_norm"))
    for i, layer in enumerate(spec.layers):
        calls += _LayerPlan(i, layer, spec, widths).calls()
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
        if spec.logit_scale != 1.0:
            calls.append(OpCall("scale", last, last, scale=spec.logit_scale))
        calls.append(OpCall("linear", last, "logits", "lm_head"))
        if spec.logit_softcap is not None:
            calls.append(OpCall("softcap", "logits", "logits", scale=spec.logit_softcap))
    return Plan(tuple(calls), widths)


class _LayerPlan:
    """The calls of one layer; adds the buffers it needs to `widths`."""

    def __init__(self, i: int, layer: LayerSpec, spec: DecoderSpec, widths: dict[str, int]):
        self.i, self.layer, self.spec, self.widths = i, layer, spec, widths

    def calls(self) -> list[OpCall]:
        layer = self.layer
        if layer.order == "post":
            return [
                *self.attention("x", out="h"),
                OpCall("norm", "h", "x", self.name("attn_norm")),
                *self.mlp("x", out="h"),
                OpCall("norm", "h", "x", self.name("mlp_norm")),
            ]
        into_attention, n = self.norm("attn_norm", "h")
        if layer.order == "parallel":
            into_mlp: list[OpCall] = []
            m = n
            if layer.mlp_norm is not None:
                into_mlp, m = self.norm("mlp_norm", "h2")
            return [*into_attention, *into_mlp, *self.attention(n), *self.mlp(m)]
        into_mlp, m = self.norm("mlp_norm", "h")
        from_norm = layer.residual_from_norm
        return [
            *into_attention,
            *self.attention(n, residual=n if from_norm else "x"),
            *into_mlp,
            *self.mlp(m, residual=m if from_norm else "x"),
        ]

    def name(self, part: str) -> str:
        return f"layers.{self.i}.{part}"

    def norm(self, part: str, out: str) -> tuple[list[OpCall], str]:
        """(calls, the buffer with the normalised x); x itself where there is no norm."""
        if getattr(self.layer, part) is None:
            return [], "x"
        self.widths.setdefault(out, self.spec.hidden_size)
        return [OpCall("norm", "x", out, self.name(part))], out

    def attention(self, source: str, residual: str = "x", out: str = "x") -> list[OpCall]:
        calls = [OpCall("linear", source, "qkv", self.name("qkv"))]
        if self.layer.q_norm is not None:
            calls.append(OpCall("head_norm", "qkv", "qkv", self.name("q_norm")))
        if self.layer.k_norm is not None:
            column = self.spec.num_heads * self.spec.head_dim
            calls.append(OpCall("head_norm", "qkv", "qkv", self.name("k_norm"), column=column))
        return [
            *calls,
            OpCall("rope_append", "qkv", "qkv", layer=self.i),
            OpCall("attention", "qkv", "ctx", layer=self.i),
            *self.join("ctx", "o", "attn_out_norm", residual, out),
        ]

    def mlp(self, source: str, residual: str = "x", out: str = "x") -> list[OpCall]:
        up = self.name("gate_up" if self.layer.gate is not None else "up")
        return [
            OpCall("linear", source, "mid", up, activation=self.layer.activation),
            *self.join("mid", "down", "mlp_out_norm", residual, out),
        ]

    def join(self, source: str, weights: str, norm: str, residual: str, out: str) -> list[OpCall]:
        """out = residual + residual_scale * norm(linear(source)), in the linear's epilogue where nothing stands
        between."""
        scale, has_norm = self.layer.residual_scale, getattr(self.layer, norm) is not None
        if scale == 1.0 and not has_norm:
            return [OpCall("linear", source, out, self.name(weights), residual=residual)]
        self.widths.setdefault("branch", self.spec.hidden_size)
        calls = [OpCall("linear", source, "branch", self.name(weights))]
        if has_norm:
            calls.append(OpCall("norm", "branch", "branch", self.name(norm)))
        return [*calls, OpCall("add", "branch", out, residual=residual, scale=scale)]


@dataclass
class PackedNorm:
    """A norm's weight and bias, rounded to the decoder's dtype, with the spec they came from.

    width: of one normalised slice. weight, bias: in that dtype, as the ops take them. scale, shift: float32
    weight_offset + weight and bias, as the native plan reads them; `stride` floats from slice to slice.
    """

    spec: NormSpec
    width: int
    dtype: torch.dtype
    weight: Tensor | None = None
    bias: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None

    @property
    def stride(self) -> int:
        """0 where all slices share one weight."""
        held = self.scale if self.scale is not None else self.shift
        return self.width if held is not None and held.dim() == 2 else 0

    def fill(self, device: torch.device) -> None:
        """Takes the module's present values, in place where they were taken before: pointers to them stay good."""
        weight, bias = self.spec.tensors()
        if weight is None and self.spec.kind == "rms":
            weight = torch.ones(self.width, device=device)
        if weight is not None:
            self.weight = _refill(self.weight, weight.detach(), self.dtype)
            self.scale = _refill(self.scale, self.weight.float() + self.spec.weight_offset, torch.float32)
        if bias is not None:
            self.bias = _refill(self.bias, bias.detach(), self.dtype)
            self.shift = _refill(self.shift, self.bias.float(), torch.float32)

    def apply(self, x: Tensor, backend: str | None) -> Tensor:
        """The norm of x [rows, width] with the values of the last `fill`."""
        return _norm(self.spec, self.weight, self.bias, x, backend)


def _refill(held: Tensor | None, values: Tensor, dtype: torch.dtype) -> Tensor:
    """`values` in `dtype`, in the memory of `held` where they fit into it."""
    if held is None or held.shape != values.shape or held.device != values.device:
        return values.to(dtype, copy=True)
    return held.copy_(values)


@dataclass
class Group:
    """Projections that share one pack."""

    specs: list[LinearSpec]
    gated: bool = False
    packed: PackedLinear | None = None
    key: Any = None
    versions: Any = None

    def resolve(self, name: str) -> list[ResolvedLinear]:
        """What the projections compute at this moment."""
        return [resolve_linear(s, name) for s in self.specs]


@dataclass
class RefreshStats:
    """What a refresh did: packs whose matrix changed of all packs, bytes hashed and written, seconds."""

    changed: int = 0
    total: int = 0
    bytes_hashed: int = 0
    bytes_packed: int = 0
    seconds: float = 0.0


class _Digests:
    """Digests of tensors, each read once (tied weights, slices that several projections share)."""

    def __init__(self, stats: RefreshStats):
        self.stats = stats
        self.known: dict[Any, int] = {}

    def of(self, tensors: Sequence[Tensor]) -> tuple[Any, ...]:
        """What changes when any of the tensors changes."""
        self.read(tensors)
        return tuple((self.known[_place(t)], tuple(t.shape), t.dtype) for t in tensors)

    def read(self, tensors: Iterable[Tensor]) -> None:
        """Makes those digests that are not known yet, all in one call."""
        unknown = {place: t for t in tensors if (place := _place(t)) not in self.known}
        self.learn(list(unknown.values()), digests(list(unknown.values())))

    def learn(self, tensors: Sequence[Tensor], found: Sequence[int]) -> None:
        """Digests that somebody made."""
        for tensor, value in zip(tensors, found, strict=True):
            self.known[_place(tensor)] = value
            self.stats.bytes_hashed += tensor.numel() * tensor.element_size()


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def _key(parts: Sequence[ResolvedLinear], known: _Digests) -> tuple[Any, ...]:
    """What changes when what the parts compute does."""
    return (
        known.of([t for p in parts for t in p.tensors()]),
        tuple(tuple(u.scale for u in p.updates) for p in parts),
        tuple(p.bias is None for p in parts),
    )


def _versions(parts: Sequence[ResolvedLinear]) -> tuple[Any, ...]:
    """What the usual ways of writing to a part's tensors change; others leave it as it is."""
    tensors = [t for p in parts for t in p.tensors()]
    return tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors)


def check_plain(name: str, weight: Tensor) -> None:
    """Raises Unsupported for a weight that is no plain tensor: what it holds is not what its shape and dtype say."""
    if not is_plain(weight):
        raise Unsupported(
            f"{name} holds a {type(weight).__module__}.{type(weight).__name__}, and only plain tensors are fused "
            "(quantised and sharded weights stay with HF)"
        )


def _switches(lora: Any) -> tuple[Any, ...]:
    """What of a LoRA layer decides which of its adapters take part."""
    return (lora.disable_adapters, lora.merged, *lora.active_adapters, *lora.scaling.values())


def _one_at_a_time(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of a Decoder that other threads wait for: its buffers hold one step, and kernels run without the GIL."""

    @functools.wraps(method)
    def locked(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self.lock, lasting_tensors():
            return method(self, *args, **kwargs)

    return locked


class Decoder:
    """A fused decoder over the weights of a model.

    Args:
        spec: from `decoder_spec(model)`.
        dtype: of packs, activations and cache; default: that of the embedding. float32 or bfloat16, on a GPU
            float16 too.
        backend: None (the fastest that runs on the device of the weights, see `resolve_backend`), "cpu",
            "triton", "cuda" or "reference".
        max_tokens: tokens of one pass over the plan; longer steps are cut, which does not change their bits.
        weights: how packs hold matrices, one of packing.WEIGHTS; int8 is quantised while packing.
        kv_cache: how caches hold keys and values, one of cache.KV_CACHES; int8 on the CPU only.

    `bindings` counts the times that something the plan reads may have moved (see `addresses`).
    `epoch` counts the refreshes that changed something; a pack never serves an older epoch, because `step`
    runs on what the last `refresh` left. Call `refresh` after any change of weights, adapters or their
    switches.
    """

    def __init__(
        self,
        spec: DecoderSpec,
        *,
        dtype: torch.dtype | None = None,
        backend: str | None = None,
        max_tokens: int = 2048,
        weights: str = "model",
        kv_cache: str = "auto",
    ):
        check_weights(weights)
        if kv_cache not in KV_CACHES:
            raise ValueError(f"kv_cache is {kv_cache!r}: give one of {', '.join(map(repr, KV_CACHES))}.")
        embed: Any = spec.embed
        self.dtype: torch.dtype = dtype or embed.weight.dtype
        self.device: torch.device = embed.weight.device
        if self.device.type == "meta":
            raise Unsupported("the model is on meta, without values: load its weights first.")
        allowed = DTYPES if self.device.type == "cpu" and backend in (None, "cpu", "reference") else OP_DTYPES
        if self.dtype not in allowed:
            also = ", float16" if len(allowed) > 2 else ""
            raise Unsupported(
                f"the model's dtype is {self.dtype}: the fused decoder runs float32 and bfloat16{also}"
            )
        if max_tokens < 1:
            raise ValueError(f"max_tokens is {max_tokens}: a pass needs at least 1 token.")
        if backend not in (None, "cpu", "triton", "cuda", "reference"):
            raise ValueError(f"backend is {backend!r}: use None, 'cpu' or 'reference'.")
        chosen = backend
        if self.device.type != "cpu" and backend is None:
            chosen = resolve_backend("decoder", None, embed.weight)
        if weights == "int8_dynamic" and chosen in ("triton", "cuda"):
            raise ValueError(
                f"weights is {weights!r} and backend {chosen!r}: it runs on 'cpu' and 'reference'; give 'int8'."
            )
        if kv_cache == "int8" and (self.device.type != "cpu" or chosen in ("triton", "cuda")):
            raise ValueError(
                f"kv_cache is 'int8' and the rollout runs on {chosen!r}, device {self.device.type}: the 8-bit cache is "
                "the CPU's; leave kv_cache at 'auto'."
            )
        if self.device.type != "cpu" or backend in ("triton", "cuda"):  # on CPU tensors in tests only
            backend = resolve_backend("decoder", backend, embed.weight)
        if backend in ("triton", "cuda") and spec.head_dim > MAX_HEAD_DIM:
            raise Unsupported(f"head_dim is {spec.head_dim}: the {backend} kernels go to {MAX_HEAD_DIM}.")
        if backend == "cpu" and native() is None:
            raise RuntimeError(
                "backend is 'cpu' and the native kernels are not available: see dschat doctor."
            )
        self.spec, self.weights, self.kv_cache = spec, weights, kv_cache
        self.cache_dtype = torch.int8 if kv_cache == "int8" else self.dtype
        self.lock = threading.RLock()
        self._sources: list[tuple[Any, str, Tensor, int | None, int]] = []
        self._adapters: list[tuple[Any, tuple[Any, ...]]] = []
        self._settled = True
        """False from when a refresh begins to write until it ends; one that was interrupted leaves it so."""
        self.backend = backend or ("cpu" if native() is not None else "reference")
        self.max_tokens = max_tokens
        self.plan = make_plan(spec)
        self.epoch = self.bindings = 0
        self.norms = {n: PackedNorm(s, width, self.dtype) for n, s, width in _named_norms(spec)}
        self.groups = {n: Group(specs, gated) for n, specs, gated in _named_groups(spec)}
        self._norm_keys: dict[str, Any] = {}
        self._table_key: Any = None
        self.embed_table = self.position_table = torch.empty(0, device="cpu")
        self._tables_copied = False  # they are the decoder's own, not the model's
        self.alibi = None if spec.alibi is None else torch.tensor(spec.alibi, device=self.device)
        self.ropes: list[tuple[Tensor, Tensor]] = []
        self.limit = spec.position_limit()
        self._rope_specs = spec.ropes()
        index = {id(rope): i for i, rope in enumerate(self._rope_specs)}
        self.gather: Callable[[Sequence[nn.Module]], AbstractContextManager[Any]] | None = None
        """`gather(modules)`: a context inside which the weights of these modules are whole, where they are sharded
        outside; None: they are always whole."""
        self._rope_of = [None if layer.rope is None else index[id(layer.rope)] for layer in spec.layers]
        self.executor: NativeExecutor | PythonExecutor = (
            NativeExecutor(self) if self.backend == "cpu" else PythonExecutor(self)
        )

    # ---------------------------------------------------------------------------------------------- weights

    def packed(self, name: str) -> PackedLinear:
        """The pack called `name` in the plan ("layers.0.qkv", "lm_head", ...)."""
        pack = self.groups[name].packed
        assert pack is not None, "refresh() first"
        return pack

    @property
    def packed_bytes(self) -> int:
        """Bytes that the packs take beside the model's own weights."""
        return sum(g.packed.nbytes for g in self.groups.values() if g.packed is not None)

    @_one_at_a_time
    def refresh(self) -> RefreshStats:
        """Repacks every matrix whose weights, biases, adapters or adapter switches changed since the last
        call.

        Reads every weight once to see by its digest what changed. One whose version counter moved is packed in the
        same reading; one that was written behind the counter's back (by `.data`, a fused optimizer) is read once more.

        Raises:
            Unsupported: a projection can no longer be packed (an adapter of another kind), has another shape,
                or lies on another device than the embedding; nothing was changed.
        """
        start = time.perf_counter()
        stats = RefreshStats()
        if self.gather is None:
            parts = self._resolve(self.groups)
            self._check_shapes(parts)
            self._check_devices(parts)
            settled, self._settled = self._settled, False
            known = _Digests(stats)
            self._refresh_part(parts, list(self.norms), known, stats)
            self._refresh_tables(known, stats)
        else:
            settled, self._settled = self._settled, False
            self._refresh_sharded(self.gather, stats)
        self._remember()
        if stats.changed or not settled:  # what an interrupted one changed, nobody has counted
            self.epoch += 1
            self._rebind()
        self._settled = True
        stats.seconds = time.perf_counter() - start
        return stats

    def _remember(self) -> None:
        """Notes what the packs were made of, for `is_current`."""
        owners = [s.module for group in self.groups.values() for s in group.specs]
        owners += [norm.spec.module for norm in self.norms.values()]
        owners += [m for m in (self.spec.embed, self.spec.positions) if m is not None]
        modules = list({id(m): m for owner in owners for m in owner.modules()}.values())
        held = [] if self.gather is not None else [m._parameters for m in modules]  # shards come and go
        self._sources = [
            (place, name, t, None if t.is_inference() else t._version, t.data_ptr())
            for place in held for name, t in place.items() if t is not None
        ]  # fmt: skip
        self._adapters = [(m, _switches(m)) for m in modules if is_lora(m)]

    def is_current(self) -> bool:
        """Whether parameters and adapters are those of the last `refresh`, as far as one can tell without reading them:
        by identity, version counter, address and the adapters' switches. Much cheaper than `refresh`, which alone sees
        what was written through `.data`."""
        if not self._settled:
            return False
        for place, name, tensor, version, address in self._sources:
            if place.get(name) is not tensor or tensor.data_ptr() != address:
                return False
            if version is not None and tensor._version != version:
                return False
        return all(_switches(module) == before for module, before in self._adapters)

    def _rebind(self) -> None:
        """What the plan reads may lie elsewhere now."""
        self.bindings += 1
        self.executor.rebind()

    def addresses(self) -> tuple[int, ...]:
        """Where everything lies that the plan reads; the same after a refresh that wrote in place."""
        held: list[Tensor | None] = [self.embed_table, self.position_table, self.alibi]
        for group in self.groups.values():
            if group.packed is not None:
                held += [group.packed.panels, group.packed.dense, group.packed.bias, group.packed.scales]
        for norm in self.norms.values():
            held += [norm.weight, norm.bias, norm.scale, norm.shift]
        held += [t for pair in self.ropes for t in pair]
        return tuple(ptr(t) for t in held)

    def _check_devices(self, parts: Mapping[str, Sequence[ResolvedLinear]]) -> None:
        held = {name: [t for p in own for t in p.tensors()] for name, own in parts.items()}
        held |= {name: list(norm.spec.sources()) for name, norm in self.norms.items()}
        held |= {f"table {i}": [t] for i, t in enumerate(self._tables())}
        for name, tensors in held.items():
            for tensor in tensors:
                check_plain(name, tensor)
                if tensor.device != self.device:
                    raise Unsupported(
                        f"{name} is on {tensor.device} and the embedding was on {self.device}: "
                        "the fused decoder needs the model on one device."
                    )

    def _tables(self) -> list[Tensor]:
        """Embedding and, where there are learned positions, their table."""
        modules: list[Any] = [m for m in (self.spec.embed, self.spec.positions) if m is not None]
        return [m.weight.detach() for m in modules]

    def _resolve(self, names: Iterable[str]) -> dict[str, list[ResolvedLinear]]:
        return {name: self.groups[name].resolve(name) for name in names}

    def _check_shapes(self, parts: Mapping[str, Sequence[ResolvedLinear]]) -> None:
        """Raises Unsupported for a projection of another shape than its pack."""
        for name, group in self.groups.items():
            shapes = [tuple(p.weight.shape) for p in parts[name]]
            if group.packed is not None and shapes != group.packed.shapes:
                raise Unsupported(
                    f"{name} has shapes {shapes} and had {group.packed.shapes}: make a new decoder."
                )

    def _refresh_part(
        self,
        parts: Mapping[str, list[ResolvedLinear]],
        norms: Sequence[str],
        known: _Digests,
        stats: RefreshStats,
    ) -> None:
        written = {
            name: self.groups[name].key is None or _versions(own) != self.groups[name].versions
            for name, own in parts.items()
        }
        small = [t for name, own in parts.items() if written[name] for p in own for t in p.tensors()[1:]]
        still = [t for name, own in parts.items() if not written[name] for p in own for t in p.tensors()]
        known.read(small + still + [t for name in norms for t in self.norms[name].spec.sources()])
        for name, own in parts.items():
            self._refresh_group(self.groups[name], own, written[name], known, stats)
        for name in norms:
            norm = self.norms[name]
            key = known.of(norm.spec.sources())
            stats.total += 1
            if key != self._norm_keys.get(name):
                self._norm_keys.pop(name, None)  # as for a group's key
                norm.fill(self.device)
                self._norm_keys[name] = key
                stats.changed += 1

    def _refresh_sharded(
        self, gather: Callable[[Sequence[nn.Module]], AbstractContextManager[Any]], stats: RefreshStats
    ) -> None:
        """The same with one layer's weights whole at a time. Digests are of one gathering: the next one may put
        other weights at the same address."""
        parts: dict[str, tuple[list[str], list[str]]] = {}
        for kind, names in enumerate((list(self.groups), list(self.norms))):
            for name in names:
                parts.setdefault(name.rpartition(".")[0], ([], []))[kind].append(name)
        for groups, norms in parts.values():
            modules = [s.module for name in groups for s in self.groups[name].specs]
            with gather(modules + [self.norms[name].spec.module for name in norms]):
                self._refresh_part(self._resolve(groups), norms, _Digests(stats), stats)
        with gather([m for m in (self.spec.embed, self.spec.positions) if m is not None]):
            self._refresh_tables(_Digests(stats), stats)

    def _refresh_group(
        self, group: Group, parts: list[ResolvedLinear], written: bool, known: _Digests, stats: RefreshStats
    ) -> None:
        """written: pack first and digest meanwhile, for the weights have most likely changed."""
        stats.total += 1
        before = group.key
        if not written and _key(parts, known) == before:
            return
        group.key = None  # a fill that fails leaves no pack that counts as good
        if group.packed is not None and group.packed.fits(parts):
            found = group.packed.fill(parts, digest=written)
            known.learn([p.weight for p in parts][: len(found)], found)
        else:
            dense = True if self.backend in ("triton", "cuda") else None
            group.packed = PackedLinear.from_parts(
                parts, self.dtype, gated=group.gated, weights=self.weights, dense=dense
            )
        group.key, group.versions = _key(parts, known), _versions(parts)
        stats.changed += group.key != before
        stats.bytes_packed += group.packed.nbytes

    def _refresh_tables(self, known: _Digests, stats: RefreshStats) -> None:
        """Embedding and learned positions are used where they are (copied only when the dtypes differ)."""
        tables = self._tables()
        in_place = self.gather is None and all(t.dtype == self.dtype and t.is_contiguous() for t in tables)
        key = tuple((t.data_ptr(), tuple(t.shape)) for t in tables) if in_place else known.of(tables)
        stats.total += 1
        if key == self._table_key:
            return
        self._table_key = None
        held = (self.embed_table, self.position_table) if self._tables_copied else (None, None)
        if not in_place:  # into the copies of last time, where there are some
            tables = [_refill(h, t.contiguous(), self.dtype) for h, t in zip(held, tables, strict=False)]
        self.embed_table, *rest = tables
        self.position_table = rest[0] if rest else torch.empty(0, device="cpu")
        self._tables_copied = not in_place
        self._table_key = key
        stats.changed += 1

    def rope_tables(self, positions: int) -> list[tuple[Tensor, Tensor]]:
        """cos and sin, float32 [>= positions, rotary_dim / 2], of each of `spec.ropes()`; grown by powers of two."""
        ropes = self._rope_specs
        if ropes and (not self.ropes or self.ropes[0][0].shape[0] < positions):
            size = 1 << max(9, (positions - 1).bit_length())
            made = [rope.tables(size) for rope in ropes]
            tables = [(cos.to(self.device), sin.to(self.device)) for cos, sin in made]
            self._rebind()  # before those go that the plan points to
            self.ropes = tables
        return self.ropes

    def rope_of(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """cos and sin of a layer, as the last `rope_tables` left them; None: it does not rotate."""
        index = self._rope_of[layer]
        return None if index is None else self.ropes[index]

    @property
    def embed_scale(self) -> float:
        """What embeddings are multiplied by: rounded as the embedding module itself rounds it."""
        scale = self.spec.embed_scale
        return float(torch.tensor(scale, device="cpu").to(self.dtype)) if self.spec.scale_in_embed else scale

    # ------------------------------------------------------------------------------------------------ steps

    @lasting_tensors()
    def new_cache(
        self, num_slots: int, max_tokens: int, num_pages: int | None = None, *, padding: bool = False
    ) -> PagedKVCache:
        """A cache for `num_slots` sequences of up to `max_tokens` tokens (`num_pages` limits the pool;
        default: enough; `padding`: see PagedKVCache)."""
        spec, pages = self.spec, pages_for(max_tokens)
        return PagedKVCache(
            len(spec.layers), spec.num_kv_heads, spec.head_dim, num_pages or num_slots * pages, num_slots,
            pages, self.cache_dtype, self.device, padding,
        )  # fmt: skip

    @_one_at_a_time
    def step(
        self,
        tokens: Tensor,
        cache: PagedKVCache,
        slots: Sequence[int],
        q_lens: Sequence[int] | None = None,
        logits: Literal["last", "all", "none"] = "last",
        keep: bool = True,
    ) -> Tensor:
        """Appends tokens to rows of the cache and returns logits (without a head: hidden states).

        Args:
            tokens: int64 [T] on the CPU, the new tokens of all rows one after the other.
            slots: cache slot of each row, each named once.
            q_lens: new tokens of each row, all at least 1; default: one each.
            logits: "last" gives float32 [rows, vocab] for each row's last token, "all" [T, vocab], "none"
                [0, vocab].
            keep: False: the next step may overwrite the result.

        Raises ValueError or TypeError, before anything changes, for tokens, slots, lengths or a cache that do
        not fit together; OutOfPages when the cache is full.
        """
        places = np.asarray(slots, dtype=np.int64)
        lens = np.ones(len(places), dtype=np.int64) if q_lens is None else np.asarray(q_lens, dtype=np.int64)
        ids = self._check_step(tokens, cache, places, lens, logits)
        cache.prepare_append(places, lens)
        self.rope_tables(int((cache._lengths[places] + lens).max()))
        pieces = []
        passes = list(_passes(lens, self.max_tokens))
        for rows, row_lens, begin in passes:
            chosen = places[rows]
            tables = _tables(ids[begin : begin + int(row_lens.sum())], cache, chosen, row_lens, logits)
            if logits == "last" and int(row_lens.sum()) != len(ids):  # a cut row has its logits last
                done = np.cumsum(lens)[rows] == begin + np.cumsum(row_lens)
                tables.selected = tables.selected[done]
            pieces.append(self.executor.run(tables, cache, keep or len(passes) > 1))
            cache.advance(chosen, row_lens)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    @_one_at_a_time
    def decode(
        self,
        tokens: Tensor,
        cache: PagedKVCache,
        slots: Sequence[int],
        draw: Draw,
        steps: int = 1,
        ends: Sequence[int] = (),
    ) -> Drawn:
        """Appends a token to each row, draws the next one from its logits, appends that, and so on.

        Args:
            tokens: int64 [rows] on the CPU, each row's token that comes first. slots: cache slot of each row.
            draw: how tokens are drawn; a row's position rises by one a step.
            steps: draws of a row, at most; the result has at least one. A step that draws one of `ends` for any row is
                the last one. The tokens of the last step are not appended.

        The tokens are those of `step` and `ops.sample` in turn, bit for bit; where the CPU kernels walk the plan, all
        steps are one call. Raises as those two do.
        """
        if steps < 1:
            raise ValueError(f"steps is {steps}: draw at least 1 token.")
        check_draw(**vars(draw), rows=len(slots))
        native_steps = type(self.executor) is NativeExecutor and self.executor.trace is None
        if not native_steps or len(slots) > self.max_tokens:
            logits = self.step(tokens, cache, slots, keep=False)
            if logits.is_cuda:
                torch.cuda.synchronize(logits.device)
            start = time.perf_counter()
            chosen, log_probs = draw.sample(logits, self.backend)
            return Drawn(chosen[None], log_probs[None], time.perf_counter() - start)
        places = np.asarray(slots, dtype=np.int64)
        lens = np.ones(len(places), dtype=np.int64)
        ids = self._check_step(tokens, cache, places, lens, "last")
        longest = int(cache._lengths[places].max()) + steps
        check_length(self.limit, longest)
        cache.prepare_append(places, lens * steps)
        self.rope_tables(longest)
        assert isinstance(self.executor, NativeExecutor)
        drawn = self.executor.decode(_tables(ids, cache, places, lens, "last"), cache, draw, steps, ends)
        cache.advance(places, lens * len(drawn.tokens))
        raise_for_bad_rows(drawn.tokens[-1], draw.temperature)
        return drawn

    def _check_step(
        self, tokens: Tensor, cache: PagedKVCache, slots: np.ndarray, lens: np.ndarray, logits: str
    ) -> np.ndarray:
        """The tokens as an array, once everything fits together."""
        if self.epoch == 0 or not self._settled:
            state = "has no packs yet" if self._settled else "has packs of a refresh that did not end"
            raise RuntimeError(f"the decoder {state}: call refresh() before step().")
        if tokens.dtype != torch.int64 or tokens.dim() != 1 or tokens.device.type != "cpu":
            raise TypeError(
                f"tokens are {tokens.dtype} of shape {list(tokens.shape)} on {tokens.device}: "
                "give int64 of shape [T] on the CPU."
            )
        if logits not in ("last", "all", "none"):
            raise ValueError(f"logits is {logits!r}: give 'last', 'all' or 'none'.")
        ids = tokens.numpy()
        if len(lens) != len(slots) or len(slots) == 0 or lens.min() < 1 or lens.sum() != len(ids):
            raise ValueError(
                f"{len(ids)} tokens, {len(slots)} slots and lengths {lens.tolist()} do not fit: every row "
                "needs at least one token and the lengths must add up."
            )
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.embed_table.shape[0]:
            bad = low if low < 0 else high
            raise ValueError(
                f"token id {bad} is outside the vocabulary of {self.embed_table.shape[0]}: "
                "check the tokenizer."
            )
        spec = self.spec
        ours = (self.cache_dtype, len(spec.layers), spec.num_kv_heads, spec.head_dim, self.device)
        if (cache.dtype, cache.num_layers, cache.num_kv_heads, cache.head_dim, cache.device) != ours:
            raise ValueError(f"the cache ({cache}) was not made for this decoder: use decoder.new_cache().")
        if slots.min() < 0 or slots.max() >= cache.num_slots:
            bad = int(slots.min() if slots.min() < 0 else slots.max())
            raise ValueError(f"slot {bad} does not exist: the cache has slots 0 to {cache.num_slots - 1}.")
        check_length(self.limit, int((cache._lengths[slots] + lens).max()))
        return ids


def check_length(limit: tuple[int, str] | None, longest: int) -> None:
    """Raises ValueError for a row beyond `DecoderSpec.position_limit()`."""
    if limit is None or longest <= limit[0]:
        return
    because = f" ({limit[1]})" if limit[1] else ""
    raise ValueError(
        f"a row would reach {longest} tokens and the model has {limit[0]} positions{because}: shorten it."
    )


def _passes(lens: np.ndarray, limit: int) -> Iterable[tuple[np.ndarray, np.ndarray, int]]:
    """(rows, tokens of each, first token) of passes of at most `limit` tokens; long rows are cut."""
    if lens.sum() <= limit:
        yield np.arange(len(lens)), lens, 0
        return
    ends = np.cumsum(lens)
    starts = ends - lens
    for begin in range(0, int(ends[-1]), limit):
        end = min(begin + limit, int(ends[-1]))
        rows = np.flatnonzero((starts < end) & (ends > begin))
        yield rows, np.minimum(ends[rows], end) - np.maximum(starts[rows], begin), begin


def _tables(
    ids: np.ndarray, cache: PagedKVCache, slots: np.ndarray, lens: np.ndarray, logits: str
) -> StepTables:
    old = cache._lengths[slots]
    ends = np.cumsum(lens)
    total = int(ends[-1])
    slot_of_token = slots.astype(np.int32)
    slot_array, positions = slot_of_token, old
    if total != len(slots):  # else one token a row
        slot_of_token = np.repeat(slot_array, lens)
        positions = np.repeat(old - (ends - lens), lens) + np.arange(total)
    if logits == "last":
        selected = ends - 1
    else:
        selected = np.arange(total if logits == "all" else 0)
    bounds = np.zeros(len(slots) + 1, dtype=np.int32)
    bounds[1:] = ends
    return StepTables(
        token_ids=np.ascontiguousarray(ids),
        positions=positions.astype(np.int32),
        slot_of_token=slot_of_token,
        cu_seqlens=bounds,
        kv_lens=(old + lens).astype(np.int32),
        slots=slot_array,
        selected=selected.astype(np.int64),
    )


def _named_norms(spec: DecoderSpec) -> Iterable[tuple[str, NormSpec, int]]:
    """(name, norm, width of a slice)"""
    if spec.embed_norm is not None:
        yield "embed_norm", spec.embed_norm, spec.hidden_size
    heads = {"q_norm": spec.num_heads, "k_norm": spec.num_kv_heads}
    for i, layer in enumerate(spec.layers):
        for part, norm in layer.norms():
            width = heads[part] * spec.head_dim // norm.groups if part in heads else spec.hidden_size
            yield f"layers.{i}.{part}", norm, width
    if spec.final_norm is not None:
        yield "final_norm", spec.final_norm, spec.hidden_size


def _named_groups(spec: DecoderSpec) -> Iterable[tuple[str, list[LinearSpec], bool]]:
    for name, single in (
        ("project_in", spec.project_in),
        ("project_out", spec.project_out),
        ("lm_head", spec.lm_head),
    ):
        if single is not None:
            yield name, [single], False
    for i, layer in enumerate(spec.layers):
        yield f"layers.{i}.qkv", [p for s in (layer.q, layer.k, layer.v) for p in s.pieces()], False
        yield f"layers.{i}.o", [layer.o], False
        if layer.gate is not None:
            yield f"layers.{i}.gate_up", [layer.gate, layer.up], True
        else:
            yield f"layers.{i}.up", [layer.up], False
        yield f"layers.{i}.down", [layer.down], False


def apply_norm(norm: NormSpec, x: Tensor, backend: str | None = None) -> Tensor:
    """The norm that a spec describes, on x [..., width]; differentiable in x and in the module's weights."""
    return _norm(norm, *norm.tensors(), x, backend)


def _norm(
    spec: NormSpec, weight: Tensor | None, bias: Tensor | None, x: Tensor, backend: str | None
) -> Tensor:
    if spec.groups == 1:
        weight, bias = (t if t is None else t.reshape(-1) for t in (weight, bias))
        return _norm_rows(spec, weight, bias, x, backend)
    slices = x.unflatten(-1, (spec.groups, -1))
    if all(t is None or t.dim() == 1 for t in (weight, bias)):
        return _norm_rows(spec, weight, bias, slices.contiguous(), backend).flatten(-2)
    rows = []
    for i in range(spec.groups):
        w, b = (None if t is None else t[i] for t in (weight, bias))
        rows.append(_norm_rows(spec, w, b, slices[..., i, :].contiguous(), backend))
    return torch.stack(rows, dim=-2).flatten(-2)


def _norm_rows(
    spec: NormSpec, weight: Tensor | None, bias: Tensor | None, x: Tensor, backend: str | None
) -> Tensor:
    if spec.kind == "layer":
        y = layer_norm(x, weight, bias, spec.eps, backend=backend)
    else:
        scale = torch.ones(x.shape[-1], dtype=x.dtype, device=x.device) if weight is None else weight
        offset, rounding = spec.weight_offset, spec.rounding
        y = rms_norm(x, scale, spec.eps, weight_offset=offset, rounding=rounding, backend=backend)
    assert isinstance(y, Tensor)
    return y

"""The training forward of a decoder on packed rows: no padding, the ops of the rollout, gradients for what is
trained.

`packed_hidden` walks a `DecoderSpec`. By default projections run through the model's own modules (so adapters,
hooks and sharded weights behave as ever) and everything between them through our differentiable ops. With
`exact` they run through the packs of a `Decoder`: then every op has the kernel, the weights and the rounding
of the rollout, and hidden states, hence log-probs, are equal to the rollout's bit for bit. Gradients to
weights, A and B are those of W + scale B A; the one rounding of the packed weight is passed straight through.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from .int8 import Int8Linear
from .models.spec import DecoderSpec, LayerSpec, LinearSpec, NormSpec
from .ops.attention import packed_attention
from .ops.bias_act import bias_act
from .ops.gated_act import gated_act
from .ops.linear import linear_input_grad, linear_sums
from .ops.lora_linear import low_rank_grads
from .ops.rope_append import rope
from .packing import PackedLinear, ResolvedLinear, resolve_linear
from .plan import Decoder, apply_norm, check_length


def packed_hidden(
    spec: DecoderSpec,
    input_ids: Tensor,
    cu_seqlens: Tensor,
    *,
    exact: Decoder | None = None,
    backend: str | None = None,
    segment: Segment | None = None,
) -> Tensor:
    """Hidden states that the head reads, [T, width], for packed rows.

    Args:
        input_ids: int64 [T], the tokens of all rows one after the other.
        cu_seqlens: int32 [rows + 1], row r owns the tokens cu_seqlens[r] .. cu_seqlens[r + 1]; positions start
            at 0.
        exact: a refreshed `Decoder` of the same model: its packs do the projections.
        backend: of the ops between the projections.
        segment: `segment(modules, f, x)` runs f(x), which reads the parameters of these modules and of no others:
            for weights that are on this machine only while they are used.

    Gradient checkpointing is applied layer by layer where the model has it switched on. Dropout is not applied.

    Raises ValueError or TypeError for ids, lengths or a decoder that do not fit.
    """
    longest = _check_rows(spec, input_ids, cu_seqlens)
    _check_exact(spec, exact)
    starts = torch.repeat_interleave(cu_seqlens[:-1].long(), cu_seqlens.diff().long())
    positions = torch.arange(input_ids.numel(), device=input_ids.device) - starts

    walk = _Walk(spec, cu_seqlens, positions, longest, exact, backend)
    segment = segment or run_segment
    x = segment(spec.first_modules(), walk.begin, input_ids)
    checkpointing = torch.is_grad_enabled() and getattr(spec.trunk, "gradient_checkpointing", False)
    for i, layer in enumerate(spec.layers):
        if checkpointing and segment is run_segment:
            x = checkpoint(walk.layer, i, layer, x, use_reentrant=False)
        else:
            x = segment(layer.modules(), partial(walk.layer, i, layer), x)
    return segment(spec.last_modules(), walk.end, x)


Segment = Callable[[Sequence[Any], Callable[[Tensor], Any], Tensor], Any]


def run_segment(modules: Sequence[Any], f: Callable[[Tensor], Any], x: Tensor) -> Any:
    """f(x): the segment of weights that are always whole."""
    return f(x)


def _scaled(x: Tensor, scale: float) -> Tensor:
    return x if scale == 1.0 else x * scale


def _check_rows(spec: DecoderSpec, input_ids: Tensor, cu_seqlens: Tensor) -> int:
    """Length of the longest row."""
    if input_ids.dim() != 1 or input_ids.dtype != torch.int64:
        raise TypeError(
            f"input_ids are {input_ids.dtype} of shape {tuple(input_ids.shape)}: give int64 of shape [T]."
        )
    if cu_seqlens.device != input_ids.device:
        raise ValueError(
            f"input_ids are on {input_ids.device} and cu_seqlens on {cu_seqlens.device}: move them to one device."
        )
    embed: Any = spec.embed
    vocabulary = embed.num_embeddings
    if input_ids.numel() and not 0 <= int(input_ids.min()) <= int(input_ids.max()) < vocabulary:
        raise ValueError(
            f"input_ids run from {int(input_ids.min())} to {int(input_ids.max())}: "
            f"the vocabulary has {vocabulary}."
        )
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or len(cu_seqlens) == 0:
        raise TypeError(
            f"cu_seqlens is {cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}: give int32 of shape [rows + 1]."
        )
    lengths = cu_seqlens.diff()
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != input_ids.numel() or bool((lengths < 0).any()):
        raise ValueError(
            f"cu_seqlens {cu_seqlens.tolist()} do not cut {input_ids.numel()} tokens into rows: "
            "begin with 0, never fall, end with the number of tokens."
        )
    longest = int(lengths.max()) if lengths.numel() else 0
    check_length(spec.position_limit(), longest)
    return longest


def _check_exact(spec: DecoderSpec, exact: Decoder | None) -> None:
    if exact is None:
        return
    embed: Any = spec.embed
    if exact.dtype != embed.weight.dtype:
        raise ValueError(
            f"the rollout runs in {exact.dtype} and the model is {embed.weight.dtype}: "
            "exact mode needs one dtype for both."
        )
    if exact.epoch == 0:
        raise RuntimeError("the decoder has no packs yet: call refresh() before an exact forward.")


class _Walk:
    """What the layers of one forward share."""

    def __init__(
        self,
        spec: DecoderSpec,
        cu_seqlens: Tensor,
        positions: Tensor,
        longest: int,
        exact: Decoder | None,
        backend: str | None,
    ):
        self.spec, self.exact, self.backend = spec, exact, backend
        self.cu_seqlens, self.positions = cu_seqlens, positions
        device = positions.device
        tables = exact.rope_tables(longest) if exact else [rope.tables(longest) for rope in spec.ropes()]
        tables = [(cos.to(device), sin.to(device)) for cos, sin in tables]
        self.tables = {id(rope): table for rope, table in zip(spec.ropes(), tables, strict=True)}
        self.alibi = None if spec.alibi is None else torch.tensor(spec.alibi, device=device)

    def norm(self, norm: NormSpec | None, x: Tensor) -> Tensor:
        return x if norm is None else apply_norm(norm, x, self.backend)

    def begin(self, input_ids: Tensor) -> Tensor:
        """What the first layer reads."""
        spec = self.spec
        embed: Any = spec.embed
        if input_ids.device != embed.weight.device:  # inside its segment, where its weights are what is used
            raise ValueError(
                f"input_ids are on {input_ids.device} and the model on {embed.weight.device}: move them to one device."
            )
        x = embed(input_ids)
        if spec.project_in is not None:
            x = self.project(x, "project_in", [spec.project_in])[0]
        if not spec.scale_in_embed:
            x = _scaled(x, spec.embed_scale)
        if spec.positions is not None:
            table: Any = spec.positions
            x = x + torch.nn.functional.embedding(self.positions + spec.position_offset, table.weight)
        return self.norm(spec.embed_norm, x)

    def end(self, x: Tensor) -> Tensor:
        """What the head reads of the last layer's output."""
        spec = self.spec
        x = self.norm(spec.final_norm, x)
        if spec.project_out is not None:
            x = self.project(x, "project_out", [spec.project_out])[0]
        return x if spec.lm_head is None else _scaled(x, spec.logit_scale)

    def layer(self, i: int, layer: LayerSpec, x: Tensor) -> Tensor:
        if layer.order == "post":
            x = self.norm(layer.attn_norm, x + self.attention(i, layer, x))
            return self.norm(layer.mlp_norm, x + self.mlp(i, layer, x))
        scale = layer.residual_scale
        n = self.norm(layer.attn_norm, x)
        if layer.order == "parallel":
            m = n if layer.mlp_norm is None else self.norm(layer.mlp_norm, x)
            x = x + _scaled(self.attention(i, layer, n), scale)
            return x + _scaled(self.mlp(i, layer, m), scale)
        x = (n if layer.residual_from_norm else x) + _scaled(self.attention(i, layer, n), scale)
        m = self.norm(layer.mlp_norm, x)
        return (m if layer.residual_from_norm else x) + _scaled(self.mlp(i, layer, m), scale)

    def attention(self, i: int, layer: LayerSpec, x: Tensor) -> Tensor:
        dim = self.spec.head_dim
        q, k, v = self.project(x, f"layers.{i}.qkv", [layer.q, layer.k, layer.v])
        q, k = self.norm(layer.q_norm, q), self.norm(layer.k_norm, k)
        q, k, v = (y.reshape(len(x), -1, dim) for y in (q, k, v))
        if layer.rope is not None:
            tables, style, rotary_dim = self.tables[id(layer.rope)], layer.rope.style, layer.rope.rotary_dim
            q, k = (
                rope(y, *tables, self.positions, style=style, rotary_dim=rotary_dim, backend=self.backend)
                for y in (q, k)
            )
        out = packed_attention(
            q, k, v, self.cu_seqlens, scale=layer.scale, window=layer.window, softcap=self.spec.attn_softcap,
            alibi_slopes=self.alibi, backend=self.backend,
        )  # fmt: skip
        out = self.project(out.reshape(len(x), -1), f"layers.{i}.o", [layer.o])[0]
        return self.norm(layer.attn_out_norm, out)

    def mlp(self, i: int, layer: LayerSpec, x: Tensor) -> Tensor:
        if layer.gate is not None:
            gate, up = self.project(x, f"layers.{i}.gate_up", [layer.gate, layer.up])
            mid = gated_act(gate, up, layer.activation, backend=self.backend)
        else:
            (up,) = self.project(x, f"layers.{i}.up", [layer.up])
            mid = bias_act(up, None, layer.activation, backend=self.backend)
        return self.norm(layer.mlp_out_norm, self.project(mid, f"layers.{i}.down", [layer.down])[0])

    def project(self, x: Tensor, name: str, specs: Sequence[LinearSpec]) -> Sequence[Tensor]:
        """One output a spec. A module that several specs share (fused qkv) is called once."""
        pieces = [spec.pieces() for spec in specs]
        if self.exact is not None:
            parts = [resolve_linear(piece, name) for own in pieces for piece in own]
            columns = iter(exact_linear(x, self.exact.packed(name), parts, self.exact.backend))
        else:
            outputs: dict[int, Tensor] = {}
            columns = iter([self._columns(x, piece, outputs) for own in pieces for piece in own])
        return [_side_by_side([next(columns) for _ in own]) for own in pieces]

    @staticmethod
    def _columns(x: Tensor, spec: LinearSpec, outputs: dict[int, Tensor]) -> Tensor:
        """The output of a projection of one slice; `outputs` of the modules called so far."""
        y = outputs.get(id(spec.module))
        if y is None:
            module: Any = spec.module
            half = x.dtype == torch.float16 and x.device.type == "cpu"
            with _HalfProducts() if half else contextlib.nullcontext():
                y = nn.functional.linear(x, _dense(module, x.dtype)) if spec.weight_only else module(x)
            outputs[id(module)] = y
        if spec.rows is None:
            return y
        rows: Any = spec.rows
        return y[:, slice(*rows)]


def _dense(module: Any, dtype: torch.dtype) -> Tensor:
    weight: Tensor = module.dense(dtype) if isinstance(module, Int8Linear) else module.weight
    return weight


class _HalfProducts(TorchFunctionMode):
    """Within, float16 products of linear layers are float32 products that are rounded once: on the CPU PyTorch's own
    take up to a hundred times as long."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.linear and args[0].dtype == torch.float16:
            bias = args[2] if len(args) > 2 else kwargs.get("bias")
            return _HalfLinear.apply(args[0], args[1], bias)
        if func is torch.addmm and args[1].dtype == torch.float16:  # Conv1D
            return _HalfLinear.apply(args[1], args[2].t(), args[0])
        return func(*args, **kwargs)


class _HalfLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        y = nn.functional.linear(x.float(), weight.float(), None if bias is None else bias.float())
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """dx = dy W, dW = dy^T x, db = sum dy."""
        x, weight = ctx.saved_tensors
        dy = grads[0].float()
        wanted = ctx.needs_input_grad
        dx = (dy @ weight.float()).to(x.dtype) if wanted[0] else None
        flat = dy.reshape(-1, dy.shape[-1])
        dw = (flat.t() @ x.reshape(-1, x.shape[-1]).float()).to(weight.dtype) if wanted[1] else None
        return dx, dw, flat.sum(0).to(weight.dtype) if wanted[2] else None


def _side_by_side(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def exact_linear(
    x: Tensor, packed: PackedLinear, parts: Sequence[ResolvedLinear], backend: str | None = None
) -> tuple[Tensor, ...]:
    """round(x W_p^T + b_p) for every part of a pack, with the pack's bits; x: [T, k], one [T, n_p] a part.
    `backend`: the decoder's.

    Differentiable in x and in the parts' weight, bias, A and B.
    """
    if x.dtype != packed.dtype:
        raise TypeError(f"x is {x.dtype} and the packed weight {packed.dtype}: give one dtype.")
    tensors = [t for p in parts for t in (p.weight, p.bias)]
    updates = [t for p in parts for u in p.updates for t in (u.a, u.b)]
    scales = [[u.scale for u in p.updates] for p in parts]
    return _ExactLinear.apply(x, packed, backend, scales, len(tensors), *tensors, *updates)


class _ExactLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        packed: PackedLinear,
        backend: str | None,
        scales: Any,
        count: int,
        *tensors: Tensor | None,
    ) -> Any:
        ctx.packed, ctx.fills, ctx.scales, ctx.count = packed, packed.fills, scales, count
        ctx.save_for_backward(x, *tensors)
        return linear_sums(x, packed, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """With dy of a part and W_p its packed weight: dx += dy W_p, dW = dy^T x, db = sum dy,
        dA = s (dy B)^T x, dB = s dy^T (x A^T)."""
        x, *tensors = ctx.saved_tensors
        needs = ctx.needs_input_grad
        base, updates = tensors[: ctx.count], iter(range(ctx.count, len(tensors)))
        out: list[Tensor | None] = [None] * len(tensors)
        dx = None
        if needs[0]:
            if ctx.packed.fills != ctx.fills:
                raise RuntimeError(
                    "the packs were rebuilt between this exact forward and its backward: call backward before the "
                    "next generate or optimizer step."
                )
            dx = linear_input_grad(grads, ctx.packed)
        for p, dy in enumerate(grads):
            if needs[5 + 2 * p]:
                out[2 * p] = dy.t() @ x
            if base[2 * p + 1] is not None and needs[5 + 2 * p + 1]:
                out[2 * p + 1] = dy.sum(0)
            for scale in ctx.scales[p]:
                ia, ib = next(updates), next(updates)
                if needs[5 + ia] or needs[5 + ib]:
                    out[ia], out[ib] = low_rank_grads(x, dy, tensors[ia], tensors[ib], scale)
        return (dx, None, None, None, None, *out)


def exact_weight(packed: PackedLinear, part: ResolvedLinear) -> Tensor:
    """The value of a single projection's pack, [out, in], with the gradient of W + sum of scale * B A."""
    if not part.updates:
        return part.weight if part.weight.dtype == packed.dtype else part.weight.to(packed.dtype)
    updates = [t for u in part.updates for t in (u.a, u.b)]
    return _ExactWeight.apply(packed.to_dense(), [u.scale for u in part.updates], part.weight, *updates)


class _ExactWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, scales: list[float], weight: Tensor, *updates: Tensor) -> Tensor:
        ctx.scales, ctx.dtype = scales, weight.dtype
        ctx.save_for_backward(*updates)
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """dW = d, dA = s B^T d, dB = s d A^T."""
        (d,) = grads
        out: list[Tensor | None] = []
        for i, scale in enumerate(ctx.scales):
            a, b = ctx.saved_tensors[2 * i : 2 * i + 2]
            needs_a, needs_b = ctx.needs_input_grad[3 + 2 * i : 5 + 2 * i]
            out.append(scale * (b.t() @ d.to(b.dtype)) if needs_a else None)
            out.append(scale * (d.to(a.dtype) @ a.t()) if needs_b else None)
        return (None, None, d.to(ctx.dtype) if ctx.needs_input_grad[2] else None, *out)

"""The fused forward of a patched CausalLM, and the cache that `model.generate()` gets.

transformers' generation loop stays in charge (beams, processors, stopping, streamers); what it calls for
logits is the fused decoder over ragged rows: a left-padded batch runs without its padding, equal prompts are
computed once. Whatever a fused forward does not cover exactly goes to transformers' own forward, with a note
in the patch's report.

Logits come back as transformers' do, [rows, kept columns, vocab] in the model's dtype; columns of padding
hold zeros."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions, CausalLMOutputWithPast

from .cache import PagedKVCache
from .hf_cache import PagedDynamicCache
from .models import parts
from .models.source import mechanism
from .models.spec import DecoderSpec, Unsupported, decoder_spec
from .models.versions import cache_name
from .ops._common import DTYPES as OP_DTYPES
from .ops._common import is_plain, is_transformed
from .packing import DTYPES
from .plan import Decoder, check_plain

# Hooks that change no value: PEFT's and transformers' for gradient checkpointing, and output capture, which
# only acts inside transformers' own forward.
_HARMLESS_HOOKS = ("make_inputs_require_grad", "make_inputs_require_grads", "output_capturing_hook")
_NOTED = "_dschat_noted"
_KNOWN_ARGUMENTS = frozenset(
    [
        "input_ids",
        "attention_mask",
        "position_ids",
        "past_key_values",
        "cache",
        "use_cache",
        "logits_to_keep",
        "return_dict",
    ]
)


@functools.cache
def _fields(cls: Any) -> tuple[str, ...]:
    return tuple(f.name for f in dataclasses.fields(cls)) if dataclasses.is_dataclass(cls) else ()


def spec_key(spec: Any) -> Any:
    """Two specs with one key describe the same modules in the same way."""
    if isinstance(spec, nn.Module):
        return id(spec)
    if isinstance(spec, Tensor):
        return tuple(spec.flatten().tolist())
    if isinstance(spec, tuple):
        return tuple(spec_key(item) for item in spec)
    if isinstance(spec, dict):
        return tuple(spec.items())
    names = _fields(spec.__class__)
    return tuple(spec_key(getattr(spec, name)) for name in names) if names else spec


def _decoder_key(spec: DecoderSpec) -> Any:
    """Changes when another decoder is needed."""
    embed: Any = spec.embed
    return spec_key(spec), embed.weight.dtype, embed.weight.device


def check_dtypes(spec: DecoderSpec) -> None:
    """One dtype of weights, one that the kernels have, all on one device."""
    check_one_dtype(spec)
    weight: Any = spec.embed.weight
    if weight.dtype not in (DTYPES if weight.device.type == "cpu" else OP_DTYPES):
        raise Unsupported(f"the model's dtype is {weight.dtype}: the fused decoder runs float32 and bfloat16")


def check_one_dtype(spec: DecoderSpec) -> None:
    """One dtype of weights, all on one device."""
    embed: Any = spec.embed
    weights: list[tuple[str, Tensor]] = [("the embedding", embed.weight)]
    for layer in spec.layers:
        for field in dataclasses.fields(layer):
            part = getattr(layer, field.name)
            if hasattr(part, "rows"):
                base = parts.base_linear(part.module)
                weights.append((f"{layer.name}'s {field.name} projection", base.weight))
        for name, norm in layer.norms():
            weights += [(f"{layer.name}'s {name}", weight) for weight in norm.sources()]
    for name, outer in (("embedding's norm", spec.embed_norm), ("final norm", spec.final_norm)):
        weights += [(f"the {name}", weight) for weight in (outer.sources() if outer is not None else [])]
    for projection in (spec.lm_head, spec.project_in, spec.project_out):
        if projection is not None:
            check_plain("a projection outside the layers", parts.base_linear(projection.module).weight)
    first, device = weights[0][1].dtype, weights[0][1].device
    for place, weight in weights:
        check_plain(place, weight)
        if weight.dtype not in (first, torch.int8):  # integers have their own scales
            raise Unsupported(
                f"{place} has dtype {weight.dtype} and the embedding {first}: cast the model to one dtype"
            )
        if weight.device != device:
            raise Unsupported(
                f"{place} is on {weight.device} and the embedding on {device}: the fused decoder needs the model "
                "on one device"
            )


def forward_hook(model: nn.Module, modules: Iterable[nn.Module]) -> str | None:
    """Which of these parts of the model has a forward hook that may change values; None where none has."""
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return "a global forward hook is registered"
    for module in modules:
        if not module._forward_hooks and not module._forward_pre_hooks:
            continue
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            if getattr(hook, "__name__", "") not in _HARMLESS_HOOKS and not str(
                getattr(hook, "__module__", "")
            ).startswith("deepspeed."):  # its own bookkeeping
                name = next(n for n, m in model.named_modules() if m is module) or "the model"
                return f"{name} has a forward hook ({getattr(hook, '__qualname__', hook)})"
    return None


class FusedForward:
    """Runs a CausalLM's forward on a `Decoder`, or says why not.

    The spec is read anew for every new cache (adapters may have been added, modules replaced) and the packs
    refreshed, so that a training step between two generations is always seen; in the middle of a sequence, where
    `Decoder.is_current` or the config says that something changed. Threads take turns."""

    def __init__(self, model: Any, backend: str | None, note: Callable[[str], None]) -> None:
        self.model = model
        self.backend = backend
        self.note = note
        # Annotations do not always name the class that is returned.
        crossed = (
            CausalLMOutputWithCrossAttentions.__name__
            in inspect.unwrap(type(model).forward).__code__.co_names
        )
        self._output_class: Any = CausalLMOutputWithCrossAttentions if crossed else CausalLMOutputWithPast
        self._inner: list[nn.Module] = []  # every module below the model, as of the last refresh
        self._config: dict[str, Any] = {}  # the model's settings then
        self._lock = threading.RLock()
        self._keys: weakref.WeakKeyDictionary[Decoder, Any] = weakref.WeakKeyDictionary()
        self.decoder = self._make(decoder_spec(model))

    def _make(self, spec: DecoderSpec) -> Decoder:
        if spec.lm_head is None:
            raise Unsupported(f"{parts.class_name(self.model)} has no language-model head to generate with")
        check_dtypes(spec)
        decoder = Decoder(spec, backend=self.backend)
        self._keys[decoder] = _decoder_key(spec)
        return decoder

    # ----------------------------------------------------------------------------------------- weights

    def describe(self, owner: Decoder | None = None) -> str | None:
        """Bring spec and decoder up to date, but no packs; the reason when the model is no longer covered. Where the
        decoder is not the right one, `owner` is if it was made for what the model is now."""
        try:
            spec = decoder_spec(self.model)
            check_dtypes(spec)
            key = _decoder_key(spec)
            if owner is not None and self._keys.get(owner) == key:
                self.decoder = owner
            elif key != self._keys[self.decoder]:
                self.decoder = self._make(spec)
        except Unsupported as refused:
            return str(refused)
        return None

    def refresh(self, owner: Decoder | None = None) -> str | None:
        """Bring spec and packs up to date; the reason when the model is no longer covered. owner: see `describe`."""
        if (refused := self.describe(owner)) is not None:
            return refused
        self._config = dict(vars(self.model.config))
        self._inner = [module for module in self.model.modules() if module is not self.model]
        reason = self._hook()
        if reason is None:
            try:
                self.decoder.refresh()
            except Unsupported as refused:
                return str(refused)
        return reason

    def _hook(self) -> str | None:
        """Who would miss being called, if the modules are not."""
        return forward_hook(self.model, self._inner)

    def new_cache(self, max_length: int = 0) -> PagedDynamicCache:
        config = self.model.config.get_text_config(decoder=True)
        return PagedDynamicCache(
            config, self._pages, max_length=max_length, owner=self.decoder, note=self.note
        )

    def _pages(self, slots: int, tokens: int) -> PagedKVCache:
        return self.decoder.new_cache(slots, max(1, tokens))

    # -------------------------------------------------------------------------------------- generation

    def prepare_cache(self, generation_config: Any, model_kwargs: dict[str, Any], max_length: int) -> None:
        """After transformers chose the cache of a `generate` call: replace its plain dynamic cache by
        ours."""
        with self._lock:
            self._prepare_cache(generation_config, model_kwargs, max_length)

    def _prepare_cache(self, generation_config: Any, model_kwargs: dict[str, Any], max_length: int) -> None:
        cache: Any = model_kwargs.get(cache_name())
        if cache is None:
            return
        if isinstance(cache, PagedDynamicCache):
            self._take_over(cache)
            return
        reason = self._unsupported_generation(cache, generation_config, model_kwargs) or self.refresh()
        if reason is not None:
            self.note(f"generate ran transformers' own forward: {reason}")
            setattr(cache, _NOTED, True)
            return
        ours = self.new_cache(max_length)
        if any(cache.is_recording_past(layer) for layer in range(len(cache.layers))):
            ours.activate_past_recording()
        ours.fresh_packs = True
        model_kwargs[cache_name()] = ours

    @staticmethod
    def _unsupported_generation(
        cache: Any, generation_config: Any, model_kwargs: dict[str, Any]
    ) -> str | None:
        if type(cache) is not DynamicCache or getattr(cache, "_is_user_defined", False) or cache.offloading:
            return f"its cache is a {type(cache).__name__} that dschat did not make (pass none to get one)"
        for name in ("output_attentions", "output_hidden_states"):
            if getattr(generation_config, name, None) or model_kwargs.get(name):
                return f"{name} was asked for"
        return "inputs_embeds was given" if model_kwargs.get("inputs_embeds") is not None else None

    def _take_over(self, cache: PagedDynamicCache) -> None:
        """A cache of ours that comes back for another turn: make the packs those of today's weights."""
        if cache.is_dense:
            return
        reason = self.refresh(cache.owner)
        if reason is not None or cache.owner is not self.decoder:
            cache.to_dense()
            reason = reason or "it belongs to another model or patch"
            self.note(f"a continued cache went back to transformers: {reason}")
            return
        cache.fresh_packs = True

    # ----------------------------------------------------------------------------------------- forward

    def forward(self, arguments: dict[str, Any]) -> Any:
        """The model's output, or None when transformers' forward must run (its cache made dense, the reason
        noted)."""
        model = self.model
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
            self._release(arguments)
            return None
        cache = arguments.get(cache_name())
        if getattr(cache, _NOTED, False) or getattr(cache, "is_dense", False):
            return None  # the reason was noted when this cache went to transformers
        use_cache = arguments.get("use_cache")
        if not (use_cache if use_cache is not None else getattr(model.config, "use_cache", True)):
            self._release(arguments)
            return None
        reason = self._unsupported(arguments)
        output = None
        if reason is None:
            with self._lock:
                output = self._run(arguments)
            if not isinstance(output, str):
                return output
            reason = output
        self.note(f"a forward ran transformers' own code: {reason}")
        self._release(arguments)
        return None

    @staticmethod
    def _release(arguments: dict[str, Any]) -> None:
        cache = arguments.get(cache_name())
        if isinstance(cache, PagedDynamicCache):
            cache.to_dense()

    def _unsupported(self, arguments: dict[str, Any]) -> str | None:
        for name, value in arguments.items():
            if name not in _KNOWN_ARGUMENTS and value is not None and value is not False:
                return f"{name} was given"
        config = self.model.config
        for name in ("output_attentions", "output_hidden_states"):
            if getattr(config, name, False):
                return f"config.{name}=True"
        ids = arguments.get("input_ids")
        if not is_plain(ids) or ids.dim() != 2 or ids.numel() == 0:
            return "input_ids is not a filled 2-D tensor"
        device = self.decoder.device
        if ids.device.type not in ("cpu", device.type) or ids.dtype not in (torch.int64, torch.int32):
            return f"input_ids is {ids.dtype} on {ids.device}"
        if self.model.training and getattr(self.model, "is_activation_checkpointing", False):
            return "the model is in training mode with gradient checkpointing"
        if is_transformed():
            return "a transform of torch.func, forward-mode differentiation or a trace is active"
        if torch.is_autocast_enabled(device.type):
            return "autocast is on"
        cache = arguments.get(cache_name())
        if cache is not None and not isinstance(cache, PagedDynamicCache):
            return (
                f"{cache_name()} is a {type(cache).__name__} that dschat did not make (pass none to get one)"
            )
        return None

    def _run(self, arguments: dict[str, Any]) -> Any:
        """The output, or the reason why not. What schedules the rows lives on the CPU."""
        if self.decoder.device.type != "cpu":
            arguments = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in arguments.items()}
        ids = arguments["input_ids"]
        cache = arguments.get(cache_name())
        reason = self._bring_up_to_date(cache) or self._dropout()
        if reason is not None:
            return reason
        if cache is None:
            cache = self.new_cache()
        elif cache.owner is not self.decoder:
            if cache.get_seq_length() != 0:
                return f"{cache_name()} belongs to another model or patch"
            cache.adopt(self._pages, self.decoder)
        rows, columns = ids.shape
        past = cache.get_seq_length()
        if past and cache.rows != rows:
            return f"input_ids has {rows} rows and the cache {cache.rows}"
        new = self._new_tokens(arguments, cache, rows, columns)
        if isinstance(new, str):
            return new
        limit = self.decoder.limit
        if limit is not None and limit[1] and past + columns > limit[0]:
            return limit[1]
        keep = arguments.get("logits_to_keep", 0)
        only_last = columns == 1 or (isinstance(keep, int) and keep == 1)
        if only_last and not bool(new[:, -1].all()):
            return "a row ends in padding (pad on the left to generate)"

        logits = self._step(ids, new, cache, past, only_last)
        if not only_last and not (isinstance(keep, int) and keep == 0):
            logits = logits[:, slice(-keep, None) if isinstance(keep, int) else keep]
        cache.wrote(new)
        output = self._output_class(logits=logits, **{cache_name(): cache})
        return_dict = arguments.get("return_dict")
        if return_dict is None:
            return_dict = getattr(self.model.config, "return_dict", True)
        return output if return_dict else output.to_tuple()

    def _bring_up_to_date(self, cache: PagedDynamicCache | None) -> str | None:
        """Spec and packs of a forward over this cache; the reason when the model is no longer covered."""
        if cache is None or (not cache.fresh_packs and cache.get_seq_length() == 0):
            return self.refresh()
        same_model = cache.owner is self.decoder and vars(self.model.config) == self._config
        if same_model and self.decoder.is_current():
            return self._hook()
        before = self.decoder, self.decoder.epoch
        reason = self.refresh(cache.owner)
        if (self.decoder, self.decoder.epoch) != before:
            self.note(
                "weights, adapters or config changed in the middle of a sequence, and packs were made anew: "
                "right, and slow where it happens at every step"
            )
        return reason

    def _dropout(self) -> str | None:
        """Who would draw random numbers in the modules' own forward: any part may be in training mode by itself."""
        dropout = self.decoder.spec.dropout
        if not dropout or not (self.model.training or any(m.training for m in self._inner)):
            return None
        place, p = next(iter(dropout.items()))
        return f"the model, or a part of it, is in training mode with dropout ({place}={p})"

    def _new_tokens(
        self, arguments: dict[str, Any], cache: PagedDynamicCache, rows: int, columns: int
    ) -> Tensor | str:
        """Which new columns hold tokens, bool [rows, columns]; a reason when mask or positions are not a
        plain padding."""
        past = cache.get_seq_length()
        seen = cache.mask if past else torch.zeros(rows, 0, dtype=torch.bool, device="cpu")
        mask = arguments.get("attention_mask")
        if mask is None:
            if not bool(seen.all()):
                return "attention_mask is missing, and the cache holds padding"
            new = torch.ones(rows, columns, dtype=torch.bool, device="cpu")
        else:
            if not isinstance(mask, Tensor) or mask.dim() != 2:
                return "attention_mask is not 2-D"
            if tuple(mask.shape) != (rows, past + columns):
                return f"attention_mask has shape {list(mask.shape)}, not [{rows}, {past + columns}]"
            mask = mask.to(torch.bool)
            if not torch.equal(mask[:, :past], seen):
                return "attention_mask changed for columns that the cache already holds"
            new = mask[:, past:]
        before = seen.sum(1, keepdim=True)
        ordinals = before + new.cumsum(1) - 1
        if not bool((ordinals[:, -1] >= 0).all()):
            return "a row has no token at all"
        if any(layer.window is not None for layer in self.decoder.spec.layers):
            # A window counts columns; dropping padding between tokens would let it see farther.
            shift = torch.arange(past, past + columns, device="cpu") - ordinals
            first = torch.cat([seen, new], dim=1).to(torch.int8).argmax(1, keepdim=True)
            if not bool(((shift == first) | ~new).all()):
                return "the mask has holes, and the model has a sliding window"
        positions = arguments.get("position_ids")
        if positions is None:
            if mechanism(self.decoder.spec.trunk) in ("trunk.opt", "trunk.bloom"):
                return new  # its positions come from the mask
            positions = torch.arange(past, past + columns, device="cpu")[None]
        elif not isinstance(positions, Tensor) or positions.dim() != 2 or positions.shape[1] != columns:
            return "position_ids is not [rows, columns]"
        if not bool(((positions == ordinals) | ~new).all()):
            return (
                "position_ids does not count the tokens that attention_mask marks (a padded batch needs both)"
            )
        return new

    def _step(self, ids: Tensor, new: Tensor, cache: PagedDynamicCache, past: int, only_last: bool) -> Tensor:
        """Logits [rows, 1 or columns, vocab]; writes the cache's pages."""
        rows, columns = ids.shape
        pages = cache.open(rows, past + columns)
        dtype: Any = self.decoder.dtype
        source = list(range(rows))
        if past == 0 and rows > 1:  # equal prompts (beams, n samples) are computed once
            first: dict[bytes, int] = {}
            packed = torch.cat([ids.to(torch.int64), new.to(torch.int64)], dim=1).numpy()
            source = [first.setdefault(packed[row].tobytes(), row) for row in range(rows)]
        counts = new.sum(1).tolist()
        computed = [row for row in range(rows) if source[row] == row and counts[row]]
        chosen, marks = (ids, new) if len(computed) == rows else (ids[computed], new[computed])
        logits = self.decoder.step(
            chosen[marks].to(torch.int64),
            pages,
            [cache.slots[row] for row in computed],
            [counts[row] for row in computed],
            logits="last" if only_last else "all",
        ).to(dtype)
        for row in range(rows):
            if source[row] != row:
                pages.fork(cache.slots[source[row]], cache.slots[row])
        place = {row: i for i, row in enumerate(computed)}
        if only_last:
            if len(computed) != rows:
                logits = logits[[place[source[row]] for row in range(rows)]]
            return logits[:, None]
        full = torch.zeros(len(computed), columns, logits.shape[-1], dtype=dtype, device=logits.device)
        full[marks] = logits
        if len(computed) == rows:
            return full
        out = torch.zeros(rows, columns, logits.shape[-1], dtype=dtype, device=logits.device)
        for row in range(rows):
            if source[row] in place:
                out[row] = full[place[source[row]]]
        return out

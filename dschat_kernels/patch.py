"""`patch(model)`: put fused kernels into one Hugging Face model, and take them out again without a trace.

A piece is patched by giving its *instance* a subclass of its class whose forward calls an op. Hooks, state
dicts, names, `isinstance`, gradient checkpointing and PEFT see what they saw before; no other model changes.
The subclass carries the name of the original, and copying or pickling a patched model (deepcopy, torch.save,
spawn) yields a plain, unpatched one.

* norms: `rms_norm`, `layer_norm`; * gated MLPs: `gated_act` between the module's own gate, up and down, so
that LoRA and hooks on these keep working; * activation modules: `bias_act`; * the CausalLM: `generate` and
every forward without gradients run the fused decoder (`hf_generate.py`).

Training runs transformers' own modules with the fused norms, gates and activations: its gradients are
transformers'."""

from __future__ import annotations

import copyreg
import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType, TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from .models import parts
from .models.detect import hf_model
from .models.source import mechanism, original_class
from .models.spec import Unsupported, decoder_spec
from .models.versions import cache_name
from .ops._common import CPU_DTYPES, DTYPES, is_plain, is_transformed, resolve_backend
from .report import Entry, Report, make_report

# How pickle protocols 0 and 1 make an object; unlike `__newobj__`, it may name another class.
_RECONSTRUCT: Any = vars(copyreg)["_reconstructor"]
_MARK = "_dschat_patch"  # in the instance dictionary of a patched model; never copied or pickled


# ------------------------------------------------------------------------------------------ class swap


@functools.cache
def _fused_class(
    original: Any, known: Callable[..., Any], make_forward: Callable[..., Any], options: tuple[Any, ...]
) -> type:
    """The subclass of `original` whose forward is `make_forward(original, *options)` while that of `original` is
    `known`; one for all equal requests."""

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        function, arguments, state, *rest = super(fused, self).__reduce_ex__(protocol)
        arguments = tuple(original if argument is fused else argument for argument in arguments)
        if function.__name__ == "__newobj__":  # pickle insists that its class is the object's own
            function, arguments = _RECONSTRUCT, (original, object, None)
        if isinstance(state, dict):
            state = {key: value for key, value in state.items() if key != _MARK}
        return (function, arguments, state, *rest)

    members = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "__reduce_ex__": __reduce_ex__,
        "_dschat_original": original,
        **make_forward(original, *options),
    }
    kernel = members["forward"]

    @functools.wraps(known)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """The kernel, as long as it stands for what the class computes: a forward may be replaced in the class."""
        return (kernel if original.forward is known else original.forward)(self, *args, **kwargs)

    members["forward"] = forward
    fused: Any = type(original.__name__, (original,), members)
    return fused


def _plain(*tensors: Tensor) -> bool:
    """Whether the kernels may take these: plain tensors on one device, of one dtype that they have there, no
    autocast, nothing of torch that has to see each operation."""
    first = tensors[0]
    return (
        all(t.dtype == first.dtype and t.device == first.device and is_plain(t) for t in tensors)
        and first.dtype in _dtypes_on(first.device)
        and not torch.is_autocast_enabled(first.device.type)
        and not is_transformed()
    )


def _dtypes_on(device: torch.device) -> tuple[torch.dtype, ...]:
    """What the kernels of a device run."""
    return {"cpu": CPU_DTYPES, "cuda": tuple(DTYPES)}.get(device.type, ())


def _rms_norm(original: Any, eps: str, offset: float, rounding: str, backend: str) -> dict[str, Any]:
    from .ops.rms_norm import rms_norm

    @functools.wraps(original.forward)
    def forward(self: Any, hidden_states: Tensor) -> Any:
        if not _plain(hidden_states, self.weight):
            return original.forward(self, hidden_states)
        return rms_norm(
            hidden_states,
            self.weight,
            getattr(self, eps),
            weight_offset=offset,
            rounding=rounding,
            backend=backend,
        )

    return {"forward": forward}


def _layer_norm(
    original: Any, weight: str | None, bias: str | None, eps: str | float, backend: str
) -> dict[str, Any]:
    """weight, bias: attributes, None where the norm has none. eps: an attribute, or the number itself."""
    from .ops.layer_norm import layer_norm

    @functools.wraps(original.forward)
    def forward(self: Any, input: Tensor) -> Any:
        w, b = (None if name is None else getattr(self, name) for name in (weight, bias))
        if not _plain(input, *(t for t in (w, b) if t is not None)):
            return original.forward(self, input)
        return layer_norm(input, w, b, getattr(self, eps) if isinstance(eps, str) else eps, backend=backend)

    return {"forward": forward}


def _activation(original: Any, activation: str, backend: str) -> dict[str, Any]:
    from .ops.bias_act import bias_act

    @functools.wraps(original.forward)
    def forward(self: Any, input: Tensor) -> Any:
        if not _plain(input):
            return original.forward(self, input)
        return bias_act(input, None, activation, backend=backend)

    return {"forward": forward}


def _gated_mlp(original: Any, activation: str, act: str, act_class: type, backend: str) -> dict[str, Any]:
    """Separate gate and up. `act` names the activation module, which must still be the one that was
    recognised."""
    from .ops.gated_act import gated_act

    @functools.wraps(original.forward)
    def forward(self: Any, x: Tensor) -> Any:
        if not _same_activation(getattr(self, act), act_class):
            return original.forward(self, x)
        gate, up = self.gate_proj(x), self.up_proj(x)
        if not _plain(gate, up):
            return self.down_proj(getattr(self, act)(gate) * up)
        return self.down_proj(gated_act(gate, up, activation, backend=backend))

    return {"forward": forward}


def _gated_mlp_packed(
    original: Any, activation: str, act: str, act_class: type, backend: str
) -> dict[str, Any]:
    """Gate and up in one projection, gate first."""
    from .ops.gated_act import gated_act

    @functools.wraps(original.forward)
    def forward(self: Any, hidden_states: Tensor) -> Any:
        if not _same_activation(getattr(self, act), act_class):
            return original.forward(self, hidden_states)
        packed = self.gate_up_proj(hidden_states)
        if not _plain(packed):
            gate, up = packed.chunk(2, dim=-1)
            return self.down_proj(up * getattr(self, act)(gate))
        return self.down_proj(gated_act(packed, None, activation, backend=backend))

    return {"forward": forward}


def _same_activation(module: Any, expected: Any) -> bool:
    hooks = (
        module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    )  # fmt: skip
    return type(module) is expected and not any(hooks) and "forward" not in vars(module)


def _causal_lm(original: Any) -> dict[str, Any]:
    """Forward and cache of the top-level model, through the `FusedForward` of its patch."""
    from inspect import signature

    names = [name for name in signature(original.forward).parameters if name != "self"]

    @functools.wraps(original.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        patch = vars(self).get(_MARK)
        if patch is not None and patch.fused is not None and patch.fused.model is self:  # no replica's
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            if cache_name() not in given and "past_key_values" in given:
                given[cache_name()] = given.pop("past_key_values")  # its name before transformers 5.24
            output = patch.fused.forward(given)
            if output is not None:
                return output
        return original.forward(self, *args, **kwargs)

    def _prepare_cache_for_generation(
        self: Any,
        generation_config: Any,
        model_kwargs: Any,
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        done = original._prepare_cache_for_generation(
            self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )
        patch = vars(self).get(_MARK)
        if patch is not None and patch.fused is not None:
            patch.fused.prepare_cache(generation_config, model_kwargs, max_cache_length)
        return done

    return {"forward": forward, "_prepare_cache_for_generation": _prepare_cache_for_generation}


# ---------------------------------------------------------------------------------------- what to swap


@dataclass(frozen=True)
class _Swap:
    op: str
    make_forward: Callable[..., Any]
    options: tuple[Any, ...]


def _norm_swap(module: nn.Module, name: str, backend: str) -> _Swap:
    spec = parts.norm(module, name)
    eps = next((place for place in ("variance_epsilon", "eps") if hasattr(module, place)), spec.eps)
    if spec.kind == "layer":
        return _Swap("layer_norm", _layer_norm, (spec.weight, spec.bias, eps, backend))
    return _Swap("rms_norm", _rms_norm, (eps, spec.weight_offset, spec.rounding, backend))


def _mlp_swap(module: Any, name: str, backend: str) -> _Swap:
    packed = mechanism(module) == "mlp.gated_packed"
    act = "activation_fn" if packed else "act_fn"
    activation = parts.gated_activation(getattr(module, act), f"{name}.{act}")
    make = _gated_mlp_packed if packed else _gated_mlp
    return _Swap("gated_act", make, (activation, act, type(getattr(module, act)), backend))


def _activation_swap(module: Any, name: str, backend: str) -> _Swap | None:
    """None for what is no activation that gains from a kernel."""
    try:
        activation = parts.activation(module, name)
    except Unsupported:
        return None
    return None if activation == "relu" else _Swap("bias_act", _activation, (activation, backend))


def _is_norm(module: nn.Module) -> bool:
    return "Norm" in original_class(module).__name__ and not list(module.children())


# ----------------------------------------------------------------------------------------------- patch


class Patch:
    """The kernels in one model. Made by `patch`; a context manager that undoes itself on the way out."""

    def __init__(self, model: nn.Module, backend: str | None, strict: bool) -> None:
        self.model = model
        self.backend = backend
        self.fused: Any = None
        self._requested = backend
        self._holders = 0
        self._swapped: list[tuple[nn.Module, Any, Any]] = []
        self._marked: nn.Module | None = None
        self._notes: list[str] = []
        self._entries: list[Entry] = []
        self._resolved = _backend(model, backend)
        self._unfit = _unfit(model)
        self._decoder_reason = self._plan_decoder(strict)
        try:
            self._apply()
        except BaseException:
            self._restore()
            raise

    # ---------------------------------------------------------------------------------------- applying

    def _plan_decoder(self, strict: bool) -> str:
        """Set up the fused forward, or say why there is none. Changes nothing in the model."""
        from .hf_generate import FusedForward

        try:
            spec = decoder_spec(self.model)
            if spec.lm_head is None:
                return "transformers' own (there is no language-model head to generate with)"
            self.fused = FusedForward(hf_model(self.model), self.backend, self._note)
        except Unsupported as reason:
            if strict:
                raise
            return f"transformers' own: {reason}"
        return f"fused decoder ({self.fused.decoder.backend})"

    def _note(self, text: str) -> None:
        if text not in self._notes:
            self._notes.append(text)

    def _apply(self) -> None:
        backend = self._resolved
        in_gated: set[int] = set()
        lora: list[str] = []
        for name, module in list(self.model.named_modules()):
            if any(name.startswith(prefix) for prefix in lora):
                continue
            if hasattr(module, "lora_A"):
                lora.append(name + ".")
            kind = original_class(module).__name__
            swap, reason = None, ""
            if hasattr(type(module), "_dschat_original") and name:
                self._entries.append(Entry(name, kind, "left", reason="another patch holds it"))
                continue
            if "forward" in vars(module) and name:
                text = "carries an instance-level forward (accelerate or device hooks)"
                self._entries.append(Entry(name, kind, "left", reason=text))
                continue
            try:
                if self._unfit:
                    reason = (
                        self._unfit
                        if _is_norm(module) or (mechanism(module) or "").startswith("mlp.")
                        else ""
                    )
                elif _is_norm(module):
                    swap = _norm_swap(module, name, backend)
                elif mechanism(module) in ("mlp.gated", "mlp.gated_packed"):
                    swap = _mlp_swap(module, name, backend)
                    in_gated.update(id(child) for child in module.children())
                elif id(module) not in in_gated and not list(module.children()) and name:
                    swap = _activation_swap(module, name, backend)
            except Unsupported as refused:
                reason = str(refused)
            if swap is not None:
                self._swap(module, swap.make_forward, swap.options)
                self._entries.append(Entry(name, kind, "patched", swap.op, backend))
            elif entry := self._left(name, module, kind, reason, id(module) in in_gated):
                self._entries.append(entry)
        target: Any = self.model
        if self.fused is not None:
            target = self.fused.model
            self._swap(target, _causal_lm, ())
        self._marked = target
        vars(target)[_MARK] = self

    def _left(self, name: str, module: nn.Module, kind: str, reason: str, in_gated: bool) -> Entry | None:
        """The entry of a module whose class stays; None for containers and what computes nothing."""
        what = mechanism(module) or ""
        is_leaf = not list(module.children()) or hasattr(module, "lora_A")
        if not name or isinstance(module, (nn.Dropout, nn.Identity)):
            return None
        if reason:
            return Entry(name, kind, "left", reason=reason)
        if in_gated and not list(module.parameters()):
            return Entry(name, kind, "decoder" if self.fused else "left", reason="inside its MLP's gated_act")
        if not is_leaf and not what.startswith(("attention.", "mlp.")):
            return None
        if self.fused is None:
            return Entry(name, kind, "left", reason="no kernel outside the fused decoder")
        op = "linear" if hasattr(module, "weight") else ""
        if isinstance(module, nn.Embedding):
            op = "embed"
        elif what.startswith("attention."):
            op = "rope_append, attention" if self.fused.decoder.spec.ropes() else "attention"
        elif what.startswith("mlp.") or "activation" in kind.lower() or kind == "ReLU":
            op = "linear with activation"
        elif what == "rotary":
            op = "rope_append"
        return Entry(name, kind, "decoder", op, self.fused.decoder.backend)

    def _swap(self, module: nn.Module, make_forward: Callable[..., Any], options: tuple[Any, ...]) -> None:
        original: Any = type(module)
        fused = _fused_class(original, original.forward, make_forward, options)
        self._swapped.append((module, original, fused))  # first: what is listed is put back, swapped or not
        module.__class__ = fused

    # ------------------------------------------------------------------------------------------ public

    @property
    def active(self) -> bool:
        """Whether the kernels are in."""
        return self._marked is not None

    def report(self, *, measure: bool = False) -> Report:
        """Every module: patched with what, or left alone and why; bytes of packs and of a decode step.

        measure: read the machine's memory bandwidth (about a second, once a process) for the expected time of a
        decode step. Without it the time is there only if it was measured before.
        """
        return make_report(
            self.model,
            self._entries,
            self.fused.decoder if self.fused is not None else None,
            measure,
            active=self.active,
            backend=self._resolved,
            decoder=self._decoder_reason,
            notes=list(self._notes),
        )

    def undo(self) -> None:
        """Take the kernels out. Afterwards every class is what it was; a second call does nothing."""
        if self._marked is None:
            return
        # An undo that was interrupted has put some back.
        changed = [m for m, original, fused in self._swapped if type(m) not in (fused, original)]
        if changed:
            raise RuntimeError(
                f"The class of a {original_class(changed[0]).__name__} was changed after the patch, to "
                f"{type(changed[0])}; undo that change (FSDP, another patcher) first."
            )
        marked = self._marked
        self._restore()
        assert all(type(module) is original for module, original, _ in self._swapped) and _MARK not in vars(
            marked
        )
        self._swapped.clear()
        self._holders = 0

    def _restore(self) -> None:
        for module, original, fused in reversed(self._swapped):
            module.__class__ = original
            held = vars(module)
            for name, value in list(held.items()):  # what accelerate's hooks keep, and put back as theirs
                if getattr(value, "__func__", None) is vars(fused)["forward"]:
                    held[name] = MethodType(original.forward, module)
        if self._marked is not None:
            vars(self._marked).pop(_MARK, None)
        self._marked = None
        self.fused = None

    def __enter__(self) -> Patch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._holders -= 1
        if self._holders <= 0:
            self.undo()

    def __repr__(self) -> str:
        state = f"{len(self._swapped)} modules" if self.active else "undone"
        return f"Patch({original_class(self.model).__name__}, {state}, backend {self._resolved})"


def _unfit(model: nn.Module) -> str:
    """Why the norm, gate and activation kernels cannot run on this model's weights; empty when they can."""
    for weight in model.parameters():
        if weight.is_floating_point() and weight.dtype not in _dtypes_on(weight.device):
            return (
                f"weights are {weight.dtype} on {weight.device}; kernels run float32 and bfloat16 on the CPU, "
                "and float16 too on a GPU"
            )
    return ""


def _backend(model: nn.Module, backend: str | None) -> str:
    """The backend that the model's weights get."""
    weight = next((p for p in model.parameters() if p.is_floating_point()), None)
    return resolve_backend("patch", backend, weight)


def is_patched(model: nn.Module) -> bool:
    """Whether any module of `model` is in the hands of a patch."""
    return any(
        _MARK in vars(module) or hasattr(type(module), "_dschat_original") for module in model.modules()
    )


def shared_decoder(model: nn.Module, backend: str | None) -> Any:
    """The decoder of the patch that is in the model, as its modules are now, for whoever wants one of that backend (as
    it was asked for) and of the model's dtype: its packs then serve both. None where there is none."""
    try:
        found = vars(hf_model(model)).get(_MARK)
    except Unsupported:
        return None
    if found is None or found.fused is None or found.backend != backend:
        return None
    return found.fused.decoder if found.fused.describe() is None else None


def patch(model: nn.Module, *, strict: bool = False, backend: str | None = None) -> Patch:
    """Put fused kernels into this model instance; `Patch.undo()` or leaving a `with` block takes them out.

    Args: model: a transformers model, or a PEFT model around one. Unknown pieces stay transformers' and are
    reported. strict: raise `Unsupported` (a ValueError) instead of leaving the decoder to transformers.
    backend: None for the fastest that runs on the model's device, "cpu", "triton", "cuda" or "reference".

    Patching a patched model returns the Patch that is there. In a `with` block that one is undone only when
    no other `patch` call still holds it.

    A deepcopy, pickle or `torch.save` of a patched model is a plain model: patch the copy if it should be
    fused.

    Raises TypeError for what is no module, ValueError for models loaded with `use_kernels=True`, unknown
    backends, and a second patch with another backend."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"patch got a {type(model).__name__}; give it a torch.nn.Module.")
    try:
        target = hf_model(model)
    except Unsupported:
        target = model
    if getattr(target, "_use_kernels", False):
        raise ValueError(
            "The model was loaded with use_kernels=True, which rewrites forwards at every train() or eval(); "
            "load it with use_kernels=False."
        )
    existing = vars(target).get(_MARK) or vars(model).get(_MARK)
    if existing is not None:
        if backend is not None and backend != existing._resolved:
            raise ValueError(
                f"The model is already patched with backend {existing._resolved!r}, not {backend!r}; "
                "undo that patch first."
            )
        existing._holders += 1
        return existing
    made = Patch(model, backend, strict)
    made._holders = 1
    return made

"""Padded batches in, packed rows through the model: hidden states and log-probs without work on padding.

`PackedModel` wraps any decoder (policy, reference, reward or value model) that an adapter describes.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dschat_kernels.forward import Segment, exact_weight, packed_hidden, run_segment
from dschat_kernels.hf_generate import forward_hook
from dschat_kernels.models.spec import DecoderSpec, decoder_spec
from dschat_kernels.ops.token_logprobs import token_logprobs
from dschat_kernels.packing import resolve_linear
from dschat_kernels.plan import Decoder


@dataclass(frozen=True)
class PackedRows:
    """Rows of a padded batch, one after the other. ids: int64 [T]; cu_seqlens: int32 [rows + 1]; places:
    int64 [T], where each token stood in the flattened [rows, columns] batch of `shape`."""

    ids: Tensor
    cu_seqlens: Tensor
    places: Tensor
    shape: tuple[int, int]

    def index(self) -> Tensor:
        """int64 [rows, columns]: the packed place of each token, -1 for padding."""
        device = self.places.device
        index = torch.full((self.shape[0] * self.shape[1],), -1, dtype=torch.int64, device=device)
        index[self.places] = torch.arange(len(self.places), device=device)
        return index.view(self.shape)


def pack_rows(input_ids: Tensor, attention_mask: Tensor) -> PackedRows:
    """Takes the tokens where the mask is true; every row needs at least one."""
    check_batch(input_ids, attention_mask)
    mask = attention_mask.bool()
    lengths = mask.sum(1)
    if not bool((lengths > 0).all()):
        row = int((lengths == 0).nonzero()[0])
        raise ValueError(f"row {row} of the batch has no token: its attention mask is all zero.")
    cu = torch.zeros(len(lengths) + 1, dtype=torch.int32, device=mask.device)
    cu[1:] = lengths.cumsum(0)
    places = mask.reshape(-1).nonzero().squeeze(1)
    return PackedRows(input_ids.reshape(-1)[places], cu, places, (input_ids.shape[0], input_ids.shape[1]))


def check_batch(input_ids: Tensor, attention_mask: Tensor) -> None:
    """Shapes, dtypes and devices of a padded batch; one sentence for what is wrong."""
    for name, value in (("input_ids", input_ids), ("attention_mask", attention_mask)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} is a {type(value).__name__}: give a torch.Tensor [rows, columns].")
    if input_ids.dim() != 2 or input_ids.dtype != torch.int64:
        raise TypeError(
            f"input_ids are {input_ids.dtype} of shape {list(input_ids.shape)}: give int64 [rows, columns]."
        )
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask has shape {list(attention_mask.shape)} and input_ids {list(input_ids.shape)}: "
            "give one shape."
        )
    for name, value in (("input_ids", input_ids), ("attention_mask", attention_mask)):
        if value.device.type == "meta":
            raise ValueError(
                f"{name} is on meta, without values: give it on the CPU or on the model's device."
            )
    if attention_mask.device != input_ids.device:
        raise ValueError(
            f"attention_mask is on {attention_mask.device} and input_ids on {input_ids.device}: "
            "move them to one device."
        )
    if attention_mask.dtype.is_floating_point:
        raise TypeError(
            f"attention_mask is {attention_mask.dtype}: give booleans or 0 and 1, not an additive mask."
        )
    if attention_mask.dtype != torch.bool and not bool(((attention_mask == 0) | (attention_mask == 1)).all()):
        raise ValueError(
            "attention_mask holds other values than 0 and 1: give 1 for tokens and 0 for padding."
        )


class PackedModel:
    """The packed forward of a decoder: CausalLM, trunk, sequence classifier, or a PEFT model around one of them.

    Raises `dschat_kernels.models.Unsupported` for a model that no adapter covers.
    """

    def __init__(self, model: nn.Module, *, backend: str | None = None):
        self.model = model
        self.backend = backend
        self._modules: list[nn.Module] = []
        self.segment: Segment = run_segment
        """Runs a part of the model; replaced where the weights are sharded (dschat/engine/zero.py)."""
        self.passes_hooks = False
        """Whether forward hooks are passed by instead of refused: to find out what they would have done."""
        self.sync()

    def sync(self) -> bool:
        """Describes the model anew if its modules changed (adapters added, layers replaced); whether they did."""
        modules = list(self.model.modules())
        if len(modules) == len(self._modules) and all(map(operator.is_, modules, self._modules)):
            return False
        self.spec: DecoderSpec = decoder_spec(self.model)
        self._modules = modules
        return True

    def hidden(self, rows: PackedRows, exact: Decoder | None = None) -> Tensor:
        """Hidden states after the last norm, [T, width], with gradient where the model has it."""
        self.sync()
        self.check_hooks()
        self.check_dropout()
        return packed_hidden(
            self.spec, rows.ids, rows.cu_seqlens, exact=exact, backend=self.backend, segment=self.segment
        )

    def check_hooks(self) -> None:
        """A packed forward, and a rollout, call few of the modules: what a hook does would be missing."""
        found = forward_hook(self.model, self._modules)
        if found is not None and not self.passes_hooks:
            raise ValueError(f"{found}, which packed rows would pass by: remove the hook.")

    def check_dropout(self) -> None:
        """Dropout would make the ratio of the first minibatch differ from 1."""
        active = {
            name: module.p
            for name, module in self.model.named_modules()
            if module.training and isinstance(module, nn.Dropout) and module.p > 0
        }
        trunk = self.spec.trunk
        if not active and trunk is not None and trunk.training and self.spec.dropout:
            active = dict(
                decoder_spec(self.model).dropout
            )  # functional ones; the spec may be older than they
        for name, p in active.items():
            raise ValueError(
                f"dropout is active in {name} (p = {p}): call model.eval(), gradients flow in eval mode too."
            )

    def head_weight(self, exact: Decoder | None = None) -> tuple[Tensor, Tensor | None]:
        """(weight, bias) of the language head, its active LoRA included, differentiable."""
        if self.spec.lm_head is None:
            raise ValueError(
                f"{type(self.model).__name__} has no language head: log-probs need a causal language model."
            )
        head = resolve_linear(self.spec.lm_head, "lm_head")
        if exact is not None:
            return exact_weight(exact.packed("lm_head"), head), head.bias
        weight = head.weight
        for update in head.updates:
            weight = weight + (update.scale * (update.b @ update.a)).to(weight.dtype)
        return weight, head.bias

    def token_logprobs(
        self,
        rows: PackedRows,
        select: Tensor,
        targets: Tensor,
        *,
        temperature: float,
        entropy: bool = False,
        gap: bool = False,
        exact: Decoder | None = None,
    ) -> Any:
        """Log-prob of targets[i] after the packed token select[i]; only those rows reach the head.

        float32 [len(select)]; with `entropy` or `gap` a tuple of these, as the op gives them.
        """

        def head(hidden: Tensor) -> Any:
            weight, bias = self.head_weight(exact)
            return token_logprobs(
                hidden, weight, targets, temperature=temperature, bias=bias,
                logit_softcap=self.spec.logit_softcap, return_entropy=entropy, return_gap=gap,
                backend=self.backend,
            )  # fmt: skip

        modules = [] if self.spec.lm_head is None else [self.spec.lm_head.module]
        return self.segment(modules, head, self.hidden(rows, exact)[select])


def sequence_hidden(
    model: nn.Module | PackedModel, input_ids: Tensor, attention_mask: Tensor
) -> tuple[Tensor, PackedRows]:
    """Hidden states of a padded batch on packed rows: ([T, width], the rows). `rows.index()` finds a token's
    place."""
    packed = model if isinstance(model, PackedModel) else PackedModel(model)
    rows = pack_rows(input_ids, attention_mask)
    return packed.hidden(rows), rows

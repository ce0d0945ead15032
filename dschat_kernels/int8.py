"""Linear layers that hold a frozen weight as int8 with one float32 scale an output: half of bfloat16's bytes.

    y = x W^T + b,  W = round(scale * Q) in the dtype of x, made for one product and not kept

What trains is around them (LoRA through PEFT): gradients flow through them, not into them. `packing.resolve_linear`
reads the integers, so packs of a rollout hold round(scale * Q + s * B A), rounded once.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .models.spec import LinearSpec
from .packing import fused_weight, is_lora, resolve_linear
from .quantise import quantise

KINDS = ("Linear", "FalconLinear", "Conv1D")


class Int8Linear(nn.Linear):
    """The frozen int8 form of a linear layer (nn.Linear or Conv1D).

    weight: int8 [out, in], which no gradient reaches. scales: float32 [out]. bias: the layer's own, frozen.
    """

    def __init__(self, layer: Any):
        nn.Module.__init__(self)  # nn.Linear's would allocate a weight
        self.transposed = type(layer).__name__ == "Conv1D"
        dense = layer.weight.detach().t() if self.transposed else layer.weight.detach()
        self.out_features, self.in_features = dense.shape
        self.dtype: torch.dtype = dense.dtype
        """Of the layer that this one was made of."""
        values, scales = quantise(dense.float())
        self.weight = nn.Parameter(values, requires_grad=False)
        self.register_buffer("scales", scales)
        bias: Any = None if layer.bias is None else nn.Parameter(layer.bias.detach(), requires_grad=False)
        self.bias = bias

    def dense(self, dtype: torch.dtype) -> Tensor:
        """round(scale * Q), [out, in] of `dtype`."""
        wide = torch.promote_types(dtype, torch.float32)
        scales: Any = self.scales
        return (self.weight.to(wide) * scales.to(wide)[:, None]).to(dtype)

    def forward(self, input: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        out: Tensor = _Product.apply(input, self)
        return out

    def plain(self, weight: Tensor) -> Any:
        """The layer that this one was made of, with `weight` [out, in] as its weight."""
        if self.transposed:
            from transformers.pytorch_utils import Conv1D

            layer: Any = Conv1D(self.out_features, self.in_features)
            weight = weight.t().contiguous()
        else:
            layer = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        layer.weight = nn.Parameter(weight, requires_grad=False)
        layer.bias = self.bias
        return layer


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Int8Linear) -> Tensor:
        ctx.layer = layer
        return nn.functional.linear(x, layer.dense(x.dtype), layer.bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """dx = dy W; float16's products on the CPU in float32, as in forward.py."""
        dy = grads[0]
        half = dy.dtype == torch.float16 and dy.device.type == "cpu"
        weight = ctx.layer.dense(dy.dtype)
        return ((dy.float() @ weight.float()).to(dy.dtype) if half else dy @ weight), None


def quantise_linears(model: nn.Module, leave: Iterable[str] = ()) -> int:
    """Makes the linear layers of a model int8, one after the other and in place; how many there were.

    leave: last parts of the names of those that stay as they are (heads).
    """
    leave = set(leave)
    names = [
        n for n, m in model.named_modules() if type(m).__name__ in KINDS and n.rpartition(".")[2] not in leave
    ]
    for name in names:
        owner, _, attribute = name.rpartition(".")
        parent = model.get_submodule(owner)
        setattr(parent, attribute, Int8Linear(getattr(parent, attribute)))
    return len(names)


def fuse_linears(model: nn.Module) -> None:
    """Makes the int8 layers of a model plain again, in place: round(scale * Q + s * B A) where a LoRA layer is around
    one, which does nothing more then but keeps its place (`unload` of PEFT takes it away)."""
    for name, module in list(model.named_modules()):
        base = module.get_base_layer() if is_lora(module) else module
        if not isinstance(base, Int8Linear) or name.endswith(".base_layer"):
            continue
        layer = base.plain(fused_weight(resolve_linear(LinearSpec(module), name), base.dtype))
        if is_lora(module):
            owner: Any = module
            owner.base_layer = layer
        else:
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, layer)

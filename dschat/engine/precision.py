"""What training in 16 bits needs: float32 masters of the weights, and a loss scale for float16's gradients.

A weight of 16 bits cannot hold a step that is smaller than half of its last place, so the optimizer steps float32
masters, and the weights are their rounding. Gradients of float16 end at 6e-8, so the loss is multiplied by a scale
before the backward and the gradients are divided by it in float32; where they overflow instead, the step is left out
and the scale falls.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..config import scale_rules


@dataclass
class LossScale:
    """The scale of the loss, fixed or by DeepSpeed's rule: it doubles when more than `loss_scale_window` steps
    in a row had no overflow, and halves at an overflow, but for the first `hysteresis` - 1 of them.

    Args:
        loss_scale: a fixed scale; 0: dynamic.
        initial_scale_power: a dynamic one begins at 2 to this power.
        loss_scale_window, hysteresis, min_loss_scale: as DeepSpeed's fp16 section names them.

    Raises ValueError for settings that no scale can have.
    """

    loss_scale: float = 0.0
    initial_scale_power: int = 16
    loss_scale_window: int = 100
    hysteresis: int = 2
    min_loss_scale: float = 1.0
    value: float = field(init=False)
    skipped: int = field(init=False, default=0)
    """Steps left out so far."""

    def __post_init__(self) -> None:
        for name, good, rule in scale_rules(vars(self)):
            if not good:
                raise ValueError(f"{name} is {getattr(self, name)}, but it must be {rule}")
        self.value = self.loss_scale or 2.0**self.initial_scale_power
        self._patience, self._clean = self.hysteresis, 0

    @property
    def exhausted(self) -> bool:
        """Whether the scale cannot answer another overflow: it is fixed, or at its smallest."""
        return bool(self.loss_scale) or (self._patience == 1 and self.value <= self.min_loss_scale)

    def update(self, overflow: bool, skipped: bool) -> None:
        """After a step: whether its gradients overflowed, and whether it was left out (for another's sake, too)."""
        self.skipped += skipped
        if self.loss_scale:
            return
        if overflow:
            self._clean = 0
            if self._patience > 1:
                self._patience -= 1
            else:
                self.value = max(self.value / 2, self.min_loss_scale)
            return
        self._clean += 1
        if self._clean > 1 and (self._clean - 1) % self.loss_scale_window == 0:
            self._patience = self.hysteresis
            self.value *= 2

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON values."""
        return {
            "value": self.value,
            "patience": self._patience,
            "clean": self._clean,
            "skipped": self.skipped,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self.value, self._patience = float(state["value"]), int(state["patience"])
        self._clean, self.skipped = int(state["clean"]), int(state["skipped"])


class MasterOptimizer:
    """A torch optimizer that steps float32 masters of the weights it was given, which become their rounding. What it
    knows of the weights from earlier steps it knows of their masters.

    It has the interface of the optimizer: `param_groups` (of masters; a weight that is float32 is its own),
    `state_dict` and `load_state_dict`, whose entries hold the master of a weight of 16 bits as `master`, as those of a
    sharded one do (dschat/engine/zero.py).
    """

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.base = optimizer
        self.pairs: list[tuple[nn.Parameter, nn.Parameter]] = []
        """(weight, master) in the order of the optimizer."""
        for group in optimizer.param_groups:
            own = [(p, p if p.dtype == torch.float32 else _master(p)) for p in group["params"]]
            for weight, master in own:
                if weight is not master and weight in optimizer.state:
                    found = optimizer.state.pop(weight)
                    optimizer.state[master] = {
                        k: v.float() if isinstance(v, Tensor) else v for k, v in found.items()
                    }
            group["params"] = [master for _, master in own]
            self.pairs += own

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = self.base.param_groups
        return groups

    def collect(self) -> None:
        """Moves the weights' gradients to the masters, as float32."""
        for weight, master in self.pairs:
            if weight is not master and weight.grad is not None:
                master.grad, weight.grad = weight.grad.float(), None

    def step(self) -> None:
        """The optimizer's step; the weights are the rounded masters."""
        self.base.step()
        self.round()

    @torch.no_grad()
    def round(self) -> None:
        """Makes the weights the rounding of their masters."""
        for weight, master in self.pairs:
            if weight is not master:
                weight.copy_(master)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops the gradients of weights and masters."""
        self.base.zero_grad(set_to_none=set_to_none)
        for weight, _ in self.pairs:
            weight.grad = None

    def state_dict(self) -> dict[str, Any]:
        """That of the optimizer, with masters."""
        out: dict[str, Any] = self.base.state_dict()
        masters = {
            i: master.detach()
            for i, (weight, master) in enumerate(self.pairs)
            if weight is not master and i in out["state"]
        }
        state = {
            i: entry | ({"master": masters[i]} if i in masters else {}) for i, entry in out["state"].items()
        }
        return {**out, "state": state}

    @torch.no_grad()
    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Puts back what `state_dict` gave; the master of a weight for which it holds none is the weight."""
        masters: dict[int, Tensor] = {}
        state = {}
        for i, entry in saved["state"].items():
            state[int(i)] = {k: v for k, v in entry.items() if k != "master"}
            if "master" in entry:
                masters[int(i)] = entry["master"]
        self.base.load_state_dict({**saved, "state": state})
        for i, (weight, master) in enumerate(self.pairs):
            if weight is not master:
                master.copy_(masters.get(i, weight))


def _master(weight: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(weight.detach().float().clone())


def with_masters(optimizer: torch.optim.Optimizer) -> Any:
    """The optimizer, with masters where it trains weights that are not float32."""
    narrow = any(p.dtype != torch.float32 for group in optimizer.param_groups for p in group["params"])
    return MasterOptimizer(optimizer) if narrow else optimizer

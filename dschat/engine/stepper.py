"""Gradients and optimizer steps of one module, in one process or in several that share the rows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import parallel
from .precision import LossScale, MasterOptimizer


class Stepper:
    """Backward and step with a torch optimizer. Every process computes the gradient of its own rows' part of the
    loss; their sum is that of the whole batch. dschat.engine.zero.ZeroStepper is the same through DeepSpeed.

    loss_scale: of float16; a step whose gradients overflow is left out while the scale can still fall.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer | MasterOptimizer | None, loss_scale: LossScale | None = None
    ):
        self.optimizer: Any = optimizer
        self.loss_scale = loss_scale
        self.norm = 0.0
        self.overflow = False
        """Whether the last step's gradients overflowed, which the loss scale answers."""

    def backward(self, loss: Tensor) -> None:
        """Accumulates gradients."""
        self._backward(loss if self.loss_scale is None else loss * self.loss_scale.value)

    def _backward(self, loss: Tensor) -> None:
        loss.backward()

    def ready(self, max_grad_norm: float | None = None) -> float:
        """Gradients put together and clipped to `max_grad_norm` (None: not); their norm before that, of all processes
        (through DeepSpeed's stages 1 to 3 a bound on it). Nothing is changed before `apply`, which steps with them."""
        if self.optimizer is None:
            raise ValueError(
                "the engine has no optimizer: give HybridEngine(model, optimizer=...) to call step()."
            )
        check_max_grad_norm(max_grad_norm)
        if isinstance(self.optimizer, MasterOptimizer):
            self.optimizer.collect()
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        if self.loss_scale is not None:
            for p in parameters:
                if p.grad is not None:
                    p.grad.mul_(1.0 / self.loss_scale.value)
        parallel.sum_gradients(parameters)
        self.norm = clip([p for p in parameters if p.grad is not None], max_grad_norm)
        self._look_for_overflow()
        return self.norm

    def _look_for_overflow(self) -> None:
        scale = self.loss_scale
        self.overflow = scale is not None and not scale.exhausted and not math.isfinite(self.norm)

    def apply(self, skip: bool = False) -> None:
        """Optimizer step and zero_grad. A norm that is nan or infinite steps nothing: the gradients are dropped, as
        with `skip` (another's gradients overflowed, and the two step together)."""
        if math.isfinite(self.norm) and not skip:
            self._step()
        self.optimizer.zero_grad(set_to_none=True)
        self._rescale(skip)

    def _step(self) -> None:
        self.optimizer.step()

    def _rescale(self, skip: bool) -> None:
        """What a step, or one left out, does to the loss scale."""
        if self.loss_scale is not None:
            overflow = not math.isfinite(self.norm)
            self.loss_scale.update(overflow, skipped=overflow or skip)

    def step(self, max_grad_norm: float | None = None) -> float:
        """`ready` and `apply`; returns the norm."""
        self.ready(max_grad_norm)
        self.apply()
        return self.norm

    def state(self) -> dict[str, Any]:
        """The loss scale as a checkpoint keeps it; {} where there is none."""
        return {} if self.loss_scale is None else self.loss_scale.state_dict()

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Put back what `state` gave."""
        if self.loss_scale is not None and state:
            self.loss_scale.load_state_dict(state)

    def numbers(self, prefix: str = "") -> dict[str, float]:
        """For the log: the scale and the steps left out so far; {} without a scale."""
        scale = self.loss_scale
        if scale is None:
            return {}
        return {f"{prefix}loss_scale": scale.value, f"{prefix}skipped_steps": float(scale.skipped)}


def clip(parameters: list[torch.nn.Parameter], limit: float | None) -> float:
    """Scales gradients down to the norm `limit` (None: never); their norm before that."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if limit is not None and bool(torch.isfinite(norm)):
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return float(norm)


def check_max_grad_norm(limit: float | None) -> None:
    """Raises ValueError for a norm that no gradient can be clipped to."""
    if limit is not None and not limit > 0:
        raise ValueError(f"max_grad_norm is {limit}: give a number above 0, or None for no clipping.")

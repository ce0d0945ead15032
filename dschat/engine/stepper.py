"""Gradients and optimizer steps of one module, in one process or in several that share the rows."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import parallel


class Stepper:
    """Backward and step with a torch optimizer. Every process computes the gradient of its own rows' part of the
    loss; their sum is that of the whole batch. dschat.engine.zero.ZeroStepper is the same through DeepSpeed."""

    def __init__(self, optimizer: torch.optim.Optimizer | None):
        self.optimizer: Any = optimizer
        self.norm = 0.0

    def backward(self, loss: Tensor) -> None:
        """Accumulates gradients."""
        loss.backward()

    def ready(self, max_grad_norm: float | None = None) -> float:
        """Gradients put together and clipped to `max_grad_norm` (None: not); their norm before that, of all processes.
        `apply` steps with them."""
        if self.optimizer is None:
            raise ValueError(
                "the engine has no optimizer: give HybridEngine(model, optimizer=...) to call step()."
            )
        check_max_grad_norm(max_grad_norm)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        parallel.sum_gradients(parameters)
        self.norm = clip([p for p in parameters if p.grad is not None], max_grad_norm)
        return self.norm

    def apply(self) -> None:
        """Optimizer step and zero_grad. A norm that is nan or infinite steps nothing: the gradients are dropped."""
        if math.isfinite(self.norm):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def step(self, max_grad_norm: float | None = None) -> float:
        """`ready` and `apply`; returns the norm."""
        norm = self.ready(max_grad_norm)
        self.apply()
        return norm


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

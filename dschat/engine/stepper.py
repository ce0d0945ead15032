"""Gradients and optimizer steps of one module, in one process or in several that share the rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import parallel


class Stepper:
    """Backward and step with a torch optimizer. Every process computes the gradient of its own rows' part of the
    loss; their sum is that of the whole batch. dschat.engine.zero.ZeroStepper is the same through DeepSpeed."""

    def __init__(self, optimizer: torch.optim.Optimizer | None):
        self.optimizer: Any = optimizer

    def backward(self, loss: Tensor) -> None:
        """Accumulates gradients."""
        loss.backward()

    def step(self, max_grad_norm: float | None = None) -> float:
        """Optimizer step and zero_grad; gradients are clipped to `max_grad_norm` (None: not). Returns their norm
        before that, of all processes together."""
        if self.optimizer is None:
            raise ValueError(
                "the engine has no optimizer: give HybridEngine(model, optimizer=...) to call step()."
            )
        check_max_grad_norm(max_grad_norm)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        parallel.sum_gradients(parameters)
        norm = clip([p for p in parameters if p.grad is not None], max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm


def clip(parameters: list[torch.nn.Parameter], limit: float | None) -> float:
    """Scales gradients down to the norm `limit` (None: never); their norm before that."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if limit is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return float(norm)


def check_max_grad_norm(limit: float | None) -> None:
    """Raises ValueError for a norm that no gradient can be clipped to."""
    if limit is not None and not limit > 0:
        raise ValueError(f"max_grad_norm is {limit}: give a number above 0, or None for no clipping.")

"""Symmetric int8 of rows of numbers, as weights, activations and the cache are quantised (csrc/cpu/quantise.h)."""

from __future__ import annotations

import torch
from torch import Tensor


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 of every row of a float32 [out, in] matrix: (values int8 [out, in], scales float32 [out]).

    scale = max |w| / 127; value = w / scale rounded to even, so that |w - scale * value| <= scale / 2. A row whose
    scale is no normal number becomes 0, one that holds NaN or infinity gets the scale NaN.
    """
    finite = weight.isfinite().all(1)
    scales = weight.abs().amax(1) / 127.0 if weight.shape[1] else weight.new_zeros(len(weight))
    normal = finite & (scales >= torch.finfo(torch.float32).tiny)
    values = (weight / scales[:, None]).round().clamp(-127, 127)
    values = values.masked_fill(~normal[:, None], 0.0).to(torch.int8)
    return values, scales.masked_fill(~normal, 0.0).masked_fill(~finite, torch.nan)

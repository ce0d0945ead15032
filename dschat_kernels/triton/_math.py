"""Functions of numbers that kernels share. Triton's language has no tanh; libdevice's is not portable."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """tanh to about 1.5 units in the last place of float32: x + x^3 P(x^2) where exp would cancel, P fitted here at
    Chebyshev nodes."""
    z = x * x
    p = -0.006104947937835966 * z + 0.02100364115628179
    p = p * z - 0.053852497449651926
    p = p * z + 0.1333278226379047
    p = p * z - 0.33333329099611136
    size = tl.abs(x)
    far = 1.0 - 2.0 / (tl.exp(2.0 * size) + 1.0)
    return tl.where(size < 0.625, x + x * z * p, tl.where(x < 0.0, -far, far))


@triton.jit
def softcapped(x, cap):
    """cap tanh(x / cap)"""
    return cap * tanh(x / cap)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """An activation of dschat_kernels/ops/bias_act.py, by its name, of float32."""
    if ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        return 0.5 * x * (1.0 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    elif ACTIVATION == "relu":
        return tl.where(x < 0.0, 0.0, x)
    elif ACTIVATION == "silu":
        return x * tl.sigmoid(x)
    elif ACTIVATION == "quick_gelu":
        return x * tl.sigmoid(1.702 * x)
    else:
        return x


@triton.jit
def slope(x, ACTIVATION: tl.constexpr):
    """The derivative of an activation."""
    if ACTIVATION == "gelu":
        return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif ACTIVATION == "gelu_tanh":
        t = tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))
        inner = 0.7978845608028654 * (1.0 + 0.134145 * x * x)
        return 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * inner
    elif ACTIVATION == "relu":
        return tl.where(x > 0.0, 1.0, 0.0)
    elif ACTIVATION == "silu":
        s = tl.sigmoid(x)
        return s * (1.0 + x * (1.0 - s))
    elif ACTIVATION == "quick_gelu":
        s = tl.sigmoid(1.702 * x)
        return s * (1.0 + 1.702 * x * (1.0 - s))
    else:
        return x * 0.0 + 1.0

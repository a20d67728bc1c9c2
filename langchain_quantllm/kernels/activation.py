"""Activations as a Triton function, for the kernels of gated MLPs and of experts."""
# No `from __future__ import annotations` here: Triton's interpreter needs `tl.constexpr` as an object.

import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]  # not on every machine, and untyped
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]

ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "relu_squared": 4}
"""Numbers of the activations that are compiled in, by their names."""


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def activated(x: tl.tensor, activation: tl.constexpr, alpha: tl.constexpr = 1.0) -> tl.tensor:
    """Compute one of `ACTIVATIONS`; `x * sigmoid(alpha * x)` for the first."""
    if activation == 0:
        found = x / (1 + tl.exp(-alpha * x))
    elif activation == 1:
        found = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif activation == 2:
        # tanh(u) = 1 - 2 / (exp(2u) + 1), which has no overflow: its exponential may be 0 or inf.
        doubled = tl.exp(1.5957691216057308 * (x + 0.044715 * x * x * x))
        found = 0.5 * x * (2 - 2 / (doubled + 1))
    elif activation == 3:
        found = tl.maximum(x, 0.0)
    else:
        positive = tl.maximum(x, 0.0)
        found = positive * positive
    return found

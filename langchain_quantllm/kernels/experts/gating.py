"""What experts compute between their two products: an activation, or an activation times another output."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["GELU", "GELU_TANH", "RELU", "RELU_SQUARED", "SILU", "Gating", "gate"]

SILU, GELU, GELU_TANH, RELU, RELU_SQUARED = "silu", "gelu", "gelu_tanh", "relu", "relu_squared"


@dataclass(frozen=True, kw_only=True)
class Gating:
    """The function between the two products of experts: `activation(gate) * (up + shift)`, or `activation(gate)`.

    Args:
        activation: A constant of this module: `SILU` is `gate * sigmoid(alpha * gate)`.
        is_gated: Whether the first product has two outputs for each of the function's, gate and up.
        is_interleaved: Whether gate and up take turns; otherwise all gates come first.
        alpha: The factor of `SILU`.
        limit: The largest gate, and the largest magnitude of up; None for no limit.
        limits_activated: Whether the limit is that of the activated gate.
        shift: Added to up.
    """

    activation: str
    is_gated: bool = True
    is_interleaved: bool = False
    alpha: float = 1.0
    limit: float | None = None
    limits_activated: bool = False
    shift: float = 0.0


def gate(outputs: torch.Tensor, gating: Gating) -> torch.Tensor:
    """Compute the function in plain torch.

    Args:
        outputs: Outputs of the first product, of shape `(rows, 2 * inner)`; without a gate, `(rows, inner)`.
        gating: The function.

    Returns:
        Its values of shape `(rows, inner)`.
    """
    if not gating.is_gated:
        return _activate(outputs, gating)
    first, up = (outputs[:, ::2], outputs[:, 1::2]) if gating.is_interleaved else outputs.chunk(2, -1)
    if gating.limit is not None:
        up = up.clamp(-gating.limit, gating.limit)
        first = first if gating.limits_activated else first.clamp(max=gating.limit)
    activated = _activate(first, gating)
    if gating.limit is not None and gating.limits_activated:
        activated = activated.clamp(max=gating.limit)
    return activated * (up + gating.shift)


def _activate(x: torch.Tensor, gating: Gating) -> torch.Tensor:
    if gating.activation == SILU:
        return x * torch.sigmoid(gating.alpha * x)
    if gating.activation in (GELU, GELU_TANH):
        return torch.nn.functional.gelu(x, approximate="tanh" if gating.activation == GELU_TANH else "none")
    positive = x.relu()
    return positive if gating.activation == RELU else positive.square()

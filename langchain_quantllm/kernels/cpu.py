"""The small steps of a layer on a CPU: what `reference` documents, to the same bit, in fewer operations of PyTorch.

For a few tokens an operation costs its call, some microseconds, whatever it computes.
"""

from __future__ import annotations

import torch
from torch.nn.functional import gelu, silu

from langchain_quantllm.kernels.reference import (
    GELU_TANH,
    HALVES,
    HALVES_ONCE,
    PAIRS,
    SILU,
    add_layer_norm,
    cos_sin,
    gated_rms_norm,
)

__all__ = [
    "activation_mul",
    "add_layer_norm",
    "add_rms_norm",
    "cos_sin",
    "gated_rms_norm",
    "rms_norm",
    "rotate",
    "rotation",
]


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, *, offset: float = 0.0, rounds_first: bool = True
) -> torch.Tensor:
    """Divide by the root of the mean square, and multiply by a weight; see `reference.rms_norm`."""
    wide = x.float()
    normed = wide * (wide * wide).mean(-1, keepdim=True).add_(eps).rsqrt_()
    if rounds_first:
        normed = normed.to(x.dtype)
        if not offset:
            return normed.mul_(weight)
        normed = normed.float()
    return normed.mul_(weight.float() + offset if offset else weight).to(x.dtype)


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    offset: float = 0.0,
    rounds_first: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add, and normalize the sum; see `reference.add_rms_norm`."""
    total = residual + x
    return total, rms_norm(total, weight, eps, offset=offset, rounds_first=rounds_first)


def activation_mul(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """Multiply an activation of one tensor by another; see `reference.activation_mul`."""
    if activation == SILU:
        return silu(gate).mul_(up).contiguous()
    return gelu(gate, approximate="tanh" if activation == GELU_TANH else "none").mul_(up).contiguous()


def rotation(cos: torch.Tensor, sin: torch.Tensor, layout: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Prepare the cosines and sines of a forward for `rotate`, once for all layers.

    Args:
        cos: Cosines; see `reference.rotate_and_write`.
        sin: Sines, likewise.
        layout: See `reference.rotate_and_write`.

    Returns:
        Cosines and sines of shape `(tokens, 1, rotary_dim)`; the sines with the sign of the number that they multiply.
    """
    cos, sin = cos[0, :, None], sin[0, :, None]
    if layout == HALVES_ONCE:
        return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)
    half = cos.shape[-1] // 2
    if layout == HALVES:
        return cos, torch.cat([-sin[..., :half], sin[..., half:]], -1)
    if layout != PAIRS:
        cos, sin = (part[..., :half].repeat_interleave(2, -1) for part in (cos, sin))
    return cos, torch.stack([-sin[..., ::2], sin[..., 1::2]], -1).flatten(-2)


def rotate(x: torch.Tensor, cos_sin: tuple[torch.Tensor, torch.Tensor], *, layout: int, rounds: bool) -> torch.Tensor:
    """Rotate queries or keys by their positions.

    Args:
        x: Of shape `(tokens, heads, dim)`.
        cos_sin: From `rotation`.
        layout: See `reference.rotate_and_write`.
        rounds: See `reference.rotate_and_write`.

    Returns:
        In the shape of `x`.
    """
    cos, sin = cos_sin
    width = cos.shape[-1]
    if width < x.shape[-1]:
        rest = x[..., width:]
        return torch.cat([rotate(x[..., :width], cos_sin, layout=layout, rounds=rounds), rest], -1)
    are_halves = layout in (HALVES, HALVES_ONCE)
    others = x.roll(width // 2, -1) if are_halves else x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    if rounds:
        return (x * cos).add_(others.mul_(sin))
    return (x.float() * cos.float() + others.float() * sin.float()).to(x.dtype)

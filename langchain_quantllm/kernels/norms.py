"""The small steps between the products of a layer, each as one Triton kernel.

Owns the kernels of norms and gates and how they are launched, and offers `fused_rotary`'s beside them. What the
functions mean is `reference`'s to say, which has them in plain torch. Knows tensors; no model and no engine.

The launchers are lean: they check nothing, and the device of the tensors must be the current one. Grids depend on
shapes alone, and nothing is read on the host, so that a call can be part of a CUDA graph.
"""
# No `from __future__ import annotations` here: Triton's interpreter needs `tl.constexpr` as an object. And its compiler
# looks every annotation of a kernel's arguments up, and refuses what is not its own.

from functools import cache

import torch
import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]  # not on every machine, and untyped
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]

from langchain_quantllm.kernels.launch import launch_options, wait_for_inputs
from langchain_quantllm.kernels.reference import (
    GELU,
    GELU_TANH,
    HALVES,
    PAIRS,
    PAIRS_OF_HALVES,
    SILU,
)
from langchain_quantllm.kernels.rotary import angles, rotate_and_write

__all__ = [
    "GELU",
    "GELU_TANH",
    "HALVES",
    "PAIRS",
    "PAIRS_OF_HALVES",
    "SILU",
    "add_layer_norm",
    "add_rms_norm",
    "angles",
    "gate",
    "rms_norm",
    "rotate_and_write",
]

_GATE_BLOCK = 1024
"""Numbers of one program of the gate."""

_ACTIVATIONS = {SILU: 0, GELU: 1, GELU_TANH: 2}


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, *, offset: float = 0.0, rounds_first: bool = True
) -> torch.Tensor:
    """Normalize by the root of the mean square: `reference.rms_norm`.

    Args:
        x: Numbers of shape `(..., width)`, floating, with any strides.
        weight: Of shape `(width,)`, contiguous, in the dtype of `x`.
        eps: Added to the mean square. Compiled in.
        offset: Added to the weight. Compiled in.
        rounds_first: Whether numbers are rounded to their dtype before the weight comes. Compiled in.

    Returns:
        Numbers in the shape and dtype of `x`, contiguous.
    """
    rows = _rows(x)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _launch_norm(rows, None, weight, None, None, out, eps, offset=offset, rounds_first=rounds_first)
    return out


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    offset: float = 0.0,
    rounds_first: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add, and normalize the sum: `reference.add_rms_norm`.

    Args:
        x: Numbers of shape `(..., width)`, floating, with any strides.
        residual: Added to them; in their shape and dtype.
        weight: See `rms_norm`.
        eps: See `rms_norm`.
        offset: See `rms_norm`.
        rounds_first: See `rms_norm`.

    Returns:
        The sum, and what becomes of it; each in the shape and dtype of `x`, contiguous.
    """
    total = torch.empty_like(x, memory_format=torch.contiguous_format)
    out = torch.empty_like(total)
    _launch_norm(_rows(x), _rows(residual), weight, None, total, out, eps, offset=offset, rounds_first=rounds_first)
    return total, out


def add_layer_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add, and normalize the sum to mean 0 and variance 1: `reference.add_layer_norm`.

    Args:
        x: Numbers of shape `(..., width)`, floating, with any strides.
        residual: Added to them; in their shape and dtype.
        weight: Of shape `(width,)`, contiguous, in the dtype of `x`.
        bias: In the shape of the weight; None for none.
        eps: Added to the variance. Compiled in.

    Returns:
        The sum, and what becomes of it; each in the shape and dtype of `x`, contiguous.
    """
    total = torch.empty_like(x, memory_format=torch.contiguous_format)
    out = torch.empty_like(total)
    _launch_norm(_rows(x), _rows(residual), weight, bias, total, out, eps, centers=True)
    return total, out


def gate(opening: torch.Tensor, values: torch.Tensor, activation: str) -> torch.Tensor:
    """Multiply values by an activation of others: `reference.gate`.

    Args:
        opening: What the activation is taken of, of shape `(..., width)`, floating, with any strides.
        values: In the shape and dtype of `opening`, with any strides.
        activation: `SILU`, `GELU` or `GELU_TANH`. Compiled in.

    Returns:
        The products in the shape and dtype of `opening`, contiguous.
    """
    out = torch.empty_like(opening, memory_format=torch.contiguous_format)
    opening, values = _rows(opening), _rows(values)
    rows, width = opening.shape
    block = min(_GATE_BLOCK, _padded(width))
    _gate_kernel[(rows, -(-width // block))](
        opening,
        values,
        out,
        opening.stride(0),
        values.stride(0),
        width,
        activation=_ACTIVATIONS[activation],
        block=block,
        num_warps=4,
        **launch_options(out.device),
    )
    return out


def _launch_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    total: torch.Tensor | None,
    out: torch.Tensor,
    eps: float,
    *,
    offset: float = 0.0,
    rounds_first: bool = False,
    centers: bool = False,
) -> None:
    rows, width = x.shape
    block = _padded(width)
    # What is not there is never touched: `x` stands in for it.
    _norm_kernel[(rows,)](
        x,
        x if residual is None else residual,
        weight,
        weight if bias is None else bias,
        out if total is None else total,
        out,
        x.stride(0),
        x.stride(0) if residual is None else residual.stride(0),
        width=width,
        eps=eps,
        offset=offset,
        adds=residual is not None,
        has_bias=bias is not None,
        rounds_first=rounds_first,
        centers=centers,
        block=block,
        num_warps=min(16, max(1, block // 256)),
        **launch_options(x.device),
    )


def _rows(x: torch.Tensor) -> torch.Tensor:
    """See `(..., width)` as `(rows, width)` with dense rows; copies only what has no such view."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


@cache
def _padded(size: int) -> int:
    """Round up to a power of two, as blocks are."""
    return max(16, 1 << (size - 1).bit_length())


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def _norm_kernel(
    x: tl.tensor,
    residual: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    total: tl.tensor,
    out: tl.tensor,
    x_stride: tl.tensor,
    residual_stride: tl.tensor,
    width: tl.constexpr,
    eps: tl.constexpr,
    offset: tl.constexpr,
    adds: tl.constexpr,
    has_bias: tl.constexpr,
    rounds_first: tl.constexpr,
    centers: tl.constexpr,
    block: tl.constexpr,
    early: tl.constexpr,
) -> None:
    """Add and normalize one row; grid `(rows,)`."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, block)
    inside = columns < width
    factors = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    wait_for_inputs(early)
    numbers = tl.load(x + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if adds:
        numbers += tl.load(residual + row * residual_stride + columns, mask=inside, other=0.0).to(tl.float32)
        rounded = numbers.to(out.dtype.element_ty)
        tl.store(total + row * width + columns, rounded, mask=inside)
        numbers = rounded.to(tl.float32)
    if centers:
        numbers = tl.where(inside, numbers - tl.sum(numbers, 0) / width, 0.0)
    numbers *= tl.rsqrt(tl.sum(numbers * numbers, 0) / width + eps)
    if rounds_first:
        numbers = numbers.to(out.dtype.element_ty).to(tl.float32)
    numbers *= factors + offset
    if has_bias:
        numbers += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + columns, numbers.to(out.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def _gate_kernel(
    opening: tl.tensor,
    values: tl.tensor,
    out: tl.tensor,
    opening_stride: tl.tensor,
    values_stride: tl.tensor,
    width: tl.tensor,
    activation: tl.constexpr,
    block: tl.constexpr,
    early: tl.constexpr,
) -> None:
    """Multiply a piece of a row by its activation; grid `(rows, pieces)`."""
    wait_for_inputs(early)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * block + tl.arange(0, block)
    inside = columns < width
    x = tl.load(opening + row * opening_stride + columns, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(values + row * values_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if activation == 0:
        opened = x / (1 + tl.exp(-x))
    elif activation == 1:
        opened = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    else:
        # tanh(u) = 1 - 2 / (exp(2u) + 1), which has no overflow: its exponential may be 0 or inf.
        doubled = tl.exp(1.5957691216057308 * (x + 0.044715 * x * x * x))
        opened = 0.5 * x * (2 - 2 / (doubled + 1))
    opened = opened.to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * width + columns, (opened * factor).to(out.dtype.element_ty), mask=inside)

"""The small steps between the linear layers of a model, each as one Triton kernel: norms and gated activations.

The module also has the kernels of `rotary`, so that it offers the same functions as `reference`, which documents them.

The launchers check nothing, and the device of the tensors must be the current one. Grids depend on shapes alone, and
nothing is read on the host, so that a call can be part of a CUDA graph.
"""
# No `from __future__ import annotations` here: Triton's interpreter needs `tl.constexpr` as an object, and its compiler
# resolves every annotation of a kernel's arguments, and refuses others than its own.

import torch
import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]  # not on every machine, and untyped
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]

from langchain_quantllm.kernels.activation import ACTIVATIONS, activated
from langchain_quantllm.kernels.launch import launch_options, power_of_2, wait_for_inputs
from langchain_quantllm.kernels.reference import (
    GELU,
    GELU_TANH,
    HALVES,
    HALVES_ONCE,
    PAIRS,
    PAIRS_OF_HALVES,
    SIGMOID,
    SILU,
)
from langchain_quantllm.kernels.rotary import cos_sin, rotate_and_write

__all__ = [
    "GELU",
    "GELU_TANH",
    "HALVES",
    "HALVES_ONCE",
    "PAIRS",
    "PAIRS_OF_HALVES",
    "SIGMOID",
    "SILU",
    "activation_mul",
    "add_layer_norm",
    "add_rms_norm",
    "cos_sin",
    "gated_rms_norm",
    "rms_norm",
    "rotate_and_write",
]

_ACTIVATION_TILE = 1024
"""Numbers of one program of `activation_mul`."""


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, *, offset: float = 0.0, rounds_first: bool = True
) -> torch.Tensor:
    """Normalize by the root of the mean square; see `reference.rms_norm`. All but the tensors is compiled in."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _launch_norm(x, None, weight, None, None, out, eps=eps, offset=offset, rounds_first=rounds_first)
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
    """Add, and normalize the sum; see `reference.add_rms_norm`. All but the tensors is compiled in."""
    total = torch.empty_like(x, memory_format=torch.contiguous_format)
    out = torch.empty_like(total)
    _launch_norm(x, residual, weight, None, total, out, eps=eps, offset=offset, rounds_first=rounds_first)
    return total, out


def add_layer_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add, and normalize the sum to mean 0 and variance 1; see `reference.add_layer_norm`. `eps` is compiled in."""
    total = torch.empty_like(x, memory_format=torch.contiguous_format)
    out = torch.empty_like(total)
    _launch_norm(x, residual, weight, bias, total, out, eps=eps, centers=True)
    return total, out


def gated_rms_norm(
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    gating: str,
    gates_first: bool,
    rounds: bool,
    groups: int,
) -> torch.Tensor:
    """Normalize, and multiply by a gate; see `reference.gated_rms_norm`. All but the tensors is compiled in."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    x, gate = _rows(x), _rows(gate)
    width = x.shape[1] // groups
    tile = power_of_2(width, 16)
    _gated_norm_kernel[(x.shape[0], groups)](
        x,
        gate,
        weight,
        out,
        x.stride(0),
        gate.stride(0),
        width=width,
        eps=eps,
        is_silu=gating == SILU,
        gates_first=gates_first,
        rounds=rounds,
        tile=tile,
        num_warps=min(16, max(1, tile // 256)),
        **launch_options(x.device),
    )
    return out


def activation_mul(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """Multiply an activation of one tensor by another; see `reference.activation_mul`. `activation` is compiled in."""
    out = torch.empty_like(gate, memory_format=torch.contiguous_format)
    gate, up = _rows(gate), _rows(up)
    rows, width = gate.shape
    tile = min(_ACTIVATION_TILE, power_of_2(width, 16))
    _activation_mul_kernel[(rows, -(-width // tile))](
        gate,
        up,
        out,
        gate.stride(0),
        up.stride(0),
        width,
        activation=ACTIVATIONS[activation],
        tile=tile,
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
    *,
    eps: float,
    offset: float = 0.0,
    rounds_first: bool = False,
    centers: bool = False,
) -> None:
    """Launch the kernel of all norms; without a residual, bias or total, another tensor is passed and never read."""
    x = _rows(x)
    residual = x if residual is None else _rows(residual)
    rows, width = x.shape
    tile = power_of_2(width, 16)
    _norm_kernel[(rows,)](
        x,
        residual,
        weight,
        weight if bias is None else bias,
        out if total is None else total,
        out,
        x.stride(0),
        residual.stride(0),
        width=width,
        eps=eps,
        offset=offset,
        adds=total is not None,
        has_bias=bias is not None,
        rounds_first=rounds_first,
        centers=centers,
        tile=tile,
        num_warps=min(16, max(1, tile // 256)),
        **launch_options(x.device),
    )


def _rows(x: torch.Tensor) -> torch.Tensor:
    """View `(..., width)` as `(rows, width)` with dense rows; copies a tensor that has no such view."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


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
    tile: tl.constexpr,
    early: tl.constexpr,
) -> None:
    """Add and normalize one row; grid `(rows,)`."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, tile)
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
def _gated_norm_kernel(
    x: tl.tensor,
    gate: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    x_stride: tl.tensor,
    gate_stride: tl.tensor,
    width: tl.constexpr,
    eps: tl.constexpr,
    is_silu: tl.constexpr,
    gates_first: tl.constexpr,
    rounds: tl.constexpr,
    tile: tl.constexpr,
    early: tl.constexpr,
) -> None:
    """Normalize a group of one row and gate it; grid `(rows, groups)`."""
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    within = tl.arange(0, tile)
    inside = within < width
    columns = group * width + within
    factors = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    wait_for_inputs(early)
    numbers = tl.load(x + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    gates = tl.load(gate + row * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    gates = activated(gates, 0) if is_silu else tl.sigmoid(gates)
    if gates_first:
        numbers *= gates
    numbers = tl.where(inside, numbers, 0.0)
    numbers *= tl.rsqrt(tl.sum(numbers * numbers, 0) / width + eps)
    if rounds:
        numbers = (numbers.to(out.dtype.element_ty).to(tl.float32) * factors).to(out.dtype.element_ty).to(tl.float32)
    else:
        numbers *= factors
    if not gates_first:
        numbers *= gates
    at = out + (row * tl.num_programs(1) + group) * width + within
    tl.store(at, numbers.to(out.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def _activation_mul_kernel(
    gate: tl.tensor,
    up: tl.tensor,
    out: tl.tensor,
    gate_stride: tl.tensor,
    up_stride: tl.tensor,
    width: tl.tensor,
    activation: tl.constexpr,
    tile: tl.constexpr,
    early: tl.constexpr,
) -> None:
    """Multiply a tile of a row; grid `(rows, tiles of a row)`."""
    wait_for_inputs(early)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * tile + tl.arange(0, tile)
    inside = columns < width
    x = tl.load(gate + row * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(up + row * up_stride + columns, mask=inside, other=0.0).to(tl.float32)
    gate_value = activated(x, activation).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * width + columns, (gate_value * factor).to(out.dtype.element_ty), mask=inside)

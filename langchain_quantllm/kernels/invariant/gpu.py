"""Products and sums on a GPU whose results for a row do not depend on the other rows, in Triton.

A program computes a tile of rows. The sizes of tiles, and so the order in which numbers are added, follow from the
width of the rows alone. The device of the tensors must be the current one, and grids depend on shapes alone, so that a
call can be part of a CUDA graph.
"""
# No `from __future__ import annotations` here: Triton's interpreter needs `tl.constexpr` as an object.

from typing import Any

import torch
import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]  # not on every machine, and untyped
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]

from langchain_quantllm.errors import UnsupportedError
from langchain_quantllm.kernels.launch import dot, launch_options, power_of_2, wait_for_inputs

__all__ = ["batched_product", "by_rows", "grouped_product", "product", "softmax", "sums"]

_MOST_NUMBERS = 4096
"""Numbers of a row that a program reads at once."""

_WIDE = 1 << 14
"""Columns from which on tiles are wide: of output heads."""


def product(rows: torch.Tensor, matrix: torch.Tensor, added: torch.Tensor | None = None) -> torch.Tensor:
    """Multiply rows by a matrix; see `products.product`.

    Raises:
        UnsupportedError: If the numbers are neither float32 nor of 16 bits.
    """
    fused = added if added is not None and added.dim() == 1 and added.stride(0) == 1 else None
    out = rows.new_empty(len(rows), matrix.shape[1])
    _launch_product(rows[None], matrix[None], out[None], fused, None)
    return out + added if added is not None and fused is None else out


def batched_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Multiply pairs of matrices; see `products.batched_product`."""
    out = left.new_empty(*left.shape[:2], right.shape[2])
    _launch_product(left, right, out, None, None)
    return out


def grouped_product(rows: torch.Tensor, matrices: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Multiply groups of rows, each by its matrix; see `products.grouped_product`. `ends` are int32."""
    out = rows.new_zeros(len(rows), matrices.shape[2])
    batch = (len(matrices), *rows.shape)
    _launch_product(rows.expand(batch), matrices, out.expand(len(matrices), *out.shape), None, ends)
    return out


def _launch_product(
    left: torch.Tensor,
    right: torch.Tensor,
    out: torch.Tensor,
    added: torch.Tensor | None,
    ends: torch.Tensor | None,
) -> None:
    """Launch the kernel for matrices of shapes `(batch, rows, inputs)` and `(batch, inputs, columns)`."""
    if left.dtype not in (torch.float32, torch.float16, torch.bfloat16) or right.dtype != left.dtype:
        msg = f"there is no invariant product of {left.dtype} and {right.dtype} on a GPU"
        raise UnsupportedError(msg)
    (batch, rows, inputs), columns = left.shape, right.shape[2]
    if not rows or not columns:
        return
    if left.dtype == torch.float32:  # no tensor cores, and twice the memory
        row_tile, column_tile, input_tile, stages = 32, 32, 32, 2
    else:
        row_tile, column_tile, input_tile, stages = 64, 128 if columns >= _WIDE else 32, 64, 3
    _product_kernel[(-(-rows // row_tile), -(-columns // column_tile), batch)](
        left, right, out if added is None else added, out, left if ends is None else ends, rows, columns, inputs,
        *left.stride(), *right.stride(), out.stride(0),
        biased=added is not None, grouped=ends is not None,
        row_tile=row_tile, column_tile=column_tile, input_tile=input_tile,
        num_warps=4, num_stages=stages, **launch_options(out.device),
    )  # fmt: skip


def by_rows(func: Any, rows: torch.Tensor, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Compute an operation of PyTorch along rows.

    Args:
        func: The operation.
        rows: Of shape `(rows, ...)`.
        rest: Its other arguments: the dimensions after the first, or the last one.
        kwargs: Its keyword arguments.

    Raises:
        UnsupportedError: If there is no kernel for it.
    """
    name = func.name().partition(".")[0]
    flat = rows.reshape(len(rows), -1)
    dtype = kwargs.get("dtype") or rows.dtype
    if name in ("aten::_softmax", "aten::_log_softmax"):
        return softmax(flat, logarithm=name == "aten::_log_softmax", dtype=torch.float32 if rest[1] else rows.dtype)
    if name in ("aten::sum", "aten::mean"):
        found = sums(flat)
        return (found / flat.shape[1] if name == "aten::mean" else found).to(dtype)
    if name in ("aten::var", "aten::var_mean") and set(kwargs) <= {"correction"}:
        correction = kwargs.get("correction")
        mean = sums(flat) / flat.shape[1]
        squares = (flat.float() - mean[:, None]).square()
        variance = (sums(squares) / max(0, flat.shape[1] - (1 if correction is None else correction))).to(dtype)
        return (variance, mean.to(dtype)) if name == "aten::var_mean" else variance
    msg = f"there is no invariant kernel for its operation {func.name()} on a GPU"
    raise UnsupportedError(msg)


def sums(rows: torch.Tensor) -> torch.Tensor:
    """Add up rows of shape `(rows, width)`; returns `(rows,)`, float32."""
    rows = rows.contiguous()
    out = rows.new_empty(len(rows), dtype=torch.float32)
    if len(rows):
        width = rows.shape[1]
        tile = min(_MOST_NUMBERS, power_of_2(width, 16))
        _sum_kernel[(len(rows),)](rows, out, width=width, tile=tile, num_warps=4, **launch_options(out.device))
    return out


def softmax(rows: torch.Tensor, *, logarithm: bool = False, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Compute the softmax of rows of shape `(rows, width)`, or its logarithm, in float32; returned in `dtype`."""
    rows = rows.contiguous()
    out = torch.empty_like(rows, dtype=dtype or rows.dtype)
    if len(rows):
        width = rows.shape[1]
        tile = min(_MOST_NUMBERS, power_of_2(width, 16))
        _softmax_kernel[(len(rows),)](
            rows, out, width=width, logarithm=logarithm, tile=tile, num_warps=4, **launch_options(out.device)
        )
    return out


@triton.jit(do_not_specialize=["rows"])  # type: ignore[misc,untyped-decorator,unused-ignore]
def _product_kernel(
    left: tl.tensor,
    right: tl.tensor,
    added: tl.tensor,
    out: tl.tensor,
    ends: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    inputs: tl.tensor,
    left_batch: tl.tensor,
    left_row: tl.tensor,
    left_input: tl.tensor,
    right_batch: tl.tensor,
    right_input: tl.tensor,
    right_column: tl.tensor,
    out_batch: tl.tensor,
    biased: tl.constexpr,
    grouped: tl.constexpr,
    row_tile: tl.constexpr,
    column_tile: tl.constexpr,
    input_tile: tl.constexpr,
    early: tl.constexpr,
) -> None:
    """Multiply a tile of rows by a tile of columns; grid `(tiles of rows, tiles of columns, batch)`."""
    wait_for_inputs(early)
    batch = tl.program_id(2).to(tl.int64)
    start = 0
    stop = rows
    if grouped:
        start = tl.load(ends + batch - 1, mask=batch > 0, other=0)
        stop = tl.load(ends + batch)
    first_row = start + tl.program_id(0) * row_tile
    if first_row >= stop:
        return
    row = (first_row + tl.arange(0, row_tile)).to(tl.int64)
    column = (tl.program_id(1) * column_tile + tl.arange(0, column_tile)).to(tl.int64)
    left_at = left + batch * left_batch + row[:, None] * left_row
    right_at = right + batch * right_batch + column[None, :] * right_column
    found = tl.zeros([row_tile, column_tile], tl.float32)
    for first in range(0, inputs, input_tile):
        place = (first + tl.arange(0, input_tile)).to(tl.int64)
        inside = place < inputs
        tile = tl.load(left_at + place[None, :] * left_input, mask=(row < stop)[:, None] & inside[None, :], other=0.0)
        weight = tl.load(
            right_at + place[:, None] * right_input, mask=inside[:, None] & (column < columns)[None, :], other=0.0
        )
        found = dot(tile, weight, found)
    if biased:
        found += tl.load(added + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    tl.store(
        out + batch * out_batch + row[:, None] * columns + column[None, :],
        found.to(out.dtype.element_ty),
        mask=(row < stop)[:, None] & (column < columns)[None, :],
    )


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def _sum_kernel(rows: tl.tensor, out: tl.tensor, width: tl.constexpr, tile: tl.constexpr, early: tl.constexpr) -> None:
    """Add up one row; grid `(rows,)`."""
    wait_for_inputs(early)
    row = tl.program_id(0).to(tl.int64)
    found = tl.zeros([tile], tl.float32)
    for first in range(0, width, tile):
        place = first + tl.arange(0, tile)
        found += tl.load(rows + row * width + place, mask=place < width, other=0.0).to(tl.float32)
    tl.store(out + row, tl.sum(found, 0))


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def _softmax_kernel(
    rows: tl.tensor,
    out: tl.tensor,
    width: tl.constexpr,
    logarithm: tl.constexpr,
    tile: tl.constexpr,
    early: tl.constexpr,
) -> None:
    """Compute the softmax of one row; grid `(rows,)`."""
    wait_for_inputs(early)
    row = tl.program_id(0).to(tl.int64)
    highest = tl.full([tile], float("-inf"), tl.float32)
    for first in range(0, width, tile):
        place = first + tl.arange(0, tile)
        numbers = tl.load(rows + row * width + place, mask=place < width, other=float("-inf")).to(tl.float32)
        highest = tl.maximum(highest, numbers)
    peak = tl.max(highest, 0)
    total = tl.zeros([tile], tl.float32)
    for first in range(0, width, tile):
        place = first + tl.arange(0, tile)
        numbers = tl.load(rows + row * width + place, mask=place < width, other=float("-inf")).to(tl.float32)
        total += tl.exp(numbers - peak)
    weight = tl.sum(total, 0)
    for first in range(0, width, tile):
        place = first + tl.arange(0, tile)
        numbers = tl.load(rows + row * width + place, mask=place < width, other=0.0).to(tl.float32)
        found = numbers - peak - tl.log(weight) if logarithm else tl.exp(numbers - peak) / weight
        tl.store(out + row * width + place, found.to(out.dtype.element_ty), mask=place < width)

"""The kernel for weights that are not quantized and few rows, in Triton.

A launch multiplies the same activations by up to three weights, whose programs follow each other in the grid.
"""
# No `from __future__ import annotations` here: Triton's interpreter needs `tl.constexpr` as an object.

import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]  # not on every machine, and untyped
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]

from langchain_quantllm.kernels.launch import let_next_begin, prefetch, wait_for_inputs
from langchain_quantllm.kernels.linear.grouping import pick, program_place, sum_of


@triton.jit(do_not_specialize=["splits"])  # type: ignore[misc,untyped-decorator,unused-ignore]
def float_vector_kernel(
    x: tl.tensor,
    out: tl.tensor,
    all_values: tl.tuple,
    biases: tl.tuple,
    widths: tl.tuple,
    row_words: tl.tensor,
    row_stride: tl.tensor,
    splits: tl.tensor,
    weights: tl.constexpr,
    rows: tl.constexpr,
    biased: tl.constexpr,
    outputs: tl.constexpr,
    words: tl.constexpr,
    stages: tl.constexpr,
    ahead: tl.constexpr,
    early: tl.constexpr,
) -> None:
    """Multiply up to 4 rows by `outputs` rows of a weight, in float32; grid `(programs of the weights, splits)`.

    A word is two values. Each thread adds 8 neighbouring products into one sum; these are added at the end.
    """
    which, local, before = program_place(widths, weights, outputs)
    values = pick(which, all_values, weights)
    width = pick(which, widths, weights)
    total = sum_of(widths, weights)
    column = local * outputs + tl.arange(0, outputs)
    held = values + tl.minimum(column, width - 1).to(tl.int64)[:, None] * (2 * row_words)
    found_1 = tl.zeros([outputs, words // 4], tl.float32)
    found_2 = tl.zeros([outputs, words // 4], tl.float32)
    found_3 = tl.zeros([outputs, words // 4], tl.float32)
    found_4 = tl.zeros([outputs, words // 4], tl.float32)

    share = tl.cdiv(tl.cdiv(row_words, words), splits)
    start = tl.program_id(1) * share * words
    stop = tl.minimum(start + share * words, row_words)
    if ahead > 0:
        prefetch((held + 2 * start).to(tl.pointer_type(tl.int32)), stop - start, ahead, early)
    wait_for_inputs(early)
    for first in tl.range(start, stop, words, num_stages=stages):
        element = 2 * first + tl.arange(0, 2 * words)
        inside = element < 2 * row_words
        weight = tl.load(held + element[None, :], mask=inside[None, :], other=0.0).to(tl.float32)
        at = x + element
        found_1 += _sums(weight, at, inside, outputs, words)
        if rows > 1:
            found_2 += _sums(weight, at + row_stride, inside, outputs, words)
        if rows > 2:
            found_3 += _sums(weight, at + 2 * row_stride, inside, outputs, words)
        if rows > 3:
            found_4 += _sums(weight, at + 3 * row_stride, inside, outputs, words)

    let_next_begin(early)
    bias = out
    if biased:
        bias = pick(which, biases, weights)
    end = out + tl.program_id(1) * (rows * total) + rows * before + column
    seen = column < width
    _finish(end, tl.sum(found_1, 1), bias, column, seen, biased)
    if rows > 1:
        _finish(end + width, tl.sum(found_2, 1), bias, column, seen, biased)
    if rows > 2:
        _finish(end + 2 * width, tl.sum(found_3, 1), bias, column, seen, biased)
    if rows > 3:
        _finish(end + 3 * width, tl.sum(found_4, 1), bias, column, seen, biased)


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def _sums(weight: tl.tensor, at: tl.tensor, inside: tl.tensor, outputs: tl.constexpr, words: tl.constexpr) -> tl.tensor:
    """Multiply a tile of shape `(outputs, 2 * words)` by the inputs at `at`; 8 products become one sum."""
    inputs = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    return tl.sum(tl.reshape(weight * inputs[None, :], [outputs, words // 4, 8]), 2)


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def _finish(
    end: tl.tensor, found: tl.tensor, bias: tl.tensor, column: tl.tensor, seen: tl.tensor, biased: tl.constexpr
) -> None:
    """Add the bias, and store one row of a program."""
    if biased:
        found += tl.load(bias + column, mask=seen, other=0.0).to(tl.float32)
    tl.store(end, found.to(end.dtype.element_ty), mask=seen)

"""The kernels for weights packed along their inputs, as by GPTQ, in Triton.

A launch multiplies the same activations by up to three weights, whose programs follow each other in the grid.
`dispatch` launches them, and `reference` documents their results.
"""
# No `from __future__ import annotations` here: Triton's interpreter needs `tl.constexpr` as an object.

import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]  # not on every machine, and untyped
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]

from langchain_quantllm.kernels.launch import dot, let_next_begin, wait_for_inputs
from langchain_quantllm.kernels.linear.decoding import (
    all_scaled_codes,
    centered,
    columns_of,
    inverse_units,
    joined,
    packed_words,
    prefetch_columns,
    scaled,
    strided,
    zero_points,
)
from langchain_quantllm.kernels.linear.grouping import pick, program_place, sum_of


@triton.jit(do_not_specialize=["splits"])  # type: ignore[misc,untyped-decorator,unused-ignore]
def packed_vector_kernel(
    x: tl.tensor,
    out: tl.tensor,
    all_words: tl.tuple,
    all_scales: tl.tuple,
    all_zeros: tl.tuple,
    all_groups: tl.tuple,
    biases: tl.tuple,
    widths: tl.tuple,
    row_words: tl.tensor,
    row_stride: tl.tensor,
    splits: tl.tensor,
    magic: tl.tensor,
    weights: tl.constexpr,
    rows: tl.constexpr,
    bits: tl.constexpr,
    per_word: tl.constexpr,
    group_size: tl.constexpr,
    chunk: tl.constexpr,
    zero_point: tl.constexpr,
    biased: tl.constexpr,
    outputs: tl.constexpr,
    words: tl.constexpr,
    stages: tl.constexpr,
    ahead: tl.constexpr,
    early: tl.constexpr,
) -> None:
    """Multiply up to 4 rows by `outputs` columns of a weight, in float32; grid `(programs of the weights, splits)`.

    Codes are multiplied unscaled; for each group, the zero point times the sum of the inputs is subtracted.
    """
    which, local, before = program_place(widths, weights, outputs)
    stored = pick(which, all_words, weights)
    scales = pick(which, all_scales, weights)
    zeros = pick(which, all_zeros, weights)
    groups = pick(which, all_groups, weights)
    width = pick(which, widths, weights)
    total = sum_of(widths, weights)
    column = local * outputs + tl.arange(0, outputs)
    seen = column < width
    found_1 = tl.zeros([words, outputs], tl.float32)
    found_2 = tl.zeros([words, outputs], tl.float32)
    found_3 = tl.zeros([words, outputs], tl.float32)
    found_4 = tl.zeros([words, outputs], tl.float32)

    share = tl.cdiv(tl.cdiv(row_words, words), splits)
    start = tl.program_id(1) * share * words
    stop = tl.minimum(start + share * words, row_words)
    if ahead > 0:
        prefetch_columns(stored, start, stop, local * outputs, width, bits, outputs, ahead, early)
    wait_for_inputs(early)
    for first in tl.range(start, stop, words, num_stages=stages):
        place = first + tl.arange(0, words)
        inside = place < row_words
        loaded = packed_words(stored, place, column, width, inside[:, None] & seen[None, :], bits)
        at = x + place[:, None] * per_word + tl.arange(0, per_word)[None, :]
        if group_size > 0:
            scale, zero = group_values(
                scales,
                zeros,
                column,
                width,
                first,
                row_words,
                outputs,
                words,
                bits,
                per_word,
                group_size,
                chunk,
                zero_point,
            )
            values = all_scaled_codes(loaded, magic, bits, 0 if zero_point < 0 else zero_point)
            weight = joined(values, words, outputs, per_word)
            found_1 += _sums(weight, at, inside, scale, zero, bits, zero_point)
            if rows > 1:
                found_2 += _sums(weight, at + row_stride, inside, scale, zero, bits, zero_point)
            if rows > 2:
                found_3 += _sums(weight, at + 2 * row_stride, inside, scale, zero, bits, zero_point)
            if rows > 3:
                found_4 += _sums(weight, at + 3 * row_stride, inside, scale, zero, bits, zero_point)
        else:
            x_1 = columns_of(at, inside, words, per_word)
            x_2 = x_1
            x_3 = x_1
            x_4 = x_1
            if rows > 1:
                x_2 = columns_of(at + row_stride, inside, words, per_word)
            if rows > 2:
                x_3 = columns_of(at + 2 * row_stride, inside, words, per_word)
            if rows > 3:
                x_4 = columns_of(at + 3 * row_stride, inside, words, per_word)
            for j in tl.static_range(per_word):
                scale, zero = group_values_of_each(
                    scales, zeros, groups, column, width, place * per_word + j, inside, bits, zero_point
                )
                weight = centered(loaded, zero, bits * j, bits, tl.float32) * scale
                found_1 += weight * x_1[j][:, None]
                if rows > 1:
                    found_2 += weight * x_2[j][:, None]
                if rows > 2:
                    found_3 += weight * x_3[j][:, None]
                if rows > 3:
                    found_4 += weight * x_4[j][:, None]

    let_next_begin(early)
    bias = out
    if biased:
        bias = pick(which, biases, weights)
    end = out + tl.program_id(1) * (rows * total) + rows * before + column
    _finish(end, tl.sum(found_1, 0), bias, column, seen, biased)
    if rows > 1:
        _finish(end + width, tl.sum(found_2, 0), bias, column, seen, biased)
    if rows > 2:
        _finish(end + 2 * width, tl.sum(found_3, 0), bias, column, seen, biased)
    if rows > 3:
        _finish(end + 3 * width, tl.sum(found_4, 0), bias, column, seen, biased)


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def _sums(
    weight: tl.tensor,
    at: tl.tensor,
    inside: tl.tensor,
    scale: tl.tensor,
    zero: tl.tensor,
    bits: tl.constexpr,
    zero_point: tl.constexpr,
) -> tl.tensor:
    """Multiply a tile of codes of shape `(words, outputs, per_word)` by the inputs at `at`."""
    inputs = tl.load(at, mask=inside[:, None], other=0.0).to(tl.float32)
    return packed_sums(weight, inputs, scale, zero, bits, zero_point)


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def packed_sums(
    weight: tl.tensor,
    inputs: tl.tensor,
    scale: tl.tensor,
    zero: tl.tensor,
    bits: tl.constexpr,
    zero_point: tl.constexpr,
) -> tl.tensor:
    """Multiply a tile of codes of shape `(words, outputs, per_word)` by inputs `(words, per_word)`, and scale."""
    found = tl.sum(weight * (inputs * inverse_units(bits, weight.shape[2]))[:, None, :], 2)
    if zero_point < 0:
        found -= zero * tl.sum(inputs, 1)[:, None]
    return found * scale


@triton.jit(do_not_specialize=["splits", "rows"])  # type: ignore[misc,untyped-decorator,unused-ignore]
def packed_tile_kernel(
    x: tl.tensor,
    out: tl.tensor,
    all_words: tl.tuple,
    all_scales: tl.tuple,
    all_zeros: tl.tuple,
    all_groups: tl.tuple,
    biases: tl.tuple,
    widths: tl.tuple,
    row_words: tl.tensor,
    row_stride: tl.tensor,
    splits: tl.tensor,
    rows: tl.tensor,
    weights: tl.constexpr,
    bits: tl.constexpr,
    per_word: tl.constexpr,
    group_size: tl.constexpr,
    chunk: tl.constexpr,
    zero_point: tl.constexpr,
    biased: tl.constexpr,
    outputs: tl.constexpr,
    words: tl.constexpr,
    padded_rows: tl.constexpr,
    ahead: tl.constexpr,
    dtype: tl.constexpr,
    early: tl.constexpr,
) -> None:
    """Multiply `outputs` columns of a weight by up to `padded_rows` rows, on tensor cores.

    Grid `(programs of the weights, splits, tiles of rows)`. If a tile is in one group, integers are multiplied, which
    are exact in 16 bits, and their sum is scaled; otherwise the weights are scaled.
    """
    which, local, before = program_place(widths, weights, outputs)
    stored = pick(which, all_words, weights)
    scales = pick(which, all_scales, weights)
    zeros = pick(which, all_zeros, weights)
    groups = pick(which, all_groups, weights)
    width = pick(which, widths, weights)
    total = sum_of(widths, weights)
    column = local * outputs + tl.arange(0, outputs)
    seen = column < width
    row = tl.program_id(2) * padded_rows + tl.arange(0, padded_rows)
    found = tl.zeros([outputs, padded_rows], tl.float32)

    share = tl.cdiv(tl.cdiv(row_words, words), splits)
    start = tl.program_id(1) * share * words
    stop = tl.minimum(start + share * words, row_words)
    if ahead > 0:
        prefetch_columns(stored, start, stop, local * outputs, width, bits, outputs, ahead, early)
    wait_for_inputs(early)
    for first in range(start, stop, words):
        place = first + tl.arange(0, words)
        inside = place < row_words
        loaded = packed_words(stored, place, column, width, inside[:, None] & seen[None, :], bits)
        element = first * per_word + tl.arange(0, words * per_word)
        tile = tl.load(
            x + row[:, None] * row_stride + element[None, :],
            mask=(row < rows)[:, None] & (element < row_words * per_word)[None, :],
            other=0.0,
        )
        found = add_packed_products(
            found, loaded, tile, scales, zeros, groups, column, width, first, row_words,
            outputs, words, padded_rows, bits, per_word, group_size, chunk, zero_point, dtype,
        )  # fmt: skip

    let_next_begin(early)
    if biased:
        bias = pick(which, biases, weights)
        found += tl.load(bias + column, mask=seen, other=0.0).to(tl.float32)[:, None]
    end = out + tl.program_id(1).to(tl.int64) * (rows * total) + rows * before
    tl.store(
        end + row[None, :] * width + column[:, None],
        found.to(out.dtype.element_ty),
        mask=(row < rows)[None, :] & seen[:, None],
    )


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def add_packed_products(
    found: tl.tensor,
    loaded: tl.tensor,
    tile: tl.tensor,
    scales: tl.tensor,
    zeros: tl.tensor,
    groups: tl.tensor,
    column: tl.tensor,
    width: tl.tensor,
    first: tl.tensor,
    row_words: tl.tensor,
    outputs: tl.constexpr,
    words: tl.constexpr,
    padded_rows: tl.constexpr,
    bits: tl.constexpr,
    per_word: tl.constexpr,
    group_size: tl.constexpr,
    chunk: tl.constexpr,
    zero_point: tl.constexpr,
    dtype: tl.constexpr,
) -> tl.tensor:
    """Add the products of a tile of packed words and inputs `(rows, words * per_word)` to `(outputs, rows)`.

    If a tile is in one group, integers are multiplied, which are exact in 16 bits, and their sum is scaled; otherwise
    the weights are scaled.
    """
    middle: tl.constexpr = 1 << (bits - 1) if zero_point < 0 else zero_point
    seen = column < width
    place = first + tl.arange(0, words)
    inside = place < row_words
    inputs = strided(tile, padded_rows, words, per_word)
    if group_size > 0 and chunk >= words:
        constant = tl.full([1, 1], 1.0 * middle, tl.float32)
        part = tl.zeros([outputs, padded_rows], tl.float32)
        for j in tl.static_range(per_word):
            part = dot(tl.trans(centered(loaded, constant, bits * j, bits, dtype)), tl.trans(inputs[j]), part)
        group = first * per_word // group_size
        if zero_point < 0:
            zero = _zeros(zeros, group, column, width, seen, bits) - middle
            part -= zero[:, None] * tl.sum(tile.to(tl.float32), 1)[None, :]
        scale = tl.load(scales + group * width + column, mask=seen, other=0.0).to(tl.float32)
        found += part * scale[:, None]
    elif group_size > 0:
        scale, zero = group_values(
            scales,
            zeros,
            column,
            width,
            first,
            row_words,
            outputs,
            words,
            bits,
            per_word,
            group_size,
            chunk,
            zero_point,
        )
        for j in tl.static_range(per_word):
            weight = scaled(centered(loaded, zero, bits * j, bits, dtype), scale, dtype)
            found = dot(tl.trans(weight), tl.trans(inputs[j]), found)
    else:
        for j in tl.static_range(per_word):
            scale, zero = group_values_of_each(
                scales, zeros, groups, column, width, place * per_word + j, inside, bits, zero_point
            )
            weight = scaled(centered(loaded, zero, bits * j, bits, dtype), scale, dtype)
            found = dot(tl.trans(weight), tl.trans(inputs[j]), found)
    return found


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def _zeros(
    zeros: tl.tensor, group: tl.tensor, column: tl.tensor, width: tl.tensor, inside: tl.tensor, bits: tl.constexpr
) -> tl.tensor:
    """Load zero points of a group, in float32."""
    return zero_points(zeros, group, column, width, inside, bits).to(tl.float32)


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def group_values(
    scales: tl.tensor,
    zeros: tl.tensor,
    column: tl.tensor,
    width: tl.tensor,
    first: tl.tensor,
    row_words: tl.tensor,
    outputs: tl.constexpr,
    words: tl.constexpr,
    bits: tl.constexpr,
    per_word: tl.constexpr,
    group_size: tl.constexpr,
    chunk: tl.constexpr,
    zero_point: tl.constexpr,
) -> tl.tensor:
    """Load the scale and the zero point of each word of a tile; `chunk` consecutive words share them."""
    each: tl.constexpr = chunk if chunk < words else words
    chunks: tl.constexpr = words // each
    place = first + each * tl.arange(0, chunks)
    inside = (place < row_words)[:, None] & (column < width)[None, :]
    group = (place * per_word // group_size)[:, None]
    scale = tl.load(scales + group * width + column[None, :], mask=inside, other=0.0).to(tl.float32)
    scale = tl.reshape(tl.broadcast_to(scale[:, None, :], [chunks, each, outputs]), [words, outputs])
    if zero_point < 0:
        zero = _zeros(zeros, group, column[None, :], width, inside, bits)
        zero = tl.reshape(tl.broadcast_to(zero[:, None, :], [chunks, each, outputs]), [words, outputs])
    else:
        zero = tl.full([words, outputs], 1.0 * zero_point, tl.float32)
    return scale, zero


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def group_values_of_each(
    scales: tl.tensor,
    zeros: tl.tensor,
    groups: tl.tensor,
    column: tl.tensor,
    width: tl.tensor,
    element: tl.tensor,
    inside: tl.tensor,
    bits: tl.constexpr,
    zero_point: tl.constexpr,
) -> tl.tensor:
    """Load the scale and the zero point of each input; groups are in any order."""
    group = tl.load(groups + element, mask=inside, other=0)[:, None]
    both = inside[:, None] & (column < width)[None, :]
    scale = tl.load(scales + group * width + column[None, :], mask=both, other=0.0).to(tl.float32)
    if zero_point < 0:
        zero = _zeros(zeros, group, column[None, :], width, both, bits)
    else:
        zero = tl.full(scale.shape, 1.0 * zero_point, tl.float32)
    return scale, zero


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def _finish(
    end: tl.tensor, found: tl.tensor, bias: tl.tensor, column: tl.tensor, seen: tl.tensor, biased: tl.constexpr
) -> None:
    """Add the bias, and store one row of a program."""
    if biased:
        found += tl.load(bias + column, mask=seen, other=0.0).to(tl.float32)
    tl.store(end, found.to(end.dtype.element_ty), mask=seen)

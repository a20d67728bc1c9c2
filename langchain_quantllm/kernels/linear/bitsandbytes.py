"""The kernels for weights stored row by row, as by bitsandbytes: 4 bits and int8, in Triton.

A launch multiplies the same activations by up to three weights, whose programs follow each other in the grid.
`dispatch` launches them, and `reference` documents their results.
"""
# No `from __future__ import annotations` here: Triton's interpreter needs `tl.constexpr` as an object.

import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]  # not on every machine, and untyped
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]

from langchain_quantllm.kernels.launch import INTERPRETED, dot, let_next_begin, prefetch, wait_for_inputs
from langchain_quantllm.kernels.linear.decoding import (
    all_scaled_codes,
    centered,
    decoded,
    halves_swapped,
    inverse_units,
    joined,
    lane_value,
    lookup_in_memory,
    lookup_word_by_shuffle,
    scaled,
    strided,
)
from langchain_quantllm.kernels.linear.grouping import pick, program_place, sum_of
from langchain_quantllm.kernels.linear.pairs import SIGNS


@triton.jit(do_not_specialize=["splits"])  # type: ignore[misc,untyped-decorator,unused-ignore]
def row_vector_kernel(
    x: tl.tensor,
    out: tl.tensor,
    all_words: tl.tuple,
    all_scales: tl.tuple,
    all_nested_code: tl.tuple,
    all_nested_scales: tl.tuple,
    all_offset: tl.tuple,
    code: tl.tensor,
    biases: tl.tuple,
    widths: tl.tuple,
    row_words: tl.tensor,
    row_stride: tl.tensor,
    splits: tl.tensor,
    magic: tl.tensor,
    weights: tl.constexpr,
    rows: tl.constexpr,
    bits: tl.constexpr,
    block_size: tl.constexpr,
    chunk: tl.constexpr,
    nested: tl.constexpr,
    nested_block_size: tl.constexpr,
    biased: tl.constexpr,
    outputs: tl.constexpr,
    words: tl.constexpr,
    stages: tl.constexpr,
    ahead: tl.constexpr,
    decode: tl.constexpr,
    ptx: tl.constexpr,
    early: tl.constexpr,
) -> None:
    """Multiply up to 4 rows by `outputs` rows of a weight, in float32; grid `(programs of the weights, splits)`.

    Each thread holds some words of several outputs; their sums are added at the end.
    """
    which, local, before = program_place(widths, weights, outputs)
    stored = pick(which, all_words, weights)
    scales = pick(which, all_scales, weights)
    nested_code = pick(which, all_nested_code, weights)
    nested_scales = pick(which, all_nested_scales, weights)
    offset = pick(which, all_offset, weights)
    width = pick(which, widths, weights)
    total = sum_of(widths, weights)
    per_word: tl.constexpr = 32 // bits
    # Each thread adds four of its words into one sum, if it holds at least four.
    kept: tl.constexpr = words // 4
    column = local * outputs + tl.arange(0, outputs)
    held = tl.minimum(column, width - 1)[:, None] * row_words
    found_1 = tl.zeros([outputs, kept], tl.float32)
    found_2 = tl.zeros([outputs, kept], tl.float32)
    found_3 = tl.zeros([outputs, kept], tl.float32)
    found_4 = tl.zeros([outputs, kept], tl.float32)
    value = 0.0
    if bits == 4 and decode == "shuffle" and not INTERPRETED:
        value = lane_value(code)

    share = tl.cdiv(tl.cdiv(row_words, words), splits)
    start = tl.program_id(1) * share * words
    stop = tl.minimum(start + share * words, row_words)
    if ahead > 0:
        prefetch(stored + held + start, stop - start, ahead, early)
    wait_for_inputs(early)
    for first in tl.range(start, stop, words, num_stages=stages):
        place = first + tl.arange(0, words)
        inside = place < row_words
        loaded = tl.load(stored + held + place[None, :], mask=inside[None, :], other=0)
        if bits == 4:
            scale = block_scales(
                scales, nested_code, nested_scales, offset, held, first, row_words,
                outputs, words, block_size, chunk, nested, nested_block_size,
            )  # fmt: skip
        else:
            loaded = loaded ^ SIGNS
            scale = 1.0
        weight = row_values(loaded, code, value, magic, outputs, words, bits, decode, ptx, False)
        at = x + place[:, None] * per_word + tl.arange(0, per_word)[None, :]
        found_1 += _sums(weight, at, inside, scale, outputs, words, bits)
        if rows > 1:
            found_2 += _sums(weight, at + row_stride, inside, scale, outputs, words, bits)
        if rows > 2:
            found_3 += _sums(weight, at + 2 * row_stride, inside, scale, outputs, words, bits)
        if rows > 3:
            found_4 += _sums(weight, at + 3 * row_stride, inside, scale, outputs, words, bits)

    let_next_begin(early)
    bias = out
    if biased:
        bias = pick(which, biases, weights)
    end = out + tl.program_id(1) * (rows * total) + rows * before + column
    seen = column < width
    _finish(end, tl.sum(found_1, 1), scales, bias, column, seen, bits, biased)
    if rows > 1:
        _finish(end + width, tl.sum(found_2, 1), scales, bias, column, seen, bits, biased)
    if rows > 2:
        _finish(end + 2 * width, tl.sum(found_3, 1), scales, bias, column, seen, bits, biased)
    if rows > 3:
        _finish(end + 3 * width, tl.sum(found_4, 1), scales, bias, column, seen, bits, biased)


@triton.jit(do_not_specialize=["splits", "rows"])  # type: ignore[misc,untyped-decorator,unused-ignore]
def row_tile_kernel(
    x: tl.tensor,
    out: tl.tensor,
    all_words: tl.tuple,
    all_scales: tl.tuple,
    all_nested_code: tl.tuple,
    all_nested_scales: tl.tuple,
    all_offset: tl.tuple,
    code: tl.tensor,
    biases: tl.tuple,
    widths: tl.tuple,
    row_words: tl.tensor,
    row_stride: tl.tensor,
    splits: tl.tensor,
    rows: tl.tensor,
    weights: tl.constexpr,
    bits: tl.constexpr,
    block_size: tl.constexpr,
    chunk: tl.constexpr,
    nested: tl.constexpr,
    nested_block_size: tl.constexpr,
    biased: tl.constexpr,
    outputs: tl.constexpr,
    words: tl.constexpr,
    padded_rows: tl.constexpr,
    ahead: tl.constexpr,
    ptx: tl.constexpr,
    dtype: tl.constexpr,
    early: tl.constexpr,
) -> None:
    """Multiply `outputs` rows of a weight by up to `padded_rows` rows, on tensor cores.

    Grid `(programs of the weights, splits, tiles of rows)`. The weight is the left operand, which stays in registers;
    code `j` of all words is one product with every `per_word`-th input.
    """
    which, local, before = program_place(widths, weights, outputs)
    stored = pick(which, all_words, weights)
    scales = pick(which, all_scales, weights)
    nested_code = pick(which, all_nested_code, weights)
    nested_scales = pick(which, all_nested_scales, weights)
    offset = pick(which, all_offset, weights)
    width = pick(which, widths, weights)
    total = sum_of(widths, weights)
    per_word: tl.constexpr = 32 // bits
    column = local * outputs + tl.arange(0, outputs)
    held = tl.minimum(column, width - 1)[:, None] * row_words
    row = tl.program_id(2) * padded_rows + tl.arange(0, padded_rows)
    found = tl.zeros([outputs, padded_rows], tl.float32)

    share = tl.cdiv(tl.cdiv(row_words, words), splits)
    start = tl.program_id(1) * share * words
    stop = tl.minimum(start + share * words, row_words)
    if ahead > 0:
        prefetch(stored + held + start, stop - start, ahead, early)
    wait_for_inputs(early)
    for first in range(start, stop, words):
        place = first + tl.arange(0, words)
        loaded = tl.load(stored + held + place[None, :], mask=(place < row_words)[None, :], other=0)
        element = first * per_word + tl.arange(0, words * per_word)
        tile = tl.load(
            x + row[:, None] * row_stride + element[None, :],
            mask=(row < rows)[:, None] & (element < row_words * per_word)[None, :],
            other=0.0,
        )
        inputs = strided(tile, padded_rows, words, per_word)
        if bits == 4:
            scale = block_scales(
                scales, nested_code, nested_scales, offset, held, first, row_words,
                outputs, words, block_size, chunk, nested, nested_block_size,
            )  # fmt: skip
            found = add_four_bit_products(found, loaded, scale, inputs, code, dtype, ptx, False)
        else:
            found = add_int8_products(found, loaded, inputs, dtype)

    let_next_begin(early)
    if bits == 8:
        found = found * (tl.load(scales + column, mask=column < width, other=0.0) * (1 / 127))[:, None]
    if biased:
        bias = pick(which, biases, weights)
        found += tl.load(bias + column, mask=column < width, other=0.0).to(tl.float32)[:, None]
    end = out + tl.program_id(1).to(tl.int64) * (rows * total) + rows * before
    tl.store(
        end + row[None, :] * width + column[:, None],
        found.to(out.dtype.element_ty),
        mask=(row < rows)[None, :] & (column < width)[:, None],
    )


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def row_values(
    words_read: tl.tensor,
    code: tl.tensor,
    value: tl.tensor,
    magic: tl.tensor,
    outputs: tl.constexpr,
    words: tl.constexpr,
    bits: tl.constexpr,
    decode: tl.constexpr,
    ptx: tl.constexpr,
    lower_first: tl.constexpr,
) -> tl.tensor:
    """Decode a tile of words to `(outputs, words, per_word)`, float32; int8 by `scaled_code`, its signs turned.

    With `lower_first`, the first of two values of a byte is in its lower half.
    """
    if bits == 8:
        values = all_scaled_codes(words_read, magic, 8, 128)
    elif ptx != "":
        values = decoded(words_read, code, tl.float16, ptx)
    elif INTERPRETED or decode == "table":
        values = lookup_in_memory(words_read, code, tl.float32)
    else:
        values = lookup_word_by_shuffle(words_read, value)
    if lower_first:
        values = halves_swapped(values)
    return joined(values, outputs, words, 32 // bits).to(tl.float32)


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def add_four_bit_products(
    found: tl.tensor,
    words_read: tl.tensor,
    scale: tl.tensor,
    inputs: tl.tensor,
    code: tl.tensor,
    dtype: tl.constexpr,
    ptx: tl.constexpr,
    lower_first: tl.constexpr,
) -> tl.tensor:
    """Add the products of a tile of words and their `strided` inputs to `(outputs, rows)`, on tensor cores."""
    values = decoded(words_read, code, dtype, ptx)
    if lower_first:
        values = halves_swapped(values)
    for j in tl.static_range(8):
        found = dot(scaled(values[j], scale, dtype), tl.trans(inputs[j]), found)
    return found


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def add_int8_products(found: tl.tensor, words_read: tl.tensor, inputs: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """Add the products of a tile of int8 and their `strided` inputs to `(outputs, rows)`, without scales."""
    zero = tl.full([1, 1], 128.0, tl.float32)
    codes = words_read ^ SIGNS
    for j in tl.static_range(4):
        found = dot(centered(codes, zero, 8 * j, 8, dtype), tl.trans(inputs[j]), found)
    return found


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def _sums(
    weight: tl.tensor,
    at: tl.tensor,
    inside: tl.tensor,
    scale: tl.tensor,
    outputs: tl.constexpr,
    words: tl.constexpr,
    bits: tl.constexpr,
) -> tl.tensor:
    """Multiply a tile of shape `(outputs, words, per_word)` by the inputs at `at`; four words become one sum."""
    return row_sums(weight, tl.load(at, mask=inside[:, None], other=0.0).to(tl.float32), scale, outputs, words, bits)


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def row_sums(
    weight: tl.tensor,
    inputs: tl.tensor,
    scale: tl.tensor,
    outputs: tl.constexpr,
    words: tl.constexpr,
    bits: tl.constexpr,
) -> tl.tensor:
    """Multiply a tile of shape `(outputs, words, per_word)` by inputs `(words, per_word)`; four words are one sum."""
    if bits == 8:
        inputs *= inverse_units(bits, 32 // bits)
    found = tl.sum(weight * inputs[None, :, :], 2) * scale
    return tl.sum(tl.reshape(found, [outputs, words // 4, 4]), 2)


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def block_scales(
    scales: tl.tensor,
    nested_code: tl.tensor,
    nested_scales: tl.tensor,
    offset: tl.tensor,
    held: tl.tensor,
    first: tl.tensor,
    row_words: tl.tensor,
    outputs: tl.constexpr,
    words: tl.constexpr,
    block_size: tl.constexpr,
    chunk: tl.constexpr,
    nested: tl.constexpr,
    nested_block_size: tl.constexpr,
    exponents: tl.constexpr = False,
) -> tl.tensor:
    """Load the scale of each word of a tile of shape `(outputs, words)`; `chunk` consecutive words share a scale.

    `exponents` are powers of two, biased by 127, of which the lowest is 0.
    """
    chunks: tl.constexpr = words // chunk
    place = first + chunk * tl.arange(0, chunks)
    index = (held + place[None, :]) // (block_size // 8)
    inside = (place < row_words)[None, :]
    if nested:
        coarse = tl.load(nested_scales + index // nested_block_size, mask=inside, other=0.0)
        fine = tl.load(nested_code + tl.load(scales + index, mask=inside, other=0).to(tl.int32))
        # The offset is loaded for each scale, as `decoded` takes only values made of loads.
        scale = fine * coarse + tl.load(offset + 0 * index)
    elif exponents:
        scale = (tl.load(scales + index, mask=inside, other=0).to(tl.int32) << 23).to(tl.float32, bitcast=True)
    else:
        scale = tl.load(scales + index, mask=inside, other=0.0)
    return tl.reshape(tl.broadcast_to(scale[:, :, None], [outputs, chunks, chunk]), [outputs, words])


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def _finish(
    end: tl.tensor,
    found: tl.tensor,
    scales: tl.tensor,
    bias: tl.tensor,
    column: tl.tensor,
    seen: tl.tensor,
    bits: tl.constexpr,
    biased: tl.constexpr,
) -> None:
    """Multiply by the scales of int8, add the bias, and store one row of a program."""
    if bits == 8:
        found = found * (tl.load(scales + column, mask=seen, other=0.0) * (1 / 127))
    if biased:
        found += tl.load(bias + column, mask=seen, other=0.0).to(tl.float32)
    tl.store(end, found.to(end.dtype.element_ty), mask=seen)

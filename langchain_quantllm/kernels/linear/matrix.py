"""The kernels for tens to hundreds of rows, in Triton: each weight is decoded once for up to 256 rows.

Decoded weights are the left operand of a product on tensor cores, which stays in registers. The activations, in the
order of `pairs.interleave`, go straight from memory to shared memory. A launch multiplies the same activations by up to
three weights, whose programs follow each other in the grid.
"""
# No `from __future__ import annotations` here: Triton's interpreter needs `tl.constexpr` as an object.

import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]  # not on every machine, and untyped
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]

from langchain_quantllm.kernels.launch import dot, let_next_begin, prefetch, wait_for_inputs
from langchain_quantllm.kernels.linear.bitsandbytes import block_scales
from langchain_quantllm.kernels.linear.decoding import packed_words, prefetch_columns, scaled
from langchain_quantllm.kernels.linear.gptq import group_values
from langchain_quantllm.kernels.linear.grouping import pick, program_place, sum_of
from langchain_quantllm.kernels.linear.pairs import looked_up_pairs, pair_of_codes, raw_pairs


@triton.jit(do_not_specialize=["splits", "rows"])  # type: ignore[misc,untyped-decorator,unused-ignore]
def row_matrix_kernel(
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
    padded_words: tl.tensor,
    plane: tl.tensor,
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
    """Multiply `outputs` rows of a weight, stored row by row, by up to `padded_rows` rows.

    Grid `(programs of the weights, splits, tiles of rows)`. `x` is that of `interleave`: `padded_words` a row, and
    `plane` numbers from one pair to the next.
    """
    which, local, before = program_place(widths, weights, outputs)
    stored = pick(which, all_words, weights)
    scales = pick(which, all_scales, weights)
    nested_code = pick(which, all_nested_code, weights)
    nested_scales = pick(which, all_nested_scales, weights)
    offset = pick(which, all_offset, weights)
    width = pick(which, widths, weights)
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
        at = x + row[:, None] * (2 * padded_words) + (2 * first + tl.arange(0, 2 * words))[None, :]
        if bits == 4:
            scale = block_scales(
                scales, nested_code, nested_scales, offset, held, first, row_words,
                outputs, words, block_size, chunk, nested, nested_block_size,
            )  # fmt: skip
            pairs = looked_up_pairs(loaded, scale, code, dtype, ptx)
            for p in tl.static_range(4):
                weight = tl.reshape(pairs[p], [outputs, 2 * words])
                found = dot(weight, tl.trans(tl.load(at + p * plane)), found)
        else:
            zero = tl.full([1, 1], 128.0, tl.float32)
            codes = raw_pairs(loaded, 8, True, dtype, ptx)
            for p in tl.static_range(2):
                weight = tl.reshape(pair_of_codes(codes, zero, p, 8, dtype), [outputs, 2 * words])
                found = dot(weight, tl.trans(tl.load(at + p * plane)), found)

    let_next_begin(early)
    if bits == 8:
        found = found * (tl.load(scales + column, mask=column < width, other=0.0) * (1 / 127))[:, None]
    _store(out, found, biases, which, before, width, column, row, widths, rows, weights, biased)


@triton.jit(do_not_specialize=["splits", "rows"])  # type: ignore[misc,untyped-decorator,unused-ignore]
def packed_matrix_kernel(
    x: tl.tensor,
    out: tl.tensor,
    all_words: tl.tuple,
    all_scales: tl.tuple,
    all_zeros: tl.tuple,
    biases: tl.tuple,
    widths: tl.tuple,
    row_words: tl.tensor,
    padded_words: tl.tensor,
    plane: tl.tensor,
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
    ptx: tl.constexpr,
    dtype: tl.constexpr,
    early: tl.constexpr,
) -> None:
    """Multiply `outputs` columns of a weight, packed along its inputs, by up to `padded_rows` rows.

    See `row_matrix_kernel`.
    """
    which, local, before = program_place(widths, weights, outputs)
    stored = pick(which, all_words, weights)
    scales = pick(which, all_scales, weights)
    zeros = pick(which, all_zeros, weights)
    width = pick(which, widths, weights)
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
        loaded = packed_words(stored, place, column, width, (place < row_words)[:, None] & seen[None, :], bits)
        scale, zero = group_values(
            scales, zeros, column, width, first, row_words,
            outputs, words, bits, per_word, group_size, chunk, zero_point,
        )  # fmt: skip
        at = x + row[:, None] * (2 * padded_words) + (2 * first + tl.arange(0, 2 * words))[None, :]
        codes = raw_pairs(loaded, bits, False, dtype, ptx)
        for p in tl.static_range(per_word // 2):
            weight = scaled(pair_of_codes(codes, zero, p, bits, dtype), scale[:, :, None], dtype)
            weight = tl.reshape(tl.permute(weight, (1, 0, 2)), [outputs, 2 * words])
            found = dot(weight, tl.trans(tl.load(at + p * plane)), found)

    let_next_begin(early)
    _store(out, found, biases, which, before, width, column, row, widths, rows, weights, biased)


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def _store(
    out: tl.tensor,
    found: tl.tensor,
    biases: tl.tuple,
    which: tl.tensor,
    before: tl.tensor,
    width: tl.tensor,
    column: tl.tensor,
    row: tl.tensor,
    widths: tl.tuple,
    rows: tl.tensor,
    weights: tl.constexpr,
    biased: tl.constexpr,
) -> None:
    """Add the bias, and store the sums of shape `(outputs, rows)` of a program."""
    seen = column < width
    if biased:
        bias = pick(which, biases, weights)
        found += tl.load(bias + column, mask=seen, other=0.0).to(tl.float32)[:, None]
    end = out + tl.program_id(1).to(tl.int64) * (rows * sum_of(widths, weights)) + rows * before
    tl.store(
        end + row[None, :] * width + column[:, None],
        found.to(out.dtype.element_ty),
        mask=(row < rows)[None, :] & seen[:, None],
    )

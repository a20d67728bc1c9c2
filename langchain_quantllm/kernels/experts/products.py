"""The kernels that multiply routed rows by the weights of their experts, in Triton, for all formats.

One kernel for few rows, one for tiles of rows of the same expert. Both compute the first product of experts with the
gating after it, or the second one. A third adds up the outputs of a token's experts. `dispatch` launches them, and
`reference` documents their results.
"""
# No `from __future__ import annotations` here: Triton's interpreter needs `tl.constexpr` as an object.

import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]  # not on every machine, and untyped
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]

from langchain_quantllm.kernels.activation import activated
from langchain_quantllm.kernels.experts.parts import (
    add_tile_products,
    add_vector_products,
    of_expert,
    scaled_and_biased,
)
from langchain_quantllm.kernels.launch import INTERPRETED, let_next_begin, wait_for_inputs
from langchain_quantllm.kernels.linear.decoding import lane_value


@triton.jit(do_not_specialize=["rows_of_x"])  # type: ignore[misc,untyped-decorator,unused-ignore]
def vector_kernel(
    x: tl.tensor,
    out: tl.tensor,
    index: tl.tensor,
    stack: tl.tuple,
    strides: tl.tuple,
    bias: tl.tensor,
    up_stack: tl.tuple,
    up_strides: tl.tuple,
    up_bias: tl.tensor,
    code: tl.tensor,
    experts: tl.tensor,
    rows_of_x: tl.tensor,
    row_stride: tl.tensor,
    units: tl.tensor,
    width: tl.tensor,
    results: tl.tensor,
    step: tl.tensor,
    up_start: tl.tensor,
    out_step: tl.tensor,
    in_step: tl.tensor,
    magic: tl.tensor,
    unit: tl.constexpr,
    layout: tl.constexpr,
    bits: tl.constexpr,
    per_word: tl.constexpr,
    block_size: tl.constexpr,
    chunk: tl.constexpr,
    scaling: tl.constexpr,
    nested_block_size: tl.constexpr,
    zero_point: tl.constexpr,
    lower_first: tl.constexpr,
    biased: tl.constexpr,
    is_gated: tl.constexpr,
    activation: tl.constexpr,
    alpha: tl.constexpr,
    limit: tl.constexpr,
    limits_activated: tl.constexpr,
    shift: tl.constexpr,
    outputs: tl.constexpr,
    words: tl.constexpr,
    decode: tl.constexpr,
    ptx: tl.constexpr,
    stages: tl.constexpr,
    early: tl.constexpr,
) -> None:
    """Multiply one row by `outputs` rows of its expert's weight, or of two; grid `(tiles of results, rows)`.

    Row `i` reads row `i // rows_of_x` of `x`. Result `c` is made of output `c * step`, and of output `c * step +
    up_start` of the second stack. Nothing is written for rows without an expert.
    """
    wait_for_inputs(early)
    row = tl.program_id(1)
    expert = tl.load(index + row).to(tl.int64)
    if (expert < 0) | (expert >= experts):
        return
    row_words = units * unit
    result = tl.program_id(0) * outputs + tl.arange(0, outputs)
    seen = result < results
    column = result * step
    up_column = column + up_start
    weight = of_expert(stack, strides, expert)
    up_weight = of_expert(up_stack, up_strides, expert)
    source = x + (row // rows_of_x).to(tl.int64) * row_stride
    value = 0.0
    if bits == 4 and layout == "rows" and decode == "shuffle" and not INTERPRETED:
        value = lane_value(code)
    if layout == "packed":
        found = tl.zeros([words, outputs], tl.float32)
    elif layout == "rows":
        found = tl.zeros([outputs, words // 4], tl.float32)
    else:
        found = tl.zeros([outputs, words], tl.float32)
    up = found

    for first in tl.range(0, row_words, words, num_stages=stages):
        found = add_vector_products(
            found, weight, code, value, magic, source, column, first, row_words, width, out_step, in_step,
            layout, bits, per_word, block_size, chunk, scaling, nested_block_size, zero_point, lower_first,
            outputs, words, decode, ptx,
        )  # fmt: skip
        if is_gated:
            up = add_vector_products(
                up, up_weight, code, value, magic, source, up_column, first, row_words, width, out_step, in_step,
                layout, bits, per_word, block_size, chunk, scaling, nested_block_size, zero_point, lower_first,
                outputs, words, decode, ptx,
            )  # fmt: skip

    let_next_begin(early)
    over: tl.constexpr = 0 if layout == "packed" else 1
    total = scaled_and_biased(
        tl.sum(found, over), weight[1], bias + expert * width, column, width, layout, bits, biased
    )
    up_total = total
    if is_gated:
        up_total = scaled_and_biased(
            tl.sum(up, over), up_weight[1], up_bias + expert * width, up_column, width, layout, bits, biased
        )
    total = _gated(total, up_total, is_gated, activation, alpha, limit, limits_activated, shift)
    tl.store(out + row.to(tl.int64) * results + result, total.to(out.dtype.element_ty), mask=seen)


@triton.jit(do_not_specialize=["rows_of_x", "rows"])  # type: ignore[misc,untyped-decorator,unused-ignore]
def tile_kernel(
    x: tl.tensor,
    out: tl.tensor,
    sorted_rows: tl.tensor,
    experts_of_tiles: tl.tensor,
    stack: tl.tuple,
    strides: tl.tuple,
    bias: tl.tensor,
    up_stack: tl.tuple,
    up_strides: tl.tuple,
    up_bias: tl.tensor,
    code: tl.tensor,
    rows: tl.tensor,
    rows_of_x: tl.tensor,
    row_stride: tl.tensor,
    units: tl.tensor,
    width: tl.tensor,
    results: tl.tensor,
    step: tl.tensor,
    up_start: tl.tensor,
    out_step: tl.tensor,
    in_step: tl.tensor,
    unit: tl.constexpr,
    layout: tl.constexpr,
    bits: tl.constexpr,
    per_word: tl.constexpr,
    block_size: tl.constexpr,
    chunk: tl.constexpr,
    scaling: tl.constexpr,
    nested_block_size: tl.constexpr,
    zero_point: tl.constexpr,
    lower_first: tl.constexpr,
    biased: tl.constexpr,
    is_gated: tl.constexpr,
    activation: tl.constexpr,
    alpha: tl.constexpr,
    limit: tl.constexpr,
    limits_activated: tl.constexpr,
    shift: tl.constexpr,
    outputs: tl.constexpr,
    words: tl.constexpr,
    tile_rows: tl.constexpr,
    ptx: tl.constexpr,
    dtype: tl.constexpr,
    early: tl.constexpr,
) -> None:
    """Multiply a tile of rows by `outputs` rows of their expert's weight, or of two, on tensor cores.

    Grid `(tiles of rows, tiles of results)`. For the rest, see `vector_kernel` and `routing.Tiles`.
    """
    wait_for_inputs(early)
    tile = tl.program_id(0)
    expert = tl.load(experts_of_tiles + tile).to(tl.int64)
    if expert < 0:
        return
    row_words = units * unit
    result = tl.program_id(1) * outputs + tl.arange(0, outputs)
    seen = result < results
    column = result * step
    up_column = column + up_start
    weight = of_expert(stack, strides, expert)
    up_weight = of_expert(up_stack, up_strides, expert)
    row = tl.load(sorted_rows + tile * tile_rows + tl.arange(0, tile_rows))
    is_row = row < rows
    source = x + (row // rows_of_x).to(tl.int64)[:, None] * row_stride
    found = tl.zeros([outputs, tile_rows], tl.float32)
    up = found

    for first in range(0, row_words, words):
        element = first * per_word + tl.arange(0, words * per_word)
        inputs = tl.load(
            source + element[None, :], mask=is_row[:, None] & (element < row_words * per_word)[None, :], other=0.0
        )
        found = add_tile_products(
            found, weight, code, inputs, column, first, row_words, width, out_step, in_step,
            layout, bits, per_word, block_size, chunk, scaling, nested_block_size, zero_point, lower_first,
            outputs, words, tile_rows, dtype, ptx,
        )  # fmt: skip
        if is_gated:
            up = add_tile_products(
                up, up_weight, code, inputs, up_column, first, row_words, width, out_step, in_step,
                layout, bits, per_word, block_size, chunk, scaling, nested_block_size, zero_point, lower_first,
                outputs, words, tile_rows, dtype, ptx,
            )  # fmt: skip

    let_next_begin(early)
    found = scaled_and_biased(found, weight[1], bias + expert * width, column, width, layout, bits, biased)
    if is_gated:
        up = scaled_and_biased(up, up_weight[1], up_bias + expert * width, up_column, width, layout, bits, biased)
    found = _gated(found, up, is_gated, activation, alpha, limit, limits_activated, shift)
    tl.store(
        out + row.to(tl.int64)[None, :] * results + result[:, None],
        found.to(out.dtype.element_ty),
        mask=is_row[None, :] & seen[:, None],
    )


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def _gated(
    value: tl.tensor,
    up: tl.tensor,
    is_gated: tl.constexpr,
    activation: tl.constexpr,
    alpha: tl.constexpr,
    limit: tl.constexpr,
    limits_activated: tl.constexpr,
    shift: tl.constexpr,
) -> tl.tensor:
    """Compute the function of `Gating`; `activation` is -1 for none, and `limit` 0 for none."""
    if activation >= 0:
        if limit > 0 and not limits_activated:
            value = tl.minimum(value, limit)
        value = activated(value, activation, alpha)
        if limit > 0 and limits_activated:
            value = tl.minimum(value, limit)
    if is_gated:
        if limit > 0:
            up = tl.minimum(tl.maximum(up, -limit), limit)
        value = value * (up + shift)
    return value


@triton.jit(do_not_specialize=["experts"])  # type: ignore[misc,untyped-decorator,unused-ignore]
def sum_kernel(
    parts: tl.tensor,
    index: tl.tensor,
    factors: tl.tensor,
    out: tl.tensor,
    experts: tl.tensor,
    width: tl.tensor,
    chosen: tl.constexpr,
    tile: tl.constexpr,
    early: tl.constexpr,
) -> None:
    """Add up `chosen` rows for each token, times their factors, in order and in float32; grid `(tokens, tiles)`."""
    wait_for_inputs(early)
    let_next_begin(early)
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * tile + tl.arange(0, tile)
    total = tl.zeros([tile], tl.float32)
    for j in tl.static_range(chosen):
        row = token * chosen + j
        expert = tl.load(index + row)
        end = tl.where((expert >= 0) & (expert < experts), width, 0)
        part = tl.load(parts + row * width + column, mask=column < end, other=0.0).to(tl.float32)
        total += part * tl.load(factors + row).to(tl.float32)
    tl.store(out + token * width + column, total.to(out.dtype.element_ty), mask=column < width)

"""Parts of the kernels of experts that depend on the format: products with one tile of an expert's weight.

Three layouts. "rows": words in which an output has its inputs beside each other, as of bitsandbytes and mxfp4;
"packed": words along the inputs with the outputs beside each other, as of GPTQ; "values": numbers of any strides. The
decoding is that of `kernels.linear`.
"""
# No `from __future__ import annotations` here: Triton's interpreter needs `tl.constexpr` as an object.

import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]  # not on every machine, and untyped
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]

from langchain_quantllm.kernels.launch import dot
from langchain_quantllm.kernels.linear.bitsandbytes import (
    add_four_bit_products,
    add_int8_products,
    block_scales,
    row_sums,
    row_values,
)
from langchain_quantllm.kernels.linear.decoding import (
    all_scaled_codes,
    centered,
    columns_of,
    joined,
    packed_words,
    strided,
)
from langchain_quantllm.kernels.linear.gptq import (
    add_packed_products,
    group_values,
    group_values_of_each,
    packed_sums,
)
from langchain_quantllm.kernels.linear.pairs import SIGNS


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def of_expert(stack: tl.tuple, strides: tl.tuple, expert: tl.tensor) -> tl.tuple:
    """Move the pointers of a stack to the tensors of one expert."""
    return (
        stack[0] + expert * strides[0],
        stack[1] + expert * strides[1],
        stack[2] + expert * strides[2],
        stack[3] + expert * strides[3],
        stack[4] + expert * strides[4],
    )


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def add_vector_products(
    found: tl.tensor,
    weight: tl.tuple,
    code: tl.tensor,
    value: tl.tensor,
    magic: tl.tensor,
    x: tl.tensor,
    column: tl.tensor,
    first: tl.tensor,
    row_words: tl.tensor,
    width: tl.tensor,
    out_step: tl.tensor,
    in_step: tl.tensor,
    layout: tl.constexpr,
    bits: tl.constexpr,
    per_word: tl.constexpr,
    block_size: tl.constexpr,
    chunk: tl.constexpr,
    scaling: tl.constexpr,
    nested_block_size: tl.constexpr,
    zero_point: tl.constexpr,
    lower_first: tl.constexpr,
    outputs: tl.constexpr,
    words: tl.constexpr,
    decode: tl.constexpr,
    ptx: tl.constexpr,
) -> tl.tensor:
    """Add the products of one row with a tile of `words` words of `outputs` outputs, in float32.

    `found` are sums of shape `(outputs, words / 4)` for "rows", `(words, outputs)` for "packed" and `(outputs, words)`
    for "values". `weight` are pointers of `of_expert`, `code` the 16 values of 4 bits, `value` the one of them that
    this lane holds for the others, `x` a pointer to the row, `column` the indices of the outputs, of which those from
    `width` on do not count, `first` the index of the first of the `row_words` words of an output, `out_step` and
    `in_step` the strides of "values". `block_size` inputs share a scale; of "packed", it is 0 if groups are in any
    order. `chunk` words share a scale. `scaling` says how scales of "rows" are stored: "plain", "nested" or as
    "exponents". `lower_first`: the first value of a byte is in its lower half.
    """
    place = first + tl.arange(0, words)
    inside = place < row_words
    at = x + place[:, None] * per_word + tl.arange(0, per_word)[None, :]
    if layout == "values":
        held = tl.minimum(column, width - 1)[:, None] * out_step
        values = tl.load(weight[0] + held + place[None, :] * in_step, mask=inside[None, :], other=0.0)
        inputs = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        found += values.to(tl.float32) * inputs[None, :]
    elif layout == "rows":
        held = tl.minimum(column, width - 1)[:, None] * row_words
        loaded = tl.load(weight[0] + held + place[None, :], mask=inside[None, :], other=0)
        if bits == 4:
            scale = block_scales(
                weight[1], weight[2], weight[3], weight[4], held, first, row_words,
                outputs, words, block_size, chunk, scaling == "nested", nested_block_size, scaling == "exponents",
            )  # fmt: skip
        else:
            loaded = loaded ^ SIGNS
            scale = 1.0
        values = row_values(loaded, code, value, magic, outputs, words, bits, decode, ptx, lower_first)
        inputs = tl.load(at, mask=inside[:, None], other=0.0).to(tl.float32)
        found += row_sums(values, inputs, scale, outputs, words, bits)
    else:
        loaded = packed_words(weight[0], place, column, width, inside[:, None] & (column < width)[None, :], bits)
        if block_size > 0:
            scale, zero = group_values(
                weight[1], weight[2], column, width, first, row_words,
                outputs, words, bits, per_word, block_size, chunk, zero_point,
            )  # fmt: skip
            values = all_scaled_codes(loaded, magic, bits, 0 if zero_point < 0 else zero_point)
            inputs = tl.load(at, mask=inside[:, None], other=0.0).to(tl.float32)
            found += packed_sums(joined(values, words, outputs, per_word), inputs, scale, zero, bits, zero_point)
        else:
            columns = columns_of(at, inside, words, per_word)
            for j in tl.static_range(per_word):
                scale, zero = group_values_of_each(
                    weight[1], weight[2], weight[3], column, width, place * per_word + j, inside, bits, zero_point
                )
                found += centered(loaded, zero, bits * j, bits, tl.float32) * scale * columns[j][:, None]
    return found


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def add_tile_products(
    found: tl.tensor,
    weight: tl.tuple,
    code: tl.tensor,
    tile: tl.tensor,
    column: tl.tensor,
    first: tl.tensor,
    row_words: tl.tensor,
    width: tl.tensor,
    out_step: tl.tensor,
    in_step: tl.tensor,
    layout: tl.constexpr,
    bits: tl.constexpr,
    per_word: tl.constexpr,
    block_size: tl.constexpr,
    chunk: tl.constexpr,
    scaling: tl.constexpr,
    nested_block_size: tl.constexpr,
    zero_point: tl.constexpr,
    lower_first: tl.constexpr,
    outputs: tl.constexpr,
    words: tl.constexpr,
    tile_rows: tl.constexpr,
    dtype: tl.constexpr,
    ptx: tl.constexpr,
) -> tl.tensor:
    """Add the products of rows with a tile of `words` words of `outputs` outputs, on tensor cores.

    `found` are sums of shape `(outputs, tile_rows)`, float32, `tile` the inputs, of shape `(tile_rows, words *
    per_word)`, in `dtype`. For the others, see `add_vector_products`.
    """
    place = first + tl.arange(0, words)
    inside = place < row_words
    if layout == "values":
        held = tl.minimum(column, width - 1)[:, None] * out_step
        values = tl.load(weight[0] + held + place[None, :] * in_step, mask=inside[None, :], other=0.0)
        found = dot(values.to(dtype), tl.trans(tile), found)
    elif layout == "rows":
        held = tl.minimum(column, width - 1)[:, None] * row_words
        loaded = tl.load(weight[0] + held + place[None, :], mask=inside[None, :], other=0)
        inputs = strided(tile, tile_rows, words, per_word)
        if bits == 4:
            scale = block_scales(
                weight[1], weight[2], weight[3], weight[4], held, first, row_words,
                outputs, words, block_size, chunk, scaling == "nested", nested_block_size, scaling == "exponents",
            )  # fmt: skip
            found = add_four_bit_products(found, loaded, scale, inputs, code, dtype, ptx, lower_first)
        else:
            found = add_int8_products(found, loaded, inputs, dtype)
    else:
        loaded = packed_words(weight[0], place, column, width, inside[:, None] & (column < width)[None, :], bits)
        found = add_packed_products(
            found, loaded, tile, weight[1], weight[2], weight[3], column, width, first, row_words,
            outputs, words, tile_rows, bits, per_word, block_size, chunk, zero_point, dtype,
        )  # fmt: skip
    return found


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def scaled_and_biased(
    found: tl.tensor,
    scales: tl.tensor,
    bias: tl.tensor,
    column: tl.tensor,
    width: tl.tensor,
    layout: tl.constexpr,
    bits: tl.constexpr,
    biased: tl.constexpr,
) -> tl.tensor:
    """Multiply sums of shape `(outputs, ...)` by the scales of int8, and add the bias."""
    seen = column < width
    if layout == "rows" and bits == 8:
        scale = tl.load(scales + column, mask=seen, other=0.0) * (1 / 127)
        found = found * (scale if len(found.shape) == 1 else scale[:, None])
    if biased:
        added = tl.load(bias + column, mask=seen, other=0.0).to(tl.float32)
        found += added if len(found.shape) == 1 else added[:, None]
    return found

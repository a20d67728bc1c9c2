"""Linear layers with many rows: the quantized weight is dequantized once, and torch multiplies."""
# No `from __future__ import annotations` here: Triton's interpreter needs `tl.constexpr` as an object.

from math import gcd
from typing import Any

import torch
import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]  # not on every machine, and untyped
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]

from langchain_quantllm.kernels.launch import COMPILER_OPTIONS
from langchain_quantllm.kernels.linear.bitsandbytes import block_scales
from langchain_quantllm.kernels.linear.decoding import centered, joined, lookup_in_memory, packed_words, zero_points
from langchain_quantllm.kernels.linear.pairs import SIGNS
from langchain_quantllm.kernels.linear.weights import FloatWeight, FourBitWeight, GPTQWeight, Int8Weight

_WORDS, _OUTPUTS = 8, 128
"""Words and outputs of a weight packed along its inputs that one program unpacks."""

_ROW_WORDS, _ROWS = 64, 16
"""Words and outputs of a weight stored row by row that one program unpacks."""


def dense_linear(
    x: torch.Tensor, weight: FloatWeight | FourBitWeight | GPTQWeight | Int8Weight, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Multiply activations by a quantized weight, dequantized in their dtype; see `reference.quantized_linear`."""
    bias = None if bias is None else bias.to(x.dtype)
    return torch.nn.functional.linear(x, dense(weight, x.dtype), bias)


def dense(weight: FloatWeight | FourBitWeight | GPTQWeight | Int8Weight, dtype: torch.dtype) -> torch.Tensor:
    """Dequantize a weight.

    Args:
        weight: The weight.
        dtype: float16, bfloat16 or float32.

    Returns:
        The weight of shape `(out_features, in_features)`, with the strides that are fastest to write.
    """
    if isinstance(weight, FloatWeight):
        return weight.words
    if not isinstance(weight, GPTQWeight):
        return _unpacked_rows(weight, dtype)
    per_word, width = weight.per_word, weight.out_features
    words = weight.in_features // per_word
    out = torch.empty(weight.in_features, width, dtype=dtype, device=weight.words.device)
    _unpack_kernel[(-(-words // _WORDS), -(-width // _OUTPUTS))](
        weight.words, weight.scales, weight.zeros, weight.groups, out, words, width,
        bits=weight.bits, zero_point=weight.zero_point, rows=_WORDS, outputs=_OUTPUTS, per_word=per_word, num_warps=4,
        **COMPILER_OPTIONS,
    )  # fmt: skip
    return out.t()


def _unpacked_rows(weight: FourBitWeight | Int8Weight, dtype: torch.dtype) -> torch.Tensor:
    is_four_bit = isinstance(weight, FourBitWeight)
    bits = 4 if is_four_bit else 8
    words, width = weight.in_features * bits // 32, weight.out_features
    out = torch.empty(width, weight.in_features, dtype=dtype, device=weight.words.device)
    four: Any = weight
    scales = [weight.scales] * 5
    if is_four_bit:
        scales = [four.scales, four.nested_code, four.nested_scales, four.offset, four.code]
    constants = {
        "block_size": four.block_size if is_four_bit else 64,
        "chunk": min(_ROW_WORDS, gcd(weight.in_features, four.block_size) // 8) if is_four_bit else 1,
        "nested": is_four_bit and four.nested,
        "nested_block_size": four.nested_block_size if is_four_bit else 1,
    }
    _unpack_rows_kernel[(-(-words // _ROW_WORDS), -(-width // _ROWS))](
        weight.words, *scales, out, words, width,
        bits=bits, **constants, outputs=_ROWS, words=_ROW_WORDS, num_warps=4, **COMPILER_OPTIONS,
    )  # fmt: skip
    return out


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def _unpack_rows_kernel(
    stored: tl.tensor,
    scales: tl.tensor,
    nested_code: tl.tensor,
    nested_scales: tl.tensor,
    offset: tl.tensor,
    code: tl.tensor,
    out: tl.tensor,
    row_words: tl.tensor,
    width: tl.tensor,
    bits: tl.constexpr,
    block_size: tl.constexpr,
    chunk: tl.constexpr,
    nested: tl.constexpr,
    nested_block_size: tl.constexpr,
    outputs: tl.constexpr,
    words: tl.constexpr,
) -> None:
    """Write `words` words of `outputs` outputs; grid `(tiles of words, tiles of outputs)`."""
    per_word: tl.constexpr = 32 // bits
    first = tl.program_id(0) * words
    column = tl.program_id(1) * outputs + tl.arange(0, outputs)
    place = first + tl.arange(0, words)
    seen = column < width
    held = tl.minimum(column, width - 1)[:, None] * row_words
    loaded = tl.load(stored + held + place[None, :], mask=(place < row_words)[None, :], other=0)
    if bits == 4:
        scale = block_scales(
            scales, nested_code, nested_scales, offset, held, first, row_words,
            outputs, words, block_size, chunk, nested, nested_block_size,
        )  # fmt: skip
        values = lookup_in_memory(loaded, code, tl.float32)
    else:
        scale = (tl.load(scales + column, mask=seen, other=0.0) * (1 / 127))[:, None]
        zero = tl.full([1, 1], 128.0, tl.float32)
        codes = loaded ^ SIGNS
        values = (
            centered(codes, zero, 0, 8, tl.float32),
            centered(codes, zero, 8, 8, tl.float32),
            centered(codes, zero, 16, 8, tl.float32),
            centered(codes, zero, 24, 8, tl.float32),
        )
    weight = joined(values, outputs, words, per_word) * scale[:, :, None]
    element = first * per_word + tl.arange(0, words * per_word)
    at = column.to(tl.int64)[:, None] * (row_words * per_word) + element[None, :]
    inside = seen[:, None] & (element < row_words * per_word)[None, :]
    tl.store(out + at, tl.reshape(weight, [outputs, words * per_word]).to(out.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def _unpack_kernel(
    stored: tl.tensor,
    scales: tl.tensor,
    zeros: tl.tensor,
    groups: tl.tensor,
    out: tl.tensor,
    words: tl.tensor,
    width: tl.tensor,
    bits: tl.constexpr,
    zero_point: tl.constexpr,
    rows: tl.constexpr,
    outputs: tl.constexpr,
    per_word: tl.constexpr,
) -> None:
    """Write the inputs of `rows` words for `outputs` outputs; grid `(tiles of words, tiles of outputs)`."""
    place = tl.program_id(0) * rows + tl.arange(0, rows)
    column = tl.program_id(1) * outputs + tl.arange(0, outputs)
    seen = column < width
    inside = (place < words)[:, None] & seen[None, :]
    mask: tl.constexpr = (1 << bits) - 1
    loaded = packed_words(stored, place, column, width, inside, bits)
    for j in tl.static_range(per_word):
        row = place * per_word + j
        group = tl.load(groups + row, mask=place < words, other=0)
        scale = tl.load(scales + group[:, None] * width + column[None, :], mask=inside, other=0.0).to(tl.float32)
        if zero_point < 0:
            zero = zero_points(zeros, group[:, None], column[None, :], width, inside, bits)
        else:
            zero = zero_point
        code = (loaded >> (bits * j)) & mask
        value = (code - zero).to(tl.float32) * scale
        at = row.to(tl.int64)[:, None] * width + column[None, :]
        tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)

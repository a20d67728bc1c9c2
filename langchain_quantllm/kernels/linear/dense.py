"""Linear layers with many rows: the quantized weight is dequantized once, and torch multiplies.

Has the kernel that unpacks a weight of GPTQ. bitsandbytes does the same for its 4-bit weights.
"""
# No `from __future__ import annotations` here: Triton's interpreter needs `tl.constexpr` as an object.

import torch
import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]  # not on every machine, and untyped
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]

from langchain_quantllm.kernels.launch import COMPILER_OPTIONS
from langchain_quantllm.kernels.linear.decoding import packed_words, zero_points
from langchain_quantllm.kernels.linear.weights import GPTQWeight, Int8Weight

_WORDS, _OUTPUTS = 8, 128
"""Words and outputs that one program unpacks."""


def dense_linear(x: torch.Tensor, weight: GPTQWeight | Int8Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Multiply activations by a quantized weight, dequantized in their dtype; see `reference.quantized_linear`."""
    bias = None if bias is None else bias.to(x.dtype)
    return torch.nn.functional.linear(x, dense(weight, x.dtype), bias)


def dense(weight: GPTQWeight | Int8Weight, dtype: torch.dtype) -> torch.Tensor:
    """Dequantize a weight.

    Args:
        weight: The weight.
        dtype: float16, bfloat16 or float32.

    Returns:
        The weight of shape `(out_features, in_features)`, with the strides that are fastest to write.
    """
    if isinstance(weight, Int8Weight):
        codes = weight.words.view(torch.int8).view(weight.out_features, weight.in_features)
        return codes * (weight.scales * (1 / 127)).to(dtype)[:, None]
    per_word, width = weight.per_word, weight.out_features
    words = weight.in_features // per_word
    out = torch.empty(weight.in_features, width, dtype=dtype, device=weight.words.device)
    _unpack_kernel[(-(-words // _WORDS), -(-width // _OUTPUTS))](
        weight.words, weight.scales, weight.zeros, weight.groups, out, words, width,
        bits=weight.bits, zero_point=weight.zero_point, rows=_WORDS, outputs=_OUTPUTS, per_word=per_word, num_warps=4,
        **COMPILER_OPTIONS,
    )  # fmt: skip
    return out.t()


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

"""Keys and values in 8 bits, in plain torch: what the Triton kernels write, and how it is read.

Each key and each value, of one token and one head, is divided by a scale of its own, so that its largest number becomes
the largest of the format, and rounded to the nearest one. int8 has equal steps; fp8 (E4M3, of 3 bits of mantissa) has
steps in proportion to the number. fp8 is kept as bytes: PyTorch has few operations for it.

In some models a few numbers of every key are many times as large as the others, which would be left with few steps. So
each of a key's numbers is divided by a factor before, the same for all tokens, and the query is multiplied by it.

Source:
    E4M3: FP8 Formats for Deep Learning, https://arxiv.org/abs/2209.05433, section 3.1. Factors: as SmoothQuant moves
    outliers of inputs into weights, https://arxiv.org/abs/2211.10438, equation 3.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

KV_DTYPES = {"int8": torch.int8, "fp8": torch.uint8}
"""The dtype of the codes of each format."""

LARGEST = {torch.int8: 127.0, torch.uint8: 448.0}
"""The largest number of each format, by the dtype of its codes."""

SCALE_DTYPE = torch.bfloat16
"""Its range is that of float32. Numbers are divided by the rounded scale, so its precision costs none of theirs."""


_SMALLEST_FACTOR = 2.0**-20


class KVScales(NamedTuple):
    """The scales of one layer's pool in 8 bits.

    Args:
        pairs: That of each key followed by that of its value, of shape `(blocks, kv_heads, block_tokens, 2)`, bfloat16,
            contiguous. The scale of a key that is not finite is NaN; those of values are finite and above 0.
        factors: Of the numbers of each key, of shape `(kv_heads, key_dim)`, float32, contiguous; powers of two, so that
            dividing by them loses nothing.
    """

    pairs: torch.Tensor
    factors: torch.Tensor


def key_factors(keys: torch.Tensor) -> torch.Tensor:
    """Choose the factors of a layer's keys.

    Rotary positions turn two numbers of a key into each other, which are either neighbours or half a head apart: all
    of them get the factor of the largest.

    Args:
        keys: Keys of some tokens, of shape `(kv_heads, tokens, key_dim)`, floating.

    Returns:
        Factors of shape `(kv_heads, key_dim)`, float32.
    """
    sizes = keys.float().abs().amax(1).nan_to_num(nan=0.0, posinf=0.0)
    dim = sizes.shape[-1]
    if dim % 2 == 0:
        sizes = torch.maximum(sizes, sizes.roll(dim // 2, -1))
        sizes = torch.maximum(sizes, sizes.unflatten(-1, (-1, 2)).flip(-1).flatten(-2))
    least = (sizes.amax(-1, keepdim=True) / 64).clamp(min=_SMALLEST_FACTOR)
    return torch.exp2(torch.maximum(sizes, least).log2().round())


def quantize(numbers: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Round vectors to 8 bits.

    Args:
        numbers: Of shape `(..., dim)`, floating, finite.
        dtype: A key of `LARGEST`.

    Returns:
        The codes in the shape of the numbers, and the scales of shape `(..., 1)`. A vector of zeros has the scale 1.
    """
    wide, largest = numbers.float(), LARGEST[dtype]
    scales = (wide.abs().amax(-1, keepdim=True) / largest).to(SCALE_DTYPE)
    scales = scales.masked_fill(scales == 0, 1)
    scaled = (wide / scales.float()).clamp(-largest, largest)
    if dtype == torch.int8:
        return scaled.round().to(torch.int8), scales
    return scaled.to(torch.float8_e4m3fn).view(torch.uint8), scales


def dequantize(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the numbers that codes stand for, with scales of a shape that fits, rounded to a dtype."""
    numbers = codes if codes.dtype == torch.int8 else codes.view(torch.float8_e4m3fn)
    return (numbers.float() * scales.float()).to(dtype)


def write(
    key: torch.Tensor,
    value: torch.Tensor,
    kv: torch.Tensor,
    scales: KVScales,
    blocks: torch.Tensor,
    places: torch.Tensor,
) -> None:
    """Write keys and values of new tokens into blocks, in 8 bits.

    A key or a value that is not finite is written as zeros, with NaN as the scale of the key; see
    `reference.write_kv`.

    Args:
        key: Keys of shape `(tokens, kv_heads, key_dim)`, floating.
        value: Values of shape `(tokens, kv_heads, value_dim)`, floating.
        kv: The codes of one layer; see `reference.write_kv`. Written to.
        scales: The scales of one layer. Written to.
        blocks: The block of each token, of shape `(tokens,)`, int64.
        places: Its place there, of shape `(tokens,)`, int64.
    """
    spoils_value = ~value.isfinite().all(-1, keepdim=True)
    spoils = spoils_value | ~key.isfinite().all(-1, keepdim=True)
    keys, key_scales = quantize(key.masked_fill(spoils, 0).float() / scales.factors, kv.dtype)
    values, value_scales = quantize(value.masked_fill(spoils_value, 0), kv.dtype)
    kv[blocks, places] = torch.cat([keys, values], -1)
    heads = torch.arange(kv.shape[2], device=kv.device)
    both = torch.cat([key_scales.masked_fill(spoils, torch.nan), value_scales], -1)
    scales.pairs[blocks[:, None], heads, places[:, None]] = both


def read(kv: torch.Tensor, scales: KVScales, blocks: torch.Tensor, *, key_dim: int, dtype: torch.dtype) -> torch.Tensor:
    """Read blocks.

    Args:
        kv: The codes of one layer; see `reference.write_kv`.
        scales: The scales of one layer.
        blocks: Numbers of blocks, of shape `(n,)`, int64.
        key_dim: Size of a key.
        dtype: Dtype of the result.

    Returns:
        Each key followed by its value, of shape `(n, block_tokens, kv_heads, key_dim + value_dim)`.
    """
    codes, pairs = kv.index_select(0, blocks), scales.pairs.index_select(0, blocks).transpose(1, 2).float()
    keys = dequantize(codes[..., :key_dim], pairs[..., :1] * scales.factors, dtype)
    return torch.cat([keys, dequantize(codes[..., key_dim:], pairs[..., 1:], dtype)], -1)

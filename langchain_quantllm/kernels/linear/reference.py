"""Quantized linear layers in plain torch: dequantize, then multiply.

The kernels of `dispatch` and `cpu` are tested against these functions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from langchain_quantllm.errors import UnsupportedError
from langchain_quantllm.kernels.linear.weights import (
    FloatWeight,
    FourBitWeight,
    GPTQWeight,
    Int4PackWeight,
    Int8Weight,
    RepackedWeight,
    Weight,
)

__all__ = ["MOST_FOUR_BIT_ROWS", "block_scales", "dequantize", "grouped_linear", "quantized_linear"]

MOST_FOUR_BIT_ROWS = 64
"""Rows above which bitsandbytes' own layer is called, for the tests of such a limit."""


def quantized_linear(
    x: torch.Tensor, weight: Weight, bias: torch.Tensor | None = None, *, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    """Multiply activations by a quantized weight.

    Args:
        x: Activations of shape `(..., in_features)`, floating.
        weight: The weight.
        bias: Added to the product, of shape `(out_features,)`; None for no bias. The weight's own bias is ignored.
        dtype: Dtype of the computation.

    Returns:
        `x @ w.T + bias` of shape `(..., out_features)`, in `dtype`.
    """
    found = x.to(dtype) @ dequantize(weight, dtype).t()
    return found if bias is None else found + bias.to(dtype)


def grouped_linear(
    x: torch.Tensor, weights: Sequence[Weight], *, dtype: torch.dtype = torch.float64
) -> list[torch.Tensor]:
    """Multiply the same activations by several weights, and add the bias of each.

    Args:
        x: Activations of shape `(..., in_features)`, floating.
        weights: Weights with the same inputs.
        dtype: Dtype of the computation.

    Returns:
        The result for each weight, as of `quantized_linear`.
    """
    return [quantized_linear(x, weight, weight.bias, dtype=dtype) for weight in weights]


def dequantize(weight: Weight, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Return the weight of shape `(out_features, in_features)`, computed in `dtype`."""
    if isinstance(weight, FloatWeight):
        return weight.words.to(dtype)
    if isinstance(weight, FourBitWeight):
        return _four_bit(weight, dtype)
    if isinstance(weight, Int8Weight):
        codes = weight.words.view(torch.int8).reshape(weight.out_features, weight.in_features)
        return codes.to(dtype) * (weight.scales.to(dtype) / 127)[:, None]
    if isinstance(weight, Int4PackWeight):
        msg = "its weight is packed for a kernel of PyTorch's, which alone reads it"
        raise UnsupportedError(msg)
    return _repacked(weight, dtype) if isinstance(weight, RepackedWeight) else _gptq(weight, dtype)


def _repacked(weight: RepackedWeight, dtype: torch.dtype) -> torch.Tensor:
    octets = weight.words.reshape(-1, weight.in_features // 2, 32)
    # 32 outputs and two inputs: the lower halves are the first 16 outputs, input by input.
    indices = torch.cat([octets & 15, octets >> 4], dim=-1).reshape(-1, weight.in_features // 2, 32, 2)
    indices = indices.transpose(1, 2).reshape(weight.out_features, weight.in_features)
    scales = weight.scales.to(dtype).t().repeat_interleave(weight.block_size, dim=1)
    return weight.code.to(dtype)[indices.long()] * scales


def block_scales(weight: FourBitWeight, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Return the scale of each block of a weight in 4 bits, of shape `(blocks,)`, computed in `dtype`."""
    if not weight.nested:
        return weight.scales.to(dtype)
    outer = weight.nested_scales.to(dtype).repeat_interleave(weight.nested_block_size)[: len(weight.scales)]
    return weight.nested_code.to(dtype)[weight.scales.int()] * outer + weight.offset.to(dtype)


def _four_bit(weight: FourBitWeight, dtype: torch.dtype) -> torch.Tensor:
    scales = block_scales(weight, dtype)
    octets = weight.words.view(torch.uint8)
    indices = torch.stack([octets >> 4, octets & 15], dim=-1).reshape(-1)
    place = torch.arange(len(indices), device=octets.device) // weight.block_size
    values = weight.code.to(dtype)[indices.long()] * scales[place]
    return values.reshape(weight.out_features, weight.in_features)


def _gptq(weight: GPTQWeight, dtype: torch.dtype) -> torch.Tensor:
    codes = _fields(weight.words.t().contiguous(), weight.bits).t()
    zeros = _fields(weight.zeros, weight.bits)
    groups = weight.groups.long()
    return ((codes.to(dtype) - zeros.to(dtype)[groups]) * weight.scales.to(dtype)[groups]).t()


def _fields(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Unpack the codes along the last axis of words, lowest bits first."""
    if bits == 3:  # 32 codes in 3 words: bit by bit
        single = (words.unsqueeze(-1) >> torch.arange(32, dtype=torch.int32, device=words.device)) & 1
        places = torch.tensor([1, 2, 4], dtype=torch.int32, device=words.device)
        return (single.reshape(*words.shape[:-1], -1, 3) * places).sum(-1, dtype=torch.int32)
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
    return ((words.unsqueeze(-1) >> shifts) & (1 << bits) - 1).flatten(-2)

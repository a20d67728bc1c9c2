"""Products with quantized weights on a CPU, by kernels of bitsandbytes and torch.

4-bit weights that bitsandbytes has repacked for a CPU are multiplied by its own kernel, several of them in one call:
a call costs as much as the product of a small model's layer. On CPUs for which it repacks nothing, and which multiply
16-bit numbers slowly, 4-bit weights become float32 piece by piece, as much as the cache holds. Weights of 8 bits are
multiplied as they lie by 16-bit activations, in one call of torch's, where LLM.int8() takes some fifteen. Owns the
memory that repacked weights of one input share: one behind the other, so that a single call multiplies by all of them.
Knows no Triton.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.nn.functional import linear

from langchain_quantllm.compat.bitsandbytes import dequantized, four_bit_product
from langchain_quantllm.errors import UnsupportedError
from langchain_quantllm.kernels.linear.reference import block_scales
from langchain_quantllm.kernels.linear.weights import FourBitWeight, Int8Weight, RepackedWeight, Weight

__all__ = ["MOST_FOUR_BIT_ROWS", "grouped_linear", "quantized_linear", "share_memory"]

MOST_FOUR_BIT_ROWS = math.inf
"""Rows above which bitsandbytes' own way is the faster one."""

_PIECE = 1 << 20
"""Numbers of a weight in 4 bits that are float32 at once: 4 MB."""

_MOST_ROWS_AS_STORED = 8
"""Rows above which codes are made 16-bit numbers first, which have a faster product."""

_WHOLE = 32
"""Inputs, and bytes at whose multiples activations must begin, that torch's kernel reads at once, unasked.

Source: aten/src/ATen/native/cpu/int8mm_kernel.cpp in torch.
"""

_HAS_STORED_PRODUCT = hasattr(torch, "_weight_int8pack_mm") and sys.platform != "win32"
"""Whether torch multiplies by codes as they are stored; on Windows it does so number by number."""


def quantized_linear(x: torch.Tensor, weight: Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Multiply activations by a weight.

    Args:
        x: Activations of shape `(..., in_features)`, floating: for weights of 8 bits bfloat16, for those of 4 bits that
            are not repacked, of 16 bits.
        weight: The weight.
        bias: What is added, of shape `(out_features,)`; None for nothing: the weight's own is not looked at.

    Returns:
        `x @ w.T + bias` of shape `(..., out_features)`, in the dtype of `x`.

    Raises:
        UnsupportedError: If no kernel multiplies by the weight as it is stored, or the layer does so as fast.
    """
    if isinstance(weight, Int8Weight):
        found = _int8_product(x, weight)
    elif isinstance(weight, FourBitWeight):
        found = _four_bit_product(x, weight)
    elif isinstance(weight, RepackedWeight):
        shape = (weight.out_features, weight.in_features)
        found = four_bit_product(x, weight.words, shape, weight.scales, weight.code, weight.block_size)
    else:
        msg = "CPUs have no product of their own with its weight"
        raise UnsupportedError(msg)
    return (found if bias is None else found + bias).to(x.dtype)


def _int8_product(x: torch.Tensor, weight: Int8Weight) -> torch.Tensor:
    """Multiply by the codes, which 16 bits hold as they are, and scale in float32."""
    if x.dtype != torch.bfloat16:
        msg = f"CPUs have no fast product of 8-bit weights and {str(x.dtype).removeprefix('torch.')}"
        raise UnsupportedError(msg)
    codes = weight.words.view(torch.int8).view(weight.out_features, weight.in_features)
    rows = x.reshape(-1, weight.in_features).contiguous()
    if len(rows) <= _MOST_ROWS_AS_STORED and not weight.in_features % _WHOLE and _HAS_STORED_PRODUCT:
        if rows.data_ptr() % _WHOLE:
            rows = rows.clone()
        found = torch._weight_int8pack_mm(rows, codes, rows.new_ones(weight.out_features))
    else:
        wide = x.dtype if _has_16_bit_products() else torch.float32
        found = linear(rows.to(wide), codes.to(wide))
    return (found * (weight.scales / 127)).view(*x.shape[:-1], weight.out_features)


def _four_bit_product(x: torch.Tensor, weight: FourBitWeight) -> torch.Tensor:
    """Multiply by one piece of the weight after the other, in float32; the layer makes all of it 16 bits wide first."""
    if x.dtype not in (torch.float16, torch.bfloat16) or _has_16_bit_products():
        msg = f"this CPU multiplies {str(x.dtype).removeprefix('torch.')} as fast in the layer itself"
        raise UnsupportedError(msg)
    rows = x.reshape(-1, weight.in_features).float()
    outputs, inputs, block = weight.out_features, weight.in_features, weight.block_size
    octets, scales = weight.words.view(torch.uint8), block_scales(weight, torch.float32)
    whole_blocks = block // math.gcd(inputs, block)  # outputs after which a block ends, too
    most = max(1, _PIECE // inputs // whole_blocks) * whole_blocks
    found = rows.new_empty(len(rows), outputs)
    for first in range(0, outputs, most):
        end = min(outputs, first + most)
        piece = dequantized(
            octets[first * inputs // 2 : end * inputs // 2],
            scales[first * inputs // block : -(-end * inputs // block)],
            block,
            weight.kind,
            (end - first, inputs),
            torch.float32,
        )
        found[:, first:end] = rows @ piece.t()
    return found.view(*x.shape[:-1], outputs)


def _has_16_bit_products() -> bool:
    """Whether the CPU multiplies 16-bit numbers about as fast as float32: x86 does with AVX512."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def grouped_linear(x: torch.Tensor, weights: Sequence[Weight]) -> list[torch.Tensor]:
    """Multiply the same activations by several weights, and add the bias of each; in one call where they share memory.

    Args:
        x: Activations of shape `(..., in_features)`, floating.
        weights: Weights of the same inputs.

    Returns:
        A product for each weight, as `product` gives it.
    """
    first = weights[0]
    joint = first.joint if isinstance(first, RepackedWeight) else None
    if joint is None:
        return [quantized_linear(x, weight, weight.bias) for weight in weights]
    parts = quantized_linear(x, joint).split([weight.out_features for weight in weights], -1)
    biased = zip(parts, weights, strict=True)
    return [part.contiguous() if weight.bias is None else part + weight.bias for part, weight in biased]


def share_memory(modules: Sequence[Any], weights: Sequence[RepackedWeight]) -> list[RepackedWeight]:
    """Put the weights of several layers behind each other, and let the layers have their parts of that.

    The layers compute what they did. Only the scales, a sixteenth of the weights, are there twice.

    Args:
        modules: The layers, `Linear4bit` of bitsandbytes.
        weights: Their weights, of one layout.

    Returns:
        The weights, which know of each other.
    """
    first = weights[0]
    words = torch.cat([weight.words for weight in weights])
    joint = replace(
        first,
        out_features=len(words),
        words=words,
        scales=torch.cat([w.scales for w in weights], 1),
        bias=None,
        joint=None,
    )
    parts = words.split([weight.out_features for weight in weights])
    for module, part in zip(modules, parts, strict=True):
        # Another parameter: a forward of another thread may be reading the one before.
        parameter = copy.copy(module.weight)
        parameter.data = part
        module.weight = parameter
    return [replace(weight, words=part, joint=joint) for weight, part in zip(weights, parts, strict=True)]

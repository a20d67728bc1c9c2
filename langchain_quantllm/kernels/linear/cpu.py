"""Linear layers with quantized weights on a CPU, by kernels of bitsandbytes and torch.

`product_of` prepares a product, for steps in which every call counts; the other functions are those of `reference`.

- 4-bit weights that bitsandbytes has repacked for the CPU: its own kernel. Weights with the same input are stored
  together and multiplied in one call, because the overhead of a call equals the product of a small layer.
- Other 4-bit weights, on CPUs that multiply 16-bit numbers slowly: dequantized to float32 piece by piece, as much as
  the cache holds.
- 4-bit weights of GPTQ that GPTQModel has packed for torch's kernel: that kernel, which takes bfloat16.
- 8-bit weights: multiplied as stored by 16-bit activations, in one call of torch, where LLM.int8() takes some fifteen.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch.nn.functional import linear

from langchain_quantllm.compat import torch_products
from langchain_quantllm.compat.bitsandbytes import dequantized, four_bit_product
from langchain_quantllm.errors import UnsupportedError
from langchain_quantllm.kernels.linear.reference import block_scales
from langchain_quantllm.kernels.linear.weights import FourBitWeight, Int4PackWeight, Int8Weight, RepackedWeight, Weight

__all__ = ["MOST_FOUR_BIT_ROWS", "grouped_linear", "product_of", "quantized_linear", "share_memory"]

MOST_FOUR_BIT_ROWS = math.inf
"""Rows above which bitsandbytes' own layer is faster: none."""

_PIECE = 1 << 20
"""Numbers of a 4-bit weight that are dequantized at once: 4 MB in float32."""

_MOST_ROWS_AS_STORED = 8
"""Rows above which codes are converted to 16 bits first, as that product is faster."""

stored_product, int4_product = torch_products.int8_product(), torch_products.int4_product()
"""torch's products with codes of 8 and of 4 bits; None where they are missing or slow."""

Product = Callable[[torch.Tensor], torch.Tensor]
"""Multiplies activations of shape `(..., in_features)` by weights; returns them in the same dtype."""


def quantized_linear(x: torch.Tensor, weight: Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Multiply activations by a weight; see `reference.quantized_linear`.

    Activations are bfloat16 for 8-bit weights, 16 bits for 4-bit weights that are not repacked, any floating dtype
    otherwise; the result has their dtype.

    Raises:
        UnsupportedError: If no kernel multiplies by the stored weight, or the layer itself is as fast.
    """
    found = _product(weight)(x)
    return (found if bias is None else found + bias).to(x.dtype)


def product_of(weights: Sequence[Weight]) -> list[Product]:
    """Prepare the products of weights that have the same inputs, with their biases.

    Returns:
        One product for all, with their outputs behind each other, if they share memory; otherwise one for each.

    Raises:
        UnsupportedError: If no kernel multiplies by a stored weight.
    """
    first = weights[0]
    joined = first.joined if isinstance(first, RepackedWeight) and len(weights) > 1 else None
    biases = [weight.bias for weight in weights]
    if joined is None or (None in biases and any(bias is not None for bias in biases)):
        return [_with_bias(weight, weight.bias) for weight in weights]
    return [_with_bias(joined, None if biases[0] is None else torch.cat(cast("list[torch.Tensor]", biases)))]


def _with_bias(weight: Weight, bias: torch.Tensor | None) -> Product:
    product = _product(weight)
    if bias is not None:
        return lambda x: (product(x) + bias).to(x.dtype)
    if isinstance(weight, RepackedWeight | Int4PackWeight):  # its sums are rounded already
        return product
    return lambda x: product(x).to(x.dtype)


def _product(weight: Weight) -> Product:
    """Prepare the product of a weight, without its bias, and in float32 if that is what sums are in."""
    if isinstance(weight, Int8Weight):
        return _int8_product(weight)
    if isinstance(weight, FourBitWeight):
        return functools.partial(_four_bit_linear, weight=weight)
    if isinstance(weight, RepackedWeight):
        shape = (weight.out_features, weight.in_features)
        return four_bit_product(weight.words, shape, weight.scales, weight.code, weight.block_size, weight.kind)
    if isinstance(weight, Int4PackWeight) and int4_product is not None:
        return _int4_product(weight, int4_product)
    msg = "no CPU kernel multiplies by the format of its weight"
    raise UnsupportedError(msg)


def _int4_product(weight: Int4PackWeight, product: Callable[..., torch.Tensor]) -> Product:
    inputs, outputs, words, order = weight.in_features, weight.out_features, weight.words, weight.order
    size, scales = weight.group_size, weight.scales_and_zeros

    def multiply(x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, inputs)
        if order is not None:
            rows = rows[:, order]
        found = product(rows.to(torch.bfloat16).contiguous(), words, size, scales)
        return found.view(*x.shape[:-1], outputs).to(x.dtype)

    return multiply


def _int8_product(weight: Int8Weight) -> Product:
    """Multiply by the codes, which are exact in 16 bits, and scale in float32."""
    inputs, outputs = weight.in_features, weight.out_features
    codes = weight.words.view(torch.int8).view(outputs, inputs)
    factors, ones = weight.scales / 127, torch.ones(outputs, dtype=torch.bfloat16)
    product = None if inputs % torch_products.INT8_ALIGNMENT else stored_product

    def multiply(x: torch.Tensor) -> torch.Tensor:
        if x.dtype != torch.bfloat16:
            msg = f"CPUs have no fast product of 8-bit weights and {str(x.dtype).removeprefix('torch.')}"
            raise UnsupportedError(msg)
        rows = x.reshape(-1, inputs).contiguous()
        if len(rows) <= _MOST_ROWS_AS_STORED and product is not None:
            if rows.data_ptr() % torch_products.INT8_ALIGNMENT:
                rows = rows.clone()
            found = product(rows, codes, ones)
        else:
            wide = x.dtype if has_16_bit_products() else torch.float32
            found = linear(rows.to(wide), codes.to(wide))
        return (found * factors).view(*x.shape[:-1], outputs)

    return multiply


def _four_bit_linear(x: torch.Tensor, weight: FourBitWeight) -> torch.Tensor:
    """Dequantize and multiply piece by piece, in float32; the layer dequantizes the whole weight to 16 bits first."""
    if x.dtype not in (torch.float16, torch.bfloat16) or has_16_bit_products():
        msg = f"this CPU multiplies {str(x.dtype).removeprefix('torch.')} as fast in the layer itself"
        raise UnsupportedError(msg)
    rows = x.reshape(-1, weight.in_features).float()
    return dequantized_product(rows, weight, torch.matmul).view(*x.shape[:-1], weight.out_features)


def dequantized_product(
    rows: torch.Tensor, weight: FourBitWeight, product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Dequantize a weight piece by piece to the dtype of the rows, and multiply.

    Args:
        rows: Of shape `(rows, in_features)`.
        weight: The weight.
        product: Multiplies the rows by a piece of shape `(in_features, outputs of the piece)`.

    Returns:
        Of shape `(rows, out_features)`.
    """
    outputs, inputs, block = weight.out_features, weight.in_features, weight.block_size
    octets, scales = weight.words.view(torch.uint8), block_scales(weight, torch.float32)
    whole_blocks = block // math.gcd(inputs, block)  # outputs after which a block ends
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
            rows.dtype,
        )
        found[:, first:end] = product(rows, piece.t())
    return found


def has_16_bit_products() -> bool:
    """Whether the CPU multiplies 16-bit numbers about as fast as float32: on x86, with AVX512."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def grouped_linear(x: torch.Tensor, weights: Sequence[Weight]) -> list[torch.Tensor]:
    """Multiply the same activations by several weights, and add the bias of each; in one call if they share memory."""
    first = weights[0]
    joined = first.joined if isinstance(first, RepackedWeight) else None
    if joined is None:
        return [quantized_linear(x, weight, weight.bias) for weight in weights]
    parts = quantized_linear(x, joined).split([weight.out_features for weight in weights], -1)
    biased = zip(parts, weights, strict=True)
    return [part.contiguous() if weight.bias is None else part + weight.bias for part, weight in biased]


def share_memory(modules: Sequence[Any], weights: Sequence[RepackedWeight]) -> list[RepackedWeight]:
    """Concatenate the weights of several layers, and make the layers' weights views of the result.

    The layers compute the same as before. Only the scales, a sixteenth of the weights, are stored twice.

    Args:
        modules: The layers, `Linear4bit` of bitsandbytes.
        weights: Their weights, of one layout.

    Returns:
        The weights, with the concatenated one in `joined`.
    """
    first = weights[0]
    words = torch.cat([weight.words for weight in weights])
    joined = replace(
        first,
        out_features=len(words),
        words=words,
        scales=torch.cat([w.scales for w in weights], 1),
        bias=None,
        joined=None,
    )
    parts = words.split([weight.out_features for weight in weights])
    for module, part in zip(modules, parts, strict=True):
        # A new parameter: a forward of another thread may be reading the old one.
        parameter = copy.copy(module.weight)
        parameter.data = part
        module.weight = parameter
    return [replace(weight, words=part, joined=joined) for weight, part in zip(weights, parts, strict=True)]

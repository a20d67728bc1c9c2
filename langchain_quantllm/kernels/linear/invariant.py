"""Linear layers with quantized weights whose result for a row does not depend on the other rows, bit for bit.

On a CPU, the products of `cpu` in tiles of rows, or a product with the dequantized weight. On a GPU, the kernel of
`dispatch` for tiles of rows, with one configuration for each weight. The functions are documented in `reference`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from langchain_quantllm.compat.bitsandbytes import four_bit_product
from langchain_quantllm.compat.torch_products import INT8_ALIGNMENT
from langchain_quantllm.errors import UnsupportedError
from langchain_quantllm.kernels.invariant.ops import paused
from langchain_quantllm.kernels.invariant.products import MOST_IN_A_TWIN, product
from langchain_quantllm.kernels.invariant.tiles import Function, run_in_tiles
from langchain_quantllm.kernels.linear.cpu import dequantized_product, has_16_bit_products, stored_product
from langchain_quantllm.kernels.linear.weights import FourBitWeight, Int8Weight, RepackedWeight, Weight

__all__ = ["MOST_FOUR_BIT_ROWS", "grouped_linear", "quantized_linear"]

MOST_FOUR_BIT_ROWS = math.inf
"""Rows above which the layer's own forward is used: none, as it computes something else."""

_MOST_GROUPED = 3
"""Most weights of one launch on a GPU."""

_TILE_ROWS = 64
"""Rows of a program on a GPU."""


def quantized_linear(x: torch.Tensor, weight: Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Multiply activations by a quantized weight; see `reference.quantized_linear`. The result has the dtype of `x`.

    Raises:
        UnsupportedError: If there is no such product for the weight on this device.
    """
    with paused():
        if x.device.type != "cpu":
            return _on_gpu(x, [weight], None if bias is None else [bias])[0]
        rows = x.reshape(-1, weight.in_features)
        if isinstance(weight, RepackedWeight):
            found = _repacked(rows, weight)
        elif isinstance(weight, Int8Weight):
            found = _int8(rows, weight)
        elif isinstance(weight, FourBitWeight):
            found = _four_bit(rows, weight)
        else:
            msg = "no CPU kernel multiplies by the format of its weight"  # GPTQModel's own forward is invariant
            raise UnsupportedError(msg)
        found = (found if bias is None else found + bias).to(x.dtype)
        return found.view(*x.shape[:-1], weight.out_features)


def grouped_linear(x: torch.Tensor, weights: Sequence[Weight]) -> list[torch.Tensor]:
    """Multiply the same activations by several weights, and add the bias of each."""
    biases = [weight.bias for weight in weights if weight.bias is not None]
    if x.device.type == "cpu" or len(biases) not in (0, len(weights)) or len(weights) > _MOST_GROUPED:
        return [quantized_linear(x, weight, weight.bias) for weight in weights]
    with paused():
        return _on_gpu(x, weights, biases or None)


def _on_gpu(x: torch.Tensor, weights: Sequence[Weight], biases: Sequence[torch.Tensor] | None) -> list[torch.Tensor]:
    from langchain_quantllm.kernels.linear import dispatch

    return dispatch.tiled_linear(x, weights, biases, tile_rows=_TILE_ROWS)


def _repacked(rows: torch.Tensor, weight: RepackedWeight) -> torch.Tensor:
    shape, kind = (weight.out_features, weight.in_features), weight.kind

    def multiply(words: torch.Tensor) -> Function:
        return four_bit_product(words, shape, weight.scales, weight.code, weight.block_size, kind)

    def twin() -> Function:
        return multiply(_random_codes(weight.words.view(-1, shape[1] // 2, 32), 1).view(weight.words.shape))

    is_small = math.prod(shape) <= MOST_IN_A_TWIN
    key = ("repacked", weight.kind, shape, weight.block_size)
    return run_in_tiles(multiply(weight.words), rows, key, twin if is_small else None)


def _random_codes(like: torch.Tensor, dim: int) -> torch.Tensor:
    """Make random bytes of a shape, whose second half along a dimension repeats the first."""
    made = torch.randint(0, 256, like.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    half = like.shape[dim] // 2
    made.narrow(dim, like.shape[dim] - half, half).copy_(made.narrow(dim, 0, half).clone())
    return made.view(like.dtype)


def _int8(rows: torch.Tensor, weight: Int8Weight) -> torch.Tensor:
    """Multiply by the codes, which are exact in 16 bits, and scale in float32."""
    codes = weight.words.view(torch.int8).view(weight.out_features, weight.in_features)
    scales = weight.scales / 127
    if rows.dtype == torch.bfloat16 and stored_product is not None and not weight.in_features % INT8_ALIGNMENT:
        ones = rows.new_ones(weight.out_features)

        def multiply(codes: torch.Tensor) -> Function:
            return lambda tile: stored_product(tile, codes, ones)

        twin = None if codes.numel() > MOST_IN_A_TWIN else lambda: multiply(_random_codes(codes, 1))
        return run_in_tiles(multiply(codes), rows, ("int8", codes.shape), twin) * scales
    wide = rows.dtype if rows.dtype == torch.bfloat16 and has_16_bit_products() else torch.float32
    return product(rows.to(wide), codes.to(wide).t()) * scales


def _four_bit(rows: torch.Tensor, weight: FourBitWeight) -> torch.Tensor:
    """Dequantize and multiply piece by piece."""
    wide = rows.dtype if rows.dtype == torch.bfloat16 and has_16_bit_products() else torch.float32
    return dequantized_product(rows.to(wide), weight, product)

"""Products of rows with the experts that they are routed to, in plain torch: dequantize, then multiply.

The kernels are tested against these functions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from langchain_quantllm.kernels.experts.gating import Gating, gate
from langchain_quantllm.kernels.experts.weights import MXFP4_BLOCK, FloatStack, Mxfp4Stack, Stack
from langchain_quantllm.kernels.linear import reference
from langchain_quantllm.kernels.linear.codebook import CODEBOOKS, MXFP4

__all__ = ["E2M1", "dequantize", "experts", "routed_linear", "tiles_of_experts"]

E2M1 = CODEBOOKS[MXFP4]
"""The values of e2m1, by their codes."""


def dequantize(stack: Stack, expert: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Return the weight of one expert, of shape `(out_features, in_features)`, computed in `dtype`."""
    if isinstance(stack, FloatStack):
        return stack.values[expert].to(dtype)
    if isinstance(stack, Mxfp4Stack):
        return _mxfp4(stack, expert, dtype)
    return reference.dequantize(stack.weight(expert), dtype)


def routed_linear(
    x: torch.Tensor, stack: Stack, experts: torch.Tensor, *, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    """Multiply each row by the weight of its own expert, and add that expert's bias.

    Args:
        x: Rows of shape `(rows, in_features)`, floating.
        stack: The weights.
        experts: The expert of each row, of shape `(rows,)`, integers; rows of other numbers are left out, as zeros.
        dtype: Dtype of the computation.

    Returns:
        The products of shape `(rows, out_features)`, in `dtype`.
    """
    found = x.new_zeros(len(x), stack.out_features, dtype=dtype)
    for expert in experts.unique().tolist():
        if not 0 <= expert < stack.experts:
            continue
        mine = (experts == expert).nonzero()[:, 0]
        product = x[mine].to(dtype) @ dequantize(stack, expert, dtype).t()
        found[mine] = product if stack.bias is None else product + stack.bias[expert].to(dtype)
    return found


def experts(
    x: torch.Tensor,
    first: Sequence[Stack],
    second: Stack,
    index: torch.Tensor,
    weights: torch.Tensor,
    gating: Gating,
    *,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """Compute the experts of each token, and add up their outputs.

    Args:
        x: Tokens of shape `(tokens, hidden)`, floating.
        first: Weights of the first product, whose outputs follow each other: one, or one of gates and one of ups.
        second: Weights of the second product.
        index: The experts of each token, of shape `(tokens, chosen)`, integers; numbers that no expert has count as
            nothing.
        weights: How much each of them counts, of the same shape.
        gating: What is computed between the two products.
        dtype: Dtype of the computation.

    Returns:
        The sums of shape `(tokens, hidden)`, in the dtype of `x`.
    """
    tokens, chosen = index.shape
    rows, flat = x.repeat_interleave(chosen, 0), index.reshape(-1)
    inner = torch.cat([routed_linear(rows, stack, flat, dtype=dtype) for stack in first], -1)
    outputs = routed_linear(gate(inner, gating), second, flat, dtype=dtype)
    weighted = outputs.view(tokens, chosen, -1) * weights.to(dtype)[..., None]
    real = (index >= 0) & (index < second.experts)
    return weighted.masked_fill(~real[..., None], 0).sum(1).to(x.dtype)


def tiles_of_experts(index: torch.Tensor, experts: int, tile_rows: int) -> tuple[list[list[int]], list[int]]:
    """Put rows into tiles by their experts, as `routing.sort_into_tiles` does.

    Returns:
        The rows of each tile, without what fills it up, and the expert of each tile.
    """
    tiles, of_tiles = [], []
    for expert in range(experts):
        rows = (index == expert).nonzero()[:, 0].tolist()
        for start in range(0, len(rows), tile_rows):
            tiles.append(rows[start : start + tile_rows])
            of_tiles.append(expert)
    return tiles, of_tiles


def _mxfp4(stack: Mxfp4Stack, expert: int, dtype: torch.dtype) -> torch.Tensor:
    octets = stack.words[expert].contiguous().view(torch.uint8)
    codes = torch.stack([octets & 15, octets >> 4], dim=-1).reshape(stack.out_features, stack.in_features)
    values = torch.tensor(E2M1, dtype=dtype, device=octets.device)[codes.long()]
    exponents = (stack.scales[expert].int() - 127).repeat_interleave(MXFP4_BLOCK, dim=1)
    return torch.ldexp(values, exponents)

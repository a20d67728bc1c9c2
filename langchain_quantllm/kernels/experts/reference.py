"""Products of rows with the experts that they are routed to, in plain torch: dequantize, then multiply.

The kernels are tested against these functions.
"""

from __future__ import annotations

import torch

from langchain_quantllm.kernels.experts.weights import MXFP4_BLOCK, FloatStack, Mxfp4Stack, Stack
from langchain_quantllm.kernels.linear import reference

__all__ = ["E2M1", "dequantize", "routed_linear"]

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
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


def _mxfp4(stack: Mxfp4Stack, expert: int, dtype: torch.dtype) -> torch.Tensor:
    octets = stack.words[expert].contiguous().view(torch.uint8)
    codes = torch.stack([octets & 15, octets >> 4], dim=-1).reshape(stack.out_features, stack.in_features)
    values = torch.tensor(E2M1, dtype=dtype, device=octets.device)[codes.long()]
    exponents = (stack.scales[expert].int() - 127).repeat_interleave(MXFP4_BLOCK, dim=1)
    return torch.ldexp(values, exponents)

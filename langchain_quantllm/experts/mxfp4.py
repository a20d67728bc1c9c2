"""Experts in mxfp4, in the layout of gpt-oss: from a checkpoint's blocks and scales to a stack, and back; rounding.

Source: OCP Microscaling Formats (MX) Specification v1.0, sections 5.3.3 and 6.3.
"""

from __future__ import annotations

import torch

from langchain_quantllm.kernels.experts.reference import E2M1
from langchain_quantllm.kernels.experts.weights import MXFP4_BLOCK, Mxfp4Stack

__all__ = ["mxfp4_blocks", "mxfp4_stack", "round_to_mxfp4"]

_BYTES = MXFP4_BLOCK // 2
_LARGEST_EXPONENT = 2
"""Of e2m1, whose largest value is 6 = 1.5 * 2**2."""


def mxfp4_stack(blocks: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None = None) -> Mxfp4Stack:
    """Make a stack of a checkpoint's tensors, without copying them.

    Args:
        blocks: The values of shape `(experts, out_features, in_features / 32, 16)`, uint8: two in a byte, the first in
            the lower half.
        scales: Exponents, biased by 127, of shape `(experts, out_features, in_features / 32)`, uint8.
        bias: Biases of shape `(experts, out_features)`, or None.
    """
    _, out_features, count, _ = blocks.shape
    words = blocks.contiguous().flatten(2).view(torch.int32)
    return Mxfp4Stack(
        in_features=count * MXFP4_BLOCK, out_features=out_features, words=words, scales=scales.contiguous(), bias=bias
    )


def mxfp4_blocks(stack: Mxfp4Stack) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the blocks and scales of a stack as a checkpoint has them; the reverse of `mxfp4_stack`."""
    blocks = stack.words.contiguous().view(torch.uint8).unflatten(2, (-1, _BYTES))
    return blocks, stack.scales


def round_to_mxfp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round weights to nearest, ties to the even code, in blocks whose scale is set by their largest magnitude.

    Args:
        weight: Weights of shape `(..., out_features, in_features)`, finite, `in_features` a multiple of 32.

    Returns:
        Blocks of shape `(..., out_features, in_features / 32, 16)` and scales of shape `(..., out_features, in_features
        / 32)`, as `mxfp4_stack` takes them.
    """
    values = weight.float().unflatten(-1, (-1, MXFP4_BLOCK))
    largest = values.abs().amax(-1)
    # frexp gives a mantissa in [0.5, 1), so the exponent of a power of two is one less.
    exponents = torch.frexp(largest).exponent - 1 - _LARGEST_EXPONENT
    exponents = torch.where(largest == 0, 0, exponents).clamp(-127, 127)
    scaled = torch.ldexp(values, -exponents.unsqueeze(-1)).contiguous()
    magnitudes = torch.tensor(E2M1[:8], dtype=torch.float32, device=weight.device)
    middles = (magnitudes[1:] + magnitudes[:-1]) / 2
    # A value in the middle goes to the even code: up from below an even one, else down.
    above, below = torch.bucketize(scaled.abs(), middles, right=True), torch.bucketize(scaled.abs(), middles)
    codes = torch.where(above % 2 == 0, above, below)
    codes = (codes + 8 * (scaled < 0)).to(torch.uint8)
    return codes[..., ::2] | codes[..., 1::2] << 4, (exponents + 127).to(torch.uint8)

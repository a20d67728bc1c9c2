"""The experts of a mixture: whether bitsandbytes' formats fit their sizes, and the bytes that they take.

Each expert's matrix is quantized by itself, so that its blocks and scales are its own.
"""

from __future__ import annotations

import math
from typing import Any

from langchain_quantllm.compat.transformers_experts import Projection, projections, unsupported_experts

__all__ = ["BLOCK_SIZE", "expert_bytes", "parts_of", "unfit_reason"]

BLOCK_SIZE = 64
"""Elements that share a scale in 4 bits. Source: `quantize_4bit` in bitsandbytes/functional.py."""

_NESTED_BLOCK_SIZE = 256


def unfit_reason(module: Any, bits: int) -> str | None:
    """Return why the weights of experts cannot be quantized to 4 or 8 bits.

    Args:
        module: Any module.
        bits: Bits of a weight, 4 or 8.

    Returns:
        The reason; None for experts that can be quantized, and for other modules.
    """
    if (reason := unsupported_experts(module)) is not None:
        return reason
    multiple = 8 if bits == 4 else 4
    for name, projection in projections(module).items():
        if projection.in_features % multiple:
            return f"{name} has {projection.in_features} inputs, no multiple of {multiple}"
        part = projection.out_features * projection.in_features // parts_of(name)
        if bits == 4 and part % BLOCK_SIZE:
            return f"{name} has matrices of {part} elements, no multiple of {BLOCK_SIZE}"
    return None


def parts_of(name: str) -> int:
    """Return how many matrices a projection is made of: 2 for a gate and what it is multiplied by."""
    return 2 if name == "gate_up_proj" else 1


def expert_bytes(projection: Projection, bits: int, *, nested: bool = False) -> tuple[int, ...]:
    """Compute the bytes of the tensors with the weights of one projection of all experts.

    Args:
        projection: The projection.
        bits: Bits of a weight, 4 or 8.
        nested: Whether the scales of 4-bit weights are quantized too.
    """
    experts, outputs, weights = projection.experts, projection.out_features, projection.elements
    if bits == 8:
        return weights, 4 * experts * outputs
    blocks = math.ceil(outputs * projection.in_features / BLOCK_SIZE)
    words = weights // 2
    code = 4 * 16
    if not nested:
        return words, 4 * experts * blocks, code, 0
    outer = math.ceil(blocks / _NESTED_BLOCK_SIZE)
    return words, experts * blocks, code, 4 * experts * outer, 4 * 256, 4 * experts

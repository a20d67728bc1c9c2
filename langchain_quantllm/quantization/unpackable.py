"""Layers whose sizes fill no words of 32 bits, such as the gate of a shared expert: they stay unquantized."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from langchain_quantllm.quantization.decoder_layers import Layout

__all__ = ["without_unpackable"]

_LARGEST_SHARE = 0.01
"""Largest share of all weights in linear layers and experts that is left out without having been named."""

_logger = logging.getLogger(__name__)


def without_unpackable(model: Any, layout: Layout, bits: Sequence[int]) -> Layout:
    """Remove the layers that cannot be packed, and log their names.

    A layer is left out in every block that has one of its name, so that a checkpoint's list of names says it.

    Args:
        model: The model, on any device.
        layout: Its layers to quantize.
        bits: Bits that a code may have.

    Returns:
        The layout without them, and with their names in `left_out`; the same one if they are more than a small part of
        the weights, which is not to stay unquantized by chance.
    """
    blocks = model.get_submodule(layout.prefix)
    elements: Counter[str] = Counter()
    sizes: dict[str, tuple[int, int]] = {}
    for block, names in zip(blocks, layout.layers, strict=True):
        for name in names:
            linear = block.get_submodule(name)
            elements[name] += linear.weight.numel()
            if any(size * b % 32 for size in (linear.in_features, linear.out_features) for b in bits):
                sizes[name] = linear.in_features, linear.out_features
    total = elements.total() + sum(own.elements for found in layout.experts for own in found)
    if not sizes or sum(elements[name] for name in sizes) > _LARGEST_SHARE * total:
        return layout
    _logger.warning(
        "Left unquantized, as %s bits of their sizes fill no words of 32: %s.",
        " or ".join(map(str, bits)),
        ", ".join(f"{name} ({inputs} x {outputs})" for name, (inputs, outputs) in sizes.items()),
    )
    kept = tuple(tuple(name for name in names if name not in sizes) for names in layout.layers)
    return replace(layout, layers=kept, left_out=tuple(sizes))

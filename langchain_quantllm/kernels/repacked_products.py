"""Products with 4-bit weights that bitsandbytes has repacked for a CPU, by its own kernel, several of them in one call.

Owns the memory that weights of one input share: one behind the other, so that a single call multiplies by all of them.
A call costs as much as the product of a small model's layer. Knows no Triton.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from langchain_quantllm.errors import UnsupportedError
from langchain_quantllm.kernels.weights import RepackedWeight, Weight

__all__ = ["product", "products_of_one_input", "share_memory"]


def product(x: torch.Tensor, weight: Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Multiply activations by a weight.

    Args:
        x: Activations of shape `(..., in_features)`, floating.
        weight: The weight.
        bias: What is added, of shape `(out_features,)`; None for nothing: the weight's own is not looked at.

    Returns:
        `x @ w.T + bias` of shape `(..., out_features)`, in the dtype of `x`.

    Raises:
        UnsupportedError: If the weight is none that was repacked.
    """
    if not isinstance(weight, RepackedWeight):
        msg = "its weight is not one that bitsandbytes repacks for a CPU"
        raise UnsupportedError(msg)
    shape = (weight.out_features, weight.in_features)
    found: torch.Tensor = torch.ops.bitsandbytes.gemv_4bit.default(
        x, weight.words, shape, weight.scales, weight.code, weight.block_size
    )
    return found if bias is None else found + bias


def products_of_one_input(x: torch.Tensor, weights: Sequence[Weight]) -> list[torch.Tensor]:
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
        return [product(x, weight, weight.bias) for weight in weights]
    parts = product(x, joint).split([weight.out_features for weight in weights], -1)
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

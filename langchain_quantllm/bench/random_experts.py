"""Random packed weights of experts, for the checkpoints of `random_models`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["is_experts_weight", "packed_gptq_experts", "packed_mxfp4_experts"]

_EXPERTS = "experts"
_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}

_MXFP4_BLOCK = 32
"""Weights that share a scale."""

_MXFP4_EXPONENT = 127 - 6
"""The scale of random weights: about that of weights in models."""


def is_experts_weight(name: str, tensor: Any) -> bool:
    """Whether a tensor of a model's state has the weights of one projection of all experts."""
    *_, owner, own = ("", *name.split("."))
    return owner == _EXPERTS and own in _PARTS and tensor.dim() == 3


def packed_gptq_experts(
    name: str, tensor: Any, pack: Callable[[str, int, int], dict[str, Any]]
) -> Iterator[tuple[str, Any]]:
    """Yield the tensors of a projection as GPTQ names them: a layer for each expert.

    Args:
        name: The projection's name in the model's state.
        tensor: Its weights, of shape `(experts, out_features, in_features)`.
        pack: Makes the tensors of a layer from its name, outputs and inputs.
    """
    owner, _, own = name.rpartition(".")
    experts, outputs, inputs = tensor.shape
    parts = _PARTS[own]
    for expert in range(experts):
        for part in parts:
            yield from pack(f"{owner}.{expert}.{part}", outputs // len(parts), inputs).items()


def packed_mxfp4_experts(name: str, tensor: Any) -> Iterator[tuple[str, Any]]:
    """Yield the tensors of a projection as gpt-oss names them: blocks and scales.

    Args:
        name: The projection's name in the model's state.
        tensor: Its weights, of shape `(experts, in_features, out_features)`.
    """
    import torch

    experts, inputs, outputs = tensor.shape
    groups = inputs // _MXFP4_BLOCK
    made = {"dtype": torch.uint8, "device": tensor.device}
    yield f"{name}_blocks", torch.randint(0, 256, (experts, outputs, groups, _MXFP4_BLOCK // 2), **made).cpu()
    yield f"{name}_scales", torch.full((experts, outputs, groups), _MXFP4_EXPONENT, dtype=torch.uint8)

"""Attentions of transformers that cache a latent instead of keys and values: their parts and dimensions.

DeepSeek V2 and V3, GLM-4.7-Flash, MiniCPM3 and others share the names of these parts. Since transformers 5.24 they
cache the latent, before that the keys and values of all heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_DIMENSIONS = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "layer_idx")


@dataclass(frozen=True, kw_only=True)
class LatentDimensions:
    """Sizes of an attention with latents.

    Args:
        layer: Number of the layer.
        rank: Numbers of a latent, which all heads make their keys and values from.
        rotary: Numbers of the rotated key, which all heads share.
        plain: Numbers of a head's key that are not rotated.
        value: Numbers of a head's value.
    """

    layer: int
    rank: int
    rotary: int
    plain: int
    value: int


def latent_attentions(model: Any) -> Iterator[tuple[Any, LatentDimensions]]:
    """Iterate over the attentions of a model that make keys and values from latents."""
    for module in model.modules():
        sizes: list[Any] = [getattr(module, name, None) for name in _DIMENSIONS]
        if "kv_b_proj" in module._modules and all(isinstance(size, int) for size in sizes):
            rank, plain, rotary, value, layer = sizes
            yield module, LatentDimensions(layer=layer, rank=rank, rotary=rotary, plain=plain, value=value)


def expansion_of(attention: Any) -> Any:
    """Return the linear layer that makes the keys and values of all heads from a latent.

    Its output holds, for each head, the part of the key that is not rotated, then the value.
    """
    return attention.kv_b_proj

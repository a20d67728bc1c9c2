"""The stacked LoRA layers of a model, and the adapter of each token of one forward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True)
class StackedLayer:
    """The stacked adapters of one linear layer.

    Args:
        down: The A matrices, of shape `(sum of ranks, in_features)`.
        up: The B matrices times their scalings, of shape `(out_features, sum of ranks)`.
        owners: Number of the adapter of each rank, of shape `(sum of ranks,)`, int32.
        ranks: Rank of each adapter in this layer, 0 for adapters without matrices here.
        is_head: Whether it is the output head, which may see only some of the tokens.
    """

    down: torch.Tensor
    up: torch.Tensor
    owners: torch.Tensor
    ranks: tuple[int, ...]
    is_head: bool


@dataclass(kw_only=True)
class AdapterChoice:
    """The adapter of each token of one forward.

    Args:
        layers: Stacked layers by the ids of peft's layers.
        of_tokens: Number of each token's adapter, of shape `(tokens,)`, int32.
        of_head: The same for the tokens that the output head sees.
        masks: Masks made so far, shared by layers with the same ranks.
    """

    layers: Mapping[int, StackedLayer]
    of_tokens: torch.Tensor
    of_head: torch.Tensor
    masks: dict[Any, torch.Tensor] = field(default_factory=dict)

    def foreign_rank_mask(self, layer: StackedLayer) -> torch.Tensor:
        """Return the mask of the ranks that belong to other adapters than a token's: `(tokens, ranks)`, bool."""
        key = (layer.ranks, layer.is_head, layer.owners.device)
        mask = self.masks.get(key)
        if mask is None:
            numbers = (self.of_head if layer.is_head else self.of_tokens).to(layer.owners.device)
            mask = self.masks[key] = layer.owners[None] != numbers[:, None]
        return mask

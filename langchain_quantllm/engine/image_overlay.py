"""The features of images in one packed forward."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class ImageOverlay:
    """Features of images, and the packed tokens whose place they take.

    Args:
        rows: Indices of these tokens, of shape `(rows,)`.
        tokens: Packed tokens of the forward.
        embeddings: The features, of shape `(rows, hidden)`.
        deepstack: Features that are added to the outputs of the first decoder layers, each of that shape.
    """

    rows: torch.Tensor
    tokens: int
    embeddings: torch.Tensor
    deepstack: tuple[torch.Tensor, ...] = ()

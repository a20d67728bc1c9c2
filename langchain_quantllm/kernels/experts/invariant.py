"""Experts on a GPU whose result for a token does not depend on the other tokens, bit for bit.

The kernels of `dispatch` for tiles of rows, with one configuration for each layer. See `experts.reference`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from langchain_quantllm.errors import UnsupportedError
from langchain_quantllm.kernels.experts.gating import Gating
from langchain_quantllm.kernels.experts.weights import Stack
from langchain_quantllm.kernels.invariant.ops import paused

__all__ = ["experts"]

_TILE_ROWS = 16
"""Rows of a tile: most tokens that are written beside each other choose different experts."""


def experts(
    x: torch.Tensor,
    first: Sequence[Stack],
    second: Stack,
    index: torch.Tensor,
    weights: torch.Tensor,
    gating: Gating,
) -> torch.Tensor:
    """Compute the experts of each token; see `reference.experts`.

    Raises:
        UnsupportedError: If there are no such kernels for the device.
    """
    if x.device.type == "cpu":
        msg = "there are no kernels of experts for a CPU"
        raise UnsupportedError(msg)
    from langchain_quantllm.kernels.experts import dispatch

    with paused():
        return dispatch.tiled_experts(x, first, second, index, weights, gating, tile_rows=_TILE_ROWS)

"""Products of rows and matrices on a CPU, in tiles of rows."""

from __future__ import annotations

import torch

from langchain_quantllm.compat import onednn
from langchain_quantllm.kernels.invariant.tiles import run_in_tiles

__all__ = ["batched_product", "grouped_product", "product"]


def product(rows: torch.Tensor, matrix: torch.Tensor, added: torch.Tensor | None = None) -> torch.Tensor:
    """Multiply rows by a matrix.

    Args:
        rows: Of shape `(rows, inputs)`, floating.
        matrix: Of shape `(inputs, outputs)`, of the same dtype; any strides.
        added: Added to the products, of shape `(outputs,)` or one that is expanded to it; None for nothing.

    Returns:
        `rows @ matrix + added` of shape `(rows, outputs)`.
    """
    place = matrix.data_ptr() % 64
    key = ("product", matrix.shape, matrix.stride(), place, added is not None)
    if rows.dtype == torch.float32 and onednn.has_linear():
        found: torch.Tensor = run_in_tiles(lambda tile: onednn.linear(tile, matrix.t()), rows, key)
        return found if added is None else found + added
    if added is None or added.dim() > 1:
        found = run_in_tiles(lambda tile: torch.mm(tile, matrix), rows, key)
        return found if added is None else found + added
    return run_in_tiles(lambda tile: torch.addmm(added, tile, matrix), rows, key)  # type: ignore[no-any-return]


def batched_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Multiply pairs of matrices of shapes `(batch, rows, inputs)` and `(batch, inputs, outputs)`."""
    if left.shape[2] == 1:  # no sum: positions times frequencies, for example
        return left * right
    return torch.stack([product(rows, matrix) for rows, matrix in zip(left, right, strict=True)])


def grouped_product(rows: torch.Tensor, matrices: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Multiply groups of rows, each by its matrix.

    Args:
        rows: Of shape `(rows, inputs)`, group after group.
        matrices: Of shape `(groups, inputs, outputs)`.
        ends: The end of each group among the rows, of shape `(groups,)`.

    Returns:
        Of shape `(rows, outputs)`; zeros after the last group.
    """
    found = rows.new_zeros(len(rows), matrices.shape[2])
    start = 0
    for end, matrix in zip(ends.tolist(), matrices, strict=True):
        if end > start:
            found[start:end] = product(rows[start:end], matrix)
        start = end
    return found

"""Products of rows and matrices on a CPU, in tiles of rows."""

from __future__ import annotations

import torch

from langchain_quantllm.compat import onednn
from langchain_quantllm.kernels.invariant.tiles import ALIGNMENT, Function, run_in_tiles

__all__ = ["MOST_IN_A_TWIN", "batched_product", "grouped_product", "product"]

MOST_IN_A_TWIN = 1 << 26
"""Numbers of a matrix that is checked with another one of its shape. Larger ones have many results to compare."""

_COLUMNS = 256
"""Different columns of such a matrix."""


def product(rows: torch.Tensor, matrix: torch.Tensor, added: torch.Tensor | None = None) -> torch.Tensor:
    """Multiply rows by a matrix.

    Args:
        rows: Of shape `(rows, inputs)`, floating.
        matrix: Of shape `(inputs, outputs)`, of the same dtype; any strides.
        added: Added to the products, of shape `(outputs,)` or one that is expanded to it; None for nothing.

    Returns:
        `rows @ matrix + added` of shape `(rows, outputs)`.
    """
    is_separate = added is None or added.dim() > 1 or rows.dtype == torch.float32
    fused = None if is_separate else added
    key = ("product", matrix.shape, matrix.stride(), matrix.data_ptr() % ALIGNMENT, fused is not None)
    twin = None if matrix.numel() > MOST_IN_A_TWIN else lambda: _multiplication(_twin(matrix), _zeros(fused))
    found: torch.Tensor = run_in_tiles(_multiplication(matrix, fused), rows, key, twin)
    return found + added if added is not None and fused is None else found


def _multiplication(matrix: torch.Tensor, added: torch.Tensor | None) -> Function:
    """Return the function of a tile that multiplies by a matrix, by the library that keeps more rows alike."""
    if added is not None:
        return lambda tile: torch.addmm(added, tile, matrix)
    if matrix.dtype == torch.float32 and onednn.has_linear():
        return lambda tile: onednn.linear(tile, matrix.t())
    return lambda tile: torch.mm(tile, matrix)


def _twin(matrix: torch.Tensor) -> torch.Tensor:
    """Make a random matrix with the shape, strides and alignment of another, whose second half repeats the first."""
    skipped = matrix.data_ptr() % ALIGNMENT // matrix.itemsize
    length = 1 + sum((size - 1) * stride for size, stride in zip(matrix.shape, matrix.stride(), strict=True))
    memory = torch.empty(skipped + length, dtype=matrix.dtype)
    made = memory.as_strided(matrix.shape, matrix.stride(), skipped)
    shape = (matrix.shape[0], min(matrix.shape[1], _COLUMNS))
    few = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    for columns in made.split(_COLUMNS, 1):
        columns.copy_(few[:, : columns.shape[1]])
    half = matrix.shape[0] // 2
    if half:
        made[-half:] = made[:half].clone()
    return made


def _zeros(like: torch.Tensor | None) -> torch.Tensor | None:
    return None if like is None else torch.zeros_like(like)


def batched_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Multiply pairs of matrices of shapes `(batch, rows, inputs)` and `(batch, inputs, outputs)`."""
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

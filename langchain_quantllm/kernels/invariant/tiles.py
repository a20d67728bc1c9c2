"""Functions of rows, computed in tiles of a few fixed sizes, so that a row's result does not depend on the others.

Libraries for CPUs choose an algorithm by the shape of a call, and with it the order in which they add. Here a function
is called for tiles of few sizes only. A size is used if, on random rows, each row has the same bits in every place of a
tile and in tiles of the other sizes. This is checked when a size first occurs; tiles of one row are always right.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Rows of a tile."""

_BASE = 8
"""The size that the others are compared with: large enough for the algorithm of products of matrices."""

_SHIFTS = (1, 2, 4, 7)
"""Rows are shifted by so many places to compare the places of a tile."""

_ALIGNMENT = 64
"""Bytes to which PyTorch aligns new memory. Some libraries treat the numbers before an aligned address by themselves."""

Function = Callable[[torch.Tensor], Any]
"""Takes rows of shape `(rows, ...)` and returns a tensor, or a tuple of them, of as many rows."""

_usable: dict[tuple[Hashable, int], bool] = {}
"""Whether a size of tiles can be used, by the function's key."""


def run_in_tiles(function: Function, rows: torch.Tensor, key: Hashable) -> Any:
    """Compute a function of rows in tiles.

    Args:
        function: The function. It must not look at one row to compute another.
        rows: Rows of shape `(rows, ...)`, floating, on the CPU.
        key: Equal for functions that call the same operation for the same shapes, dtypes and strides of weights.

    Returns:
        What the function returns for all rows.
    """
    key = (key, rows.shape[1:], rows.dtype, torch.get_num_threads())
    rows = rows.contiguous()
    outputs, start, count = [], 0, len(rows)
    while start < count or not outputs:
        size = _choose(function, rows, key, count - start)
        outputs.append(function(_tile(rows, start, size)))
        start += size
    return _joined(outputs, count)


def usable_sizes(function: Function, like: torch.Tensor, key: Hashable) -> list[int]:
    """List the sizes of tiles that can be used for a function; see `run_in_tiles`."""
    key = (key, like.shape[1:], like.dtype, torch.get_num_threads())
    return [size for size in SIZES if _is_usable(function, like, key, size)]


def _choose(function: Function, like: torch.Tensor, key: Hashable, rows: int) -> int:
    """Choose the smallest tile that holds so many rows, or the largest one."""
    fitting = [size for size in SIZES if size >= rows]
    smaller = [size for size in reversed(SIZES) if size < rows]
    return next(size for size in (*fitting, *smaller, 1) if _is_usable(function, like, key, size))


def _is_usable(function: Function, like: torch.Tensor, key: Hashable, size: int) -> bool:
    found = _usable.get((key, size))
    if found is None:
        found = _usable[key, size] = _is_same(function, like, key, size)
    return found


def _is_same(function: Function, like: torch.Tensor, key: Hashable, size: int) -> bool:
    """Compare tiles of a size with the base, or with those of half the size, which were compared with it."""
    if size == _BASE:
        rows = _random_rows(like, size)
        found = function(rows)
        shifted = [(_shifted(found, by), function(rows.roll(by, 0))) for by in _SHIFTS]
        return all(_equal(one, other) for one, other in shifted)
    if not _is_usable(function, like, key, _BASE):
        return size == 1
    step = _BASE
    if size > _BASE and _is_usable(function, like, key, size // 2):
        step = size // 2
    rows = _random_rows(like, max(size, _BASE))
    parts = [
        _joined([function(_tile(rows, start, width)) for start in range(0, len(rows), width)], len(rows))
        for width in (min(size, len(rows)), step)
    ]
    return _equal(*parts)


def _random_rows(like: torch.Tensor, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, *like.shape[1:], generator=generator).to(like.dtype)


def _tile(rows: torch.Tensor, start: int, size: int) -> torch.Tensor:
    """Take rows, padded with zeros, in aligned memory."""
    tile = rows[start : start + size]
    if len(tile) < size:
        padded = rows.new_zeros(size, *rows.shape[1:])
        padded[: len(tile)] = tile
        return padded
    return tile if not tile.data_ptr() % _ALIGNMENT else tile.clone()


def _joined(outputs: list[Any], count: int) -> Any:
    """Join the outputs of tiles, without padding."""
    if isinstance(outputs[0], tuple):
        return tuple(_joined(list(parts), count) for parts in zip(*outputs, strict=True))
    joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return joined if len(joined) == count else joined[:count]


def _shifted(found: Any, by: int) -> Any:
    if isinstance(found, tuple):
        return tuple(_shifted(part, by) for part in found)
    return found.roll(by, 0)


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, tuple):
        return all(_equal(*parts) for parts in zip(one, other, strict=True))
    return bool(torch.equal(one, other))


_CHUNK = 1 << 14
"""Numbers of one call: fewer than PyTorch divides among threads."""

_VECTOR = 128
"""A multiple of the numbers that PyTorch computes at once in vector registers, of every dtype."""


def run_in_vectors(function: Function, x: torch.Tensor) -> torch.Tensor:
    """Compute a function number by number, so that each number's result does not depend on its place.

    PyTorch computes whole vectors by other formulas than the numbers that are left at the end, or at the end of a
    thread's part. Here all numbers are in whole vectors.

    Args:
        function: A function of numbers, computed one by one.
        x: Numbers of any shape, on the CPU.

    Returns:
        A tensor of the same shape.
    """
    count = x.numel()
    if x.is_contiguous() and not count % _VECTOR and count <= _CHUNK and not x.data_ptr() % _ALIGNMENT:
        return function(x)
    flat = x.new_zeros(-(-count // _VECTOR) * _VECTOR)
    flat[:count] = x.reshape(-1)
    parts = [function(part) for part in flat.split(_CHUNK)]
    return (parts[0] if len(parts) == 1 else torch.cat(parts))[:count].view(x.shape)

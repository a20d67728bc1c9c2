"""Functions of rows, computed in tiles of a few fixed sizes, so that a row's result does not depend on the others.

Libraries for CPUs choose an algorithm by the shape of a call, and with it the order in which they add. Here a function
is called for tiles of few sizes only. A size is used if, on random rows, each row has the same bits in every place of a
tile and in tiles of the other sizes. This is checked when a size first occurs; tiles of one row are always right.

Another order changes the last bits of a sum in float32, and few of the sums that are rounded to 16 bits. So products
are compared on rows whose sums nearly cancel: their last bits are the first ones of the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Rows of a tile."""

_BASE = 8
"""The size that the others are compared with: large enough for the algorithm of products of matrices."""

_SHIFTS = (1, 2, 4, 7)
"""Rows are shifted by so many places to compare the places of a tile."""

_COMPARED, _COMPARED_16_BITS, _COMPARED_CANCELLED = 1 << 12, 1 << 18, 1 << 14
"""Numbers that are compared at least. In float32 most sums differ that were added in another order, rounded to 16 bits
one in some thousands, and one in some hundreds where sums nearly cancel."""

_MOST_PASSES = 64
_CANCELLED = 2.0**-8
"""What is left of sums that nearly cancel."""

ALIGNMENT = 64
"""Bytes to which PyTorch aligns new memory. Some libraries compute numbers before an aligned address by themselves."""

Function = Callable[[torch.Tensor], Any]
"""Takes rows of shape `(rows, ...)` and returns a tensor, or a tuple of them, of as many rows."""

_usable: dict[tuple[Hashable, int], bool] = {}
"""Whether a size of tiles can be used, by the function's key."""


def run_in_tiles(
    function: Function, rows: torch.Tensor, key: Hashable, twin: Callable[[], Function] | None = None
) -> Any:
    """Compute a function of rows in tiles.

    Args:
        function: The function. It must not look at one row to compute another.
        rows: Rows of shape `(rows, ...)`, floating, on the CPU.
        key: Equal for functions that call the same operation for the same shapes, dtypes and strides of weights.
        twin: Makes a function with the same key, to check sizes with: a product whose weights of the second half of
            the inputs are those of the first half. None checks with the function itself.

    Returns:
        What the function returns for all rows.
    """
    rows = rows.contiguous()
    checked = _Checked(key=(key, rows.shape[1:], rows.dtype, torch.get_num_threads()), function=function, twin=twin)
    outputs: list[Any] = []
    start, count = 0, len(rows)
    while start < count or not outputs:
        size = checked.choose(rows, count - start)
        outputs.append(function(_tile(rows, start, size)))
        start += size
    return _joined(outputs, count)


@dataclass(frozen=True, kw_only=True)
class _Checked:
    """A function, and which sizes of tiles are usable for it."""

    key: Hashable
    function: Function
    twin: Callable[[], Function] | None

    def choose(self, like: torch.Tensor, rows: int) -> int:
        """Choose the smallest tile that holds so many rows, or the largest one."""
        fitting = [size for size in SIZES if size >= rows]
        smaller = [size for size in reversed(SIZES) if size < rows]
        return next(size for size in (*fitting, *smaller, 1) if self.is_usable(like, size))

    def is_usable(self, like: torch.Tensor, size: int) -> bool:
        found = _usable.get((self.key, size))
        if found is None:
            found = _usable[self.key, size] = self._is_same(like, size)
        return found

    def _is_same(self, like: torch.Tensor, size: int) -> bool:
        """Compare tiles of a size with the base, or with those of half the size, which were compared with it."""
        if size != _BASE and not self.is_usable(like, _BASE):
            return size == 1
        step = size // 2 if size > _BASE and self.is_usable(like, size // 2) else _BASE
        function = self.function if self.twin is None else self.twin()
        numbers, passes = 0, 0
        while passes == 0 or (numbers < self._least(like) and passes < _MOST_PASSES):
            rows = _random_rows(like, max(size, _BASE), seed=passes, cancel=self.twin is not None)
            found = _in_steps(function, rows, step)
            if size == _BASE:
                same = all(_equal(_shifted(found, by), function(rows.roll(by, 0))) for by in _SHIFTS)
            else:
                same = _equal(found, _in_steps(function, rows, size))
            if not same:
                return False
            numbers += math.prod((found[0] if isinstance(found, tuple) else found).shape)
            passes += 1
        return True

    def _least(self, like: torch.Tensor) -> int:
        if self.twin is not None:
            return _COMPARED_CANCELLED
        return _COMPARED if like.dtype.itemsize > 2 else _COMPARED_16_BITS


def _in_steps(function: Function, rows: torch.Tensor, size: int) -> Any:
    parts = [function(_tile(rows, start, size)) for start in range(0, len(rows), size)]
    return _joined(parts, len(rows))


def _random_rows(like: torch.Tensor, count: int, *, seed: int, cancel: bool) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + count)
    rows = torch.randn(count, *like.shape[1:], generator=generator, dtype=torch.float32)
    if cancel and (half := rows.shape[-1] // 2):
        rows = rows.to(like.dtype).float()
        rest = torch.randn(*rows.shape[:-1], half, generator=generator, dtype=torch.float32)
        rows[..., -half:] = _CANCELLED * rest - rows[..., :half]
    return rows.to(like.dtype)


def _tile(rows: torch.Tensor, start: int, size: int) -> torch.Tensor:
    """Take rows, padded with zeros, in aligned memory."""
    tile = rows[start : start + size]
    if len(tile) < size:
        padded = rows.new_zeros(size, *rows.shape[1:])
        padded[: len(tile)] = tile
        return padded
    return tile.clone() if tile.data_ptr() % ALIGNMENT else tile


def _joined(outputs: list[Any], count: int) -> Any:
    """Join the outputs of tiles, without padding."""
    if isinstance(outputs[0], tuple):
        return tuple(_joined(list(parts), count) for parts in zip(*outputs, strict=True))
    joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return joined if len(joined) == count else joined[:count]


def _shifted(found: Any, by: int) -> Any:
    return tuple(_shifted(part, by) for part in found) if isinstance(found, tuple) else found.roll(by, 0)


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
    if x.is_contiguous() and not count % _VECTOR and count <= _CHUNK and not x.data_ptr() % ALIGNMENT:
        return function(x)
    flat = x.new_zeros(-(-count // _VECTOR) * _VECTOR)
    flat[:count] = x.reshape(-1)
    parts = [function(part) for part in flat.split(_CHUNK)]
    return (parts[0] if len(parts) == 1 else torch.cat(parts))[:count].view(x.shape)

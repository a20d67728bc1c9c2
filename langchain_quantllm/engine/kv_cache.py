"""The memory of the KV cache: how large it may be, and its tensors, one a layer.

Owns the layers' shapes, the budget, and the allocation. Knows no rows; which page is whose is
`engine/pages`' business.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from langchain_quantllm.engine.attention import LayerPool
from langchain_quantllm.engine.block_manager import BLOCK_TOKENS
from langchain_quantllm.errors import NotEnoughMemoryError
from langchain_quantllm.memory import available_memory, format_bytes

DEFAULT_FRACTION = 0.3
"""Share of the free memory that the pool takes where nobody says: a second model still fits beside it."""

_LEAST_PAGES = 6
_USEFUL_TOKENS_PER_ROW = 4096  # of a pool that nobody has sized: more is rarely filled


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """What one layer stores for each token: `kv_heads` keys and values, and where."""

    kv_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def token_bytes(self) -> int:
        """Bytes of one token."""
        return self.kv_heads * (self.key_dim + self.value_dim) * int(self.dtype.itemsize)


def shapes_of(cache: Any) -> list[LayerShape]:
    """Read the shapes off a transformers cache that a forward has filled.

    Raises:
        ValueError: If a layer of it holds anything but keys and values.
    """
    shapes = []
    for layer in cache.layers:
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if keys is None or values is None or keys.dim() != 4 or values.dim() != 4:
            msg = f"its cache has a {type(layer).__name__}, which is more or less than keys and values"
            raise ValueError(msg)
        shapes.append(
            LayerShape(
                kv_heads=keys.shape[1],
                key_dim=keys.shape[-1],
                value_dim=values.shape[-1],
                dtype=keys.dtype,
                device=keys.device,
            )
        )
    return shapes


def count_pages(shapes: Sequence[LayerShape], budget: float | int | None, *, rows: int, context: int | None) -> int:
    """Find how many pages the budget pays for, page 0 included.

    Layers on several devices share one count: the tightest device decides, and bytes are those of all.

    Args:
        shapes: What each layer stores.
        budget: A fraction of what is free, bytes, or None.
        rows: Most rows at once.
        context: Most tokens of a row; None where the model has no limit.

    Raises:
        NotEnoughMemoryError: If not even a short text has room.
    """
    token_bytes = sum(shape.token_bytes for shape in shapes)
    per_row = min(context or _USEFUL_TOKENS_PER_ROW, _USEFUL_TOKENS_PER_ROW)
    useful = max(rows * per_row, context or 0)
    if isinstance(budget, int):
        tokens = budget // token_bytes
    else:
        fraction = DEFAULT_FRACTION if budget is None else budget
        tokens = min(
            int(available_memory(device) * fraction) // sum(s.token_bytes for s in shapes if s.device == device)
            for device in {shape.device for shape in shapes}
        )
        if budget is None:
            tokens = min(tokens, useful)
    pages = int(min(tokens, rows * (context or tokens))) // BLOCK_TOKENS
    if pages <= _LEAST_PAGES:
        msg = (
            f"kv_cache_memory leaves {format_bytes(tokens * token_bytes)} for the KV cache, which is room for {tokens} "
            f"tokens of {format_bytes(token_bytes)} each; raise it, free memory, or load the model in fewer bits."
        )
        raise NotEnoughMemoryError(msg)
    return pages


def allocate_pools(shapes: Sequence[LayerShape], pages: int) -> list[LayerPool]:
    """Allocate every layer's pages.

    Raises:
        NotEnoughMemoryError: If the device has not so much; nothing stays allocated then.
    """
    try:
        return [
            LayerPool(
                kv=_zeros((pages, BLOCK_TOKENS, s.kv_heads, s.key_dim + s.value_dim), s.dtype, s.device),
                key_dim=s.key_dim,
            )
            for s in shapes
        ]
    except (torch.OutOfMemoryError, MemoryError, OSError, OverflowError) as error:
        size = format_bytes(pages * BLOCK_TOKENS * sum(shape.token_bytes for shape in shapes))
        msg = f"the KV cache of {size} does not fit; lower kv_cache_memory."
        raise NotEnoughMemoryError(msg) from error


def resident_bytes(pools: Sequence[LayerPool]) -> int | None:
    """Count the bytes of pools on the CPU that are in main memory: of pages that were written to.

    Returns:
        The bytes, in whole pages of the system. None for pools elsewhere, and where the system
        does not tell.
    """
    if sys.platform != "linux" or any(pool.kv.device.type != "cpu" for pool in pools):
        return None
    counted_bytes = 0
    for kv in (pool.kv for pool in pools):
        held = (ctypes.c_ubyte * -(-kv.nbytes // mmap.PAGESIZE))()
        if ctypes.CDLL(None).mincore(ctypes.c_void_p(kv.data_ptr()), ctypes.c_size_t(kv.nbytes), held):
            return None
        counted_bytes += bytes(held).count(1) * mmap.PAGESIZE
    return counted_bytes


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Give zeros: what a masked place holds is multiplied by 0, and must be a number for that."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # Pages of the system's own, which it makes zeros when they are touched. torch would touch all of them now, and so
    # does malloc with what was freed before: a layer's pool may fit into what quantizing or repacking left behind.
    # No huge pages are asked for: reading is as fast without, and each layer would begin with 2 MiB.
    private = {} if sys.platform == "win32" else {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS}
    pages = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, **private)
    return torch.frombuffer(pages, dtype=dtype).view(shape)  # which holds the pages

"""The memory of the KV cache: its size, and one tensor per layer.

Owns the layers' shapes, the budget and the allocation. `block_manager` knows which sequence holds which block.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import sys
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

import torch

from langchain_quantllm.compat.transformers_indexers import index_keys_of
from langchain_quantllm.compat.transformers_states import holds_nothing
from langchain_quantllm.engine.attention import LayerPool
from langchain_quantllm.engine.block_manager import BLOCK_TOKENS
from langchain_quantllm.errors import NotEnoughMemoryError, UnsupportedError
from langchain_quantllm.kernels.kv_quantization import KV_DTYPES, SCALE_DTYPE, KVScales
from langchain_quantllm.memory import available_memory, format_bytes, no_8bit_reason

DEFAULT_FRACTION = 0.3
"""Default share of the free memory: a second model still fits beside it."""

LEAST_BLOCKS = 6
"""A pool has more blocks than these, block 0 included."""

_USEFUL_TOKENS = 4096  # of a sequence, in a pool of default size: more is rarely filled


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """What a layer stores for each token, and on which device: keys, values, and the key of its indexer.

    See `LayerPool`. A layer without an indexer of its own has an `index_dim` of 0. One whose pool is in 8 bits has the
    dtype of its `codes`; `dtype` is what they are read as.
    """

    kv_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device
    is_latent: bool = False
    index_dim: int = 0
    index_dtype: torch.dtype = torch.float32
    codes: torch.dtype | None = None

    @property
    def token_bytes(self) -> int:
        """Bytes of one token."""
        of_index = self.index_dim * int(self.index_dtype.itemsize)
        of_head = (self.key_dim + self.value_dim) * int((self.codes or self.dtype).itemsize)
        if self.codes is not None:
            of_head += 2 * SCALE_DTYPE.itemsize
        return self.kv_heads * of_head + of_index


def layers_of(cache: Any) -> dict[int, Any]:
    """Return the layers of a filled transformers cache by their numbers, without those that keep no keys and values."""
    return {number: layer for number, layer in enumerate(cache.layers) if not holds_nothing(layer)}


def shapes_of(cache: Any) -> list[LayerShape]:
    """Read the shapes of the layers of a transformers cache that a forward has filled; see `layers_of`.

    Raises:
        ValueError: If a layer holds anything but keys and values, or a state.
    """
    shapes = []
    for layer in layers_of(cache).values():
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if keys is None or values is None or keys.dim() != 4 or values.dim() != 4:
            msg = f"its cache has a {type(layer).__name__}, which does not hold exactly keys and values"
            raise ValueError(msg)
        shape = LayerShape(
            kv_heads=keys.shape[1],
            key_dim=keys.shape[-1],
            value_dim=values.shape[-1],
            dtype=keys.dtype,
            device=keys.device,
        )
        if (index_keys := index_keys_of(layer)) is not None:
            shape = replace(shape, index_dim=index_keys.shape[-1], index_dtype=index_keys.dtype)
        shapes.append(shape)
    return shapes


def stored_shapes(shapes: Sequence[LayerShape], cache_dtype: str) -> list[LayerShape]:
    """Return the shapes of the pools in a `kv_cache_dtype`.

    Raises:
        UnsupportedError: If layers store something that is not kept in 8 bits.
    """
    if cache_dtype == "auto":
        return list(shapes)
    reason = no_8bit_reason(
        [(shape.key_dim, shape.value_dim) for shape in shapes],
        has_latents=any(shape.is_latent for shape in shapes),
        has_indexers=any(shape.index_dim for shape in shapes),
    )
    if reason is not None:
        raise UnsupportedError(reason)
    return [replace(shape, codes=KV_DTYPES[cache_dtype]) for shape in shapes]


def chosen_factors(factors: Sequence[torch.Tensor], cache_dtype: str) -> Sequence[torch.Tensor]:
    """Return the factors of each layer's keys that pools in a `kv_cache_dtype` take: only equal steps need some.

    In fp8 a number's error is in proportion to it, whatever its factor; without factors the largest numbers of a key,
    which are the same for all tokens, lose nothing.
    """
    return factors if cache_dtype == "int8" else ()


def count_blocks(
    shapes: Sequence[LayerShape],
    budget: float | int | None,
    *,
    sequences: int,
    context: int | None,
    state_bytes: Mapping[torch.device, int] | None = None,
) -> int:
    """Compute how many blocks fit the budget, block 0 included. Without layers they take no memory, and count tokens.

    Layers on several devices share one count: the tightest device decides, and a budget in bytes is for all.

    Args:
        shapes: The layers' shapes.
        budget: A fraction of what is free, bytes, or None.
        sequences: Maximum number of sequences at once.
        context: Most tokens of a sequence; None if the model has no limit.
        state_bytes: What the states of the model's other layers take of the budget on each device.

    Raises:
        NotEnoughMemoryError: If there is no room for even a short text, or not for a budget in bytes.
    """
    states = state_bytes or {}
    token_bytes = sum(shape.token_bytes for shape in shapes)
    most = min(context or _USEFUL_TOKENS, _USEFUL_TOKENS)
    useful = max(sequences * most, context or 0)
    if not shapes:
        tokens = useful
    elif isinstance(budget, int):
        tokens = (budget - sum(states.values())) // token_bytes
    else:
        tokens = min(
            (budget_on(device, budget) - states.get(device, 0))
            // sum(s.token_bytes for s in shapes if s.device == device)
            for device in {shape.device for shape in shapes}
        )
        if budget is None:
            tokens = min(tokens, useful)
    blocks = int(min(tokens, sequences * (context or tokens))) // BLOCK_TOKENS
    if blocks <= LEAST_BLOCKS:
        msg = (
            f"kv_cache_memory leaves {format_bytes(tokens * token_bytes)} for the KV cache, which is room for {tokens} "
            f"tokens of {format_bytes(token_bytes)} each; raise it, free memory, or load the model in fewer bits."
        )
        raise NotEnoughMemoryError(msg)
    if isinstance(budget, int):  # a fraction is one of what is free
        of_states = sum(size for device, size in states.items() if device.type == "cpu")
        _check_room(of_states + blocks * BLOCK_TOKENS * sum(s.token_bytes for s in shapes if s.device.type == "cpu"))
    return blocks


def budget_on(device: torch.device, budget: float | None) -> int:
    """Compute the bytes of a budget on a device: a fraction of what is free there, by default `DEFAULT_FRACTION`."""
    return int(_free_memory(device) * (DEFAULT_FRACTION if budget is None else budget))


def allocate_pools(
    shapes: Sequence[LayerShape], blocks: int, factors: Sequence[torch.Tensor | None] = ()
) -> list[LayerPool]:
    """Allocate the blocks of every layer, as zeros. On a CPU they take memory as they are first written to.

    Args:
        shapes: The layers' shapes.
        blocks: Number of blocks.
        factors: The factors of each layer's keys, for pools in 8 bits; None, and none given, are factors of 1.

    Raises:
        NotEnoughMemoryError: If the device has too little memory; nothing stays allocated then.
    """
    try:
        return [_pool(s, blocks, of_keys) for s, of_keys in zip_longest(shapes, factors)]
    except (torch.OutOfMemoryError, MemoryError, OSError, OverflowError) as error:
        size = format_bytes(blocks * BLOCK_TOKENS * sum(shape.token_bytes for shape in shapes))
        msg = f"the KV cache of {size} does not fit; lower kv_cache_memory."
        raise NotEnoughMemoryError(msg) from error


def _pool(shape: LayerShape, blocks: int, factors: torch.Tensor | None) -> LayerPool:
    at = (blocks, BLOCK_TOKENS)
    index_keys, scales = None, None
    if shape.index_dim:
        index_keys = zeros((*at, shape.index_dim), shape.index_dtype, shape.device)
    if shape.codes is not None:
        pairs = zeros((blocks, shape.kv_heads, BLOCK_TOKENS, 2), SCALE_DTYPE, shape.device)
        if factors is None:
            factors = torch.ones(shape.kv_heads, shape.key_dim, dtype=torch.float32)
        scales = KVScales(pairs, factors.to(shape.device, torch.float32).contiguous())
    dims = (shape.kv_heads, shape.key_dim + shape.value_dim)
    return LayerPool(
        kv=zeros((*at, *dims), shape.codes or shape.dtype, shape.device),
        key_dim=shape.key_dim,
        is_latent=shape.is_latent,
        index_keys=index_keys,
        scales=scales,
        decoded_dtype=None if shape.codes is None else shape.dtype,
    )


def spoiled_blocks(pools: Sequence[LayerPool], blocks: Sequence[int]) -> list[int]:
    """Find the blocks in which a number of any layer is NaN or infinite; waits for the device."""
    spoiled: set[int] = set()
    for tensor in (tensor for pool in pools for tensor in pool.tensors):
        of_layer = tensor[torch.tensor(blocks, dtype=torch.long, device=tensor.device)]
        spoils = ~of_layer.flatten(1).isfinite().all(1)
        spoiled.update(block for block, is_spoiled in zip(blocks, spoils.tolist(), strict=True) if is_spoiled)
    return sorted(spoiled)


def resident_bytes(pools: Sequence[LayerPool], states: Iterable[torch.Tensor] = ()) -> int | None:
    """Count the bytes of CPU pools, and of states beside them, that are in main memory because they were written to.

    Returns:
        The bytes, in whole memory pages of the system. None for pools on other devices and on systems other than
        Linux.
    """
    tensors = [*(tensor for pool in pools for tensor in pool.tensors), *states]
    if any(tensor.device.type != "cpu" for tensor in tensors):
        return None
    counts = [_resident(tensor.data_ptr(), tensor.nbytes) for tensor in tensors]
    return None if None in counts else sum(count or 0 for count in counts)


# Main memory.

_mappings: weakref.WeakKeyDictionary[mmap.mmap, tuple[int, int]] = weakref.WeakKeyDictionary()
"""Address and bytes of every layer's pool in main memory that lives in this process."""


def _free_memory(device: torch.device) -> int:
    """Return the bytes that a new KV cache may take: not those that other ones in main memory may still fill."""
    free_bytes = available_memory(device)
    return max(0, free_bytes - _unwritten_bytes()) if device.type == "cpu" else free_bytes


def _check_room(needed_bytes: int) -> None:
    """Check that main memory has room for a KV cache beside the ones there are.

    Raises:
        NotEnoughMemoryError: If not. The system would tell only when the memory is written to, by ending the process.
    """
    if not needed_bytes:
        return
    free_bytes, unwritten_bytes = available_memory("cpu"), _unwritten_bytes()
    if needed_bytes <= free_bytes - unwritten_bytes:
        return
    others = f", of which other KV caches in this process may still fill {format_bytes(unwritten_bytes)}"
    msg = (
        f"a KV cache of {format_bytes(needed_bytes)} does not fit: {format_bytes(free_bytes)} of main memory are free"
        f"{others if unwritten_bytes else ''}; lower kv_cache_memory, unload other models, or free memory."
    )
    raise NotEnoughMemoryError(msg)


def _unwritten_bytes() -> int:
    """Count the bytes of all pools in main memory that were not written to so far; 0 where the system does not tell."""
    regions = list(_mappings.values())
    resident = [_resident(address, size) for address, size in regions]
    return sum(size - found for (_, size), found in zip(regions, resident, strict=True) if found is not None)


def _resident(address: int, size: int) -> int | None:
    """Count the bytes of a mapping that are in main memory, in whole memory pages; None on systems but Linux."""
    if sys.platform != "linux":
        return None
    held = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
    if ctypes.CDLL(None).mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), held):
        return None
    return min(size, bytes(held).count(1) * mmap.PAGESIZE)


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Allocate zeros, so that steps which are only timed compute with numbers."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # Fresh memory pages of the system, which it zeros when they are first touched. torch would touch all of them now,
    # and so does malloc with freed memory: a layer's pool may fit into what quantizing or repacking has freed.
    # No huge pages are asked for: reading is as fast without, and each layer would begin with 2 MiB.
    private = {} if sys.platform == "win32" else {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS}
    pages = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, **private)
    zeros = torch.frombuffer(pages, dtype=dtype).view(shape)  # which keeps the mapping alive
    _mappings[pages] = zeros.data_ptr(), zeros.nbytes
    return zeros

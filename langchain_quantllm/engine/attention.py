"""Attention over the blocks of the KV cache: by the Triton kernels, or gathered for PyTorch's attention.

Attention is chosen for a device when the engine is made. How a model's attention gets here is `attention_interface`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch.nn.functional import scaled_dot_product_attention

from langchain_quantllm.engine.block_manager import BLOCK_TOKENS
from langchain_quantllm.errors import UnsupportedError


@dataclass(frozen=True, kw_only=True)
class Span:
    """New tokens of one sequence in a packed forward.

    Args:
        slot: The sequence's row of the block table.
        first: Index of the first of these tokens in the pack.
        position: Position of that token in the sequence.
        count: New tokens.
    """

    slot: int
    first: int
    position: int
    count: int


@dataclass
class Batch:
    """The packed tokens of one forward.

    Args:
        table: Block table: the blocks of each sequence, of shape `(slots, blocks of a sequence)`, int32.
        slots: Row of the table of each token, of shape `(tokens,)`, int32.
        positions: Position of each token in its sequence, of shape `(tokens,)`, int32.
        spans: The same on the host; empty if only kernels that read the device are used.
        decodes: Whether each sequence has one new token.
        tiles: The spans cut for `kernels.attention.prefill_attention`, if they are on the device already.
        on_device: Tensors that the layers of one device share in this forward.
    """

    table: torch.Tensor
    slots: torch.Tensor
    positions: torch.Tensor
    spans: Sequence[Span]
    decodes: bool
    tiles: torch.Tensor | None = None
    on_device: dict[Any, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class LayerPool:
    """Keys and values of one layer: `kv` has the shape `(blocks, BLOCK_TOKENS, kv_heads, key_dim + value_dim)`."""

    kv: torch.Tensor
    key_dim: int

    @property
    def value_dim(self) -> int:
        """Size of a value, per head."""
        return int(self.kv.shape[-1]) - self.key_dim


_Function = TypeVar("_Function", bound=Callable[..., Any])


def without_gradients(function: _Function) -> _Function:
    """Run a function under `torch.no_grad`, and keep its type."""
    return torch.no_grad()(function)  # type: ignore[no-any-return]


class Attention(Protocol):
    """Stores keys and values in a pool, and attends to them.

    Attributes:
        prefills_on_device: Whether a prefill reads only tensors of the device, so that it can be a CUDA graph.
    """

    prefills_on_device: bool

    def write(self, pool: LayerPool, key: torch.Tensor, value: torch.Tensor, batch: Batch) -> None:
        """Store keys and values of shape `(1, kv_heads, tokens, dim)`."""
        ...

    def attend(
        self, pool: LayerPool, query: torch.Tensor, batch: Batch, *, scale: float, window: int, softcap: float
    ) -> torch.Tensor:
        """Attend with queries of shape `(1, heads, tokens, key_dim)`; returns `(1, tokens, heads, value_dim)`."""
        ...


class GatherAttention:
    """Gathers the blocks of a sequence and calls PyTorch's attention: for every device and dtype."""

    prefills_on_device = False

    def write(self, pool: LayerPool, key: torch.Tensor, value: torch.Tensor, batch: Batch) -> None:
        """Store keys and values; see `Attention.write`."""
        indices = _cached(batch, (key.device, "indices"), lambda: _pool_indices(batch, key.device))
        flat = pool.kv.view(-1, *pool.kv.shape[2:])
        flat.index_copy_(0, indices, torch.cat([key, value], -1)[0].transpose(0, 1))

    def attend(
        self, pool: LayerPool, query: torch.Tensor, batch: Batch, *, scale: float, window: int, softcap: float
    ) -> torch.Tensor:
        """Attend; see `Attention.attend`."""
        if batch.decodes:
            return self._decode(pool, query, batch, scale=scale, window=window, softcap=softcap)
        out = query.new_empty(1, query.shape[2], query.shape[1], pool.value_dim)
        for span in batch.spans:
            tokens = slice(span.first, span.first + span.count)
            length = span.position + span.count
            blocks = batch.table[span.slot, : -(-length // BLOCK_TOKENS)].to(pool.kv.device).long()
            key, value = _split(pool, pool.kv.index_select(0, blocks).flatten(0, 1)[None, :length])
            groups = query.shape[1] // key.shape[1]
            if groups > 1:
                key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
            is_plain = not span.position and (not window or window >= length)
            mask = None if is_plain else _visible(span.position, span.count, length, window, query.device)
            is_causal = is_plain and span.count > 1
            attended = _attend(query[:, :, tokens], key, value, mask, is_causal=is_causal, scale=scale, softcap=softcap)
            out[:, tokens] = attended.transpose(1, 2)
        return out

    def _decode(
        self, pool: LayerPool, query: torch.Tensor, batch: Batch, *, scale: float, window: int, softcap: float
    ) -> torch.Tensor:
        sequences = query.shape[2]
        device = pool.kv.device
        longest = max(span.position for span in batch.spans) + 1
        width = -(-longest // BLOCK_TOKENS)
        blocks = _cached(
            batch, (device, "blocks"), lambda: batch.table[batch.slots.long(), :width].flatten().to(device).long()
        )
        gathered = pool.kv.index_select(0, blocks).view(sequences, width * BLOCK_TOKENS, *pool.kv.shape[2:])
        key, value = _split(pool, gathered[:, :longest])
        mask = None
        if sequences > 1 or (window and window < longest):
            key_of_mask = (device, "mask", window)
            mask = _cached(batch, key_of_mask, lambda: _visible_to_each(batch.positions.to(device), longest, window))
        # The queries of a group of heads see the same keys: they are passed as several positions of one head.
        grouped = query[0].transpose(0, 1).unflatten(1, (key.shape[1], -1))
        attended = _attend(grouped, key, value, mask, is_causal=False, scale=scale, softcap=softcap)
        return attended.reshape(1, sequences, query.shape[1], -1)


def _cached(batch: Batch, key: Any, make: Callable[[], torch.Tensor]) -> torch.Tensor:
    value = batch.on_device.get(key)
    if value is None:
        value = batch.on_device[key] = make()
    return value


def _pool_indices(batch: Batch, device: torch.device) -> torch.Tensor:
    """Compute the index of each token's keys and values in the flattened pool, of shape `(tokens,)`."""
    positions = batch.positions.long()
    blocks = batch.table[batch.slots.long(), positions // BLOCK_TOKENS].long()
    return (blocks * BLOCK_TOKENS + positions % BLOCK_TOKENS).to(device)


def _split(pool: LayerPool, kv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Split `(sequences, tokens, kv_heads, dims)` into keys and values of `(sequences, kv_heads, tokens, dim)`."""
    kv = kv.transpose(1, 2)
    return kv[..., : pool.key_dim], kv[..., pool.key_dim :]


def _visible(position: int, count: int, length: int, window: int, device: torch.device) -> torch.Tensor:
    """Mask the keys that each new token of one sequence sees: `(count, length)`, bool."""
    ahead = torch.arange(position, position + count, device=device)[:, None] - torch.arange(length, device=device)
    return (ahead >= 0) & (ahead < window) if window else ahead >= 0


def _visible_to_each(positions: torch.Tensor, longest: int, window: int) -> torch.Tensor:
    """Mask the keys that the one new token of each sequence sees: `(sequences, 1, 1, longest)`, bool."""
    ahead = positions[:, None] - torch.arange(longest, device=positions.device)
    return ((ahead >= 0) & (ahead < window) if window else ahead >= 0)[:, None, None]


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    is_causal: bool,
    scale: float,
    softcap: float,
) -> torch.Tensor:
    """Attend with PyTorch; with a softcap in separate operations, as PyTorch's attention has none."""
    if not softcap:
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=is_causal, scale=scale)
    scores = softcap * torch.tanh(query @ key.transpose(-1, -2) * (scale / softcap))
    if is_causal:
        mask = _visible(0, query.shape[2], key.shape[2], 0, query.device)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1, dtype=torch.float32).to(value.dtype) @ value


_TRIED_TOLERANCE = 0.02
"""Largest relative error in `try_out`: some roundings to 16 bits. A missing one of 16 splits gives 0.25."""


class TritonAttention:
    """Attends in the blocks, without gathering them, by the Triton kernels; lengths stay on the device."""

    def __init__(self, kernels: Any, devices: Sequence[torch.device]) -> None:
        """Use the module `kernels.attention` on some GPUs."""
        properties = torch.cuda.get_device_properties(devices[0])
        self._kernels = kernels
        self._multiprocessors = properties.multi_processor_count
        self._arrivals = {device: kernels.arrivals(self._multiprocessors, device) for device in devices}
        self._changes_device = len(devices) > 1
        # Before Ampere, Triton multiplies without tensor cores: fast enough for a decode step, too slow for a prompt.
        self._prefills_by = GatherAttention() if properties.major < 8 else None
        self.prefills_on_device = self._prefills_by is None

    def write(self, pool: LayerPool, key: torch.Tensor, value: torch.Tensor, batch: Batch) -> None:
        """Store keys and values; see `Attention.write`."""
        table, slots, positions = self._metadata(batch, key.device)
        with self._on(key.device):
            self._kernels.write_kv(key, value, pool.kv, table, slots, positions)

    def attend(
        self, pool: LayerPool, query: torch.Tensor, batch: Batch, *, scale: float, window: int, softcap: float
    ) -> torch.Tensor:
        """Attend; see `Attention.attend`."""
        if self._prefills_by is not None and not batch.decodes:
            return self._prefills_by.attend(pool, query, batch, scale=scale, window=window, softcap=softcap)
        device = query.device
        table, slots, positions = self._metadata(batch, device)
        options = {"value_dim": pool.value_dim, "scale": scale, "window": window, "softcap": softcap}
        with self._on(device):
            if batch.decodes:
                splits = self._kernels.default_splits(len(slots), pool.kv.shape[2], self._multiprocessors)
                options |= {"splits": splits, "arrivals": self._arrivals[device]}
                return self._kernels.decode_attention(query, pool.kv, table, slots, positions, **options)
            tiles = batch.tiles
            if tiles is None or tiles.device != device:
                tiles = _cached(batch, (device, "tiles"), lambda: self._tiles(batch).to(device))
            return self._kernels.prefill_attention(query, pool.kv, table, tiles, **options)

    def try_out(self, pool: LayerPool) -> None:
        """Run the kernels of a decode step on one sequence, and compare with PyTorch's attention.

        Args:
            pool: A pool like the engine's, with enough blocks that several programs share a sequence. Written to.

        Raises:
            UnsupportedError: If the results differ.
        """
        (blocks, block_tokens, heads, _), device = pool.kv.shape, pool.kv.device
        made = torch.Generator(device).manual_seed(0)
        shapes = [(blocks * block_tokens, pool.key_dim), (blocks * block_tokens, pool.value_dim), (1, pool.key_dim)]
        key, value, query = (
            torch.randn(1, heads, *shape, generator=made, device=device).to(pool.kv.dtype) for shape in shapes
        )
        table = torch.arange(blocks, dtype=torch.int32, device=device)[None]
        positions = torch.arange(blocks * block_tokens, dtype=torch.int32, device=device)
        written = Batch(table=table, slots=torch.zeros_like(positions), positions=positions, spans=(), decodes=False)
        last = Batch(table=table, slots=written.slots[-1:], positions=positions[-1:], spans=(), decodes=True)
        scale = pool.key_dim**-0.5
        with torch.cuda.device(device):
            self.write(pool, key, value, written)
            expected = scaled_dot_product_attention(query.float(), key.float(), value.float(), scale=scale)[:, :, 0]
            for _ in range(2):  # the second call reuses the arrival counts
                attended = self.attend(pool, query, last, scale=scale, window=0, softcap=0.0)[:, 0].float()
                if not (attended - expected).norm() <= _TRIED_TOLERANCE * expected.norm():
                    msg = "its attention gives something else on this device"
                    raise UnsupportedError(msg)

    def _on(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        """Make a device the current one, on which Triton launches, if the layers are on several."""
        return torch.cuda.device(device) if self._changes_device else contextlib.nullcontext()

    def _metadata(self, batch: Batch, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if batch.table.device == device:
            return batch.table, batch.slots, batch.positions
        return (
            _cached(batch, (device, "table"), lambda: batch.table.to(device)),
            _cached(batch, (device, "slots"), lambda: batch.slots.to(device)),
            _cached(batch, (device, "positions"), lambda: batch.positions.to(device)),
        )

    def _tiles(self, batch: Batch) -> torch.Tensor:
        """Cut the spans into tiles; see `kernels.reference.prefill_attention`."""
        size = self._kernels.PREFILL_TILE
        tiles = [
            (span.slot, span.first + at, span.position + at, min(size, span.count - at))
            for span in batch.spans
            for at in range(0, span.count, size)
        ]
        return torch.tensor(tiles, dtype=torch.int32)


class PagedForward:
    """The attention of all layers in one forward of the engine."""

    def __init__(
        self,
        attention: Attention,
        pools: Sequence[LayerPool] | Mapping[int, LayerPool],
        batch: Batch,
        *,
        by_sdpa: bool,
    ) -> None:
        """Attend with the tokens of a batch.

        Args:
            attention: Reads and writes the pools.
            pools: The KV pool of each layer.
            batch: The tokens.
            by_sdpa: Whether the model calls PyTorch's attention itself, where the call is intercepted.
        """
        self._attention = attention
        self._pools = pools
        self._batch = batch
        self.by_sdpa = by_sdpa
        self._layer = -1
        self.windows: dict[int, int] = {}
        """Window of each layer that has attended, 0 for none; used to check the model."""

    def write(self, key: torch.Tensor, value: torch.Tensor, layer: int) -> torch.Tensor:
        """Store a layer's new keys and values; returns the keys."""
        self._layer = layer
        self._attention.write(self._pools[layer], key, value, self._batch)
        return key

    def rotate_and_write(
        self,
        kernels: Any,
        states: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        cos_sin: tuple[torch.Tensor, torch.Tensor],
        layer: int,
        *,
        layout: int,
        rounds: bool,
    ) -> torch.Tensor:
        """Rotate queries and keys, and store keys and values; returns the rotated queries.

        Args:
            kernels: `kernels.norms` or `kernels.reference`.
            states: Queries, keys and values, each of shape `(1, heads of its own, tokens, dim)`, on the device of the
                batch.
            cos_sin: Cosines and sines of shape `(1, tokens, rotary_dim)`.
            layer: The layer, which is the one that attends next.
            layout: See `kernels.reference.rotate_and_write`.
            rounds: See `kernels.reference.rotate_and_write`.
        """
        self._layer = layer
        batch = self._batch
        at = (self._pools[layer].kv, batch.table, batch.slots, batch.positions)
        query: torch.Tensor = kernels.rotate_and_write(*states, *cos_sin, *at, layout=layout, rounds=rounds)
        return query

    def attend(
        self, query: torch.Tensor, scale: float | None, window: int | None = None, softcap: float | None = None
    ) -> torch.Tensor:
        """Attend in the layer that was written last; returns `(1, tokens, heads, value_dim)`."""
        self.windows[self._layer] = window or 0
        return self._attention.attend(
            self._pools[self._layer],
            query,
            self._batch,
            scale=query.shape[-1] ** -0.5 if scale is None else scale,
            window=window or 0,
            softcap=softcap or 0.0,
        )

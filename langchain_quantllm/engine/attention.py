"""Attention over the blocks of the KV cache: its inputs, its interface, and all layers of one forward.

It is chosen for a device when the engine is made: `gather_attention` or `triton_attention`. How a model's attention
gets here is `attention_interface`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch

from langchain_quantllm.kernels import kv_quantization

_Value = TypeVar("_Value")


@dataclass(frozen=True, kw_only=True)
class Span:
    """New tokens of one sequence in a packed forward.

    Args:
        slot: The sequence's row of the block table.
        first: Index of the first of these tokens in the pack.
        position: Position of that token in the sequence.
        count: New tokens.
        groups: Bounds of runs of positions whose tokens all see each other, within the window, as those of an image
            may; a run ends within the span.
        groups_need_window: Whether they do so in layers with a window only.
    """

    slot: int
    first: int
    position: int
    count: int
    groups: tuple[tuple[int, int], ...] = ()
    groups_need_window: bool = False

    def groups_in(self, window: int) -> tuple[tuple[int, int], ...]:
        """Return the groups in layers with such a window, 0 for none."""
        return self.groups if window or not self.groups_need_window else ()


@dataclass
class Batch:
    """The packed tokens of one forward.

    Args:
        table: Block table: the blocks of each sequence, of shape `(slots, blocks of a sequence)`, int32.
        slots: Row of the table of each token, of shape `(tokens,)`, int32.
        positions: Position of each token in its sequence, of shape `(tokens,)`, int32.
        spans: The same on the host, in the order of the tokens; empty if only kernels that read the device are used.
        decodes: Whether every span is one token. A batch of prompts may have spans of one token as well, of sequences
            that decode beside them.
        tiles: The spans cut for `kernels.attention.prefill_attention`, if they are on the device already.
        new_blocks: The block that each token is written to, of shape `(tokens,)`, int32, where only the table of the
            first stage holds it; None otherwise.
        on_device: What the layers of one device share in this forward; see `cached`.
    """

    table: torch.Tensor
    slots: torch.Tensor
    positions: torch.Tensor
    spans: Sequence[Span]
    decodes: bool
    tiles: torch.Tensor | None = None
    new_blocks: torch.Tensor | None = None
    on_device: dict[Any, Any] = field(default_factory=dict)

    def cached(self, key: Any, make: Callable[[], _Value]) -> _Value:
        """Return what the layers share under a key, made by the first of them."""
        if key not in self.on_device:
            self.on_device[key] = make()
        value: _Value = self.on_device[key]
        return value


@dataclass(frozen=True, kw_only=True)
class LayerPool:
    """Keys and values of one layer: `kv` has the shape `(blocks, BLOCK_TOKENS, kv_heads, key_dim + value_dim)`.

    Args:
        kv: The numbers: each key followed by its value.
        key_dim: Size of a key, per head.
        is_latent: Whether a value belongs to the key as well, so that queries have the size of both; see
            `latent_attention`.
        index_keys: The keys of the layer's indexer, of shape `(blocks, BLOCK_TOKENS, dim)`; None if it has none. See
            `indexed_attention`.
        scales: The scales of a pool in 8 bits, whose `kv` holds codes; None for others. See `kv_quantization`.
        decoded_dtype: Dtype of the numbers that such codes are read as.
    """

    kv: torch.Tensor
    key_dim: int
    is_latent: bool = False
    index_keys: torch.Tensor | None = None
    scales: kv_quantization.KVScales | None = None
    decoded_dtype: torch.dtype | None = None

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All that the layer stores."""
        pairs = None if self.scales is None else self.scales.pairs
        return [tensor for tensor in (self.kv, self.index_keys, pairs) if tensor is not None]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the numbers that are read."""
        return self.decoded_dtype or self.kv.dtype

    def read(self, blocks: torch.Tensor) -> torch.Tensor:
        """Copy blocks, of shape `(n,)`, int64: `(n, BLOCK_TOKENS, kv_heads, key_dim + value_dim)` in `dtype`."""
        if self.scales is None:
            return self.kv.index_select(0, blocks)
        return kv_quantization.read(self.kv, self.scales, blocks, key_dim=self.key_dim, dtype=self.dtype)

    @property
    def value_dim(self) -> int:
        """Size of a value, per head."""
        return int(self.kv.shape[-1]) - self.key_dim

    @property
    def query_dim(self) -> int:
        """Size of a query, per head."""
        return int(self.kv.shape[-1]) if self.is_latent else self.key_dim


_Function = TypeVar("_Function", bound=Callable[..., Any])


def without_gradients(function: _Function) -> _Function:
    """Run a function under `torch.no_grad`, and keep its type."""
    return torch.no_grad()(function)  # type: ignore[no-any-return]


class Attention(Protocol):
    """Stores keys and values in a pool, and attends to them.

    A token's result depends on the keys and values that it sees and on nothing else: numbers that other sequences have
    left in a block, beyond the end of a sequence or outside of a window, are never used, be they NaN.

    Attributes:
        prefills_on_device: Whether a prefill reads only tensors of the device, so that it can be a CUDA graph.
    """

    prefills_on_device: bool

    def write(self, pool: LayerPool, key: torch.Tensor, value: torch.Tensor, batch: Batch) -> None:
        """Store keys and values of shape `(1, kv_heads, tokens, dim)`."""
        ...

    def attend(
        self,
        pool: LayerPool,
        query: torch.Tensor,
        batch: Batch,
        *,
        scale: float,
        window: int,
        softcap: float,
        chunk: int = 0,
        sinks: torch.Tensor | None = None,
        biases: torch.Tensor | None = None,
        relative: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend with queries of shape `(1, heads, tokens, query_dim)`.

        Args:
            pool: The layer's keys and values.
            query: The queries.
            batch: Their tokens.
            scale: Factor of the scores.
            window: How many of the last positions a token sees, its own included; 0 for all.
            softcap: Scores become `softcap * tanh(scores / softcap)`; 0 for no cap.
            chunk: A token sees its own chunk of so many positions, up to itself; 0 for all.
            sinks: See `kernels.reference.decode_attention`; on the device of the query. With `relative` they may be
                those of each token, of shape `(heads, tokens, 1)`.
            biases: See `kernels.reference.decode_attention`; on the device of the query, for all positions of the
                block table.
            relative: Added to the scores, by head, token and distance of the key, of shape `(heads, tokens,
                distances)`; keys further away get none. None for none, which kernels must be given.

        Returns:
            Attended values of shape `(1, tokens, heads, value_dim)`.
        """
        ...


AttentionArguments = tuple[float | None, int | None, float | None, int | None, torch.Tensor | None]
"""Scale, window, softcap, chunk and sinks, as `PagedForward.attend` takes them."""


class PagedForward:
    """The attention of all layers in one forward of the engine."""

    def __init__(
        self,
        attention: Attention,
        pools: Sequence[LayerPool] | Mapping[int, LayerPool],
        batch: Batch,
        *,
        by_sdpa: bool,
        on_layer: Callable[[int], None] | None = None,
    ) -> None:
        """Attend with the tokens of a batch.

        Args:
            attention: Reads and writes the pools.
            pools: The KV pool of each layer.
            batch: The tokens.
            by_sdpa: Whether the model calls PyTorch's attention itself, where the call is intercepted.
            on_layer: Called with each layer's number before its keys and values are written.
        """
        self._attention = attention
        self._pools = pools
        self._batch = batch
        self.by_sdpa = by_sdpa
        self._on_layer = on_layer
        self._layer = -1
        self.windows: dict[int, int] = {}
        """Window or chunk of each layer that has attended, 0 for none; used to check the model."""
        self.counting: set[int] = set()
        """Layers that have asked for `offsets`; used likewise."""
        self.choosing: set[int] = set()
        """Layers that have attended to chosen tokens; used likewise."""

    @property
    def batch(self) -> Batch:
        """The tokens."""
        return self._batch

    @property
    def layer(self) -> int:
        """Number of the layer that was written last; -1 before the first."""
        return self._layer

    def pool(self, layer: int) -> LayerPool:
        """Return the KV pool of a layer."""
        return self._pools[layer]

    def go_on(self, batch: Batch) -> None:
        """Go on with the same tokens on the device of another stage."""
        self._batch = batch

    @property
    def positions(self) -> int:
        """How many positions a sequence may have."""
        return int(self._batch.table.shape[1]) * int(self._pools[self._layer].kv.shape[1])

    def offsets(self, layer: int) -> torch.Tensor:
        """Return how far the position of each token is from its index in the pack: of shape `(tokens,)`, int32."""
        self.counting.add(layer)
        device, positions = self._pools[layer].kv.device, self._batch.positions

        def make() -> torch.Tensor:
            indices = torch.arange(len(positions), dtype=torch.int32, device=positions.device)
            return (positions - indices).to(device)

        return self._batch.cached((device, "offsets"), make)

    def write(self, key: torch.Tensor, value: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Store a layer's new keys and values; returns those that the model goes on with.

        Latents come with their rotated keys. The model makes keys and values from them, which nothing reads: those of
        one token are enough.
        """
        self._begin(layer)
        pool = self._pools[layer]
        if pool.is_latent:
            self._attention.write(pool, value, key, self._batch)
            return key[:, :, :1], value[:, :, :1]
        self._attention.write(pool, key, value, self._batch)
        return key, value

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
            kernels: `kernels.norms`, `.reference` or `.cpu`.
            states: Queries, keys and values, each of shape `(1, heads of its own, tokens, dim)`, on the device of the
                batch.
            cos_sin: Cosines and sines; see `kernels.reference.rotate_and_write`.
            layer: The layer, which is the one that attends next.
            layout: See `kernels.reference.rotate_and_write`.
            rounds: See `kernels.reference.rotate_and_write`.
        """
        batch = self._batch
        if hasattr(kernels, "rotate"):
            turn = self.rotation(kernels, cos_sin, layout)
            query, key = (
                kernels.rotate(part[0].transpose(0, 1), turn, layout=layout, rounds=rounds).transpose(0, 1)[None]
                for part in states[:2]
            )
            self.write(key, states[2], layer)
            return query
        self._begin(layer)
        pool = self._pools[layer]
        at = (pool.kv, batch.table, batch.slots, batch.positions)
        options = {"layout": layout, "rounds": rounds, "scales": pool.scales}
        rotated: torch.Tensor = kernels.rotate_and_write(*states, *cos_sin, *at, **options)
        return rotated

    def rotation(self, kernels: Any, cos_sin: tuple[torch.Tensor, torch.Tensor], layout: int) -> Any:
        """Return what `kernels.rotate` takes, made once for all layers with the same cosines and sines."""
        key = ("rotation", id(cos_sin[0]), layout)
        given, made = self._batch.cached(key, lambda: (cos_sin[0], kernels.rotation(*cos_sin, layout)))
        return made if given is cos_sin[0] else kernels.rotation(*cos_sin, layout)

    def write_and_attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        layer: int,
        arguments: AttentionArguments,
    ) -> torch.Tensor:
        """Store a layer's new keys and values, and attend, with tensors of shape `(tokens, heads of its own, dim)`.

        Returns:
            Attended values of shape `(1, tokens, heads * value_dim)`.
        """
        scale, window, softcap, chunk, sinks = arguments
        attend = getattr(self._attention, "decode", None)
        if attend is not None and self._batch.decodes and not softcap and sinks is None and layer in self._pools:
            self._begin(layer)
            self.windows[layer] = window or chunk or 0
            scale = query.shape[-1] ** -0.5 if scale is None else scale
            states = (query, key, value)
            attended: torch.Tensor = attend(
                self._pools[layer], states, self._batch, scale=scale, window=window or 0, chunk=chunk or 0
            )
            return attended
        query, key, value = (part.transpose(0, 1)[None] for part in (query, key, value))
        self.write(key, value, layer)
        return self.attend(query, *arguments).flatten(2)

    def _begin(self, layer: int) -> None:
        self._layer = layer
        if self._on_layer is not None:
            self._on_layer(layer)

    def attend(
        self,
        query: torch.Tensor,
        scale: float | None,
        window: int | None = None,
        softcap: float | None = None,
        chunk: int | None = None,
        sinks: torch.Tensor | None = None,
        biases: torch.Tensor | None = None,
        relative: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend in the layer that was written last; see `Attention.attend`. None is the default of each argument."""
        self.windows[self._layer] = window or chunk or 0
        of_tokens = {} if relative is None else {"relative": relative}
        return self._attention.attend(
            self._pools[self._layer],
            query,
            self._batch,
            scale=query.shape[-1] ** -0.5 if scale is None else scale,
            window=window or 0,
            softcap=softcap or 0.0,
            chunk=chunk or 0,
            sinks=sinks,
            biases=biases,
            **of_tokens,
        )

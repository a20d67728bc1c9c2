"""Attention over pages: how a transformers model, unchanged, reads and writes the KV pool.

Owns the attention function that a model is given for one forward of the engine, and the gathering implementation for
devices without Triton. Everything goes through what transformers leaves open: a `Cache`, a registered attention and
mask function. Which rows a forward runs for is the runner's business.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch.nn.functional import scaled_dot_product_attention

from langchain_quantllm.compat.transformers_attention import (
    INERT_ARGUMENTS,
    WritingCache,
    attention_name,
    attention_of,
    mask_maker_of,
    names_attention,
    register,
    set_attention_name,
)
from langchain_quantllm.engine.block_manager import BLOCK_TOKENS
from langchain_quantllm.errors import UnsupportedError


@dataclass(frozen=True, kw_only=True)
class Span:
    """New tokens of one row in a packed forward.

    Args:
        slot: The row of the page table.
        first: Place of its first token in the pack.
        position: Position of that token in the row.
        count: New tokens.
    """

    slot: int
    first: int
    position: int
    count: int


@dataclass
class Batch:
    """What the attention of one forward has to know of its packed tokens.

    Args:
        table: Page of each piece of each row, of shape `(slots, pages of a row)`, int32.
        slots: Row of the table for each token, of shape `(tokens,)`, int32.
        positions: Position of each token in its row, of shape `(tokens,)`, int32.
        spans: The same on the host; empty where the kernels that read the device suffice.
        decodes: Whether each row has one new token.
        blocks: The spans as the prefill kernel takes them, where they lie on the device.
    """

    table: torch.Tensor
    slots: torch.Tensor
    positions: torch.Tensor
    spans: Sequence[Span]
    decodes: bool
    blocks: torch.Tensor | None = None
    on_device: dict[Any, Any] = field(default_factory=dict)
    """What the layers of one device share in this forward."""


@dataclass(frozen=True, kw_only=True)
class LayerPool:
    """Keys and values of one layer: `kv` has the shape `(pages, BLOCK_TOKENS, kv_heads, key_dim + value_dim)`."""

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
    """How keys and values get into the pool, and what a query makes of them.

    Attributes:
        prefills_on_device: Whether prompts are read by what lies on the device, so that a graph can hold it.
    """

    prefills_on_device: bool

    def write(self, pool: LayerPool, key: torch.Tensor, value: torch.Tensor, batch: Batch) -> None:
        """Store keys and values of shape `(1, kv_heads, tokens, dim)`."""
        ...

    def attend(
        self, pool: LayerPool, query: torch.Tensor, batch: Batch, *, scale: float, window: int, softcap: float
    ) -> torch.Tensor:
        """Attend with queries of shape `(1, heads, tokens, key_dim)`; gives `(1, tokens, heads, value_dim)`."""
        ...


class GatherAttention:
    """Collects a row's pages and hands them to PyTorch's attention: for every device and dtype."""

    prefills_on_device = False

    def write(self, pool: LayerPool, key: torch.Tensor, value: torch.Tensor, batch: Batch) -> None:
        """Store keys and values; see `Attention.write`."""
        places = _cached(batch, (key.device, "places"), lambda: _places(batch, key.device))
        flat = pool.kv.view(-1, *pool.kv.shape[2:])
        flat.index_copy_(0, places, torch.cat([key, value], -1)[0].transpose(0, 1))

    def attend(
        self, pool: LayerPool, query: torch.Tensor, batch: Batch, *, scale: float, window: int, softcap: float
    ) -> torch.Tensor:
        """Attend; see `Attention.attend`."""
        if batch.decodes:
            return self._decode(pool, query, batch, scale=scale, window=window, softcap=softcap)
        out = query.new_empty(1, query.shape[2], query.shape[1], pool.value_dim)
        for span in batch.spans:
            rows = slice(span.first, span.first + span.count)
            length = span.position + span.count
            pages = batch.table[span.slot, : -(-length // BLOCK_TOKENS)].to(pool.kv.device).long()
            key, value = _split(pool, pool.kv.index_select(0, pages).flatten(0, 1)[None, :length])
            groups = query.shape[1] // key.shape[1]
            if groups > 1:
                key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
            is_plain = not span.position and (not window or window >= length)
            mask = None if is_plain else _visible(span.position, span.count, length, window, query.device)
            got = _attend(query[:, :, rows], key, value, mask, is_plain and span.count > 1, scale, softcap)
            out[:, rows] = got.transpose(1, 2)
        return out

    def _decode(
        self, pool: LayerPool, query: torch.Tensor, batch: Batch, *, scale: float, window: int, softcap: float
    ) -> torch.Tensor:
        rows = query.shape[2]
        device = pool.kv.device
        longest = max(span.position for span in batch.spans) + 1
        width = -(-longest // BLOCK_TOKENS)
        pages = _cached(
            batch, (device, "pages"), lambda: batch.table[batch.slots.long(), :width].flatten().to(device).long()
        )
        gathered = pool.kv.index_select(0, pages).view(rows, width * BLOCK_TOKENS, *pool.kv.shape[2:])
        key, value = _split(pool, gathered[:, :longest])
        mask = None
        if rows > 1 or (window and window < longest):
            at = (device, "mask", window)
            mask = _cached(batch, at, lambda: _visible_to_each(batch.positions.to(device), longest, window))
        # A group's queries see the same keys: they stand in the place of several positions of one head.
        grouped = query[0].transpose(0, 1).unflatten(1, (key.shape[1], -1))
        return _attend(grouped, key, value, mask, False, scale, softcap).reshape(1, rows, query.shape[1], -1)


def _cached(batch: Batch, at: Any, make: Callable[[], torch.Tensor]) -> torch.Tensor:
    value = batch.on_device.get(at)
    if value is None:
        value = batch.on_device[at] = make()
    return value


def _places(batch: Batch, device: torch.device) -> torch.Tensor:
    """Find where each token's keys and values go, as places of the pool laid flat, of shape `(tokens,)`."""
    positions = batch.positions.long()
    pages = batch.table[batch.slots.long(), positions // BLOCK_TOKENS].long()
    return (pages * BLOCK_TOKENS + positions % BLOCK_TOKENS).to(device)


def _split(pool: LayerPool, kv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Take `(rows, tokens, kv_heads, dims)` apart into keys and values of `(rows, kv_heads, tokens, dim)`."""
    kv = kv.transpose(1, 2)
    return kv[..., : pool.key_dim], kv[..., pool.key_dim :]


def _visible(position: int, count: int, length: int, window: int, device: torch.device) -> torch.Tensor:
    """Say which keys each of a row's new tokens sees: `(count, length)`, bool."""
    ahead = torch.arange(position, position + count, device=device)[:, None] - torch.arange(length, device=device)
    return (ahead >= 0) & (ahead < window) if window else ahead >= 0


def _visible_to_each(positions: torch.Tensor, longest: int, window: int) -> torch.Tensor:
    """Say which keys the one new token of each row sees: `(rows, 1, 1, longest)`, bool."""
    ahead = positions[:, None] - torch.arange(longest, device=positions.device)
    return ((ahead >= 0) & (ahead < window) if window else ahead >= 0)[:, None, None]


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
    scale: float,
    softcap: float,
) -> torch.Tensor:
    if not softcap:
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=is_causal, scale=scale)
    scores = softcap * torch.tanh(query @ key.transpose(-1, -2) * (scale / softcap))
    if is_causal:
        mask = _visible(0, query.shape[2], key.shape[2], 0, query.device)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1, dtype=torch.float32).to(value.dtype) @ value


_TRIED_TOLERANCE = 0.02
"""What is allowed in `try_out`, relative to the result: some roundings to 16 bits. A lost share of 16 is 0.25."""


class TritonAttention:
    """Reads the pages where they lie, by the kernels of this package; lengths stay on the device."""

    def __init__(self, kernels: Any, devices: Sequence[torch.device]) -> None:
        """Use the module `kernels.paged_attention` on these GPUs."""
        properties = torch.cuda.get_device_properties(devices[0])
        self._kernels = kernels
        self._multiprocessors = properties.multi_processor_count
        self._arrivals = {device: kernels.arrivals(self._multiprocessors, device) for device in devices}
        self._changes_device = len(devices) > 1
        # Before Ampere, Triton multiplies without tensor cores: no matter for one token, but for a prompt.
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
        given = {"value_dim": pool.value_dim, "scale": scale, "window": window, "softcap": softcap}
        with self._on(device):
            if batch.decodes:
                splits = self._kernels.default_splits(len(slots), pool.kv.shape[2], self._multiprocessors)
                given |= {"splits": splits, "arrivals": self._arrivals[device]}
                return self._kernels.decode_attention(query, pool.kv, table, slots, positions, **given)
            blocks = batch.blocks
            if blocks is None or blocks.device != device:
                blocks = _cached(batch, (device, "blocks"), lambda: self._blocks(batch).to(device))
            return self._kernels.prefill_attention(query, pool.kv, table, blocks, **given)

    def try_out(self, pool: LayerPool) -> None:
        """Run the kernels of a decode step on one row, to see whether they give on this machine what they should.

        Args:
            pool: One of the pools to come, of so many pages that several programs share a row of them. Written to.

        Raises:
            UnsupportedError: If they give something else.
        """
        (pages, page_tokens, heads, _), device = pool.kv.shape, pool.kv.device
        made = torch.Generator(device).manual_seed(0)
        shapes = [(pages * page_tokens, pool.key_dim), (pages * page_tokens, pool.value_dim), (1, pool.key_dim)]
        key, value, query = (
            torch.randn(1, heads, *shape, generator=made, device=device).to(pool.kv.dtype) for shape in shapes
        )
        table = torch.arange(pages, dtype=torch.int32, device=device)[None]
        positions = torch.arange(pages * page_tokens, dtype=torch.int32, device=device)
        written = Batch(table=table, slots=torch.zeros_like(positions), positions=positions, spans=(), decodes=False)
        last = Batch(table=table, slots=written.slots[-1:], positions=positions[-1:], spans=(), decodes=True)
        scale = pool.key_dim**-0.5
        with torch.cuda.device(device):
            self.write(pool, key, value, written)
            expected = scaled_dot_product_attention(query.float(), key.float(), value.float(), scale=scale)[:, :, 0]
            for _ in range(2):  # what counts the programs of a row is used again
                found = self.attend(pool, query, last, scale=scale, window=0, softcap=0.0)[:, 0].float()
                if not (found - expected).norm() <= _TRIED_TOLERANCE * expected.norm():
                    msg = "its attention gives something else on this device"
                    raise UnsupportedError(msg)

    def _on(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        """Make a device the current one, which Triton launches on, where the layers lie on several."""
        return torch.cuda.device(device) if self._changes_device else contextlib.nullcontext()

    def _metadata(self, batch: Batch, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if batch.table.device == device:
            return batch.table, batch.slots, batch.positions
        return (
            _cached(batch, (device, "table"), lambda: batch.table.to(device)),
            _cached(batch, (device, "slots"), lambda: batch.slots.to(device)),
            _cached(batch, (device, "positions"), lambda: batch.positions.to(device)),
        )

    def _blocks(self, batch: Batch) -> torch.Tensor:
        size = self._kernels.PREFILL_BLOCK
        blocks = [
            (span.slot, span.first + at, span.position + at, min(size, span.count - at))
            for span in batch.spans
            for at in range(0, span.count, size)
        ]
        return torch.tensor(blocks, dtype=torch.int32)


class Forward:
    """One forward of the engine, as the attention of the model sees it."""

    def __init__(
        self,
        attention: Attention,
        pools: Sequence[LayerPool] | Mapping[int, LayerPool],
        batch: Batch,
        *,
        by_sdpa: bool,
    ) -> None:
        """Run the packed tokens of `batch` over the pools of all layers."""
        self._attention = attention
        self._pools = pools
        self._batch = batch
        self._by_sdpa = by_sdpa
        self._layer = -1
        self.windows: dict[int, int] = {}
        """Window of each layer that attended, 0 for none; what a check of the model looks at."""

    def write(self, key: torch.Tensor, value: torch.Tensor, layer: int) -> torch.Tensor:
        """Store, and give the key back for the model to go on with."""
        self._layer = layer
        self._attention.write(self._pools[layer], key, value, self._batch)
        return key.as_subclass(_PagedKey) if self._by_sdpa else key

    def rotate_and_write(
        self,
        kernels: Any,
        states: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        angles: tuple[torch.Tensor, torch.Tensor],
        layer: int,
        *,
        layout: int,
        rounds: bool,
    ) -> torch.Tensor:
        """Rotate queries and keys and store, in one go; gives the rotated queries.

        Args:
            kernels: `kernels.fused` or `kernels.fused_reference`.
            states: Queries, keys and values, each of shape `(1, heads of its own, tokens, dim)`, on the device of the
                batch.
            angles: Cosines and sines of shape `(1, tokens, rotary_dim)`.
            layer: The layer, which is the one that attends next.
            layout: See `fused_reference.rotate_and_write`.
            rounds: See `fused_reference.rotate_and_write`.
        """
        self._layer = layer
        batch = self._batch
        query: torch.Tensor = kernels.rotate_and_write(
            *states,
            *angles,
            self._pools[layer].kv,
            batch.table,
            batch.slots,
            batch.positions,
            layout=layout,
            rounds=rounds,
        )
        return query

    def attend(
        self, query: torch.Tensor, scale: float | None, window: int | None = None, softcap: float | None = None
    ) -> torch.Tensor:
        """Attend in the layer that has just stored its keys; gives `(1, tokens, heads, value_dim)`."""
        self.windows[self._layer] = window or 0
        return self._attention.attend(
            self._pools[self._layer],
            query,
            self._batch,
            scale=query.shape[-1] ** -0.5 if scale is None else scale,
            window=window or 0,
            softcap=softcap or 0.0,
        )


class _PagedKey(torch.Tensor):  # type: ignore[misc]  # torch is not followed
    """A new key on its way to a direct call of PyTorch's attention, as models without a choice of attention make it."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        forward = getattr(_thread, "forward", None)
        if func is scaled_dot_product_attention and forward is not None:
            return forward.attend(args[0], (kwargs or {}).get("scale")).transpose(1, 2)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


_thread = threading.local()


def driven() -> Forward | None:
    """Give the forward of the engine that this thread is in; None where it is in none."""
    return getattr(_thread, "forward", None)


@contextlib.contextmanager
def driving(forward: Forward, configs: Sequence[Any]) -> Iterator[WritingCache]:
    """Let the model read pages in this thread, and give the cache to call it with.

    Meanwhile the configs name an attention of this package, which hands calls from other threads
    on to what the user has set; afterwards they are as before.

    Args:
        forward: The forward to be made.
        configs: Configs that the model's attention modules look at; none where PyTorch's attention is caught.
    """
    for config in configs:
        _borrow(config)
    _thread.forward = forward
    try:
        yield WritingCache(forward.write)
    finally:
        _thread.forward = None
        for config in configs:
            _give_back(config)


_borrowed: dict[int, tuple[str | None, int]] = {}
_borrowing = threading.Lock()


def _borrow(config: Any) -> None:
    """Have a config name our attention, for one more forward; the first one notes what it named before."""
    with _borrowing:
        name, forwards = _borrowed.get(id(config), (attention_name(config), 0))
        _borrowed[id(config)] = name, forwards + 1
        if not forwards:
            set_attention_name(config, _register(name))


def _give_back(config: Any) -> None:
    with _borrowing:
        name, forwards = _borrowed.pop(id(config))
        if forwards > 1:
            _borrowed[id(config)] = name, forwards - 1
        elif attention_name(config) == _register(name):  # not set anew by somebody else
            set_attention_name(config, name)


_registered: dict[str | None, str] = {}


def _register(name: str | None) -> str:
    """Register, once, an attention that stands in for another one wherever this thread has no forward of ours."""
    if name in _registered:
        return _registered[name]
    # Not by its own name: "flash" in it would have transformers prepare for flash attention.
    ours = f"quantllm_{len(_registered)}"

    def attend(
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        forward = getattr(_thread, "forward", None)
        if forward is None:
            theirs = attention_of(name, module)
            return theirs(module, query, key, value, attention_mask, *args, **kwargs)  # type: ignore[no-any-return]
        scale, window, softcap = (kwargs.pop(n, None) for n in ("scaling", "sliding_window", "softcap"))
        if name == "sdpa":  # which older transformers lets ignore the cap of Gemma 2; `generate` is what counts
            softcap = None
        unknown = [n for n, given in kwargs.items() if given is not None and not n.startswith("output_")]
        unknown = [n for n in unknown if n not in INERT_ARGUMENTS]
        if unknown:
            msg = f"its attention takes {unknown[0]!r}"
            raise UnsupportedError(msg)
        return forward.attend(query, scale, window, softcap), None

    def make_mask(*args: Any, **kwargs: Any) -> Any:
        if getattr(_thread, "forward", None) is not None:
            return None  # the pages say what is visible
        return mask_maker_of(name)(*args, **kwargs)

    register(ours, attend, make_mask)
    _registered[name] = ours
    return ours


def configs_of(model: torch.nn.Module) -> list[Any]:
    """List the configs that the modules of a model hold, each once."""
    found = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    return [config for config in found.values() if names_attention(config)]

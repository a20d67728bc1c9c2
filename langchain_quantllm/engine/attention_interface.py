"""The attention of a transformers model, unchanged, over the blocks of the KV cache.

Uses what transformers leaves open: a `Cache` that takes the new keys and values, and an attention and a mask function
registered under names of this package. In other threads, and outside the engine's forwards, they hand on to the
attention that the user has set.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

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
from langchain_quantllm.engine.attention import Attention, Batch, LayerPool
from langchain_quantllm.engine.forward_context import ForwardContext, current_context, forward_context
from langchain_quantllm.errors import UnsupportedError


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
        self._by_sdpa = by_sdpa
        self._layer = -1
        self.windows: dict[int, int] = {}
        """Window of each layer that has attended, 0 for none; used to check the model."""

    def write(self, key: torch.Tensor, value: torch.Tensor, layer: int) -> torch.Tensor:
        """Store a layer's new keys and values; returns the keys that the model goes on with."""
        self._layer = layer
        self._attention.write(self._pools[layer], key, value, self._batch)
        return key.as_subclass(_InterceptedKey) if self._by_sdpa else key

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


def _current_attention() -> PagedForward | None:
    context = current_context()
    return None if context is None else context.attention


class _InterceptedKey(torch.Tensor):  # type: ignore[misc]  # torch is not followed
    """A new key of a model that calls PyTorch's attention directly: the call attends over the blocks instead."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        forward = _current_attention()
        if func is scaled_dot_product_attention and forward is not None:
            return forward.attend(args[0], (kwargs or {}).get("scale")).transpose(1, 2)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def paged_attention(context: ForwardContext, configs: Sequence[Any]) -> Iterator[WritingCache]:
    """Enter a context and let the model attend over its blocks in this thread; yields the cache to call it with.

    The configs name an attention of this package inside the block, and the one before afterwards.

    Args:
        context: The forward to run, with its `attention`.
        configs: Configs that the model's attention modules read; none if PyTorch's attention is intercepted.
    """
    assert context.attention is not None
    for config in configs:
        _borrow(config)
    try:
        with forward_context(context):
            yield WritingCache(context.attention.write)
    finally:
        for config in configs:
            _give_back(config)


_borrowed: dict[int, tuple[str | None, int]] = {}
"""By the config's id: the attention that it named before, and how many forwards use it now."""
_borrowing = threading.Lock()


def _borrow(config: Any) -> None:
    """Set a config's attention to ours for one more forward; the first one notes the name before."""
    with _borrowing:
        name, forwards = _borrowed.get(id(config), (attention_name(config), 0))
        _borrowed[id(config)] = name, forwards + 1
        if not forwards:
            set_attention_name(config, _register(name))


def _give_back(config: Any) -> None:
    """Count one forward less; the last one restores the name, unless other code has set a new one."""
    with _borrowing:
        name, forwards = _borrowed.pop(id(config))
        if forwards > 1:
            _borrowed[id(config)] = name, forwards - 1
        elif attention_name(config) == _register(name):
            set_attention_name(config, name)


_registered: dict[str | None, str] = {}


def _register(name: str | None) -> str:
    """Register, once, an attention that hands on to the one called `name` outside the engine's forwards."""
    if name in _registered:
        return _registered[name]
    # Numbered, not named after the other one: transformers prepares for flash attention if "flash" is in the name.
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
        forward = _current_attention()
        if forward is None:
            theirs = attention_of(name, module)
            return theirs(module, query, key, value, attention_mask, *args, **kwargs)  # type: ignore[no-any-return]
        scale, window, softcap = (kwargs.pop(n, None) for n in ("scaling", "sliding_window", "softcap"))
        if name == "sdpa":  # older transformers ignores the cap of Gemma 2 there, and `generate` is our measure
            softcap = None
        unknown = [n for n, value in kwargs.items() if value is not None and not n.startswith("output_")]
        unknown = [n for n in unknown if n not in INERT_ARGUMENTS]
        if unknown:
            msg = f"its attention takes {unknown[0]!r}"
            raise UnsupportedError(msg)
        return forward.attend(query, scale, window, softcap), None

    def make_mask(*args: Any, **kwargs: Any) -> Any:
        if _current_attention() is not None:
            return None  # positions and blocks say which keys are visible
        return mask_maker_of(name)(*args, **kwargs)

    register(ours, attend, make_mask)
    _registered[name] = ours
    return ours


def configs_of(model: torch.nn.Module) -> list[Any]:
    """List the configs that the modules of a model hold, each once."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    return [config for config in configs.values() if names_attention(config)]

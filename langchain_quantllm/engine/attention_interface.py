"""The attention of a transformers model, unchanged, over the blocks of the KV cache.

Uses what transformers leaves open: a `Cache` that takes the new keys and values, and an attention and a mask function
registered under names of this package. In other threads, and outside the engine's forwards, they hand on to the
attention that the user has set.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from langchain_quantllm.compat.transformers_alibi import ignored_mask
from langchain_quantllm.compat.transformers_attention import (
    INERT_ARGUMENTS,
    WritingCache,
    attends_to_text,
    attention_name,
    attention_of,
    chunk_of,
    heads_in_turn,
    mask_maker_of,
    names_attention,
    register,
    set_attention_name,
)
from langchain_quantllm.compat.transformers_indexers import (
    INDICES_ARGUMENT,
    MASKED_ATTENTIONS,
    hide_unchosen,
    ignored_index_mask,
)
from langchain_quantllm.compat.transformers_relative import passes_relative_bias
from langchain_quantllm.engine.attention import PagedForward
from langchain_quantllm.engine.chosen_attention import attend_to_chosen
from langchain_quantllm.engine.forward_context import ForwardContext, current_context, forward_context
from langchain_quantllm.errors import UnsupportedError


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


_Write = Callable[[torch.Tensor, torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]


def _intercepted(attention: PagedForward) -> _Write:
    """Write as `attention` does, and let the model go on with keys whose attention is intercepted."""

    def write(key: torch.Tensor, value: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        key, value = attention.write(key, value, layer)
        return key.as_subclass(_InterceptedKey), value

    return write


@contextlib.contextmanager
def paged_attention(context: ForwardContext, configs: Sequence[Any]) -> Iterator[WritingCache]:
    """Enter a context and let the model attend over its blocks in this thread; yields the cache to call it with.

    The configs name an attention of this package inside the block, and the one before afterwards.

    Args:
        context: The forward to run, with its `attention`.
        configs: Configs that the model's attention modules read; none if PyTorch's attention is intercepted.
    """
    attention = context.attention
    assert attention is not None
    for config in configs:
        _borrow(config)
    try:
        with forward_context(context):
            yield WritingCache(_intercepted(attention) if attention.by_sdpa else attention.write, attention.offsets)
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


def users_attention_name(config: Any) -> str | None:
    """Return the attention that a config names outside the engine's forwards; None if it names none."""
    borrowed = _borrowed.get(id(config))
    if borrowed is not None:
        return borrowed[0]
    return attention_name(config) if names_attention(config) else None


_SCORING_ARGUMENTS = ("scaling", "sliding_window", "softcap", "s_aux")
"""How models call the scale, the window, the cap and the sinks that they pass to their attention."""

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
        context = current_context()
        forward = None if context is None else context.attention
        if context is None or forward is None or not attends_to_text(module):
            theirs = attention_of(name, module)
            if name in MASKED_ATTENTIONS and (chosen := kwargs.pop(INDICES_ARGUMENT, None)) is not None:
                attention_mask = hide_unchosen(attention_mask, chosen, key.shape[2])
            return theirs(module, query, key, value, attention_mask, *args, **kwargs)  # type: ignore[no-any-return]
        scale, window, softcap, sinks = (kwargs.pop(n, None) for n in _SCORING_ARGUMENTS)
        chosen, relative = kwargs.pop(INDICES_ARGUMENT, None), None
        if context.biases_by_distance and passes_relative_bias(module):
            relative, sinks = (_by_token(kwargs.pop(n, None)) for n in ("position_bias", "sinks"))
        if name == "sdpa":  # older transformers ignores the cap of Gemma 2 there, and `generate` is our measure
            softcap = None
        unknown = [n for n, value in kwargs.items() if value is not None and not n.startswith("output_")]
        unknown = [n for n in unknown if n not in INERT_ARGUMENTS]
        if unknown:
            msg = f"its attention takes {unknown[0]!r}"
            raise UnsupportedError(msg)
        scoring = (window, softcap, chunk_of(module), sinks)
        if key_heads := heads_in_turn(module):
            attended = forward.attend(_reordered(query, 1, -1, key_heads), scale, *scoring)
            return _reordered(attended, 2, key_heads, -1), None
        attend_paged: Any = forward.attend
        if chosen is not None:
            attend_paged = functools.partial(attend_to_chosen, forward, chosen)
        elif relative is not None:
            attend_paged = functools.partial(forward.attend, relative=relative)
        absorption = context.absorptions.get(id(module))
        if absorption is None:
            return attend_paged(query, scale, *scoring), None
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        return absorption.expand(attend_paged(absorption.absorb(query), scale, *scoring)), None

    def make_mask(*args: Any, **kwargs: Any) -> Any:
        if _current_attention() is not None:
            mask = ignored_mask(kwargs.get("config"))  # positions and blocks say which keys are visible
            return ignored_index_mask(kwargs.get("config")) if mask is None else mask
        return mask_maker_of(name)(*args, **kwargs)

    register(ours, attend, make_mask)
    _registered[name] = ours
    return ours


def _by_token(scores: torch.Tensor | None) -> torch.Tensor | None:
    """Turn scores of each query of shape `(1, heads, tokens, n)` into those of `(heads, tokens, n)`."""
    return None if scores is None else scores[0]


def _reordered(states: torch.Tensor, dim: int, *sizes: int) -> torch.Tensor:
    """Turn heads that are in the order of two indices of such sizes into the order of the second and the first one."""
    return states.unflatten(dim, sizes).transpose(dim, dim + 1).flatten(dim, dim + 1)


def configs_of(model: torch.nn.Module) -> list[Any]:
    """List the configs that the modules of a model hold, each once."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    return [config for config in configs.values() if names_attention(config)]

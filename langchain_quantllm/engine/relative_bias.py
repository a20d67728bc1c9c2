"""Biases of scores by the distance of a key, which depend on the query, over the blocks of the KV cache.

A model computes them for each query and key of a text. Here it computes them for each query and distance, and the
attention takes those of the keys that the query sees.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from langchain_quantllm.compat.transformers_attention import WritingCache
from langchain_quantllm.compat.transformers_relative import counts_by_cache, is_relative_bias, profiles_of
from langchain_quantllm.engine.forward_context import ForwardContext
from langchain_quantllm.engine.forward_patch import ForwardPatch


class RelativeBiases:
    """Replaces the modules of a model that compute such biases in the engine's forwards, until `close`."""

    def __init__(self, model: Any) -> None:
        """Patch the modules; none if the model has no such biases."""
        self._model = model
        self._patches: list[ForwardPatch] = []
        self.build()

    def build(self) -> None:
        """Find the modules anew, as after a change of the model."""
        self.close()
        modules = list(self._model.modules())
        self._patches = [ForwardPatch(module, _compute) for module in modules if is_relative_bias(module)]
        self.count = len(self._patches)
        """How many modules compute such biases."""
        self._patches += [ForwardPatch(module, _count) for module in modules if counts_by_cache(module)]

    def close(self) -> None:
        """Restore every module's `forward`."""
        for patch in self._patches:
            patch.close()
        self._patches = []


def _compute(
    context: ForwardContext, module: Any, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Compute biases by distance."""
    if context.attention is None:
        return forward(*args, **kwargs)
    context.biases_by_distance = True
    return profiles_of(module, args, kwargs)


def _count(
    context: ForwardContext, module: Any, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Run an attention that asks its cache where its queries are: let the cache answer."""
    caches = [value for value in (*args, *kwargs.values()) if isinstance(value, WritingCache)]
    if context.attention is None or not caches:
        return forward(*args, **kwargs)
    caches[0].answers_queries = True
    try:
        return forward(*args, **kwargs)
    finally:
        caches[0].answers_queries = False

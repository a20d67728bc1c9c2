"""Biases of scores by the distance of a key, which depend on the query, over the blocks of the KV cache.

A model computes them for each query and key of a text. Here it computes them for each query and distance, and the
attention takes those of the keys that the query sees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from langchain_quantllm.compat.transformers_attention import WritingCache
from langchain_quantllm.compat.transformers_relative import counts_by_cache, is_relative_bias, profiles_of
from langchain_quantllm.engine.forward_context import ForwardContext
from langchain_quantllm.engine.forward_patch import PatchedModules, Replacement


class RelativeBiases(PatchedModules):
    """Replaces the modules of a model that compute such biases, and those that ask a cache where queries are.

    Attributes:
        count: How many modules compute such biases.
    """

    def _find(self) -> Iterable[tuple[Any, Replacement]]:
        modules = list(self._model.modules())
        biases = [module for module in modules if is_relative_bias(module)]
        self.count = len(biases)
        yield from ((module, _compute) for module in biases)
        yield from ((module, _count) for module in modules if counts_by_cache(module))


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

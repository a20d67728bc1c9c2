"""Attention modules that compute their scores by themselves, over the blocks of the KV cache.

In the engine's forwards they run their own projections with the attention of the forward between them. Knows no model:
the parts of each stand in `compat.transformers_own_attentions`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from langchain_quantllm.compat.transformers_own_attentions import (
    computes_scores_itself,
    layer_of,
    run_attention,
    uncached_heads,
    value_repeats_of,
    window_of,
)
from langchain_quantllm.engine.forward_context import ForwardContext
from langchain_quantllm.engine.forward_patch import PatchedModules, Replacement
from langchain_quantllm.engine.kv_cache import LayerShape


class OwnAttention(PatchedModules):
    """Replaces such modules of a model in the engine's forwards, until `close`."""

    def _find(self) -> Iterable[tuple[Any, Replacement]]:
        modules = [module for module in self._model.modules() if computes_scores_itself(module)]
        layers = [place if (layer := layer_of(module)) is None else layer for place, module in enumerate(modules)]
        self._layers = {id(module): layer for module, layer in zip(modules, layers, strict=True)}
        self._windows = {layer: window_of(module) for module, layer in zip(modules, layers, strict=True)}
        self._value_repeats = {layer: value_repeats_of(module) for module, layer in zip(modules, layers, strict=True)}
        return ((module, self._attend) for module in modules)

    @property
    def uncached(self) -> list[LayerShape]:
        """What each layer of a model without a cache would keep in one; empty for other models."""
        modules = [module for module in self._model.modules() if computes_scores_itself(module)]
        return [_uncached_shape(self._model, module) for module in modules if uncached_heads(module) is not None]

    def windows(self, layers: Sequence[int], of_cache: Sequence[int]) -> list[int]:
        """Return the window of each layer, 0 for none, which the model's own cache may not know.

        Args:
            layers: Numbers of the layers that keep keys and values.
            of_cache: The windows that the cache knows.
        """
        return [self._windows.get(layer) or known for layer, known in zip(layers, of_cache, strict=True)]

    def shapes(self, layers: Sequence[int], of_cache: Sequence[LayerShape]) -> list[LayerShape]:
        """Return what each layer writes, by what it keeps in the model's own cache; see `windows`."""
        return [
            replace(shape, value_dim=shape.value_dim * self._value_repeats.get(layer, 1))
            for layer, shape in zip(layers, of_cache, strict=True)
        ]

    def _attend(
        self,
        context: ForwardContext,
        module: Any,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        attention = context.attention
        if attention is None:
            return forward(*args, **kwargs)

        def attend(
            query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None = None
        ) -> torch.Tensor:
            attention.write(key, value, self._layers[id(module)])
            return attention.attend(query, scale, window_of(module))

        return run_attention(module, attend, args, kwargs)


def _uncached_shape(model: Any, module: Any) -> LayerShape:
    heads = uncached_heads(module)
    assert heads is not None
    return LayerShape(
        kv_heads=heads[0],
        key_dim=heads[1],
        value_dim=heads[1],
        dtype=model.get_input_embeddings().weight.dtype,
        device=next(module.parameters()).device,
    )

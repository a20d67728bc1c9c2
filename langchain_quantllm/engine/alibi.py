"""The attention of models that bias scores by distance (ALiBi), over the blocks of the KV cache.

Source: https://arxiv.org/abs/2108.12409, section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from langchain_quantllm.compat.transformers_alibi import attend_biased, biases_of, has_known_biases
from langchain_quantllm.engine.forward_context import ForwardContext
from langchain_quantllm.engine.forward_patch import PatchedModules, Replacement


class BiasedAttention(PatchedModules):
    """Replaces the attention modules of a model in the engine's forwards, and keeps their biases."""

    def __init__(self, model: Any) -> None:
        """Patch the modules; none if the model has no such biases."""
        self._biases: dict[Any, torch.Tensor] = {}
        super().__init__(model)

    def _find(self) -> Iterable[tuple[Any, Replacement]]:
        return ((module, self._attend) for module in self._model.modules() if has_known_biases(module))

    def close(self) -> None:
        """Restore every module's `forward`, and free the biases."""
        super().close()
        self._biases = {}

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
            query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layer: int, scale: float
        ) -> torch.Tensor:
            attention.write(key, value, layer)
            biases = self._biases_of(module, attention.positions, query)
            return attention.attend(query, scale, biases=biases).flatten(2)

        return attend_biased(module, attend, args, kwargs)

    def _biases_of(self, module: Any, positions: int, query: torch.Tensor) -> torch.Tensor:
        """Return the biases of a module's heads, made in the first forward: a CUDA graph reads them later."""
        key = (type(module), query.shape[1], positions, query.dtype, query.device)
        if key not in self._biases:
            self._biases[key] = biases_of(module, positions, query.dtype, query.device)
        return self._biases[key]

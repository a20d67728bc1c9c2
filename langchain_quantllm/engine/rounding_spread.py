"""How far a model's own logits move in 16 bits when each of its layers rounds differently.

A model whose forward computes every token by itself, in the same order of operations, differs from itself by nothing,
however it is cut in pieces; another way to compute the same still rounds otherwise, and many layers let that grow.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch

from langchain_quantllm.engine.forward_context import ForwardContext
from langchain_quantllm.engine.forward_patch import PatchedModules, Replacement


class RoundedLayers(PatchedModules):
    """A model's layers, whose outputs are off by about one rounding of their dtype in this thread's forwards."""

    def __init__(self, model: Any, *, seed: int = 0) -> None:
        """Patch the layers until `close`."""
        self._thread = threading.get_ident()
        self._made = torch.Generator().manual_seed(seed)
        super().__init__(model)

    def _find(self) -> Iterable[tuple[Any, Replacement]]:
        lists = [module for module in self._model.modules() if isinstance(module, torch.nn.ModuleList)]
        lists = [layers for layers in lists if all(map(_is_layer, layers))]
        count = getattr(self._model.config.get_text_config(), "num_hidden_layers", None)
        return ((layer, self._run) for layer in max(lists, key=lambda one: (len(one) == count, len(one)), default=()))

    def _run(
        self,
        context: ForwardContext,
        module: Any,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        del context, module
        output = forward(*args, **kwargs)
        if threading.get_ident() != self._thread:
            return output
        if isinstance(output, tuple):
            return (self._rounded(output[0]), *output[1:])
        return self._rounded(output)

    def _rounded(self, hidden: Any) -> Any:
        if not isinstance(hidden, torch.Tensor) or not hidden.is_floating_point():
            return hidden
        share = torch.randn(hidden.shape, generator=self._made, dtype=torch.float32).to(hidden.device) * (
            torch.finfo(hidden.dtype).eps / 2
        )
        return (hidden.float() * (1 + share)).to(hidden.dtype)


def _is_layer(module: torch.nn.Module) -> bool:
    """Whether a module is a layer of the text model: something in it has a place in the cache."""
    return any(isinstance(getattr(part, "layer_idx", None), int) for part in module.modules())

"""Products with quantized weights as they are stored, in the place of what the library that made them computes.

Owns the step of one linear layer, which computes the layers that are given the same input with it. How a product is
computed is the kernels' business, and whether it gives what the layer gives `product_checks`'s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch

from langchain_quantllm.kernels.linear.cpu import share_memory
from langchain_quantllm.kernels.linear.weights import FourBitWeight, Int8Weight, RepackedWeight, Weight


class Products:
    """What one forward has computed already, for the layers that will be given the same input."""

    def __init__(self) -> None:
        """Hold nothing."""
        self._input: torch.Tensor | None = None
        self._version = 0
        self._found: dict[int, torch.Tensor] = {}

    def put(self, x: torch.Tensor, found: dict[int, torch.Tensor]) -> None:
        """Hold what layers will give for an input, by their ids; forget what was held for another."""
        self._input, self._version, self._found = x, x._version, found

    def take(self, x: torch.Tensor, layer_id: int) -> torch.Tensor | None:
        """Give what is held for this layer and this very tensor, unchanged since; else None."""
        if self._input is None or x is not self._input or x._version != self._version:
            return None
        found = self._found.pop(layer_id, None)
        if not self._found:
            self._input = None
        return found


@dataclass(frozen=True, kw_only=True)
class ProductStep:
    """A linear layer over a quantized weight.

    Args:
        kernels: `kernels.dispatch`, `kernels.linear_reference` or `kernels.cpu_linear`.
        weight: The layer's weight.
        together: Ids and weights of the layers that the model gives the same input, this one among them; empty where
            there are no others, or not of the same layout.
    """

    kernels: Any
    weight: Weight
    together: tuple[tuple[int, Weight], ...] = ()

    @property
    def is_exact(self) -> bool:
        """Whether it leaves out a rounding that the layer makes, and so differs from it."""
        return isinstance(self.weight, Int8Weight)

    @property
    def is_whole(self) -> bool:
        """Whether the layer itself is never called."""
        return not isinstance(self.weight, FourBitWeight) or math.isinf(self.kernels.MOST_FOUR_BIT_ROWS)

    def takes(self, x: torch.Tensor) -> bool:
        """Whether it is the step that multiplies activations of shape `(..., in_features)`, rather than the layer."""
        return self.is_whole or x.numel() <= self.kernels.MOST_FOUR_BIT_ROWS * x.shape[-1]

    def run(
        self, module: Any, forward: Callable[..., Any], carried: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Multiply; see `fused_layers.Step.run`."""
        if len(args) != 1 or kwargs or not self.takes(args[0]):
            return forward(*args, **kwargs)
        x = args[0]
        if not self.together:
            return self.kernels.quantized_linear(x, self.weight, self.weight.bias).to(x.dtype)
        found = carried.products.take(x, id(module))
        if found is None:
            outputs = self.kernels.grouped_linear(x, [weight for _, weight in self.together])
            others = {key: out.to(x.dtype) for (key, _), out in zip(self.together, outputs, strict=True)}
            found = others.pop(id(module))
            carried.products.put(x, others)
        return found


def put_together(steps: dict[int, ProductStep], given: Mapping[int, tuple[Any, Any]]) -> dict[int, ProductStep]:
    """Let the steps of layers that were given the same tensor know of each other.

    Args:
        steps: Steps by their layers' ids.
        given: The layer, and what one forward of the model gave it, by the layers' ids.

    Returns:
        The same dictionary.
    """
    groups: dict[tuple[Any, ...], list[int]] = {}
    for key, step in steps.items():
        groups.setdefault((id(given[key][1]), step.weight.layout), []).append(key)
    for keys in groups.values():
        weights: Sequence[Weight] = [steps[key].weight for key in keys]
        if len({weight.words.data_ptr() for weight in weights}) < max(2, len(keys)):
            continue  # there is one only, or one twice
        if all(isinstance(weight, RepackedWeight) for weight in weights):
            modules = [given[key][0] for key in keys]
            weights = share_memory(modules, cast("list[RepackedWeight]", weights))
        together = tuple(zip(keys, weights, strict=True))
        for key, weight in together:  # in place, so that memory that is not shared any more is free
            steps[key] = replace(steps[key], weight=weight, together=together)
    return steps

"""Sequences with different LoRA adapters in one forward.

Each layer's adapters are stacked into one pair of matrices, and each token keeps the ranks of its own adapter. Source:
https://arxiv.org/abs/2106.09685, section 4, for the layer; https://arxiv.org/abs/2310.18547 for batching several
adapters, here with a mask in place of gathered weights, so that a step can be a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.functional import linear

from langchain_quantllm.compat.peft import adapter_modules, base_layer_of, lora_matrices, unsupported_lora_reason
from langchain_quantllm.engine.adapter_choice import AdapterChoice, StackedLayer
from langchain_quantllm.engine.adapter_switch import unsupported, why_not_switched
from langchain_quantllm.engine.forward_context import ForwardContext
from langchain_quantllm.engine.forward_patch import ForwardPatch
from langchain_quantllm.errors import UnsupportedError
from langchain_quantllm.options import BASE_ADAPTER

NO_ADAPTER = -1
"""Number of the model without any adapter."""


class LoraStack:
    """All LoRA adapters of a model, stacked layer by layer."""

    def __init__(self, model: Any, names: Sequence[str]) -> None:
        """Stack the adapters, and patch peft's layers.

        Args:
            model: A model of transformers with LoRA layers of peft.
            names: The adapters; their numbers are their indices here.

        Raises:
            UnsupportedError: If an adapter is more than plain LoRA of linear layers.
        """
        self.names = tuple(names)
        self._model = model
        self._patches: list[ForwardPatch] = []
        self._layers: dict[int, StackedLayer] = {}
        self.build()

    def number_of(self, name: str | None) -> int:
        """Return the number of an adapter; `NO_ADAPTER` for the base model."""
        return NO_ADAPTER if name in (None, BASE_ADAPTER) else self.names.index(str(name))

    def build(self) -> None:
        """Stack the adapters anew, from their current weights.

        Raises:
            UnsupportedError: If they cannot be stacked; nothing is patched then.
        """
        self.close()
        if (reason := why_not_stacked(self._model, self.names)) is not None:
            raise unsupported(reason)
        head = self._model.get_output_embeddings()
        owners: dict[Any, torch.Tensor] = {}
        for module in adapter_modules(self._model):
            if (layer := _stack(module, self.names, owners, is_head=module is head)) is not None:
                self._layers[id(module)] = layer
            self._patches.append(ForwardPatch(module, _run_stacked))

    def close(self) -> None:
        """Restore peft's layers, and free the stacked weights."""
        for patch in self._patches:
            patch.close()
        self._patches, self._layers = [], {}

    def choice(self, of_tokens: torch.Tensor, of_head: torch.Tensor) -> AdapterChoice:
        """Choose the adapters of a forward's tokens; see `AdapterChoice`."""
        return AdapterChoice(layers=self._layers, of_tokens=of_tokens, of_head=of_head)


def why_not_stacked(model: Any, names: Sequence[str]) -> str | None:
    """Return the reason why a model's adapters cannot be stacked; None if they can."""
    if (reason := why_not_switched(model, names)) is not None:
        return reason
    reasons = (unsupported_lora_reason(module, names) for module in adapter_modules(model))
    return next(filter(None, reasons), None)


def _run_stacked(
    context: ForwardContext, module: Any, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> torch.Tensor:
    """Run a layer of peft with the adapters of the context's tokens; see `ForwardPatch`."""
    choice = context.adapters
    if choice is None:
        return forward(*args, **kwargs)
    x = args[0] if args else kwargs["x"]
    base: torch.Tensor = base_layer_of(module)(*args, **kwargs)
    layer = choice.layers.get(id(module))
    if layer is None:
        return base
    foreign_rank_mask = choice.foreign_rank_mask(layer)
    if x.shape[:-1] == (len(foreign_rank_mask), 1):  # of a module that keeps a state, with each token in its own row
        foreign_rank_mask = foreign_rank_mask[:, None]
    elif x.shape[-2] != len(foreign_rank_mask) or x.numel() != len(foreign_rank_mask) * x.shape[-1]:
        msg = "a layer with adapters sees other tokens than the model was given"
        raise UnsupportedError(msg)
    # Masked, not multiplied by 0: if one adapter's product overflows, 0 times infinity is NaN for the other tokens.
    hidden = linear(x.to(layer.down.dtype), layer.down).masked_fill(foreign_rank_mask, 0)
    return (base + linear(hidden, layer.up)).to(base.dtype)


@torch.no_grad()  # type: ignore[untyped-decorator]  # torch is not followed
def _stack(module: Any, names: Sequence[str], owners: dict[Any, torch.Tensor], *, is_head: bool) -> StackedLayer | None:
    """Stack the adapters of a layer; None if it has none of them."""
    matrices = [lora_matrices(module, name) for name in names]
    present = [one for one in matrices if one is not None]
    if not present:
        return None
    ranks = tuple(0 if one is None else one[0].shape[0] for one in matrices)
    weights = [down for down, _, _ in present]
    device, dtype = weights[0].device, weights[0].dtype
    for weight in weights:
        dtype = torch.promote_types(dtype, weight.dtype)
    if (ranks, device) not in owners:
        numbers = [number for number, rank in enumerate(ranks) for _ in range(rank)]
        owners[ranks, device] = torch.tensor(numbers, dtype=torch.int32, device=device)
    return StackedLayer(
        down=torch.cat([weight.to(dtype) for weight in weights]),
        up=torch.cat([up.to(dtype) * scaling for _, up, scaling in present], 1),
        owners=owners[ranks, device],
        ranks=ranks,
        is_head=is_head,
    )

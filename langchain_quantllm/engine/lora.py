"""Rows of different LoRA adapters in one forward: all adapters of a layer as one, and a choice for each token.

Owns the stacked weights, the forward that takes the place of peft's in the engine's own forwards, and which models
allow it. Which row has which adapter is the runner's business. Outside of the engine's forwards, in other threads too,
every layer does what peft made it for.

Source: section 4 of https://arxiv.org/abs/2106.09685 for the layer; batching tokens of several adapters follows the
idea of https://arxiv.org/abs/2310.18547, with a mask in the place of gathered weights, as a CUDA graph wants it.
"""

from __future__ import annotations

import contextlib
import threading
import types
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import linear

from langchain_quantllm.compat.peft import adapter_modules, base_layer_of, lora_matrices, unsupported_lora_reason
from langchain_quantllm.engine.adapter_switch import unsupported, why_not_switched
from langchain_quantllm.errors import UnsupportedError
from langchain_quantllm.options import BASE_ADAPTER

NO_ADAPTER = -1
"""Number of the model without any adapter."""


@dataclass(frozen=True, kw_only=True)
class StackedLayer:
    """The adapters of one linear layer, behind each other.

    Args:
        down: The A matrices, of shape `(sum of ranks, in_features)`.
        up: The B matrices with their scalings, of shape `(out_features, sum of ranks)`.
        owners: Number of the adapter that each rank belongs to, of shape `(sum of ranks,)`, int32.
        ranks: Rank of each adapter here, 0 for those that leave the layer alone.
        is_head: Whether it is the output head, which sees some of the tokens only.
    """

    down: torch.Tensor
    up: torch.Tensor
    owners: torch.Tensor
    ranks: tuple[int, ...]
    is_head: bool


@dataclass
class _Choice:
    """The adapter of each token of one forward, by number, of shape `(tokens,)`; and of those the head sees."""

    of_tokens: torch.Tensor
    of_head: torch.Tensor
    masks: dict[Any, torch.Tensor] = field(default_factory=dict)

    def others(self, layer: StackedLayer) -> torch.Tensor:
        """Say which ranks belong to other adapters than a token's: `(tokens, ranks)`, bool."""
        key = (layer.ranks, layer.is_head, layer.owners.device)
        mask = self.masks.get(key)
        if mask is None:
            numbers = (self.of_head if layer.is_head else self.of_tokens).to(layer.owners.device)
            mask = self.masks[key] = layer.owners[None] != numbers[:, None]
        return mask


class LoraStack:
    """All LoRA adapters of a model, ready to run beside each other."""

    def __init__(self, model: Any, names: Sequence[str]) -> None:
        """Stack the adapters, and step in front of peft's layers.

        Args:
            model: A model of transformers with LoRA layers of peft.
            names: The adapters; their numbers are their places here.

        Raises:
            UnsupportedError: If they are more than plain LoRA of linear layers.
        """
        self.names = tuple(names)
        self._model = model
        self._thread = threading.local()
        self._forwards: list[_StackedForward] = []
        self.layers: dict[int, StackedLayer] = {}
        self.build()

    def number_of(self, name: str | None) -> int:
        """Give the number of an adapter; `NO_ADAPTER` for the base."""
        return NO_ADAPTER if name in (None, BASE_ADAPTER) else self.names.index(str(name))

    def build(self) -> None:
        """Stack the adapters as they are now, with new tensors.

        Raises:
            UnsupportedError: If they cannot be stacked; none are then.
        """
        self.close()
        if (reason := why_not_stacked(self._model, self.names)) is not None:
            raise unsupported(reason)
        head = self._model.get_output_embeddings()
        owners: dict[Any, torch.Tensor] = {}
        for module in adapter_modules(self._model):
            if (layer := _stack(module, self.names, owners, is_head=module is head)) is not None:
                self.layers[id(module)] = layer
            self._forwards.append(_StackedForward(self, module))

    def close(self) -> None:
        """Step back, and let go of the stacked weights."""
        for forward in self._forwards:
            forward.step_back()
        self._forwards, self.layers = [], {}

    @contextlib.contextmanager
    def applied(self, of_tokens: torch.Tensor, of_head: torch.Tensor) -> Iterator[None]:
        """Run the model in this thread with an adapter for each token.

        Args:
            of_tokens: Number of each token's adapter, of shape `(tokens,)`, int32.
            of_head: The same for the tokens that the output head sees.
        """
        self._thread.choice = _Choice(of_tokens, of_head)
        try:
            yield
        finally:
            self._thread.choice = None

    @property
    def choice(self) -> _Choice | None:
        """What the forward of this thread runs with; None where it is none of the engine's."""
        return getattr(self._thread, "choice", None)


class _StackedForward:
    """Stands where a layer's `forward` is looked up, and hands on whatever is not the engine's."""

    def __init__(self, stack: LoraStack, module: Any) -> None:
        # Neither the stack nor the layer is to live on for this.
        self._stack = weakref.ref(stack)
        self._module = weakref.ref(module)
        self._before = module.__dict__.get("forward")
        module.forward = self

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        module, stack = self._module(), self._stack()
        choice = None if stack is None else stack.choice
        if stack is None or choice is None:
            return (self._before or forward_of(module))(x, *args, **kwargs)
        base: torch.Tensor = base_layer_of(module)(x, *args, **kwargs)
        layer = stack.layers.get(id(module))
        if layer is None:
            return base
        others = choice.others(layer)
        if x.shape[-2] != len(others) or x.numel() != len(others) * x.shape[-1]:
            msg = "a layer with adapters sees other tokens than the model was given"
            raise UnsupportedError(msg)
        # A mask, and no product with zeros: what overflows for one adapter is no number for the others.
        hidden = linear(x.to(layer.down.dtype), layer.down).masked_fill(others, 0)
        return (base + linear(hidden, layer.up)).to(base.dtype)

    def step_back(self) -> None:
        """Leave the layer's `forward` as it was."""
        module = self._module()
        if module is None or module.__dict__.get("forward") is not self:
            return  # the layer is gone, or somebody has stepped in front of this one
        if self._before is None:
            del module.forward
        else:
            module.forward = self._before

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Leave a copy of the layer with peft's own forward: this one knows the original."""
        twin = memo.get(id(self._module()))
        return self if twin is None else forward_of(twin)


def forward_of(module: Any) -> Any:
    """Give the `forward` of a module's class, bound to it."""
    return types.MethodType(type(module).forward, module)


def why_not_stacked(model: Any, names: Sequence[str]) -> str | None:
    """Give the reason why a model's adapters cannot be stacked; None where nothing is against it."""
    if (reason := why_not_switched(model, names)) is not None:
        return reason
    reasons = (unsupported_lora_reason(module, names) for module in adapter_modules(model))
    return next(filter(None, reasons), None)


@torch.no_grad()  # type: ignore[untyped-decorator]  # torch is not followed
def _stack(module: Any, names: Sequence[str], owners: dict[Any, torch.Tensor], *, is_head: bool) -> StackedLayer | None:
    """Put the adapters of a layer behind each other; None where it has none of them."""
    found = [lora_matrices(module, name) for name in names]
    here = [matrices for matrices in found if matrices is not None]
    if not here:
        return None
    ranks = tuple(0 if matrices is None else matrices[0].shape[0] for matrices in found)
    weights = [down for down, _, _ in here]
    device, dtype = weights[0].device, weights[0].dtype
    for weight in weights:
        dtype = torch.promote_types(dtype, weight.dtype)
    if (ranks, device) not in owners:
        numbers = [number for number, rank in enumerate(ranks) for _ in range(rank)]
        owners[ranks, device] = torch.tensor(numbers, dtype=torch.int32, device=device)
    up = [up.to(dtype) * scaling for _, up, scaling in here]
    return StackedLayer(
        down=torch.cat([weight.to(dtype) for weight in weights]),
        up=torch.cat(up, 1),
        owners=owners[ranks, device],
        ranks=ranks,
        is_head=is_head,
    )

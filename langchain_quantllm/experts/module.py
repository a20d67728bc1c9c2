"""Experts of a transformers model whose weights are replaced by quantized ones."""

from __future__ import annotations

from typing import Any

import torch

from langchain_quantllm.experts.stacked import StackedLinear


class QuantizedExperts:
    """Mixed into the class of a model's experts: the weights are `StackedLinear`s, and `forward` reads those.

    The experts stay what they are otherwise: their activation, limits and gating are the model's own.
    """

    num_experts: int
    has_gate: bool

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Add up the outputs of each token's experts.

        Args:
            hidden_states: Tokens of shape `(tokens, hidden)`.
            top_k_index: The experts of each token, of shape `(tokens, k)`; numbers from `num_experts` on are none.
            top_k_weights: How much each of them counts, of the same shape.

        Returns:
            The sums of shape `(tokens, hidden)`, added up in float32.
        """
        module: Any = self
        first = module.gate_up_proj if self.has_gate else module.up_proj
        total = torch.zeros_like(hidden_states, dtype=torch.float32)
        for expert in top_k_index.unique().tolist():
            if not 0 <= expert < self.num_experts:
                continue
            tokens, places = torch.where(top_k_index == expert)
            inner = first.product(hidden_states[tokens], expert)
            inner = module._apply_gate(inner) if self.has_gate else module.act_fn(inner)
            output = module.down_proj.product(inner, expert)
            weighted = output * top_k_weights[tokens, places, None]
            total.index_add_(0, tokens, weighted.float())
        return total.to(hidden_states.dtype)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by the model's own class: that of the object is made while a program runs."""
        return _restored, (type(self).__mro__[2],), self.__dict__.copy()


def replace_weights(module: torch.nn.Module, weights: dict[str, StackedLinear]) -> None:
    """Replace the weights of a model's experts, whose class takes up `QuantizedExperts`.

    Args:
        module: The experts, of a class with transformers' `use_experts_implementation`.
        weights: The new weights by the names of the parameters that they replace, such as `"gate_up_proj"`. A parameter
            of the same name with `_bias` behind it is dropped, as the stack holds it.
    """
    for name, stacked in weights.items():
        for old in (name, f"{name}_bias"):
            module._parameters.pop(old, None)
            module._buffers.pop(old, None)
        setattr(module, name, stacked)
    if not isinstance(module, QuantizedExperts):
        module.__class__ = _quantized_class(type(module))


def restore_weights(module: torch.nn.Module, dtype: torch.dtype) -> None:
    """Undo `replace_weights`: dequantize the weights of experts, which are parameters of the model's own class again.

    Args:
        module: The experts; does nothing if their weights were not replaced.
        dtype: Dtype of the parameters.
    """
    if not isinstance(module, QuantizedExperts):
        return
    own: Any = module
    for name, stacked in list(own.named_children()):
        if not isinstance(stacked, StackedLinear):
            continue
        stack = stacked.stack
        weights = torch.stack([stacked.dequantize(e, torch.float32).to(dtype) for e in range(stack.experts)])
        delattr(module, name)
        weights = weights.transpose(1, 2).contiguous() if own.is_transposed else weights
        setattr(module, name, torch.nn.Parameter(weights, requires_grad=False))
        if stack.bias is not None:
            setattr(module, f"{name}_bias", torch.nn.Parameter(stack.bias.to(dtype), requires_grad=False))
    module.__class__ = type(module).__mro__[2]


def _restored(kind: type) -> Any:
    made: Any = _quantized_class(kind)
    return made.__new__(made)


_classes: dict[type, type] = {}


def _quantized_class(kind: type) -> type:
    if kind not in _classes:
        _classes[kind] = type(f"Quantized{kind.__name__}", (QuantizedExperts, kind), {"__module__": __name__})
    return _classes[kind]

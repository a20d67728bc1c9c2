"""transformers' mixtures of experts: which modules hold the weights of all experts, and in which layout.

Since transformers 5 a mixture's experts are one module with a parameter of three axes for each projection, of a class
with `use_experts_implementation`, which leaves the layout in attributes. Source: transformers/integrations/moe.py.

Experts of classes without that decorator stay as they are: those of Llama 4 (every expert reads every token), DBRX (all
experts in one matrix), JetMoE (another call of `forward`), LongCat (experts without weights among them) and Step 3 (no
attributes). Experts of Switch and NLLB are ordinary linear layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

__all__ = ["Projection", "are_routed_tokens", "is_experts", "projections", "unsupported_experts"]

_PROJECTIONS = ("gate_up_proj", "up_proj", "down_proj")
_LAYOUT = ("num_experts", "has_gate", "has_bias", "is_transposed", "_apply_gate")


@dataclass(frozen=True, kw_only=True)
class Projection:
    """The layout of a parameter with the weights of one projection of all experts.

    Args:
        experts: How many experts there are.
        out_features: Outputs of each.
        in_features: Inputs of each.
        transposed: Whether the parameter's shape is `(experts, in_features, out_features)`, not `(experts,
            out_features, in_features)`.
        bias: Name of the parameter with the biases, of shape `(experts, out_features)`; None if there is none.
    """

    experts: int
    out_features: int
    in_features: int
    transposed: bool
    bias: str | None

    @property
    def elements(self) -> int:
        """Number of weights of all experts."""
        return math.prod((self.experts, self.out_features, self.in_features))


def is_experts(module: Any) -> bool:
    """Say whether a module holds the experts of a mixture in a layout that is known here.

    Its `forward` takes tokens of shape `(tokens, hidden)`, each token's experts and their weights. It stays true when
    the parameters are replaced.
    """
    if any(not hasattr(module, name) for name in _LAYOUT) or getattr(module, "has_post_expert_norm", False):
        return False
    first = "gate_up_proj" if module.has_gate else "up_proj"
    return hasattr(module, first) and hasattr(module, "down_proj")


def are_routed_tokens(args: tuple[Any, ...]) -> bool:
    """Whether the arguments of experts' `forward` are tokens, the experts of each, and the weights of these."""
    import torch

    if len(args) != 3 or not all(isinstance(one, torch.Tensor) and one.dim() == 2 for one in args):
        return False
    tokens, index, weights = args
    return bool(index.shape == weights.shape and len(tokens) == len(index) and not index.is_floating_point())


def projections(module: Any) -> dict[str, Projection]:
    """Return the layouts of the parameters of experts by the parameters' names.

    Args:
        module: A module, on any device; the result is empty if it is not `is_experts`. Parameters that were replaced by
            modules are left out.
    """
    if not is_experts(module):
        return {}
    found = {}
    for name in _PROJECTIONS:
        weight = module._parameters.get(name)
        if weight is None or weight.dim() != 3:
            continue
        experts, outputs, inputs = weight.shape
        if module.is_transposed:
            outputs, inputs = inputs, outputs
        bias = f"{name}_bias" if module.has_bias else None
        found[name] = Projection(
            experts=experts, out_features=outputs, in_features=inputs, transposed=bool(module.is_transposed), bias=bias
        )
    return found


def unsupported_experts(module: Any) -> str | None:
    """Return why the weights of experts cannot be quantized here.

    Returns:
        The reason; None for experts of a known layout, and for modules that hold no weights of experts themselves.
    """
    kind = type(module).__name__
    if "Expert" not in kind or is_experts(module):
        return None
    if not any(weight.dim() >= 2 for weight in module._parameters.values() if weight is not None):
        return None
    if getattr(module, "has_post_expert_norm", False):
        return f"{kind} normalizes the output of each expert"
    return f"{kind} keeps the weights of its experts in a layout of its own"

"""The function that transformers' experts compute between their two products.

Experts of a class with `use_experts_implementation` have it as `_apply_gate`, or, without a gate, as `act_fn`. Source:
transformers/integrations/moe.py.
"""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["gated_outputs"]


def gated_outputs(module: Any, outputs: torch.Tensor) -> Any:
    """Compute the function of experts for which `is_experts` is true.

    Args:
        module: The experts.
        outputs: Outputs of the first product, of shape `(rows, outputs)`.
    """
    with torch.no_grad():
        return module._apply_gate(outputs) if module.has_gate else module.act_fn(outputs)

"""Decode steps of gated delta rules by this package's kernel, over the states in their pool.

A model's own step gathers the states of all rows, passes over them some eight times, and stores them; the kernel reads
and writes each once. It is tried on random numbers beside the model's own function before it takes its place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from langchain_quantllm.compat.transformers_delta_rules import DeltaRule, PooledState, delta_rule_of, prepare
from langchain_quantllm.compat.transformers_states import StateKey, state_modules
from langchain_quantllm.engine.stages import at_stage
from langchain_quantllm.errors import UnsupportedError

_ROWS = 3
_TOLERANCE = 1e-4
"""Largest relative error of the kernel against the model's own function, both in float32."""


@dataclass(frozen=True)
class DeltaSteps:
    """The states whose decode step is the kernel's.

    Args:
        kernels: The module with the kernel, by the states' keys.
        left: How many layers' steps stay the model's own, by the reason.
    """

    kernels: Mapping[StateKey, Any] = field(default_factory=dict)
    left: Mapping[str, int] = field(default_factory=dict)

    @property
    def note(self) -> str | None:
        """Why steps stay the model's own, in words; None if none does."""
        if not self.left:
            return None
        reason = max(self.left, key=self.left.__getitem__)
        return f"recurrent steps of {sum(self.left.values())} layers are the model's own: {reason}"


def find_delta_steps(model: torch.nn.Module, states: Mapping[StateKey, torch.Tensor], kernels: Any) -> DeltaSteps:
    """Try the kernel for each layer with a gated delta rule.

    Args:
        model: The model.
        states: The states of all slots, by their keys.
        kernels: `kernels.recurrent` or `kernels.recurrent_reference`.
    """
    found: dict[StateKey, Any] = {}
    left: Counter[str] = Counter()
    tried: dict[Any, str | None] = {}
    for module in state_modules(model):
        key, rule = StateKey(getattr(module, "layer_idx", -1), "recurrent", 0), delta_rule_of(module)
        if rule is None or key not in states:
            continue
        state = states[key]
        kind = (rule, state.shape[1:], state.dtype, state.device)
        if kind not in tried:
            tried[kind] = _refusal(rule, state, kernels)
        if (reason := tried[kind]) is not None:
            left[reason] += 1
            continue
        prepare(module)
        found[key] = kernels
    return DeltaSteps(found, dict(left))


def _refusal(rule: DeltaRule, state: torch.Tensor, kernels: Any) -> str | None:
    try:
        with torch.no_grad(), at_stage(state.device):
            _try_out(rule, state, kernels)
    except torch.OutOfMemoryError:
        raise
    except UnsupportedError as error:
        return str(error)
    except Exception as error:  # no compiler on this machine, say
        return f"the kernel fails: {error!r}"
    return None


def _try_out(rule: DeltaRule, state: torch.Tensor, kernels: Any) -> None:
    """Compare the kernel with the model's own function on random numbers.

    Raises:
        UnsupportedError: If they differ.
    """
    if state.dim() != 4 or state.dtype != torch.float32:
        raise UnsupportedError(f"states of shape {tuple(state.shape[1:])} in {state.dtype}")
    heads, key_dim, value_dim = state.shape[1:]
    made = torch.Generator(state.device).manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=made, dtype=torch.float32, device=state.device)

    for group in (1, 2) if heads % 2 == 0 and not rule.by_channel else (1,):
        query, key = draw(_ROWS, 1, heads // group, key_dim), draw(_ROWS, 1, heads // group, key_dim)
        value, beta = draw(_ROWS, 1, heads, value_dim), draw(_ROWS, 1, heads).sigmoid()
        decay = -draw(_ROWS, 1, heads, *[key_dim] * rule.by_channel).square()
        pool, slots = draw(_ROWS + 1, heads, key_dim, value_dim), torch.arange(_ROWS, 0, -1, device=state.device)
        given = {"g": decay, "beta": beta, "output_final_state": True, "use_qk_l2norm_in_kernel": True}
        expected, after = rule.own(query, key, value, initial_state=pool[slots], **given)
        ours = PooledState(pool, slots, kernels)
        found, _ = ours.step(query, key, value, initial_state=ours, **given)
        for one, other in ((found, expected), (pool[slots], after)):
            if not (one - other).norm() <= _TOLERANCE * other.norm():
                raise UnsupportedError("the kernel gives something else than the model's own function")

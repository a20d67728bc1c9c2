"""The functions of transformers' modules that compute gated delta rules token by token, and a way to take their place.

Transformers 5.24 calls them by name in the file of the model's class, with the state as `initial_state`. Once a file
has been prepared, a call whose state is a `PooledState` goes to this package's kernels, and every other call to the
function itself. A model that computes the rule in another way has no such function, and its steps stay as they are.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

_RULES = {"torch_recurrent_gated_delta_rule": False, "recurrent_kimi_delta_attention": True}
"""The functions' names, and whether each channel of a key decays by itself."""

_PACKED = ("cu_seqlens", "seq_idx")
"""Arguments that tell several sequences in one row apart."""

_OWN = "own_rule"
_lock = threading.Lock()


@dataclass(frozen=True)
class DeltaRule:
    """The rule of a module.

    Args:
        own: The function of transformers.
        by_channel: Whether each channel of a key decays by itself.
    """

    own: Callable[..., Any]
    by_channel: bool


class PooledState:
    """The states of some rows, as a module gets them in place of a tensor."""

    def __init__(self, states: torch.Tensor, slots: torch.Tensor, kernels: Any) -> None:
        """Name them.

        Args:
            states: The states of all slots, float32; see `recurrent_reference.delta_step`.
            slots: The slot of each row.
            kernels: `kernels.recurrent` or `kernels.recurrent_reference`.
        """
        self.states, self.slots, self._kernels = states, slots, kernels

    def to(self, dtype: torch.dtype) -> PooledState:
        """Return itself: the states stay as they are in float32.

        Raises:
            TypeError: For other dtypes.
        """
        if dtype != self.states.dtype:
            raise TypeError(f"states of {self.states.dtype} stay where they are, and do not become {dtype}.")
        return self

    def step(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        g: torch.Tensor,
        beta: torch.Tensor,
        initial_state: PooledState,
        output_final_state: bool = False,
        use_qk_l2norm_in_kernel: bool = False,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, PooledState]:
        """Compute one token of each row; arguments of shape `(rows, 1, heads, ...)`, as transformers passes them.

        Raises:
            ValueError: If they have another shape, or are for packed sequences.
        """
        if query.shape[1] != 1 or any(kwargs.get(name) is not None for name in _PACKED):
            raise ValueError(f"states of many rows take one token of each, not queries of shape {tuple(query.shape)}.")
        one = [tensor[:, 0] for tensor in (query, key, value, g, beta)]
        out = self._kernels.delta_step(*one, self.states, self.slots, normalizes=use_qk_l2norm_in_kernel)
        return out[:, None], self


def delta_rule_of(module: Any) -> DeltaRule | None:
    """Return the rule that a module's class calls; None if its file has none."""
    names = vars(sys.modules[type(module).__module__])
    for name, by_channel in _RULES.items():
        if callable(found := names.get(name)):
            return DeltaRule(getattr(found, _OWN, found), by_channel)
    return None


def prepare(module: Any) -> None:
    """Let the rule of a module's class take states of both kinds, in the whole process and for good."""
    names = vars(sys.modules[type(module).__module__])
    with _lock:
        for name in _RULES:
            if callable(own := names.get(name)) and not hasattr(own, _OWN):
                names[name] = _taking_both(own)


def _taking_both(own: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(own)
    def rule(*args: Any, **kwargs: Any) -> Any:
        state = kwargs.get("initial_state")
        return state.step(*args, **kwargs) if isinstance(state, PooledState) else own(*args, **kwargs)

    setattr(rule, _OWN, own)
    return rule

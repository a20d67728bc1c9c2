"""States of recurrent layers in models of transformers: which modules keep them, and the cache object that holds them.

Transformers 5.24 keeps a layer's states in its cache, as convolution and recurrent states with a number each, and the
modules take and store them by methods of the cache. A model whose modules do it in another way is not recognized, and
is refused by its cache or by the comparison of its logits.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch.nn.functional import pad
from transformers import Cache

from langchain_quantllm.compat.transformers_state_functions import PooledInputs, calls_any

STATE_LAYER_TYPES = frozenset({"linear_attention", "conv", "mamba", "hybrid", "hybrid_sliding"})
"""Kinds of layers, by a config's `layer_types`, that keep a state, alone or beside keys and values."""

_EMPTY_LAYER_TYPES = frozenset({"moe", "mlp", "attention"})  # Nemotron-H's; the last one of older configs
OTHER_LAYER_TYPES = STATE_LAYER_TYPES | _EMPTY_LAYER_TYPES
"""Kinds of layers of models with states, beside full and sliding attention."""

_METHODS = frozenset({"update_conv_state", "update_recurrent_state", "set_linear_cache"})
_LINEAR_CACHE = "linear_cache"  # a list in MiniMax's own kind of cache


class StateKey(NamedTuple):
    """Names one state of a model: `kind` is `"conv"` or `"recurrent"`, or `"linear"` for MiniMax's."""

    layer: int
    kind: str
    number: int


def states_of(cache: Any) -> dict[StateKey, torch.Tensor]:
    """Read the states in a cache that a forward has filled; each has one row for each row of the batch."""
    found = {}
    for layer_number, layer in enumerate(cache.layers):
        for kind in ("conv", "recurrent"):
            states = getattr(layer, f"{kind}_states", None)
            for index, state in states.items() if isinstance(states, Mapping) else ():
                if state is not None:
                    found[StateKey(layer_number, kind, index)] = state
    for layer_number, state in enumerate(getattr(cache, _LINEAR_CACHE, ())):
        if isinstance(state, torch.Tensor):
            found[StateKey(layer_number, "linear", 0)] = state
    return found


def holds_nothing(layer: Any) -> bool:
    """Say whether a layer of a filled cache holds no keys and values: it keeps states only, or nothing at all."""
    if getattr(layer, "keys", None) is not None:
        return False
    held = vars(layer).values()
    return hasattr(layer, "recurrent_states") or not any(isinstance(value, torch.Tensor) for value in held)


def state_modules(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Iterate over the modules of a model that take their states from a cache."""
    kinds = {kind for kind in {type(module) for module in model.modules()} if calls_any(kind, _METHODS)}
    return (module for module in model.modules() if type(module) in kinds)


def passing_for_own(ours: type, model: torch.nn.Module) -> type:
    """Derive a kind of cache that passes for the one that a model insists on, as MiniMax does; else it is ours."""
    modules = {type(module).__module__ for module in state_modules(model)}
    own = {kind for name in modules for kind in vars(sys.modules[name]).values() if _keeps_linear_states(kind)}
    for kind in own:
        ours = type(ours.__name__, (ours, kind), {_LINEAR_CACHE: ()})
    return ours


def _keeps_linear_states(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Cache) and hasattr(kind, "set_linear_cache")


def is_cache(value: Any) -> bool:
    """Say whether an argument of a module is the model's cache."""
    return isinstance(value, Cache)


class StateCache(Cache):  # type: ignore[misc]  # transformers is not typed
    """The cache that one module is called with for some rows: it has their states, or none yet.

    Attributes:
        states: States that the module has read, and perhaps changed in place, or stored.
    """

    def __init__(self, read: Callable[[StateKey], torch.Tensor], widths: Mapping[StateKey, int], *, begins: bool):
        """Hold the states of some rows.

        Args:
            read: Returns the rows' state, of shape `(rows, ...)`, which the module may change in place.
            widths: Size of each state's last dimension.
            begins: Whether the rows are at the beginning of their text, and have no states.
        """
        super().__init__(layers=[])
        self.states: dict[StateKey, torch.Tensor] = {}
        self._read, self._widths, self._begins = read, widths, begins

    def _get(self, key: StateKey) -> torch.Tensor:
        if key not in self.states:
            self.states[key] = self._read(key)
        return self.states[key]

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """Return the last inputs of a convolution; None at the beginning."""
        key = StateKey(layer_idx, "conv", state_idx)
        return None if self._begins or key not in self._widths else self._get(key)

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """Return a recurrent state; None at the beginning."""
        key = StateKey(layer_idx, "recurrent", state_idx)
        return None if self._begins or key not in self._widths else self._get(key)

    def update_conv_state(
        self, conv_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> torch.Tensor:
        """Store the inputs of a convolution, of shape `(rows, channels, tokens)`; returns them behind the last ones."""
        key = StateKey(layer_idx, "conv", state_idx)
        width = self._widths[key]
        if self._begins:
            seen = pad(conv_states, (max(0, width - conv_states.shape[-1]), 0))
        else:
            past: Any = self._get(key)
            seen = torch.cat([past.gathered() if isinstance(past, PooledInputs) else past, conv_states], -1)
        self.states[key] = seen[..., -width:]
        return seen

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> torch.Tensor:
        """Store a recurrent state, and return it."""
        self.states[StateKey(layer_idx, "recurrent", state_idx)] = recurrent_states
        return recurrent_states

    def get_linear_cache(self, layer_idx: int) -> torch.Tensor | None:
        """Return the state of a layer of MiniMax; None at the beginning."""
        return None if self._begins else self._get(StateKey(layer_idx, "linear", 0))

    def set_linear_cache(self, layer_idx: int, linear_cache: torch.Tensor) -> None:
        """Store it."""
        self.states[StateKey(layer_idx, "linear", 0)] = linear_cache

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        """Say whether there are states from the text so far."""
        return not self._begins

    def is_recording_past(self, layer_idx: int = 0) -> bool:
        """Say that no past states are recorded."""
        return False

"""The functions by which transformers' modules take one token of a state, and a way to take their place.

Transformers 5.24 calls them by name in the file of the model's class: gated delta rules, with the state as
`initial_state`, and short convolutions, with the last inputs as `conv_state`, which they change in place. Once a file
has been prepared, a call whose state is a `PooledState` or `PooledInputs` goes to this package's kernels, and every
other call to the function itself. A model that computes these in another way has no such function, and its steps stay
as they are.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

_RULES = {"torch_recurrent_gated_delta_rule": False, "recurrent_kimi_delta_attention": True}
"""The functions' names, and whether each channel of a key decays by itself."""

_CONVOLUTION, _CONVOLUTION_STATE = "causal_conv1d_update", "conv_state"

_PACKED = ("cu_seqlens", "seq_idx")
"""Arguments that tell several sequences in one row apart."""

_SILU = ("silu", "swish")
_OWN = "own_function"
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


@dataclass(frozen=True)
class Convolution:
    """The short convolution of a module.

    Args:
        own: The function of transformers for one token.
        number: Of its state among those of the layer's convolutions.
        channels: Its channels.
        taps: How many inputs of a channel an output depends on.
    """

    own: Callable[..., Any]
    number: int
    channels: int
    taps: int


class _Pooled:
    """States of some rows, as a module gets them in place of a tensor."""

    def __init__(self, states: torch.Tensor, slots: torch.Tensor, kernels: Any) -> None:
        """Name them.

        Args:
            states: The states of all slots; see `recurrent_reference`.
            slots: The slot of each row.
            kernels: `kernels.recurrent` or `kernels.recurrent_reference`.
        """
        self.states, self.slots, self._kernels = states, slots, kernels


class PooledState(_Pooled):
    """The recurrent states of some rows, in float32."""

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
        own: Callable[..., Any],
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
        del own
        if query.shape[1] != 1 or any(kwargs.get(name) is not None for name in _PACKED):
            raise ValueError(f"states of many rows take one token of each, not queries of shape {tuple(query.shape)}.")
        one = [tensor[:, 0] for tensor in (query, key, value, g, beta)]
        with _launching_on(self.states.device):
            out = self._kernels.delta_step(*one, self.states, self.slots, normalizes=use_qk_l2norm_in_kernel)
        return out[:, None], self


class PooledInputs(_Pooled):
    """The last inputs of a convolution for some rows."""

    def step(
        self,
        own: Callable[..., Any],
        hidden_states: torch.Tensor,
        conv_state: PooledInputs,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        activation: str | None = None,
    ) -> torch.Tensor:
        """Compute one token of each row, of shape `(rows, channels, 1)`; other calls go to transformers' function."""
        is_same = self.states.dtype == hidden_states.dtype == weight.dtype
        if hidden_states.shape[-1] == 1 and activation in (None, *_SILU) and is_same:
            activates = activation is not None
            with _launching_on(self.states.device):
                found: torch.Tensor = self._kernels.conv_step(
                    hidden_states[..., 0], self.states, self.slots, weight, bias, activates=activates
                )
            return found[..., None]
        state = self.gathered()
        out: torch.Tensor = own(hidden_states, state, weight, bias, activation)
        self.states.index_copy_(0, self.slots.long(), state)
        return out

    def gathered(self) -> torch.Tensor:
        """Return the rows' inputs as a tensor of their own."""
        return self.states.index_select(0, self.slots.long())


POOLED = {"recurrent": PooledState, "conv": PooledInputs}
"""What a module gets in place of a state, by the kind in its key."""


def delta_rule_of(module: Any) -> DeltaRule | None:
    """Return the rule that a module's class calls; None if its file has none."""
    for name, by_channel in _RULES.items():
        if (own := _own_function(module, name)) is not None:
            return DeltaRule(own, by_channel)
    return None


def convolution_of(module: Any) -> Convolution | None:
    """Return the short convolution whose function a module's class calls; None if there is none."""
    own = _own_function(module, _CONVOLUTION)
    if own is None or not calls_any(type(module), frozenset({_CONVOLUTION})):
        return None
    layers = [child for child in module.children() if isinstance(child, torch.nn.Conv1d)]
    if len(layers) != 1 or layers[0].groups != layers[0].in_channels:
        return None
    channels, _, taps = layers[0].weight.shape
    return Convolution(own, getattr(module, "conv_idx", 0), channels, taps)


def prepare(module: Any) -> None:
    """Let the functions of a module's file take states of both kinds, in the whole process and for good."""
    names = vars(sys.modules[type(module).__module__])
    with _lock:
        for name in (*_RULES, _CONVOLUTION):
            if callable(own := names.get(name)) and not hasattr(own, _OWN):
                names[name] = _taking_both(own, _CONVOLUTION_STATE if name == _CONVOLUTION else "initial_state")


def calls_any(kind: type, names: frozenset[str]) -> bool:
    """Say whether a function of a class names one of these."""
    functions = (value for base in kind.__mro__ for value in vars(base).values() if inspect.isfunction(value))
    return any(not names.isdisjoint(inspect.unwrap(function).__code__.co_names) for function in functions)


def _launching_on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make a GPU the current one, on which Triton launches."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _own_function(module: Any, name: str) -> Callable[..., Any] | None:
    found = vars(sys.modules[type(module).__module__]).get(name)
    return getattr(found, _OWN, found) if callable(found) else None


def _taking_both(own: Callable[..., Any], argument: str) -> Callable[..., Any]:
    place = 1 if argument == _CONVOLUTION_STATE else None

    @functools.wraps(own)
    def function(*args: Any, **kwargs: Any) -> Any:
        state = args[place] if place is not None and len(args) > place else kwargs.get(argument)
        return (
            state.step(own, *args, **kwargs) if isinstance(state, PooledState | PooledInputs) else own(*args, **kwargs)
        )

    setattr(function, _OWN, own)
    return function

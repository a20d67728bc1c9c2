"""Decode steps of gated delta rules and short convolutions by this package's kernels, over the states in their pool.

A model's own step gathers the states of all rows, passes over them several times, and stores them; the kernels read
and write each once. Each is tried on random numbers beside the model's own function before it takes its place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from langchain_quantllm.compat.transformers_state_functions import (
    Convolution,
    DeltaRule,
    PooledInputs,
    PooledState,
    convolution_of,
    delta_rule_of,
    prepare,
)
from langchain_quantllm.compat.transformers_states import StateKey, state_modules
from langchain_quantllm.engine.stages import at_stage
from langchain_quantllm.errors import UnsupportedError

_ROWS = 3
_TOLERANCE = 1e-4
"""Largest relative error of a kernel against the model's own function, both in float32."""

_NAMES = {"recurrent": "recurrent steps", "conv": "convolutions"}


@dataclass(frozen=True)
class StateSteps:
    """The states whose decode step is a kernel's.

    Args:
        kernels: The module with the kernels, by the states' keys.
        left: How many layers' steps stay the model's own, by their kind and the reason.
    """

    kernels: Mapping[StateKey, Any] = field(default_factory=dict)
    left: Mapping[tuple[str, str], int] = field(default_factory=dict)

    @property
    def counts(self) -> dict[str, int]:
        """How many layers' steps are a kernel's, by the kind of state."""
        return dict(Counter(key.kind for key in self.kernels))

    @property
    def notes(self) -> Iterator[str]:
        """Why steps stay the model's own, in words, for each kind of which some do."""
        for kind, name in _NAMES.items():
            left = {reason: count for (of, reason), count in self.left.items() if of == kind}
            if left:
                reason = max(left, key=left.__getitem__)
                yield f"{name} of {sum(left.values())} layers are the model's own: {reason}"


def find_state_steps(model: torch.nn.Module, states: Mapping[StateKey, torch.Tensor], kernels: Any) -> StateSteps:
    """Try the kernels for each layer with a gated delta rule or a short convolution.

    Args:
        model: The model.
        states: The states of all slots, by their keys.
        kernels: `kernels.recurrent` or `kernels.recurrent_reference`.
    """
    found: dict[StateKey, Any] = {}
    left: Counter[tuple[str, str]] = Counter()
    tried: dict[Any, str | None] = {}
    for module in state_modules(model):
        layer = getattr(module, "layer_idx", -1)
        rule, convolution = delta_rule_of(module), convolution_of(module)
        for kind, function, try_out in (("recurrent", rule, _try_rule), ("conv", convolution, _try_convolution)):
            state = states.get(key := StateKey(layer, kind, getattr(function, "number", 0)))
            if function is None or state is None:
                continue
            what = (function, state.shape[1:], state.dtype, state.device)
            if what not in tried:
                tried[what] = _refusal(try_out, function, state, kernels)
            if (reason := tried[what]) is not None:
                left[kind, reason] += 1
                continue
            prepare(module)
            found[key] = kernels
    return StateSteps(found, dict(left))


def _refusal(try_out: Callable[..., None], function: Any, state: torch.Tensor, kernels: Any) -> str | None:
    try:
        with torch.no_grad(), at_stage(state.device):
            try_out(function, state, kernels)
    except torch.OutOfMemoryError:
        raise
    except UnsupportedError as error:
        return str(error)
    except Exception as error:  # no compiler on this machine, say
        return f"the kernel fails: {error!r}"
    return None


def _drawing(device: torch.device) -> Callable[..., torch.Tensor]:
    made = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=made, dtype=torch.float32, device=device)

    return draw


def _try_rule(rule: DeltaRule, state: torch.Tensor, kernels: Any) -> None:
    """Compare the kernel with the model's own function on random numbers.

    Raises:
        UnsupportedError: If they differ.
    """
    if state.dim() != 4 or state.dtype != torch.float32:
        raise UnsupportedError(f"states of shape {tuple(state.shape[1:])} in {state.dtype}")
    heads, key_dim, value_dim = state.shape[1:]
    draw = _drawing(state.device)
    for group in (1, 2) if heads % 2 == 0 and not rule.by_channel else (1,):
        query, key = draw(_ROWS, 1, heads // group, key_dim), draw(_ROWS, 1, heads // group, key_dim)
        value, beta = draw(_ROWS, 1, heads, value_dim), draw(_ROWS, 1, heads).sigmoid()
        decay = -draw(_ROWS, 1, heads, *[key_dim] * rule.by_channel).square()
        pool, slots = draw(_ROWS + 1, heads, key_dim, value_dim), torch.arange(_ROWS, 0, -1, device=state.device)
        given = {"g": decay, "beta": beta, "output_final_state": True, "use_qk_l2norm_in_kernel": True}
        expected, after = rule.own(query, key, value, initial_state=pool[slots], **given)
        ours = PooledState(pool, slots, kernels)
        found, _ = ours.step(rule.own, query, key, value, initial_state=ours, **given)
        _check_same((found, expected), (pool[slots], after))


def _try_convolution(convolution: Convolution, state: torch.Tensor, kernels: Any) -> None:
    """Compare the kernel with the model's own function on random numbers.

    Raises:
        UnsupportedError: If they differ.
    """
    channels, taps = convolution.channels, convolution.taps
    if state.dim() != 3 or state.shape[1] != channels or state.shape[2] < taps - 1 or not state.is_contiguous():
        raise UnsupportedError(f"states of shape {tuple(state.shape[1:])} for {channels} channels and {taps} taps")
    draw = _drawing(state.device)
    weight, slots = draw(channels, taps), torch.arange(_ROWS, 0, -1, device=state.device)
    for bias, activation in ((None, None), (draw(channels), "silu")):
        pool, new = draw(_ROWS + 1, *state.shape[1:]), draw(_ROWS, channels, 1)
        after = pool[slots]
        expected = convolution.own(new, after, weight, bias, activation)
        ours = PooledInputs(pool, slots, kernels)
        found = ours.step(convolution.own, new, ours, weight, bias, activation)
        _check_same((found, expected), (pool[slots], after))


def _check_same(*pairs: tuple[torch.Tensor, torch.Tensor]) -> None:
    for one, other in pairs:
        if one.shape != other.shape or not (one - other).norm() <= _TOLERANCE * other.norm():
            raise UnsupportedError("the kernel gives something else than the model's own function")

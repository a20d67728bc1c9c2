"""Attentions of transformers whose scores get a bias by the distance of a key, which depends on the query: Inkling.

They compute it for each query and key and pass it on as `position_bias`. None of the names here is promised by
transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

_Profiles = Callable[..., torch.Tensor]


def is_relative_bias(module: Any) -> bool:
    """Say whether a module computes such biases, in a way that `profiles_of` knows."""
    return _is_of_inkling(module) and type(module).__name__ in _BIASES


def profiles_of(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor:
    """Compute the bias of each query by distance, where the module computes that of each query and key.

    Args:
        module: One that `is_relative_bias`.
        args: Arguments of its forward.
        kwargs: Keyword arguments of its forward.

    Returns:
        Of shape `(1, heads, tokens, distances)`, beginning with that of the query's own position; keys that are
        further away have no bias.
    """
    return _BIASES[type(module).__name__](module, *args, **kwargs)


def passes_relative_bias(module: Any) -> bool:
    """Say whether an attention passes what such a module returns as its `position_bias`."""
    return _is_of_inkling(module) and any(is_relative_bias(child) for child in module.children())


def counts_by_cache(module: Any) -> bool:
    """Say whether an attention asks its cache where its queries are; see `WritingCache.get_query_offset`."""
    return _is_of_inkling(module) and type(module).__name__ == "InklingAttention"


def _is_of_inkling(module: Any) -> bool:
    return type(module).__module__.startswith("transformers.models.inkling")


def _of_states(module: Any, relative_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return (relative_states @ module.proj).transpose(1, 2)


def _of_hidden_states(
    module: Any, hidden_states: torch.Tensor, relative_distance: Any, position_ids: torch.Tensor
) -> torch.Tensor:
    del relative_distance
    states = module.linear(hidden_states).unflatten(-1, (module.num_heads, -1))
    return (module.norm(states, position_ids) @ module.proj).transpose(1, 2)


_BIASES: Mapping[str, _Profiles] = {
    "InklingRelativeLogits": _of_states,
    "Inkling2RelativePositionBias": _of_hidden_states,
    "Inkling2LoopRelativePositionBias": _of_hidden_states,
}
"""By the name of the class."""

"""How the models of transformers are called: the arguments of their forwards, the fields of what they return, hooks.

Since 5.24 a model takes its KV cache as `cache`, before that as `past_key_values`; models with code of their own keep
the old name.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

CACHE_NAMES = ("cache", "past_key_values")
"""Names under which forwards take a KV cache and outputs hold it, the newest first."""

_OUTPUT_NAMES = (*CACHE_NAMES, "cache_params")


def forward_parameters(model: Any) -> frozenset[str]:
    """Name the parameters of a model's forward, of the model inside where others are wrapped around it."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # as peft's wrappers have it
    return frozenset(inspect.signature(inner.forward).parameters)


def cache_name(model: Any) -> str:
    """Name the argument by which a model takes its KV cache."""
    parameters = forward_parameters(model)
    return next((name for name in CACHE_NAMES if name in parameters), _default_cache_name())


def given_cache_name(arguments: Mapping[str, Any]) -> str | None:
    """Find the name of the KV cache among the keyword arguments of a call; None where there is none."""
    return next((name for name in CACHE_NAMES if name in arguments), None)


def cache_of(output: Any) -> Any:
    """Read the KV cache from a model's output; None where it has none."""
    if isinstance(output, Mapping):  # whose old names warn as attributes
        return next((output[name] for name in _OUTPUT_NAMES if name in output), None)
    return next((found for name in _OUTPUT_NAMES if (found := getattr(output, name, None)) is not None), None)


@functools.cache
def _default_cache_name() -> str:
    """Name the argument for forwards that do not say it, by the outputs of this release."""
    from transformers.modeling_outputs import CausalLMOutputWithPast

    fields = CausalLMOutputWithPast.__dataclass_fields__
    return next(name for name in CACHE_NAMES if name in fields)


def is_idle_hook(hook: Any) -> bool:
    """Say whether a hook was left behind by a request for hidden states, and does nothing while there is none."""
    return getattr(hook, "__module__", None) == "transformers.utils.output_capturing"

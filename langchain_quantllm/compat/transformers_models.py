"""The call of transformers' models: arguments of their forwards, fields of their outputs, hooks.

Since 5.24 a model takes its KV cache as `cache`, before that as `past_key_values`; models with their own code keep the
old name.
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
    """Return the names of the parameters of a model's forward; of the inner model for a wrapper of peft."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return frozenset(inspect.signature(inner.forward).parameters)


def cache_name(model: Any) -> str:
    """Return the name of the argument for a model's KV cache."""
    parameters = forward_parameters(model)
    return next((name for name in CACHE_NAMES if name in parameters), _default_cache_name())


def given_cache_name(arguments: Mapping[str, Any]) -> str | None:
    """Return the name of the KV cache among the keyword arguments of a call; None if there is none."""
    return next((name for name in CACHE_NAMES if name in arguments), None)


def cache_of(output: Any) -> Any:
    """Return the KV cache in a model's output; None if there is none."""
    if isinstance(output, Mapping):  # as attributes, its old names would warn
        return next((output[name] for name in _OUTPUT_NAMES if name in output), None)
    return next((found for name in _OUTPUT_NAMES if (found := getattr(output, name, None)) is not None), None)


@functools.cache
def _default_cache_name() -> str:
    """Return the name for forwards that take any keyword argument: the one in this release's outputs."""
    from transformers.modeling_outputs import CausalLMOutputWithPast

    fields = CausalLMOutputWithPast.__dataclass_fields__
    return next(name for name in CACHE_NAMES if name in fields)


def is_idle_hook(hook: Any) -> bool:
    """Say whether a hook only serves requests for hidden states; it stays after one, and is idle without."""
    return getattr(hook, "__module__", None) == "transformers.utils.output_capturing"

"""Rotary modules of transformers whose frequencies follow from the longest position of a call.

The kinds "longrope" and "dynamic". transformers promises neither the attributes of these modules nor what `generate`
does with its cache where a text grows beyond the length that its model was first trained with.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers import DynamicCache

from langchain_quantllm.compat.transformers_models import cache_name

LONG, DYNAMIC = "longrope", "dynamic"


def moving_rope(config: Any) -> str | None:
    """Return the kind of a config's rotary positions if their frequencies follow from the length; None if not."""
    parameters = getattr(config, "rope_parameters", None)
    if not isinstance(parameters, Mapping):
        return None
    kinds = [
        parameters.get("rope_type"),
        *(p.get("rope_type") for p in parameters.values() if isinstance(p, Mapping)),
    ]
    return next((kind for kind in kinds if kind in (LONG, DYNAMIC)), None)


def moving_rotary_modules(model: Any) -> Iterator[Any]:
    """Iterate over the modules of a model that choose frequencies by the length, for all layers alike."""
    return (module for module in model.modules() if is_moving_rotary(module))


def is_moving_rotary(module: Any) -> bool:
    """Say whether a module chooses frequencies by the length; it overwrites its buffer `inv_freq` in each call."""
    return getattr(module, "rope_type", None) in (LONG, DYNAMIC) and hasattr(module, "original_inv_freq")


def original_length(module: Any) -> int:
    """Return the most tokens of a text that has the original frequencies."""
    if module.rope_type == LONG:
        return int(module.config.rope_parameters["original_max_position_embeddings"])
    return int(module.original_max_seq_len)


def frequencies_of(module: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the inverse frequencies that the last call has chosen, and the original ones, of shape `(dim / 2,)`."""
    return module.inv_freq, module.original_inv_freq


class _FullCache(DynamicCache):  # type: ignore[misc]  # transformers is not typed
    """A cache that says how many tokens it holds."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self._tokens = tokens

    def __bool__(self) -> bool:
        return True

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._tokens


def recomputes_beyond(model: Any, length: int) -> bool:
    """Ask a model whether `generate` drops the cache of `length` tokens, and computes all again, for the next one.

    Phi 3 does so where its frequencies change; other models go on with the keys of the frequencies before.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    name, ids = cache_name(inner), torch.ones(1, length + 1, dtype=torch.long)
    options: dict[str, Any] = {name: _FullCache(length), "attention_mask": torch.ones_like(ids)}
    parameters = inspect.signature(inner.prepare_inputs_for_generation).parameters
    if "cache_position" in parameters:  # before transformers 5.24
        options["cache_position"] = torch.tensor([length])
    else:
        options["next_sequence_length"] = 1
    return inner.prepare_inputs_for_generation(ids, **options).get(name) is None

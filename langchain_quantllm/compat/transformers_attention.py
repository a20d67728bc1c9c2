"""How an attention of our own gets into a model of transformers: registries, the name in a config, the cache object.

Registering is promised; what the registries hold, how a model finds its attention in them, and which arguments it hands
on are not. `missing_attention_api` says what is missing, and then nothing here may be used.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from transformers import Cache

INERT_ARGUMENTS = frozenset(
    {
        "dropout",
        "is_causal",
        "position_ids",
        "position_embeddings",
        "cache_position",
        "use_cache",
        "return_dict",
        "cache",
        "past_key_values",
        "layer_past",
        "num_items_in_batch",
    }
)
"""Arguments that models hand to their attention, and that change nothing of what it gives from a whole cache."""


@functools.cache
def missing_attention_api() -> str | None:
    """Say what this transformers lacks for an attention of our own; None where all is there."""
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    except ImportError as error:
        return f"this transformers has no such registry of attentions: {error}"
    needed: tuple[tuple[type, str], ...] = (
        (AttentionInterface, "register"),
        (AttentionMaskInterface, "register"),
        (type(ALL_ATTENTION_FUNCTIONS), "get_interface"),
        (type(ALL_MASK_ATTENTION_FUNCTIONS), "__getitem__"),
    )
    # Not by `hasattr`, which would find what their metaclass has.
    lost = [f"{kind.__name__}.{name}" for kind, name in needed if not any(name in vars(base) for base in kind.__mro__)]
    return f"this transformers has no {lost[0]}" if lost else None


def register(name: str, attend: Callable[..., Any], make_mask: Callable[..., Any]) -> None:
    """Register an attention, and what makes the mask for it."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, make_mask)


def attention_of(name: str | None, module: Any) -> Callable[..., Any]:
    """Return the attention that a module uses under a name: the registered one, or the eager one beside its class."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)  # type: ignore[no-any-return]


def mask_maker_of(name: str | None) -> Callable[..., Any]:
    """Return what makes the mask for the attention of a name."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    return ALL_MASK_ATTENTION_FUNCTIONS[name]  # type: ignore[no-any-return]


# The name in a config.


def names_attention(config: Any) -> bool:
    """Say whether a config is one by which modules look their attention up."""
    return hasattr(config, "_attn_implementation")


def attention_name(config: Any) -> str | None:
    """Read the name of the attention in a config, such as `"sdpa"`."""
    return config._attn_implementation  # type: ignore[no-any-return]


def set_attention_name(config: Any, name: str | None) -> None:
    """Put the name of an attention into a config."""
    config._attn_implementation = name


# The cache.


class WritingCache(Cache):  # type: ignore[misc]  # transformers is not typed
    """What a model takes for its cache: it hands new keys and values on, and keeps none."""

    def __init__(self, write: Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]) -> None:
        """Hand on to a function of keys, values and the layer's number, which gives the keys to go on with."""
        super().__init__(layers=[])
        self._write = write

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hand a layer's new keys and values on, each of shape `(1, kv_heads, tokens, dim)`."""
        return self._write(key_states, value_states, layer_idx), value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return 0: every token comes with its own position."""
        return 0

    def get_mask_sizes(self, query_length: Any, layer_idx: int) -> tuple[int, int]:
        """Return the sizes of a mask over the new tokens; whoever keeps the old ones has a rule for what is visible."""
        return (query_length if isinstance(query_length, int) else len(query_length)), 0

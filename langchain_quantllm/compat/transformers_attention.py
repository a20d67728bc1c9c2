"""Our own attention in models of transformers: its registries, the name in a config, and the cache object.

transformers promises that one can register an attention, but not the registries' content, the way a model looks its
attention up, or the arguments that it passes. If `missing_attention_api` names something, use nothing else here.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import Cache

CHUNKED_LAYER = "chunked_attention"
"""Kind of a layer, in a config, whose tokens see their own chunk only."""

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
        "logits_to_keep",
    }
)
"""Arguments that models pass to their attention and that do not change its output over a whole cache."""


@functools.cache
def missing_attention_api() -> str | None:
    """Return the part of the API for an attention of our own that this transformers lacks; None if it lacks none."""
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
    # `hasattr` would also find the attributes of their metaclass.
    lost = [f"{kind.__name__}.{name}" for kind, name in needed if not any(name in vars(base) for base in kind.__mro__)]
    return f"this transformers has no {lost[0]}" if lost else None


def register(name: str, attend: Callable[..., Any], make_mask: Callable[..., Any]) -> None:
    """Register an attention and the function that makes its mask."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, make_mask)


def attention_of(name: str | None, module: Any) -> Callable[..., Any]:
    """Return the attention that a module uses under a name: the registered one, or the eager one beside its class."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)  # type: ignore[no-any-return]


def mask_maker_of(name: str | None) -> Callable[..., Any]:
    """Return the function that makes the mask for an attention, by its name."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    return ALL_MASK_ATTENTION_FUNCTIONS[name]  # type: ignore[no-any-return]


def chunk_of(module: Any) -> int:
    """Return the size of the chunks that an attention module's layer is divided into; 0 for none.

    Only the mask knows it, which the model makes by the kind of the layer in its config.
    """
    config, layer = getattr(module, "config", None), getattr(module, "layer_idx", None)
    kinds = getattr(config, "layer_types", None)
    if not kinds or layer is None or kinds[layer] != CHUNKED_LAYER:
        return 0
    return int(config.attention_chunk_size)  # type: ignore[union-attr]


def attends_to_text(module: Any) -> bool:
    """Say whether a module attends to the tokens of a text; those of Inkling 2 between layers attend to layers."""
    return getattr(module, "is_causal", True) is not False or hasattr(module, "layer_idx")


def heads_in_turn(module: Any) -> int:
    """Return the number of key heads whose query heads take turns in an attention module; 0 for all other modules.

    Query head `h` of JetMoE, where a head of each expert is behind those of the one before, sees key head
    `h % key_heads`; elsewhere the query heads of a key head are behind each other.
    """
    return int(module.num_key_value_heads) if type(module).__name__ == "JetMoeAttention" else 0


def counting_layers(config: Any) -> set[int]:
    """List the layers of a text model that count the positions of their tokens themselves; see `WritingCache`."""
    if getattr(config, "attn_temperature_tuning", False):
        return {layer for layer, rotates in enumerate(config.no_rope_layers) if not rotates}
    if config.model_type == "inkling_text" and config.log_scaling_n_floor is not None:
        return {layer for layer, kind in enumerate(config.layer_types) if kind != "hybrid_sliding"}
    return set()


# The name in a config.


def names_attention(config: Any) -> bool:
    """Say whether a config has the name by which modules look up their attention."""
    return hasattr(config, "_attn_implementation")


def attention_name(config: Any) -> str | None:
    """Return the name of the attention in a config, such as `"sdpa"`."""
    return config._attn_implementation  # type: ignore[no-any-return]


def set_attention_name(config: Any, name: str | None) -> None:
    """Set the name of the attention in a config, and not in those inside it.

    The property sets it in all of these too, and Gemma 4's part for sounds takes no other attention than its own.
    """
    if "_attn_implementation_internal" in vars(config):
        config._attn_implementation_internal = name
    else:
        config._attn_implementation = name


def values_of(config: Any) -> Iterator[Any]:
    """Iterate over the values of a config, in a fixed order and without the name of the attention.

    Lists and dictionaries come as tuples, so that a change inside of them shows in a comparison.
    """
    for name, value in vars(config).items():
        if isinstance(value, list):
            yield tuple(value)
        elif isinstance(value, dict):
            yield tuple(value.items())
        elif not name.startswith("_attn_implementation"):
            yield value


# The cache.


class WritingCache(Cache):  # type: ignore[misc]  # transformers is not typed
    """A cache object for a model that passes new keys and values on to a function, and keeps none."""

    def __init__(
        self,
        write: Callable[[torch.Tensor, torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]],
        offsets: Callable[[int], torch.Tensor] | None = None,
    ) -> None:
        """Keep the functions.

        Args:
            write: Called with keys, values and the number of the layer; returns both for the attention.
            offsets: Called with the number of the layer; see `get_seq_length`. None if no layer asks.
        """
        super().__init__(layers=[])
        self._write = write
        self._offsets = offsets
        self.answers_queries = False
        """Whether a layer that asks where its queries are is answered; see `get_query_offset`."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Pass a layer's new keys and values on, each of shape `(1, kv_heads, tokens, dim)`."""
        return self._write(key_states, value_states, layer_idx)

    def get_seq_length(self, layer_idx: int | None = None) -> Any:
        """Return 0: the caller gives the position of every token.

        A layer that names itself, as some of Llama 4's do, adds the result to the indices of its tokens and takes the
        sums for positions. It gets the difference for each token, of shape `(tokens,)`.
        """
        return 0 if layer_idx is None or self._offsets is None else self._offsets(layer_idx)

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        """Return 0, to functions that make masks; to a layer, when it `answers_queries`, as `get_seq_length` does."""
        return self.get_seq_length(layer_idx) if self.answers_queries else 0

    def get_mask_sizes(self, query_length: Any, layer_idx: int) -> tuple[int, int]:
        """Return the sizes of a mask over the new tokens only; the attention itself masks the cached ones."""
        return (query_length if isinstance(query_length, int) else len(query_length)), 0

"""Indexers of transformers, which choose the tokens that an attention sees (DeepSeek Sparse Attention).

An indexer scores the tokens so far by keys of its own, and returns the indices of the best ones. transformers 5.24
keeps its keys in the layer's cache, and hands the indices to an attention that is none of its own as `indices`. An
indexer that works in another way is not recognized, and its model is refused.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import Cache

INDEXED_LAYER = "indexed_attention"
"""Kind of a layer, in a config, whose attention sees chosen tokens only."""

INDICES_ARGUMENT = "indices"
"""How models call the chosen tokens that they pass to their attention."""

MASKED_ATTENTIONS = ("eager", "sdpa")
"""Attentions that models hide the other tokens from by a mask, in place of `indices`."""

_MASK = "attention_mask"
_TAKEN = {"hidden_states", "position_embeddings", _MASK, "position_ids", "cache"}
_SIZES = ("index_topk", "n_heads", "layer_idx")
_STORE = "update_indexer"


def indexed_layers(config: Any) -> set[int]:
    """List the layers of a text model whose attention sees chosen tokens, by an indexer of their own or another's."""
    return {i for i, kind in enumerate(getattr(config, "layer_types", None) or ()) if kind == INDEXED_LAYER}


def indexers(model: torch.nn.Module) -> Iterator[Any]:
    """Iterate over the indexers of a model that are known: they choose single tokens, by their keys and positions."""
    kinds = {kind for kind in {type(module) for module in model.modules()} if _is_known(kind)}
    for module in model.modules():
        if type(module) in kinds and all(isinstance(getattr(module, name, None), int) for name in _SIZES):
            yield module


def has_unknown_indexer(model: torch.nn.Module) -> bool:
    """Say whether a model has an indexer, or a layer with chosen tokens, beside known ones."""
    config = model.config.get_text_config()
    known = {id(module) for module in indexers(model)}
    needs_some = bool(indexed_layers(config)) or getattr(config, "index_topk", None) is not None
    return (needs_some and not known) or any(_stores(type(m)) and id(m) not in known for m in model.modules())


def _forward_of(kind: type) -> Any:
    return inspect.unwrap(kind.forward)  # type: ignore[attr-defined]


def _stores(kind: type) -> bool:
    code = getattr(_forward_of(kind), "__code__", None)
    return code is not None and _STORE in code.co_names


def _is_known(kind: type) -> bool:
    return _stores(kind) and inspect.signature(_forward_of(kind)).parameters.keys() >= _TAKEN


def index_keys_of(layer: Any) -> torch.Tensor | None:
    """Return the keys of an indexer in a layer of a filled cache, of shape `(rows, tokens, dim)`; None if it has none.

    A layer that takes over the indices of another one has none.
    """
    return getattr(layer, "indexer_keys", None)


def ignored_index_mask(config: Any) -> torch.Tensor | None:
    """Return a mask for a model that hands a part of it to its indexers, which ignore it; None for other models."""
    return torch.ones(1, 1, 1, 1, dtype=torch.bool) if indexed_layers(config) else None


def limited_forward(module: Any, most: int) -> Callable[..., torch.Tensor]:
    """Return an indexer's own forward that chooses at most so many tokens."""
    limited = copy.copy(module)  # its layers are the same
    vars(limited).pop("forward", None)
    limited.index_topk = most
    return limited.forward  # type: ignore[no-any-return]


class IndexCache(Cache):  # type: ignore[misc]  # transformers is not typed
    """The cache that an indexer is called with for some rows: it passes new keys on, and returns the ones so far."""

    def __init__(self, update: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Keep the function, which takes `(rows, new tokens, dim)` and returns `(rows, tokens, dim)`."""
        super().__init__(layers=[])
        self._update = update

    def update_indexer(self, indexer_key_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Store the new keys of an indexer; returns those of all tokens so far."""
        return self._update(indexer_key_states)


def arguments_for(
    module: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    take: Callable[[torch.Tensor], torch.Tensor],
    mask: torch.Tensor,
    cache: IndexCache,
) -> dict[str, Any]:
    """Return the arguments of an indexer for some of its tokens.

    Args:
        module: The indexer.
        args: What the model calls it with for all tokens.
        kwargs: The same by name.
        take: Takes the tokens from a tensor of shape `(1, all tokens, ...)`; returns others as they are.
        mask: The tokens that each one sees, of shape `(rows, new tokens, tokens)`, bool.
        cache: Keeps the keys.
    """
    names = list(inspect.signature(_forward_of(type(module))).parameters)[1:]
    given = dict(zip(names, args, strict=False)) | kwargs
    return {name: _taken(value, take) for name, value in given.items()} | {_MASK: mask, "cache": cache}


def _taken(value: Any, take: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(value, tuple):
        return tuple(_taken(one, take) for one in value)
    return take(value) if isinstance(value, torch.Tensor) else value


def hide_unchosen(mask: torch.Tensor, indices: torch.Tensor, keys: int) -> torch.Tensor:
    """Hide all but the chosen keys in a mask, as the models do for transformers' own attention.

    Args:
        mask: Of shape `(rows, 1, tokens, keys)`: bool, or added to the scores.
        indices: The chosen keys of each token, of shape `(rows, tokens, chosen)`.
        keys: The number of keys.
    """
    hidden = torch.ones((*indices.shape[:2], keys), dtype=torch.bool, device=indices.device)
    hidden = hidden.scatter(-1, indices.long(), False)[:, None]
    if mask.dtype == torch.bool:
        return mask & ~hidden
    return mask.masked_fill(hidden, torch.finfo(mask.dtype).min)

"""The facts of a model: what its config rules out, and what a first forward shows.

Owns the rules that a config decides and the layers' caches and states. Knows no blocks.
"""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass, field
from typing import Any

import torch

from langchain_quantllm.compat.transformers_alibi import has_known_biases, is_biased_by_distance
from langchain_quantllm.compat.transformers_attention import CHUNKED_LAYER, missing_attention_api
from langchain_quantllm.compat.transformers_indexers import INDEXED_LAYER, has_unknown_indexer
from langchain_quantllm.compat.transformers_models import cache_of
from langchain_quantllm.compat.transformers_states import OTHER_LAYER_TYPES, states_of
from langchain_quantllm.engine.attention import without_gradients
from langchain_quantllm.engine.kv_cache import LayerShape, layers_of, shapes_of
from langchain_quantllm.engine.own_logits import SAMPLE_TOKENS, difference, in_pieces, is_rounding, plain, sample_ids
from langchain_quantllm.engine.state_pool import StateShape, state_shapes
from langchain_quantllm.errors import UnsupportedError
from langchain_quantllm.kernels.kv_quantization import key_factors

_LAYER_TYPES = {"full_attention", "sliding_attention", CHUNKED_LAYER, INDEXED_LAYER, *OTHER_LAYER_TYPES}
_STATE_TOLERANCE = 0.05  # of a state that several tokens leave, to that of single ones


def unsupported_reason(model: Any) -> str | None:
    """Find the reason, as far as the config tells, why a model cannot run; None if there is none."""
    if (reason := missing_attention_api()) is not None:
        return reason
    config = model.config
    text = config.get_text_config()
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder model"
    # "vision" is among the tokens of an image only.
    looks_ahead = getattr(text, "use_bidirectional_attention", None) not in (None, False, "vision")
    if looks_ahead or not getattr(text, "is_causal", True):
        return "its attention looks ahead"
    if others := set(getattr(text, "layer_types", None) or ()) - _LAYER_TYPES:
        return f"it has layers of kind {min(others)!r}, which store something other than keys and values"
    if is_biased_by_distance(text) and not any(map(has_known_biases, model.modules())):
        return "its attention is biased by distance (ALiBi) in an unknown way"
    if has_unknown_indexer(model):
        return "an indexer of an unknown kind chooses the tokens that its attention sees"
    if getattr(text, "attention_chunk_size", None) is not None and getattr(text, "layer_types", None) is None:
        return "its attention is divided into chunks"
    if not hasattr(model, "get_input_embeddings") or model.get_input_embeddings() is None:
        return "it has no input embeddings"
    return None


@dataclass(frozen=True, kw_only=True)
class ModelProbe:
    """The facts that a first forward of a model shows.

    Args:
        layers: Numbers of the layers that keep keys and values.
        shapes: Shape of each of these layers' keys and values.
        key_factors: The factors of each one's keys, of this forward, for a KV cache in int8; see `kv_quantization`.
        windows: Sliding window, or chunk, of each of them, 0 for none.
        states: Shapes of the states that other layers, or the same ones, keep for each sequence.
        continues: Whether several tokens at once go on from these states; else single tokens do.
        vocab_size: Width of the logits.
    """

    layers: list[int]
    shapes: list[LayerShape]
    windows: list[int]
    states: list[StateShape]
    continues: bool
    vocab_size: int
    key_factors: list[torch.Tensor | None] = field(default_factory=list)

    @property
    def layer_count(self) -> int:
        """Layers up to the last one that keeps anything."""
        return 1 + max([*self.layers, *(state.key.layer for state in self.states)])

    @property
    def reach(self) -> int:
        """The last positions that a token sees in any layer; 0 if it sees all in some."""
        return max(self.windows) if self.windows and all(self.windows) else 0


@without_gradients
def inspect_model(model: Any, uncached: abc.Sequence[LayerShape] = ()) -> ModelProbe:
    """Run one short text and read the layers of its cache.

    Args:
        model: The model.
        uncached: What the layers of a model without a cache would keep in one; see `own_attention`.

    Raises:
        UnsupportedError: If the model keeps no cache of keys and values.
    """
    try:
        output = plain(model, sample_ids(model, SAMPLE_TOKENS))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        msg = f"its forward fails on plain token ids: {error!r}"
        raise UnsupportedError(msg) from error
    cache = cache_of(output)
    if cache is None and uncached:
        return ModelProbe(
            layers=list(range(len(uncached))),
            shapes=list(uncached),
            windows=[0] * len(uncached),
            states=[],
            continues=True,
            vocab_size=output.logits.shape[-1],
        )
    if cache is None or not getattr(cache, "layers", None):
        msg = "it gives no cache of keys and values"
        raise UnsupportedError(msg)
    try:
        shapes = shapes_of(cache)
    except ValueError as error:
        raise UnsupportedError(str(error)) from error
    if any(not shape.dtype.is_floating_point or shape.dtype.itemsize < 2 for shape in shapes):
        msg = f"its cache is in {shapes[0].dtype}"
        raise UnsupportedError(msg)
    layers = layers_of(cache)
    states = state_shapes(states_of(cache))
    if not layers and not states:
        msg = "it gives no cache of keys and values"
        raise UnsupportedError(msg)
    return ModelProbe(
        layers=list(layers),
        shapes=shapes,
        windows=[getattr(layer, "sliding_window", None) or 0 for layer in layers.values()],
        states=states,
        continues=not states or _continues(model),
        vocab_size=output.logits.shape[-1],
        key_factors=[key_factors(layer.keys[0]) for layer in layers.values()],
    )


def _continues(model: Any) -> bool:
    """Whether several tokens of a model go on from its states; Mamba 1 of transformers begins anew then."""
    ids = sample_ids(model, SAMPLE_TOKENS)
    half = len(ids) // 2
    several, of_several = in_pieces(model, ids, [0, half, len(ids)])
    singles, of_singles = in_pieces(model, ids, [0, *range(half, len(ids) + 1)])
    noise = difference(singles, plain(model, ids).logits[0].float())
    # Of the first layer, as its inputs are the same to the last bit.
    first = {
        key: state for key, state in states_of(of_singles).items() if key.layer == min(states_of(of_singles)).layer
    }
    states = [_distance(states_of(of_several)[key], state) for key, state in first.items()]
    return max(states) <= _STATE_TOLERANCE and is_rounding(model, difference(several, singles), noise)


def _distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm().clamp(min=1e-12))

"""Which models the fast engine can drive, found out before any of its text is believed.

Owns the rules that a config decides, the reference (a few tokens through the model as it is, with
which the engine's own logits are compared once), and what tells that a model has changed since.
Knows no scheduling.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from langchain_quantllm.compat.peft import is_kind_of_layers, state_of
from langchain_quantllm.compat.transformers_attention import why_not_offered
from langchain_quantllm.compat.transformers_models import cache_name, cache_of
from langchain_quantllm.engine.attention import without_gradients
from langchain_quantllm.engine.cuda_graphs import hooks_of
from langchain_quantllm.engine.kv_cache import LayerShape, shapes_of
from langchain_quantllm.errors import UnsupportedError

_LAYER_TYPES = {"full_attention", "sliding_attention"}
_MOVING_ROPES = ("dynamic", "longrope")
_FLOORS = {torch.float32: 1e-3, torch.float64: 1e-3}
_FLOOR_16BIT = 0.05
_NOISE_FACTOR = 4.0

LONG, SHORT = 21, 5
"""Lengths of the two texts of a check, in tokens: one that fills a page and more, one that does not."""


def unsupported_reason(model: Any) -> str | None:
    """Give the reason, as far as its config tells, why a model cannot be driven; None where nothing is against it."""
    if (reason := why_not_offered()) is not None:
        return reason
    config = model.config
    text = config.get_text_config()
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder model"
    if not getattr(text, "is_causal", True) or getattr(text, "use_bidirectional_attention", False):
        return "its attention looks ahead"
    if others := set(getattr(text, "layer_types", None) or ()) - _LAYER_TYPES:
        return f"it has layers of kind {min(others)!r}, which keep something else than keys and values"
    if getattr(text, "alibi", False) or getattr(getattr(text, "attn_config", None), "alibi", False):
        return "its attention is biased by distance (ALiBi)"
    if getattr(text, "kv_lora_rank", None) is not None:
        return "its cache holds what keys and values are made of, not these"
    if getattr(text, "attention_chunk_size", None) is not None:
        return "its attention goes by chunks"
    if rope := _moving_rope(getattr(text, "rope_parameters", None)):
        return f"its {rope!r} rotary positions change with the longest text of the batch"
    if not hasattr(model, "get_input_embeddings") or model.get_input_embeddings() is None:
        return "it has no input embeddings"
    return None


def _moving_rope(parameters: Any) -> str | None:
    if not isinstance(parameters, Mapping):
        return None
    kinds = [parameters.get("rope_type"), *(p.get("rope_type") for p in parameters.values() if isinstance(p, Mapping))]
    return next((kind for kind in kinds if kind in _MOVING_ROPES), None)


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What a first forward of the model tells.

    Args:
        shapes: What each layer stores.
        windows: Sliding window of each layer, 0 for none.
        vocab_size: Width of the logits.
    """

    shapes: list[LayerShape]
    windows: list[int]
    vocab_size: int


@without_gradients
def probe(model: Any) -> Probe:
    """Run one short text and look at what its cache holds.

    Raises:
        UnsupportedError: If the model keeps no cache of keys and values.
    """
    try:
        output = _plain(model, sample_ids(model, LONG))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        msg = f"its forward fails on plain token ids: {error!r}"
        raise UnsupportedError(msg) from error
    cache = cache_of(output)
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
    return Probe(
        shapes=shapes,
        windows=[getattr(layer, "sliding_window", None) or 0 for layer in cache.layers],
        vocab_size=output.logits.shape[-1],
    )


def sample_ids(model: Any, count: int) -> list[int]:
    """Give token ids to try a model with: any will do, spread over its vocabulary."""
    vocab_size = model.get_input_embeddings().weight.shape[0]
    return [(7919 * (i + 1) + 13 * count) % vocab_size for i in range(count)]


@without_gradients
def compare(model: Any, texts: Sequence[Sequence[int]], ours: Sequence[torch.Tensor]) -> None:
    """Compare logits of the engine with those that the model gives by itself.

    How far apart two ways of computing the same may lie differs between dtypes and quantization
    schemes, so the model's own spread is measured too: at once against piece by piece, the last tokens one by one.

    Args:
        model: The model.
        texts: Token ids, each text's last tokens drawn by the engine.
        ours: For each text the engine's logits after its last tokens, of shape `(tokens, vocab)`.

    Raises:
        UnsupportedError: If they differ by more than rounding does.
    """
    for text, logits in zip(texts, ours, strict=True):
        last = len(logits)
        expected = _plain(model, text).logits[0, -last:].float()
        again = _piece_by_piece(model, text, last)[-last:]
        if not expected.isfinite().all():
            continue  # the model itself is broken; its rows will say so
        noise = _difference(again, expected)
        floor = _FLOORS.get(model.dtype, _FLOOR_16BIT)
        found = _difference(logits.float().to(expected.device), expected)
        if not found <= max(floor, _NOISE_FACTOR * noise):
            msg = (
                f"it does not give its own logits when driven over pages (a difference of {found:.2g}, where its own "
                f"spread is {noise:.2g})"
            )
            raise UnsupportedError(msg)


def _piece_by_piece(model: Any, text: Sequence[int], single: int) -> torch.Tensor:
    """Give the model's own logits of shape `(tokens, vocab)`: of two pieces, then of single tokens.

    Some kernels for one row round otherwise than those for several.
    """
    cuts = [0, len(text) // 2, *range(len(text) - single + 1, len(text) + 1)]
    logits, cache = [], None
    for start, end in itertools.pairwise(cuts):
        if end > start:
            output = _plain(model, text[start:end], cache)
            cache = cache_of(output)
            logits.append(output.logits[0].float())
    return torch.cat(logits)


def _plain(model: Any, ids: Sequence[int], cache: Any = None) -> Any:
    device = model.get_input_embeddings().weight.device
    given = torch.tensor([ids], device=device)
    seen = 0 if cache is None else cache.get_seq_length()
    mask = torch.ones(1, seen + len(ids), dtype=torch.long, device=device)
    positions = {}
    if model.config.get_text_config() is not model.config:
        # Qwen-VL goes on from the positions of the last image that anybody has shown it.
        positions = {"position_ids": torch.arange(seen, seen + len(ids), device=device)[None]}
    given_cache = {} if cache is None else {cache_name(model): cache}
    return model(input_ids=given, attention_mask=mask, use_cache=True, **given_cache, **positions)


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Size of the difference of two sets of logits, relative to the spread of the second; a constant does not count."""
    found, expected = (t - t.mean(-1, keepdim=True) for t in (found, expected))
    return float((found - expected).norm() / expected.norm().clamp(min=1e-12))


def fingerprint(model: Any, *, names_adapters: bool = False) -> int:
    """Tell a model from itself with other weights, adapters or hooks; quick, as it is asked whenever requests come.

    Weights that are changed through `.data` in place are not seen: nothing counts these changes.

    Args:
        model: The model.
        names_adapters: Whether every request names its adapter, so that the active one does not matter.
    """
    parts: list[Any] = []
    is_peft: dict[type, bool] = {}
    waiting, seen = [model], set()
    while waiting:  # `model.modules()` takes three times as long
        module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        parts.append(id(module))
        kind = type(module)
        if module._modules:
            waiting += [child for child in module._modules.values() if child is not None]
        for p in module._parameters.values():
            if p is not None:
                parts += (id(p), p._version, p.data_ptr())
        if module._forward_hooks or module._forward_pre_hooks:
            parts += hooks_of(module)
        if kind not in is_peft:
            is_peft[kind] = is_kind_of_layers(kind)
        if is_peft[kind]:
            parts += state_of(module, names_adapters=names_adapters)
    return hash(tuple(parts))

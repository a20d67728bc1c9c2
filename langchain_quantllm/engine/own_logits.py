"""A model's own logits, and how far apart two ways of computing them may lie.

Knows the model's own forward alone, at once and piece by piece; the engine's logits are given.
"""

from __future__ import annotations

import itertools
from collections import abc
from typing import Any

import torch

from langchain_quantllm.compat.transformers_models import cache_name, cache_of, forward_parameters
from langchain_quantllm.compat.transformers_vision import remembers_positions
from langchain_quantllm.engine.attention import without_gradients
from langchain_quantllm.engine.forward_context import current_context
from langchain_quantllm.engine.kv_cache import layers_of
from langchain_quantllm.engine.rounding_spread import RoundedLayers
from langchain_quantllm.errors import UnsupportedError

_FLOORS = {torch.float32: 1e-3, torch.float64: 1e-3}
_FLOOR_16BIT = 0.05
_NOISE_FACTOR = 4.0
_ROUNDINGS = 2.0
"""How many times as far as one more rounding in each layer moves its logits a model's may lie apart: 1.3 were seen."""

SAMPLE_TOKENS = 21  # of a text that fills more than a block


def sample_ids(model: Any, count: int) -> list[int]:
    """Choose token ids for a check, spread over the vocabulary."""
    vocab_size = model.get_input_embeddings().weight.shape[0]
    return [(7919 * (i + 1) + 13 * count) % vocab_size for i in range(count)]


@without_gradients
def compare_logits(
    model: Any, text: abc.Sequence[int], logits: torch.Tensor, *, cut: int, continues: bool, least: float = 0.0
) -> bool:
    """Compare the engine's logits with the model's own.

    How far apart two ways of computing the same may lie differs between dtypes and quantization schemes, so the
    model's own spread is measured too: the whole text at once against piece by piece, the last tokens one by one; in 16
    bits, where that is not enough, with layers that round otherwise as well.

    Args:
        model: The model.
        text: Token ids; the engine has sampled the last ones.
        logits: The engine's logits after its last tokens, of shape `(tokens, vocab)`.
        cut: Tokens of the first piece.
        continues: Whether the model's own second piece may be several tokens.
        least: A difference that is allowed in any case.

    Returns:
        Whether the model's own logits are numbers; else it is broken, and its requests will fail with that.

    Raises:
        UnsupportedError: If they differ by more than rounding does.
    """
    last = len(logits)
    expected = plain(model, text, keep=last).logits[0, -last:].float()
    if not expected.isfinite().all():
        return False
    noise = max(_noise(model, text, expected, cut=cut, continues=continues), least / _NOISE_FACTOR)
    found = difference(logits.float().to(expected.device), expected)
    if not is_rounding(model, found, noise) and model.dtype not in _FLOORS:
        noise = max(noise, _ROUNDINGS / _NOISE_FACTOR * _rounding_noise(model, text, expected))
    check_logits(model, logits, expected, noise)
    return True


def _noise(model: Any, text: abc.Sequence[int], expected: torch.Tensor, *, cut: int, continues: bool) -> float:
    """Measure how far the model's last logits lie from those that it computes itself in pieces and single tokens.

    Some kernels for one row round differently from those for several.
    """
    last = len(expected)
    singles = range(len(text) - last + 1, len(text) + 1)
    pieces, _ = in_pieces(model, text, [0, *[cut] * continues, *singles], keep=last)
    return difference(pieces[-last:], expected)


def _rounding_noise(model: Any, text: abc.Sequence[int], expected: torch.Tensor) -> float:
    """Measure how far the model's last logits lie from those with layers that round otherwise."""
    rounded = RoundedLayers(model)
    try:
        logits = plain(model, text, keep=len(expected)).logits[0, -len(expected) :].float()
    finally:
        rounded.close()
    return difference(logits, expected)


@without_gradients
def own_spread(model: Any, last: int, *, continues: bool = True) -> float:
    """Measure how far the model's own logits after the last tokens of a text lie apart; see `compare_logits`."""
    text = sample_ids(model, SAMPLE_TOKENS)
    expected = plain(model, text).logits[0, -last:].float()
    return _noise(model, text, expected, cut=len(text) // 2, continues=continues)


def check_logits(
    model: Any, logits: torch.Tensor, expected: torch.Tensor, noise: float, *, where: str = "over KV cache blocks"
) -> None:
    """Check the engine's logits against the model's own, whose spread is given, both of shape `(tokens, vocab)`.

    `where` says in the error where they were computed.

    Raises:
        UnsupportedError: If they differ by more than rounding does.
    """
    found = difference(logits.float().to(expected.device), expected)
    if not is_rounding(model, found, noise):
        msg = f"its logits {where} are not its own (a difference of {found:.2g}, where its own spread is {noise:.2g})"
        raise UnsupportedError(msg)


def is_rounding(model: Any, found: float, noise: float) -> bool:
    """Whether logits may differ by so much in a model's dtype, if its own ones differ by `noise`."""
    return found <= max(_FLOORS.get(model.dtype, _FLOOR_16BIT), _NOISE_FACTOR * noise)


def in_pieces(
    model: Any, text: abc.Sequence[int], cuts: abc.Sequence[int], *, keep: int | None = None
) -> tuple[torch.Tensor, Any]:
    """Compute the model's own logits, of shape `(tokens, vocab)`, piece by piece; returns its cache as well.

    With `keep`, other logits than those of so many last tokens of each piece may be missing.
    """
    logits, cache = [], None
    for start, end in itertools.pairwise(cuts):
        if end > start:
            seen = 0 if cache is None else start  # a model without a cache begins anew
            output = plain(model, text[seen:end], cache, seen=seen, keep=keep)
            cache = cache_of(output)
            logits.append(output.logits[0, start - end :].float())
    return torch.cat(logits), cache


def plain(model: Any, ids: abc.Sequence[int], cache: Any = None, seen: int = 0, *, keep: int | None = None) -> Any:
    """Call the model; with `keep` it need not compute other logits than those of so many last tokens."""
    if (context := current_context()) is not None:
        context.first_position = seen
    device = model.get_input_embeddings().weight.device
    given = torch.tensor([ids], device=device)
    masked = len(ids) if cache is None or not layers_of(cache) else seen + len(ids)  # states say nothing of the past
    mask = torch.ones(1, masked, dtype=torch.long, device=device)
    positions = {}
    if remembers_positions(model):
        positions = {"position_ids": torch.arange(seen, seen + len(ids), device=device)[None]}
    options = {} if cache is None else {cache_name(model): cache}
    if keep is not None and "logits_to_keep" in forward_parameters(model):
        options["logits_to_keep"] = keep
    return model(input_ids=given, attention_mask=mask, use_cache=True, **options, **positions)


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Compute the distance of two sets of logits relative to the spread of the second, up to an offset of each row."""
    found, expected = (t - t.mean(-1, keepdim=True) for t in (found, expected))
    return float((found - expected).norm() / expected.norm().clamp(min=1e-12))

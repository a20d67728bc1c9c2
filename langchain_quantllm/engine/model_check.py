"""Checks whether the continuous engine can run a model, before any of its text is returned.

Owns the rules that a config decides, a first forward that inspects the model, and the comparison of the engine's logits
with the model's own. Knows no scheduling policy.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import abc
from dataclasses import dataclass
from typing import Any

import torch

from langchain_quantllm.compat.transformers_attention import missing_attention_api
from langchain_quantllm.compat.transformers_models import cache_name, cache_of
from langchain_quantllm.engine.adapter_switch import AdapterSwitch
from langchain_quantllm.engine.attention import without_gradients
from langchain_quantllm.engine.block_manager import BlockManager
from langchain_quantllm.engine.forward_context import ForwardContext, forward_context
from langchain_quantllm.engine.fusion.fuse import Fusion
from langchain_quantllm.engine.kv_cache import LayerShape, shapes_of
from langchain_quantllm.engine.model_runner import ModelRunner
from langchain_quantllm.engine.scheduler import Scheduler
from langchain_quantllm.engine.sequence import SamplingInput, Sequence, bare_sequence
from langchain_quantllm.errors import UnsupportedError
from langchain_quantllm.options import BASE_ADAPTER

_LAYER_TYPES = {"full_attention", "sliding_attention"}
_FLOORS = {torch.float32: 1e-3, torch.float64: 1e-3}
_FLOOR_16BIT = 0.05
_NOISE_FACTOR = 4.0

_LONG, _SHORT = 21, 5  # tokens of the two texts of a check: one fills more than a block, one does not
_BLOCKS, _NEW_TOKENS = 6, 3  # of the verification


def unsupported_reason(model: Any) -> str | None:
    """Find the reason, as far as the config tells, why a model cannot run; None if there is none."""
    if (reason := missing_attention_api()) is not None:
        return reason
    config = model.config
    text = config.get_text_config()
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder model"
    if not getattr(text, "is_causal", True) or getattr(text, "use_bidirectional_attention", False):
        return "its attention looks ahead"
    if others := set(getattr(text, "layer_types", None) or ()) - _LAYER_TYPES:
        return f"it has layers of kind {min(others)!r}, which store something other than keys and values"
    if getattr(text, "alibi", False) or getattr(getattr(text, "attn_config", None), "alibi", False):
        return "its attention is biased by distance (ALiBi)"
    if getattr(text, "index_topk", None) is not None:
        return "an indexer chooses the tokens that its attention sees"
    if getattr(text, "attention_chunk_size", None) is not None:
        return "its attention is divided into chunks"
    if not hasattr(model, "get_input_embeddings") or model.get_input_embeddings() is None:
        return "it has no input embeddings"
    return None


@dataclass(frozen=True, kw_only=True)
class ModelProbe:
    """The facts that a first forward of a model shows.

    Args:
        shapes: Shape of each layer's keys and values.
        windows: Sliding window of each layer, 0 for none.
        vocab_size: Width of the logits.
    """

    shapes: list[LayerShape]
    windows: list[int]
    vocab_size: int


@without_gradients
def inspect_model(model: Any) -> ModelProbe:
    """Run one short text and read the layers of its cache.

    Raises:
        UnsupportedError: If the model keeps no cache of keys and values.
    """
    try:
        output = _plain(model, sample_ids(model, _LONG))
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
    return ModelProbe(
        shapes=shapes,
        windows=[getattr(layer, "sliding_window", None) or 0 for layer in cache.layers],
        vocab_size=output.logits.shape[-1],
    )


def sample_ids(model: Any, count: int) -> list[int]:
    """Choose token ids for a check, spread over the vocabulary."""
    vocab_size = model.get_input_embeddings().weight.shape[0]
    return [(7919 * (i + 1) + 13 * count) % vocab_size for i in range(count)]


@without_gradients
def verify_engine(
    runner: ModelRunner,
    model: Any,
    probe: ModelProbe,
    switch: AdapterSwitch | None = None,
    fusion: Fusion | None = None,
) -> None:
    """Run two texts through the runner, in chunks and in one batch, and compare with the model itself.

    Args:
        runner: Runs the model.
        model: The model.
        probe: The facts of its first forward.
        switch: Its adapters; each of the two texts uses a different one. None if the model runs as it is.
        fusion: Its fused steps, some of which are more exact than the model's own; None if there are none.

    Raises:
        UnsupportedError: If the model cannot run this way, or gives other logits.
    """
    texts = [sample_ids(model, count) for count in (_LONG, _SHORT)]
    names = [None, None] if switch is None else [*switch.names, BASE_ADAPTER][:2]
    numbers = [-1 if switch is None or name not in switch.names else switch.names.index(name) for name in names]
    sequences = [bare_sequence(ids, _NEW_TOKENS, adapter=i) for ids, i in zip(texts, numbers, strict=True)]
    try:
        scheduler = Scheduler(
            BlockManager(_BLOCKS), slots=2, step_tokens=_LONG - 6, step_tokens_while_decoding=_LONG - 6
        )
        logits = run_greedily(runner, sequences, scheduler)
    except (UnsupportedError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        msg = f"its own code fails over KV cache blocks: {error!r}"
        raise UnsupportedError(msg) from error
    windows = [runner.windows.get(i) for i in range(len(probe.shapes))]
    if None in windows:
        msg = "its attention cannot be replaced"
        raise UnsupportedError(msg)
    if windows != probe.windows:
        msg = f"its attention sees windows of {windows} tokens, and its cache keeps {probe.windows}"
        raise UnsupportedError(msg)
    for sequence, name in zip(sequences, names, strict=True):
        with contextlib.ExitStack() as chosen:
            if switch is not None:
                chosen.enter_context(switch.chosen(name))
            # The engine's own way of modules that round more by themselves.
            exact = forward_context(ForwardContext()) if fusion is None else fusion.exact()
            chosen.enter_context(exact)
            _compare(model, sequence.ids[:-1], torch.stack(logits[sequence]))


def run_greedily(
    runner: ModelRunner, sequences: abc.Sequence[Sequence], scheduler: Scheduler
) -> dict[Sequence, list[torch.Tensor]]:
    """Run greedy sequences to their end, and return the logits that each one's tokens were sampled from."""
    logits: dict[Sequence, list[torch.Tensor]] = {sequence: [] for sequence in sequences}
    for sequence in sequences:
        scheduler.add(sequence)
    while (plan := scheduler.plan()) is not None:
        forward = runner.run(plan, [SamplingInput()] * len(plan.sampled))
        if not plan.sampled:
            continue
        ids, _ = runner.sample(forward).wait()
        for i, sequence in enumerate(plan.sampled):
            logits[sequence].append(forward.logits[i].clone())
            scheduler.push(sequence, max(0, ids[i]))
            if sequence.is_complete:
                scheduler.remove(sequence)
    return logits


@without_gradients
def _compare(model: Any, text: abc.Sequence[int], logits: torch.Tensor) -> None:
    """Compare the engine's logits with the model's own.

    How far apart two ways of computing the same may lie differs between dtypes and quantization schemes, so the
    model's own spread is measured too: the whole text at once against piece by piece, the last tokens one by one.

    Args:
        model: The model.
        text: Token ids; the engine has sampled the last ones.
        logits: The engine's logits after its last tokens, of shape `(tokens, vocab)`.

    Raises:
        UnsupportedError: If they differ by more than rounding does.
    """
    last = len(logits)
    expected = _plain(model, text).logits[0, -last:].float()
    if not expected.isfinite().all():
        return  # the model itself is broken; its requests will fail with that
    noise = _difference(_piece_by_piece(model, text, last)[-last:], expected)
    floor = _FLOORS.get(model.dtype, _FLOOR_16BIT)
    found = _difference(logits.float().to(expected.device), expected)
    if not found <= max(floor, _NOISE_FACTOR * noise):
        msg = (
            f"its logits over KV cache blocks are not its own (a difference of {found:.2g}, where its own spread is "
            f"{noise:.2g})"
        )
        raise UnsupportedError(msg)


def _piece_by_piece(model: Any, text: abc.Sequence[int], single: int) -> torch.Tensor:
    """Compute the model's own logits, of shape `(tokens, vocab)`, in two pieces and then single tokens.

    Some kernels for one row round differently from those for several.
    """
    cuts = [0, len(text) // 2, *range(len(text) - single + 1, len(text) + 1)]
    logits, cache = [], None
    for start, end in itertools.pairwise(cuts):
        if end > start:
            output = _plain(model, text[start:end], cache)
            cache = cache_of(output)
            logits.append(output.logits[0].float())
    return torch.cat(logits)


def _plain(model: Any, ids: abc.Sequence[int], cache: Any = None) -> Any:
    device = model.get_input_embeddings().weight.device
    given = torch.tensor([ids], device=device)
    seen = 0 if cache is None else cache.get_seq_length()
    mask = torch.ones(1, seen + len(ids), dtype=torch.long, device=device)
    positions = {}
    if model.config.get_text_config() is not model.config:
        # Qwen-VL goes on from the positions of the last image that it was given.
        positions = {"position_ids": torch.arange(seen, seen + len(ids), device=device)[None]}
    given_cache = {} if cache is None else {cache_name(model): cache}
    return model(input_ids=given, attention_mask=mask, use_cache=True, **given_cache, **positions)


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Compute the distance of two sets of logits relative to the spread of the second, up to an offset of each row."""
    found, expected = (t - t.mean(-1, keepdim=True) for t in (found, expected))
    return float((found - expected).norm() / expected.norm().clamp(min=1e-12))

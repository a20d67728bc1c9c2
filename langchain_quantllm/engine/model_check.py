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

from langchain_quantllm.compat.transformers_alibi import has_known_biases, is_biased_by_distance
from langchain_quantllm.compat.transformers_attention import CHUNKED_LAYER, counting_layers, missing_attention_api
from langchain_quantllm.compat.transformers_indexers import INDEXED_LAYER, has_unknown_indexer, indexed_layers
from langchain_quantllm.compat.transformers_models import cache_name, cache_of, forward_parameters
from langchain_quantllm.compat.transformers_states import OTHER_LAYER_TYPES, states_of
from langchain_quantllm.compat.transformers_vision import remembers_positions
from langchain_quantllm.engine.adapter_switch import AdapterSwitch
from langchain_quantllm.engine.attention import without_gradients
from langchain_quantllm.engine.block_manager import BLOCK_TOKENS, BlockManager
from langchain_quantllm.engine.checked_length import checked_length
from langchain_quantllm.engine.forward_context import ForwardContext, forward_context
from langchain_quantllm.engine.fusion.fuse import Fusion
from langchain_quantllm.engine.indexed_attention import IndexedLayers
from langchain_quantllm.engine.kv_cache import LayerShape, layers_of, shapes_of
from langchain_quantllm.engine.model_runner import ModelRunner
from langchain_quantllm.engine.scheduler import Scheduler
from langchain_quantllm.engine.sequence import SamplingInput, Sequence, bare_sequence
from langchain_quantllm.engine.stages import Stages, at_stage
from langchain_quantllm.engine.state_pool import StateShape, state_shapes
from langchain_quantllm.errors import UnsupportedError
from langchain_quantllm.options import BASE_ADAPTER

_LAYER_TYPES = {"full_attention", "sliding_attention", CHUNKED_LAYER, INDEXED_LAYER, *OTHER_LAYER_TYPES}
_FLOORS = {torch.float32: 1e-3, torch.float64: 1e-3}
_FLOOR_16BIT = 0.05
_NOISE_FACTOR = 4.0

_LONG, _SHORT = 21, 5  # tokens of the two texts of a check: one fills more than a block, one does not
_NEW_TOKENS = 3  # of each
_CHOSEN = 10  # tokens that an indexer chooses in these texts


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
        output = _plain(model, sample_ids(model, _LONG))
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
    )


def _continues(model: Any) -> bool:
    """Whether several tokens of a model go on from its states; Mamba 1 of transformers begins anew then."""
    ids = sample_ids(model, _LONG)
    half = len(ids) // 2
    several, of_several = _in_pieces(model, ids, [0, half, len(ids)])
    singles, of_singles = _in_pieces(model, ids, [0, *range(half, len(ids) + 1)])
    floor = _FLOORS.get(model.dtype, _FLOOR_16BIT)
    noise = _NOISE_FACTOR * _difference(singles, _plain(model, ids).logits[0].float())
    # Of the first layer, as its inputs are the same to the last bit.
    first = {
        key: state for key, state in states_of(of_singles).items() if key.layer == min(states_of(of_singles)).layer
    }
    states = [_distance(states_of(of_several)[key], state) for key, state in first.items()]
    return max(states) <= _FLOOR_16BIT and _difference(several, singles) <= max(floor, noise)


def _distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm().clamp(min=1e-12))


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
    *,
    most_tokens: int = 0,
    indexed: IndexedLayers | None = None,
) -> int:
    """Run two texts through the runner, in chunks and in one batch, and compare with the model itself.

    If indexers choose the tokens that attention sees, they follow once more with fewer tokens chosen than they have. A
    third one follows if length changes what the model's layers do: it goes beyond the change, where that takes about
    a second at most.

    Args:
        runner: Runs the model.
        model: The model.
        probe: The facts of its first forward.
        switch: Its adapters; each of the two texts uses a different one. None if the model runs as it is.
        fusion: Its fused steps, some of which are more exact than the model's own; None if there are none.
        most_tokens: Tokens of the longest text that there is room for.
        indexed: Its layers with indexers; None if there are none.

    Returns:
        Tokens of the longest text.

    Raises:
        UnsupportedError: If the model cannot run this way, or gives other logits.
    """
    names = [None, None] if switch is None else [*switch.names, BASE_ADAPTER][:2]
    texts = [
        _Text(ids=sample_ids(model, count), adapter=name) for count, name in zip((_LONG, _SHORT), names, strict=True)
    ]

    def check(texts: abc.Sequence[_Text], step_tokens: int, cut: int | None = None, chosen: int | None = None) -> None:
        with contextlib.nullcontext() if indexed is None else indexed.trial(chosen) as trial:
            found = _run(runner, texts, switch, step_tokens=step_tokens)
            _check_layers(runner, model, probe)
            for text, (ids, logits) in zip(texts, found, strict=True):
                replaying = contextlib.nullcontext() if trial is None else trial.replaying(len(ids))
                with _as_itself(text, switch, fusion), replaying:
                    _compare(model, ids, logits, cut=cut or len(ids) // 2, continues=probe.continues)
            if trial is not None:
                trial.check(model.dtype)

    check(texts, _LONG - 6)
    most_chosen = [] if indexed is None else indexed.most_chosen
    if most_chosen:
        check(texts, _LONG - 6, chosen=_CHOSEN)
    checked = _LONG + _NEW_TOKENS
    if count := checked_length(model, [*probe.windows, *most_chosen], most_tokens - _NEW_TOKENS):
        try:
            text = _Text(ids=sample_ids(model, count), adapter=names[0])
            check([text], -(-count // 2), cut=count - 2 * _NEW_TOKENS)
            checked = count + _NEW_TOKENS
        except torch.OutOfMemoryError:  # the model itself may need more for such a text than its requests do
            torch.cuda.empty_cache()
    return checked


@without_gradients
def verify_stages(model: Any, stages: Stages) -> None:
    """Compare a model's logits in its stages with those by its own hooks, all else being as the model does it.

    `verify_engine` may run the model itself in stages, as fused steps need them.

    Raises:
        UnsupportedError: If they differ, or the model's code fails in stages.
    """
    text = sample_ids(model, _LONG)
    expected = _plain(model, text).logits[0].float()
    run = stages.begin()
    try:
        with at_stage(stages.first.device), forward_context(ForwardContext(stages=run)):
            found = _plain(model, text).logits[0]
            run.finish()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        msg = f"its own code fails in stages: {error!r}"
        raise UnsupportedError(msg) from error
    if expected.isfinite().all():
        check_logits(model, found, expected, 0.0, where="in stages")


def _check_layers(runner: ModelRunner, model: Any, probe: ModelProbe) -> None:
    """Check that each layer has attended as the model's config and cache say.

    Raises:
        UnsupportedError: If not.
    """
    windows = [runner.windows.get(i) for i in probe.layers]
    if None in windows:
        msg = "its attention cannot be replaced"
        raise UnsupportedError(msg)
    if windows != probe.windows:
        msg = f"its attention sees windows of {windows} tokens, and its cache keeps {probe.windows}"
        raise UnsupportedError(msg)
    if missing := counting_layers(model.config.get_text_config()) - runner.counting:
        msg = f"its layer {min(missing)} counts positions in an unknown way"
        raise UnsupportedError(msg)
    if (expected := indexed_layers(model.config.get_text_config())) != runner.choosing:
        msg = f"its attention sees chosen tokens in the layers {sorted(runner.choosing)} instead of {sorted(expected)}"
        raise UnsupportedError(msg)


@dataclass(frozen=True, kw_only=True)
class _Text:
    """A text of the verification, and its adapter; None for the model as it is."""

    ids: list[int]
    adapter: str | None


def _run(
    runner: ModelRunner, texts: abc.Sequence[_Text], switch: AdapterSwitch | None, *, step_tokens: int
) -> list[tuple[list[int], torch.Tensor]]:
    """Continue texts in one batch; returns the tokens of each that the model has read, and the logits after the last.

    Raises:
        UnsupportedError: If the model's code fails.
    """
    known = () if switch is None else switch.names
    numbers = [known.index(text.adapter) if text.adapter in known else -1 for text in texts]
    sequences = [bare_sequence(text.ids, _NEW_TOKENS, adapter=i) for text, i in zip(texts, numbers, strict=True)]
    blocks = 1 + sum(-(-(len(text.ids) + _NEW_TOKENS) // BLOCK_TOKENS) for text in texts)
    try:
        scheduler = Scheduler(
            BlockManager(blocks), slots=len(texts), step_tokens=step_tokens, step_tokens_while_decoding=step_tokens
        )
        logits = run_greedily(runner, sequences, scheduler)
    except (UnsupportedError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        msg = f"its own code fails over KV cache blocks: {error!r}"
        raise UnsupportedError(msg) from error
    return [(sequence.ids[:-1], torch.stack(logits[sequence])) for sequence in sequences]


@contextlib.contextmanager
def _as_itself(text: _Text, switch: AdapterSwitch | None, fusion: Fusion | None) -> abc.Iterator[None]:
    """Let the model's own forward run with a text's adapter."""
    with contextlib.ExitStack() as chosen:
        if switch is not None:
            chosen.enter_context(switch.chosen(text.adapter))
        # The engine's own way of modules that round more by themselves.
        chosen.enter_context(forward_context(ForwardContext()) if fusion is None else fusion.exact())
        yield


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
def _compare(model: Any, text: abc.Sequence[int], logits: torch.Tensor, *, cut: int, continues: bool) -> None:
    """Compare the engine's logits with the model's own.

    How far apart two ways of computing the same may lie differs between dtypes and quantization schemes, so the
    model's own spread is measured too: the whole text at once against piece by piece, the last tokens one by one.

    Args:
        model: The model.
        text: Token ids; the engine has sampled the last ones.
        logits: The engine's logits after its last tokens, of shape `(tokens, vocab)`.
        cut: Tokens of the first piece.
        continues: Whether the model's own second piece may be several tokens.

    Raises:
        UnsupportedError: If they differ by more than rounding does.
    """
    last = len(logits)
    expected = _plain(model, text, keep=last).logits[0, -last:].float()
    if not expected.isfinite().all():
        return  # the model itself is broken; its requests will fail with that
    noise = _noise(model, text, expected, cut=cut, continues=continues)
    check_logits(model, logits, expected, noise)


def _noise(model: Any, text: abc.Sequence[int], expected: torch.Tensor, *, cut: int, continues: bool) -> float:
    """Measure how far the model's last logits lie from those that it computes itself in pieces and single tokens.

    Some kernels for one row round differently from those for several.
    """
    last = len(expected)
    singles = range(len(text) - last + 1, len(text) + 1)
    pieces, _ = _in_pieces(model, text, [0, *[cut] * continues, *singles], keep=last)
    return _difference(pieces[-last:], expected)


@without_gradients
def own_spread(model: Any, last: int, *, continues: bool = True) -> float:
    """Measure how far the model's own logits after the last tokens of a text lie apart; see `_compare`."""
    text = sample_ids(model, _LONG)
    expected = _plain(model, text).logits[0, -last:].float()
    return _noise(model, text, expected, cut=len(text) // 2, continues=continues)


def check_logits(
    model: Any, logits: torch.Tensor, expected: torch.Tensor, noise: float, *, where: str = "over KV cache blocks"
) -> None:
    """Check the engine's logits against the model's own, whose spread is given, both of shape `(tokens, vocab)`.

    `where` says in the error where they were computed.

    Raises:
        UnsupportedError: If they differ by more than rounding does.
    """
    floor = _FLOORS.get(model.dtype, _FLOOR_16BIT)
    found = _difference(logits.float().to(expected.device), expected)
    if not found <= max(floor, _NOISE_FACTOR * noise):
        msg = f"its logits {where} are not its own (a difference of {found:.2g}, where its own spread is {noise:.2g})"
        raise UnsupportedError(msg)


def _in_pieces(
    model: Any, text: abc.Sequence[int], cuts: abc.Sequence[int], *, keep: int | None = None
) -> tuple[torch.Tensor, Any]:
    """Compute the model's own logits, of shape `(tokens, vocab)`, piece by piece; returns its cache as well.

    With `keep`, other logits than those of so many last tokens of each piece may be missing.
    """
    logits, cache = [], None
    for start, end in itertools.pairwise(cuts):
        if end > start:
            seen = 0 if cache is None else start  # a model without a cache begins anew
            output = _plain(model, text[seen:end], cache, seen=seen, keep=keep)
            cache = cache_of(output)
            logits.append(output.logits[0, start - end :].float())
    return torch.cat(logits), cache


def _plain(model: Any, ids: abc.Sequence[int], cache: Any = None, seen: int = 0, *, keep: int | None = None) -> Any:
    """Call the model; with `keep` it need not compute other logits than those of so many last tokens."""
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


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Compute the distance of two sets of logits relative to the spread of the second, up to an offset of each row."""
    found, expected = (t - t.mean(-1, keepdim=True) for t in (found, expected))
    return float((found - expected).norm() / expected.norm().clamp(min=1e-12))

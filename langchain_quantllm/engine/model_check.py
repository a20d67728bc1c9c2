"""Checks whether the continuous engine can run a model, before any of its text is returned.

Owns the comparison of the engine's logits, and of its routing and indexers, with the model's own. Knows no scheduling
policy.
"""

from __future__ import annotations

import contextlib
from collections import abc
from dataclasses import dataclass
from typing import Any

import torch

from langchain_quantllm.compat.transformers_attention import counting_layers
from langchain_quantllm.compat.transformers_indexers import indexed_layers
from langchain_quantllm.engine.adapter_switch import AdapterSwitch
from langchain_quantllm.engine.attention import without_gradients
from langchain_quantllm.engine.block_manager import BLOCK_TOKENS, BlockManager
from langchain_quantllm.engine.checked_length import checked_length
from langchain_quantllm.engine.forward_context import ForwardContext, forward_context
from langchain_quantllm.engine.fusion.fuse import Fusion
from langchain_quantllm.engine.indexed_attention import IndexedLayers
from langchain_quantllm.engine.model_probe import ModelProbe
from langchain_quantllm.engine.model_runner import ModelRunner
from langchain_quantllm.engine.own_logits import SAMPLE_TOKENS, check_logits, compare_logits, plain, sample_ids
from langchain_quantllm.engine.routing_trial import RoutingTrial
from langchain_quantllm.engine.scheduler import Scheduler
from langchain_quantllm.engine.sequence import SamplingInput, Sequence, bare_sequence
from langchain_quantllm.engine.stages import Stages, at_stage
from langchain_quantllm.errors import UnsupportedError
from langchain_quantllm.options import BASE_ADAPTER

_LONG, _SHORT = SAMPLE_TOKENS, 5  # tokens of the two texts of a check: one fills more than a block, one does not
_FLOOR_8BIT_CACHE = 0.7
"""For a KV cache in 8 bits, of an engine that was checked with one in the model's dtype before: unrelated logits have a
difference of 1.4, and rounding makes less than 0.1 in models and up to 0.5 in random ones."""
_NEW_TOKENS = 3  # of each
_CHOSEN = 10  # tokens that an indexer chooses in these texts


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
    rounds_cache: bool = False,
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
        rounds_cache: Whether the runner's KV cache is in 8 bits, which changes logits.

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
        with contextlib.ExitStack() as trials:
            index = None if indexed is None else trials.enter_context(indexed.trial(chosen))
            routing = trials.enter_context(_routing_trial(runner, model, texts))
            found = _run(runner, texts, switch, routing.keep, step_tokens=step_tokens)
            _check_layers(runner, model, probe)
            are_numbers = True
            for text, (ids, logits) in zip(texts, found, strict=True):
                replaying = contextlib.nullcontext() if index is None else index.replaying(len(ids))
                with _as_itself(text, switch, fusion), replaying, routing.replaying(len(ids)):
                    least = _FLOOR_8BIT_CACHE if rounds_cache else 0.0
                    cut_at = cut or len(ids) // 2
                    are_numbers &= compare_logits(
                        model, ids, logits, cut=cut_at, continues=probe.continues, least=least
                    )
            if index is not None:
                index.check(model.dtype)
            if are_numbers and not rounds_cache:
                routing.check(model.dtype)

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


@contextlib.contextmanager
def _routing_trial(runner: ModelRunner, model: Any, texts: abc.Sequence[_Text]) -> abc.Iterator[RoutingTrial]:
    """Record where the tokens of texts are routed; steps that were captured meanwhile would go on recording."""
    trial = RoutingTrial(model, texts=len(texts), most_tokens=max(len(text.ids) for text in texts) + _NEW_TOKENS)
    try:
        yield trial
    finally:
        trial.close()
        if trial.has_experts:
            runner.drop_graphs()


@without_gradients
def verify_stages(model: Any, stages: Stages) -> None:
    """Compare a model's logits in its stages with those by its own hooks, all else being as the model does it.

    `verify_engine` may run the model itself in stages, as fused steps need them.

    Raises:
        UnsupportedError: If they differ, or the model's code fails in stages.
    """
    text = sample_ids(model, _LONG)
    expected = plain(model, text).logits[0].float()
    run = stages.begin()
    try:
        with at_stage(stages.first.device), forward_context(ForwardContext(stages=run)):
            found = plain(model, text).logits[0]
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
    runner: ModelRunner,
    texts: abc.Sequence[_Text],
    switch: AdapterSwitch | None,
    on_end: abc.Callable[[Sequence], None],
    *,
    step_tokens: int,
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
        logits = run_greedily(runner, sequences, scheduler, on_end)
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
    runner: ModelRunner,
    sequences: abc.Sequence[Sequence],
    scheduler: Scheduler,
    on_end: abc.Callable[[Sequence], None] = lambda _: None,
) -> dict[Sequence, list[torch.Tensor]]:
    """Run greedy sequences to their end, and return the logits that each one's tokens were sampled from.

    `on_end` is called with each sequence when it is complete, before its slot is free.
    """
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
                on_end(sequence)
                scheduler.remove(sequence)
    return logits

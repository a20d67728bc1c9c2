"""Proposals whose rightness a test decides, and engines that run ahead of what they know."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from langchain_quantllm import QuantizedHuggingFaceLLM
from langchain_quantllm.engine import sequence
from langchain_quantllm.engine.model_runner import ModelRunner
from langchain_quantllm.engine.request import Request
from langchain_quantllm.engine.speculation.costs import StepCosts
from langchain_quantllm.engine.speculation.proposal import NGRAM
from langchain_quantllm.engine.speculation.sequence_speculation import Guess, SequenceSpeculation
from tests.support.engine import AllowOnly, Answer, ask
from tests.support.models import llm_of, wait_for_rest

_GUESSED = 60


class KnownTexts:
    """Proposes texts that are known, with every seventh token wrong."""

    def __init__(self) -> None:
        self.texts: list[list[int]] = []

    def add(self, requests: Sequence[Request], answers: Sequence[Answer]) -> None:
        self.texts += [[*r.prompt_ids, *a.token_ids] for r, a in zip(requests, answers, strict=True)]

    def after(self, ids: Sequence[int]) -> list[int]:
        """Return the known text behind some tokens, with its faults."""
        known = next((text for text in self.texts if text[: len(ids)] == list(ids)), [])[len(ids) :][:_GUESSED]
        drawn = random.Random(len(ids))
        return [i if drawn.random() > 1 / 7 else (i + 1) % 100 for i in known]


class Free(StepCosts):
    """Steps that cost the same, whatever they verify."""

    def ratio(self, rows: int, tokens: int, *, is_masked: bool = False) -> float:
        return 1.0

    def draft_ratio(self, rows: int, count: int, seconds: float | None, *, is_masked: bool = False) -> float:
        return 0.0

    def needs_single(self, rows: int, *, is_masked: bool = False) -> bool:
        return False


def noisy_copy(model: Any, share: float = 0.05) -> Any:
    """Copy a model, with noise of some share of their spread on its weights: a draft model that is often right."""
    copied = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for weight in copied.parameters():
            noise = torch.randn(weight.shape, generator=generator) * float(weight.std(correction=0)) * share
            weight.add_(noise.to(weight))
    return copied


def with_draft(llm: QuantizedHuggingFaceLLM, draft: Any = None, **fields: Any) -> QuantizedHuggingFaceLLM:
    """Make an LLM over the same pipeline with a draft model: an LLM, a model, or by default a copy with noise."""
    if draft is None:
        draft = noisy_copy(llm.pipeline.model)
    if isinstance(draft, torch.nn.Module):
        draft = llm_of(draft, llm.pipeline.tokenizer)
    return QuantizedHuggingFaceLLM(pipeline=llm.pipeline, draft_model=draft, **fields)


@contextlib.contextmanager
def running(llm: QuantizedHuggingFaceLLM, *, is_late: bool = False) -> Iterator[None]:
    """Let an engine verify proposals inside the block, whatever they cost.

    Args:
        llm: Its LLM.
        is_late: Let it begin a step before the tokens of the last one are known, as on a GPU.
    """
    engine: Any = llm._engine()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine._speculator, "costs", Free())
        if is_late:
            patch.setattr(engine._runner, "is_asynchronous", True)
            patch.setattr(ModelRunner, "follows", property(lambda self: self is engine._runner))
        try:
            yield
        finally:
            wait_for_rest()  # or the loop would change its kind with a step in flight


@contextlib.contextmanager
def proposing(llm: QuantizedHuggingFaceLLM, *, is_late: bool = False) -> Iterator[KnownTexts]:
    """Let an engine verify the proposals of known texts inside the block; see `running`."""
    texts = KnownTexts()

    class Knowing(SequenceSpeculation):
        def __init__(self, ids: Sequence[int], source: str) -> None:
            super().__init__(ids, source)
            self._ids = ids

        def guess(self, mask: Any) -> Guess | None:
            tokens = texts.after(self._ids)
            return Guess(tuple(tokens), NGRAM, 9) if tokens else None

    with pytest.MonkeyPatch.context() as patch, running(llm, is_late=is_late):
        patch.setattr(sequence, "SequenceSpeculation", Knowing)
        yield texts


def check_same(
    llm: QuantizedHuggingFaceLLM, plain: Sequence[Request], speculating: Sequence[Request], *, is_late: bool = False
) -> list[Answer]:
    """Check that requests give the same answers with known proposals as without; returns those with them."""
    expected = ask(llm, plain)
    with proposing(llm, is_late=is_late) as texts:
        texts.add(plain, expected)
        answers = ask(llm, speculating)
    check_equal(answers, expected)
    usages = [answer.usage for answer in answers if answer.usage is not None]
    assert sum(usage.accepted_tokens for usage in usages) > 0
    assert all(usage.accepted_tokens < max(1, usage.completion_tokens) for usage in usages)
    return answers


def check_equal(answers: Sequence[Answer], expected: Sequence[Answer]) -> None:
    """Check that answers have the same tokens, texts and log probabilities."""
    for one, other in zip(answers, expected, strict=True):
        assert one.token_ids == other.token_ids
        assert (one.text, one.finish_reason) == (other.text, other.finish_reason)
        assert [(p.token_id, [i for i, _ in p.top]) for p in one.logprobs] == [
            (p.token_id, [i for i, _ in p.top]) for p in other.logprobs
        ]
        assert [p.logprob for p in one.logprobs] == pytest.approx([p.logprob for p in other.logprobs], abs=1e-3)


class AllowAhead(AllowOnly):
    """A mask of some ids that can be filled ahead."""

    def fork(self) -> AllowAhead:
        fork = AllowAhead(self.ids, fails_at=self._fails_at, frees_after=self._frees_after, ends_after=self._ends_after)
        fork.accepted, fork.ended = [*self.accepted], self.ended
        return fork

    def forced(self, most: int) -> list[int]:
        return []


class OneWay(AllowAhead):
    """A mask that leaves one way, which it foresees: its ids in a circle."""

    def fill(self, bits: Any) -> bool:
        whole, self.ids = self.ids, [self.ids[len(self.accepted) % len(self.ids)]]
        try:
            return super().fill(bits)
        finally:
            self.ids = whole

    def fork(self) -> OneWay:
        fork = OneWay(self.ids, ends_after=self._ends_after)
        fork.accepted, fork.ended = [*self.accepted], self.ended
        return fork

    def forced(self, most: int) -> list[int]:
        begun = len(self.accepted)
        return [self.ids[(begun + i) % len(self.ids)] for i in range(most)]

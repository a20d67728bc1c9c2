"""Scores of documents by a decoder that says yes or no, on the engine of the package's language models.

Owns the way from a query and texts to one prompt for each pair, and from log probabilities to scores. All pairs of a
call are one submission: the engine computes their shared beginning once, and packs the rest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

from langchain_quantllm.base import PreparedCall, QuantizedModel, langchain_errors
from langchain_quantllm.base.aside import submit_aside
from langchain_quantllm.base.next_token import (
    most_prompt_tokens,
    next_token_options,
    plan_next_tokens,
    reported_logprobs,
    summed_usage,
)
from langchain_quantllm.engine.result import Answers
from langchain_quantllm.engine.stream import Chunk
from langchain_quantllm.errors import GenerationError, PromptTooLongError
from langchain_quantllm.loading.inputs import require_parts, token_ids
from langchain_quantllm.rerankers.ranking import PairScores, ScoreSettings
from langchain_quantllm.rerankers.yes_no import YesNoFormat


class DecoderScorer:
    """Scores pairs by a decoder: the probability of "yes" beside "no" as the next token."""

    def __init__(self, llm: QuantizedModel) -> None:
        """Take a language model, loaded or not.

        Args:
            llm: An LLM or chat model of this package; its weights and engine are shared with its other callers.
        """
        self.model = llm

    @property
    def is_probability(self) -> bool:
        """Whether scores lie between 0 and 1: always."""
        return True

    def format(self) -> YesNoFormat:
        """Return the format of the model's prompts; loads the model if it is not loaded.

        Raises:
            UnsupportedError: If the model cannot be asked for yes or no.
        """
        model = self.model._loaded()
        parts = require_parts(model)

        def make() -> YesNoFormat:
            return YesNoFormat(parts.tokenizer, parts.processor, self.model.model_id)

        found: YesNoFormat = model.remember(("yes or no",), make)
        return found

    def score(self, query: str, texts: Sequence[str], settings: ScoreSettings) -> PairScores:
        """Score texts by a query.

        Args:
            query: The query.
            texts: The documents' texts; at least one.
            settings: How; the instruction is the model card's where there is none.

        Raises:
            PromptTooLongError: If a document is too long and not to be cut, or the query leaves no room for any.
            GenerationError: If the model's scores are no numbers.
        """
        with langchain_errors():
            plan = self._plan(query, texts, settings)
            answers = Answers(plan.requests)
            with plan.submit(in_pieces=False) as stream:
                for chunk in stream:
                    _add(answers, chunk, settings)
            return _read(answers)

    async def ascore(self, query: str, texts: Sequence[str], settings: ScoreSettings) -> PairScores:
        """Score texts by a query without blocking the event loop; see `score`. A cancelled task cancels its pairs."""
        with langchain_errors():
            plan, stream = await submit_aside(self._plan, query, texts, settings, in_pieces=False)
            answers = Answers(plan.requests)
            with stream:
                async for chunk in stream:
                    _add(answers, chunk, settings)
            return _read(answers)

    def _plan(self, query: str, texts: Sequence[str], settings: ScoreSettings) -> PreparedCall:
        form = self.format()
        limits = self.model._engine(next_token_options(self.model)).limits
        bounds = [n for n in (settings.max_length, most_prompt_tokens(limits)) if n is not None]
        most_tokens = min(bounds, default=None)
        encode = partial(token_ids, self.model._loaded(), add_special_tokens=form.adds_begin)
        prompts = form.for_query(query, settings.instruction, encode)
        ids = []
        for i, text in enumerate(texts):
            prompt = prompts.prompt(text, most_tokens)
            if prompt.is_cut and not settings.cuts:
                bound = "max_length" if most_tokens == settings.max_length else "the model"
                msg = (
                    f"documents[{i}] makes a prompt of more than {most_tokens} tokens, the most of {bound}; split it, "
                    "or cut its end with on_too_long='truncate'."
                )
                raise PromptTooLongError(msg)
            ids.append(prompt.ids)
        return plan_next_tokens(self.model, ids, form.answer_ids)


def _add(answers: Answers, chunk: Chunk, settings: ScoreSettings) -> None:
    answers.add(chunk)
    if chunk.finish_reason is not None and settings.progress is not None:
        settings.progress(1)


def _read(answers: Answers) -> PairScores:
    scores = []
    for yes, no in reported_logprobs(answers):
        if not (math.isfinite(yes) and math.isfinite(no)):
            msg = (
                f"the model gave log probabilities of {yes} and {no} to yes and no; try another dtype, such as "
                "bfloat16 or float32."
            )
            raise GenerationError(msg)
        scores.append(_sigmoid(yes - no))
    return PairScores(scores=scores, usage_metadata=summed_usage(answers))


def _sigmoid(x: float) -> float:
    """Compute 1 / (1 + exp(-x)) without overflow: the softmax of two logits that lie x apart."""
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))

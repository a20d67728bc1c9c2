"""The operations that score documents by queries: of cross-encoders, and of late-interaction models.

Each measures its items, cuts the ends of documents that are too long, and computes a batch; `worker` packs and orders
them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from langchain_quantllm.compat.sentence_transformers import longest_input
from langchain_quantllm.compat.sentence_transformers_scores import (
    Pair,
    document_lengths,
    document_scores,
    most_document_tokens,
    most_query_tokens,
    pair_lengths,
    pair_scores,
    query_lengths,
    query_vectors,
)
from langchain_quantllm.encoders.texts import cut_texts
from langchain_quantllm.errors import EncodingError, InvalidOptionError, PromptTooLongError
from langchain_quantllm.loading.pieces import valid_text

_LONG_CHARS = 16
"""A document of more characters than this for each token that is read is cut before all of it is encoded."""

_LONGEST_SHOWN = 40


@dataclass(frozen=True, kw_only=True)
class ScorePairs:
    """Score pairs of query and document by a cross-encoder.

    Args:
        prompt: Put before each query; None is the model's own.
        max_length: Most tokens of a pair; None is what the model reads.
        cuts: Cut the ends of documents that are too long; otherwise they are an error.
    """

    prompt: str | None = None
    max_length: int | None = None
    cuts: bool = True

    def measure(self, model: Any, items: Sequence[Pair]) -> tuple[Sequence[Pair], Sequence[int]]:
        """Count the tokens of pairs, and cut very long documents.

        Raises:
            PromptTooLongError: If a pair is too long and may not be cut, or a query leaves no room for a document.
            InvalidOptionError: If `max_length` is more than the model reads.
        """
        most_tokens = _least(self.max_length, longest_input(model))
        documents = _shortened(model, [document for _, document in items], most_tokens)
        pairs = [(valid_text(query), text) for (query, _), text in zip(items, documents, strict=True)]
        lengths = pair_lengths(model, pairs, self.prompt)
        if most_tokens is None:
            return pairs, lengths
        long = [pair for pair, length in zip(pairs, lengths, strict=True) if length > most_tokens]
        queries = list(dict.fromkeys(query for query, _ in long))
        if queries:
            alone = pair_lengths(model, [(query, "") for query in queries], self.prompt)
            _check_queries(queries, alone, most_tokens - 1)
        if long and not self.cuts:
            raise _too_long(long[0][1], most_tokens, "with its query ")
        return pairs, [min(length, most_tokens) for length in lengths]

    def run(self, model: Any, items: Sequence[Pair]) -> Sequence[float]:
        """Score pairs.

        Raises:
            EncodingError: If a score is no number.
        """
        return _numbers(pair_scores(model, items, self.prompt, self.max_length), [text for _, text in items])


@dataclass(frozen=True, kw_only=True)
class EmbedQueries:
    """Compute the vectors of queries' tokens by a late-interaction model."""

    def measure(self, model: Any, items: Sequence[str]) -> tuple[Sequence[str], Sequence[int]]:
        """Count the tokens of queries.

        Raises:
            PromptTooLongError: If the model would cut a query.
        """
        queries, most_tokens = [valid_text(query) for query in items], most_query_tokens(model)
        lengths = query_lengths(model, queries)
        if most_tokens is not None:
            _check_queries(queries, lengths, most_tokens)
        return queries, lengths

    def run(self, model: Any, items: Sequence[str]) -> Sequence[Any]:
        """Compute an array of shape `(tokens, size)`, float32, for each query."""
        return query_vectors(model, items)


@dataclass(frozen=True, kw_only=True)
class ScoreDocuments:
    """Score documents by a late-interaction model: each item is the vectors of a query, and a document.

    Args:
        max_length: Most tokens of a document; None is the model's own.
        cuts: Cut the ends of documents that are too long; otherwise they are an error.
    """

    max_length: int | None = None
    cuts: bool = True

    def measure(self, model: Any, items: Sequence[tuple[Any, str]]) -> tuple[Sequence[tuple[Any, str]], Sequence[int]]:
        """Count the tokens of documents, and cut very long ones.

        Raises:
            PromptTooLongError: If a document is too long and may not be cut.
            InvalidOptionError: If `max_length` is more than the model reads.
        """
        most_tokens = most_document_tokens(model)
        if self.max_length is not None:
            most_tokens = _least(self.max_length, longest_input(model))
        documents = _shortened(model, [document for _, document in items], most_tokens)
        lengths = document_lengths(model, documents)
        if most_tokens is not None:
            long = [text for text, length in zip(documents, lengths, strict=True) if length > most_tokens]
            if long and not self.cuts:
                raise _too_long(long[0], most_tokens)
            lengths = [min(length, most_tokens) for length in lengths]
        return list(zip([vectors for vectors, _ in items], documents, strict=True)), lengths

    def run(self, model: Any, items: Sequence[tuple[Any, str]]) -> Sequence[float]:
        """Score documents.

        Raises:
            EncodingError: If a score is no number.
        """
        queries, documents = [vectors for vectors, _ in items], [text for _, text in items]
        return _numbers(document_scores(model, queries, documents, self.max_length), documents)


def _least(max_length: int | None, own: int | None) -> int | None:
    if max_length is not None and own is not None and max_length > own:
        msg = f"max_length={max_length} is more than the {own} tokens that this model reads."
        raise InvalidOptionError(msg)
    return max_length or own


def _shortened(model: Any, documents: Sequence[str], most_tokens: int | None) -> list[str]:
    """Cut documents that are far too long; what is left still has more tokens than are read."""
    texts = [valid_text(document) for document in documents]
    if most_tokens is not None:
        far = [i for i, text in enumerate(texts) if len(text) > _LONG_CHARS * most_tokens]
        if far:
            for i, text in zip(far, cut_texts(model.tokenizer, [texts[i] for i in far], most_tokens)[0], strict=True):
                texts[i] = text
    return texts


def _check_queries(queries: Sequence[str], lengths: Sequence[int], most_tokens: int) -> None:
    for query, tokens in zip(queries, lengths, strict=True):
        if tokens > most_tokens:
            msg = f"the query {_shown(query)} has {tokens} tokens, and {most_tokens} are possible; shorten it."
            raise PromptTooLongError(msg)


def _too_long(document: str, most_tokens: int, beside: str = "") -> PromptTooLongError:
    return PromptTooLongError(
        f"the document {_shown(document)} has {beside}more than the {most_tokens} tokens that are read; split it, or "
        "pass on_too_long='truncate'."
    )


def _numbers(scores: Sequence[float], documents: Sequence[str]) -> Sequence[float]:
    """Return scores, all of which are numbers."""
    for score, document in zip(scores, documents, strict=True):
        if math.isnan(score):
            msg = (
                f"the model's score of the document {_shown(document)} is not a number (nan); try another dtype, such "
                "as bfloat16 or float32."
            )
            raise EncodingError(msg)
    return scores


def _shown(text: str) -> str:
    return repr(text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}...")

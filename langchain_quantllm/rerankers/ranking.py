"""From scores to ranked documents, and the checks of a query and its documents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from langchain_core.documents import Document

from langchain_quantllm.errors import InvalidOptionError

SCORE = "relevance_score"
"""The key of a document's score in its metadata, as langchain's other rerankers write it."""


class PairScores(NamedTuple):
    """The scores of a query's documents.

    `scores` has one for each document, in their order; higher is more relevant. `usage_metadata` counts tokens as
    LangChain's `UsageMetadata` does, with those that were in the KV cache as `input_token_details["cache_read"]`; it is
    empty for models that count none.
    """

    scores: list[float]
    usage_metadata: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class ScoreSettings:
    """How the documents of a query are scored.

    Args:
        instruction: What makes a document relevant; None is the model's own.
        max_length: Most tokens of what the model reads at once; None is what it takes.
        cuts: Whether the ends of documents that are too long are cut; if not, they are an error.
        progress: Is told the number of further documents that are scored.
    """

    instruction: str | None = None
    max_length: int | None = None
    cuts: bool = True
    progress: Callable[[int], None] | None = None


def check_query(query: object) -> str:
    """Check a query.

    Raises:
        InvalidOptionError: If it is no text, or has no character but spaces.
    """
    if not isinstance(query, str):
        msg = f"the query is {type(query).__name__}; give a text."
        raise InvalidOptionError(msg)
    if not query.strip():
        msg = f"the query is {query!r}, by which no document can be ranked; give a text of at least one word."
        raise InvalidOptionError(msg)
    return query


def texts_of(documents: Sequence[Any]) -> list[str]:
    """Return the texts of documents; those without any text are scored as such.

    Raises:
        InvalidOptionError: If one is neither a document nor a text.
    """
    texts = [
        document if isinstance(document, str) else getattr(document, "page_content", None) for document in documents
    ]
    for i, (text, document) in enumerate(zip(texts, documents, strict=True)):
        if not isinstance(text, str):
            msg = f"documents[{i}] is {type(document).__name__}; give Documents of langchain_core, or texts."
            raise InvalidOptionError(msg)
    return [str(text) for text in texts]


def ranked(
    documents: Sequence[Document], scores: Sequence[float], *, top_n: int | None, min_score: float | None
) -> list[Document]:
    """Return copies of documents, best first, with their scores in the metadata.

    Args:
        documents: The documents, which stay as they are.
        scores: One for each.
        top_n: Most documents; None is all.
        min_score: Leave out documents below it.

    Returns:
        The best documents; of equal scores, the first comes first.
    """
    order = sorted(range(len(documents)), key=lambda i: -scores[i])
    kept = [i for i in order if min_score is None or scores[i] >= min_score]
    return [
        documents[i].model_copy(update={"metadata": {**documents[i].metadata, SCORE: scores[i]}}) for i in kept[:top_n]
    ]

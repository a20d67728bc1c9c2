"""The base of the rerankers: LangChain's document compressor over a model that scores documents by a query."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Literal

from langchain_core.callbacks import Callbacks
from langchain_core.documents import BaseDocumentCompressor, Document
from pydantic import Field, model_validator
from typing_extensions import Self

from langchain_quantllm.base.encoder_fields import EncoderFields
from langchain_quantllm.base.progress import progress_bar
from langchain_quantllm.errors import InvalidOptionError
from langchain_quantllm.rerankers.ranking import PairScores, check_query, ranked, texts_of


class ScoringCompressor(EncoderFields, BaseDocumentCompressor):
    """Ranks documents by their scores. They are copied; those given stay as they are."""

    top_n: int | None = Field(default=3, ge=1)
    """Most documents that are returned; None is all."""
    min_score: float | None = None
    """Leave out documents with a lower score."""
    max_length: int | None = Field(default=None, ge=1)
    """Most tokens of what the model reads at once; None is what it takes."""
    on_too_long: Literal["truncate", "error"] = "truncate"
    """What is done with a document that is too long: its end is cut, or the call raises a `PromptTooLongError`."""
    max_batch_tokens: int | None = Field(default=None, ge=1)
    """Most tokens of a batch, padding included; None leaves it to the model. A batch that does not fit into the memory
    is halved."""
    show_progress: bool | None = None
    """Show a progress bar for documents: always, never, or (None) with `progress=True` after five seconds."""

    @model_validator(mode="after")
    def _check_min_score(self) -> Self:
        if self.min_score is not None and not math.isfinite(self.min_score):
            msg = f"min_score={self.min_score} is not allowed; it must be a number, or None for no bound."
            raise InvalidOptionError(msg)
        return self

    def _progress(self, count: int) -> AbstractContextManager[Callable[[int], None] | None]:
        """Show a progress bar for documents inside the block."""
        return progress_bar(count, title="Reranking", unit="document", show=self.show_progress, default=self.progress)

    @abstractmethod
    def score(self, query: str, texts: Sequence[str | Document]) -> PairScores:
        """Score texts or documents by a query, in their order."""

    @abstractmethod
    async def ascore(self, query: str, texts: Sequence[str | Document]) -> PairScores:
        """Score texts or documents by a query without blocking the event loop."""

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> Sequence[Document]:
        """Rank documents.

        Args:
            documents: The documents; they are not changed.
            query: The query.
            callbacks: Not used, as no other Runnable is called.

        Returns:
            Copies of the best documents, best first, each with its `relevance_score` in the metadata.

        Raises:
            InvalidOptionError: If the query is empty.
            PromptTooLongError: If the query leaves no room for a document, or a document is too long and not to be cut.
            QuantLLMError: A subclass of it, if loading or scoring fails.
        """
        found = self.score(query, documents).scores
        return ranked(documents, found, top_n=self.top_n, min_score=self.min_score)

    async def acompress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> Sequence[Document]:
        """Rank documents without blocking the event loop; see `compress_documents`."""
        found = (await self.ascore(query, documents)).scores
        return ranked(documents, found, top_n=self.top_n, min_score=self.min_score)

    @staticmethod
    def _inputs(query: str, texts: Sequence[str | Document]) -> tuple[str, list[str]]:
        return check_query(query), texts_of(texts)

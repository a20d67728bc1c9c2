"""`LateInteractionReranker`: a quantized model with a vector for each token (ColBERT's kind) as document compressor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from langchain_core.documents import Document

from langchain_quantllm.base.encoder_work import work_aside
from langchain_quantllm.encoders.scoring import EmbedQueries, ScoreDocuments
from langchain_quantllm.encoders.work import Work
from langchain_quantllm.rerankers.compressor import ScoringCompressor
from langchain_quantllm.rerankers.ranking import PairScores


class LateInteractionReranker(ScoringCompressor):
    """A quantized late-interaction model as a LangChain document compressor.

    Each token of query and document has a vector. A document's score is the sum, over the query's tokens, of the
    largest similarity to any of its tokens (MaxSim).

    Setup:
        ```bash
        pip install "langchain-quantllm[rag]"
        ```

    Use:
        ```python
        from langchain_quantllm import LateInteractionReranker

        reranker = LateInteractionReranker(model_id="lightonai/GTE-ModernColBERT-v1", quantization="int8", top_n=5)
        reranker.compress_documents(documents, "How many people live in Berlin?")
        ```

    `max_length` is the most tokens of a document; many of these models read 180 to 300 by their own files.
    """

    _kind: ClassVar[str] = "late_interaction"

    def score(self, query: str, texts: Sequence[str | Document]) -> PairScores:
        """Score texts or documents by a query.

        Args:
            query: The query.
            texts: Texts, or documents.

        Returns:
            A score for each, in their order: at most the number of the query's tokens, if the model's vectors are
            normalized.

        Raises:
            QuantLLMError: As `compress_documents` raises it.
        """
        query, given = self._inputs(query, texts)
        if not given:
            return PairScores([], {})
        (vectors,) = self._submit_query(query).result()
        with self._progress(len(given)) as progress:
            return PairScores(self._submit_documents(vectors, given, progress).result(), {})

    async def ascore(self, query: str, texts: Sequence[str | Document]) -> PairScores:
        """Score texts or documents by a query without blocking the event loop; see `score`."""
        query, given = self._inputs(query, texts)
        if not given:
            return PairScores([], {})
        (vectors,) = await work_aside(self._submit_query, query)
        with self._progress(len(given)) as progress:
            return PairScores(await work_aside(self._submit_documents, vectors, given, progress), {})

    def _submit_query(self, query: str) -> Work:
        return self._loaded().submit(EmbedQueries(), [query], sizes=[len(query)], most_tokens=self.max_batch_tokens)

    def _submit_documents(self, vectors: Any, texts: Sequence[str], progress: Callable[[int], None] | None) -> Work:
        operation = ScoreDocuments(max_length=self.max_length, cuts=self.on_too_long == "truncate")
        items = [(vectors, text) for text in texts]
        sizes = [len(text) for text in texts]
        return self._loaded().submit(
            operation, items, sizes=sizes, most_tokens=self.max_batch_tokens, progress=progress
        )

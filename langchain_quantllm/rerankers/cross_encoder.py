"""`QuantizedCrossEncoder`: a quantized classifier of pairs of texts as LangChain's cross-encoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Literal

from langchain_core.cross_encoders import BaseCrossEncoder
from pydantic import Field

from langchain_quantllm.base.aside import run_aside
from langchain_quantllm.base.encoder_fields import EncoderFields
from langchain_quantllm.base.encoder_work import work_aside
from langchain_quantllm.base.progress import progress_bar
from langchain_quantllm.compat.sentence_transformers_scores import is_probability, label_count
from langchain_quantllm.encoders.registry import LoadedEncoder
from langchain_quantllm.encoders.scoring import ScorePairs
from langchain_quantllm.encoders.source import find_source
from langchain_quantllm.encoders.work import Work
from langchain_quantllm.errors import InvalidOptionError, UnsupportedError
from langchain_quantllm.rerankers.ranking import PairScores, ScoreSettings, check_query


class QuantizedCrossEncoder(EncoderFields, BaseCrossEncoder):
    """A quantized cross-encoder, which reads a query and a document together and gives them a score.

    Setup:
        ```bash
        pip install "langchain-quantllm[rag]"
        ```

    Use:
        ```python
        from langchain_quantllm import QuantizedCrossEncoder

        encoder = QuantizedCrossEncoder(model_id="BAAI/bge-reranker-v2-m3", quantization="int8")
        encoder.score([("How many people live in Berlin?", "Berlin has 3.5 million inhabitants.")])
        await encoder.ascore([("How many people live in Berlin?", "Berlin has 3.5 million inhabitants.")])
        ```

    The scores are those of sentence-transformers, with the activation of the model's own files. Its head stays
    unquantized. Of a pair that is too long, the end of the document is cut, never the query.
    """

    prompt: str | None = None
    """Put before each query, for models that were trained with instructions; None is the model's own."""
    max_length: int | None = Field(default=None, ge=1)
    """Most tokens of a pair; None is what the model reads."""
    on_too_long: Literal["truncate", "error"] = "truncate"
    """What is done with a document that is too long: its end is cut, or the call raises a `PromptTooLongError`."""
    max_batch_tokens: int | None = Field(default=None, ge=1)
    """Most tokens of a batch, padding included; None is 16,384 on an accelerator and 4,096 on the CPU. A batch that
    does not fit into the memory is halved."""

    show_progress: bool | None = None
    """Show a progress bar for pairs: always, never, or (None) with `progress=True` after five seconds."""

    _kind: ClassVar[str] = "cross_encoder"

    def score(self, text_pairs: list[tuple[str, str]]) -> list[float]:
        """Score pairs of texts.

        Args:
            text_pairs: Queries with documents.

        Returns:
            A score for each pair, in their order; higher is more relevant.

        Raises:
            InvalidOptionError: If an item is no pair of texts, or a query is empty.
            PromptTooLongError: If a query leaves no room for a document, or a document is too long and not to be cut.
            EncodingError: If a score is no number.
        """
        checked, encoder = _checked(text_pairs), self._loaded()
        with self._progress(len(checked)) as progress:
            return self._submit(encoder, checked, progress=progress).result()

    async def ascore(self, text_pairs: list[tuple[str, str]]) -> list[float]:
        """Score pairs of texts without blocking the event loop; see `score`. Concurrent calls meet in batches."""
        checked, encoder = _checked(text_pairs), await run_aside(self._loaded)
        with self._progress(len(checked)) as progress:
            return await work_aside(self._submit, encoder, checked, None, progress)

    def _progress(self, count: int) -> AbstractContextManager[Callable[[int], None] | None]:
        """Show a progress bar for pairs inside the block."""
        return progress_bar(count, title="Scoring", unit="pair", show=self.show_progress, default=self.progress)

    def _submit(
        self,
        encoder: LoadedEncoder,
        pairs: Sequence[tuple[str, str]],
        operation: ScorePairs | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Work:
        """Queue a call."""
        if operation is None:
            cuts = self.on_too_long == "truncate"
            operation = ScorePairs(prompt=self.prompt, max_length=self.max_length, cuts=cuts)
        sizes = [len(query) + len(document) for query, document in pairs]
        return encoder.submit(operation, pairs, sizes=sizes, most_tokens=self.max_batch_tokens, progress=progress)

    def _loaded(self) -> LoadedEncoder:
        """Return the model, loaded if it is not.

        Raises:
            UnsupportedError: If it gives a pair several scores.
        """
        if not self.is_loaded:
            config = find_source(self._spec()).config
            named = config.get("id2label")
            if any(str(name).endswith("ForSequenceClassification") for name in config.get("architectures") or ()):
                self._check_labels(len(named) if isinstance(named, dict) else int(config.get("num_labels", 2)))
        encoder = super()._loaded()
        self._check_labels(label_count(encoder.model))
        return encoder

    def _check_labels(self, count: int) -> None:
        if count != 1:
            msg = (
                f"{self.model_id} gives a pair {count} labels, such as entailment and contradiction, and documents are "
                "ranked by one score; give a model with one label, such as cross-encoder/ms-marco-MiniLM-L6-v2."
            )
            raise UnsupportedError(msg)


class ClassifierScorer:
    """Scores the documents of a query by a cross-encoder."""

    def __init__(self, encoder: QuantizedCrossEncoder, max_batch_tokens: int | None) -> None:
        """Take a cross-encoder, loaded or not.

        Args:
            encoder: The cross-encoder, whose weights are shared with its other callers.
            max_batch_tokens: Most tokens of a batch; None is the encoder's own number.
        """
        self.model = encoder
        self._max_batch_tokens = max_batch_tokens

    @property
    def is_probability(self) -> bool:
        """Whether scores lie between 0 and 1; loads the model if it is not loaded."""
        return is_probability(self.model._loaded().model)

    def score(self, query: str, texts: Sequence[str], settings: ScoreSettings) -> PairScores:
        """Score texts by a query; see `QuantizedCrossEncoder.score`."""
        return PairScores(self._submit(query, texts, settings).result(), {})

    async def ascore(self, query: str, texts: Sequence[str], settings: ScoreSettings) -> PairScores:
        """Score texts by a query without blocking the event loop."""
        return PairScores(await work_aside(self._submit, query, texts, settings), {})

    def _submit(self, query: str, texts: Sequence[str], settings: ScoreSettings) -> Work:
        operation = ScorePairs(
            prompt=settings.instruction or self.model.prompt,
            max_length=settings.max_length or self.model.max_length,
            cuts=settings.cuts,
        )
        model = self.model
        if self._max_batch_tokens is not None and self._max_batch_tokens != model.max_batch_tokens:
            model = model.model_copy(update={"max_batch_tokens": self._max_batch_tokens})
        pairs = [(query, text) for text in texts]
        return model._submit(model._loaded(), pairs, operation, settings.progress)


def _checked(pairs: Sequence[Any]) -> list[tuple[str, str]]:
    for i, pair in enumerate(pairs):
        if not isinstance(pair, tuple | list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            msg = f"text_pairs[{i}] is no pair of texts; give tuples of a query and a document."
            raise InvalidOptionError(msg)
    for query in dict.fromkeys(query for query, _ in pairs):
        check_query(query)
    return [(query, document) for query, document in pairs]

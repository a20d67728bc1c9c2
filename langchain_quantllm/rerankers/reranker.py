"""`QuantizedReranker`: a quantized cross-encoder, or a language model that says yes or no, as a document compressor."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

from langchain_core.documents import Document
from pydantic import Field, PrivateAttr, model_validator
from typing_extensions import Self

from langchain_quantllm.base import QuantizedModel
from langchain_quantllm.base.aside import run_aside
from langchain_quantllm.base.encoder_fields import LOADING_FIELDS
from langchain_quantllm.errors import InvalidOptionError
from langchain_quantllm.llms import QuantizedHuggingFaceLLM
from langchain_quantllm.memory import MemoryReport
from langchain_quantllm.rerankers.compressor import ScoringCompressor
from langchain_quantllm.rerankers.cross_encoder import ClassifierScorer, QuantizedCrossEncoder
from langchain_quantllm.rerankers.decoder import DecoderScorer
from langchain_quantllm.rerankers.kind import is_decoder
from langchain_quantllm.rerankers.ranking import PairScores, ScoreSettings


class QuantizedReranker(ScoringCompressor):
    """A quantized reranker as a LangChain document compressor.

    Setup:
        ```bash
        pip install langchain-quantllm         # language models that say yes or no, such as Qwen3-Reranker
        pip install "langchain-quantllm[rag]"  # cross-encoders as well
        ```

    Instantiate:
        ```python
        from langchain_quantllm import QuantizedReranker

        reranker = QuantizedReranker(model_id="Qwen/Qwen3-Reranker-0.6B", quantization="nf4", top_n=5)
        reranker = QuantizedReranker(model_id="BAAI/bge-reranker-v2-m3", quantization="int8", top_n=5)
        reranker = QuantizedReranker(model=chat)  # the weights that answer rerank, too
        ```

    Use:
        ```python
        from langchain_classic.retrievers import ContextualCompressionRetriever

        retriever = ContextualCompressionRetriever(
            base_compressor=reranker, base_retriever=store.as_retriever(search_kwargs={"k": 50})
        )
        retriever.invoke("How many people live in Berlin?")[0].metadata["relevance_score"]
        ```

    The kind of model is found by its config:

    - A classifier with one label scores by the activation of its own files, often a logit of any size.
    - A language model is asked whether a document meets the query, in the words of Qwen3-Reranker's model card, and the
      score is the probability of "yes" beside "no", from 0 to 1. It runs on the engine of this package's language
      models: one prefill for each pair, of which the beginning, with instruction and query, is computed once.

    Of what is too long, the end of the document is cut, never the query.
    """

    own_model: Any = Field(default=None, repr=False)
    """A `QuantizedCrossEncoder`, `QuantizedHuggingFaceLLM` or `ChatQuantizedHuggingFace` whose weights are shared; its
    argument is `model=`."""
    instruction: str | None = None
    """What makes a document relevant. None is that of Qwen3-Reranker's model card for a language model; for a
    classifier it is put before the query, and None is the model's own."""

    _kind: ClassVar[str] = "cross_encoder"
    _scorer: DecoderScorer | ClassifierScorer | None = PrivateAttr(default=None)

    @classmethod
    def _translate(cls, values: dict[str, Any]) -> dict[str, Any]:
        given = values.get("model")
        if given is not None and not isinstance(given, str | os.PathLike):
            values["own_model"] = values.pop("model")
        own = values.get("own_model")
        if own is None:
            return super()._translate(values)
        if not isinstance(own, QuantizedModel | QuantizedCrossEncoder):
            msg = (
                f"model={type(own).__name__} cannot rerank; give a QuantizedCrossEncoder, a QuantizedHuggingFaceLLM, a "
                "ChatQuantizedHuggingFace, or the name of a model."
            )
            raise InvalidOptionError(msg)
        taken = [n for n in LOADING_FIELDS if values.get(n) is not None and values[n] != cls._default(n)]
        if any(name != "model_id" or values[name] != own.model_id for name in taken):
            msg = f"{min(taken)}= has no effect on a model that is given by model=; leave it out."
            raise InvalidOptionError(msg)
        return super()._translate({**values, "model_id": own.model_id})

    @classmethod
    def _default(cls, name: str) -> Any:
        field = cls.model_fields.get(name)
        return None if field is None else field.get_default(call_default_factory=True)

    @model_validator(mode="after")
    def _check_range(self) -> Self:
        if isinstance(self.own_model, QuantizedModel):
            self._check_probability()
        return self

    # Scores.

    def score(self, query: str, texts: Sequence[str | Document]) -> PairScores:
        """Score texts or documents by a query.

        Args:
            query: The query.
            texts: Texts, or documents.

        Returns:
            A score for each, in their order, and the token counts of a language model.

        Raises:
            QuantLLMError: As `compress_documents` raises it.
        """
        query, given = self._inputs(query, texts)
        if not given:
            return PairScores([], {})
        scorer = self._ready()
        with self._progress(len(given)) as progress:
            return scorer.score(query, given, self._settings(progress))

    async def ascore(self, query: str, texts: Sequence[str | Document]) -> PairScores:
        """Score texts or documents by a query without blocking the event loop; see `score`."""
        query, given = self._inputs(query, texts)
        if not given:
            return PairScores([], {})
        scorer = await run_aside(self._ready)
        with self._progress(len(given)) as progress:
            return await scorer.ascore(query, given, self._settings(progress))

    def _settings(self, progress: Callable[[int], None] | None) -> ScoreSettings:
        return ScoreSettings(
            instruction=self.instruction,
            max_length=self.max_length,
            cuts=self.on_too_long == "truncate",
            progress=progress,
        )

    def _ready(self) -> DecoderScorer | ClassifierScorer:
        """Return the scorer, whose model is loaded and can give the scores that are asked for."""
        scorer = self._get_scorer()
        if self.min_score is not None and scorer.is_probability:
            self._check_probability()
        return scorer

    def _check_probability(self) -> None:
        if self.min_score is not None and not 0 <= self.min_score <= 1:
            msg = (
                f"min_score={self.min_score} is not allowed: the scores of {self.model_id} are probabilities, so it "
                "must be a number from 0 to 1."
            )
            raise InvalidOptionError(msg)

    def _get_scorer(self) -> DecoderScorer | ClassifierScorer:
        if self._scorer is None:
            model = self.own_model or self._new_model()
            if isinstance(model, QuantizedModel):
                self._scorer = DecoderScorer(model)
            else:
                self._scorer = ClassifierScorer(model, self.max_batch_tokens)
        return self._scorer

    def _new_model(self) -> QuantizedHuggingFaceLLM | QuantizedCrossEncoder:
        """Return a model with the fields of loading; it loads at its first use."""
        fields = {
            name: getattr(self, name) for name in (*LOADING_FIELDS, "progress") if name in type(self).model_fields
        }
        if is_decoder(self._spec()):
            return QuantizedHuggingFaceLLM(**fields)
        return QuantizedCrossEncoder(**fields)

    # Loading.

    def load(self) -> Self:
        """Load the weights now instead of at the first use; see `QuantizedHuggingFaceLLM.load`."""
        self._ready().model.load()
        return self

    def unload(self) -> None:
        """End calls under way and free the memory; the next call loads again. Others that share the model lose it."""
        super().unload()
        if self._scorer is not None:
            self._scorer.model.unload()

    @property
    def is_loaded(self) -> bool:
        """Whether the weights are in memory."""
        return self._scorer is not None and self._scorer.model.is_loaded

    def memory_report(self) -> MemoryReport:
        """Report the memory of the model: before, during and after loading. Loads the model if needed."""
        return self._get_scorer().model.memory_report()

    def _forget(self, changed: Iterable[str]) -> None:
        changed = set(changed)
        super()._forget(changed)
        if not {"own_model", "max_batch_tokens", "progress", *LOADING_FIELDS}.isdisjoint(changed):
            self._scorer = None

    def _state(self) -> dict[Any, Any]:
        state = super()._state()
        return {**state, "__pydantic_private__": {**state["__pydantic_private__"], "_scorer": None}}

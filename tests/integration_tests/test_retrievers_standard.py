"""LangChain's own integration tests of retrievers, over documents that are retrieved and then reranked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.retrievers import BaseRetriever
from langchain_core.vectorstores import InMemoryVectorStore

from langchain_quantllm import LateInteractionReranker, QuantizedReranker
from tests.support.rerankers import QUERY, save_cross_encoder, save_late_interaction

pytest.importorskip("langchain_tests")
pytest.importorskip("langchain_classic")
pytest.importorskip("sentence_transformers")
from langchain_classic.retrievers import ContextualCompressionRetriever
from langchain_tests.integration_tests import RetrieversIntegrationTests


class _Standard(RetrieversIntegrationTests):
    compressor: Callable[[int], Any]

    @property
    def retriever_constructor(self) -> Any:
        """Make a retriever that finds ten documents, of which the best `k` are returned."""

        def make(k: int = 5) -> BaseRetriever:
            store = InMemoryVectorStore(DeterministicFakeEmbedding(size=32))  # any: the reranker is tested
            store.add_documents([Document(f"a text of river {i}", metadata={"i": i}) for i in range(20)])
            return ContextualCompressionRetriever(
                base_compressor=type(self).compressor(k), base_retriever=store.as_retriever(search_kwargs={"k": 10})
            )

        return make

    @property
    def retriever_query_example(self) -> str:
        return QUERY


class TestCrossEncoder(_Standard):
    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def made(cls, tmp_path_factory: pytest.TempPathFactory) -> None:
        folder = str(save_cross_encoder(tmp_path_factory.mktemp("reranker") / "model"))
        cls.compressor = lambda k: QuantizedReranker(
            model_id=folder, quantization="int8", device="cpu", top_n=k, progress=False
        )


class TestLateInteraction(_Standard):
    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def made(cls, tmp_path_factory: pytest.TempPathFactory) -> None:
        folder = tmp_path_factory.mktemp("reranker")
        model = str(save_late_interaction(folder / "model", folder / "bert"))
        cls.compressor = lambda k: LateInteractionReranker(
            model_id=model, quantization="nf4", device="cpu", top_n=k, progress=False
        )


class TestDecoder(_Standard):
    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def made(cls, short_smollm2: Path) -> None:
        folder = str(short_smollm2)
        cls.compressor = lambda k: QuantizedReranker(
            model_id=folder, quantization="nf4", device="cpu", top_n=k, progress=False
        )

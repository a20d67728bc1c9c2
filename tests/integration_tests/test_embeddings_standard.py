"""LangChain's own tests of embeddings, on all-MiniLM-L6-v2 in nf4, int8 and 16 bits."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("langchain_tests")
from langchain_tests.integration_tests import EmbeddingsIntegrationTests
from langchain_tests.unit_tests import EmbeddingsUnitTests

from langchain_quantllm import QuantizedHuggingFaceEmbeddings
from tests.support.encoder_models import minilm


class _Model:
    quantization = "nf4"

    @property
    def embeddings_class(self) -> type[QuantizedHuggingFaceEmbeddings]:
        return QuantizedHuggingFaceEmbeddings

    @property
    def embedding_model_params(self) -> dict[str, object]:
        options = {"dtype": "bfloat16", "device": "cpu", "progress": False}
        return {"model_id": str(minilm()), "quantization": self.quantization, **options}


class TestUnit(_Model, EmbeddingsUnitTests):
    @property
    def init_from_env_params(self) -> tuple[dict[str, str], dict[str, object], dict[str, object]]:
        return {}, self.embedding_model_params, {"quantization": "nf4"}


class _Loaded(_Model, EmbeddingsIntegrationTests):
    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def kept(cls) -> Iterator[None]:
        """Keep the model loaded: each test makes an object of its own, which shares the weights."""
        kept = QuantizedHuggingFaceEmbeddings(**cls().embedding_model_params).load()
        yield
        kept.unload()


class TestNF4(_Loaded):
    pass


class TestInt8(_Loaded):
    quantization = "int8"


class Test16Bits(_Loaded):
    quantization = "none"

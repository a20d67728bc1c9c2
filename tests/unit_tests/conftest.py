"""Models that many tests share, each loaded once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from langchain_quantllm import QuantizedHuggingFaceLLM
from tests.unit_tests.models import llm_of, tiny_model


@pytest.fixture(scope="session")
def tokenizer(smollm2: Path) -> Any:
    """SmolLM2's tokenizer: byte-level BPE of 49152 tokens."""
    return AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture(scope="session")
def llm(smollm2: Path) -> QuantizedHuggingFaceLLM:
    """SmolLM2 unquantized in float32, where equal computations give equal texts; 12 tokens unless a test says."""
    model = QuantizedHuggingFaceLLM(model_id=str(smollm2), dtype="float32", max_new_tokens=12, progress=False)
    return model.load()


@pytest.fixture(scope="session")
def tiny_llm(tokenizer: Any) -> QuantizedHuggingFaceLLM:
    """A random Llama of two layers over SmolLM2's vocabulary, which takes some milliseconds a token."""
    return llm_of(tiny_model(len(tokenizer)), tokenizer, max_new_tokens=12)


@pytest.fixture(scope="session", params=["nf4", "int8", "fp4"])
def quantized_llm(request: pytest.FixtureRequest, smollm2: Path) -> QuantizedHuggingFaceLLM:
    """SmolLM2 in each scheme that bitsandbytes quantizes while it loads."""
    model = QuantizedHuggingFaceLLM(model_id=str(smollm2), quantization=request.param, max_new_tokens=8, progress=False)
    return model.load()

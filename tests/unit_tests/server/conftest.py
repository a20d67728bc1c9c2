"""A server of a tiny random model, shared by the tests of a module."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from langchain_quantllm import ChatQuantizedHuggingFace, QuantizedHuggingFaceLLM
from tests.support.models import llm_of, tiny_model
from tests.support.serving import Running, serving


@pytest.fixture(scope="module")
def tiny(tokenizer: Any) -> Iterator[QuantizedHuggingFaceLLM]:
    """A random Llama over SmolLM2's vocabulary and chat template, with an engine of its own."""
    llm = llm_of(tiny_model(len(tokenizer), seed=3), tokenizer, model_id="acme/tiny")
    assert llm.engine_info.name == "fast"
    yield llm
    llm.unload()


@pytest.fixture(scope="module")
def tiny_chat(tiny: QuantizedHuggingFaceLLM) -> ChatQuantizedHuggingFace:
    return ChatQuantizedHuggingFace(llm=tiny)  # type: ignore[call-arg]


@pytest.fixture(scope="module")
def server(tiny: QuantizedHuggingFaceLLM) -> Iterator[Running]:
    with serving(tiny) as running:
        yield running


@pytest.fixture
def client(server: Running) -> Iterator[openai.OpenAI]:
    with server.client() as client:
        yield client

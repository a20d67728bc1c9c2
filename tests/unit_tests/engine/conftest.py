"""Small models over SmolLM2's vocabulary for the engine's tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from langchain_quantllm import QuantizedHuggingFaceLLM
from tests.support.engine import MakeLLM
from tests.support.models import llm_of, tiny_model


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Products of such sizes take longer when several cores share them, and much longer when these are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tiny(tokenizer: Any) -> Iterator[QuantizedHuggingFaceLLM]:
    """A random Llama over SmolLM2's vocabulary, with an engine that no other module's tests have used."""
    llm = llm_of(tiny_model(len(tokenizer), seed=3), tokenizer, max_new_tokens=12)
    assert llm.engine_info.name == "fast"  # made now, so that its trial forwards are over when tests count
    yield llm
    llm.unload()


@pytest.fixture
def make_tiny(tokenizer: Any) -> Iterator[MakeLLM]:
    """Make LLMs over a random Llama that the test may spoil."""
    made = []

    def make(seed: int = 3, **fields: Any) -> QuantizedHuggingFaceLLM:
        made.append(llm_of(tiny_model(len(tokenizer), seed=seed), tokenizer, **{"max_new_tokens": 12, **fields}))
        return made[-1]

    yield make
    for llm in made:
        llm.unload()

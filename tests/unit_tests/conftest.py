"""Models that many tests share, each loaded once."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from langchain_quantllm import QuantizedHuggingFaceLLM
from tests.support.critical import CriticalMessages
from tests.support.interpreter import interpret, selected_names
from tests.support.models import llm_of, tiny_model
from tests.support.selection import slow_but


@pytest.fixture(scope="session")
def critical() -> Iterator[CriticalMessages]:
    """The critical messages of engines, which check their blocks, slots and sequences whenever they are idle."""
    from langchain_quantllm.engine import continuous

    handler, log = CriticalMessages(), logging.getLogger(continuous.__name__)
    log.addHandler(handler)
    continuous.CHECKS_INTEGRITY = True
    yield handler
    log.removeHandler(handler)


@pytest.fixture(autouse=True)
def engines_stay_whole(critical: CriticalMessages) -> Iterator[None]:
    """Fail the test after which an engine's books are wrong."""
    yield
    messages, critical.messages = critical.messages, []
    assert not messages


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


@pytest.fixture(scope="session", params=slow_but(["nf4"], ["nf4", "int8", "fp4"]))
def quantized_llm(request: pytest.FixtureRequest, smollm2: Path) -> QuantizedHuggingFaceLLM:
    """SmolLM2 in each scheme that bitsandbytes quantizes while it loads."""
    model = QuantizedHuggingFaceLLM(model_id=str(smollm2), quantization=request.param, max_new_tokens=8, progress=False)
    return model.load()


@pytest.fixture(scope="module")
def interpreted(request: pytest.FixtureRequest) -> dict[str, Any]:
    """What a module's kernels do in Triton's interpreter: the report of each selected case, and of its `OTHERS`."""
    names = [*selected_names(request, "found"), *getattr(request.module, "OTHERS", ())]
    return interpret(request.module.__name__, names)


KERNEL_DEVICES = [
    pytest.param(
        "cpu",
        marks=pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton's interpreter"),
    ),
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")],
    ),
]


@pytest.fixture(params=KERNEL_DEVICES)
def found(request: pytest.FixtureRequest) -> Callable[[str], Any]:
    """A function that gives the report of a module's case, from the interpreter and from the GPU."""
    if request.param == "cuda":
        return lambda name: request.module.run(name, "cuda")
    reports = request.getfixturevalue("interpreted")

    def report(name: str) -> Any:
        assert "failed" not in (reports[name] or {}), reports[name]["failed"]
        return reports[name]

    return report

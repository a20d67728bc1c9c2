"""Loading in tests: an LLM or a pipeline over a tiny checkpoint, and checks of errors and of freed memory."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, pipeline

from langchain_quantllm import QuantizedHuggingFaceLLM
from langchain_quantllm.errors import QuantLLMError

PROMPT = "The capital of France"


def make_llm(folder: Path | str, **kwargs: Any) -> QuantizedHuggingFaceLLM:
    """Make an LLM over a checkpoint, not loaded, of 8 tokens unless the arguments say otherwise."""
    return QuantizedHuggingFaceLLM(**{"model_id": str(folder), "progress": False, "max_new_tokens": 8, **kwargs})


def load(model_id: Path | str, **kwargs: Any) -> QuantizedHuggingFaceLLM:
    """Make an LLM with the checkpoint's own options, and load it."""
    return QuantizedHuggingFaceLLM(model_id=str(model_id), progress=False, **kwargs).load()


def make_pipeline(folder: Path, config: BitsAndBytesConfig | None = None, **kwargs: Any) -> Any:
    """Make a pipeline as a user does."""
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map={"": "cpu"})
    return pipeline("text-generation", model=model, tokenizer=AutoTokenizer.from_pretrained(folder), **kwargs)


def count_tokens(llm: QuantizedHuggingFaceLLM, **call: Any) -> int:
    """Count the tokens of a completion that no end token cuts short."""
    output = llm.generate([PROMPT], ignore_eos=True, **call).llm_output
    assert output is not None
    return int(output["token_usage"]["completion_tokens"])


def model_of(llm: QuantizedHuggingFaceLLM) -> torch.nn.Module:
    """Load an LLM, and return the transformers model."""
    model: torch.nn.Module = llm.load().pipeline.model
    return model


def sentence(error: BaseException) -> str:
    """Return the message of one of the package's errors, which must be one short sentence."""
    text = str(error)
    assert isinstance(error, QuantLLMError)
    assert "\n" not in text.strip()
    assert 20 < len(text) < 400
    return text


def is_gone(reference: Callable[[], Any], within_s: float = 5) -> bool:
    """Say whether the object of a weak reference is freed, within the time that an idle thread lives."""
    deadline = time.monotonic() + within_s
    while reference() is not None and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
    return reference() is None

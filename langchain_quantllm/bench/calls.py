"""Calls on a model as LangChain's users make them, with what they took and what came back.

Owns how one call is timed, and the check that it did the work it was asked for. Knows no scheme and no order of
measurements.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from dataclasses import dataclass
from typing import Any

from langchain_core.callbacks import BaseCallbackHandler

from langchain_quantllm.errors import GenerationError
from langchain_quantllm.llms import QuantizedHuggingFaceLLM


def synchronize(device: str) -> None:
    """Wait until a device has done all that it was given; the CPU has."""
    import torch

    if not device.startswith("cpu"):
        torch.accelerator.synchronize(device)


def stream(llm: QuantizedHuggingFaceLLM, prompt: str, new_tokens: int) -> Run:
    """Stream one text.

    Args:
        llm: A loaded model with `ignore_eos=True`.
        prompt: Its prompt.
        new_tokens: Its length.
    """
    notes = Notes()
    first_text_s = None
    began = time.perf_counter()
    for text in llm.stream(prompt, {"callbacks": [notes]}, max_new_tokens=new_tokens):
        if text and first_text_s is None:
            first_text_s = time.perf_counter() - began
    total_s = time.perf_counter() - began
    return Run(notes.infos, total_s, total_s if first_text_s is None else first_text_s)


def abatch(llm: QuantizedHuggingFaceLLM, prompts: list[Any], new_tokens: int) -> Run:
    """Write many texts at once.

    Args:
        llm: A loaded model with `ignore_eos=True`.
        prompts: Their prompts.
        new_tokens: Length of each.
    """
    notes = Notes()
    began = time.perf_counter()
    asyncio.run(llm.abatch(prompts, {"callbacks": [notes]}, max_new_tokens=new_tokens))
    total_s = time.perf_counter() - began
    return Run(notes.infos, total_s, total_s)


class Notes(BaseCallbackHandler):
    """Keeps usage and timing of every finished row."""

    run_inline = True  # not in a thread: the call that is measured waits for it

    def __init__(self) -> None:
        self.infos: list[dict[str, Any]] = []

    def on_llm_end(self, response: Any, **_: Any) -> None:
        """Note what came with a row."""
        self.infos.append(response.generations[0][0].generation_info or {})


@dataclass(frozen=True)
class Run:
    """One call: what its rows reported, its wall time, and when its first text came."""

    infos: list[dict[str, Any]]
    total_s: float
    first_text_s: float

    @property
    def first_token_s(self) -> float:
        """From the submission to the first token, as the engine counts it; median of the rows."""
        return statistics.median(float(info["timing"]["first_token_s"]) for info in self.infos)

    @property
    def step_s(self) -> float:
        """From a row's first token to its last, by step; median of the rows."""
        steps_s: list[float] = []
        for info in self.infos:
            decoding_s = info["timing"]["total_s"] - info["timing"]["first_token_s"]
            steps_s.append(decoding_s / (info["usage_metadata"]["output_tokens"] - 1))
        return statistics.median(steps_s)

    @property
    def cached_tokens(self) -> int:
        """Tokens of prompts that were taken over from earlier ones, over all rows."""
        return sum(info["usage_metadata"]["input_token_details"]["cache_read"] for info in self.infos)

    def check(self, batch: int, prompt_tokens: int, new_tokens: int, *, may_be_cached: bool = False) -> None:
        """Check that the work was what was asked for.

        Raises:
            GenerationError: If it was not, so that the time would mean nothing.
        """
        usages = [info["usage_metadata"] for info in self.infos]
        found = sorted({(usage["input_tokens"], usage["output_tokens"]) for usage in usages})
        if len(usages) != batch or found != [(prompt_tokens, new_tokens)]:
            msg = (
                f"{len(usages)} rows of (prompt, new) tokens {found} came back instead of {batch} of "
                f"{(prompt_tokens, new_tokens)}; their time cannot be compared."
            )
            raise GenerationError(msg)
        if self.cached_tokens and not may_be_cached:
            msg = f"{self.cached_tokens} tokens of prompts were not computed although prefix caching is off."
            raise GenerationError(msg)

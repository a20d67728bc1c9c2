"""Timed calls: through our engine as LangChain's users make them, and with transformers' own `generate`.

Each checks that the call did the work it was asked for; `repeat` runs one until its time can be trusted.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from langchain_core.callbacks import BaseCallbackHandler

from langchain_quantllm.errors import GenerationError
from langchain_quantllm.llms import QuantizedHuggingFaceLLM
from langchain_quantllm.memory import track_memory

_WARM_UP_TOKENS = 8
_LEAST_STEP_S = 1e-6
_LOOK_S = 0.05
"""Seconds between two readings of the resident memory: rare enough not to slow a step."""


def synchronize(device: str) -> None:
    """Wait until a device has done all its work; the CPU has."""
    import torch

    if not device.startswith("cpu"):
        torch.accelerator.synchronize(device)


@dataclass(frozen=True)
class Run:
    """One call: the `generation_info` of each of its texts, its wall time, and when its first text came."""

    infos: list[dict[str, Any]]
    total_s: float
    first_text_s: float

    @property
    def first_token_s(self) -> float:
        """From the submission to the first token, as the engine counts it; median of the texts."""
        return statistics.median(float(info["timing"]["first_token_s"]) for info in self.infos)

    @property
    def step_s(self) -> float:
        """From a text's first token to its last, by step; median of the texts."""
        steps_s: list[float] = []
        for info in self.infos:
            decoding_s = info["timing"]["total_s"] - info["timing"]["first_token_s"]
            steps_s.append(decoding_s / (info["usage_metadata"]["output_tokens"] - 1))
        return statistics.median(steps_s)

    @property
    def cached_tokens(self) -> int:
        """Tokens of prompts that were taken over from earlier ones, over all texts."""
        return sum(info["usage_metadata"]["input_token_details"]["cache_read"] for info in self.infos)

    def check(self, batch: int, prompt_tokens: int, new_tokens: int, *, may_be_cached: bool = False) -> None:
        """Check that the call did the work it was asked for.

        Raises:
            GenerationError: If it did not, so that the time would mean nothing.
        """
        usages = [info["usage_metadata"] for info in self.infos]
        found = sorted({(usage["input_tokens"], usage["output_tokens"]) for usage in usages})
        if len(usages) != batch or found != [(prompt_tokens, new_tokens)]:
            msg = (
                f"{len(usages)} texts of (prompt, new) tokens {found} came back instead of {batch} of "
                f"{(prompt_tokens, new_tokens)}; their time cannot be compared."
            )
            raise GenerationError(msg)
        if self.cached_tokens and not may_be_cached:
            msg = f"{self.cached_tokens} tokens of prompts were not computed although prefix caching is off."
            raise GenerationError(msg)


class _InfoHandler(BaseCallbackHandler):
    """Keeps the `generation_info` of every finished text: usage and timing."""

    run_inline = True  # not in a thread: the call that is measured waits for it

    def __init__(self) -> None:
        self.infos: list[dict[str, Any]] = []

    def on_llm_end(self, response: Any, **_: Any) -> None:
        """Keep the info of one text."""
        self.infos.append(response.generations[0][0].generation_info or {})


def stream(llm: QuantizedHuggingFaceLLM, prompt: str, new_tokens: int) -> Run:
    """Stream one text.

    Args:
        llm: A loaded model with `ignore_eos=True`.
        prompt: Its prompt.
        new_tokens: Its length.
    """
    handler = _InfoHandler()
    first_text_s = None
    began = time.perf_counter()
    for text in llm.stream(prompt, {"callbacks": [handler]}, max_new_tokens=new_tokens):
        if text and first_text_s is None:
            first_text_s = time.perf_counter() - began
    total_s = time.perf_counter() - began
    return Run(handler.infos, total_s, total_s if first_text_s is None else first_text_s)


def abatch(llm: QuantizedHuggingFaceLLM, prompts: list[Any], new_tokens: int) -> Run:
    """Write many texts at once.

    Args:
        llm: A loaded model with `ignore_eos=True`.
        prompts: Their prompts.
        new_tokens: Length of each.
    """
    handler = _InfoHandler()
    began = time.perf_counter()
    asyncio.run(llm.abatch(prompts, {"callbacks": [handler]}, max_new_tokens=new_tokens))
    total_s = time.perf_counter() - began
    return Run(handler.infos, total_s, total_s)


def time_generate(pipeline: Any, prompts: Sequence[str], new_tokens: int, *, use_cache: bool = True) -> float:
    """Write texts greedily with transformers' `model.generate`, from text to text.

    Args:
        pipeline: A loaded text-generation pipeline, of which model and tokenizer are used.
        prompts: Texts of the same length in tokens, so that none needs padding.
        new_tokens: Length of each text that is written.
        use_cache: Whether keys and values are kept from step to step.

    Returns:
        Seconds from the call to the decoded texts.

    Raises:
        GenerationError: If other lengths come back than were asked for.
    """
    import torch
    from transformers import GenerationConfig

    model, tokenizer = pipeline.model, pipeline.tokenizer
    device = model.get_input_embeddings().weight.device
    config = GenerationConfig(
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        repetition_penalty=1.0,  # not the checkpoint's: one kind of step for all
        use_cache=use_cache,
        pad_token_id=tokenizer.pad_token_id or 0,
    )
    synchronize(str(device))
    began = time.perf_counter()
    encoded = tokenizer(list(prompts), return_tensors="pt", return_token_type_ids=False).to(device)
    with torch.no_grad():
        written = model.generate(**encoded, generation_config=config)
    tokenizer.batch_decode(written, skip_special_tokens=True)
    total_s = time.perf_counter() - began
    found = tuple(written.shape)
    asked = (len(prompts), encoded["input_ids"].shape[1] + new_tokens)
    if found != asked:
        msg = f"generate gave (texts, tokens) {found} instead of {asked}; its time cannot be compared."
        raise GenerationError(msg)
    return total_s


@dataclass(frozen=True, kw_only=True)
class Repeated:
    """The runs of one call.

    Args:
        runs: Each run, without the warm-up.
        new_tokens: Length of each text in them.
        peak_bytes: Most memory in use on the device meanwhile, as the process counts it; None where it was not read.
    """

    runs: tuple[Run, ...]
    new_tokens: int
    peak_bytes: int | None

    @property
    def runs_s(self) -> list[float]:
        """Seconds of each run."""
        return [run.total_s for run in self.runs]

    @property
    def total_s(self) -> float:
        """Median of the runs, in seconds."""
        return statistics.median(self.runs_s)


def repeat(
    run: Callable[[int], Run],
    new_tokens: int,
    *,
    repeats: int,
    warm_ups: int = 1,
    warm_up_tokens: int = _WARM_UP_TOKENS,
    limit_s: float = math.inf,
    device: str | None = None,
) -> Repeated:
    """Warm up, then run a call several times.

    Args:
        run: Makes one call with texts of so many new tokens.
        new_tokens: Length of the texts that is asked for.
        repeats: Most runs.
        warm_ups: Calls before them; 2 where the second use of a length captures its graph.
        warm_up_tokens: Most tokens of a text in the warm-up.
        limit_s: No further run is begun after so many seconds, and a text that would take longer by itself is
            shortened to fit, judged by the seconds per token in the last warm-up.
        device: The device whose peak of memory is read; None reads none.

    Returns:
        At least one run.
    """
    few_tokens = min(new_tokens, warm_up_tokens)
    tracking = track_memory([device], interval_s=_LOOK_S) if device is not None else contextlib.nullcontext()
    with tracking as tracked:
        tokens = new_tokens
        warm_up_s = [run(few_tokens).total_s for _ in range(warm_ups)][-1]
        if warm_up_s / few_tokens * new_tokens > limit_s and new_tokens > 1:
            # The warm-up may include kernel compilation and mostly prompt time: measure again.
            first_s = run(1).total_s
            step_s = max(_LEAST_STEP_S, (run(few_tokens).total_s - first_s) / max(1, few_tokens - 1))
            tokens = min(new_tokens, max(few_tokens, int((limit_s - first_s) / step_s)))
        runs = [run(tokens)]
        while len(runs) < repeats and sum(r.total_s for r in runs) + runs[-1].total_s < limit_s:
            runs.append(run(tokens))
    peak_bytes = None if device is None or tracked is None else tracked.peak[device]
    return Repeated(runs=tuple(runs), new_tokens=tokens, peak_bytes=peak_bytes)

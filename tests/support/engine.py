"""Requests to an engine by token ids, and their answers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from langchain_quantllm import QuantizedHuggingFaceLLM
from langchain_quantllm.engine.block_manager import BLOCK_TOKENS
from langchain_quantllm.engine.request import Request, plan_requests
from langchain_quantllm.engine.stream import TokenLogprob, Usage
from langchain_quantllm.options import GenerationOptions

PROMPTS = [
    "The capital of France is",
    "Once upon a time there was a little",
    "1, 2, 3, 4,",
    "Sea",
    "def add(a, b):\n    return",
]


MakeLLM = Callable[..., QuantizedHuggingFaceLLM]
"""Makes an LLM over a tiny model that a test may change, from the LLM's fields."""

ONE_SEQUENCE = 7 * BLOCK_TOKENS * 512
"""Bytes of a KV cache for one sequence of six blocks: a token of `tiny_model` has 2 layers * 2 * 32 * 4 bytes = 512."""


@dataclass
class Answer:
    """The chunks of one request, joined, or the error in their place."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    usage: Usage | None = None
    error: BaseException | None = None


def ids_of(count: int, *, seed: int = 0) -> list[int]:
    """Choose token ids of SmolLM2's vocabulary at random, none of them special."""
    generator = torch.Generator().manual_seed(seed * 1009 + count)
    return torch.randint(1000, 40000, (count,), generator=generator).tolist()


def plan(llm: QuantizedHuggingFaceLLM, prompt_ids: Sequence[int], mask: Any = None, **options: Any) -> list[Request]:
    given = GenerationOptions(**{"max_new_tokens": 12, "eos_token_id": (), **options})
    limits = llm._engine(given).limits
    return plan_requests(
        prompt_ids, given, limits, max_rows=llm.batch_size, shares_prefix=llm.prefix_caching, mask=mask
    )


def ask(llm: QuantizedHuggingFaceLLM, requests: Sequence[Request]) -> list[Answer]:
    """Run requests of one submission."""
    answers = [Answer() for _ in requests]
    with llm._engine(requests[0].options).submit(requests) as stream:
        for chunk in stream:
            answer = answers[chunk.row]
            answer.token_ids += chunk.token_ids
            answer.text += chunk.text
            answer.logprobs += chunk.logprobs
            answer.finish_reason, answer.usage = chunk.finish_reason, chunk.usage
    return answers


def ids_after(llm: QuantizedHuggingFaceLLM, prompt_ids: Sequence[int], **options: Any) -> list[int]:
    return ask(llm, plan(llm, prompt_ids, **options))[0].token_ids


def cached_tokens(llm: QuantizedHuggingFaceLLM, prompt_ids: Sequence[int], **options: Any) -> list[int | None]:
    return [a.usage.cached_tokens if a.usage else None for a in ask(llm, plan(llm, prompt_ids, **options))]


def on_pipeline(llm: QuantizedHuggingFaceLLM, **fields: Any) -> QuantizedHuggingFaceLLM:
    """Make an LLM over the same model that runs on the pipeline engine."""
    return QuantizedHuggingFaceLLM(pipeline=llm.pipeline, engine="pipeline", **fields)


class Background:
    """A call in a thread of its own; leaving the block waits for it and raises what it raised."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._call = call
        self.result: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        try:
            self.result = self._call()
        except BaseException as error:
            self._error = error

    def __enter__(self) -> Background:
        self._thread.start()
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        self._thread.join(60)
        if kind is None:
            assert not self._thread.is_alive()
            if self._error is not None:
                raise self._error


class AllowOnly:
    """A mask that allows some ids only, and notes the sampled ones."""

    IDS = (31, 32, 63, 64, 1000, 49151, 49120)
    """First and last tokens of a mask's words, and of the vocabulary."""

    def __init__(
        self,
        ids: Sequence[int],
        *,
        fails_at: int | None = None,
        frees_after: int | None = None,
        ends_after: int | None = None,
    ) -> None:
        self.ids = ids
        self.accepted: list[int] = []
        self.ended = False
        self._fails_at = fails_at
        self._frees_after = frees_after
        self._ends_after = ends_after

    def fill(self, bits: torch.Tensor) -> bool:
        assert bits.dtype == torch.int32
        assert bool((bits == -1).all())
        if self._fails_at == len(self.accepted):
            msg = "the grammar is broken"
            raise RuntimeError(msg)
        if self._frees_after is not None and len(self.accepted) >= self._frees_after:
            bits.zero_()  # is not looked at
            return False
        self.ended = self._ends_after == len(self.accepted)
        bits.zero_()
        for i in self.ids:
            word = int(bits[0, i // 32]) & 0xFFFFFFFF | 1 << i % 32
            bits[0, i // 32] = word - (1 << 32) if word >= 1 << 31 else word
        return True

    def accept(self, token_id: int) -> None:
        self.accepted.append(token_id)

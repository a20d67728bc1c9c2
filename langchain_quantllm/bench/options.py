"""The options of a bench: which measurements, how long, and how often."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from langchain_quantllm.compat.packages import is_installed
from langchain_quantllm.errors import InvalidOptionError, MissingPackageError, nearest, pip_install

OVERVIEW = ("prefill", "batches", "lengths", "cache", "training", "quality")
"""Measurements of the overview. Loading and its memory are always measured."""

SPEED = ("generation", "long_prompt", "shared_prefix")
"""Measurements of `bench --speed`: our engine against its own bare step and the device's limit."""

MEMORY = ("memory",)
"""Measurements of `bench --memory`: the estimate beside the measured sizes."""

QUALITY = ("predictions", "tool_calls", "json", "retrieval", "tasks")
"""Measurements of `bench --quality`: perplexity and divergence; valid calls; valid JSON; facts in long texts; tasks of
lm-evaluation-harness."""

MEASUREMENTS = (*OVERVIEW, *SPEED, *MEMORY, *QUALITY)

_LEAST = {
    "prompt_tokens": 3,
    "peer_new_tokens": 1,
    "prefill_tokens": 3,
    "cache_new_tokens": 1,
    "train_batch": 1,
    "train_tokens": 2,
    "rank": 1,
    "window_tokens": 2,
    "repeats": 1,
    "peer_repeats": 1,
    "shared": 0,
    "shared_tokens": 3,
    "long_prompt_tokens": 0,
    "memory_batch": 1,
    "questions": 1,
}


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """Which measurements are made, how long they are, and how often they are repeated.

    Args:
        measurements: Some of `MEASUREMENTS`.
        peer: Whether a peer is measured too: transformers' own `generate` in the overview, langchain-huggingface
            beside `"generation"`.
        batches: Texts at once, for generation by batch; 1 is streamed, more are an `abatch`.
        prompt_tokens: Length of the prompts of generated texts, in tokens, with the tokenizer's special tokens.
        new_tokens: Length of the texts by batch, in tokens.
        peer_new_tokens: The same for the peer where it takes longer: `generate`, and langchain-huggingface with many
            requests a few at a time.
        lengths: Lengths of the texts that are generated one at a time, in tokens.
        prefill_batches: Prompts at once, for prefill.
        prefill_tokens: Length of each of them, in tokens.
        cache_new_tokens: Length of the texts with and without KV cache, in tokens.
        train_batch: Texts at once, for training.
        train_tokens: Length of each of them, in tokens.
        rank: Rank of the adapter that is trained.
        window_tokens: Length of the windows for a text's perplexity, in tokens.
        quality_tokens: Most tokens of that text; None for all.
        repeats: Runs of each measurement after its warm-up; the median counts.
        peer_repeats: The same for `generate`.
        limit_s: Seconds that a measurement of the overview may take, its warm-up not counted: a text that would take
            longer by itself is written shorter, and then it runs once. `math.inf` for no limit.
        shared: Requests whose prompts begin with the same text; 0 leaves this out.
        shared_tokens: Length of that text, in tokens.
        long_prompt_tokens: Length of the prompt whose first text is timed, in tokens; 0 leaves this out.
        memory_batch: Texts at once, for `"memory"`.
        questions: Questions of each kind, for tool calls, JSON and retrieval; fewer where there are no more.
        retrieval_tokens: Lengths of the prompts for retrieval, in tokens.
        task_questions: Most questions of each task of lm-evaluation-harness; None for all.
        task_chat: Whether these are put as messages of a chat.

    Raises:
        InvalidOptionError: If a measurement is not known, or a number is too small.
        MissingPackageError: If a package that a measurement needs is not installed.
    """

    measurements: tuple[str, ...] = OVERVIEW
    peer: bool = True
    batches: tuple[int, ...] = (1, 2, 4, 8, 16)
    prompt_tokens: int = 30
    new_tokens: int = 128
    peer_new_tokens: int = 32
    lengths: tuple[int, ...] = (30, 512)
    prefill_batches: tuple[int, ...] = (1, 16)
    prefill_tokens: int = 512
    cache_new_tokens: int = 16
    train_batch: int = 2
    train_tokens: int = 256
    rank: int = 8
    window_tokens: int = 512
    quality_tokens: int | None = 4096
    repeats: int = 3
    peer_repeats: int = 1
    limit_s: float = 8.0
    shared: int = 64
    shared_tokens: int = 1000
    long_prompt_tokens: int = 512
    memory_batch: int = 1
    questions: int = 40
    retrieval_tokens: tuple[int, ...] = (512, 1024, 2048)
    task_questions: int | None = None
    task_chat: bool = False

    def __post_init__(self) -> None:
        """Check names and numbers, and that the peer is installed."""
        for name in self.measurements:
            if name not in MEASUREMENTS:
                msg = f"measurement {name!r} is not known{nearest(name, MEASUREMENTS)}"
                raise InvalidOptionError(msg)
        for name, bound in {"new_tokens": 1 if "memory" in self.measurements else 2, **_LEAST}.items():
            if (value := getattr(self, name)) < bound:
                msg = f"{name}={value} is not allowed; it must be at least {bound}."
                raise InvalidOptionError(msg)
        for name in ("batches", "lengths", "prefill_batches"):
            if any(number < 1 for number in getattr(self, name)):
                msg = f"{name}={getattr(self, name)} is not allowed; each number must be at least 1."
                raise InvalidOptionError(msg)
        if self.quality_tokens is not None and self.quality_tokens < 2:
            msg = f"quality_tokens={self.quality_tokens} is not allowed; it must be at least 2, or None for all."
            raise InvalidOptionError(msg)
        for name, bound, meant in (("retrieval_tokens", 320, "each number"), ("task_questions", 1, "it")):
            value = getattr(self, name)
            if min(value if isinstance(value, tuple) else (bound if value is None else value,), default=bound) < bound:
                msg = f"{name}={value} is not allowed; {meant} must be at least {bound}."
                raise InvalidOptionError(msg)
        if not self.limit_s > 0:
            msg = f"limit_s={self.limit_s} is not allowed; it must be above 0."
            raise InvalidOptionError(msg)
        if self.peer and "generation" in self.measurements and not is_installed("langchain_huggingface"):
            command = pip_install("langchain-quantllm[huggingface]")
            msg = f"the peer, langchain-huggingface, is not installed: {command}; or leave it out: --no-peer."
            raise MissingPackageError(msg)
        if {"tool_calls", "json"} & set(self.measurements) and not is_installed("jsonschema"):
            command = pip_install("langchain-quantllm[quality]")
            msg = f"jsonschema, which checks answers, is not installed: {command}; or --without tool_calls,json."
            raise MissingPackageError(msg)

    def to_dict(self) -> dict[str, Any]:
        """All options, ready for JSON, which has no infinity: `limit_s` is None without a limit."""
        return {**asdict(self), "limit_s": self.limit_s if math.isfinite(self.limit_s) else None}

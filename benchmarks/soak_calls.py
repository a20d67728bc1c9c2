"""The calls of the soak: random requests of every kind, and how their streams are read and their answers judged."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from benchmarks.oracle import Verdict
from benchmarks.soak_model import ADAPTERS, BAD, CONTEXT_TOKENS, SoakModel
from langchain_quantllm.engine.stream import Chunk, ChunkStream
from langchain_quantllm.errors import (
    GenerationError,
    GenerationTimeoutError,
    InvalidOptionError,
    PromptTooLongError,
    QuantLLMError,
    QueueFullError,
)
from langchain_quantllm.options import BASE_ADAPTER
from tests.support.engine import AllowOnly

KINDS = {
    "greedy": 6, "seeded": 6, "stopped": 3, "several": 2, "turn": 3, "masked": 3, "long": 2, "whole": 2, "late": 3,
    "cancelled": 4, "unread": 2, "timed": 2, "bounded": 2, "failing mask": 2, "nan": 2, "wrong": 1, "too long": 1,
}  # fmt: skip
"""Kinds of calls and their weights."""

ENGINE_FAILS = ("the device had a bad day", "was unloaded", "was dropped")
"""Words of errors that any call may end with, as forwards fail and the model is unloaded in the middle."""

BEGINNINGS = tuple(letters * 12 for letters in ("abcd", "hgfe", "a b "))
"""Beginnings that prompts have in common, so that they share blocks, and must not under different adapters."""

STATES: list[Callable[[], contextlib.AbstractContextManager[Any]]] = [
    contextlib.nullcontext,
    torch.inference_mode,
    torch.no_grad,
    torch.enable_grad,
    lambda: torch.autocast("cpu", torch.bfloat16),
]


class Panic(BaseException):
    """An exception of a mask that is no Exception, as Ctrl-C and exits are."""


class Mask(AllowOnly):
    """A mask of some bytes that raises at a given token, when it is asked or told."""

    def __init__(self, ids: Sequence[int], *, error: BaseException | None = None, where: str = "", **more: Any) -> None:
        """Take the ids; `where` is `"factory"`, `"fill"` or `"accept"`, the place that raises the error."""
        super().__init__(ids, **more)
        self._error, self._where = error, where
        self._raise("factory")

    def _raise(self, where: str) -> None:
        if self._error is not None and where == self._where and (where == "factory" or len(self.accepted) >= 2):
            raise self._error

    def fill(self, bits: torch.Tensor) -> bool:
        """Set the bits, or raise."""
        self._raise("fill")
        return super().fill(bits)

    def accept(self, token_id: int) -> None:
        """Take the token, or raise."""
        self._raise("accept")
        super().accept(token_id)


@dataclass
class Call:
    """One call.

    Args:
        kind: Its kind.
        prompt: Its text.
        options: The options of the call.
        errors: Errors that it may end with.
        must_fail: Whether it has to end with one.
        mask: Makes its mask.
        ids: Token ids in place of the prompt's.
        most_waiting: `max_waiting`.
        chunks: Read so many chunks, then close the stream; None reads all.
        pause_s: Seconds before the first chunk is read.
        is_left: Leave the stream open, and never read it again.
    """

    kind: str
    prompt: str
    options: dict[str, Any]
    errors: tuple[type[QuantLLMError], ...] = ()
    must_fail: bool = False
    mask: Callable[[], Any] | None = None
    ids: tuple[int, ...] | None = None
    most_waiting: int | None = None
    chunks: int | None = None
    pause_s: float = 0.0
    is_left: bool = False
    in_pieces: bool = True
    found: list[list[Chunk]] = field(default_factory=list)


class Maker:
    """Makes random calls from a seed."""

    def __init__(self, seed: int) -> None:
        """Begin with a seed of its own."""
        self._random = random.Random(seed)
        self._history = ""

    def make(self) -> Call:
        """Make a call."""
        kind = self._random.choices(list(KINDS), list(KINDS.values()))[0]
        call = Call(kind, self._text(90), self._options())
        getattr(self, f"_{kind.replace(' ', '_')}", lambda _: None)(call)
        if "min_new_tokens" in call.options:
            call.options["min_new_tokens"] = min(call.options["min_new_tokens"], call.options["max_new_tokens"])
        return call

    def remember(self, call: Call) -> None:
        """Let the next turn of a chat go on after a call."""
        if call.kind == "turn" and call.found:
            self._history = call.prompt + "".join(chunk.text for chunk in call.found[0])

    def state(self) -> contextlib.AbstractContextManager[Any]:
        """Choose a state of torch for the caller's thread."""
        return self._random.choice(STATES)()

    def _text(self, most: int) -> str:
        text = "".join(self._random.choices("abcdefgh ", k=self._random.randint(1, most)))
        if self._random.random() < 0.5:
            text = self._random.choice(BEGINNINGS)[: self._random.randint(1, 48)] + text
        return text

    def _options(self) -> dict[str, Any]:
        rng = self._random
        options: dict[str, Any] = {"max_new_tokens": rng.choice([1, 5, 12, rng.randint(1, 50)]), "timeout": 300}
        if rng.random() < 0.2:
            options["priority"] = rng.choice([-1, 1, 5])
        if rng.random() < 0.2:
            options["adapter"] = rng.choice([*ADAPTERS, BASE_ADAPTER])
        if rng.random() < 0.15:
            options["cache_salt"] = rng.choice(["mine", "yours"])
        if rng.random() < 0.2:
            options["logprobs"] = rng.choice([True, 1, 3])
        if rng.random() < 0.2:
            options["repetition_penalty"] = rng.choice([1.1, 1.5, 0.8])
        if rng.random() < 0.2:
            options |= rng.choice([{"ignore_eos": True}, {"min_new_tokens": rng.randint(0, options["max_new_tokens"])}])
        return options

    def _sampling(self) -> dict[str, Any]:
        rng = self._random
        options: dict[str, Any] = {"do_sample": True, "seed": rng.randrange(1000)}
        several = {
            "temperature": rng.uniform(0.2, 3), "top_k": rng.choice([0, 1, 5, 50, 300]),
            "top_p": rng.uniform(0.05, 1), "min_p": rng.uniform(0, 0.3),
        }  # fmt: skip
        return options | {name: value for name, value in several.items() if rng.random() < 0.6}

    def _seeded(self, call: Call) -> None:
        call.options |= self._sampling()

    def _several(self, call: Call) -> None:
        call.options |= {**self._sampling(), "n": self._random.randint(2, 4)}

    def _stopped(self, call: Call) -> None:
        letters = "abcdefghijklmnopqrstuvwxyz0123456789"
        call.options |= {"stop": ["".join(self._random.choices(letters, k=n)) for n in (1, 1, 2)], "max_new_tokens": 60}

    def _turn(self, call: Call) -> None:
        fresh = not self._history or len(self._history.encode()) > 150
        call.prompt = "a common beginning of some length, " if fresh else self._history
        call.options["max_new_tokens"] = 10

    def _masked(self, call: Call) -> None:
        ids = self._random.sample(range(256), self._random.choice([1, 3, 60]))
        more: dict[str, Any] = self._random.choice([{}, {"ends_after": 4}, {"frees_after": 3}, {"ends_after": 0}])
        call.mask = lambda: Mask(ids, **more)
        call.options |= self._random.choice([{}, self._sampling()])

    def _failing_mask(self, call: Call) -> None:
        where = self._random.choice(["factory", "fill", "accept"])
        error = self._random.choice([ValueError("the grammar is broken"), Panic("away"), KeyboardInterrupt()])
        ids = self._random.sample(range(256), 30)
        call.mask = lambda: Mask(ids, error=error, where=where)
        call.options |= {"max_new_tokens": 9, "ignore_eos": True}
        call.errors, call.must_fail = (GenerationError,), True

    def _long(self, call: Call) -> None:
        call.prompt = "".join(self._random.choices("abcdefgh ", k=self._random.randint(150, 240)))
        call.options |= {"max_new_tokens": self._random.randint(1, CONTEXT_TOKENS - 240), "ignore_eos": True}

    def _whole(self, call: Call) -> None:
        call.in_pieces = False

    def _late(self, call: Call) -> None:
        call.options |= {"max_new_tokens": 60, "ignore_eos": True}
        call.pause_s = self._random.uniform(0.0, 0.3)

    def _cancelled(self, call: Call) -> None:
        call.options["max_new_tokens"] = 60
        call.chunks = self._random.randint(0, 8)

    def _unread(self, call: Call) -> None:
        call.options |= {"max_new_tokens": 100, "ignore_eos": True, "n": self._random.choice([1, 1, 3])}
        call.is_left, call.chunks = True, self._random.choice([0, 3])

    def _timed(self, call: Call) -> None:
        call.options |= {"timeout": self._random.choice([0.001, 0.02, 0.1, 1.0]), "max_new_tokens": 60}
        call.errors = (GenerationTimeoutError,)

    def _bounded(self, call: Call) -> None:
        call.most_waiting = self._random.choice([1, 2, 4])
        call.errors = (QueueFullError,)

    def _nan(self, call: Call) -> None:
        ids = [self._random.randrange(256) for _ in range(self._random.choice([1, 20, 120]))]
        ids.insert(self._random.randint(0, len(ids)), BAD)
        call.ids = tuple(ids)
        call.chunks = self._random.choice([None, None, 0])
        call.errors, call.must_fail = (GenerationError,), call.chunks is None

    def _wrong(self, call: Call) -> None:
        call.options |= self._random.choice([{"top_p": 7}, {"max_new_tokens": 0}, {"nonsense": 1}, {"adapter": "none"}])
        call.errors, call.must_fail = (InvalidOptionError,), True

    def _too_long(self, call: Call) -> None:
        call.prompt *= CONTEXT_TOKENS
        call.errors, call.must_fail = (PromptTooLongError,), True


class Conversation:
    """A call on its way: its requests, its stream, and what is read of it."""

    def __init__(self, model: SoakModel, call: Call, llm: Any) -> None:
        """Plan and submit a call."""
        options = dict(call.options)
        stop = options.pop("stop", None)
        prepared = llm._plan([call.prompt], stop, options)
        changes: dict[str, Any] = {} if call.mask is None else {"mask": call.mask}
        if call.ids is not None:
            changes["prompt_ids"] = call.ids
        self.requests = [replace(request, **changes) for request in prepared.requests]
        self._model, self._call = model, call
        self._tokenizer = prepared.tokenizer
        prepared = replace(prepared, requests=self.requests, max_waiting=call.most_waiting)
        self.stream: ChunkStream = prepared.submit(in_pieces=call.in_pieces)
        call.found = [[] for _ in self.requests]

    def read(self) -> None:
        """Read the stream as the call says."""
        time.sleep(self._call.pause_s)
        for number, chunk in enumerate(self._limited(self.stream)):
            self._take(number, chunk)

    async def aread(self) -> None:
        """Read it in an event loop."""
        await asyncio.sleep(self._call.pause_s)
        if self._call.chunks == 0:
            return
        number = 0
        async for chunk in _closing(self.stream):
            self._take(number, chunk)
            number += 1
            if number == self._call.chunks:
                break

    def _limited(self, stream: ChunkStream) -> Iterator[Chunk]:
        chunks = iter(stream)
        left = self._call.chunks
        while left is None or left > 0:
            if (chunk := next(chunks, None)) is None:
                return
            yield chunk
            left = None if left is None else left - 1

    def _take(self, number: int, chunk: Chunk) -> None:
        self._call.found[chunk.row].append(chunk)

    def judge(self, *, has_failed: bool) -> Verdict:
        """Compare all that was read with the oracle's tokens, and with the text, logprobs and ends that follow.

        Args:
            has_failed: Whether the stream has ended with an error.
        """
        verdict = Verdict()
        oracle = self._model.oracles[self._call.options.get("adapter") or BASE_ADAPTER]
        for request, chunks in zip(self.requests, self._call.found, strict=True):
            ids = [i for chunk in chunks for i in chunk.token_ids]
            has_ended = bool(chunks) and chunks[-1].finish_reason is not None
            verdict.add(oracle.check(request, ids))
            if self._call.chunks is None and not has_ended and not has_failed:
                verdict.faults.append("the stream ended without a finish reason")
            text = "".join(chunk.text for chunk in chunks)
            if has_ended:
                verdict.faults += self._faults_of_end(request, ids, text, chunks[-1])
            logprobs = [token for chunk in chunks for token in chunk.logprobs]
            if request.options.logprobs is not None and len(logprobs) != len(ids):
                verdict.faults.append(f"{len(logprobs)} logprobs for {len(ids)} tokens")
        return verdict

    def _faults_of_end(self, request: Any, ids: list[int], text: str, last: Chunk) -> Iterator[str]:
        options = request.options
        ends = bool(ids) and ids[-1] in request.end_token_ids and not options.ignore_eos
        whole = self._tokenizer.decode([*request.prompt_ids, *(ids[:-1] if ends else ids)])
        whole = whole[len(self._tokenizer.decode(request.prompt_ids)) :]
        found = [whole.index(stop) for stop in options.stop if stop in whole]
        expected = whole[: min(found)] if found else whole
        if text != expected:
            yield f"the text is {text!r}, not {expected!r}"
        if last.finish_reason == "length" and len(ids) != request.max_new_tokens:
            yield f"it ended at {len(ids)} tokens of {request.max_new_tokens} by length"
        if last.finish_reason == "stop" and not (ends or found or request.mask):
            yield "it ended without a stop string or end token"
        if any(i in request.end_token_ids for i in (ids[:-1] if ends else ids)):
            yield "it went on after an end token"


@contextlib.asynccontextmanager
async def _closed(chunks: Any) -> AsyncIterator[Any]:
    try:
        yield chunks
    finally:
        await chunks.aclose()


async def _closing(stream: ChunkStream) -> AsyncIterator[Chunk]:
    """Iterate over a stream, and end the iteration at once when the reader leaves."""
    async with _closed(aiter(stream)) as chunks:
        async for chunk in chunks:
            yield chunk

"""Requests and the streams that answer them: what every engine takes and gives.

Owns the engine protocol, one row's request with its limits, the chunks that come back, and
the stream that carries them between threads and event loops. Knows no model, no tensor and
no tokenizer.
"""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from typing_extensions import Self

from langchain_quantllm.errors import GenerationError, GenerationTimeoutError, InvalidOptionError, PromptTooLongError
from langchain_quantllm.options import DEFAULT_MAX_NEW_TOKENS, GenerationOptions


@dataclass(frozen=True, kw_only=True)
class ModelLimits:
    """What a model can be asked for.

    Args:
        context_tokens: Most tokens of prompt and completion together; None where the model has no limit.
        vocab_size: Token ids lie below this.
        eos_token_ids: Tokens that end a text.
        pad_token_id: Fills the left of shorter prompts in a batch.
        cache_tokens: Most tokens that the engine's KV cache holds; None where it grows as it needs to.
    """

    context_tokens: int | None
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    cache_tokens: int | None = None


class TokenMask(Protocol):
    """Decides, token by token, what a row may write next: the hook for constrained decoding.

    Attributes:
        ended: Whether the text is complete, with no token that could say so; looked at after `fill`. The row ends then.
    """

    ended: bool

    def fill(self, bits: Any) -> bool:
        """Set a bit for each allowed token.

        Args:
            bits: A tensor on the CPU of shape `(1, ceil(vocab / 32))`, int32, all ones; the lowest bit of a word
                stands for its first token.

        Returns:
            False if every token is allowed, so that the bits need not be looked at.
        """
        ...

    def accept(self, token_id: int) -> None:
        """Take note of the token that was drawn."""
        ...


@dataclass(frozen=True, kw_only=True)
class Request:
    """One row of work: the ids of a prompt and all that decides its completion.

    Args:
        prompt_ids: Token ids, at least one.
        max_new_tokens: At least 1, and within the context together with the prompt.
        min_new_tokens: No end token before so many.
        options: The resolved options of the call.
        sample_index: Which of the call's `n` samples this is; each draws its own numbers.
        seed: Where the numbers start; always set, so that a result can be repeated.
        eos_token_ids: Tokens that end the text.
        stop_token_ids: Special tokens named as stop strings; they end the text as well.
        max_rows: Most rows to run beside each other; None leaves it to the engine.
        shares_prefix: Whether keys and values of a prompt's beginning are shared with other requests.
        mask: Makes what restricts the row's tokens; called once for each row.
        media: Tensors that the model is given beside the ids, such as the pixels of images, by the names of its
            forward's arguments. Only the pipeline engine takes any.
    """

    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    min_new_tokens: int
    options: GenerationOptions
    sample_index: int
    seed: int
    eos_token_ids: tuple[int, ...]
    stop_token_ids: tuple[int, ...] = ()
    max_rows: int | None = None
    shares_prefix: bool = True
    mask: Callable[[], TokenMask] | None = None
    media: Mapping[str, Any] | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, kw_only=True)
class TokenLogprob:
    """The log probability of one token, before temperature and the other sampling options.

    `top` lists the likeliest tokens with theirs, the best first, as `(token id, logprob)`.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Token counts and times of one finished row; times in seconds."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    queued_s: float
    first_token_s: float
    total_s: float


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """A piece of one row's answer. The last one has a finish reason and the usage.

    `row` is the request's place in its submission. `finish_reason` is `"stop"` or `"length"`.
    """

    row: int
    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: str | None = None
    usage: Usage | None = None


@dataclass(frozen=True, kw_only=True)
class EngineInfo:
    """Which engine runs a model, and why this one.

    Args:
        name: `"fast"` or `"pipeline"`.
        reason: Why this one, and what of it could not be used.
        graphs: Whether decode steps are CUDA graphs.
        kv_cache_tokens: Tokens that its KV cache holds; None where it grows as it needs to.
        kv_cache_bytes: The same in bytes.
        fused: How many modules run by this package's kernels, by kind; see docs/engine.md.
    """

    name: str
    reason: str
    graphs: bool = False
    kv_cache_tokens: int | None = None
    kv_cache_bytes: int | None = None
    fused: Mapping[str, int] = field(default_factory=dict)


class Engine(Protocol):
    """What runs requests. Any number of threads and event loops may submit at once."""

    @property
    def info(self) -> EngineInfo:
        """Which engine this is."""
        ...

    @property
    def limits(self) -> ModelLimits:
        """What its model can be asked for."""
        ...

    @property
    def peak_cache_tokens(self) -> int:
        """Most tokens, over all rows and their padding, that the KV cache has held at once."""
        ...

    def submit(
        self, requests: Sequence[Request], timeout_s: float | None = None, *, in_pieces: bool = True
    ) -> ChunkStream:
        """Queue rows and return the stream of their chunks; closing it cancels them.

        Args:
            requests: The rows, as `plan_requests` makes them.
            timeout_s: Seconds after which the stream raises.
            in_pieces: Give text as it comes; without, each row's last chunk may be its only one.
        """
        ...

    def close(self) -> None:
        """Cancel what runs and let go of the model."""
        ...


_REMEDIES = (
    "shorten it, or pass truncation='left' to drop its beginning",
    "give fewer or smaller images, or less text",
)
"""What to do about a prompt that is too long: a text, and one with images in it."""


def plan_requests(
    prompt_ids: Sequence[int],
    options: GenerationOptions,
    limits: ModelLimits,
    *,
    truncation_side: str = "left",
    stop_token_ids: Sequence[int] = (),
    max_rows: int | None = None,
    shares_prefix: bool = True,
    mask: Callable[[], TokenMask] | None = None,
    media: Mapping[str, Any] | None = None,
) -> list[Request]:
    """Fit a prompt into the model's context and make the `n` requests of a call.

    Args:
        prompt_ids: Token ids of the prompt.
        options: The resolved options.
        limits: What the model can be asked for.
        truncation_side: Which end `truncation=True` cuts, the tokenizer's declared one.
        stop_token_ids: Special tokens named as stop strings.
        max_rows: Most rows to run beside each other.
        shares_prefix: Whether the prompt's beginning may be shared.
        mask: Makes what restricts a row's tokens.
        media: What the model is given beside the ids.

    Returns:
        One request for each sample.

    Raises:
        InvalidOptionError: If the prompt is empty or holds ids that the model has not, or the
            lengths asked for leave no room.
        PromptTooLongError: If the prompt leaves no room for a token and is not to be truncated.
    """
    if not prompt_ids:
        msg = "the prompt is empty; give at least one character to continue."
        raise InvalidOptionError(msg)
    if outside := [i for i in prompt_ids if not 0 <= i < limits.vocab_size]:
        msg = f"token id {outside[0]} is not in the model's vocabulary of {limits.vocab_size}; is this its tokenizer?"
        raise InvalidOptionError(msg)
    eos_ids = limits.eos_token_ids if options.eos_token_id is None else options.eos_token_id
    if outside := [i for i in (options.eos_token_id or ()) if i >= limits.vocab_size]:
        msg = f"eos_token_id={outside[0]} is not in the model's vocabulary of {limits.vocab_size}."
        raise InvalidOptionError(msg)
    bounds = (limits.context_tokens, limits.cache_tokens, options.max_length)
    total = min((n for n in bounds if n is not None), default=None)
    ids = tuple(prompt_ids)
    if options.truncation and total is not None:
        # A length that nobody asked for takes half of the context at most.
        wanted = options.max_new_tokens or DEFAULT_MAX_NEW_TOKENS
        room = total - (wanted if options.asked_new_tokens else min(wanted, max(1, total // 2)))
        if room < 1:
            msg = (
                f"max_new_tokens={wanted} leaves no room for a prompt in the {total} tokens of "
                f"{_limit_name(options, limits)}; ask for fewer."
            )
            raise InvalidOptionError(msg)
        side = truncation_side if options.truncation is True else options.truncation
        if len(ids) > room and media is None:  # the tokens of an image cannot be cut
            ids = ids[-room:] if side == "left" else ids[:room]
    if total is not None and len(ids) >= total:
        msg = (
            f"the prompt has {len(ids)} tokens and {_limit_name(options, limits)} allows {total} with the completion; "
            f"{_REMEDIES[media is not None]}."
        )
        raise PromptTooLongError(msg)
    if options.asked_new_tokens and limits.cache_tokens is not None and limits.cache_tokens == total:
        tokens = len(ids) + (options.max_new_tokens or 0)
        if tokens > total:
            msg = (
                f"the prompt's {len(ids)} tokens and max_new_tokens={options.max_new_tokens} need {tokens} in the KV "
                f"cache, which holds {total}; raise kv_cache_memory, or ask for fewer."
            )
            raise PromptTooLongError(msg)
    new = [n for n in (options.max_new_tokens, None if total is None else total - len(ids)) if n is not None]
    max_new_tokens = min(new) if new else options.max_new_tokens or 1
    seed = secrets.randbits(63) if options.seed is None else options.seed
    first = Request(
        prompt_ids=ids,
        max_new_tokens=max_new_tokens,
        min_new_tokens=min(max(options.min_new_tokens, options.min_length - len(ids)), max_new_tokens),
        options=options,
        sample_index=0,
        seed=seed,
        eos_token_ids=eos_ids,
        stop_token_ids=tuple(stop_token_ids),
        max_rows=max_rows,
        shares_prefix=shares_prefix,
        mask=mask,
        media=media,
    )
    return [first, *(replace(first, sample_index=i) for i in range(1, options.n))]


def _limit_name(options: GenerationOptions, limits: ModelLimits) -> str:
    names = {
        "the model's context": limits.context_tokens,
        "the KV cache (see kv_cache_memory)": limits.cache_tokens,
        f"max_length={options.max_length}": options.max_length,
    }
    return min((n for n in names if names[n] is not None), key=lambda n: names[n] or 0)


class ChunkStream:
    """The chunks of one submission, made in an engine's thread and read in any other.

    Iterate over it with `for` or `async for`; it ends after the last row's last chunk. An
    error of any row is raised at once. Closing the stream, or leaving its `with` block, tells
    the engine to stop the rows at their next token.
    """

    def __init__(self, rows: int, timeout_s: float | None = None) -> None:
        """Open a stream for a number of rows, which must end within `timeout_s` seconds."""
        self._open_rows = rows
        self._timeout_s = timeout_s
        self._deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self._items: deque[Chunk | BaseException] = deque()
        self._changed = threading.Condition()
        self._waiter: tuple[asyncio.AbstractEventLoop, asyncio.Future[None]] | None = None
        self.cancelled = False
        """Whether nobody waits for more. Engines read it before each token."""

    # The engine's side.

    def put(self, chunk: Chunk) -> None:
        """Hand a chunk to whoever reads the stream."""
        self._append(chunk)

    def fail(self, error: BaseException) -> None:
        """End the stream with an error, which the reader gets raised."""
        self._append(error)

    def _append(self, item: Chunk | BaseException) -> None:
        with self._changed:
            self._items.append(item)
            waiter, self._waiter = self._waiter, None
            self._changed.notify_all()
        self._wake(waiter)

    def _wake(self, waiter: tuple[asyncio.AbstractEventLoop, asyncio.Future[None]] | None) -> None:
        if waiter is None:
            return
        loop, future = waiter
        try:
            loop.call_soon_threadsafe(_set_done, future)
        except RuntimeError:  # the loop was closed over its reader: nobody waits any more
            self.cancelled = True

    # The reader's side.

    def __iter__(self) -> Iterator[Chunk]:
        """Give the chunks as they come, blocking in between."""
        while self._open_rows:
            with self._changed:
                while not self._items:
                    self._check_open()
                    # A bounded wait, so that Ctrl-C gets through on every platform.
                    self._changed.wait(min(self._remaining_s(), 1.0))
                item = self._items.popleft()
            yield self._deliver(item)

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        """Give the chunks as they come, leaving the event loop free in between."""
        while self._open_rows:
            loop = asyncio.get_running_loop()
            with self._changed:
                item = self._items.popleft() if self._items else None
                if item is None:
                    self._check_open()
                    future: asyncio.Future[None] = loop.create_future()
                    self._waiter = (loop, future)
            if item is None:
                await asyncio.wait([future], timeout=None if self._deadline is None else self._remaining_s())
                if not future.done():
                    self._remaining_s()
                continue
            yield self._deliver(item)

    def _remaining_s(self) -> float:
        if self._deadline is None:
            return float("inf")
        remaining = self._deadline - time.monotonic()
        if remaining <= 0:
            self.close()
            msg = (
                f"the model did not finish within timeout={self._timeout_s:g} seconds; raise it or ask for fewer "
                "tokens."
            )
            raise GenerationTimeoutError(msg)
        return remaining

    def _deliver(self, item: Chunk | BaseException) -> Chunk:
        if isinstance(item, BaseException):
            self._open_rows = 0
            self.close()
            raise item
        if item.finish_reason is not None:
            self._open_rows -= 1
        elif self._deadline is not None:
            self._remaining_s()
        return item

    def _check_open(self) -> None:
        if self.cancelled:
            msg = "the request was cancelled."
            raise GenerationError(msg)

    def close(self) -> None:
        """Tell the engine that nobody reads on; a reader in another thread gets an error."""
        with self._changed:
            self.cancelled = True
            waiter, self._waiter = self._waiter, None
            self._changed.notify_all()
        self._wake(waiter)

    def __enter__(self) -> Self:
        """Use the stream as a `with` block that closes it."""
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Close the stream."""
        self.close()


def _set_done(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)

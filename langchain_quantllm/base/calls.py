"""Calls: the plan of one, the errors that LangChain gets, and batches of calls that end together."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from langchain_core.exceptions import ContextOverflowError, ModelTimeoutError
from langchain_core.runnables.config import ContextThreadPoolExecutor

from langchain_quantllm.engine.request import ChunkStream, Engine, Request
from langchain_quantllm.errors import GenerationTimeoutError, PromptTooLongError
from langchain_quantllm.options import GenerationOptions

_streams: ContextVar[list[ChunkStream] | None] = ContextVar("quantllm_streams", default=None)
"""The streams of the batch in progress."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One call, ready to run.

    Args:
        options: The resolved options.
        engine: The engine that runs it.
        tokenizer: The model's tokenizer.
        requests: Its requests, one for each completion.
    """

    options: GenerationOptions
    engine: Engine
    tokenizer: Any
    requests: Sequence[Request]

    def submit(self, *, in_pieces: bool = True) -> ChunkStream:
        """Submit the requests; see `Engine.submit`."""
        stream = self.engine.submit(self.requests, self.options.timeout, in_pieces=in_pieces)
        if (streams := _streams.get()) is not None:
            streams.append(stream)
        return stream


def run_together(call: Callable[..., Any], *inputs: Sequence[Any], workers: int) -> list[Any]:
    """Call a function for each input in threads; Ctrl-C cancels all calls.

    Args:
        call: The function; it catches its own errors.
        *inputs: Its arguments, a sequence for each.
        workers: Maximum number of calls at once.

    Returns:
        The results in the order of the inputs.
    """
    streams: list[ChunkStream] = []
    with setting(_streams, streams), ContextThreadPoolExecutor(max_workers=workers) as executor:
        try:
            return list(executor.map(call, *inputs))
        except BaseException:  # Ctrl-C: otherwise the threads run on to the end of their texts
            executor.shutdown(wait=False, cancel_futures=True)
            for stream in streams:
                stream.close()
            raise


@contextlib.contextmanager
def setting(variable: ContextVar[Any], value: Any) -> Iterator[None]:
    """Set a context variable inside a block."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


class PromptOverflowError(PromptTooLongError, ContextOverflowError):
    """The prompt leaves no room for a new token; LangChain's `ContextOverflowError`."""


class RequestTimeoutError(GenerationTimeoutError, ModelTimeoutError):
    """A call did not end within its `timeout`; LangChain's `ModelTimeoutError`."""


@contextlib.contextmanager
def langchain_errors() -> Iterator[None]:
    """Raise an error of this package as LangChain's too, if LangChain has one for the case."""
    try:
        yield
    except PromptTooLongError as error:
        raise PromptOverflowError(str(error)) from error
    except GenerationTimeoutError as error:
        raise RequestTimeoutError(str(error)) from error

"""Batches as concurrent calls, which end together if the batch is interrupted."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

from langchain_core.runnables.config import ContextThreadPoolExecutor

from langchain_quantllm.base.model import STREAMS
from langchain_quantllm.engine.stream import ChunkStream


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
    with setting(STREAMS, streams), ContextThreadPoolExecutor(max_workers=workers) as executor:
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

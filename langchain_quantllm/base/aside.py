"""The work of a call beside the event loop, which must not stand still while a prompt is tokenized or a model loaded.

Owns the threads for it. They are not those of the loop's default executor: these may all be taken by functions that
wait for a call to end.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Any, TypeVar

from langchain_core.runnables.config import run_in_executor

from langchain_quantllm.base.model import PreparedCall
from langchain_quantllm.engine.stream import Chunk, ChunkStream
from langchain_quantllm.errors import GenerationError

T = TypeVar("T")
P = TypeVar("P", bound=PreparedCall)

MOST_THREADS = 32
_FEW_LOGPROBS = 16


class _Threads:
    """The threads, each started when it is needed."""

    def __init__(self) -> None:
        self.renew()

    def renew(self) -> None:
        """Begin without threads: those of a process that was forked did not come along."""
        self.executor = ThreadPoolExecutor(MOST_THREADS, thread_name_prefix="quantllm-call")


_threads = _Threads()
if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_threads.renew)


async def run_aside(call: Callable[..., T], *args: Any) -> T:
    """Call a function in another thread, with the context variables of this task."""
    return await run_in_executor(_threads.executor, copy_context().run, call, *args)


async def read_aside(read: Callable[[Chunk], T], chunk: Chunk) -> T:
    """Read a chunk, in another thread if that may take long: the last one ends tool calls, logprobs are decoded."""
    if chunk.finish_reason is None and len(chunk.logprobs) <= _FEW_LOGPROBS:
        return read(chunk)
    return await run_aside(read, chunk)


async def submit_aside(plan: Callable[..., P], *call: Any, in_pieces: bool = True) -> tuple[P, ChunkStream]:
    """Plan a call and submit its requests in another thread.

    A task that is cancelled meanwhile leaves no request behind.

    Args:
        plan: Makes the plan: it loads the weights, fetches images, renders templates, tokenizes.
        *call: Its arguments.
        in_pieces: As for `Engine.submit`.

    Returns:
        The plan and the stream of its chunks.
    """
    opened: list[ChunkStream] = []
    is_cancelled = False

    def run() -> P:
        prepared = plan(*call)
        if is_cancelled:
            msg = "the request was cancelled."
            raise GenerationError(msg)
        opened.append(prepared.submit(in_pieces=in_pieces))
        if is_cancelled:
            opened[0].close()
        return prepared

    try:
        return await run_aside(run), opened[0]
    except BaseException:  # of the plan, or the end of the task
        is_cancelled = True
        for stream in opened:
            stream.close()
        raise

"""Calls of an encoder from an event loop, which goes on while weights load and batches are computed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from langchain_quantllm.base.aside import run_aside
from langchain_quantllm.encoders.work import Work


async def work_aside(submit: Callable[..., Work], *call: Any) -> list[Any]:
    """Submit a call in another thread, and wait for its results.

    A task that is cancelled meanwhile cancels the call: what of it has not begun is dropped.

    Args:
        submit: Submits the call; it may load the weights first.
        *call: Its arguments.

    Returns:
        The results, in the order of the items.
    """
    submitted: list[Work] = []
    is_cancelled = False

    def run() -> None:
        if not is_cancelled:
            submitted.append(submit(*call))
        if is_cancelled and submitted:
            submitted[0].cancel()

    try:
        await run_aside(run)
        future: asyncio.Future[list[Any]] = asyncio.wrap_future(submitted[0].future)
        return await future
    except BaseException:  # of the call, or the end of the task
        is_cancelled = True
        for work in submitted:
            work.cancel()
        raise

"""The process that models are loaded in: one that is forked off it can use none.

Threads and devices do not come along, a lock may be held by a thread that is not there, and PyTorch waits for its own
threads at the first large product. So a call in such a process raises before it takes a lock.
"""

from __future__ import annotations

import os

from langchain_quantllm.errors import UnsupportedError

_loading_process_id: int | None = None


def check_process() -> None:
    """Check that this process was not forked off one with models, loaded or loading; takes no lock.

    Raises:
        UnsupportedError: If it was.
    """
    if is_forked():
        msg = (
            "this model was loaded before the process was forked, and its threads and device did not come along; "
            "fork before the first model is loaded, or start children with multiprocessing's 'spawn'."
        )
        raise UnsupportedError(msg)


def is_forked() -> bool:
    """Whether this process was forked off one with models."""
    return _loading_process_id not in (None, os.getpid())


def note_loading() -> None:
    """Note this process as the one that models are loaded in; call it before the first lock.

    Raises:
        UnsupportedError: If it was forked off one with models.
    """
    global _loading_process_id
    check_process()
    _loading_process_id = os.getpid()

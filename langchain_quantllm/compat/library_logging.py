"""Loggers and progress bars of other libraries: quiet inside a block, and restored after it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_logger(name: str, level: int = logging.ERROR) -> Iterator[None]:
    """Drop a logger's messages below a level inside the block."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextlib.contextmanager
def dropped_messages(name: str, beginning: str) -> Iterator[None]:
    """Drop a logger's messages that begin with a text inside the block; blocks of several threads may overlap."""

    def keep(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(beginning)

    logger = logging.getLogger(name)
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


@contextlib.contextmanager
def without_torchao() -> Iterator[None]:
    """Drop the warnings of torchao about its own build; transformers imports it wherever it is installed."""
    with quiet_logger("torchao"), quiet_logger("torch.utils._pytree"):
        yield


@contextlib.contextmanager
def progress_bars(shown: bool) -> Iterator[None]:
    """Hide the progress bars of transformers and the Hub inside the block, unless `shown`."""
    if shown:
        yield
        return
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging as transformers_logging

    model_bars, hub_bars = transformers_logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    transformers_logging.disable_progress_bar()
    disable_progress_bars()
    try:
        yield
    finally:
        if model_bars:
            transformers_logging.enable_progress_bar()  # enables the Hub's bars, too
        (enable_progress_bars if hub_bars else disable_progress_bars)()

"""What other libraries say and ask while a model is loaded, kept to what helps the user.

Owns loggers and progress bars of third parties, and puts each back as it was. Knows no model.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_logger(name: str, level: int = logging.ERROR) -> Iterator[None]:
    """Keep a logger's messages below a level quiet inside the block."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextlib.contextmanager
def without_torchao() -> Iterator[None]:
    """Keep quiet what torchao, which transformers imports wherever it is installed, says of its own build."""
    with quiet_logger("torchao"), quiet_logger("torch.utils._pytree"):
        yield


@contextlib.contextmanager
def progress_bars(shown: bool) -> Iterator[None]:
    """Keep transformers' and the Hub's progress bars quiet inside the block unless shown."""
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
            transformers_logging.enable_progress_bar()
        if hub_bars:
            enable_progress_bars()

"""What other libraries say and ask while a model is loaded, kept to what helps the user.

Owns loggers, progress bars and imports of third parties, and puts each back as it was. Knows
no model.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import sys
import threading
from collections.abc import Iterator

_import_lock = threading.Lock()


def import_quietly() -> None:
    """Import transformers and bitsandbytes without anything going to the network.

    On some CPUs bitsandbytes asks the Hub for a kernel while it is imported, if the package
    `kernels` is installed. Source: bitsandbytes/backends/cpu/ops.py.
    """
    with _import_lock:
        if "bitsandbytes" in sys.modules or importlib.util.find_spec("bitsandbytes") is None:
            return
        before = sys.modules.get("kernels")
        sys.modules["kernels"] = None  # type: ignore[assignment]  # makes `import kernels` fail
        try:
            with quiet_logger("bitsandbytes.backends.cpu.ops"):
                import bitsandbytes  # noqa: F401
        except (ImportError, OSError, RuntimeError):  # a broken install: transformers says what is wrong, when needed
            pass
        finally:
            del sys.modules["kernels"]
            if before is not None:
                sys.modules["kernels"] = before


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


def hush_casts() -> None:
    """Keep bitsandbytes from saying at every int8 product that it casts bfloat16 to float16.

    Source: MatMul8bitLt in bitsandbytes/autograd/_functions.py.
    """
    logger = logging.getLogger("bitsandbytes.autograd._functions")
    if _not_about_casts not in logger.filters:
        logger.addFilter(_not_about_casts)


def _not_about_casts(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("MatMul8bitLt: inputs will be cast")


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

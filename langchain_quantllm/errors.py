"""The errors of the package, and the help they give.

Owns the exception types and the search for the nearest known name. Knows no other
module of the package, so that each of them can raise these.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class QuantLLMError(Exception):
    """Base of every error that this package raises on its own account."""


class InvalidOptionError(QuantLLMError, ValueError):
    """An option has an unknown name or a value that is not allowed."""


class ModelNotFoundError(QuantLLMError, OSError):
    """No model can be read under the given id or folder."""


class CheckpointError(QuantLLMError, ValueError):
    """The checkpoint is there, but it cannot be loaded as asked."""


class MissingPackageError(QuantLLMError, ImportError):
    """A package that the request needs is not installed, or too old."""


class UnsupportedError(QuantLLMError, RuntimeError):
    """This machine, model or engine cannot do what was asked."""


class NotEnoughMemoryError(QuantLLMError, MemoryError):
    """The model, or a request, does not fit into the memory at hand."""


class PromptTooLongError(QuantLLMError, ValueError):
    """The prompt leaves no room for a single new token."""


class GenerationError(QuantLLMError, RuntimeError):
    """The model failed while generating; the cause is chained to this error."""


class GenerationTimeoutError(QuantLLMError, TimeoutError):
    """A request did not end within its `timeout`."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Say which known name is meant, as the end of an error sentence.

    Args:
        name: The unknown name.
        known: The names that are allowed.

    Returns:
        `; did you mean 'X'?`, or the whole list where nothing is near.
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    close = close or [n for n in names if len(name) > 2 and n.startswith(name)]
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; allowed are {', '.join(names)}."


def pip_install(*packages: str) -> str:
    """Give the command that installs packages, ready to paste."""
    return "pip install " + " ".join(f'"{p}"' if set(p) & set("[<>=") else p for p in packages)

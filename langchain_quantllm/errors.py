"""The errors of the package, and the search for the nearest known name.

Imports no other module of the package, so that every module can raise these errors.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from typing_extensions import Self


class QuantLLMError(Exception):
    """Base of all errors of this package."""


class InvalidOptionError(QuantLLMError, ValueError):
    """An option has an unknown name or a value that is not allowed."""


class ModelNotFoundError(QuantLLMError, OSError):
    """There is no model of this id or in this folder, or it cannot be reached."""


class CheckpointError(QuantLLMError, ValueError):
    """The checkpoint exists, but cannot be loaded as asked."""


class MissingPackageError(QuantLLMError, ImportError):
    """A package is not installed, or too old."""


class UnsupportedError(QuantLLMError, RuntimeError):
    """This machine, model or engine does not support the request."""


class OutputError(QuantLLMError, OSError):
    """A checkpoint cannot be written: the disk is full, its place is not writable, or another run writes there."""


class NotEnoughMemoryError(QuantLLMError, MemoryError):
    """The model or a request does not fit into the free memory."""


class PromptTooLongError(QuantLLMError, ValueError):
    """The prompt leaves no room for a new token."""


class GenerationError(QuantLLMError, RuntimeError):
    """The model failed while generating; the error's cause says how."""


class EncodingError(QuantLLMError, RuntimeError):
    """An encoder failed while it computed vectors or scores; the error's cause says how."""


class QueueFullError(GenerationError):
    """Too many requests wait for the model already; see `max_waiting`."""


class ServerError(GenerationError):
    """A server that runs the model cannot be reached, or has answered with an error of its own."""


class GenerationTimeoutError(QuantLLMError, TimeoutError):
    """A call did not end within its `timeout`."""


class NamedOptions:
    """Base of dataclasses whose error for an unknown option names the nearest known one."""

    _MEANT: ClassVar[Mapping[str, str]] = {}
    """Other libraries' names for options of the class."""

    def __new__(cls, *args: Any, **options: Any) -> Self:
        """Check the names of the options.

        Raises:
            InvalidOptionError: If a name is unknown.
        """
        known = [f.name for f in dataclasses.fields(cls) if f.init]  # type: ignore[arg-type]
        for name, value in options.items():
            if name not in known:
                meant = cls._MEANT.get(name)
                hint = f"; write {meant}=" if meant in known else nearest(name, known)
                msg = f"{cls.__name__}({name}={value!r}) is not possible: it has no option {name!r}{hint}"
                raise InvalidOptionError(msg)
        return super().__new__(cls)


def closest(name: str, known: Iterable[str], cutoff: float | None = None) -> str | None:
    """Find the known name that is most similar to a wrong one; None if none is similar. Case and dashes do not count.

    Args:
        name: The unknown name.
        known: The names that are allowed.
        cutoff: Minimum similarity, from 0 to 1; None is 0.6 for fewer than 20 names, else 0.7.
    """
    names = {_folded(n): n for n in sorted(known, reverse=True)}
    cutoff = cutoff or (0.6 if len(names) < 20 else 0.7)
    close = difflib.get_close_matches(_folded(name), names, n=1, cutoff=cutoff)
    close = close or [n for n in sorted(names) if len(name) > 2 and n.startswith(_folded(name))]
    return names[close[0]] if close else None


def _folded(name: str) -> str:
    return re.sub(r"[\s-]", "_", name.lower())


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the end of an error sentence: the known name that is probably meant.

    Args:
        name: The unknown name.
        known: The names that are allowed.

    Returns:
        `; did you mean 'X'?`, or the list of all names if none is similar.
    """
    names = sorted(known)
    if (meant := closest(name, names)) is not None:
        return f"; did you mean {meant!r}?"
    return f"; allowed are {', '.join(names)}." if names else "; it takes none."


def pip_install(*packages: str) -> str:
    """Return the command that installs packages."""
    return "pip install " + " ".join(f'"{p}"' if set(p) & set("[<>=") else p for p in packages)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, without its full stop; its type where it has no message."""
    return (str(error).strip() or type(error).__name__).partition("\n")[0].rstrip(". ")

"""The errors of the package, and the help they give.

Owns the exception types and the search for the nearest known name. Knows no other
module of the package, so that each of them can raise these.
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


class NamedOptions:
    """Base of value classes: an option that a class does not have names the nearest one that it has."""

    _MEANT: ClassVar[Mapping[str, str]] = {}
    """Names of other libraries for options of the class."""

    def __new__(cls, *args: Any, **options: Any) -> Self:
        """Check the names of the options.

        Raises:
            InvalidOptionError: If there is no such option.
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
    """Find the known name that a wrong one is most like, whatever its case and its dashes; None if it is like none.

    Args:
        name: The unknown name.
        known: The names that are allowed.
        cutoff: Least likeness, from 0 to 1; None is 0.6 among few names and 0.7 among many.
    """
    names = {_folded(n): n for n in sorted(known, reverse=True)}
    cutoff = cutoff or (0.6 if len(names) < 20 else 0.7)
    close = difflib.get_close_matches(_folded(name), names, n=1, cutoff=cutoff)
    close = close or [n for n in sorted(names) if len(name) > 2 and n.startswith(_folded(name))]
    return names[close[0]] if close else None


def _folded(name: str) -> str:
    return re.sub(r"[\s-]", "_", name.lower())


def nearest(name: str, known: Iterable[str]) -> str:
    """Say which known name is meant, as the end of an error sentence.

    Args:
        name: The unknown name.
        known: The names that are allowed.

    Returns:
        `; did you mean 'X'?`, or the whole list where nothing is near.
    """
    names = sorted(known)
    if (meant := closest(name, names)) is not None:
        return f"; did you mean {meant!r}?"
    return f"; allowed are {', '.join(names)}." if names else "; it takes none."


def pip_install(*packages: str) -> str:
    """Give the command that installs packages, ready to paste."""
    return "pip install " + " ".join(f'"{p}"' if set(p) & set("[<>=") else p for p in packages)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, without its full stop; its type where it has no message."""
    return (str(error).strip() or type(error).__name__).partition("\n")[0].rstrip(". ")

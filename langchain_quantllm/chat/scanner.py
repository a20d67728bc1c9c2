"""A scanner over text that is still being written: each step waits until the text that it needs has come.

Owns the text read so far, the waiting, and the search for the end of a JSON value or a Python bracket. Knows no format
of calls. Steps are generators that `yield` where they need more text.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Collection, Generator
from typing import NamedTuple, TypeAlias, TypeVar

T = TypeVar("T")
Wait: TypeAlias = Generator[None, None, T]
"""A step that returns a `T` when enough text has come."""

CUT_OFF = "it is cut off"
NOT_JSON = "it is not valid JSON"

_SPACE = " \t\r\n"
_SCALAR_END = re.compile(r"[^\w+\-.]")
_WORD_END = re.compile(r"[^\w.\-]")
_CLOSER = {"{": "}", "[": "]", "(": ")"}


class _Notation(NamedTuple):
    """How a language writes values: where to stop outside strings, its brackets, and where to stop in its strings."""

    stops: re.Pattern[str]
    openers: str
    strings: dict[str, re.Pattern[str]]
    mismatch: str


_JSON = _Notation(
    # Outside strings, all but numbers, the letters of true, false, null, NaN and Infinity, and what may stand between
    # them: a tag ends a value that is open.
    re.compile(r"[^\s\d+\-.,:aeflnrstuEINiy]"),
    "{[",
    {'"': re.compile(r'["\\\x00-\x1f]')},
    NOT_JSON,
)
_PYTHON = _Notation(
    re.compile(r"[()\[\]{}'\"<]"),  # the begin of a tag is in no literal
    "{[(",
    {quote: re.compile(rf"[\\{quote}]") for quote in "'\""},
    "its brackets do not match",
)


def prefixes(texts: Collection[str]) -> frozenset[str]:
    """List all beginnings of the texts that are shorter than the texts."""
    return frozenset(text[:n] for text in texts for n in range(1, len(text)))


def held(text: str, begun: frozenset[str]) -> int:
    """Return the length of the longest end of a text that is one of the beginnings."""
    return next((n for n in range(min(len(text), max(map(len, begun), default=0)), 0, -1) if text[-n:] in begun), 0)


@functools.lru_cache(maxsize=64)
def _any_of(marks: tuple[str, ...]) -> re.Pattern[str]:
    """Compile a search that ends at the first mark; one for each mark would go to the end of the text each time."""
    return re.compile("|".join(map(re.escape, marks)) or "(?!)")


def _ignore() -> None:
    """Take no notice of progress."""


class Scanner:
    """A text that grows, and a place in it."""

    def __init__(self) -> None:
        """Begin with no text."""
        self.text = ""
        self.at = 0
        self.ended = False

    def add(self, text: str) -> None:
        """Append text."""
        whole, self.text = self.text, ""
        whole += text  # the only reference: CPython appends in place, and does not copy all text at each token
        self.text = whole

    def forget(self) -> None:
        """Drop the text before the place; other places in the text lose their meaning."""
        self.text, self.at = self.text[self.at :], 0

    def more(self) -> Wait[bool]:
        """Wait for more text or the end; False at the end."""
        if self.ended:
            return False
        yield
        return True

    def peek(self) -> Wait[str]:
        """Return the next character; empty at the end."""
        while self.at >= len(self.text):
            if not (yield from self.more()):
                return ""
        return self.text[self.at]

    def skip(self, characters: str = _SPACE) -> Wait[str]:
        """Go past all of these characters and return the next one."""
        while (found := (yield from self.peek())) and found in characters:
            self.at += 1
        return found

    def take(self, *options: str) -> Wait[str]:
        """Go past the longest option that the text continues with, and return it; empty where there is none."""
        longest = max(map(len, options), default=0)
        while True:
            rest = self.text[self.at : self.at + longest]
            found = max((option for option in options if rest.startswith(option)), key=len, default="")
            if not any(len(option) > len(rest) and option.startswith(rest) for option in options):
                break
            if not (yield from self.more()):
                break
        self.at += len(found)
        return found

    def starts(self, *options: str) -> Wait[bool]:
        """Tell whether the text continues with one of the options, and stay before it."""
        start = self.at
        found = yield from self.take(*options)
        self.at = start
        return bool(found)

    def until(self, *marks: str) -> Wait[bool]:
        """Go to the first of the marks; to the end where there is none."""
        longest = max(map(len, marks), default=1)
        pattern = _any_of(marks)
        while True:
            if found := pattern.search(self.text, self.at):
                self.at = found.start()
                return True
            start, self.at = self.at, len(self.text)
            if not (yield from self.more()):
                return False
            self.at = max(start, self.at - longest + 1)

    def word(self) -> Wait[str]:
        """Go past letters, digits, underscores, dots and dashes, and return them."""
        start = self.at
        yield from self._past(_WORD_END)
        return self.text[start : self.at]

    def value(self, seen: Callable[[], None] = _ignore) -> Wait[str]:
        """Go past a JSON value, as far as brackets and quotes tell.

        Args:
            seen: Called before each wait, when all text up to the place belongs to the value.

        Returns:
            The error of a value that is broken; else empty.
        """
        first = yield from self.peek()
        if not first:
            return CUT_OFF
        if first == '"':
            return (yield from self._string(_JSON.strings[first], first, seen))
        if first in "{[":
            return (yield from self._brackets(_JSON, seen))
        start = self.at
        yield from self._past(_SCALAR_END)
        if self.at == start:
            return NOT_JSON
        return CUT_OFF if self.at == len(self.text) else ""

    def python_call(self) -> Wait[str]:
        """Go past a Python bracket and the code in it; returns the error of one that is broken, else empty."""
        return (yield from self._brackets(_PYTHON, _ignore))

    def _past(self, pattern: re.Pattern[str], seen: Callable[[], None] = _ignore) -> Wait[str]:
        """Go to the first character of the pattern and return it; to the end, and empty, where there is none."""
        while True:
            if found := pattern.search(self.text, self.at):
                self.at = found.start()
                return found.group()
            self.at = len(self.text)
            seen()
            if not (yield from self.more()):
                return ""

    def _brackets(self, notation: _Notation, seen: Callable[[], None]) -> Wait[str]:
        """Go past a bracket and all that it encloses."""
        closers: list[str] = []
        while found := (yield from self._past(notation.stops, seen)):
            if inside := notation.strings.get(found):
                if error := (yield from self._string(inside, found, seen)):
                    return error
                continue
            if found in notation.openers:
                closers.append(_CLOSER[found])
            elif found != closers.pop():
                return notation.mismatch
            self.at += 1
            if not closers:
                return ""
        return CUT_OFF

    def _string(self, stops: re.Pattern[str], quote: str, seen: Callable[[], None]) -> Wait[str]:
        """Go past a string that begins here; a control character ends JSON's with an error."""
        self.at += 1
        while (found := (yield from self._past(stops, seen))) in (quote, "\\"):
            if found == "\\":
                while self.at + 1 == len(self.text):  # the escaped character is still to come
                    seen()
                    if not (yield from self.more()):
                        self.at = len(self.text)
                        return CUT_OFF
                self.at += 1
            self.at += 1
            if found == quote:
                return ""
        return NOT_JSON if found else CUT_OFF

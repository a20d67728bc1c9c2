"""Walking along a text that is still being written: each step waits until what it needs has come.

Owns the text read so far, the waiting, and the search for the end of a JSON value. Knows no format of calls.
The steps are generators, which `yield` where they need more text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Generator
from typing import TypeAlias, TypeVar

T = TypeVar("T")
Wait: TypeAlias = Generator[None, None, T]
"""A step that gives a `T` when enough text has come."""

CUT_OFF = "it is cut off"
NOT_JSON = "it is not valid JSON"

_SPACE = " \t\r\n"
# Outside strings JSON has these and no others, so a closing tag ends a value that was never closed.
_NOT_PLAIN = re.compile(r"[^\s\w+\-.,:]")
_IN_STRING = re.compile(r'["\\\x00-\x1f]')
_SCALAR_END = re.compile(r"[^\w+\-.]")
_WORD_END = re.compile(r"[^\w.\-]")
_PYTHON = re.compile(r"[()\[\]{}'\"]")
_CLOSER = {"{": "}", "[": "]", "(": ")"}


def prefixes(texts: Collection[str]) -> frozenset[str]:
    """Collect all beginnings of the texts, short of the texts themselves."""
    return frozenset(text[:n] for text in texts for n in range(1, len(text)))


def held(text: str, begun: frozenset[str]) -> int:
    """Length of the longest end of a text that is one of the beginnings."""
    return next((n for n in range(min(len(text), max(map(len, begun), default=0)), 0, -1) if text[-n:] in begun), 0)


def _ignore() -> None:
    """Take no notice of progress."""


class Scanner:
    """A text that grows, and a place in it."""

    def __init__(self) -> None:
        """Begin with no text."""
        self.text = ""
        self.at = 0
        self.ended = False

    def forget(self) -> None:
        """Drop what lies before the place; other places in the text lose their meaning."""
        self.text, self.at = self.text[self.at :], 0

    def more(self) -> Wait[bool]:
        """Wait for more text or the end; tell whether there was anything to wait for."""
        if self.ended:
            return False
        yield
        return True

    def peek(self) -> Wait[str]:
        """Look at the next character; empty at the end."""
        while self.at >= len(self.text):
            if not (yield from self.more()):
                return ""
        return self.text[self.at]

    def skip(self, characters: str = _SPACE) -> Wait[str]:
        """Go past all of these characters and look at the next one."""
        while (found := (yield from self.peek())) and found in characters:
            self.at += 1
        return found

    def take(self, *options: str) -> Wait[str]:
        """Go past the longest of the options that the text goes on with; empty where it is none."""
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

    def until(self, *marks: str) -> Wait[bool]:
        """Go to the first of the marks; to the end where there is none."""
        longest = max(map(len, marks), default=1)
        while True:
            if found := [place for mark in marks if (place := self.text.find(mark, self.at)) >= 0]:
                self.at = min(found)
                return True
            start, self.at = self.at, len(self.text)
            if not (yield from self.more()):
                return False
            self.at = max(start, self.at - longest + 1)

    def word(self) -> Wait[str]:
        """Go past letters, digits, underscores, dots and dashes, and give them."""
        start = self.at
        yield from self._past(_WORD_END)
        return self.text[start : self.at]

    def value(self, seen: Callable[[], None] = _ignore) -> Wait[str]:
        """Go past a JSON value, as far as brackets and quotes tell, and give what is wrong with it, if anything.

        Args:
            seen: Called before each wait, when all up to the place belongs to the value.
        """
        first = yield from self.peek()
        if not first:
            return CUT_OFF
        if first == '"':
            return (yield from self._string(seen))
        if first in "{[":
            return (yield from self._nested(seen))
        start = self.at
        yield from self._past(_SCALAR_END)
        if self.at == start:
            return NOT_JSON
        return CUT_OFF if self.at == len(self.text) else ""

    def python_call(self) -> Wait[str]:
        """Go past a bracket of Python's and what it encloses, and give what is wrong with it, if anything."""
        closers: list[str] = []
        while True:
            yield from self._past(_PYTHON)
            if not (found := self.text[self.at : self.at + 1]):
                return CUT_OFF
            self.at += 1
            if found in "'\"":
                if not (yield from self._python_string(found)):
                    return CUT_OFF
            elif found in _CLOSER:
                closers.append(_CLOSER[found])
            elif found != closers.pop():
                return "its brackets do not match"
            if not closers:
                return ""

    def _past(self, pattern: re.Pattern[str]) -> Wait[None]:
        """Go to the first character of the pattern, or to the end."""
        while True:
            if found := pattern.search(self.text, self.at):
                self.at = found.start()
                return
            self.at = len(self.text)
            if not (yield from self.more()):
                return

    def _nested(self, seen: Callable[[], None]) -> Wait[str]:
        closers: list[str] = []
        while True:
            found = _NOT_PLAIN.search(self.text, self.at)
            if found is None:
                self.at = len(self.text)
                seen()
                if not (yield from self.more()):
                    return CUT_OFF
                continue
            self.at, character = found.start(), found.group()
            if character == '"':
                if error := (yield from self._string(seen)):
                    return error
                continue
            if character in "{[":
                closers.append(_CLOSER[character])
            elif character != closers.pop():
                return NOT_JSON
            self.at += 1
            if not closers:
                return ""

    def _string(self, seen: Callable[[], None]) -> Wait[str]:
        self.at += 1
        while True:
            found = _IN_STRING.search(self.text, self.at)
            self.at = found.start() if found else len(self.text)
            if found and found.group() == '"':
                self.at += 1
                return ""
            if found and found.group() != "\\":
                return NOT_JSON  # a control character, such as a line's end
            if found and self.at + 1 < len(self.text):
                self.at += 2
                continue
            seen()
            if not (yield from self.more()):
                self.at = len(self.text)
                return CUT_OFF

    def _python_string(self, quote: str) -> Wait[bool]:
        while True:
            yield from self._past(re.compile(rf"[\\{quote}]"))
            found = self.text[self.at : self.at + 1]
            if found == "\\":
                self.at += 1
                yield from self.peek()
            if not found or self.at >= len(self.text):
                return False
            self.at += 1
            if found == quote:
                return True

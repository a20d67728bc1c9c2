"""The pieces of an answer, and the writer that collects them while an answer is read.

Owns the numbers of calls, the space between texts around calls, and the turning of a broken call into an invalid one.
Reads no notation of calls.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from langchain_quantllm.chat.scanner import Scanner, Wait

_NO_NAME = "it has no name"
_CLOSERS = " \t\r\n}],"


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A part of an answer.

    Args:
        kind: `"text"`, `"reasoning"`, `"call"`, `"arguments"` or `"invalid"`. An `"invalid"` piece replaces the
            `"call"` and `"arguments"` pieces of its call.
        text: The text; of a call the function's name; of arguments the next part of their JSON; of an invalid call the
            model's words, without the name where a `"call"` piece has it.
        index: The number of the call in the answer, from 0.
        error: The error of an invalid call.
    """

    kind: str
    text: str = ""
    index: int = 0
    error: str = ""


@dataclass
class ToolCallDraft:
    """The call being read."""

    keys: frozenset[str] | None = None  # the only ones of a call that must prove to be one
    streams: bool = True  # else its pieces come when it has proved to be one
    name: str = ""
    nested: bool = False  # it stands in the member "function" of an object, as in OpenAI's API
    arguments: str | None = None
    index: int = -1  # -1 before its first piece
    start: int = -1  # of the arguments in the text
    end: int = -1
    given: int = 0  # characters of the arguments


class TextSpace:
    """The space in and around the texts of an answer.

    Space at the end of a text waits, as a call may follow. What stands before and after calls is kept apart by the
    longest space that the model wrote between them, or by the end of a line where it wrote none; space at the
    beginning or the end of an answer goes with the calls beside it.
    """

    def __init__(self) -> None:
        """Begin an answer."""
        self._waiting: list[str] = []
        self._gap: str | None = None  # the space around the calls since the last text; None without calls
        self._has_text = False

    def add(self, text: str) -> str:
        """Take the next part of a text and return what is certain, with the space before it."""
        shown = text.strip()
        if not shown:
            self._waiting.append(text)
            return ""
        begin = text.index(shown[0])
        space = self._space() + text[:begin]
        if self._gap is not None:
            space = (_longer(self._gap, space) or "\n") if self._has_text else ""
            self._gap = None
        self._waiting.append(text[begin + len(shown) :])
        self._has_text = True
        return space + shown

    def divide(self) -> None:
        """Mark that something else than text stands here."""
        self._gap = _longer(self._gap or "", self._space())

    def end(self) -> str:
        """Return the space at the end of the answer."""
        space = self._space()
        return space if self._gap is None else ""

    def _space(self) -> str:
        space = "".join(self._waiting)
        self._waiting.clear()
        return space


def _longer(one: str, other: str) -> str:
    """Return the space with more line ends, or else with more characters; the first of two that are alike."""
    return max(one, other, key=lambda space: (space.count("\n"), len(space)))


class PieceWriter:
    """Collects the pieces of an answer that a scanner goes through, as its parts come in."""

    _steps: Wait[None]  # of reading the answer; a subclass begins them
    _hidden: re.Pattern[str] | None = None  # special tokens to leave out

    def __init__(self, tools: Mapping[str, Mapping[str, Any]]) -> None:
        """Begin with nothing read.

        Args:
            tools: The schema of each function's parameters by its name; without any there are no calls.
        """
        self._scan = Scanner()
        self._tools = tools
        self._pieces: list[Piece] = []
        self._calls = 0
        self._space: TextSpace | None = TextSpace() if tools else None  # None where a text has no parts

    def push(self, text: str) -> list[Piece]:
        """Take the next part of the answer and return the pieces that have become certain."""
        self._scan.add(text if self._hidden is None else self._hidden.sub("", text))
        return self._step()

    def finish(self) -> list[Piece]:
        """End the answer and return the rest of its pieces."""
        self._scan.ended = True
        return self._step()

    def _step(self) -> list[Piece]:
        next(self._steps, None)
        pieces, self._pieces = self._pieces, []
        return _joined(pieces)

    def _emit(self, kind: str, text: str, index: int = 0, error: str = "") -> None:
        if text or kind in ("call", "invalid"):
            self._pieces.append(Piece(kind=kind, text=text, index=index, error=error))

    def _text(self, text: str) -> None:
        """Emit text, all but the space at its end."""
        self._emit("text", text if self._space is None else self._space.add(text))

    def _enter(self, call: ToolCallDraft) -> None:
        if call.index < 0:
            call.index, self._calls = self._calls, self._calls + 1
        if self._space is not None:
            self._space.divide()

    def _name(self, call: ToolCallDraft) -> None:
        """Emit the call's name, which makes it a call."""
        self._enter(call)
        self._emit("call", call.name, call.index)

    def _complete(self, call: ToolCallDraft) -> str:
        """Emit the rest of the call; returns its error, if any."""
        if not call.name:
            return _NO_NAME
        if call.index < 0:
            self._name(call)
        if not call.given:
            self._emit("arguments", "{}" if call.arguments is None else call.arguments, call.index)
        return ""

    def _finish(self, call: ToolCallDraft, written: int, error: str, *ends: str) -> Wait[bool]:
        """Emit the rest of the call, or all of it as an invalid one; tell whether it was a call."""
        if error := error or self._complete(call):
            yield from self._spoil(call, written, error, *ends)
        return not error

    def _spoil(self, call: ToolCallDraft, written: int, error: str, *ends: str) -> Wait[None]:
        """Emit all text to the closing tag, or to the next call, as an invalid call.

        Args:
            call: The call.
            written: The place of its beginning.
            error: Its error.
            *ends: The closing tag, or an empty text where there is none, and then the tags that open another call.
        """
        scan = self._scan
        named = call.index >= 0 and call.start >= 0
        scan.at = start = call.start if named else written
        yield from scan.until(*filter(None, ends))
        end = scan.at
        if named and 0 <= call.end < end and not scan.text[call.end : end].strip(_CLOSERS):
            end = call.end  # only the brackets around the arguments follow them
        self._enter(call)
        self._emit("invalid", scan.text[start:end].strip(), call.index, error)
        if ends and ends[0]:
            yield from scan.take(ends[0])


def _joined(pieces: Sequence[Piece]) -> list[Piece]:
    """Make one piece of neighbours of one kind and one call."""
    joined: list[Piece] = []
    for (kind, index), group in groupby(pieces, key=lambda piece: (piece.kind, piece.index)):
        if kind in ("call", "invalid"):
            joined += group
        else:
            joined.append(Piece(kind=kind, text="".join(piece.text for piece in group), index=index))
    return joined

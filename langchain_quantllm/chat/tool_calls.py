"""One call of an answer: its name, its arguments, what is wrong with it, and the pieces that tell so.

Owns the pieces and the reading of a call's JSON. Where calls stand is for `tagged` and `parsing` to know.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from langchain_quantllm.chat.notations import checked, loaded
from langchain_quantllm.chat.scanner import CUT_OFF, NOT_JSON, Scanner, Wait

ARGUMENTS = ("arguments", "parameters")
_NAMES = ("name", "tool_name", "function")
_NOT_A_CALL = "it is not a call"


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A part of an answer.

    Args:
        kind: `"text"`, `"reasoning"`, `"call"`, `"arguments"` or `"invalid"`. An `"invalid"` piece replaces the
            `"call"` and `"arguments"` pieces that its call may have given before.
        text: The text; of a call the function's name; of arguments the next part of their JSON; of an invalid
            call what was written, without the name where a `"call"` piece has told it.
        index: Which call of the answer it belongs to, from 0.
        error: What is wrong with an invalid call.
    """

    kind: str
    text: str = ""
    index: int = 0
    error: str = ""


@dataclass
class Call:
    """What is known of the call being read."""

    keys: frozenset[str] | None = None  # the only ones that a call may have, where it must prove to be one
    streams: bool = True  # else its pieces come when it has proved to be one
    name: str = ""
    nested: bool = False  # it stands in the member "function" of an object, as in OpenAI's API
    arguments: str | None = None
    index: int = -1  # none yet: it has given no piece
    start: int = -1  # of the arguments in the text
    end: int = -1
    given: int = 0  # characters of the arguments


class CallReader:
    """Reads single calls from a text, and collects pieces."""

    def __init__(self, tools: Mapping[str, Mapping[str, Any]]) -> None:
        """Begin with nothing read.

        Args:
            tools: The schema of each function's parameters by its name.
        """
        self._scan = Scanner()
        self._tools = tools
        self._pieces: list[Piece] = []
        self._calls = 0
        self._space = ""  # at the end of the text so far; a call would drop it
        self._after_call = False

    def _give(self, kind: str, text: str, index: int = 0, error: str = "") -> None:
        last = self._pieces[-1] if self._pieces else None
        if last and kind in ("text", "reasoning", "arguments") and (last.kind, last.index) == (kind, index):
            self._pieces[-1] = replace(last, text=last.text + text)
        elif text or kind in ("call", "invalid"):
            self._pieces.append(Piece(kind=kind, text=text, index=index, error=error))

    def _text(self, text: str) -> None:
        """Give text, but for the space at its end as long as a call may follow, and the space after a call."""
        if not self._tools:
            self._give("text", text)
            return
        text = text.lstrip() if self._after_call else self._space + text
        if not text:
            return
        shown = text.rstrip()
        self._space = text[len(shown) :]
        self._after_call = self._after_call and not shown
        self._give("text", shown)

    def _object(self, call: Call) -> Wait[str]:
        """Read a call's object and give what is wrong with it, if anything."""
        scan = self._scan
        scan.at += 1
        while True:
            first = yield from scan.skip()
            if first == "}":
                scan.at += 1
                return ""
            if first != '"':
                return NOT_JSON if first else CUT_OFF
            if error := (yield from self._member(call)):
                return error
            after = yield from scan.skip()
            if after not in ("}", ","):
                return NOT_JSON if after else CUT_OFF
            if after == ",":
                scan.at += 1

    def _member(self, call: Call) -> Wait[str]:
        scan = self._scan
        start = scan.at
        if error := (yield from scan.value()):
            return error
        try:
            key = loaded(scan.text[start : scan.at])
        except ValueError as problem:
            return str(problem)
        if call.keys and call.index < 0 and key not in call.keys:
            return _NOT_A_CALL
        colon = yield from scan.skip()
        if colon != ":":
            return NOT_JSON if colon else CUT_OFF
        scan.at += 1
        first = yield from scan.skip()
        if key in ARGUMENTS:
            return (yield from self._arguments(call))
        if key == "function" and first == "{" and not call.nested:
            call.nested = True
            return (yield from self._object(call))
        start = scan.at
        if error := (yield from scan.value()):
            return error
        if key in _NAMES and not call.name:
            return self._named_by(call, scan.text[start : scan.at])
        return ""

    def _named_by(self, call: Call, written: str) -> str:
        try:
            name = loaded(written)
        except ValueError as problem:
            return str(problem)
        if not isinstance(name, str) or not name:
            return "its name is not a text"
        if call.keys and name not in self._tools:
            return _NOT_A_CALL
        call.name = name
        if call.streams:
            self._name(call)
        return ""

    def _arguments(self, call: Call) -> Wait[str]:
        """Read the arguments, giving them as they come if the name is known."""
        scan = self._scan
        if call.arguments is not None:
            return "it has arguments twice"
        call.start, call.end, call.given = scan.at, -1, 0
        streams = (yield from scan.peek()) == "{" and call.index >= 0

        def seen() -> None:
            if streams:
                self._give("arguments", scan.text[call.start + call.given : scan.at], call.index)
                call.given = scan.at - call.start

        error = yield from scan.value(seen)
        seen()
        if error:
            return error
        call.end = scan.at
        try:
            call.arguments = checked(scan.text[call.start : call.end])
        except ValueError as problem:
            return str(problem)
        return ""

    def _convert(self, call: Call, reader: Callable[[str], str], body: str) -> str:
        """Read arguments that are no JSON and give the call; or what is wrong."""
        try:
            call.arguments = reader(body)
        except ValueError as problem:
            return str(problem)
        return self._complete(call)

    def _name(self, call: Call) -> None:
        """Give the call's name, which makes it a call."""
        self._enter(call)
        self._give("call", call.name, call.index)

    def _enter(self, call: Call) -> None:
        if call.index < 0:
            call.index, self._calls = self._calls, self._calls + 1
        self._space, self._after_call = "", True

    def _complete(self, call: Call) -> str:
        """Give what of the call has not been given; or what is wrong with it."""
        if not call.name:
            return "it has no name"
        if call.index < 0:
            self._name(call)
        if not call.given:
            self._give("arguments", "{}" if call.arguments is None else call.arguments, call.index)
        return ""

    def _spoil(self, call: Call, written: int, error: str, *ends: str) -> Wait[None]:
        """Give all to the closing tag, or to where another call opens, as an invalid call."""
        scan = self._scan
        named = call.index >= 0 and call.start >= 0
        end = call.end
        scan.at = start = call.start if named else written
        yield from scan.until(*ends)
        end = end if named and end >= 0 else scan.at
        self._enter(call)
        self._give("invalid", scan.text[start:end].strip(), call.index, error)
        if ends:
            yield from scan.take(ends[0])

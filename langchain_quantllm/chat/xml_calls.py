"""The reader of calls in XML: Qwen's `<function=f><parameter=k>v</parameter></function>` and GLM's `<arg_key>` pairs.

Owns the question where a value ends. These notations escape nothing, so a value may hold any of their tags. It ends
at the first end tag behind which the format goes on: with the next parameter, or with the end of the call and then
the next call or the end of the answer. A value that began in a line of its own also ends at a line's end.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from langchain_quantllm.chat.notations import check_depth, typed, types_of
from langchain_quantllm.chat.pieces import PieceWriter, ToolCallDraft
from langchain_quantllm.chat.scanner import CUT_OFF, Wait

FUNCTION = "<function="
GLM_KEY = "<arg_key>"

_CALL, _CALL_END = "<tool_call>", "</tool_call>"
_NO_PARAMETER = "its parameters are not marked as such"
_UNCERTAIN = "the end of its parameter {key!r} is not certain: the value holds tags of calls"
_GOES_ON, _ENDS, _MAY_END = "another parameter follows", "the call ends", "the call ends if no later tag ends it"


@dataclass(frozen=True, kw_only=True)
class XmlNotation:
    """The tags of a call's parameters: `begin KEY key_end value_begin VALUE value_end`.

    Args:
        begin: The text before a key.
        key_end: The text after it.
        value_begin: The tag before a value, if there is one.
        value_end: The tag after it.
        call_end: The tag after the last parameter.
        opener: A parameter's beginning within a value, which makes the value's end uncertain.
        lines: Whether values are written in lines of their own.
    """

    begin: str
    key_end: str
    value_begin: str
    value_end: str
    call_end: str
    opener: re.Pattern[str]
    lines: bool = False


QWEN = XmlNotation(
    begin="<parameter=",
    key_end=">",
    value_begin="",
    value_end="</parameter>",
    call_end="</function>",
    opener=re.compile(r"^[ \t]*<(?:parameter|function)=[^>\n]+>", re.MULTILINE),
    lines=True,
)
GLM = XmlNotation(
    begin=GLM_KEY,
    key_end="</arg_key>",
    value_begin="<arg_value>",
    value_end="</arg_value>",
    call_end=_CALL_END,
    opener=re.compile(r"<arg_key>[^<\n]*</arg_key>\s*<arg_value>"),
)
_UNMARKED_END = re.compile(r"\s*(?=<parameter=[^>\n]+>|</function>)")


class XmlCallReader(PieceWriter):
    """Reads calls in XML from behind their opening tag; the arguments come whole, at the call's end."""

    _marks_ended = False  # no end tag of a value follows, to the end of the answer

    def _qwen_call(self, written: int, *, wrapped: bool) -> Wait[None]:
        """Read a call from behind `<function=`; one in `<tool_call>` tags goes to its closing tag."""
        scan = self._scan
        start = scan.at
        yield from scan.until(">", "\n", "<")
        name = scan.text[start : scan.at].strip()
        has_end = yield from scan.take(">")
        yield from self._xml_call(name if has_end else "", written, QWEN, wrapped=wrapped)

    def _xml_call(self, name: str, written: int, notation: XmlNotation, *, wrapped: bool = True) -> Wait[None]:
        """Read parameters and the call's end."""
        scan = self._scan
        call = ToolCallDraft(name=name)
        if not name:
            yield from self._finish(call, written, "it has no name" if scan.at < len(scan.text) else CUT_OFF, _CALL_END)
            return
        self._name(call)
        call.start = scan.at
        values: dict[str, Any] = {}
        error = yield from self._parameters_into(values, self._tools.get(name, {}), notation, wrapped=wrapped)
        if error:
            yield from self._spoil_from(scan.at, call, error)
            return
        try:
            check_depth(values)
        except ValueError as problem:
            yield from self._spoil_from(scan.at, call, str(problem))
            return
        call.arguments = json.dumps(values, ensure_ascii=False)
        self._complete(call)
        yield from scan.take(notation.call_end)
        if notation.call_end != _CALL_END:
            end = scan.at
            yield from scan.skip()
            if not (yield from scan.take(_CALL_END)):
                scan.at = end

    def _spoil_from(self, reached: int, call: ToolCallDraft, error: str) -> Wait[None]:
        """Make an invalid call of all text up to the first closing tag behind the place of its error."""
        scan = self._scan
        yield from scan.until(_CALL_END)
        self._enter(call)
        self._emit("invalid", scan.text[call.start : scan.at].strip(), call.index, error)
        yield from scan.take(_CALL_END)

    def _parameters_into(
        self, values: dict[str, Any], schema: Mapping[str, Any], notation: XmlNotation, *, wrapped: bool
    ) -> Wait[str]:
        """Read all parameters, up to the call's end; returns their error, if any."""
        scan = self._scan
        while True:
            first = yield from scan.skip()
            if not (yield from scan.take(notation.begin)):
                start = scan.at
                ends = yield from scan.take(notation.call_end)
                scan.at = start
                return "" if ends else (_NO_PARAMETER if first else CUT_OFF)
            key = yield from self._key(notation)
            if not key:
                return _NO_PARAMETER if scan.at < len(scan.text) else CUT_OFF
            if key in values:
                return f"it has the parameter {key!r} twice"
            start = scan.at
            end, after, error = yield from self._value(key, schema, notation, wrapped=wrapped)
            if error:
                return error
            text = scan.text[start:end]
            if notation.opener.search(text):
                scan.at = end
                return _UNCERTAIN.format(key=key)
            if notation.lines:
                text = text.removeprefix("\n").removesuffix("\n")
            values[key] = typed(text, key, schema)
            scan.at = after

    def _key(self, notation: XmlNotation) -> Wait[str]:
        """Read a key and the tags around it; empty where they are written otherwise."""
        scan = self._scan
        start = scan.at
        yield from scan.until(notation.key_end, "\n", "<")
        key = scan.text[start : scan.at].strip()
        if not (yield from scan.take(notation.key_end)):
            return ""
        if notation.value_begin:
            yield from scan.skip()
            if not (yield from scan.take(notation.value_begin)):
                return ""
        return key

    def _value(
        self, key: str, schema: Mapping[str, Any], notation: XmlNotation, *, wrapped: bool
    ) -> Wait[tuple[int, int, str]]:
        """Find the end of the value that begins here, and the place behind its end tag; or return its error."""
        scan = self._scan
        start = scan.at
        types = types_of(key, schema)
        if types and "string" not in types and (found := (yield from self._json_value(notation))):
            return *found, ""
        scan.at = start
        own_line = notation.lines and (yield from scan.peek()) == "\n"
        first: tuple[int, int] | None = None  # where the call ends if no later tag ends it
        while not self._marks_ended:
            if not (yield from scan.until(notation.value_end, _CALL)):
                self._marks_ended = first is None
                break
            end = scan.at
            if not (yield from scan.take(notation.value_end)):
                if first is not None:
                    break
                yield from scan.take(_CALL)
                continue
            after = scan.at
            yield from scan.skip()
            is_end = not own_line or scan.text[end - 1] == "\n" or "\n" in scan.text[after : scan.at]
            follows = (yield from self._follows(notation, wrapped=wrapped)) if is_end else ""
            scan.at = after
            if follows and first is not None:
                return end, after, _UNCERTAIN.format(key=key)
            if follows == _MAY_END:
                first = end, after
            elif follows:
                return end, after, ""
        if first is not None:
            return *first, ""
        return self._unmarked_end(start, key, notation)

    def _json_value(self, notation: XmlNotation) -> Wait[tuple[int, int] | None]:
        """Find the end of a value in JSON, whose strings may hold any tag."""
        scan = self._scan
        yield from scan.skip()
        if (yield from scan.value()):
            return None
        end = scan.at
        yield from scan.skip()
        found = yield from scan.take(notation.value_end)
        return (end, scan.at) if found else None

    def _follows(self, notation: XmlNotation, *, wrapped: bool) -> Wait[str]:
        """Tell how the format goes on here, behind a value's end tag; empty where it does not."""
        scan = self._scan
        if (yield from scan.take(notation.begin)):
            return _GOES_ON if (yield from self._key(notation)) else ""
        if not (yield from scan.take(notation.call_end)):
            return ""
        if not wrapped:
            return _ENDS
        yield from scan.skip()
        if notation.call_end != _CALL_END and (yield from scan.take(_CALL_END)):
            yield from scan.skip()
        last = not (yield from scan.peek())
        return _ENDS if last or (yield from scan.take(_CALL)) else _MAY_END

    def _unmarked_end(self, start: int, key: str, notation: XmlNotation) -> tuple[int, int, str]:
        """Find the end of a value without its end tag, before the next of Qwen's tags."""
        text = self._scan.text
        found = _UNMARKED_END.search(text, start) if notation is QWEN else None
        if found is None:
            self._scan.at = len(text)
            return 0, 0, CUT_OFF
        error = _UNCERTAIN.format(key=key) if text.find(notation.value_end, start, found.start()) >= 0 else ""
        self._scan.at = found.end()
        return found.start(), found.end(), error

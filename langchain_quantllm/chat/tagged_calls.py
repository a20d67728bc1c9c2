"""Calls between tags, whatever the format they are written in: JSON, XML, Gemma's notation, Python.

Owns what stands between a call's tags. Where tags may stand is for `parsing` to know.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from langchain_quantllm.chat.notations import from_gemma, from_python, from_qwen_xml
from langchain_quantllm.chat.scanner import CUT_OFF, NOT_JSON, Wait
from langchain_quantllm.chat.tool_calls import Call, CallReader
from langchain_quantllm.structured.tool_formats import HERMES, ToolFormat

FENCE = "```"
FUNCTION = "<function="
CALL = "<｜tool▁call▁begin｜>"
_SEPARATOR = "<｜tool▁sep｜>"
_MISTRAL = "[TOOL_CALLS]"


class TaggedReader(CallReader):
    """Reads calls between tags, once the opening tag has been found."""

    def __init__(self, tool_format: ToolFormat, tools: Mapping[str, Mapping[str, Any]]) -> None:
        """Begin with nothing read.

        Args:
            tool_format: How the model writes calls.
            tools: The schema of each function's parameters by its name.
        """
        super().__init__(tools)
        self._format = tool_format
        self._end_tag = _end_tag(tool_format)

    def _region(self, tag: str) -> Wait[None]:
        """Read calls to the closing tag, whatever the format they are written in."""
        scan = self._scan
        end = HERMES.call_end.rpartition("\n")[2] if tag == HERMES.trigger else self._end_tag
        ends = tuple(text for text in (end, tag) if text)
        written = scan.at
        if tag == FUNCTION:
            yield from self._qwen_xml(written, end)
            return
        if tag == CALL:
            yield from self._deepseek(end)
            return
        first = yield from scan.skip()
        if first in ("{", "["):
            if not (yield from (self._list(ends) if first == "[" else self._objects(ends))):
                return
        elif tag == _MISTRAL:
            yield from self._mistral()
            return
        elif (yield from scan.take(FUNCTION)):
            yield from self._qwen_xml(written, end)
            return
        elif (yield from scan.take("call:")):
            yield from self._gemma(written, ends)
            return
        else:
            yield from self._spoil(Call(), written, NOT_JSON if first else CUT_OFF, *ends)
            return
        yield from self._close(end)

    def _close(self, end: str) -> Wait[None]:
        """Go past the closing tag, and the bracket too many that small models write before it."""
        at = self._scan.at
        if end:
            yield from self._scan.skip(" \r\n}]")
            if not (yield from self._scan.take(end)):
                self._scan.at = at

    def _objects(self, ends: Sequence[str]) -> Wait[bool]:
        while (yield from self._scan.skip()) == "{":
            if not (yield from self._json(ends)):
                return False
        return True

    def _list(self, ends: tuple[str, ...]) -> Wait[bool]:
        scan = self._scan
        start = scan.at
        scan.at += 1
        first = yield from scan.skip()
        if first.isidentifier():
            scan.at = start
            yield from self._python_calls(start, ends=ends)
            return True
        if first not in ("{", "]"):
            yield from self._spoil(Call(), start, NOT_JSON if first else CUT_OFF, *ends)
            return False
        while first == "{":
            if not (yield from self._json(ends)):
                return False
            yield from scan.skip()
            yield from scan.take(",")
            first = yield from scan.skip()
        yield from scan.take("]")
        return True

    def _json(self, ends: Sequence[str]) -> Wait[bool]:
        """Read one object; tell whether it was a call."""
        call, written = Call(), self._scan.at
        error = yield from self._object(call)
        error = error or self._complete(call)
        if error:
            yield from self._spoil(call, written, error, *ends)
        return not error

    def _mistral(self) -> Wait[None]:
        """Read `f[ARGS]{...}`, with or without `[ARGS]` and a call's id before it."""
        scan = self._scan
        written = scan.at
        yield from scan.until("[ARGS]", "[CALL_ID]", "{", _MISTRAL, "\n")
        name = scan.text[written : scan.at].strip()
        if (yield from scan.take("[CALL_ID]")):
            yield from scan.until("[ARGS]", "{", _MISTRAL, "\n")
        found = yield from scan.take("[ARGS]")
        known = bool(found or (yield from scan.peek()) == "{")
        yield from self._named(name if known else "", written, _MISTRAL)

    def _deepseek(self, end: str) -> Wait[None]:
        """Read `function<sep>NAME` and fenced arguments, or `NAME<sep>` and arguments."""
        scan = self._scan
        written = scan.at
        yield from scan.until(_SEPARATOR, end, "\n")
        name = scan.text[written : scan.at].strip()
        if not (yield from scan.take(_SEPARATOR)):
            name = ""
        elif (yield from scan.skip()) != "{" and name == "function":
            start = scan.at
            yield from scan.until("\n", "{", FENCE, end)
            name = scan.text[start : scan.at].strip()
            yield from scan.skip()
            yield from scan.take("```json", FENCE)
        if (yield from self._named(name, written, end, CALL)):
            yield from scan.skip()
            yield from scan.take(FENCE)
            yield from self._close(end)

    def _named(self, name: str, written: int, *ends: str) -> Wait[bool]:
        """Read the arguments of a call whose name came before them; tell whether it was one."""
        call = Call(name=name)
        first = yield from self._scan.skip()
        if not name:
            yield from self._spoil(call, written, "it has no name" if first else CUT_OFF, *ends)
            return False
        self._name(call)
        error = yield from self._arguments(call)
        error = error or self._complete(call)
        if error:
            yield from self._spoil(call, written, error, *ends)
        return not error

    def _qwen_xml(self, written: int, end: str) -> Wait[None]:
        scan = self._scan
        start = scan.at
        yield from scan.until(">", "\n", "<")
        call = Call(name=scan.text[start : scan.at].strip())
        error = "" if (yield from scan.take(">")) and call.name else "it has no name"
        if not error:
            self._name(call)
            call.start = scan.at
            error = "" if (yield from scan.until("</function>", end)) else CUT_OFF
        body = scan.text[call.start : scan.at]
        parameters = self._tools.get(call.name, {})
        error = error or self._convert(call, lambda text: from_qwen_xml(text, parameters), body)
        if error:
            yield from self._spoil(call, written, error, end)
            return
        yield from scan.take("</function>")
        yield from self._close(end)

    def _gemma(self, written: int, ends: tuple[str, ...]) -> Wait[None]:
        scan = self._scan
        call = Call(name=(yield from scan.word()))
        error = "" if (yield from scan.skip()) == "{" and call.name else "it has no name"
        if not error:
            self._name(call)
            call.start = scan.at
            yield from scan.until(*ends)
            error = self._convert(call, from_gemma, scan.text[call.start : scan.at])
        if error:
            yield from self._spoil(call, written, error, *ends)
        else:
            yield from self._close(ends[0])

    def _python_calls(self, start: int, *, whole: bool = False, ends: tuple[str, ...] = ()) -> Wait[None]:
        """Read `[f(a=1), g()]`; as a whole answer it begins with the name of a tool, or is text."""
        scan = self._scan
        before = self._calls
        scan.at += 1
        while True:
            yield from scan.skip()
            written = scan.at
            call = Call(name=(yield from scan.word()))
            bracket = yield from scan.peek()
            if whole and self._calls == before and (bracket != "(" or call.name not in self._tools):
                self._text(scan.text[start : scan.at])
                return
            if bracket == "]" and not call.name:
                scan.at += 1
                return
            if bracket != "(" or not call.name:
                yield from self._spoil(call, written, "it is not a call in Python" if bracket else CUT_OFF, *ends)
                return
            self._name(call)
            call.start = scan.at
            error = yield from scan.python_call()
            error = error or self._convert(call, from_python, scan.text[call.start : scan.at])
            if error:
                yield from self._spoil(call, written, error, *ends)
                return
            yield from scan.skip()
            if not (yield from scan.take(",")):
                yield from scan.take("]")
                return


def _end_tag(tool_format: ToolFormat) -> str:
    """Find the tag that ends a call, or all of them, if the format has one."""
    texts = (tool_format.call_end, tool_format.closing)
    return next((found.group() for text in texts if (found := re.search(r"<[^<>]*>\Z", text))), "")

"""The reader of tool calls: JSON, Gemma's notation and Python, with and without tags; `xml_calls` reads those in XML.

Owns all that stands within calls. The places of calls in an answer are `output_parser`'s.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from langchain_quantllm.chat.notations import checked, from_gemma, from_python, loaded
from langchain_quantllm.chat.pieces import ToolCallDraft
from langchain_quantllm.chat.scanner import CUT_OFF, NOT_JSON, Wait
from langchain_quantllm.chat.xml_calls import FUNCTION, GLM, GLM_KEY, XmlCallReader
from langchain_quantllm.structured.tool_formats import HERMES, ToolFormat

ARGUMENTS = ("arguments", "parameters")
FENCE = "```"
CALL = "<｜tool▁call▁begin｜>"

_NAMES = ("name", "tool_name", "function")
_ASIDE = ("id", "type", "index", "call_id", "tool_call_id")  # members of a call that say nothing of it
_SEPARATOR = "<｜tool▁sep｜>"
_MISTRAL = "[TOOL_CALLS]"
_CALL_ID = "[CALL_ID]"
_GEMMA_STRINGS = ("<escape>", '<|"|>')
_NOT_A_CALL = "it is not a call"


class CallReader(XmlCallReader):
    """Reads calls from a text, once their beginning is found, and collects pieces.

    Arguments in JSON are streamed as they are written, others come whole.
    """

    def __init__(self, tool_format: ToolFormat, tools: Mapping[str, Mapping[str, Any]]) -> None:
        """Begin with nothing read.

        Args:
            tool_format: The model's format of calls.
            tools: The schema of each function's parameters by its name.
        """
        super().__init__(tools)
        self._format = tool_format
        self._end_tag = _end_tag(tool_format)

    # JSON.

    def _object(self, call: ToolCallDraft) -> Wait[str]:
        """Read a call's object and return its error, if any."""
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

    def _member(self, call: ToolCallDraft) -> Wait[str]:
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
        if key in _NAMES:
            return "it has a name twice"
        return "" if key in _ASIDE else f"it has a member {key!r} beside its name and arguments"

    def _named_by(self, call: ToolCallDraft, written: str) -> str:
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

    def _arguments(self, call: ToolCallDraft) -> Wait[str]:
        """Read the arguments; they stream if the name is known."""
        scan = self._scan
        if call.arguments is not None:
            return "it has arguments twice"
        call.start, call.end, call.given = scan.at, -1, 0
        streams = (yield from scan.peek()) == "{" and call.index >= 0

        def seen() -> None:
            if streams:
                self._emit("arguments", scan.text[call.start + call.given : scan.at], call.index)
                call.given = scan.at - call.start

        error = yield from scan.value(seen)
        seen()
        if error:
            return error
        call.end = scan.at
        return self._convert(call, checked, scan.at)

    def _convert(self, call: ToolCallDraft, reader: Callable[[str], str], end: int) -> str:
        """Make JSON of the arguments, which end here; returns their error, if any."""
        try:
            call.arguments = reader(self._scan.text[call.start : end])
        except ValueError as problem:
            return str(problem)
        return ""

    # Calls in tags.

    def _region(self, tag: str) -> Wait[None]:
        """Read calls from behind a tag to its closing one, in any format."""
        scan = self._scan
        end = HERMES.call_end.rpartition("\n")[2] if tag == HERMES.trigger else self._end_tag
        ends = (end, tag)
        written = scan.at
        if tag == FUNCTION:
            yield from self._qwen_call(written, wrapped=False)
        elif tag == CALL:
            yield from self._deepseek(end)
        elif (first := (yield from scan.skip())) and first in "{[":
            if (yield from self._objects(ends)):
                yield from self._close(end)
        elif tag == _MISTRAL:
            yield from self._mistral()
        elif tag == HERMES.trigger and (yield from scan.take(FUNCTION)):
            yield from self._qwen_call(written, wrapped=True)
        elif tag == HERMES.trigger and (name := (yield from self._glm_name())):
            yield from self._xml_call(name, written, GLM)
        elif (yield from scan.take("call:")):
            yield from self._gemma(written, ends)
        else:
            wrong = _NOT_A_CALL if self._format.style == "glm_xml" else NOT_JSON
            yield from self._spoil(ToolCallDraft(), written, wrong if first else CUT_OFF, *ends)

    def _glm_name(self) -> Wait[str]:
        """Read the name before `<arg_key>`; in GLM's own format a call may have no arguments."""
        scan = self._scan
        start = scan.at
        name = yield from scan.word()
        yield from scan.skip()
        ends = (GLM_KEY, self._end_tag) if self._format.style == "glm_xml" else (GLM_KEY,)
        if name and (yield from scan.starts(*ends)):
            return name
        scan.at = start
        return ""

    def _close(self, end: str) -> Wait[None]:
        """Go past the closing tag, and the superfluous bracket that small models write before it."""
        at = self._scan.at
        if end:
            yield from self._scan.skip(" \r\n}]")
            if not (yield from self._scan.take(end)):
                self._scan.at = at

    def _objects(self, ends: tuple[str, ...]) -> Wait[bool]:
        """Read objects, in a list or behind each other; False after one that is no call."""
        scan = self._scan
        start = scan.at
        in_list = yield from scan.take("[")
        first = yield from scan.skip()
        if in_list and first.isidentifier():
            scan.at = start
            yield from self._python_calls(start, ends=ends)
            return True
        if in_list and first not in ("{", "]"):
            yield from self._spoil(ToolCallDraft(), start, NOT_JSON if first else CUT_OFF, *ends)
            return False
        while first == "{":
            call, written = ToolCallDraft(), scan.at
            error = yield from self._object(call)
            if not (yield from self._finish(call, written, error, *ends)):
                return False
            first = yield from scan.skip()
            if in_list:
                yield from scan.take(",")
                first = yield from scan.skip()
        if in_list:
            yield from scan.take("]")
        return True

    def _mistral(self) -> Wait[None]:
        """Read `f[ARGS]{...}`, with or without `[ARGS]` and a call's id before it."""
        scan = self._scan
        written = scan.at
        yield from scan.until("[ARGS]", _CALL_ID, "{", _MISTRAL, "\n")
        name = scan.text[written : scan.at].strip()
        if (yield from scan.take(_CALL_ID)):
            yield from scan.word()
        found = yield from scan.take("[ARGS]")
        known = bool(found or (yield from scan.peek()) == "{")
        yield from self._named(name if known else "", written, "", _MISTRAL)

    def _deepseek(self, end: str) -> Wait[None]:
        """Read `function<sep>NAME` and fenced arguments, or `NAME<sep>` and arguments."""
        scan = self._scan
        written = scan.at
        yield from scan.until(_SEPARATOR, end, CALL, "\n")
        name = scan.text[written : scan.at].strip()
        if not (yield from scan.take(_SEPARATOR)):
            name = ""
        elif (yield from scan.skip()) != "{" and name == "function":
            start = scan.at
            yield from scan.until("\n", "{", FENCE, end, CALL)
            name = scan.text[start : scan.at].strip()
            yield from scan.skip()
            yield from scan.take("```json", FENCE)
        if (yield from self._named(name, written, end, CALL)):
            yield from scan.skip()
            yield from scan.take(FENCE)
            yield from self._close(end)

    def _named(self, name: str, written: int, *ends: str) -> Wait[bool]:
        """Read the arguments of a call whose name stands before them; tell whether it was one."""
        call = ToolCallDraft(name=name)
        error = ""
        first = yield from self._scan.skip()
        if name:
            self._name(call)
            error = yield from self._arguments(call)
        elif not first:
            error = CUT_OFF
        return (yield from self._finish(call, written, error, *ends))

    def _gemma(self, written: int, ends: tuple[str, ...]) -> Wait[None]:
        scan = self._scan
        call = ToolCallDraft(name=(yield from scan.word()))
        error = "" if (yield from scan.skip()) == "{" and call.name else "it has no name"
        if not error:
            self._name(call)
            call.start = scan.at
            error = yield from self._past_gemma_object(ends)
            error = error or self._convert(call, from_gemma, scan.at)
        if (yield from self._finish(call, written, error, *ends)):
            yield from self._close(ends[0])

    def _past_gemma_object(self, ends: tuple[str, ...]) -> Wait[str]:
        """Go to the call's end, which no string holds; returns the error of a string that is broken, else empty."""
        scan = self._scan
        while (yield from scan.until(*filter(None, ends), *_GEMMA_STRINGS)):
            if not (mark := (yield from scan.take(*_GEMMA_STRINGS))):
                break
            if not (yield from scan.until(mark)):
                return CUT_OFF
            yield from scan.take(mark)
        return ""

    def _python_calls(self, start: int, *, whole: bool = False, ends: tuple[str, ...] = ()) -> Wait[None]:
        """Read `[f(a=1), g()]`; a whole answer is text unless it begins with the name of a tool."""
        scan = self._scan
        before = self._calls
        scan.at += 1
        while True:
            yield from scan.skip()
            written = scan.at
            call = ToolCallDraft(name=(yield from scan.word()))
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
            error = error or self._convert(call, from_python, scan.at)
            if not (yield from self._finish(call, written, error, *ends)):
                return
            yield from scan.skip()
            if not (yield from scan.take(",")):
                yield from scan.take("]")
                return


def parameters_of(tools: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Map the name of each function to the schema of its parameters."""
    functions = [tool.get("function", tool) for tool in tools]
    return {str(function["name"]): function.get("parameters") or {} for function in functions if "name" in function}


def _end_tag(tool_format: ToolFormat) -> str:
    """Find the tag that ends a call, or all of them, if the format has one."""
    texts = (tool_format.call_end, tool_format.closing)
    return next((found.group() for text in texts if (found := re.search(r"<[^<>]*>\Z", text))), "")

"""The parser of answers as they are written: their text, reasoning and tool calls.

Owns the places of these parts in an answer. Calls themselves are read by `tool_calls`; the formats of the model
families are in `structured.tool_formats`; messages are made by `result`.

Answers of tokenizers with a response template of their own go to transformers' parser, in `response_template`. It is no
replacement for this one: it does not stream arguments, and misreads calls that small models write otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from langchain_quantllm.chat.pieces import ToolCallDraft
from langchain_quantllm.chat.scanner import CUT_OFF, Wait, held, prefixes
from langchain_quantllm.chat.tool_calls import ARGUMENTS, CALL, FENCE, CallReader, parameters_of
from langchain_quantllm.chat.xml_calls import FUNCTION
from langchain_quantllm.structured.tool_formats import HERMES, ReasoningFormat, ToolFormat

_PLAIN_KEYS = frozenset({"name", *ARGUMENTS})
_LLAMA_KEYS = _PLAIN_KEYS | {"type", "id", "function"}
_TOOLS = ("<tools>", "</tools>")
_FENCE_WORDS = ("json", "xml", "tool_call", "tool_code", "python")
_PYTHON_TAG = "<|python_tag|>"
_CALLS = "<｜tool▁calls▁begin｜>"
_SILENT = {  # tags that carry nothing beyond the pieces
    _CALLS: (_CALLS, "<｜tool▁calls▁end｜>"),
    "<|START_ACTION|>": ("<|START_RESPONSE|>", "<|END_RESPONSE|>"),
}


class AnswerParser(CallReader):
    """Reads an answer in parts of any size and gives its pieces as soon as they are certain.

    The borders of the parts change nothing but the ends of the pieces. Reasoning stands at the beginning of an answer.
    A call in it is a mention, and reasoning, if the reasoning is closed after it, and else a call; so from a call on,
    nothing is certain before the reasoning or the answer ends.

    Small models do not keep to their format, so in every format these are calls as well: `<tool_call>` tags around
    a call in any format; JSON in `<tools>` tags, in a fenced block or as the whole answer, if it has nothing but the
    name of one of the tools and arguments. Other such JSON is text, unchanged. Where the tokens ran out within such
    calls, whole ones are calls and the last one is an invalid call.
    """

    def __init__(
        self,
        tool_format: ToolFormat | None,
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        reasoning: ReasoningFormat | None = None,
        in_reasoning: bool = False,
        hidden: re.Pattern[str] | None = None,
    ) -> None:
        """Begin an answer.

        Args:
            tool_format: The model's format of calls; None reads none.
            tools: The functions that it may call, as OpenAI's API takes them; without any there are no calls.
            reasoning: The model's format of reasoning, if it has one.
            in_reasoning: The prompt has begun the reasoning already.
            hidden: Special tokens to leave out, each of which comes within one part.
        """
        super().__init__(tool_format or HERMES, parameters_of(tools) if tool_format else {})
        self._reasoning = reasoning
        self._in_reasoning = in_reasoning
        self._hidden = hidden
        tags = _openers(self._format) if self._tools else []
        self._opener = re.compile("|".join(map(re.escape, tags)) or r"(?!)")
        self._begun = prefixes(tags)
        # A fence is frequent in reasoning, and it holds a call only in answers of small models.
        self._reasoned_calls = [tag for tag in tags if tag not in (FENCE, *_TOOLS)]
        self._apart = ""  # before the next reasoning, where there was some before
        self._fenced = False  # inside a fenced block which is text
        self._steps = self._answer()

    def _answer(self) -> Wait[None]:
        if self._reasoning is not None:
            inside = (yield from self._thinks(self._reasoning)) or self._in_reasoning
            while inside:
                yield from self._think(self._reasoning)
                self._apart = "\n"
                inside = yield from self._thinks(self._reasoning)
        if self._tools:
            yield from self._whole(self._scan.at)
        yield from self._content()
        if self._space is not None:
            self._emit("text", self._space.end())

    def _thinks(self, reasoning: ReasoningFormat) -> Wait[bool]:
        start = self._scan.at
        yield from self._scan.skip()
        if (yield from self._scan.take(reasoning.begin)):
            return True
        self._scan.at = start
        return False

    def _think(self, reasoning: ReasoningFormat) -> Wait[None]:
        """Emit reasoning to its end, without the line ends around it and the blank lines after it.

        Reasoning that is never closed ends before its first call, if it has one.
        """
        scan = self._scan
        marks = [reasoning.end, *self._reasoned_calls]
        pattern, begun = re.compile("|".join(map(re.escape, marks))), prefixes(marks)
        yield from scan.skip("\r\n")
        line_ends: list[str] = []  # before more reasoning, or its end
        while not (found := pattern.search(scan.text, scan.at)):
            cut = len(scan.text) if scan.ended else len(scan.text) - held(scan.text[scan.at :], begun)
            self._reason(scan.text[scan.at : cut], line_ends)
            scan.at = cut
            scan.forget()
            if not (yield from scan.more()):
                self._emit("reasoning", "".join(line_ends))
                return
        self._reason(scan.text[scan.at : found.start()], line_ends)
        scan.at = start = found.start()
        if not (yield from scan.until(reasoning.end)):
            scan.at = start
            return
        self._reason(scan.text[start : scan.at], line_ends)
        start = scan.at = scan.at + len(reasoning.end)
        yield from scan.skip()
        scan.at = max(start, scan.text.rfind("\n", start, scan.at) + 1)

    def _reason(self, text: str, line_ends: list[str]) -> None:
        """Emit reasoning; the line ends after it wait for more."""
        shown = text.rstrip("\r\n")
        if shown:
            self._emit("reasoning", self._apart + "".join(line_ends) + shown)
            self._apart = ""
            line_ends.clear()
        line_ends.append(text[len(shown) :])

    def _content(self) -> Wait[None]:
        scan = self._scan
        while True:
            if found := self._opener.search(scan.text, scan.at):
                self._text(scan.text[scan.at : found.start()])
                scan.at = found.end()
                yield from self._opened(found.group())
                continue
            cut = len(scan.text) if scan.ended else len(scan.text) - held(scan.text[scan.at :], self._begun)
            self._text(scan.text[scan.at : cut])
            scan.at = cut
            scan.forget()
            if not (yield from scan.more()):
                return

    def _opened(self, tag: str) -> Wait[None]:
        """Read from behind an opening tag."""
        scan = self._scan
        if tag == FENCE:
            yield from self._fence()
        elif tag == _TOOLS[0]:
            yield from self._proven(scan.at - len(tag), _TOOLS[1])
        elif tag == _PYTHON_TAG:
            yield from self._whole(scan.at - len(tag), tagged=True)
        elif tag not in _SILENT.get(self._format.trigger, ()):
            yield from self._region(tag)

    # JSON that must prove to be a call.

    def _whole(self, start: int, *, tagged: bool = False) -> Wait[None]:
        """Read an answer that is nothing but calls, if it begins like one, or begins with Llama's tag."""
        first = yield from self._scan.skip()
        bare, python = tagged or not self._format.trigger, self._format.style == "python"
        if first == "[" and bare and (tagged or python):
            yield from self._python_calls(start, whole=True)
        elif first == "{" and bare and (tagged or not python):
            yield from self._llama_calls(start)
        elif tagged:
            self._text(self._scan.text[start : self._scan.at])
        elif first and first in "{[":
            yield from self._proven(start, "")
        else:
            self._scan.at = start

    def _fence(self) -> Wait[None]:
        """Read a fenced block: a call, a fence around a call's tags, or text."""
        scan = self._scan
        start = scan.at - len(FENCE)
        if self._fenced:
            self._fenced = False
            self._text(FENCE)
            return
        yield from scan.take(*_FENCE_WORDS)
        yield from scan.skip()
        tags = [tag for tag in (HERMES.trigger, self._format.trigger) if tag]
        if tag := (yield from scan.take(*tags)):
            yield from self._opened(tag)
            yield from scan.skip()
            yield from scan.take(FENCE)
            return
        self._fenced = not (yield from self._proven(start, FENCE))

    def _proven(self, start: int, closing: str) -> Wait[bool]:
        """Read JSON that is a call or calls and then the closing text or the answer's end; else it is text."""
        scan = self._scan
        calls, is_cut = yield from self._candidates()
        end = scan.at
        last = (yield from scan.skip()) if calls else ""
        if last and not is_cut and not (closing and (yield from scan.take(closing))):
            calls, scan.at = [], end
        for call in calls:
            self._complete(call)
        if is_cut:
            yield from self._spoil(ToolCallDraft(), end, CUT_OFF)
        if not calls and closing:
            self._text(scan.text[start : scan.at])
        elif not calls:
            scan.at = start  # the bracket may be a tag's
        return bool(calls)

    def _candidates(self) -> Wait[tuple[list[ToolCallDraft], bool]]:
        """Read objects that may be calls; tell whether the tokens ran out behind the first of them."""
        scan = self._scan
        calls: list[ToolCallDraft] = []
        yield from scan.skip()
        in_list = yield from scan.take("[")
        while (yield from scan.skip()) == "{":
            call, start = ToolCallDraft(keys=_PLAIN_KEYS, streams=False), scan.at
            error = yield from self._object(call)
            if error == CUT_OFF and calls:
                scan.at = start
                return calls, True
            if error or call.name not in self._tools:
                return [], False
            calls.append(call)
            end = scan.at
            yield from scan.skip()
            if in_list and (yield from scan.take("]")):
                return calls, False
            if not (yield from scan.take(",")) and (yield from scan.peek()) != "{":
                scan.at = end
                break
        return [] if in_list else calls, False

    def _llama_calls(self, start: int) -> Wait[None]:
        """Read objects with `;` between them; the first that names no tool is text."""
        scan = self._scan
        while True:
            call = ToolCallDraft(keys=_LLAMA_KEYS)
            written = scan.at
            error = yield from self._object(call)
            if call.index < 0:
                self._text(scan.text[start : scan.at])
                return
            if not (yield from self._finish(call, written, error)):
                return
            start = scan.at
            yield from scan.skip()
            yield from scan.take(";", ",")
            if (yield from scan.skip()) != "{":
                scan.at = start
                return


def _openers(tool_format: ToolFormat) -> list[str]:
    """List the tags that may open a call, or look so."""
    tags = [HERMES.trigger, _TOOLS[0], FENCE, tool_format.trigger or _PYTHON_TAG]
    tags += _SILENT.get(tool_format.trigger, ())
    tags += [CALL] if tool_format.trigger == _CALLS else []
    tags += [FUNCTION] if tool_format.style == "qwen_xml" else []
    return list(dict.fromkeys(tags))

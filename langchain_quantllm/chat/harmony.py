"""The parser of gpt-oss's answers, which are messages in channels, as OpenAI's Harmony format has them.

Owns the headers of messages and the end of their bodies. The JSON of a call is read by `tool_calls`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from langchain_quantllm.chat.pieces import TextSpace, ToolCallDraft
from langchain_quantllm.chat.scanner import Wait, held, prefixes
from langchain_quantllm.chat.tool_calls import CallReader, parameters_of
from langchain_quantllm.structured.tool_formats import HARMONY

_START, _CHANNEL, _MESSAGE, _CONSTRAIN = "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"
_ENDS = ("<|end|>", "<|call|>", "<|return|>")
_ROLE = "assistant"
_CHANNELS = ("analysis", "commentary", "final")
_TYPES = ("json", "code", "text")
_MARKS = (*_ENDS, _START, _CHANNEL, _MESSAGE)
_MARK = re.compile("|".join(map(re.escape, _MARKS)))
_BEGUN = prefixes(_MARKS)


class HarmonyParser(CallReader):
    """Reads an answer in parts, with `AnswerParser`'s interface.

    The analysis is reasoning; the final channel, and commentary that calls nothing, are the content. A header that is
    written otherwise ends where it does so: the rest is the message.
    """

    def __init__(
        self, tools: Sequence[Mapping[str, Any]] = (), *, prefix: str = "", hidden: re.Pattern[str] | None = None
    ) -> None:
        """Begin an answer.

        Args:
            tools: The functions that the model may call, as OpenAI's API takes them; without any there are no calls.
            prefix: The prompt, which ends with a message's header, or amid a message that the answer goes on with.
            hidden: Special tokens to leave out, each of which comes within one part.
        """
        super().__init__(HARMONY, parameters_of(tools))
        self._space = TextSpace()
        self._hidden = hidden
        self._has_reasoned = False
        self._apart = ""
        self._steps = self._answer()
        if (start := prefix.rfind(_START)) >= 0:
            self.push(prefix[start:])

    def _answer(self) -> Wait[None]:
        scan = self._scan
        while (yield from scan.peek()):
            written = scan.at
            channel, recipient = yield from self._header()
            if recipient and self._tools:
                yield from self._call(recipient, written)
            else:
                if recipient:
                    self._text(scan.text[written : scan.at])
                yield from self._body("reasoning" if channel == "analysis" else "text")
            if not (yield from scan.take(*_ENDS)) and scan.at == written:
                self._text((yield from scan.take(*_MARKS)))  # one that begins no header
        assert self._space is not None
        self._emit("text", self._space.end())

    def _header(self) -> Wait[tuple[str, str]]:
        """Read a message's header, as far as it is one; returns its channel and its recipient."""
        scan = self._scan
        channel = recipient = ""
        if (yield from scan.take(_START)):
            yield from scan.take(_ROLE)
        while True:
            start = scan.at
            yield from scan.skip(" ")
            if (yield from scan.take(_MESSAGE)):
                return channel, recipient
            if not channel and (yield from scan.take(_CHANNEL)):
                channel = yield from scan.take(*_CHANNELS)
                if channel:
                    continue
            elif not recipient and (yield from scan.take("to=")):
                recipient = yield from scan.word()
                if recipient:
                    continue
            elif ((yield from scan.take(_CONSTRAIN)) or recipient) and (yield from scan.take(*_TYPES)):
                continue
            scan.at = start
            return channel, recipient

    def _body(self, kind: str) -> Wait[None]:
        """Emit a message to its end."""
        scan = self._scan
        self._divide()
        while True:
            found = _MARK.search(scan.text, scan.at)
            rest = scan.text[scan.at : found.start()] if found else scan.text[scan.at :]
            text = rest if found or scan.ended else rest[: len(rest) - held(rest, _BEGUN)]
            scan.at += len(text)
            if text and kind == "reasoning":
                self._emit(kind, self._apart + text)
                self._has_reasoned, self._apart = True, ""
            elif text:
                self._text(text)
            if found and found.group() == _MESSAGE:  # one that belongs to no header
                scan.at = found.end()
                self._divide()
            elif found or not (yield from scan.more()):
                return

    def _divide(self) -> None:
        """Keep the next text or reasoning apart from those before it."""
        assert self._space is not None
        self._space.divide()
        self._apart = "\n" if self._has_reasoned else ""

    def _call(self, recipient: str, written: int) -> Wait[None]:
        """Read the arguments of a call from behind its header."""
        scan = self._scan
        call = ToolCallDraft(name=recipient.removeprefix("functions."))
        self._name(call)
        call.start = scan.at
        yield from scan.skip()
        error = yield from self._arguments(call)
        yield from self._finish(call, written, error, "", *_ENDS, _START, _CHANNEL)

"""The parser of answers by a tokenizer's own response template.

Owns the translation of transformers' events into pieces. `output_parser` reads answers without such a template.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from langchain_quantllm.chat.notations import JSON_FAILURES, checked
from langchain_quantllm.chat.pieces import Piece, TextSpace
from langchain_quantllm.chat.scanner import CUT_OFF

_CALLS = "tool_calls"
_WHOLE_OR_NOT = ("json", "python-call-list")
"""Notations of transformers' templates that cannot be read where a part is missing."""
_KINDS = {"content": "text", "thinking": "reasoning", "reasoning": "reasoning", "reasoning_content": "reasoning"}


class TemplateParser:
    """Reads an answer by a tokenizer's response template, with `AnswerParser`'s interface.

    Calls come whole, when they end. A call that transformers cannot read becomes an invalid piece, as does one whose
    end is missing. What the template's patterns leave out of a call is left out.
    """

    def __init__(self, tokenizer: Any, prefix: str, tools: Sequence[Mapping[str, Any]] = ()) -> None:
        """Begin an answer.

        Args:
            tokenizer: A tokenizer that has a response template.
            prefix: The prompt, which may open a region.
            tools: The functions that the model may call, as OpenAI's API takes them.
        """
        self._tokenizer = tokenizer
        self._tools = [dict(tool) for tool in tools] or None
        self._prefix = prefix
        self._calls = 0
        self._end_marks = _end_marks(tokenizer)
        self._restart(prefix)
        self._spaces = {"text": TextSpace(), "reasoning": TextSpace()}
        self._shown = False  # whether some of the region has been

    def push(self, text: str) -> list[Piece]:
        """Take the next part of the answer and return the pieces that have become certain."""
        pieces: list[Piece] = []
        while text:
            given, read = self._feed(text)
            pieces += given
            text = text[read:]
        return pieces

    def finish(self) -> list[Piece]:
        """End the answer and return the rest of its pieces."""
        text = "".join(self._fed)
        is_cut = bool(self._end_marks) and not text.endswith(self._end_marks)
        try:
            _, events = self._parser.finalize()
        except Exception as error:  # a template's patterns and readers may raise any
            return [self._invalid(CUT_OFF if is_cut else error)]
        pieces = self._pieces(events[:-1])
        if is_cut and events and (events[-1]["field"], events[-1]["type"]) == (_CALLS, "region_close"):
            return [*pieces, self._invalid(CUT_OFF)]
        return [*pieces, *self._pieces(events[-1:])]

    def _restart(self, prefix: str) -> None:
        self._prefix = prefix
        self._parser = self._tokenizer.get_response_parser(prefix=prefix, tools=self._tools)
        self._fed: list[str] = []
        self._body: list[str] = []  # of the region being read

    def _feed(self, text: str) -> tuple[list[Piece], int]:
        try:
            events = self._parser.feed(text)
        except Exception:
            return self._feed_slowly(text)
        self._fed.append(text)
        return self._pieces(events), len(text)

    def _feed_slowly(self, text: str) -> tuple[list[Piece], int]:
        """Find the character at which a region fails: its error has lost the events before it."""
        parser = self._tokenizer.get_response_parser(prefix=self._prefix, tools=self._tools)
        parser.feed("".join(self._fed))
        pieces: list[Piece] = []
        for read, character in enumerate(text, 1):
            try:
                events = parser.feed(character)
            except Exception as error:
                pieces.append(self._invalid(error))
                self._restart("")  # behind the region
                return pieces, read
            pieces += self._pieces(events)
        self._parser = parser
        self._fed.append(text)
        return pieces, len(text)

    def _pieces(self, events: Sequence[Mapping[str, Any]]) -> list[Piece]:
        pieces: list[Piece] = []
        for event in events:
            kind = _KINDS.get(event["field"], "")
            if event["type"] == "region_open":
                self._body, self._shown = [], False
                for space in self._spaces.values():
                    space.divide()
            elif event["type"] == "region_chunk":
                self._body.append(event["text"])
                if kind and not event.get("dirty"):
                    pieces += self._texts(kind, event["text"])
            elif event["field"] == _CALLS:
                pieces += self._called(event["value"])
            elif kind and not self._shown and event["value"]:
                value = event["value"]  # of a region that comes at its end
                pieces += self._texts(kind, value if isinstance(value, str) else json.dumps(value))
        return pieces

    def _texts(self, kind: str, text: str) -> list[Piece]:
        """Show the next text of a region, without the space around the region; regions of a kind are kept apart."""
        shown = self._spaces[kind].add(text)
        self._shown = self._shown or bool(shown)
        return [Piece(kind=kind, text=shown)] if shown else []

    def _called(self, value: Any) -> list[Piece]:
        if isinstance(value, list):
            return [piece for item in value for piece in self._called(item)]
        function = value.get("function", value) if isinstance(value, Mapping) else {}
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str) or not name:
            return [self._invalid("it has no name")]
        arguments = function.get("arguments")
        try:
            text = arguments if isinstance(arguments, str) else json.dumps(arguments or {}, ensure_ascii=False)
            text = checked(text)
        except (TypeError, *JSON_FAILURES) as error:
            return [self._invalid(error)]
        index, self._calls = self._calls, self._calls + 1
        return [Piece(kind="call", text=name, index=index), Piece(kind="arguments", text=text, index=index)]

    def _invalid(self, error: object) -> Piece:
        index, self._calls = self._calls, self._calls + 1
        message = str(error).partition("\n")[0] or type(error).__name__
        return Piece(kind="invalid", text="".join(self._body).strip(), index=index, error=message)


def _end_marks(tokenizer: Any) -> tuple[str, ...]:
    """Return the texts of which one must end a call, as it may lack arguments otherwise.

    None where the calls' notation tells, where calls have no mark, or one that may be a token of the end, which no text
    shows.
    """
    template = getattr(tokenizer, "response_template", None)
    fields = template.get("fields") if isinstance(template, Mapping) else None
    field = fields.get(_CALLS) if isinstance(fields, Mapping) else None
    if not isinstance(field, Mapping) or field.get("content") in _WHOLE_OR_NOT:
        return ()
    close = field.get("close") or ()
    marks = (close,) if isinstance(close, str) else tuple(close)
    return () if set(marks) & set(tokenizer.all_special_tokens) else marks

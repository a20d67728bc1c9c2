"""From the pieces of an answer to LangChain's messages.

Owns what becomes of text, reasoning and tool calls, whole and in a stream. Knows no model and no template.
"""

from __future__ import annotations

import json
import secrets
import string
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from langchain_core.messages import AIMessage, AIMessageChunk, InvalidToolCall, ToolCall
from langchain_core.messages.tool import ToolCallChunk, invalid_tool_call, tool_call, tool_call_chunk

from langchain_quantllm.chat.output_parser import Piece

_ID_LETTERS = string.ascii_letters + string.digits


@dataclass
class _Call:
    id: str
    name: str | None = None
    arguments: str = ""
    error: str | None = None


class Reply:
    """One answer on its way to a message. Give it pieces, and take a chunk for each lot or the message at the end."""

    def __init__(self, *, parallel: bool = True) -> None:
        """Begin with nothing said.

        Args:
            parallel: Whether there may be several calls; without, those after the first are dropped.
        """
        self._parallel = parallel
        self._text = ""
        self._reasoning = ""
        self._calls: dict[int, _Call] = {}

    @property
    def has_calls(self) -> bool:
        """Whether a call was read, a wrong one included."""
        return bool(self._calls)

    def add(self, pieces: Iterable[Piece]) -> AIMessageChunk | None:
        """Take pieces, and give what they add to the message; None if nothing."""
        text, reasoning = "", ""
        chunks: dict[int, ToolCallChunk] = {}
        for piece in pieces:
            if piece.kind == "text":
                text += piece.text
            elif piece.kind == "reasoning":
                reasoning += piece.text
            elif self._parallel or not piece.index:
                chunk = self._add_to_call(piece)
                if begun := chunks.get(piece.index):  # LangChain joins those of several chunks, but not of one
                    begun["args"] = (begun["args"] or "") + (chunk["args"] or "")
                    begun["name"] = begun["name"] or chunk["name"]
                else:
                    chunks[piece.index] = chunk
        self._text += text
        self._reasoning += reasoning
        if not (text or reasoning or chunks):
            return None
        return AIMessageChunk(
            content=text,
            additional_kwargs={"reasoning_content": reasoning} if reasoning else {},
            tool_call_chunks=list(chunks.values()),
        )

    def _add_to_call(self, piece: Piece) -> ToolCallChunk:
        known = self._calls.get(piece.index)
        # Nine letters and digits: what the strictest templates take for an id.
        call = known or _Call("".join(secrets.choice(_ID_LETTERS) for _ in range(9)))
        self._calls[piece.index] = call
        call_id = None if known else call.id
        if piece.kind == "call":
            call.name = piece.text
            return tool_call_chunk(name=piece.text, args="", id=call_id, index=piece.index)
        if piece.kind == "arguments":
            call.arguments += piece.text
            return tool_call_chunk(name=None, args=piece.text, id=call_id, index=piece.index)
        call.error = piece.error
        given, call.arguments = call.arguments, piece.text
        rest = piece.text.removeprefix(given) if piece.text.startswith(given) else ""
        return tool_call_chunk(name=None, args=rest + _breaking(given + rest), id=call_id, index=piece.index)

    def message(self, **fields: Any) -> AIMessage:
        """Give the whole message.

        Args:
            **fields: Further fields of the message, such as `usage_metadata`.
        """
        calls: list[ToolCall] = []
        invalid: list[InvalidToolCall] = []
        for call in self._calls.values():
            error = call.error
            arguments = None
            if error is None:
                try:
                    arguments = json.loads(call.arguments or "{}", strict=False)
                except ValueError as reason:
                    error = str(reason)
            if error is None and isinstance(arguments, dict):
                calls.append(tool_call(name=call.name or "", args=arguments, id=call.id))
            else:
                error = error or "the arguments are no JSON object"
                invalid.append(invalid_tool_call(name=call.name, args=call.arguments, id=call.id, error=error))
        return AIMessage(
            content=self._text,
            additional_kwargs={"reasoning_content": self._reasoning} if self._reasoning else {},
            tool_calls=calls,
            invalid_tool_calls=invalid,
            **fields,
        )


def _breaking(arguments: str) -> str:
    """Give an end that keeps arguments from being read.

    LangChain closes what was cut off in a stream, and would make a valid call of half of one: a bracket that closes
    nothing is what it gives up at.
    """
    stack = []
    in_string = escaped = False
    for char in arguments:
        if in_string:
            in_string = escaped or char != '"'
            escaped = not escaped and char == "\\"
        elif char == '"':
            in_string = True
        elif char in "{[":
            stack.append("}" if char == "{" else "]")
        elif char in "}]" and stack:
            stack.pop()
    closing = "}" if stack and stack[-1] == "]" else "]"
    return ("\\" if escaped else "") + ('"' if in_string else "") + closing

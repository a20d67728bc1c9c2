"""LangChain's results of a call: messages and chunks, from the engine's chunks through the parser's pieces.

Owns the messages' fields for text, reasoning, tool calls and metadata. Knows no model and no template.
"""

from __future__ import annotations

import json
import secrets
import string
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from langchain_core.messages import AIMessage, AIMessageChunk, InvalidToolCall, ToolCall
from langchain_core.messages.tool import ToolCallChunk, invalid_tool_call, tool_call, tool_call_chunk
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult

from langchain_quantllm.chat.notations import JSON_FAILURES
from langchain_quantllm.chat.pieces import Piece
from langchain_quantllm.engine.request import Request
from langchain_quantllm.engine.result import Answer, Answers, completion_info
from langchain_quantllm.engine.stream import Chunk

_ID_LETTERS = string.ascii_letters + string.digits
_COUNTS = ("prompt_tokens", "completion_tokens", "total_tokens")


@dataclass
class _Call:
    id: str
    name: str | None = None
    parts: list[str] = field(default_factory=list)  # of the arguments
    error: str | None = None


class MessageBuilder:
    """Builds the message of one answer from its pieces, chunk by chunk or whole."""

    def __init__(self, *, parallel: bool = True) -> None:
        """Begin an empty message.

        Args:
            parallel: Whether there may be several calls; without, calls after the first are dropped.
        """
        self._parallel = parallel
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._calls: dict[int, _Call] = {}

    @property
    def has_calls(self) -> bool:
        """Whether there is a call, valid or not."""
        return bool(self._calls)

    def add(self, pieces: Iterable[Piece]) -> AIMessageChunk | None:
        """Add pieces and return them as a chunk; None if they add nothing."""
        text, reasoning = "", ""
        chunks: dict[int, ToolCallChunk] = {}
        for piece in pieces:
            if piece.kind == "text":
                text += piece.text
            elif piece.kind == "reasoning":
                reasoning += piece.text
            elif self._parallel or not piece.index:
                chunk = self._add_to_call(piece)
                if begun := chunks.get(piece.index):  # LangChain joins a call's parts over chunks, not within one
                    begun["args"] = (begun["args"] or "") + (chunk["args"] or "")
                    begun["name"] = begun["name"] or chunk["name"]
                else:
                    chunks[piece.index] = chunk
        self._text.append(text)
        self._reasoning.append(reasoning)
        if not (text or reasoning or chunks):
            return None
        return AIMessageChunk(
            content=text,
            additional_kwargs={"reasoning_content": reasoning} if reasoning else {},
            tool_call_chunks=list(chunks.values()),
        )

    def _add_to_call(self, piece: Piece) -> ToolCallChunk:
        known = self._calls.get(piece.index)
        # Nine letters and digits: the strictest templates take no other id.
        call = known or _Call("".join(secrets.choice(_ID_LETTERS) for _ in range(9)))
        self._calls[piece.index] = call
        call_id = None if known else call.id
        if piece.kind == "call":
            call.name = piece.text
            return tool_call_chunk(name=piece.text, args="", id=call_id, index=piece.index)
        if piece.kind == "arguments":
            call.parts.append(piece.text)
            return tool_call_chunk(name=None, args=piece.text, id=call_id, index=piece.index)
        call.error = piece.error
        given, call.parts = "".join(call.parts), [piece.text]
        rest = piece.text.removeprefix(given) if piece.text.startswith(given) else ""
        return tool_call_chunk(name=None, args=rest + _breaking(given + rest), id=call_id, index=piece.index)

    def message(self, **fields: Any) -> AIMessage:
        """Return the whole message.

        Args:
            **fields: Further fields of the message, such as `usage_metadata`.
        """
        calls: list[ToolCall] = []
        invalid: list[InvalidToolCall] = []
        for call in self._calls.values():
            error = call.error
            written = "".join(call.parts)
            arguments = None
            if error is None:
                try:
                    arguments = json.loads(written or "{}", strict=False)
                except JSON_FAILURES as reason:
                    error = str(reason)
            if error is None and isinstance(arguments, dict):
                calls.append(tool_call(name=call.name or "", args=arguments, id=call.id))
            else:
                error = error or "the arguments are not a JSON object"
                invalid.append(invalid_tool_call(name=call.name, args=written, id=call.id, error=error))
        reasoning = "".join(self._reasoning)
        return AIMessage(
            content="".join(self._text),
            additional_kwargs={"reasoning_content": reasoning} if reasoning else {},
            tool_calls=calls,
            invalid_tool_calls=invalid,
            **fields,
        )


def _breaking(arguments: str) -> str:
    """Make an end that keeps arguments from being read.

    LangChain closes the open brackets of a streamed call, and would make a valid call of half of one. A bracket that
    closes nothing stops it.
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


class ResultReader:
    """Reads one answer of the engine into LangChain's results."""

    def __init__(self, parser: Any, tokenizer: Any, model_name: str, *, parallel: bool) -> None:
        """Begin an answer.

        Args:
            parser: Its `AnswerParser` or `TemplateParser`.
            tokenizer: Gives the texts of tokens.
            model_name: The model, for the metadata.
            parallel: Whether there may be several calls.
        """
        self._parser = parser
        self._tokenizer = tokenizer
        self._model_name = model_name
        self._builder = MessageBuilder(parallel=parallel)

    def whole(self, answer: Answer) -> ChatGeneration:
        """Read a whole answer."""
        self._builder.add([*self._parser.push(answer.text), *self._parser.finish()])
        usage, metadata = self._last(completion_info(answer, answer.request, self._tokenizer, self._model_name))
        message = self._builder.message(usage_metadata=usage, response_metadata=metadata)
        return ChatGeneration(message=message, generation_info=metadata)

    def chunks(self, chunk: Chunk, request: Request) -> list[ChatGenerationChunk]:
        """Read the next chunk of an answer; the last one gives the metadata a chunk of its own."""
        chunks = []
        ended = chunk.finish_reason is not None
        message = self._builder.add(self._parser.push(chunk.text) + (self._parser.finish() if ended else []))
        info = completion_info(chunk, request, self._tokenizer, self._model_name)
        if info and not ended:
            message = message or AIMessageChunk(content="")
            message.response_metadata = info
        if message is not None:
            chunks.append(ChatGenerationChunk(message=message))
        if ended:
            usage, metadata = self._last(info)
            last = AIMessageChunk(content="", usage_metadata=usage, response_metadata=metadata, chunk_position="last")
            chunks.append(ChatGenerationChunk(message=last, generation_info=metadata))
        return chunks

    def _last(self, info: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Take the usage out of the completion's description, and name calls as the reason for its end."""
        usage = info.pop("usage_metadata", None)
        if info.get("finish_reason") == "stop" and self._builder.has_calls:
            info["finish_reason"] = "tool_calls"
        return usage, {**info, "model_provider": "quantllm"}


def chat_result(answers: Answers, new_reader: Callable[[], ResultReader], model_name: str) -> ChatResult:
    """Read all answers of a call, which share its prompt."""
    usages = [answer.usage for answer in answers.rows if answer.usage]
    prompt_tokens = usages[0].prompt_tokens if usages else 0
    completion_tokens = sum(usage.completion_tokens for usage in usages)
    counts = dict(zip(_COUNTS, (prompt_tokens, completion_tokens, prompt_tokens + completion_tokens), strict=True))
    return ChatResult(
        generations=[new_reader().whole(answer) for answer in answers.rows],
        llm_output={"model_name": model_name, "token_usage": counts},
    )


def combined_output(outputs: Iterable[dict[str, Any] | None], model_name: str) -> dict[str, Any]:
    """Add up the token counts of several calls' `llm_output`."""
    usages = [output["token_usage"] for output in outputs if output]
    return {"model_name": model_name, "token_usage": {name: sum(u[name] for u in usages) for name in _COUNTS}}

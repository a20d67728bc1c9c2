"""The answers of `/v1/chat/completions`."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from langchain_core.messages import AIMessage, AIMessageChunk

from langchain_quantllm.base.aside import run_aside
from langchain_quantllm.engine.result import Answer
from langchain_quantllm.engine.stream import Chunk
from langchain_quantllm.server.completions import joined
from langchain_quantllm.server.fields import ChatBody
from langchain_quantllm.server.logprobs import TokenTexts, chat_logprobs
from langchain_quantllm.server.usage import UsageCount


class _Answer:
    """One request's answer in the making."""

    def __init__(self, body: ChatBody, plan: Any, name: str, kind: str) -> None:
        self._body = body
        self._plan = plan
        self._texts = TokenTexts(plan.tokenizer, as_ids=bool(body.return_tokens_as_token_ids))
        self._readers = [plan.new_reader() for _ in plan.requests]
        self.usage = UsageCount(plan.options.n)
        self._frame = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "object": kind,
            "created": int(time.time()),
            "model": name,
        }

    def framed(self, choices: Sequence[dict[str, Any]], usage: dict[str, Any] | None, **more: Any) -> dict[str, Any]:
        return {**self._frame, "choices": list(choices), "usage": usage, **more}

    @property
    def prompt_ids(self) -> dict[str, list[int]]:
        """The prompt's token ids, if they were asked for."""
        return {"prompt_token_ids": list(self._plan.requests[0].prompt_ids)} if self._body.return_token_ids else {}

    def _beside(self, chunk: Chunk) -> dict[str, Any]:
        """What stands beside the text of a chunk."""
        self.usage.add(chunk)
        made: dict[str, Any] = {"logprobs": None}
        if self._body.logprobs:
            made["logprobs"] = chat_logprobs(chunk.logprobs, self._texts)
        if self._body.return_token_ids:
            made["token_ids"] = list(chunk.token_ids)
        return made

    def choice(self, chunk: Chunk) -> dict[str, Any]:
        """Write a whole answer as a choice."""
        request = self._plan.requests[chunk.row]
        answer = Answer(request, chunk.text, list(chunk.logprobs), chunk.finish_reason, chunk.usage)
        read = self._readers[chunk.row].whole(answer)
        reason = read.message.response_metadata.get("finish_reason")
        message = {"role": "assistant", **_message(read.message)}
        return {"index": chunk.row, "message": message, "finish_reason": reason, **self._beside(chunk)}

    def begin(self) -> list[dict[str, Any]]:
        """Write the first delta of each answer."""
        return [
            {"index": row, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
            for row in range(len(self._plan.requests))
        ]

    def deltas(self, chunk: Chunk) -> list[dict[str, Any]]:
        """Write a chunk as choices with a delta, none if nothing of it can be told yet."""
        beside = self._beside(chunk)
        made = []
        for read in self._readers[chunk.row].chunks(chunk, self._plan.requests[chunk.row]):
            assert isinstance(read.message, AIMessageChunk)
            reason = read.message.response_metadata.get("finish_reason")
            delta = _delta(read.message)
            if delta or reason:
                made.append({"index": chunk.row, "delta": delta, "logprobs": None, "finish_reason": reason})
        if not made and (beside["logprobs"] or beside.get("token_ids")):
            made.append({"index": chunk.row, "delta": {}, "logprobs": None, "finish_reason": None})
        for i, choice in enumerate(made):
            # The tokens stand with the first.
            choice |= beside if i == 0 else {name: [] for name in beside if name == "token_ids"}
        return made


def _message(message: Any) -> dict[str, Any]:
    """Write an answer as OpenAI's message."""
    assert isinstance(message, AIMessage)
    calls = [
        *((call["id"], call["name"], json.dumps(call["args"], ensure_ascii=False)) for call in message.tool_calls),
        *((call["id"], call["name"] or "", call["args"] or "") for call in message.invalid_tool_calls),
    ]
    made: dict[str, Any] = {"content": str(message.content) or (None if calls else ""), "refusal": None}
    if reasoning := message.additional_kwargs.get("reasoning_content"):
        made["reasoning_content"] = reasoning
    if calls:
        made["tool_calls"] = [
            {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
            for call_id, name, arguments in calls
        ]
    return made


def _delta(message: AIMessageChunk) -> dict[str, Any]:
    """Write a chunk of an answer as a delta."""
    made: dict[str, Any] = {"content": message.content} if message.content else {}
    if reasoning := message.additional_kwargs.get("reasoning_content"):
        made["reasoning_content"] = reasoning
    if message.tool_call_chunks:
        made["tool_calls"] = [
            {
                "index": call["index"],
                **({"id": call["id"], "type": "function"} if call["id"] else {}),
                "function": {
                    **({"name": call["name"]} if call["name"] else {}),
                    "arguments": call["args"] or "",
                },
            }
            for call in message.tool_call_chunks
        ]
    return made


def whole_chat(body: ChatBody, plan: Any, chunks: Sequence[Chunk], name: str) -> dict[str, Any]:
    """Write the answer of all chunks.

    Args:
        body: The request.
        plan: Its call, with `new_reader`.
        chunks: All chunks.
        name: The model's name in the answer.
    """
    answer = _Answer(body, plan, name, "chat.completion")
    choices = [answer.choice(chunk) for chunk in joined(chunks, len(plan.requests))]
    return answer.framed(choices, answer.usage.total(), **answer.prompt_ids)


async def chat_events(
    body: ChatBody, plan: Any, chunks: AsyncIterator[Chunk], name: str
) -> AsyncIterator[dict[str, Any]]:
    """Write the chunks as events, as they come; see `whole_chat`."""
    answer = await run_aside(_Answer, body, plan, name, "chat.completion.chunk")
    for choice in answer.begin():
        yield answer.framed([choice], None, **answer.prompt_ids)
    async for chunk in chunks:
        is_long = chunk.finish_reason is not None or len(chunk.logprobs) > _FEW
        choices = await run_aside(answer.deltas, chunk) if is_long else answer.deltas(chunk)
        for choice in choices:
            yield answer.framed([choice], None)
    if body.includes_usage:
        yield answer.framed([], answer.usage.total())


_FEW = 16
"""Log probabilities of a chunk that are written on the event loop."""

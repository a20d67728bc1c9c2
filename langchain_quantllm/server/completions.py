"""The answers of `/v1/completions`."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from langchain_quantllm.base import PreparedCall
from langchain_quantllm.base.aside import run_aside
from langchain_quantllm.engine.stream import Chunk
from langchain_quantllm.server.fields import CompletionBody
from langchain_quantllm.server.logprobs import TokenTexts, completion_logprobs
from langchain_quantllm.server.usage import UsageCount


class _Answer:
    """One request's answer in the making."""

    def __init__(self, body: CompletionBody, plan: PreparedCall, name: str) -> None:
        self._body = body
        self._plan = plan
        self._texts = TokenTexts(plan.tokenizer, as_ids=bool(body.return_tokens_as_token_ids))
        self._offsets = [0] * len(plan.requests)
        self._has_prompt = [False] * len(plan.requests)
        self.usage = UsageCount(plan.options.n)
        self._frame = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": name,
        }

    def framed(self, choices: Sequence[dict[str, Any]], usage: dict[str, Any] | None) -> dict[str, Any]:
        return {**self._frame, "choices": list(choices), "usage": usage}

    def choice(self, chunk: Chunk) -> dict[str, Any]:
        """Write a chunk as a choice."""
        self.usage.add(chunk)
        made: dict[str, Any] = {
            "index": chunk.row,
            "text": chunk.text,
            "logprobs": None,
            "finish_reason": chunk.finish_reason,
        }
        if (wanted := self._body.logprobs) is not None:
            made["logprobs"] = completion_logprobs(chunk.logprobs, self._texts, self._offsets[chunk.row], wanted)
            self._offsets[chunk.row] += sum(map(len, made["logprobs"]["tokens"]))
        if self._body.return_token_ids:
            made["token_ids"] = list(chunk.token_ids)
            if not self._has_prompt[chunk.row]:
                made["prompt_token_ids"] = list(self._plan.requests[chunk.row].prompt_ids)
                self._has_prompt[chunk.row] = True
        return made


def whole_completion(body: CompletionBody, plan: PreparedCall, chunks: Sequence[Chunk], name: str) -> dict[str, Any]:
    """Write the answer of all chunks.

    Args:
        body: The request.
        plan: Its call.
        chunks: All chunks.
        name: The model's name in the answer.
    """
    answer = _Answer(body, plan, name)
    choices = [answer.choice(chunk) for chunk in joined(chunks, len(plan.requests))]
    return answer.framed(choices, answer.usage.total())


async def completion_events(
    body: CompletionBody, plan: PreparedCall, chunks: AsyncIterator[Chunk], name: str
) -> AsyncIterator[dict[str, Any]]:
    """Write the chunks as events, as they come; see `whole_completion`."""
    answer = _Answer(body, plan, name)
    async for chunk in chunks:
        choice = await run_aside(answer.choice, chunk) if len(chunk.logprobs) > _FEW else answer.choice(chunk)
        yield answer.framed([choice], None)
    if body.includes_usage:
        yield answer.framed([], answer.usage.total())


_FEW = 16
"""Log probabilities of a chunk that are written on the event loop."""


def joined(chunks: Sequence[Chunk], rows: int) -> list[Chunk]:
    """Join the chunks of each sequence, in the sequences' order."""
    parts: list[list[Chunk]] = [[] for _ in range(rows)]
    for chunk in chunks:
        parts[chunk.row].append(chunk)
    return [
        Chunk(
            row=row,
            text="".join(c.text for c in own),
            token_ids=tuple(i for c in own for i in c.token_ids),
            logprobs=tuple(p for c in own for p in c.logprobs),
            finish_reason=own[-1].finish_reason,
            usage=own[-1].usage,
        )
        for row, own in enumerate(parts)
    ]

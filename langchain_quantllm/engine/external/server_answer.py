"""One answer of a server, as it comes: its tokens into a completion, its errors into exceptions.

Knows the protocol's parts of an answer; no queue and no retries. Belongs to one event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from langchain_quantllm.engine.detokenizer import Completion
from langchain_quantllm.engine.external.loop_engine import StreamTasks
from langchain_quantllm.engine.external.server_client import LostAnswerError, ServerClient
from langchain_quantllm.engine.external.server_fit import ServerFit
from langchain_quantllm.engine.stream import Chunk, TokenLogprob
from langchain_quantllm.errors import ServerError

_REST_S = 2.0
"""Longest wait for the counts behind an answer."""


class Answer:
    """One answer of the server, as it comes."""

    def __init__(self, completion: Completion, tasks: StreamTasks, fit: ServerFit, tokenizer: Any) -> None:
        """Begin with nothing of it.

        Args:
            completion: What becomes of its tokens.
            tasks: Those of the completion's stream.
            fit: What the server gives.
            tokenizer: Ours, for a server that gives no token ids.
        """
        self._completion = completion
        self._stream = completion.stream
        self._tasks = tasks
        self._fit = fit
        self._tokenizer = tokenizer
        self._last: Chunk | None = None
        """The last chunk, held back until the server has told how many tokens it had cached."""
        self._cached_tokens = 0
        self._own_count: int | None = None
        """Tokens of the whole text by the server's count, where it gives no ids."""
        self.has_begun = False
        """Whether tokens have come, so that the request is not to be sent again."""

    async def read(self, client: ServerClient, body: Mapping[str, Any]) -> None:
        """Send the request and read the answer to its end.

        Raises:
            LostAnswerError: If it failed in a way that may be different next time.
            ServerError: If the server failed, or its answer has no end.
        """
        events = client.events(body)
        try:
            while (part := await self._next(events)) is not None:
                if self._read_part(part):
                    break
                await self._tasks.wait_for_reader()  # then the server waits as well
        except (LostAnswerError, ServerError):
            if self._completion.finish_reason is None:
                raise
        finally:
            await events.aclose()  # ends the connection of an answer that is not read on
        if self._completion.finish_reason is None:
            raise LostAnswerError(ServerError("the server has ended an answer without its last part; look at its log."))
        self._put_last()

    async def _next(self, events: AsyncGenerator[Mapping[str, Any], None]) -> Mapping[str, Any] | None:
        """Read the next part; None at the end. An answer that is complete waits but a moment for what is behind it."""
        if self._completion.finish_reason is None:
            return await anext(events, None)
        with contextlib.suppress(asyncio.TimeoutError):
            return await asyncio.wait_for(anext(events, None), _REST_S)
        return None

    def _read_part(self, part: Mapping[str, Any]) -> bool:
        """Take a part of the answer; returns True if no more of it is wanted."""
        usage = part.get("usage")
        if isinstance(usage, Mapping):
            details = usage.get("prompt_tokens_details")
            cached = details.get("cached_tokens") if isinstance(details, Mapping) else None
            self._cached_tokens = cached if isinstance(cached, int) else 0
            count = usage.get("completion_tokens")
            self._own_count = count if isinstance(count, int) and not self._fit.gives_ids else None
        choices = part.get("choices")
        if not choices:
            self._put_last()
            return False
        choice = choices[0] if isinstance(choices, list) else None
        if not isinstance(choice, Mapping):
            msg = f"the server sends a part of an answer that is none: {str(part)[:100]!r}."
            raise ServerError(msg)
        if self._completion.finish_reason is not None:
            return False
        reason = choice.get("finish_reason")
        chunk = self._push_ids(choice) if self._fit.gives_ids else self._push_text(choice)
        if self._completion.finish_reason is None and reason is not None:
            if reason not in ("stop", "length"):
                msg = f"the server has ended the answer with {str(reason)[:40]!r}; look at its log."
                raise ServerError(msg)
            chunk = self._completion.finish(reason)
        if self._completion.finish_reason is None:
            if chunk is not None:
                self._put(chunk)
            return False
        self._last = chunk
        return reason is None  # ended here, by a stop string: the server would go on

    def _push_ids(self, choice: Mapping[str, Any]) -> Chunk | None:
        ids = choice.get("token_ids") or []
        logprobs = self._logprobs(choice, ids)
        completion = self._completion
        for token_id, logprob in zip(ids, logprobs, strict=True):
            if not isinstance(token_id, int):
                msg = f"the server sends {str(token_id)[:40]!r} in place of a token id."
                raise ServerError(msg)
            self.has_begun = True
            chunk = completion.push(token_id, logprob)
            if completion.finish_reason is not None:
                return chunk
            if chunk is not None:
                self._put(chunk)
        return None

    def _push_text(self, choice: Mapping[str, Any]) -> Chunk | None:
        text = choice.get("text")
        if not isinstance(text, str):
            msg = "the server sends a part of an answer without a text."
            raise ServerError(msg)
        if not text:
            return None
        self.has_begun = True
        return self._completion.push_text(text, self._tokenizer.encode(text, add_special_tokens=False))

    def _logprobs(self, choice: Mapping[str, Any], ids: Sequence[int]) -> Sequence[TokenLogprob | None]:
        wanted = self._completion.request.options.logprobs
        if wanted is None:
            return [None] * len(ids)
        try:
            given = choice["logprobs"]
            chosen, tops = given["token_logprobs"], given.get("top_logprobs") or [{}] * len(ids)
            return [
                TokenLogprob(token_id=token_id, logprob=float(logprob), top=_top(top or {}, wanted))
                for token_id, logprob, top in zip(ids, chosen, tops, strict=True)
            ]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            msg = f"the server sends log probabilities that are none: {str(choice.get('logprobs'))[:100]!r}."
            raise ServerError(msg) from error

    def _put_last(self) -> None:
        last, self._last = self._last, None
        if last is not None:
            self._put(last)

    def _put(self, chunk: Chunk) -> None:
        if chunk.usage is not None:
            usage = replace(chunk.usage, cached_tokens=self._cached_tokens)
            if self._own_count is not None:
                usage = replace(usage, completion_tokens=self._own_count)
            chunk = replace(chunk, usage=usage)
        self._stream.put(chunk)


def _top(given: Mapping[str, float], wanted: int) -> tuple[tuple[int, float], ...]:
    """Read alternatives, written as `token_id:7`, best first."""
    pairs = [(int(name.removeprefix("token_id:")), float(logprob)) for name, logprob in given.items()]
    return tuple(sorted(pairs, key=lambda pair: -pair[1])[:wanted])

"""Talking to an OpenAI-compatible server: requests, retries, and its errors in one sentence each.

Knows HTTP and the protocol's JSON; no tokenizer and no completion. Belongs to one event loop.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import httpx

from langchain_quantllm.engine.external.events import EventReader
from langchain_quantllm.engine.external.server_options import API_KEY_VARIABLE, ServerOptions
from langchain_quantllm.errors import InvalidOptionError, PromptTooLongError, QueueFullError, ServerError, first_line

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.25, 20.0
_MOST_ERROR_BYTES = 64 << 10
_RETRIED = (408, 425, 429, 500, 502, 503, 504)
_LOST = "the server has ended the connection amid an answer"


class LostAnswerError(Exception):
    """An attempt that may be made again: the error that it is to end with, and the pause that the server asked for."""

    def __init__(self, error: ServerError | QueueFullError, pause_s: float | None = None) -> None:
        """Hold the error."""
        super().__init__(str(error))
        self.error = error
        self.pause_s = pause_s


class ServerClient:
    """One server, and the connections to it."""

    def __init__(self, server: ServerOptions) -> None:
        """Connect to nothing yet; made on the event loop that uses it.

        Args:
            server: The options.
        """
        self._server = server
        key = server.key_in_use
        self._root = server.url.removesuffix("/v1")
        read_s = server.read_timeout_s
        self._client = httpx.AsyncClient(
            headers={
                "User-Agent": "langchain-quantllm",
                "Accept-Encoding": "identity",  # a compressed stream comes late
                **({} if key is None else {"Authorization": f"Bearer {key}"}),
            },
            verify=server.url.startswith("https:"),  # certificates take time to read
            timeout=httpx.Timeout(connect=server.connect_timeout_s, read=read_s, write=read_s, pool=None),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=server.max_connections),
        )

    async def close(self) -> None:
        """End all connections."""
        await self._client.aclose()

    # Whole answers.

    async def models(self) -> list[Mapping[str, Any]]:
        """List the server's models, as their cards.

        Raises:
            ServerError: If it does not answer, or not with a list of models.
        """
        answer = await self._whole("GET", f"{self._server.url}/models")
        cards = answer.get("data") if isinstance(answer, Mapping) else None
        if not isinstance(cards, list) or not all(
            isinstance(c, Mapping) and isinstance(c.get("id"), str) for c in cards
        ):
            msg = f"{self._server.url}/models does not list models; is it the base of an OpenAI-compatible server?"
            raise ServerError(msg)
        return cards

    async def complete(self, body: Mapping[str, Any]) -> Mapping[str, Any]:
        """Request a whole completion, and return its first choice.

        Raises:
            InvalidOptionError: If the server refuses the request.
            ServerError: If it does not answer, or not with a completion.
        """
        answer = await self._whole("POST", self._completions, body)
        choices = answer.get("choices") if isinstance(answer, Mapping) else None
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], Mapping):
            msg = f"{self._completions} answers without a completion; is it an OpenAI-compatible server?"
            raise ServerError(msg)
        return choices[0]

    async def beside(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """Request what some servers have beside OpenAI's addresses, as `/tokenize` is; None where there is nothing."""
        try:
            response = await self._client.request(method, self._root + path, json=body)
            return response.json() if response.status_code == httpx.codes.OK else None
        except (httpx.HTTPError, ValueError):
            return None

    @property
    def _completions(self) -> str:
        return f"{self._server.url}/completions"

    async def _whole(self, method: str, url: str, body: Mapping[str, Any] | None = None) -> Any:
        attempts = Attempts(self._server.max_retries)
        while True:
            try:
                async with self._sent(method, url, body) as response:
                    content = await response.aread()
            except LostAnswerError as lost:
                await attempts.pause(lost)
                continue
            except httpx.TransportError as error:
                await attempts.pause(LostAnswerError(self._unreachable(error)))
                continue
            except httpx.DecodingError as error:
                raise self._undecodable(error) from error
            try:
                return json.loads(content)
            except ValueError as error:
                msg = f"{url} does not answer with JSON; is it the base of an OpenAI-compatible server?"
                raise ServerError(msg) from error

    # Streams.

    async def events(self, body: Mapping[str, Any]) -> AsyncGenerator[Mapping[str, Any], None]:
        """Request a completion and yield the parts of its answer as they come.

        Leaving the iteration, or cancelling it, ends the connection, and so the request. Nothing is read between two
        parts: a caller that waits makes the server wait.

        Raises:
            LostAnswerError: If it failed in a way that may be different next time.
            InvalidOptionError: If the server refuses the request.
            ServerError: If its answer is none, or holds an error.
        """
        reader = EventReader()
        try:
            async with self._sent("POST", self._completions, body) as response:
                kind = response.headers.get("content-type", "")
                if not kind.startswith("text/event-stream"):
                    msg = f"{self._completions} answers with {kind or 'no type'!r} instead of a stream of events."
                    raise ServerError(msg)
                async for piece in response.aiter_bytes():  # to its end, so that the connection can be used again
                    for event in reader.push(piece):
                        if event.strip() != "[DONE]":
                            yield self._part(event)
                for event in reader.flush():
                    if event.strip() != "[DONE]":
                        yield self._part(event)
        except httpx.ReadTimeout as error:
            msg = (
                f"{self._server.url} sent nothing for {self._patience} amid an answer; raise it, or look at the server."
            )
            raise ServerError(msg) from error
        except httpx.TransportError as error:
            raise LostAnswerError(ServerError(f"{_LOST} ({_words(error)}): {self._server.url}.")) from error
        except httpx.DecodingError as error:
            raise self._undecodable(error) from error
        except ValueError as error:
            if isinstance(error, InvalidOptionError | PromptTooLongError):
                raise
            msg = f"{self._completions} sends what is no stream of answers: {first_line(error)}."
            raise ServerError(msg) from error

    def _part(self, event: str) -> Mapping[str, Any]:
        try:
            part = json.loads(event)
        except ValueError as error:
            msg = f"{self._completions} sends an event that is no JSON: {event[:100]!r}."
            raise ServerError(msg) from error
        if not isinstance(part, Mapping):
            msg = f"{self._completions} sends an event that is no answer: {event[:100]!r}."
            raise ServerError(msg)
        if (reported := part.get("error")) is not None:
            msg = f"the server {self._server.url} failed amid an answer: {_told(reported)}."
            raise ServerError(msg)
        return part

    # Errors.

    @property
    def _patience(self) -> str:
        return f"read_timeout_s={self._server.read_timeout_s:g} seconds"

    @asynccontextmanager
    async def _sent(self, method: str, url: str, body: Mapping[str, Any] | None) -> AsyncIterator[httpx.Response]:
        """Send a request and open its answer; an answer with another status than 200 is an error.

        Raises:
            LostAnswerError: If there is no answer, or one that may be different next time.
        """
        request = self._client.build_request(method, url, json=body)
        try:
            response = await self._client.send(request, stream=True)
        except httpx.ReadTimeout as error:
            msg = f"{self._server.url} did not answer within {self._patience}; raise it, or look at the server."
            raise ServerError(msg) from error
        except httpx.TransportError as error:
            raise LostAnswerError(self._unreachable(error)) from error
        try:
            if response.status_code != httpx.codes.OK:
                raise await self._refusal(response)
            yield response
        finally:
            await response.aclose()

    def _unreachable(self, error: httpx.TransportError) -> ServerError:
        url, server = self._server.url, self._server
        if isinstance(error, httpx.ConnectTimeout):
            return ServerError(
                f"{url} did not accept a connection within connect_timeout_s={server.connect_timeout_s:g} seconds; "
                "is its machine there, and its port open?"
            )
        if isinstance(error, httpx.ConnectError):
            return ServerError(f"no server answers at {url} ({_words(error)}); start it, or check the address.")
        return ServerError(f"the connection to {url} failed ({_words(error)}).")

    def _undecodable(self, error: httpx.DecodingError) -> ServerError:
        return ServerError(f"{self._server.url} sends an answer whose compression cannot be read ({_words(error)}).")

    async def _refusal(self, response: httpx.Response) -> Exception:
        """Return the error for an answer of another status than 200."""
        status, url = response.status_code, str(response.request.url)
        try:
            content = b""
            async for piece in response.aiter_bytes():
                content += piece
                if len(content) > _MOST_ERROR_BYTES:
                    break
        except httpx.TransportError as error:
            return LostAnswerError(ServerError(f"{_LOST} ({_words(error)}): {self._server.url}."))
        except httpx.DecodingError:
            content = b""  # the status says enough
        told = _told_in(content)
        said = f": {told}." if told else "."
        if status in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
            has = "the key that was sent" if self._server.key_in_use else "a request without a key"
            msg = f"{self._server.url} refuses {has} (status {status}); give Server(api_key=...) or {API_KEY_VARIABLE}."
            return ServerError(msg)
        if status in _RETRIED:
            pause_s = _seconds(response.headers.get("retry-after"))
            if status == httpx.codes.TOO_MANY_REQUESTS:
                msg = f"{self._server.url} has too many requests already (status 429){said}"
                return LostAnswerError(QueueFullError(msg), pause_s)
            return LostAnswerError(ServerError(f"{self._server.url} failed (status {status}){said}"), pause_s)
        if 300 <= status < 400:
            where = response.headers.get("location", "elsewhere")
            return ServerError(f"{url} refers to {where[:200]}; give that server's address, as keys are not sent on.")
        if status == httpx.codes.NOT_FOUND and "model" not in told.lower():
            return ServerError(
                f"there is nothing at {url} (status 404); is {self._server.url} the base of its addresses?"
            )
        if status in (400, 413, 422):
            kind = PromptTooLongError if "context length" in told or "context_length" in told else InvalidOptionError
            return kind(f"the server {self._server.url} refuses the request (status {status}){said}")
        return ServerError(f"{url} answers with status {status}{said}")


class Attempts:
    """The attempts of one request."""

    def __init__(self, max_retries: int) -> None:
        """Begin with the first one."""
        self._left = max_retries
        self._made = 0

    async def pause(self, lost: LostAnswerError) -> None:
        """Wait before the next attempt: twice as long each time, or as long as the server has asked for.

        Raises:
            ServerError: The error of the last attempt, if there is none left; `QueueFullError` too.
        """
        if self._left <= 0:
            raise lost.error from lost.__cause__
        self._left -= 1
        pause_s = _FIRST_PAUSE_S * 2**self._made * random.uniform(0.75, 1.25)  # noqa: S311  (no secrets here)
        self._made += 1
        await asyncio.sleep(min(lost.pause_s if lost.pause_s is not None else pause_s, _LONGEST_PAUSE_S))


def _seconds(text: str | None) -> float | None:
    try:
        seconds = float(text or "")
    except ValueError:  # a date
        return None
    return seconds if 0 <= seconds < float("inf") else None


def _words(error: Exception) -> str:
    return first_line(error) or type(error).__name__


def _told_in(content: bytes) -> str:
    """Return what the body of an error says, in one line."""
    try:
        answer = json.loads(content)
    except ValueError:
        return ""
    found = answer.get("error", answer.get("detail", answer)) if isinstance(answer, Mapping) else answer
    return _told(found)


def _told(error: Any) -> str:
    """Return what an error of a server says, in one line."""
    text = error.get("message", error) if isinstance(error, Mapping) else error
    return " ".join(str(text).split())[:500].rstrip(".")

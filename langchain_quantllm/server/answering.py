"""One request from its body to its last byte: reading, answering whole or in events, and the client's going away.

Owns the life of a request over HTTP. A client that goes away, and a server that closes, close the stream of chunks,
which cancels the request in the engine.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from fastapi import Request as HTTPRequest
from fastapi.responses import JSONResponse, Response

from langchain_quantllm.base import PreparedCall
from langchain_quantllm.base.aside import run_aside, submit_aside
from langchain_quantllm.engine.stream import Chunk, ChunkStream
from langchain_quantllm.errors import GenerationError
from langchain_quantllm.server.access import too_large
from langchain_quantllm.server.errors import APIError, api_error, busy, unavailable
from langchain_quantllm.server.fields import Body, GenerationBody, read_body
from langchain_quantllm.server.metrics import Metrics
from langchain_quantllm.server.served import ServedModel

T = TypeVar("T")
B = TypeVar("B", bound=GenerationBody)
Plan = TypeVar("Plan", bound=PreparedCall)

BODY_S = 60.0
"""Seconds in which a body must have come."""

BODIES = 8
"""Bodies of the largest size that the calls on a server may have together."""

_SMALL_BYTES = 1 << 16


class ClientGoneError(Exception):
    """The client has closed its connection."""


def dumped(value: Any) -> bytes:
    """Write JSON; in ASCII, so that halves of characters in a stranger's words can be sent back."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


class JSONAnswer(JSONResponse):
    """A JSON response."""

    def render(self, content: Any) -> bytes:
        """Write the body."""
        return dumped(content)


def error_answer(error: APIError) -> JSONAnswer:
    """Make the response of an error."""
    return JSONAnswer(error.body, status_code=error.status, headers=error.headers)


async def read(request: HTTPRequest, kind: type[Body], hold: Callable[[int], None]) -> Body:
    """Read the body of a request.

    Args:
        request: The request.
        kind: The type of its body.
        hold: Called with the bytes of each part as it comes; raises an `APIError` if that is too much.

    Raises:
        APIError: If it is too large, does not come, or is not what it must be.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        # A page in a browser can send other types to this machine without asking.
        msg = f"the content type is {media_type[:80]!r}; send 'Content-Type: application/json'."
        raise APIError(415, msg, code="wrong_content_type")
    content = bytearray()

    async def receive() -> None:
        has_more = True
        while has_more:
            message = await request.receive()
            if message["type"] == "http.disconnect":
                raise ClientGoneError
            hold(len(part := message.get("body", b"")))
            content.extend(part)
            has_more = message.get("more_body", False)

    try:
        await asyncio.wait_for(receive(), BODY_S)
    except asyncio.TimeoutError as error:
        msg = f"the body has not come within {BODY_S:g} seconds."
        raise APIError(408, msg, code="body_timeout") from error
    if len(content) <= _SMALL_BYTES:
        return read_body(bytes(content), kind)
    return await run_aside(read_body, bytes(content), kind)


async def _until_gone(work: Coroutine[Any, Any, T], receive: Callable[[], Awaitable[Any]]) -> T:
    """Do some work, as long as the client is there.

    Raises:
        ClientGoneError: If it goes away; the work is cancelled.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGoneError
    finally:
        for each in (task, watch):
            each.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _gone(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Call:
    """One request, from its beginning to its end, which is counted once."""

    def __init__(self, calls: Calls, endpoint: str) -> None:
        """Begin.

        Args:
            calls: All calls.
            endpoint: Its name in the metrics.
        """
        self._calls = calls
        self._metrics = metrics = calls.metrics
        self._endpoint = endpoint
        self._body_bytes = 0
        self._stream: ChunkStream | None = None
        self._has_ended = False
        metrics.in_flight.inc()

    def hold(self, count: int) -> None:
        """Take some more bytes of the body.

        Raises:
            APIError: If it is too large, or all bodies are together.
        """
        self._body_bytes += count
        self._calls.body_bytes += count
        most = self._calls.most_body_bytes
        if self._body_bytes > most:
            raise too_large(most)
        if self._calls.body_bytes > BODIES * most:
            raise busy("the bodies of other requests take all the memory for them; send it again later.", "bodies_full")

    async def submit(self, plan: Callable[[Any], Plan], body: Any, *, in_pieces: bool) -> Plan:
        """Plan the call and queue its requests in the engine."""
        prepared, self._stream = await submit_aside(plan, body, in_pieces=in_pieces)
        self._calls.streams.add(self._stream)
        return prepared

    async def chunks(self) -> AsyncIterator[Chunk]:
        """Read the chunks."""
        assert self._stream is not None
        async for chunk in self._stream:
            if chunk.usage is not None:
                self._metrics.count(chunk.usage)
            yield chunk

    def end(self, error: BaseException | None = None) -> None:
        """Close the stream, which cancels what still runs, and count the outcome; the first call alone counts."""
        if self._has_ended:
            return
        self._has_ended = True
        if self._stream is not None:
            self._stream.close()
            self._calls.streams.discard(self._stream)
        self._calls.body_bytes -= self._body_bytes
        self._metrics.in_flight.dec()
        self._metrics.requests.labels(self._endpoint, _outcome(error)).inc()


def _outcome(error: BaseException | None) -> str:
    if error is None:
        return "ok"
    if isinstance(error, APIError):
        return "refused" if error.status in (429, 503) else "invalid" if error.status < 500 else "failed"
    return "cancelled" if isinstance(error, ClientGoneError | asyncio.CancelledError) else "failed"


@dataclass(frozen=True, kw_only=True)
class Endpoint(Generic[B, Plan]):
    """What answers the requests of one path.

    Args:
        name: Its name in the metrics.
        body: The type of its bodies.
        plan: Plans the call.
        whole: Makes the answer of all chunks.
        events: Makes the events of a stream.
    """

    name: str
    body: type[B]
    plan: Callable[[B], Plan]
    whole: Callable[[B, Plan, Sequence[Chunk]], dict[str, Any]]
    events: Callable[[B, Plan, AsyncIterator[Chunk]], AsyncIterator[dict[str, Any]]]


class Calls:
    """The calls that a server is answering."""

    def __init__(
        self, served: ServedModel, metrics: Metrics, check_ready: Callable[[], None], *, most_body_bytes: int
    ) -> None:
        """Begin without any.

        Args:
            served: The model.
            metrics: Count calls.
            check_ready: Raises an `APIError` while no requests are taken.
            most_body_bytes: Largest body.
        """
        self._check_ready = check_ready
        self._served = served
        self.metrics = metrics
        self.most_body_bytes = most_body_bytes
        self.body_bytes = 0
        """Bytes of the bodies of all calls."""
        self.streams: set[ChunkStream] = set()

    def cancel_all(self) -> None:
        """Cancel all calls in the engine; their clients get an error."""
        for stream in list(self.streams):
            stream.close()

    async def generate(self, endpoint: Endpoint[Any, Any], request: HTTPRequest) -> Response:
        """Answer a request for text, whole or in events."""

        async def answer(call: Call, body: Any) -> Response:
            if body.stream:  # what is wrong with it is said with a status of its own, before the events begin
                prepared = await _until_gone(call.submit(endpoint.plan, body, in_pieces=True), request.receive)
                return EventStream(call, endpoint.events(body, prepared, call.chunks()), self.explained)

            async def whole() -> bytes:
                prepared = await call.submit(endpoint.plan, body, in_pieces=False)
                chunks = [chunk async for chunk in call.chunks()]
                return await run_aside(lambda: dumped(endpoint.whole(body, prepared, chunks)))

            return Response(await _until_gone(whole(), request.receive), media_type="application/json")

        return await self._answer(endpoint.name, request, endpoint.body, answer)

    async def compute(
        self, name: str, request: HTTPRequest, kind: type[Body], work: Callable[[Any], dict[str, Any]]
    ) -> Response:
        """Answer a request that the engine has no part in."""

        async def answer(call: Call, body: Any) -> Response:
            return JSONAnswer(await run_aside(work, body))

        return await self._answer(name, request, kind, answer)

    async def _answer(
        self,
        name: str,
        request: HTTPRequest,
        kind: type[Body],
        answer: Callable[[Call, Any], Awaitable[Response]],
    ) -> Response:
        call = Call(self, name)
        try:
            self._check_ready()
            response = await answer(call, await read(request, kind, call.hold))
        except ClientGoneError as error:
            call.end(error)
            return Response(status_code=499)
        except Exception as error:
            told = self.explained(error)
            call.end(told)
            return error_answer(told)
        except BaseException as error:
            call.end(error)
            raise
        if not isinstance(response, EventStream):
            call.end()
        return response

    def explained(self, error: Exception) -> APIError:
        """Say what a client is told about an error."""
        if isinstance(error, GenerationError) and self._served.closing:
            return unavailable("the server is closing; send the request to another one.")
        return api_error(error)


class EventStream(Response):
    """A response in server-sent events, as OpenAI sends them. It ends its call, however it ends itself."""

    def __init__(
        self, call: Call, events: AsyncIterator[dict[str, Any]], explained: Callable[[Exception], APIError]
    ) -> None:
        """Take the events of a call.

        Args:
            call: The call, whose requests run.
            events: JSON objects.
            explained: Says what the client is told about an error.
        """
        super().__init__(media_type="text/event-stream", headers={"cache-control": "no-cache"})
        del self.headers["content-length"]
        self._call = call
        self._events = events
        self._explained = explained

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send the events until they end or the client goes away."""
        error: BaseException | None = None
        try:
            error = await _until_gone(self._send(send), receive)
        except ClientGoneError as gone:
            error = gone
        except BaseException as stopped:
            error = stopped
            raise
        finally:
            self._call.end(error)

    async def _send(self, send: Any) -> APIError | None:
        """Send all; returns the error that they ended with, if any."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        error: APIError | None = None
        try:
            async for event in self._events:
                await send({"type": "http.response.body", "body": _event(dumped(event)), "more_body": True})
        except Exception as failure:
            error = self._explained(failure)
            await send({"type": "http.response.body", "body": _event(dumped(error.body)), "more_body": True})
        await send({"type": "http.response.body", "body": _event(b"[DONE]"), "more_body": False})
        return error


def _event(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"

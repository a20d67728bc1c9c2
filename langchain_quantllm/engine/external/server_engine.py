"""The engine over an OpenAI-compatible server: requests out, tokens in, on one thread with an event loop of its own.

Each request of a submission is one request there. The life of a request: it waits for a place; it is sent, again if the
server is busy or gone and no token has come; its tokens go into its `Completion`. However it ends, its connection is
given back or closed, and its place is free. A closed or expired stream cancels its requests at once.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import hashlib
import logging
import secrets
import threading
from collections import Counter
from collections.abc import Coroutine, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from langchain_quantllm.engine.clean_thread import start_thread
from langchain_quantllm.engine.detokenizer import Completion, begin_completions
from langchain_quantllm.engine.external.places import Places
from langchain_quantllm.engine.external.requests import check_requests
from langchain_quantllm.engine.external.server_answer import Answer, StreamRequests
from langchain_quantllm.engine.external.server_client import Attempts, LostAnswerError, ServerClient
from langchain_quantllm.engine.external.server_fit import ServerFit, find_fit
from langchain_quantllm.engine.external.server_options import ServerOptions
from langchain_quantllm.engine.external.spec import EngineSource
from langchain_quantllm.engine.failures import request_failure
from langchain_quantllm.engine.process import check_process, is_forked, note_loading
from langchain_quantllm.engine.request import EngineInfo, Request, check_queue
from langchain_quantllm.engine.stream import ChunkStream
from langchain_quantllm.engine.worker import UNLOADED
from langchain_quantllm.errors import GenerationError, InvalidOptionError, QuantLLMError
from langchain_quantllm.options import BASE_ADAPTER

_log = logging.getLogger(__name__)

_WAIT_S, _END_S = 0.5, 30.0
_MOST_SEED = 2**63

_Result = TypeVar("_Result")


class ServerEngine:
    """Runs requests at a server."""

    def __init__(self, server: ServerOptions, source: EngineSource) -> None:
        """Connect, and find out what the server has and can do.

        Args:
            server: The options.
            source: The model.

        Raises:
            ServerError: If it does not answer as a server should.
            InvalidOptionError: If it does not have the model or an adapter.
            UnsupportedError: If its model or tokenizer is another one.
        """
        note_loading()
        self._server = server
        self._tokenizer = source.tokenizer
        self._lock = threading.Lock()
        self._unended: Counter[tuple[int | None, int | None]] = Counter()
        """Requests that have not ended, by their owner and its `max_rows`; under the lock."""
        self._closed = False
        self._streams: dict[ChunkStream, StreamRequests] = {}  # on the loop's thread only
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, name="quantllm-server", daemon=True)
        start_thread(self._thread, "the connection to a server")
        try:
            self._client, self._places = self._call(self._start())
            self._fit: ServerFit = self._call(find_fit(self._client, server, source))
        except BaseException:
            self.close()
            raise
        bounds = [n for n in (source.limits.context_tokens, self._fit.context_tokens) if n is not None]
        self.limits = replace(source.limits, context_tokens=min(bounds, default=None))
        self.info = EngineInfo(name=server.name, reason=self._fit.reason, version=self._fit.software)
        self.peak_cache_tokens = 0

    @property
    def forms(self) -> frozenset[str]:
        """The kinds of form that the server holds texts to."""
        return self._fit.forms

    def submit(
        self,
        requests: Sequence[Request],
        timeout_s: float | None = None,
        *,
        in_pieces: bool = True,
        max_waiting: int | None = None,
    ) -> ChunkStream:
        """Queue requests and return the stream of their chunks; see `Engine.submit`."""
        check_process()
        self._check(requests)
        stream, completions = begin_completions(requests, self._tokenizer, timeout_s, in_pieces=in_pieces)
        stream.wakes_on_close = True
        stream.is_served = self._thread.is_alive
        stream.wake = lambda: self._tell(self._look_at, stream)
        with self._lock:
            if self._closed:
                raise GenerationError(UNLOADED)
            check_queue(self._waiting, max_waiting)
            self._unended.update((request.owner, request.max_rows) for request in requests)
            self._loop.call_soon_threadsafe(self._begin, stream, completions, timeout_s)
        return stream

    @property
    def _waiting(self) -> int:
        """Requests that wait for a place: more than there are, in all or for one owner."""
        counts = self._unended.items()
        beyond = sum(max(0, count - most) for (_, most), count in counts if most is not None)
        return max(beyond, sum(count for _, count in counts) - self._server.max_connections, 0)

    def close(self) -> None:
        """Cancel all requests and end the connections."""
        if is_forked():
            return
        with self._lock:
            was_closed, self._closed = self._closed, True
        if not was_closed:
            self._tell(self._end)
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=_END_S)

    def _check(self, requests: Sequence[Request]) -> None:
        fit = self._fit
        check_requests(requests, self._server, self.limits, adapters=fit.adapters, forms=fit.forms, lacking=fit.lacking)
        if fit.gives_ids:
            return
        for request in requests:
            if request.options.logprobs is not None:
                msg = f"logprobs={request.options.logprobs!r} takes token ids, which this server does not give."
                raise InvalidOptionError(msg)
            if not request.options.skip_special_tokens:
                msg = (
                    "special tokens are to be in the text, by skip_special_tokens=False or for the model's format of "
                    "calls or reasoning, and this server gives texts without them; use a server that gives token ids."
                )
                raise InvalidOptionError(msg)
            if set(request.eos_token_ids) != set(self.limits.eos_token_ids):
                msg = (
                    f"eos_token_id={list(request.eos_token_ids)!r} takes token ids, which this server does not give; "
                    "leave it out, or name strings in stop=."
                )
                raise InvalidOptionError(msg)

    # The thread.

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            self._loop.close()

    def _tell(self, function: Any, *args: Any) -> None:
        """Call a function on the loop; one that is closed has nothing left to be told."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function, *args)

    def _call(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        """Run work on the loop and wait for it, so that Ctrl-C gets through."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            while True:
                try:
                    return future.result(_WAIT_S)
                except concurrent.futures.TimeoutError:
                    if future.done():  # its own
                        return future.result()
        except BaseException:
            future.cancel()
            raise

    async def _start(self) -> tuple[ServerClient, Places]:
        return ServerClient(self._server), Places(self._server.max_connections)

    def _begin(self, stream: ChunkStream, completions: Sequence[Completion], timeout_s: float | None) -> None:
        if not completions:  # nothing would end them
            return
        requests = StreamRequests()
        self._streams[stream] = requests
        for completion in completions:
            task = self._loop.create_task(self._run(completion, requests))
            requests.tasks.add(task)
            task.add_done_callback(functools.partial(self._ended, stream, completion.request))
        if timeout_s is not None:
            requests.timer = self._loop.call_later(timeout_s, self._look_at, stream)
        self._look_at(stream)

    def _look_at(self, stream: ChunkStream) -> None:
        """Cancel the requests of a stream that is closed or expired; let those of one that was read go on."""
        requests = self._streams.get(stream)
        if requests is None:
            return
        if stream.should_stop():
            requests.cancel()
        elif not stream.is_full:
            requests.may_read.set()

    def _ended(self, stream: ChunkStream, request: Request, task: asyncio.Task[None]) -> None:
        """Count a request off; a task that is cancelled before its first step has run nothing of `_run`."""
        with self._lock:
            self._unended.subtract([(request.owner, request.max_rows)])
            self._unended += Counter()  # drops those that are none
        requests = self._streams[stream]
        requests.tasks.discard(task)
        if not requests.tasks:
            del self._streams[stream]
            if requests.timer is not None:
                requests.timer.cancel()

    def _end(self) -> None:
        """Fail what runs, and stop the loop when its connections are closed."""
        for stream, requests in list(self._streams.items()):
            if not stream.cancelled:
                stream.fail(GenerationError("the model was unloaded while it was generating."))
            requests.cancel()
        self._loop.create_task(self._stop()).add_done_callback(lambda _: self._loop.stop())

    async def _stop(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        client = getattr(self, "_client", None)
        if client is not None:
            await client.close()
        await self._loop.shutdown_asyncgens()

    # A request.

    async def _run(self, completion: Completion, requests: StreamRequests) -> None:
        try:
            async with self._places.hold(completion.request):
                completion.start()
                await self._send(completion, requests)
        except asyncio.CancelledError:
            pass  # its stream was closed, or has its error
        except QuantLLMError as error:
            completion.stream.fail(error)
        except Exception as error:
            _log.debug("a request to a server failed", exc_info=True)
            completion.stream.fail(request_failure(error))

    async def _send(self, completion: Completion, requests: StreamRequests) -> None:
        """Send a request until it has ended, again as long as nothing has come."""
        attempts = Attempts(self._server.max_retries)
        body = self._body(completion.request)
        while True:
            answer = Answer(completion, requests, self._fit, self._tokenizer)
            try:
                await answer.read(self._client, body)
            except LostAnswerError as lost:
                if answer.has_begun:
                    raise lost.error from lost.__cause__
                await attempts.pause(lost)
            else:
                return

    def _body(self, request: Request) -> dict[str, Any]:
        """Write a request in the server's terms: every option by its value, as servers have defaults of their own."""
        options, fit = request.options, self._fit
        adapter = None if options.adapter == BASE_ADAPTER else options.adapter
        body: dict[str, Any] = {
            "model": fit.model if adapter is None else fit.adapters[adapter],
            "prompt": list(request.prompt_ids),
            "max_tokens": request.max_new_tokens,
            "temperature": options.temperature if options.do_sample else 0.0,
            "top_p": options.top_p if options.do_sample else 1.0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if options.do_sample:
            body["seed"] = _seed(request)
        if not fit.gives_ids:
            if request.stop_token_ids:
                body["stop"] = [self._tokenizer.decode([i]) for i in request.stop_token_ids]
            return body
        # Tokens that the server would end at, and this request does not, are not to end it: it ends here then. A text
        # of a form ends at the model's own end tokens too, which an automaton chooses when the text is complete.
        own_ends = set(self.limits.eos_token_ids)
        goes_on = request.form is None and (options.ignore_eos or not own_ends <= set(request.eos_token_ids))
        body |= {
            "top_k": options.top_k if options.do_sample else 0,
            "min_p": options.min_p if options.do_sample else 0.0,
            "repetition_penalty": options.repetition_penalty,
            "min_tokens": request.min_new_tokens,
            "stop_token_ids": [] if goes_on else sorted(set(request.end_token_ids)),
            "ignore_eos": goes_on,
            "skip_special_tokens": False,
            "return_token_ids": True,
        }
        if options.logprobs is not None:
            body |= {"logprobs": options.logprobs, "return_tokens_as_token_ids": True}
        if options.priority:
            body["priority"] = options.priority
        if options.cache_salt is not None or not request.shares_prefix:
            body["cache_salt"] = secrets.token_hex(16) if not request.shares_prefix else options.cache_salt
        if request.form is not None:
            value = request.form.value
            body["structured_outputs"] = {request.form.kind: list(value) if isinstance(value, tuple) else value}
        return body


def _seed(request: Request) -> int:
    """Derive the seed of a sample: the call's own for the first one, and another for each of the others."""
    if request.sample_index == 0 and 0 <= request.seed < _MOST_SEED:
        return request.seed
    digest = hashlib.sha256(f"{request.seed}:{request.sample_index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % _MOST_SEED

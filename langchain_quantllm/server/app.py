"""`create_app`: a model behind OpenAI's protocol, as a FastAPI application.

Owns the routes, and the beginning and end of serving.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response

from langchain_quantllm.base import QuantizedModel
from langchain_quantllm.base.aside import run_aside
from langchain_quantllm.errors import QuantLLMError
from langchain_quantllm.server.access import Access, check_key
from langchain_quantllm.server.answering import Calls, Endpoint, JSONAnswer, error_answer
from langchain_quantllm.server.chat import chat_events, whole_chat
from langchain_quantllm.server.completions import completion_events, whole_completion
from langchain_quantllm.server.errors import APIError, api_error
from langchain_quantllm.server.fields import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from langchain_quantllm.server.metrics import CONTENT_TYPE, Metrics
from langchain_quantllm.server.served import ServedModel

_log = logging.getLogger(__name__)

MOST_BODY_BYTES = 64 << 20
MOST_WAITING = 1024


class Service:
    """A served model with the calls on it; `app.state.quantllm` of an application."""

    def __init__(self, served: ServedModel, *, most_body_bytes: int, on_failure: Callable[[], None] | None) -> None:
        """Begin without calls."""
        self.served = served
        self.metrics = Metrics(served)
        self.calls = Calls(served, self.metrics, self.check_ready, most_body_bytes=most_body_bytes)
        self._on_failure = on_failure
        self.on_ready: Callable[[], None] | None = None
        self._loading: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Load the model beside the event loop, once."""
        if self._loading is None:
            self._loading = asyncio.create_task(self._load())

    def check_ready(self) -> None:
        """Check that requests are taken; the first one loads the model, where nothing has started the application.

        Raises:
            APIError: If not.
        """
        self.start()
        self.served.check_ready()

    async def _load(self) -> None:
        try:
            await run_aside(self.served.load)
        except Exception as error:
            trace = None if isinstance(error, QuantLLMError) else error  # its sentence says all
            _log.error("the model could not be loaded: %s", error, exc_info=trace)
            if self._on_failure is not None:
                self._on_failure()
        else:
            if self.on_ready is not None:
                self.on_ready()

    def stop_taking(self) -> None:
        """Refuse requests from now on; those that run go on."""
        self.served.closing = True

    def close_after(self, seconds: float) -> None:
        """Refuse requests from now on, and cancel those that still run after some seconds; on the event loop."""
        self.stop_taking()
        asyncio.get_running_loop().call_later(seconds, self.calls.cancel_all)

    def close(self) -> None:
        """Cancel what runs. The model stays loaded: it is its owner's."""
        self.stop_taking()
        self.calls.cancel_all()


def create_app(
    model: QuantizedModel,
    *,
    name: str | None = None,
    api_key: str | None = None,
    max_waiting: int | None = MOST_WAITING,
    max_body_bytes: int = MOST_BODY_BYTES,
    media_domains: Sequence[str] = (),
    on_failure: Callable[[], None] | None = None,
) -> FastAPI:
    """Make an application that answers OpenAI's clients with a model of this process.

    Run it in one process, as there is one engine: `uvicorn.run(app)`, or `langchain_quantllm.server.run_server`.

    Args:
        model: A `QuantizedHuggingFaceLLM` or `ChatQuantizedHuggingFace`. It is loaded when the application starts, if
            it is not, and stays yours: it can be called beside the server, and is not unloaded with it.
        name: The model's name in requests; None is the repository's, or the last part of a folder's path. The names of
            its adapters are models as well.
        api_key: The key that clients must send. Without one, requests to other names than this machine's own are
            refused.
        max_waiting: Answer with status 429 while so many sequences wait; None takes the model's own `max_waiting`.
        max_body_bytes: Largest body of a request.
        media_domains: The only hosts that images and sounds are fetched from; without any, messages hold them in data
            URLs.
        on_failure: Called when the model cannot be loaded.

    Returns:
        The application.

    Raises:
        InvalidOptionError: If an adapter has the model's name, a domain is no name of a host, or the key is empty or no
            text that a header can hold.
    """
    check_key(api_key)
    served = ServedModel(model, name=name, max_waiting=max_waiting, media_domains=media_domains)
    service = Service(served, most_body_bytes=max_body_bytes, on_failure=on_failure)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        try:
            yield
        finally:
            service.close()

    app = FastAPI(title="langchain-quantllm", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.quantllm = service
    _add_routes(app, service)
    for status in _NO_ROUTE:
        app.add_exception_handler(status, _no_route)
    app.add_exception_handler(APIError, _failed)
    app.add_exception_handler(QuantLLMError, _failed)
    app.add_middleware(Access, api_key=api_key, most_body_bytes=max_body_bytes)
    return app


def _add_routes(app: FastAPI, service: Service) -> None:
    served, calls = service.served, service.calls
    completions = Endpoint(
        name="completions",
        body=CompletionBody,
        plan=served.plan_completion,
        whole=lambda body, plan, chunks: whole_completion(body, plan, chunks, served.called(body)),
        events=lambda body, plan, chunks: completion_events(body, plan, chunks, served.called(body)),
    )
    chat = Endpoint(
        name="chat",
        body=ChatBody,
        plan=served.plan_chat,
        whole=lambda body, plan, chunks: whole_chat(body, plan, chunks, served.called(body)),
        events=lambda body, plan, chunks: chat_events(body, plan, chunks, served.called(body)),
    )

    def route(path: str, method: str, answer: Callable[..., Any]) -> None:
        app.add_api_route(path, answer, methods=[method], response_model=None)

    async def models(request: Request) -> Response:
        service.check_ready()
        cards = await run_aside(lambda: [served.card(name) for name in served.names])
        return JSONAnswer({"object": "list", "data": cards})

    async def model(request: Request) -> Response:
        service.check_ready()
        return JSONAnswer(await run_aside(served.card, request.path_params["name"]))

    async def health(request: Request) -> Response:
        service.start()
        return JSONAnswer({"status": served.state}, status_code=200 if served.state == "ok" else 503)

    async def metrics(request: Request) -> Response:
        return Response(await run_aside(service.metrics.text), media_type=CONTENT_TYPE)

    def posted(answer: Callable[[Request], Any]) -> Callable[[Request], Any]:
        async def handle(request: Request) -> Response:
            response: Response = await answer(request)
            return response

        return handle

    route("/v1/models", "GET", models)
    route("/v1/models/{name:path}", "GET", model)
    route("/v1/completions", "POST", posted(partial(calls.generate, completions)))
    route("/v1/chat/completions", "POST", posted(partial(calls.generate, chat)))
    route("/tokenize", "POST", posted(lambda r: calls.compute("tokenize", r, TokenizeBody, served.tokenize)))
    route("/detokenize", "POST", posted(lambda r: calls.compute("detokenize", r, DetokenizeBody, served.detokenize)))
    route("/health", "GET", health)
    route("/metrics", "GET", metrics)


_NO_ROUTE = (404, 405)
"""Statuses of requests that have no answer here, of the router's own."""


async def _no_route(request: Request, error: Exception) -> Response:
    if getattr(error, "status_code", 404) == 405:
        told = APIError(405, f"{request.method} is not possible here.", headers=getattr(error, "headers", None))
    else:
        told = APIError(404, f"there is no {request.url.path[:200]!r} here.")
    return error_answer(told)


async def _failed(request: Request, error: Exception) -> Response:
    return error_answer(api_error(error))

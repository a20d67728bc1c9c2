"""Servers of tiny models in a thread of their own, on loopback, and OpenAI's client for them."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import uvicorn

from langchain_quantllm.compat.uvicorn_server import SignalledServer
from langchain_quantllm.server import create_app
from langchain_quantllm.server.run import KEPT_S
from tests.support.models import wait_until


@dataclass
class Running:
    """A server that runs, and an HTTP client for it."""

    url: str
    app: Any
    server: SignalledServer
    thread: threading.Thread
    http: httpx.Client

    @property
    def service(self) -> Any:
        return self.app.state.quantllm

    @property
    def load(self) -> tuple[int, int, int]:
        """Sequences that run and wait, and tokens' places that they hold."""
        load = self.service.served.load_now
        return load.running, load.waiting, load.cache_tokens

    def client(self, api_key: str = "none", **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=api_key, max_retries=0, timeout=60, **options)

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        given = options if body is None else {"json": body, **options}
        return self.http.post(path, **given)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.http.get(path, **options)

    def outcomes(self, endpoint: str) -> dict[str, float]:
        """The requests of an endpoint that have ended, by their outcome."""
        [metric] = self.service.metrics.requests.collect()
        return {
            sample.labels["outcome"]: sample.value
            for sample in metric.samples
            if sample.name.endswith("_total") and sample.labels["endpoint"] == endpoint
        }


@contextlib.contextmanager
def serving(model: Any, *, waits: bool = True, closing_s: float = 5.0, **options: Any) -> Iterator[Running]:
    """Serve a model until the block ends; `waits` until it is loaded."""
    app = create_app(model, **options)
    listener = socket.create_server(("127.0.0.1", 0), backlog=512)
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        lifespan="on",
        timeout_keep_alive=KEPT_S,
        timeout_graceful_shutdown=8,
    )
    server = SignalledServer(config, closing=app.state.quantllm.close_after, closing_s=closing_s)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="test-server")
    thread.start()
    try:
        wait_until(lambda: server.started or not thread.is_alive(), 60)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with httpx.Client(base_url=url, timeout=60, trust_env=False, verify=False) as http:  # no certificates are read
            if waits:
                wait_until(lambda: app.state.quantllm.served.state != "loading", 120)
            yield Running(url, app, server, thread, http)
    finally:
        server.stop()
        thread.join(60)
        assert not thread.is_alive()

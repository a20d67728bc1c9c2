"""Running an application by uvicorn, in this thread, until Ctrl-C or SIGTERM."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import uvicorn

from langchain_quantllm.compat.uvicorn_server import SignalledServer
from langchain_quantllm.errors import InvalidOptionError, first_line
from langchain_quantllm.server.access import check_listening
from langchain_quantllm.server.app import create_app

PORT = 8000
CLOSING_S = 5.0
"""Seconds that running requests have after Ctrl-C or SIGTERM, before they are cancelled."""

KEPT_S = 75
"""Seconds that an idle connection is kept: longer than clients keep theirs, or a request may meet its end."""


def run_server(
    model: Any,
    *,
    host: str = "127.0.0.1",
    port: int = PORT,
    api_key: str | None = None,
    closing_s: float = CLOSING_S,
    on_ready: Callable[[int], None] | None = None,
    **options: Any,
) -> None:
    """Serve a model until Ctrl-C or SIGTERM; then take no more requests, finish or cancel those that run, and return.

    Args:
        model: As for `create_app`.
        host: The address to listen on. One that other machines reach needs an `api_key`.
        port: The port; 0 lets the system choose.
        api_key: The key that clients must send.
        closing_s: Seconds that running requests have at the end, before they are cancelled.
        on_ready: Called with the port, when connections are taken and the model is loaded.
        **options: Further options of `create_app`.

    Raises:
        InvalidOptionError: If others could reach the server without a key, or the address is taken.
        QuantLLMError: If the model cannot be loaded.
    """
    check_listening(host, api_key)
    app = create_app(model, api_key=api_key, on_failure=lambda: server.stop(), **options)
    service = app.state.quantllm
    # One process, one engine. Access logs would hold what clients ask of a model that is theirs alone.
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        workers=1,
        log_level="warning",
        access_log=False,
        lifespan="on",
        server_header=False,
        timeout_keep_alive=KEPT_S,
        timeout_graceful_shutdown=max(1, round(closing_s) + 2),
    )
    listener = listen(host, port)
    server = SignalledServer(config, closing=service.close_after, closing_s=closing_s)
    if on_ready is not None:
        service.on_ready = lambda: on_ready(listener.getsockname()[1])
    with listener:
        server.run(sockets=[listener])
    if service.served.failure is not None:
        raise service.served.failure


def listen(host: str, port: int) -> socket.socket:
    """Open the socket that connections come to.

    Raises:
        InvalidOptionError: If the port is none, or the address is not this machine's, or taken.
    """
    if not 0 <= port <= 65535:  # the system would take its last 16 bits
        msg = f"port={port} is not allowed; it must be 0 to 65535, 0 for one that the system chooses."
        raise InvalidOptionError(msg)
    try:
        [*_, (family, _, _, _, address)] = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[:1]
        return socket.create_server(address[:2], family=family, backlog=2048)
    except (OSError, ValueError) as error:
        msg = f"host={host!r} and port={port} cannot be listened on: {first_line(error)}; give others."
        raise InvalidOptionError(msg) from error

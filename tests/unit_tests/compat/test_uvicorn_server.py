"""What a server of this package needs of uvicorn beside its documents."""

from __future__ import annotations

import socket
import threading
from typing import Any

import httpx
import pytest
import uvicorn

from langchain_quantllm.compat.uvicorn_server import SignalledServer
from tests.support.models import wait_until

pytestmark = [pytest.mark.enable_socket, pytest.mark.compat]


async def answer(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"ok"})


def test_a_server_that_is_asked_to_end_says_so_once_and_ends() -> None:
    said: list[float] = []
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(answer, log_level="warning", lifespan="off")
    server = SignalledServer(config, closing=said.append, closing_s=3.0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    wait_until(lambda: server.started, 30)
    assert httpx.get(f"http://127.0.0.1:{listener.getsockname()[1]}").text == "ok"
    assert said == []
    server.stop()
    thread.join(30)
    assert not thread.is_alive()
    assert said == [3.0]

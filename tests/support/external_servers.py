"""A server on this machine that answers as a test says, byte by byte where it wants to."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

HOST = "127.0.0.1"


@dataclass
class Asked:
    """A request that a `ScriptedServer` has read.

    Args:
        path: Its path.
        headers: Its headers, by their names in lower case.
        body: Its body as JSON; None without one.
        connection: The connection.
        cut: Set when the client has ended the connection amid the answer.
        sent_bytes: Bytes of the answer that the system has taken.
    """

    path: str
    headers: dict[str, str]
    body: Any
    connection: socket.socket
    cut: threading.Event = field(default_factory=threading.Event)
    sent_bytes: int = 0

    def send(self, content: bytes) -> None:
        """Send bytes as they are; an ended connection ends the answer."""
        try:
            self.connection.sendall(content)
            self.sent_bytes += len(content)
        except OSError:
            self.cut.set()
            raise _CutError from None

    def answer(self, content: Any, status: int = 200, **headers: str) -> None:
        """Send a whole answer in JSON."""
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        lines = [f"HTTP/1.1 {status} X", "Content-Type: application/json", f"Content-Length: {len(data)}"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        self.send("\r\n".join([*lines, "", ""]).encode() + data)

    def open_stream(self) -> None:
        """Begin a stream of events."""
        self.send(b"HTTP/1.1 200 X\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")

    def piece(self, content: bytes) -> None:
        """Send a piece of the stream."""
        self.send(f"{len(content):x}\r\n".encode() + content + b"\r\n")

    def event(self, content: Any) -> None:
        """Send an event."""
        self.piece(b"data: " + (content if isinstance(content, bytes) else json.dumps(content).encode()) + b"\n\n")

    def tokens(self, ids: list[int], text: str = "", reason: str | None = None) -> None:
        """Send an event with tokens."""
        self.event({"choices": [{"index": 0, "text": text, "token_ids": ids, "finish_reason": reason}]})

    def end_stream(self) -> None:
        """End the stream as servers do."""
        self.event(b"[DONE]")
        self.send(b"0\r\n\r\n")

    def wait_for_cut(self, timeout_s: float = 20.0) -> bool:
        """Send comments until the client has ended the connection."""
        until = time.monotonic() + timeout_s
        with contextlib.suppress(_CutError):
            while time.monotonic() < until:
                self.piece(b": still here\n\n")
                time.sleep(0.01)
        return self.cut.is_set()


class _CutError(Exception):
    pass


class ScriptedServer:
    """A server whose completions a test writes: each request goes to the first of `script`, the last one stays.

    It lists one model, `tiny`, and answers the probes of a `Server` engine as vLLM does.
    """

    def __init__(self, *, gives_ids: bool = True, tokenizer: Any = None, models: list[dict[str, Any]] | None = None):
        self.script: list[Callable[[Asked], None]] = []
        self.asked: list[Asked] = []
        self.models = models if models is not None else [{"id": "tiny", "owned_by": "vllm"}]
        self.answers_models: Callable[[Asked], None] = lambda asked: asked.answer({"data": self.models})
        self.form: Any = None
        """The form that a whole completion was asked to have; its first choice is begun if there is a tokenizer."""
        self.holds_forms = True
        self._gives_ids = gives_ids
        self._tokenizer = tokenizer
        self._listener = socket.create_server((HOST, 0), backlog=256)
        self._connections: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._thread = threading.Thread(target=self._accept, daemon=True)

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self._listener.getsockname()[1]}/v1"

    def __enter__(self) -> ScriptedServer:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()

    def stop(self) -> None:
        """Take no more connections, and end those that there are."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self._connections.append(connection)
                threading.Thread(target=self._serve, args=[connection], daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError, _CutError, ValueError), connection.makefile("rb") as reader:
            while (line := reader.readline()) and line.strip():
                path = line.split()[1].decode()
                headers = {}
                while header := reader.readline().strip():
                    name, _, value = header.decode().partition(":")
                    headers[name.lower()] = value.strip()
                content = reader.read(int(headers.get("content-length", 0)))
                asked = Asked(path, headers, json.loads(content) if content else None, connection)
                self._answer(asked)
        connection.close()

    def _answer(self, asked: Asked) -> None:
        body = asked.body or {}
        if asked.path == "/v1/models":
            self.answers_models(asked)
        elif asked.path == "/tokenize" and self._tokenizer is not None:
            asked.answer({"tokens": self._tokenizer.encode(body["prompt"], add_special_tokens=False)})
        elif asked.path == "/v1/completions" and not body.get("stream"):
            ids = {"token_ids": [1]} if self._gives_ids else {}
            if (form := body.get("structured_outputs")) is not None:
                self.form = form
                if self.holds_forms and self._tokenizer is not None:
                    ids = {"token_ids": self._tokenizer.encode(form["choice"][0], add_special_tokens=False)[:1]}
            asked.answer({"choices": [{"text": "", **ids}]})
        elif asked.path == "/v1/completions":
            self.asked.append(asked)
            script = self.script.pop(0) if len(self.script) > 1 else self.script[0]
            script(asked)
        else:
            asked.answer({"detail": "Not Found"}, status=404)

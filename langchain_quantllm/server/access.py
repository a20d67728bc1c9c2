"""Who may send requests, and how large they may be: the layer before all routes."""

from __future__ import annotations

import hmac
import ipaddress
import json
import re
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from langchain_quantllm.errors import InvalidOptionError
from langchain_quantllm.server.errors import APIError

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

_OPEN_PATHS = ("/health",)
"""Paths that need no key: probes of a cluster have none."""

_MOST_DIGITS = 18
"""Digits of a body's length in bytes."""


class Access:
    """Checks key, host and size of each request before the application sees it.

    Without a key only this machine's own names are answered: a page in a browser could reach a server on loopback under
    a name of its own (DNS rebinding).
    """

    def __init__(self, app: Any, *, api_key: str | None, most_body_bytes: int) -> None:
        """Stand before an application.

        Args:
            app: The ASGI application.
            api_key: The key that requests must bear; None for none.
            most_body_bytes: Largest body.
        """
        self._app = app
        self._key = None if api_key is None else api_key.encode()
        self._most_body_bytes = most_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer with an error, or hand the request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        try:
            self._check(scope, headers)
        except APIError as error:
            await send_error(error, send)
            return
        await self._app(scope, receive, send)

    def _check(self, scope: Scope, headers: Mapping[bytes, bytes]) -> None:
        if self._key is None:
            _check_host(headers.get(b"host", b"").decode("latin-1"))
        elif scope["path"].removeprefix(scope.get("root_path", "")) not in _OPEN_PATHS:
            kind, _, key = headers.get(b"authorization", b"").partition(b" ")
            # The same time for every wrong key.
            is_right = hmac.compare_digest(key.strip(), self._key)
            if kind.lower() != b"bearer" or not is_right:
                msg = "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'."
                raise APIError(401, msg, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        length = headers.get(b"content-length", b"0").lstrip(b"0")
        # Python reads no number of thousands of digits.
        if length.isdigit() and (len(length) > _MOST_DIGITS or int(length) > self._most_body_bytes):
            raise too_large(self._most_body_bytes)


def too_large(most_bytes: int) -> APIError:
    """Make the error of a body that is too large."""
    return APIError(413, f"the body is larger than {most_bytes} bytes; send less.", code="body_too_large")


def _check_host(given: str) -> None:
    try:
        host = urlsplit(f"//{given}").hostname or ""
    except ValueError:
        host = ""
    if not is_loopback(host):
        msg = f"this server has no API key and answers on loopback only, not as {given[:100]!r}; start it with a key."
        raise APIError(403, msg, code="wrong_host")


def is_loopback(host: str) -> bool:
    """Say whether a name or an address can only be this machine."""
    if host.lower().rstrip(".") == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_key(api_key: str | None) -> None:
    """Check that requests can bear a key.

    Raises:
        InvalidOptionError: If it is empty, or no text that a header can hold.
    """
    if api_key is not None and not re.fullmatch(r"[!-~]+", api_key):
        msg = "the API key is empty, or has spaces or characters that a header cannot hold; give letters and digits."
        raise InvalidOptionError(msg)


def check_listening(host: str, api_key: str | None) -> None:
    """Check that a server may listen on a host.

    Raises:
        InvalidOptionError: If others could reach it without a key, or the key is none that `check_key` lets pass.
    """
    check_key(api_key)
    if api_key is None and not is_loopback(host):
        msg = (
            f"host={host!r} lets other machines use this one without a key; give --api-key, set QUANTLLM_API_KEY, "
            "or stay on 127.0.0.1."
        )
        raise InvalidOptionError(msg)


async def send_error(error: APIError, send: Send) -> None:
    """Answer a request with an error, outside of the application."""
    body = json.dumps(error.body).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
    pairs = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})

"""Fetching a file by a URL that a stranger may have written.

Owns the rules for hosts and addresses, redirects, the one deadline of a fetch, and its bound of bytes. The name of a
host is looked up once, its addresses are checked, and the connection goes to one of these: no later answer of the DNS
can lead elsewhere. Errors say nothing of what was found at the other end. Proxies of the environment are not used: they
would look up the name again.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import re
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, quote, unquote, urljoin, urlsplit

from langchain_quantllm._version import __version__
from langchain_quantllm.chat.addresses import is_allowed
from langchain_quantllm.errors import InvalidOptionError

_MOST_REDIRECTS = 5
_REDIRECTS = (301, 302, 303, 307, 308)
_CHUNK_BYTES = 2**16
_HOST = re.compile(
    r"(\*\.)?[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?)*|[0-9a-f:.]*:[0-9a-f:.]+"
)


class FetchError(Exception):
    """A file cannot be fetched; the message is the reason, a clause without a full stop."""


@dataclass(frozen=True, kw_only=True)
class FetchRules:
    """Where files may be fetched from.

    Args:
        allow_private: Allow addresses of this machine and of private networks.
        allowed_domains: The only hosts that are asked, at redirects too; `"*.example.com"` is any below example.com.
            None is any host.

    Raises:
        InvalidOptionError: If a domain is no name of a host.
    """

    allow_private: bool = False
    allowed_domains: Sequence[str] | None = None

    def __post_init__(self) -> None:
        """Check the domains, and write them as hosts are compared."""
        if self.allowed_domains is None:
            return
        if isinstance(self.allowed_domains, str):
            msg = f"allowed_domains={self.allowed_domains!r} is not a list; give one, such as ['example.com']."
            raise InvalidOptionError(msg)
        for domain in self.allowed_domains:
            if not isinstance(domain, str) or not _HOST.fullmatch(_plain(domain)):
                msg = (
                    f"allowed_domains holds {domain!r}, which is no name of a host; write it without scheme, port and "
                    "path, such as 'example.com', or '*.example.com' for all below it."
                )
                raise InvalidOptionError(msg)
        object.__setattr__(self, "allowed_domains", tuple(map(_plain, self.allowed_domains)))

    def allows(self, host: str) -> bool:
        """Say whether a host is one of the allowed domains."""
        if self.allowed_domains is None:
            return True
        name = _plain(host)
        return any(name.endswith(d[1:]) if d.startswith("*.") else name == d for d in self.allowed_domains)


def _plain(host: str) -> str:
    """Write the name of a host in lower case and ASCII, without a full stop at its end; any text that is none stays."""
    with contextlib.suppress(UnicodeError):
        host = host.encode("idna").decode() if not host.isascii() else host
    return host.lower().removesuffix(".")


def shown(url: str) -> str:
    """Return a URL for errors: without what may be secret in it, that is user, password, query and fragment."""
    try:
        parts = urlsplit(url)
        host = parts.netloc.rpartition("@")[2]
    except ValueError:
        return url.partition(":")[0] + ":..."
    return f"{parts.scheme}://{host}{parts.path}"[:200]


def fetch(url: str, rules: FetchRules, *, timeout_s: float, most_bytes: int, accept: str = "image/*") -> bytes:
    """Fetch a file.

    Args:
        url: An http or https URL.
        rules: Where it may be fetched from.
        timeout_s: Seconds for everything together, redirects included.
        most_bytes: Largest file.
        accept: The MIME types that are asked for.

    Raises:
        FetchError: If the rules forbid it, or it cannot be fetched.
    """
    deadline = time.monotonic() + timeout_s
    try:
        for hop in range(_MOST_REDIRECTS + 1):
            with _answer(url, rules, deadline, accept, is_first=hop == 0) as answer:
                if answer.status not in _REDIRECTS:
                    content = _body(answer, most_bytes)
                    if time.monotonic() >= deadline:  # a body without a length ends where it is cut off
                        raise TimeoutError
                    return content
                location = answer.headers["Location"]
                if not location:
                    msg = f"the server answers with status {answer.status} and no address to go on"
                    raise FetchError(msg)
                url = urljoin(url, location)
    except FetchError:
        if time.monotonic() < deadline:
            raise
        cause: Exception | None = None
    except (OSError, http.client.HTTPException, ValueError) as error:
        if time.monotonic() < deadline:
            msg = f"the connection failed: {_reason(error)}"
            raise FetchError(msg) from error
        cause = error
    else:
        msg = f"it is redirected more than {_MOST_REDIRECTS} times"
        raise FetchError(msg)
    msg = f"it took longer than {timeout_s:.3g} seconds"
    raise FetchError(msg) from cause


def _reason(error: Exception) -> str:
    """Name a failure by this system's words, and never by those of the server."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return type(error).__name__


# --- one request ---


@contextlib.contextmanager
def _answer(
    url: str, rules: FetchRules, deadline: float, accept: str, *, is_first: bool
) -> Iterator[http.client.HTTPResponse]:
    """Send one request, and yield the answer whose body is still to be read."""
    parts, port = _checked(url, rules, is_first=is_first)
    host = _plain(parts.hostname or "")
    connection = _Connection(host, port, addresses=_addresses(host, port, rules, deadline, is_first=is_first))
    connection.deadline = deadline
    if parts.scheme == "https":
        connection.context, connection.default_port = _tls_context(), http.client.HTTPS_PORT
    headers = {"User-Agent": f"langchain-quantllm/{__version__}", "Accept": accept, "Accept-Encoding": "identity"}
    if is_first and parts.username is not None:
        login = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        headers["Authorization"] = "Basic " + base64.b64encode(login.encode()).decode()
    target = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._") + (
        f"?{quote(parts.query, safe=_QUERY)}" if parts.query else ""
    )
    watchdog = threading.Timer(max(0.0, deadline - time.monotonic()), connection.cut)
    watchdog.daemon = True
    watchdog.start()
    try:
        connection.request("GET", target, headers=headers)
        with connection.getresponse() as answer:
            yield answer
    finally:
        watchdog.cancel()
        connection.close()


_QUERY = "/%:@!$&'()*+,;=~-._?[]"


def _checked(url: str, rules: FetchRules, *, is_first: bool) -> tuple[SplitResult, int]:
    """Read a URL, and check it against the rules as far as that needs no DNS."""
    what = "the address" if is_first else "a redirect"
    try:
        parts = urlsplit(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError as error:
        msg = f"{what} is no valid URL"
        raise FetchError(msg) from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        msg = f"{what} is no http(s) URL of a host"
        raise FetchError(msg)
    if not is_first and parts.username is not None:
        msg = "a redirect holds a user's name, which is not sent"
        raise FetchError(msg)
    if not rules.allows(parts.hostname):
        msg = f"{what} leads to a host that is not among allowed_domains"
        raise FetchError(msg)
    return parts, port


def _addresses(host: str, port: int, rules: FetchRules, deadline: float, *, is_first: bool) -> list[str]:
    """Look up a host's addresses, and check all of them."""
    found: list[list[str]] = []
    errors: list[Exception] = []

    def look_up() -> None:
        try:
            answers = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            found.append(list(dict.fromkeys(str(answer[4][0]) for answer in answers)))
        except (OSError, UnicodeError, ValueError) as error:
            errors.append(error)

    # The system's look-up takes no timeout; a thread that it holds up longer ends by itself.
    thread = threading.Thread(target=look_up, name="quantllm-dns", daemon=True)
    thread.start()
    thread.join(max(0.0, deadline - time.monotonic()))
    if errors or (found and not found[0]):
        msg = "there is no host of this name" if is_first else "a redirect leads to a host that is not there"
        raise FetchError(msg) from (errors[0] if errors else None)
    if not found:
        raise TimeoutError
    if not all(is_allowed(address, private=rules.allow_private) for address in found[0]):
        what = "its host is" if is_first else "a redirect leads to a host that is"
        msg = f"{what} not on the public internet, which only allow_private_urls=True allows"
        raise FetchError(msg)
    return found[0]


def _tls_context() -> Any:
    import httpx  # a requirement of huggingface_hub; it brings certificates for systems that have none

    return httpx.create_ssl_context()


class _Connection(http.client.HTTPConnection):
    """A connection to addresses that were checked, in the name of their host."""

    context: Any = None
    deadline: float = 0.0

    def __init__(self, host: str, port: int, *, addresses: Iterable[str]) -> None:
        super().__init__(host, port)
        self._addresses = list(addresses)
        self._current: socket.socket | None = None  # `sock` is None while the body of a last answer is read

    def connect(self) -> None:
        """Connect to the first address that answers; with TLS, check that it is the host's."""
        failure: OSError = TimeoutError()
        for index, address in enumerate(self._addresses):
            left_s = self.deadline - time.monotonic()
            if left_s <= 0:
                raise TimeoutError
            try:
                self._use(socket.create_connection((address, self.port), left_s / (len(self._addresses) - index)))
                break
            except OSError as error:
                failure = error
        else:
            raise failure
        self.sock.settimeout(max(0.01, self.deadline - time.monotonic()))
        if self.context is not None:
            # The handshake is a step of its own, so that it can be cut off.
            options = {"server_hostname": self.host, "do_handshake_on_connect": False}
            secured = self.context.wrap_socket(self.sock, **options)
            self._use(secured)
            secured.do_handshake()

    def _use(self, sock: Any) -> None:
        self._current = self.sock = sock
        if time.monotonic() >= self.deadline:  # `cut` may have come too early for this socket
            raise TimeoutError

    def cut(self) -> None:
        """End whatever waits for the other side, in whatever thread; a server may send a byte now and then for ever."""
        if self._current is not None:
            with contextlib.suppress(OSError):
                socket.socket.shutdown(self._current, socket.SHUT_RDWR)  # not that of TLS, where another thread may be


def _body(answer: http.client.HTTPResponse, most_bytes: int) -> bytes:
    """Read the body of an answer; it is not decompressed, so that few bytes stay few."""
    if answer.status != http.client.OK:
        msg = f"the server answers with status {answer.status}"
        raise FetchError(msg)
    if answer.headers.get("Content-Encoding", "identity").strip().lower() not in ("", "identity"):
        msg = "the server compresses it, though it is asked not to"
        raise FetchError(msg)
    content = bytearray()
    is_large = (answer.length or 0) > most_bytes
    while not is_large and (piece := answer.read(_CHUNK_BYTES)):
        content += piece
        is_large = len(content) > most_bytes
    if is_large:
        msg = f"it is larger than {most_bytes >> 20} MiB"
        raise FetchError(msg)
    if answer.length:
        msg = "the connection ended in the middle of it"
        raise FetchError(msg)
    return bytes(content)

"""Fetching by URLs of strangers: addresses, names that change their address, redirects, deadlines, sizes, secrets."""

from __future__ import annotations

import gzip
import io
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from langchain_quantllm import ChatQuantizedHuggingFace
from langchain_quantllm.chat.addresses import is_allowed
from langchain_quantllm.chat.fetching import FetchError, FetchRules, fetch
from langchain_quantllm.chat.images import ImageSource, read_image
from langchain_quantllm.errors import InvalidOptionError

SECRET = b"db_password=example"
PUBLIC = "93.184.215.14"
LOCAL = FetchRules(allow_private=True)
Answer = Callable[[socket.socket, bytes], Any]


def ok(body: bytes, *headers: str, length: bool = True) -> bytes:
    lines = ["HTTP/1.1 200 OK", *([f"Content-Length: {len(body)}"] if length else []), "Connection: close", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def moved(location: str, status: int = 302) -> bytes:
    head = f"HTTP/1.1 {status} {SECRET.decode()}\r\nLocation: {location}\r\n"
    return f"{head}Content-Length: 0\r\nConnection: close\r\n\r\n".encode()


class Server:
    """A server on this machine that answers each connection by a function, and keeps what it was asked."""

    def __init__(self, answer: Answer | bytes, context: ssl.SSLContext | None = None) -> None:
        self.asked: list[bytes] = []
        self._answer: Answer = (lambda c, _: c.sendall(answer)) if isinstance(answer, bytes) else answer
        self._context = context
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._handle, args=(connection,), daemon=True).start()

    def _handle(self, connection: socket.socket) -> None:
        try:
            if self._context is not None:
                connection = self._context.wrap_socket(connection, server_side=True)
            request = connection.recv(65536)
            self.asked.append(request)
            self._answer(connection, request)
        except OSError:
            pass
        finally:
            connection.close()

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def serve(socket_enabled: None) -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(*args: Any) -> Server:
        servers.append(Server(*args))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[list[str]]]:
    """The DNS: for each name the addresses of its answers, one answer after the other, the last for ever."""
    known: dict[str, list[list[str]]] = {}
    real = socket.getaddrinfo

    def look_up(host: str, port: int, *args: Any, **options: Any) -> Any:
        if host not in known:
            return real(host, port, *args, **options)
        answers = known[host]
        found = answers.pop(0) if len(answers) > 1 else answers[0]
        return [entry for address in found for entry in real(address, port, *args, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    return known


@pytest.fixture
def roads(monkeypatch: pytest.MonkeyPatch) -> dict[str, Server]:
    """The network beyond: connections to these addresses end at servers of this machine; to others, nowhere."""
    known: dict[str, Server] = {}
    real = socket.create_connection

    def connect(address: tuple[str, int], *args: Any, **options: Any) -> Any:
        if address[0] in known:
            return real(("127.0.0.1", known[address[0]].port), *args, **options)
        if address[0].startswith("127."):
            return real(address, *args, **options)
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr(socket, "create_connection", connect)
    return known


def get(url: str, rules: FetchRules = FetchRules(), timeout_s: float = 5.0, most_bytes: int = 2**20) -> bytes:  # noqa: B008
    return fetch(url, rules, timeout_s=timeout_s, most_bytes=most_bytes)


def refused(url: str, *args: Any, **options: Any) -> str:
    with pytest.raises(FetchError) as caught:
        get(url, *args, **options)
    assert SECRET.decode() not in str(caught.value)
    return str(caught.value)


# --- addresses ---

_NEVER = [
    "169.254.169.254",
    "169.254.170.2",
    "fe80::1",
    "fe80::1%eth0",
    "fd00:ec2::254",
    "100.100.100.200",
    "168.63.129.16",
    "192.0.0.192",
    "0.0.0.0",
    "::",
    "224.0.0.1",
    "239.255.255.250",
    "ff02::1",
    "255.255.255.255",
    "240.0.0.1",
    "::ffff:169.254.169.254",
    "64:ff9b::a9fe:a9fe",
    "64:ff9b:1::1",
    "2002:7f00:1::",
    "2001:0:7f00:1::",
    "::7f00:1",
    "2001:db8::1",
    "192.0.2.1",
    "198.18.0.1",
    "fec0::1",
    "not an address",
]
_OWN = ["127.0.0.1", "127.8.9.1", "10.1.2.3", "172.16.0.1", "172.31.255.255", "192.168.1.1", "100.64.0.1", "::1"]
_OWN += ["fd12:3456::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "64:ff9b::c0a8:101"]
_PUBLIC = [PUBLIC, "1.1.1.1", "172.15.0.1", "172.32.0.1", "100.63.0.1", "100.128.0.1", "2606:4700::1111"]
_PUBLIC += ["::ffff:1.1.1.1", "64:ff9b::101:101", "192.0.1.1", "223.255.255.255"]


@pytest.mark.parametrize("private", [False, True])
def test_addresses(private: bool) -> None:
    assert not [address for address in _NEVER if is_allowed(address, private=private)]
    assert [address for address in _OWN if is_allowed(address, private=private)] == (_OWN if private else [])
    assert [address for address in _PUBLIC if is_allowed(address, private=private)] == _PUBLIC


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "127.1",
        "2130706433",
        "0x7f000001",
        "017700000001",
        "0x7f.0.0.1",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]",
        "localhost",
        "LOCALHOST.",
        "0",
        "0.0.0.0",
        "[::]",
        "127.0.0.1.",
        "１２７.0.0.1",
        "127。0。0。1",
    ],
)
def test_this_machine_is_not_reached_under_any_name(serve: Any, host: str) -> None:
    server = serve(ok(SECRET))
    said = refused(f"http://{host}:{server.port}/meta-data")
    assert "not on the public internet" in said or "no host of this name" in said
    assert server.asked == []


def test_a_name_is_looked_up_once(serve: Any, names: Any, roads: Any) -> None:
    """A second answer would lead to this machine."""
    server = serve(ok(b"picture"))
    inner = serve(ok(SECRET))
    names["rebinds.example"] = [[PUBLIC], ["127.0.0.1"]]
    roads[PUBLIC] = server
    assert get(f"http://rebinds.example:{inner.port}/a%20b?x=1#part") == b"picture"
    request = server.asked[0].split(b"\r\n")
    assert request[0] == b"GET /a%20b?x=1 HTTP/1.1"
    assert f"Host: rebinds.example:{inner.port}".encode() in request
    assert b"Accept-Encoding: identity" in request
    assert inner.asked == []
    assert names["rebinds.example"] == [["127.0.0.1"]]
    assert "not on the public internet" in refused(f"http://rebinds.example:{inner.port}/")
    assert inner.asked == []


def test_one_address_that_is_not_public_is_enough(serve: Any, names: Any, roads: Any) -> None:
    roads[PUBLIC] = server = serve(ok(SECRET))
    for other in ("10.0.0.1", "169.254.169.254", "::1"):
        names["both.example"] = [[PUBLIC, other]]
        assert "not on the public internet" in refused("http://both.example/")
    names["none.example"] = [[]]
    assert "no host of this name" in refused("http://none.example/")
    assert server.asked == []


def test_the_next_address_is_tried(serve: Any, names: Any, roads: Any) -> None:
    roads[PUBLIC] = serve(ok(b"picture"))
    names["two.example"] = [["1.1.1.1", PUBLIC]]
    assert get("http://two.example/") == b"picture"


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_checked_like_the_first_address(serve: Any, names: Any, roads: Any, status: int) -> None:
    inner = serve(ok(SECRET))
    names["first.example"], names["inner.example"] = [[PUBLIC]], [["127.0.0.1"]]
    for target in (f"{inner.url}/admin", f"http://inner.example:{inner.port}/", "http://169.254.169.254/latest"):
        roads[PUBLIC] = serve(moved(target, status))
        said = refused("http://first.example/")
        assert said == "a redirect leads to a host that is not on the public internet, which only " + (
            "allow_private_urls=True allows"
        )
    for target in ("file:///etc/passwd", "ftp://first.example/", "data:image/png;base64,aGk=", "gopher://x/"):
        roads[PUBLIC] = serve(moved(target, status))
        assert refused("http://first.example/") == "a redirect is no http(s) URL of a host"
    assert inner.asked == []


def test_redirects_are_followed_a_few_times(serve: Any) -> None:
    def count(connection: socket.socket, request: bytes) -> None:
        left = int(request.split()[1].lstrip(b"/"))
        connection.sendall(moved(f"/{left - 1}") if left else ok(b"picture"))

    server = serve(count)
    assert get(f"{server.url}/5", LOCAL) == b"picture"
    assert refused(f"{server.url}/6", LOCAL) == "it is redirected more than 5 times"
    assert "no address to go on" in refused(serve(b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\n\r\n").url, LOCAL)


def test_a_password_goes_to_its_host_alone(serve: Any) -> None:
    last = serve(ok(b"picture"))
    first = serve(moved(f"{last.url}/picture"))
    assert get(first.url.replace("//", "//me:p%40ss@"), LOCAL) == b"picture"
    assert b"Authorization: Basic bWU6cEBzcw==" in first.asked[0]
    assert b"uthorization" not in last.asked[0]
    assert b"eferer" not in last.asked[0]
    there = serve(moved(last.url.replace("//", "//you:secret@")))
    assert "user's name, which is not sent" in refused(there.url, LOCAL)


def test_metadata_is_not_reached_even_where_private_addresses_are(serve: Any, names: Any) -> None:
    names["metadata.example"] = [["169.254.169.254"]]
    for host in ("169.254.169.254", "metadata.example", "[fd00:ec2::254]", "[::ffff:169.254.169.254]", "0.0.0.0"):
        assert "not on the public internet" in refused(f"http://{host}/", LOCAL)


def test_proxies_of_the_environment_are_not_used(
    serve: Any, names: Any, roads: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = serve(ok(SECRET))
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, proxy.url)
    names["far.example"], roads[PUBLIC] = [[PUBLIC]], serve(ok(b"picture"))
    assert get("http://far.example/") == b"picture"
    assert proxy.asked == []


# --- domains ---


def test_allowed_domains(serve: Any, names: Any, roads: Any) -> None:
    roads[PUBLIC] = server = serve(ok(b"picture"))
    rules = FetchRules(allowed_domains=("Pictures.example", "*.cdn.example", "bücher.example"))
    hosts = ("pictures.example", "PICTURES.example.", "a.cdn.example", "b.a.cdn.example", "xn--bcher-kva.example")
    for host in hosts:
        names[host.lower().removesuffix(".")] = [[PUBLIC]]
        assert get(f"http://{host}/", rules) == b"picture"
    count = len(server.asked)
    for host in ("example", "evil-pictures.example", "pictures.example.evil.example", "cdn.example", "xcdn.example"):
        names[host] = [[PUBLIC]]
        assert "not among allowed_domains" in refused(f"http://{host}/", rules)
    assert "not among allowed_domains" in refused("http://pictures.example@evil.example/", rules)
    assert "not among allowed_domains" in refused("http://evil.example#@pictures.example/", rules)
    assert len(server.asked) == count
    roads[PUBLIC] = serve(moved("http://evil.example/"))
    assert refused("http://pictures.example/", rules) == "a redirect leads to a host that is not among allowed_domains"
    names["pictures.example"] = [["127.0.0.1"]]  # an allowed name may still lead inside
    assert "not on the public internet" in refused("http://pictures.example/", rules)
    assert "not among" in refused(server.url, FetchRules(allow_private=True, allowed_domains=()))


@pytest.mark.parametrize("domain", ["http://a.example", "a.example/x", "a.example:80", "*", "*.", "", "a b", 3, "a@b"])
def test_domains_that_are_none(domain: Any) -> None:
    with pytest.raises(InvalidOptionError, match="no name of a host"):
        FetchRules(allowed_domains=("good.example", domain))


def test_the_chat_models_fields() -> None:
    with pytest.raises(InvalidOptionError, match="allowed_domains holds 'http://x'"):
        ChatQuantizedHuggingFace(model="x", allowed_domains=["http://x"])
    chat = ChatQuantizedHuggingFace(model="x", allowed_domains=["x.example"], allow_private_urls=True)
    assert chat._fetch_rules() == FetchRules(allow_private=True, allowed_domains=("x.example",))
    assert ChatQuantizedHuggingFace(model="x")._fetch_rules() == FetchRules()


# --- the deadline, sizes and encodings ---


def _trickle(before: bytes) -> Answer:
    def answer(connection: socket.socket, _: bytes) -> None:
        connection.sendall(before)
        for _ in range(200):
            connection.sendall(b"a")
            time.sleep(0.05)

    return answer


_SLOW: dict[str, Answer] = {
    "nothing": lambda *_: time.sleep(5),
    "status": _trickle(b"HTTP/1.1 2"),
    "headers": _trickle(b"HTTP/1.1 200 OK\r\nX-A: "),
    "body": _trickle(b"HTTP/1.1 200 OK\r\nContent-Length: 10000\r\n\r\n"),
    "body without a length": _trickle(b"HTTP/1.1 200 OK\r\n\r\n"),
    "chunks": _trickle(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1000\r\n"),
    "size of a chunk": _trickle(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"),
    "continue": lambda c, _: [(c.sendall(b"HTTP/1.1 100 Continue\r\n\r\n"), time.sleep(0.02)) for _ in range(300)],
}


@pytest.mark.parametrize("what", _SLOW)
def test_one_deadline_holds_for_everything(serve: Any, what: str) -> None:
    began = time.monotonic()
    assert refused(serve(_SLOW[what]).url, LOCAL, timeout_s=0.4) == "it took longer than 0.4 seconds"
    assert time.monotonic() - began < 0.9


def test_it_holds_for_redirects_together(serve: Any) -> None:
    def slow(connection: socket.socket, request: bytes) -> None:
        time.sleep(0.2)
        connection.sendall(moved("/again"))

    began = time.monotonic()
    assert refused(serve(slow).url, LOCAL, timeout_s=0.5) == "it took longer than 0.5 seconds"
    assert time.monotonic() - began < 1


def test_it_holds_for_dns_and_connecting(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    began = time.monotonic()
    full = socket.create_server(("127.0.0.1", 0), backlog=0)
    waiting = [socket.socket() for _ in range(4)]  # nobody accepts them, and no further one is answered
    for each in waiting:
        each.setblocking(False)
        each.connect_ex(full.getsockname())
    assert refused(f"http://127.0.0.1:{full.getsockname()[1]}/", LOCAL, timeout_s=0.4).startswith("it took longer")
    for each in (full, *waiting):
        each.close()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(2) or [])
    assert refused("http://slow.example/", timeout_s=0.4) == "it took longer than 0.4 seconds"
    assert time.monotonic() - began < 2


def test_a_handshake_that_never_ends(serve: Any) -> None:
    began = time.monotonic()
    server = serve(_trickle(b"\x16\x03\x03\x3f\xff\x02\x00\x3f\xfb"))  # a part of TLS, byte by byte
    url = server.url.replace("http:", "https:")
    assert refused(url, LOCAL, timeout_s=0.4) == "it took longer than 0.4 seconds"
    assert time.monotonic() - began < 1.2


def test_few_bytes_stay_few(serve: Any) -> None:
    bomb = gzip.compress(gzip.compress(b"\0" * 2**24))
    for coding in ("gzip", "gzip, gzip", "deflate", "br", "zstd"):
        assert "compresses it" in refused(serve(ok(bomb, f"Content-Encoding: {coding}")).url, LOCAL)
    assert get(serve(ok(bomb, "Content-Encoding: identity")).url, LOCAL) == bomb


@pytest.mark.parametrize("length", [True, False])
def test_large_files_end_at_the_bound(serve: Any, length: bool) -> None:
    sent = 0

    def pour(connection: socket.socket, _: bytes) -> None:
        nonlocal sent
        head = b"Content-Length: 99999999\r\n" if length else b""
        connection.sendall(b"HTTP/1.1 200 OK\r\n" + head + b"\r\n")
        for _ in range(1000):
            connection.sendall(b"x" * 2**16)
            sent += 2**16

    assert refused(serve(pour).url, LOCAL) == "it is larger than 1 MiB"
    time.sleep(0.1)
    assert sent < 20 * 2**20  # what the system's buffers took, and not all
    assert len(get(serve(ok(b"x" * 2**20)).url, LOCAL)) == 2**20


def test_answers_that_are_none(serve: Any) -> None:
    for answer, says in {
        ok(b"short").replace(b": 5", b": 9"): "ended in the middle",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabc": "the connection failed",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + SECRET + b"\r\n": "the connection failed",
        SECRET: "the connection failed: BadStatusLine",
        b"": "the connection failed",
        b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 500 + b"\r\n": "the connection failed",
        b"HTTP/1.1 200 OK\r\nA: " + b"x" * 2**17 + b"\r\n\r\n": "the connection failed",
        b"HTTP/1.1 404 " + SECRET + b"\r\nContent-Length: 19\r\n\r\n" + SECRET: "the server answers with status 404",
        b"HTTP/1.1 206 Partial\r\nContent-Length: 19\r\n\r\n" + SECRET: "status 206",
        b"HTTP/1.1 304 Not\r\nLocation: /\r\n\r\n": "status 304",
    }.items():
        assert says in refused(serve(answer).url, LOCAL)


@pytest.mark.parametrize(
    "url",
    [
        "http://",
        "http:///x",
        "http://[::1",
        "http://a:b/",
        "http://a:99999/",
        "https:",
        "http://a..b/",
        "http://a\x00b/",
        "ftp://x/",
        "//x/",
        "http://%31%32%37.1/",
        "http://aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa.com/",
    ],
)
def test_urls_that_are_none(socket_enabled: None, url: str) -> None:
    assert refused(url)


def test_a_request_cannot_be_written_into_a_url(serve: Any) -> None:
    server = serve(ok(b"picture"))
    assert get(f"{server.url}/a\r\nX-Evil: 1 HTTP/1.1\r\n\r\n?b c\x7fd", LOCAL) == b"picture"
    assert b"\r\nX-Evil" not in server.asked[0]
    assert server.asked[0].startswith(b"GET /aX-Evil:%201%20HTTP/1.1?b%20c%7Fd HTTP/1.1\r\n")


# --- TLS ---


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")
def test_certificates_are_those_of_the_name(
    serve: Any, names: Any, roads: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = "-x509 -newkey rsa:2048 -nodes -days 2 -keyout key -out cert -subj /CN=x"
    options += " -addext subjectAltName=DNS:pictures.example"
    subprocess.run(["openssl", "req", *options.split()], cwd=tmp_path, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert", tmp_path / "key")
    asked: list[str | None] = []
    context.sni_callback = lambda _, name, __: asked.append(name)
    roads[PUBLIC] = serve(ok(b"picture"), context)
    names["pictures.example"] = names["other.example"] = [[PUBLIC]]
    assert "CERTIFICATE" in refused("https://pictures.example/").upper().replace("SSLCERT", "CERTIFICATE")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cert"))
    assert get("https://pictures.example/") == b"picture"
    assert b"Host: pictures.example\r\n" in roads[PUBLIC].asked[-1]
    count = len(roads[PUBLIC].asked)
    assert refused("https://other.example/").startswith("the connection failed: ")
    assert len(roads[PUBLIC].asked) == count
    assert asked == ["pictures.example", "pictures.example", "other.example"]
    names["first.example"], roads["1.1.1.1"] = [["1.1.1.1"]], serve(moved("https://pictures.example/x"))
    assert get("http://first.example/") == b"picture"


# --- images ---


def read(url: str, rules: FetchRules = LOCAL) -> Any:
    return read_image(ImageSource(message=3, kind="image", url=url), 5.0, rules)


def test_errors_say_nothing_of_what_was_found(serve: Any) -> None:
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (300, 300)).save(file, "PNG")
    broken = file.getvalue().replace(b"IDAT", b"key!")
    for body in (SECRET, broken, file.getvalue()[:200], b"<svg>" + SECRET + b"</svg>", b"GIF89a" + SECRET):
        for answer in (ok(body), ok(body, length=False)):
            server = serve(answer)
            with pytest.raises(
                InvalidOptionError, match="the image of message 3, from .*(is not an image|is damaged)"
            ) as e:
                read(f"{server.url}/x?sig={SECRET.decode()}")
            for word in ("password", "key!", "svg", "GIF89", "not processed"):
                assert word not in str(e.value)
    with pytest.raises(InvalidOptionError, match=r"from http://127.0.0.1:9/a: .*in base64") as caught:
        read("http://me:" + "db_password@127.0.0.1:9/a?db_password=x#db_password")
    assert "password" not in str(caught.value)


def test_an_image_is_fetched_only_where_the_rules_allow(serve: Any) -> None:
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (3, 2)).save(file, "PNG")
    server = serve(ok(file.getvalue()))
    with pytest.raises(
        InvalidOptionError, match="message 3 cannot be fetched from http://127.* allow_private_urls=True"
    ):
        read_image(ImageSource(message=3, kind="image", url=server.url))
    assert server.asked == []
    assert read(server.url).size == (3, 2)

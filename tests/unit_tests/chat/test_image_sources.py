"""The sources of images: base64, the web, and sources that are none."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from langchain_core.messages import HumanMessage, SystemMessage
from PIL import Image

from langchain_quantllm.chat import media
from langchain_quantllm.errors import InvalidOptionError, UnsupportedError
from tests.support.chat_images import ask, block, chat_of, plain, transformers_answer
from tests.support.models import forwards
from tests.support.vision import picture, png


@pytest.fixture(scope="module")
def web() -> Iterator[str]:
    """A server on this machine with a picture, something else, and things that do not end."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/moved":
                self.send_response(302)
                self.send_header("Location", "/picture.png")
                self.end_headers()
                return
            self.send_response(404 if self.path == "/nothing" else 200)
            self.end_headers()
            if self.path == "/picture.png":
                self.wfile.write(base64.b64decode(png(picture(4))))
            elif self.path == "/page.html":
                self.wfile.write(b"<!DOCTYPE html><html></html>")
            elif self.path == "/drops":
                for _ in range(100):
                    self.wfile.write(b"x")
                    time.sleep(0.02)  # a slow server, on purpose
            elif self.path == "/large":
                self.wfile.write(b"x" * 300_000)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def local(folders: Any) -> Any:
    """A chat model that may fetch from this machine."""
    return chat_of(folders["llava"], allow_private_urls=True)


@pytest.mark.enable_socket
def test_urls_are_fetched(chat: Any, local: Any, web: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = transformers_answer(chat, [plain("user", 4, "Hm?")])[0]
    for path in ("/picture.png", "/moved"):
        for dialect in (
            {"type": "image", "url": web + path},
            {"type": "image_url", "image_url": {"url": web + path}},
            {"type": "image_url", "image_url": web + path},
            {"type": "image", "source_type": "url", "url": web + path},
            {"type": "image", "source": {"type": "url", "url": web + path}},
        ):
            assert local.invoke([HumanMessage([dialect, "Hm?"])]).content == expected

    def fetch(path: str, **options: Any) -> Any:
        return local.invoke([HumanMessage("a"), HumanMessage([{"type": "image", "url": path}])], **options)

    with pytest.raises(InvalidOptionError, match="message 1 cannot be fetched from .*/nothing: .*404.*in base64"):
        fetch(f"{web}/nothing")
    with pytest.raises(
        InvalidOptionError, match=r"message 1, from .*/page.html, is not an image that can be read; PNG"
    ):
        fetch(f"{web}/page.html")
    with pytest.raises(InvalidOptionError, match="cannot be fetched from http://127.0.0.1:9/"):
        fetch("http://127.0.0.1:9/")
    began = time.monotonic()
    with pytest.raises(InvalidOptionError, match="longer than 0.3 seconds"):
        fetch(f"{web}/drops", timeout=0.3)
    assert time.monotonic() - began < 1.5
    monkeypatch.setattr(media, "MOST_BYTES", 2**17)
    with pytest.raises(InvalidOptionError, match=r"/large: it is larger than"):
        fetch(f"{web}/large")


@pytest.mark.enable_socket
async def test_fetching_leaves_the_event_loop_free(local: Any, web: str) -> None:
    beats = 0

    async def beat() -> None:
        nonlocal beats
        while True:
            await asyncio.sleep(0.01)
            beats += 1

    task = asyncio.create_task(beat())
    with pytest.raises(InvalidOptionError, match="longer than 0.4 seconds"):
        await local.ainvoke([HumanMessage([{"type": "image", "url": f"{web}/drops"}])], timeout=0.4)
    task.cancel()
    assert beats > 15


_TRUNCATED = base64.b64encode(base64.b64decode(png(picture(0, (200, 200))))[:200]).decode()


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ({"base64": "no base64!"}, InvalidOptionError, "the image of message 1 is not valid base64"),
        ({"base64": "abc"}, InvalidOptionError, "message 1 is not valid base64"),
        ({"base64": ""}, InvalidOptionError, "message 1 is empty"),
        ({"base64": "aGVsbG8gd29ybGQ="}, InvalidOptionError, "message 1 is not an image.*b'hello world'"),
        ({"base64": base64.b64encode(b"%!PS-Adobe-3.0 EPSF-3.0").decode()}, InvalidOptionError, "is not an image"),
        ({"base64": _TRUNCATED}, InvalidOptionError, "message 1 is damaged"),
        ({"url": "data:image/svg+xml;utf8,<svg/>"}, InvalidOptionError, "data URL must look like"),
        ({"url": "data:image/png;base64,"}, InvalidOptionError, "message 1 is empty"),
        ({"url": "file:///etc/passwd"}, UnsupportedError, "message 1 is given as 'file:.*not read by their path"),
        ({"url": "picture.png"}, UnsupportedError, "given as 'picture.png'.*base64"),
        ({"url": "ftp://host/picture.png"}, UnsupportedError, "must be base64"),
        ({"file_id": "file-123"}, UnsupportedError, "message 1 is given as file_id='file-123'.*another provider"),
        ({"source": {"type": "file", "file_id": "f1"}}, UnsupportedError, "file_id='f1'"),
        ({"source": 3}, InvalidOptionError, "message 1 holds .* an image without its data"),
        ({}, InvalidOptionError, "message 1 holds .* an image without its data"),
    ],
)
def test_sources_that_are_no_image(chat: Any, given: dict[str, Any], error: type[Exception], says: str) -> None:
    # LangChain itself wants a type beside base64.
    given = {"type": "image", "mime_type": "image/png", **given} if "base64" in given else {"type": "image", **given}
    message = HumanMessage([given, {"type": "text", "text": "What?"}])
    with forwards(chat) as seen, pytest.raises(error, match=says):
        chat.invoke([SystemMessage("Be brief."), message])
    assert seen.count == 0


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bombs(chat: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for most in (1500, 700):  # where Pillow warns, and where it raises
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", most)
        with pytest.raises(InvalidOptionError, match=f"message 0 has .*pixels.*MAX_IMAGE_PIXELS={most}"):
            chat.invoke([ask(0)])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert chat.invoke([ask(0)]).content


def test_other_media_and_models_of_text(chat: Any, tiny: Path) -> None:
    audio = {"type": "audio", "base64": "aGVsbG8=", "mime_type": "audio/wav"}
    with pytest.raises(UnsupportedError, match="message 0 holds a block of type 'audio'.* text and images only"):
        chat.invoke([HumanMessage([block(0), audio])])
    with pytest.raises(
        UnsupportedError, match="message 0 holds a block of type 'image', and this model reads text only"
    ):
        chat_of(tiny).invoke([ask(0)])
    with pytest.raises(
        InvalidOptionError, match="does not take this prompt with its images.*'<image>', which stands for an image"
    ):
        chat_of(Path(chat.model_id), special_tokens="allow").invoke([ask(0, text="What does <image> mean?")])
    assert chat.invoke(
        [ask(0, text="What does <image> mean?")]
    ).content  # a text of a message holds no place of an image

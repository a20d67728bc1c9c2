"""Files that only look like images."""

from __future__ import annotations

import base64
import io
import random
import struct
import time
import warnings
import zlib
from typing import Any

import pytest
from PIL import Image, PngImagePlugin

from langchain_quantllm.chat import media
from langchain_quantllm.chat.images import ImageSource, read_image
from langchain_quantllm.errors import InvalidOptionError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")


def read(content: bytes) -> Any:
    return read_image(ImageSource(message=0, kind="image", data=base64.b64encode(content).decode()))


def made(kind: str, size: tuple[int, int] = (40, 30), **options: Any) -> bytes:
    file = io.BytesIO()
    noise = Image.frombytes("RGB", size, random.Random(0).randbytes(3 * size[0] * size[1]))
    noise.save(file, kind, **options)
    return file.getvalue()


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """Make a PNG file of chunks, whose pixels are missing or a few bytes."""
    head = (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    body = b"\x89PNG\r\n\x1a\n"
    for name, data in (head, *chunks, (b"IEND", b"")):
        body += struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    return body


def _mutated(content: bytes, chance: random.Random) -> bytes:
    found = bytearray(content)
    for _ in range(chance.randint(1, 6)):
        at = chance.randrange(min(len(found), chance.choice((64, len(found)))))
        kind = chance.randrange(4)
        if kind == 0:
            found[at] = chance.randrange(256)
        elif kind == 1:
            found[at : at + 4] = chance.choice((b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff"))
        elif kind == 2:
            del found[at : at + chance.randint(1, 50)]
        else:
            found[at:at] = chance.randbytes(chance.randint(1, 20))
        if not found:
            return b"x"
    return bytes(found)


@pytest.mark.parametrize("count", [150, pytest.param(5000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", FORMATS)
def test_damaged_files_are_read_or_refused(kind: str, count: int) -> None:
    options = {"TIFF": {"compression": "tiff_deflate"}}.get(kind, {})
    exif = Image.Exif()
    exif[0x0112] = 6
    files = [made(kind, **options), made(kind, **({"exif": exif} if kind in ("PNG", "JPEG", "WEBP", "TIFF") else {}))]
    chance, refused = random.Random(1), 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(count):
            try:
                assert read(_mutated(chance.choice(files), chance)).mode == "RGB"
            except InvalidOptionError as error:
                assert str(error).startswith("the image of message 0 ")  # noqa: PT017
                refused += 1
    assert refused > 0  # of PNG all, as it has checksums


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bombs_are_refused_before_they_are_decoded() -> None:
    began = time.monotonic()
    pixels = zlib.compress(b"\0" * 2**20, 9)
    text = zlib.compress(b"\0" * 2**26, 9)
    for content, says in {
        png(2**31 - 1, 2**31 - 1, (b"IDAT", pixels)): "too many pixels|has .* pixels",
        png(10_000, 9_000, (b"IDAT", pixels)): "has 10000 x 9000 pixels",
        png(10, 10, (b"zTXt", b"Raw profile type exif\0\0" + text), (b"IDAT", pixels)): "is damaged",
        png(10, 10, (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + text), (b"IDAT", pixels)): "is damaged",
    }.items():
        with pytest.raises(InvalidOptionError, match=says):
            read(content)
    assert len(pixels) + len(text) < 100_000
    assert time.monotonic() - began < 2


def test_what_else_is_in_a_file_is_not_read() -> None:
    """Of many frames the first one, and of EXIF the rotation."""
    frames = [Image.new("RGB", (20, 10), (i % 256, 0, 0)) for i in range(300)]
    for kind in ("GIF", "WEBP", "TIFF"):
        file = io.BytesIO()
        frames[0].save(file, kind, save_all=True, append_images=frames[1:])
        assert read(file.getvalue()).size == (20, 10)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    exif[0x010E] = "x" * 60_000
    assert read(made("JPEG", exif=exif)).size == (30, 40)
    more = PngImagePlugin.PngInfo()
    for i in range(100):
        more.add_text(f"note {i}", "x" * 1000)
    assert read(made("PNG", pnginfo=more)).size == (40, 30)


@pytest.mark.parametrize("kind", ["ICO", "PPM", "PCX", "TGA", "ICNS", "DDS", "EPS", "PDF"])
def test_other_formats_are_not_decoded(kind: str) -> None:
    with pytest.raises(InvalidOptionError, match="is not an image that can be read"):
        read(made(kind, (32, 32)))


def test_data_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media, "MOST_BYTES", 30_000)
    small, large = made("PNG", (50, 50)), made("PNG", (200, 200))
    assert len(small) < 30_000 < len(large)
    for url in (False, True):

        def source(content: bytes, url: bool = url) -> ImageSource:
            data = base64.encodebytes(content).decode()  # in lines, as a file of base64 is
            given = {"url": f"DATA:image/png;base64,{data}"} if url else {"data": data}
            return ImageSource(message=2, kind="image", **given)

        assert read_image(source(small)).size == (50, 50)
        with pytest.raises(InvalidOptionError, match="message 2 is larger than 0 MiB"):
            read_image(source(large))

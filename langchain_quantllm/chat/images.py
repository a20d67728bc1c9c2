"""The images of messages: their sources, and reading them.

Owns decoding base64 and images, the bounds of both, and their errors; `fetching` fetches. Knows no message format, no
template and no model.
"""

from __future__ import annotations

import base64
import binascii
import io
from dataclasses import dataclass, field
from typing import Any

from langchain_quantllm.chat.fetching import FetchError, FetchRules, fetch, shown
from langchain_quantllm.errors import InvalidOptionError, UnsupportedError, first_line

FETCH_S = 20.0
"""Seconds after which fetching an image ends with an error."""

_MOST_BYTES = 64 * 2**20
_PUBLIC = FetchRules()

# Without EPS, for which Pillow starts another program, and without rare formats.
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")


@dataclass(frozen=True, kw_only=True)
class ImageSource:
    """An image in a message, not read yet: one of the three last fields.

    Args:
        message: The number of the message, for errors.
        kind: The type of its content block.
        data: The file in base64.
        url: An `http(s):` or `data:` URL.
        file_id: The name of a file at another provider.
    """

    message: int
    kind: str
    data: str | None = field(default=None, repr=False)
    url: str | None = None
    file_id: str | None = None


def read_image(source: ImageSource, timeout_s: float = FETCH_S, rules: FetchRules = _PUBLIC) -> Any:
    """Read an image.

    URLs are fetched, as far as the rules allow it. Files of this machine are not read by their path: messages often
    repeat the words of strangers, and the answer would tell them the content of the file.

    Args:
        source: The image in the message.
        timeout_s: Seconds after which fetching ends with an error.
        rules: Where images may be fetched from.

    Returns:
        A Pillow image in RGB, upright; the first frame of several.

    Raises:
        InvalidOptionError: If it cannot be fetched or decoded, is damaged, or has too many pixels.
        UnsupportedError: If the source is of a kind that is not read here.
    """
    name = f"the image of message {source.message}"
    if source.data is not None:
        return _open(_decode(source.data, name), name)
    url = source.url or ""
    scheme = url.partition(":")[0].lower()
    if scheme == "data":
        return image_of_data_url(url, name)
    if scheme in ("http", "https"):
        try:
            content = fetch(url, rules, timeout_s=timeout_s, most_bytes=_MOST_BYTES)
        except FetchError as error:
            msg = f"{name} cannot be fetched from {shown(url)}: {error}; check the address, or give it in base64."
            raise InvalidOptionError(msg) from error
        return _open(content, f"{name}, from {shown(url)},", quote=False)
    if source.file_id is not None:
        msg = f"{name} is given as file_id={source.file_id!r}, a file of another provider's; give it in base64."
        raise UnsupportedError(msg)
    msg = (
        f"{name} is given as {url[:60]!r}; it must be base64, a data URL or an http(s) URL. Files are not read by "
        "their path: open the file, and give its bytes in base64."
    )
    raise UnsupportedError(msg)


def image_of_bytes(content: bytes, name: str) -> Any:
    """Decode the content of a file.

    Args:
        content: The file.
        name: The image's name in errors.

    Returns:
        A Pillow image in RGB, upright; the first frame of several.

    Raises:
        InvalidOptionError: If it is too large, damaged, no image, or has too many pixels.
    """
    if len(content) > _MOST_BYTES:
        msg = f"{name} is larger than {_MOST_BYTES >> 20} MiB; give a smaller one."
        raise InvalidOptionError(msg)
    return _open(content, name)


def image_of_data_url(url: str, name: str) -> Any:
    """Decode a `data:` URL in base64; as `image_of_bytes`."""
    head, _, data = url.partition(",")
    if not head.endswith(";base64"):
        msg = f"{name} is given as {url[:60]!r}; a data URL must look like 'data:image/png;base64,...'."
        raise InvalidOptionError(msg)
    return _open(_decode(data, name), name)


def _decode(data: str, name: str) -> bytes:
    if len(data) > _MOST_BYTES // 3 * 4 + _MOST_BYTES // 16:  # with line ends
        msg = f"{name} is larger than {_MOST_BYTES >> 20} MiB; give a smaller one."
        raise InvalidOptionError(msg)
    try:
        content = base64.b64decode("".join(data.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        msg = f"{name} is not valid base64 ({error}); give base64.b64encode(bytes of the file).decode()."
        raise InvalidOptionError(msg) from error
    if not content:
        msg = f"{name} is empty; give base64.b64encode(bytes of the file).decode()."
        raise InvalidOptionError(msg)
    return content


def _open(content: bytes, name: str, *, quote: bool = True) -> Any:
    """Decode a file.

    Args:
        content: The file.
        name: What it is, for errors.
        quote: Errors may say what is in it. Not of a fetched one: whoever wrote its address could read it there.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    too_large = f"which Pillow takes for a decompression bomb (Image.MAX_IMAGE_PIXELS={Image.MAX_IMAGE_PIXELS})"
    try:
        image = Image.open(io.BytesIO(content), formats=_FORMATS)
        # Pillow warns at this bound and raises at twice of it.
        if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
            msg = f"{name} has {image.width} x {image.height} pixels, {too_large}; give a smaller one."
            raise InvalidOptionError(msg)
        # Source: `load_image` in transformers/image_utils.py, which processors use.
        return ImageOps.exif_transpose(image).convert("RGB")
    except InvalidOptionError:
        raise
    except UnidentifiedImageError as error:
        begin = f": it begins with {content[:16]!r}" if quote else ""
        msg = f"{name} is not an image that can be read{begin}; PNG, JPEG, WebP, GIF, BMP and TIFF are read."
        raise InvalidOptionError(msg) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        msg = f"{name} has too many pixels, {too_large}; give a smaller one."
        raise InvalidOptionError(msg) from error
    except Exception as error:  # Pillow's readers raise errors of any kind at damaged files
        why = f" ({first_line(error)})" if quote else ""
        msg = f"{name} is damaged{why}; get its file again."
        raise InvalidOptionError(msg) from error

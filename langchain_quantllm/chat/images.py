"""The images of messages: their sources, and reading them.

`media` reads the bytes; owns decoding them to images, the bounds of that, and its errors. Knows no message format, no
template and no model.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any, ClassVar

from langchain_quantllm.chat.fetching import FetchRules
from langchain_quantllm.chat.media import FETCH_S, MOST_BYTES, PUBLIC, MediaSource, bytes_of_data_url, read_file
from langchain_quantllm.errors import InvalidOptionError, first_line

# Without EPS, for which Pillow starts another program, and without rare formats.
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")


@dataclass(frozen=True, kw_only=True)
class ImageSource(MediaSource):
    """An image in a message, not read yet."""

    noun: ClassVar[str] = "image"
    example: ClassVar[str] = "image/png"


def read_image(source: ImageSource, timeout_s: float = FETCH_S, rules: FetchRules = PUBLIC) -> Any:
    """Read an image.

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
    file = read_file(source, timeout_s, rules)
    return _open(file.content, file.name, quote=file.is_own)


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
    if len(content) > MOST_BYTES:
        msg = f"{name} is larger than {MOST_BYTES >> 20} MiB; give a smaller one."
        raise InvalidOptionError(msg)
    return _open(content, name)


def image_of_data_url(url: str, name: str) -> Any:
    """Decode a `data:` URL in base64; as `image_of_bytes`."""
    return _open(bytes_of_data_url(url, name, ImageSource.example), name)


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

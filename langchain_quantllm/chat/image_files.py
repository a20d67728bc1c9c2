"""Pictures from paths, URLs in base64, bytes and Pillow images, for a program's own data; messages' are in `images`."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from langchain_quantllm.chat.images import image_of_bytes, image_of_data_url
from langchain_quantllm.errors import (
    InvalidOptionError,
    MissingPackageError,
    UnsupportedError,
    first_line,
    pip_install,
)


def read_images(images: Sequence[Any]) -> list[Any]:
    """Read pictures that a program names itself.

    Args:
        images: Paths, `data:` URLs in base64, bytes of files, open files, or Pillow images.

    Returns:
        Pillow images in RGB.

    Raises:
        UnsupportedError: If an element is the URL of a server.
        InvalidOptionError: If a picture is missing, damaged or too large, or an element is nothing of the above.
        MissingPackageError: If Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        msg = f"pictures need pillow: {pip_install('langchain-quantllm[vision]')}"
        raise MissingPackageError(msg) from error
    if isinstance(images, str | bytes | os.PathLike | Image.Image):
        msg = "embed_images takes a list of pictures, not one; write [picture], or embed_image."
        raise InvalidOptionError(msg)
    return [_read_image(image, f"picture {index}", Image.Image) for index, image in enumerate(images)]


def _read_image(image: Any, name: str, image_class: type) -> Any:
    if isinstance(image, image_class):
        return image.convert("RGB")  # type: ignore[attr-defined]
    if isinstance(image, bytes | bytearray | memoryview):
        return image_of_bytes(bytes(image), name)
    if isinstance(image, io.IOBase):
        return image_of_bytes(image.read(), name)
    if isinstance(image, str) and image.startswith("data:"):
        return image_of_data_url(image, name)
    if isinstance(image, str) and "://" in image and not image.startswith("file://"):
        msg = f"{name} is the URL {image[:60]!r}, and nothing is fetched from a network here; fetch it, and give bytes."
        raise UnsupportedError(msg)
    if not isinstance(image, str | os.PathLike):
        msg = f"{name} is {type(image).__name__}; give a path, a data URL, bytes of a file, or a Pillow image."
        raise InvalidOptionError(msg)
    path = Path(os.fspath(image).removeprefix("file://"))
    try:
        return image_of_bytes(path.read_bytes(), f"{name}, {path},")
    except OSError as error:
        msg = f"{name}, {path}, cannot be read ({first_line(error)}); check the path."
        raise InvalidOptionError(msg) from error

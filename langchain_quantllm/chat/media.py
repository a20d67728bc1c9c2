"""The media of messages: their sources, and reading the bytes of one.

Owns decoding base64 and data URLs, the bound of both, and their errors; `fetching` fetches. Knows no message format, no
template and no model, and nothing of what is in a file.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

from langchain_quantllm.chat.fetching import FetchError, FetchRules, fetch, shown
from langchain_quantllm.errors import InvalidOptionError, UnsupportedError

FETCH_S = 20.0
"""Seconds after which fetching a file ends with an error."""

MOST_BYTES = 64 * 2**20
PUBLIC = FetchRules()


@dataclass(frozen=True, kw_only=True)
class MediaSource:
    """A file in a message, not read yet: one of the three last fields.

    Args:
        message: The number of the message, for errors.
        kind: The type of its content block.
        data: The file in base64.
        url: An `http(s):` or `data:` URL.
        file_id: The name of a file at another provider.
    """

    noun: ClassVar[str] = "file"
    """What it is, for errors."""
    example: ClassVar[str] = "application/octet-stream"
    """A MIME type of its kind."""

    message: int
    kind: str
    data: str | None = field(default=None, repr=False)
    url: str | None = None
    file_id: str | None = None

    @property
    def name(self) -> str:
        """What it is and where it stands, for errors."""
        return f"the {self.noun} of message {self.message}"


class MediaFile(NamedTuple):
    """The bytes of a file, and what it is, for errors."""

    content: bytes
    name: str
    is_own: bool  # errors may say what is in it: not of a fetched one, whose writer could read it there


def read_file(source: MediaSource, timeout_s: float, rules: FetchRules) -> MediaFile:
    """Read a file of a message.

    URLs are fetched, as far as the rules allow it. Files of this machine are not read by their path: messages often
    repeat the words of strangers, and the answer would tell them the content of the file.

    Args:
        source: The file in the message.
        timeout_s: Seconds after which fetching ends with an error.
        rules: Where files may be fetched from.

    Raises:
        InvalidOptionError: If it cannot be fetched or decoded.
        UnsupportedError: If the source is of a kind that is not read here.
    """
    name = source.name
    if source.data is not None:
        return MediaFile(_decode(source.data, name), name, is_own=True)
    url = source.url or ""
    scheme = url.partition(":")[0].lower()
    if scheme == "data":
        return MediaFile(bytes_of_data_url(url, name, source.example), name, is_own=True)
    if scheme in ("http", "https"):
        accept = f"{source.example.partition('/')[0]}/*"
        try:
            content = fetch(url, rules, timeout_s=timeout_s, most_bytes=MOST_BYTES, accept=accept)
        except FetchError as error:
            msg = f"{name} cannot be fetched from {shown(url)}: {error}; check the address, or give it in base64."
            raise InvalidOptionError(msg) from error
        return MediaFile(content, f"{name}, from {shown(url)},", is_own=False)
    if source.file_id is not None:
        msg = f"{name} is given as file_id={source.file_id!r}, a file of another provider's; give it in base64."
        raise UnsupportedError(msg)
    msg = (
        f"{name} is given as {url[:60]!r}; it must be base64, a data URL or an http(s) URL. Files are not read by "
        "their path: open the file, and give its bytes in base64."
    )
    raise UnsupportedError(msg)


def bytes_of_data_url(url: str, name: str, example: str) -> bytes:
    """Decode a `data:` URL in base64.

    Args:
        url: The URL.
        name: What it is, for errors.
        example: A MIME type of its kind, for errors.

    Raises:
        InvalidOptionError: If it is not in base64, empty or too large.
    """
    head, _, data = url.partition(",")
    if not head.endswith(";base64"):
        msg = f"{name} is given as {url[:60]!r}; a data URL must look like 'data:{example};base64,...'."
        raise InvalidOptionError(msg)
    return _decode(data, name)


def _decode(data: str, name: str) -> bytes:
    if len(data) > MOST_BYTES // 3 * 4 + MOST_BYTES // 16:  # with line ends
        msg = f"{name} is larger than {MOST_BYTES >> 20} MiB; give a smaller one."
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

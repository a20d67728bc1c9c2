"""FFmpeg through PyAV: opening a file of a stranger's.

Source: `format_whitelist` and `protocol_whitelist` in FFmpeg's libavformat/options_table.h; `av.open` passes them on.
"""

from __future__ import annotations

from typing import Any, BinaryIO

_FORMATS = "wav,w64,aiff,au,caf,mp3,flac,aac,ogg,mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,asf,mpeg,mpegts,flv,amr"
"""Containers of sound, none of which names other files: no playlists, no `concat`."""


def open_container(file: BinaryIO) -> Any:
    """Open a file's container; it reads nothing but this file.

    Args:
        file: The file, open for reading bytes.

    Raises:
        Exception: One of `decoder_errors`.
    """
    import av

    # "none" is the name of no protocol: with it, a container that refers to another file or address cannot open it.
    return av.open(file, metadata_errors="ignore", options={"format_whitelist": _FORMATS, "protocol_whitelist": "none"})


def decoder_errors() -> tuple[type[Exception], ...]:
    """Return the classes of the errors that opening, demuxing and decoding raise at files of any content."""
    import av

    return (av.FFmpegError, ValueError, OSError, EOFError, IndexError, UnicodeError)

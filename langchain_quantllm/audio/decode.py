"""Decoding a sound file of a stranger's into samples, block by block.

Owns the formats that are read, the bounds of a file, mixing down and resampling, and the errors of all that. The
decoder (FFmpeg, in the package `av`) gets an open file, a list of formats, and no protocol: a playlist in place of a
sound leads to no other file and to no network.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias

from langchain_quantllm.compat.av_decoding import decoder_errors, open_container
from langchain_quantllm.compat.packages import is_installed
from langchain_quantllm.errors import InvalidOptionError, MissingPackageError, pip_install

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

Samples: TypeAlias = "npt.NDArray[np.float32]"
"""Samples of one channel, of shape `(samples,)`."""

logger = logging.getLogger(__name__)

SPEECH_RATE = 16_000
"""Samples a second of one channel, as speech models take them."""

_LOWEST_RATE, _HIGHEST_RATE = 1_000, 768_000
"""Sample rates in Hz that files of sound have; a header may claim 1 Hz, and one frame would become hours."""

_READ = "WAV, MP3, FLAC, M4A, OGG, WebM and the sound of MP4 and other videos are read"


class Sound:
    """The sound of one open file, decoded while it is iterated over, once.

    Attributes:
        duration_s: Its duration in seconds, as its header says it; None where that says nothing.
        read_s: Seconds that were decoded so far.
        damaged_at_s: Where in the file the decoder met damage first, in seconds; None for a file without.
    """

    def __init__(self, container: Any, name: str, rate: int, max_duration_s: float | None, limit: str) -> None:
        """Check the header of a file.

        Args:
            container: The open container of `av`.
            name: What the file is, for errors.
            rate: Samples a second of the blocks.
            max_duration_s: Most seconds of sound; None for any.
            limit: What sets that limit, for the error.

        Raises:
            InvalidOptionError: If it holds no sound, too much of it, or has a sample rate that no sound has.
        """
        self._container, self._name, self._rate = container, name, rate
        self._max_s, self._limit = max_duration_s, limit
        if not container.streams.audio:
            has_video = bool(container.streams.video)
            msg = f"{name} has no sound{', only pictures' if has_video else ''}; give a file with an audio track."
            raise InvalidOptionError(msg)
        self._stream = container.streams.audio[0]
        _check_rate(self._stream.rate or rate, name)
        known = container.duration
        self.duration_s = None if known is None or known < 0 else known / 1_000_000
        self.read_s = 0.0
        self.damaged_at_s: float | None = None
        if self.duration_s is not None:
            self._check_duration(self.duration_s)

    def __iter__(self) -> Iterator[Samples]:
        """Yield the samples in blocks: float32 of shape `(samples,)`, mixed down to one channel.

        Raises:
            InvalidOptionError: If nothing in the file can be decoded, or it lasts longer than it may.
        """
        count = 0
        for block in self._blocks():
            count += len(block)
            self.read_s = count / self._rate
            self._check_duration(self.read_s)
            yield block
        if not count:
            why = "is damaged: no sound in it can be decoded" if self.damaged_at_s is not None else "holds no sound"
            msg = f"{self._name} {why}; get its file again."
            raise InvalidOptionError(msg)
        if self.damaged_at_s is not None:
            logger.warning("%s is damaged from second %.1f on; what could be decoded is used.", *self._damage)

    @property
    def _damage(self) -> tuple[str, float]:
        return self._name, self.damaged_at_s or 0.0

    def _blocks(self) -> Iterator[Samples]:
        import av

        # Interleaved: of planar frames with more than eight channels PyAV 18 reads beyond the memory.
        kind, resampler = None, None
        for frame in self._frames():
            if (own := (frame.format.name, frame.layout.name, frame.layout.nb_channels, frame.sample_rate)) != kind:
                _check_rate(frame.sample_rate, self._name)
                if resampler is not None:  # the sound goes on in another form
                    yield from map(_mixed, resampler.resample(None))
                kind, resampler = own, av.AudioResampler("flt", rate=self._rate)
            if resampler is not None:
                yield from map(_mixed, resampler.resample(frame))
        if resampler is not None:
            yield from map(_mixed, resampler.resample(None))

    def _frames(self) -> Iterator[Any]:
        """Decode frame after frame; damaged packets are left out."""
        packets = self._container.demux(self._stream)
        while True:
            try:
                packet = next(packets)
            except StopIteration:
                return
            except decoder_errors():
                self._note_damage()
                return
            try:
                frames = packet.decode()
            except decoder_errors():
                self._note_damage()
                continue
            yield from frames

    def _note_damage(self) -> None:
        if self.damaged_at_s is None:
            self.damaged_at_s = self.read_s

    def _check_duration(self, duration_s: float) -> None:
        if self._max_s is not None and duration_s > self._max_s:
            msg = f"{self._name} lasts longer than {self._limit or f'max_duration_s={self._max_s:g} allows'}; cut it."
            raise InvalidOptionError(msg)


@contextlib.contextmanager
def open_sound(
    file: BinaryIO,
    name: str,
    *,
    rate: int = SPEECH_RATE,
    max_duration_s: float | None = None,
    limit: str = "",
) -> Iterator[Sound]:
    """Open a sound file for the block; `av`, of the extra `audio`, decodes it.

    Args:
        file: The file, open for reading bytes.
        name: What it is, for errors: `"the file talk.mp3"`.
        rate: Samples a second of the blocks.
        max_duration_s: Most seconds of sound; None for any.
        limit: What sets that limit, for the error; the option where it is empty.

    Yields:
        The sound, not decoded yet.

    Raises:
        MissingPackageError: If `av` is not installed.
        InvalidOptionError: If the file is empty, no sound, damaged, or too long.
    """
    check_decoder(name)
    if not file.read(1):
        msg = f"{name} is empty; give a file with sound."
        raise InvalidOptionError(msg)
    file.seek(0)
    try:
        container = open_container(file)
    except decoder_errors() as error:
        msg = f"{name} is not sound that can be read, or is damaged; {_READ}."
        raise InvalidOptionError(msg) from error
    with container:
        yield Sound(container, name, rate, max_duration_s, limit)


def check_decoder(what: str) -> None:
    """Check that the decoder is installed.

    Args:
        what: What needs it, for the error.

    Raises:
        MissingPackageError: If it is not.
    """
    if not is_installed("av"):
        msg = f"{what} needs the package av to be decoded: {pip_install('langchain-quantllm[audio]')}"
        raise MissingPackageError(msg)


def _mixed(frame: Any) -> Samples:
    """Mix an interleaved frame down to one channel; samples that are no numbers become silence."""
    import numpy as np

    channels = frame.layout.nb_channels
    samples: Samples = frame.to_ndarray().reshape(-1, channels).mean(axis=1, dtype=np.float32)
    return np.nan_to_num(samples, copy=False, nan=0.0, posinf=0.0, neginf=0.0)


def _check_rate(rate: int, name: str) -> None:
    if not _LOWEST_RATE <= rate <= _HIGHEST_RATE:
        msg = f"{name} claims {rate} samples a second, which no sound has; get its file again."
        raise InvalidOptionError(msg)

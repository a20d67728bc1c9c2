"""Cutting sound into pieces that a speech model takes, where a speaker pauses.

Owns the search for the quietest moment, and the test for silence. Numbers only; no model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from langchain_quantllm.audio.decode import Samples

_FRAME_S = 0.02
_PAUSE_S = 0.3
"""Span over which the loudness is averaged in the search for a pause."""

_BEFORE_S = 0.1
"""Silence that stays before a first sound."""

_SILENCE = 10 ** (-70 / 20)
"""Root mean square, of 1 for full scale, below which a frame is silence: 70 dB below, where no recording has speech."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A piece of a sound.

    Args:
        start_s: Where it begins in the sound, in seconds.
        samples: Its samples: float32 of shape `(samples,)`.
        rate: Samples a second.
    """

    start_s: float
    samples: Samples = field(repr=False, compare=False)
    rate: int

    @property
    def duration_s(self) -> float:
        """Its duration in seconds."""
        return len(self.samples) / self.rate

    @property
    def end_s(self) -> float:
        """Where it ends in the sound, in seconds."""
        return self.start_s + self.duration_s

    def after(self, offset_s: float) -> Piece:
        """Return the rest of the piece from an offset on, in seconds."""
        first = min(len(self.samples), round(offset_s * self.rate))
        return Piece(start_s=self.start_s + first / self.rate, samples=self.samples[first:], rate=self.rate)

    def is_silent(self) -> bool:
        """Say whether no frame of it is louder than silence."""
        return not len(self.samples) or float(_loudness(self.samples, self.rate).max()) < _SILENCE

    def from_first_sound(self) -> Piece:
        """Return the piece without the silence before its first sound: models put the first words at its beginning."""
        is_loud = _loudness(self.samples, self.rate) >= _SILENCE
        return self.after(max(0.0, int(is_loud.argmax()) * _FRAME_S - _BEFORE_S)) if is_loud.any() else self


def cut(blocks: Iterable[Samples], rate: int, longest_s: float = 30.0) -> Iterator[Piece]:
    """Cut sound into pieces, each at the quietest moment of the second half of the longest piece.

    Holds one piece and one block at a time. The pieces follow each other without gap and without overlap.

    Args:
        blocks: The samples: float32 of shape `(samples,)` each.
        rate: Samples a second.
        longest_s: Longest piece in seconds.
    """
    longest, start = round(longest_s * rate), 0
    held: list[Samples] = []
    count = 0
    for block in blocks:
        held.append(block)
        count += len(block)
        while count > longest:
            samples = np.concatenate(held)
            end = _quietest(samples[:longest], rate, longest // 2)
            yield Piece(start_s=start / rate, samples=samples[:end], rate=rate)
            held, start, count = [samples[end:]], start + end, count - end
    if count:
        yield Piece(start_s=start / rate, samples=np.concatenate(held), rate=rate)


def _loudness(samples: Samples, rate: int) -> npt.NDArray[np.float64]:
    """Compute the root mean square of each frame; a last frame that is not full counts as one."""
    size = max(1, round(_FRAME_S * rate))
    padded = np.pad(samples, (0, -len(samples) % size)).reshape(-1, size)
    loudness: npt.NDArray[np.float64] = np.sqrt(np.square(padded, dtype=np.float64).mean(axis=1))
    return loudness


def _quietest(samples: Samples, rate: int, first: int) -> int:
    """Find the middle of the quietest span after a sample; of equally quiet ones the last.

    Args:
        samples: The samples.
        rate: Samples a second.
        first: The first sample of the search.
    """
    size = max(1, round(_FRAME_S * rate))
    loudness = _loudness(samples[first:], rate)
    width = min(len(loudness), round(_PAUSE_S / _FRAME_S))
    spans = np.convolve(loudness, np.ones(width) / width, mode="valid")
    last = len(spans) - 1 - int(np.argmin(spans[::-1].round(7)))
    return min(len(samples), first + (last + width // 2) * size)

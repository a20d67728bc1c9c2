"""Sound files in many formats, made in code, and the recordings among the tests' data."""

from __future__ import annotations

import io
from pathlib import Path

import av
import numpy as np

_DATA = Path(__file__).parents[1] / "data"
MUSEUM, MORNING, HARBOUR = (_DATA / f"{name}.ogg" for name in ("museum_en", "morning_de", "harbour_en"))
MUSEUM_WORDS = "the museum opens at 9 in the morning children under 12 pay nothing the garden is open all day"
HARBOUR_WORDS = """
good morning and welcome to our tour of the old harbour the first houses were built here when merchants from
the north came to trade timber and salt most of them stayed only for the summer they slept on their ships and
went home before the ice closed the bay the tall building on your left was a grain store it has very small
windows because the grain had to stay dry and dark today it is a museum where you can see the maps of the
early captains please do not touch the maps for the paper is very thin on the other side of the street lived
the doctor she was the first woman in the country who was allowed to open her own practice
"""


def encoded(
    sound: np.ndarray, container: str, codec: str, *, rate: int = 16_000, layout: str = "mono", video: bool = False
) -> bytes:
    """Encode samples of one channel, the same in every channel of the layout; with a black video beside them if asked.

    Args:
        sound: float32 of shape `(samples,)`, at `rate`.
        container: FFmpeg's name of the format of the file.
        codec: FFmpeg's name of the encoder.
        rate: Samples a second.
        layout: FFmpeg's name of the channels.
        video: Put a video track into the file, before the sound.
    """
    stream = io.BytesIO()
    with av.open(stream, "w", format=container) as file:
        pictures = file.add_stream("mpeg4", rate=5) if video else None
        track = file.add_stream(codec, rate=rate, layout=layout)
        if pictures is not None:
            pictures.width, pictures.height, pictures.pix_fmt = 64, 64, "yuv420p"
            for _ in range(10):
                picture = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")
                file.mux(pictures.encode(picture))
            file.mux(pictures.encode(None))
        channels = len(av.AudioLayout(layout).channels)
        frame = av.AudioFrame.from_ndarray(np.repeat(sound, channels)[None], format="flt", layout=layout)
        frame.sample_rate, frame.pts = rate, 0
        size = track.codec_context.frame_size
        resampler = av.AudioResampler(track.format, layout=layout, rate=rate, frame_size=size or None)
        for ready in [*resampler.resample(frame), *resampler.resample(None)]:
            file.mux(track.encode(ready))
        file.mux(track.encode(None))
    return stream.getvalue()


def only_video() -> bytes:
    """Encode a video without sound."""
    stream = io.BytesIO()
    with av.open(stream, "w", format="mp4") as file:
        pictures = file.add_stream("mpeg4", rate=5)
        pictures.width, pictures.height, pictures.pix_fmt = 64, 64, "yuv420p"
        for _ in range(10):
            picture = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")
            file.mux(pictures.encode(picture))
        file.mux(pictures.encode(None))
    return stream.getvalue()


def decoded(content: bytes, rate: int = 16_000) -> np.ndarray:
    """Decode a file as this package does."""
    from langchain_quantllm.audio.decode import open_sound

    with open_sound(io.BytesIO(content), "the file", rate=rate) as sound:
        return np.concatenate(list(sound))

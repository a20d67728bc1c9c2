"""What FFmpeg does with a file of a stranger's: only sound is opened, and every failure is one of the known errors."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest

from langchain_quantllm.compat.av_decoding import decoder_errors, open_container
from tests.support.hearing import samples, wav
from tests.support.sounds import encoded


@pytest.mark.compat
@pytest.mark.parametrize(
    ("container", "codec", "rate"),
    [("wav", "pcm_s16le", 16_000), ("mp3", "mp3", 44_100), ("flac", "flac", 16_000), ("ogg", "libopus", 48_000)],
)
def test_containers_of_sound_are_opened(container: str, codec: str, rate: int) -> None:
    content = encoded(samples(rate=rate), container, codec, rate=rate)
    with open_container(io.BytesIO(content)) as opened:
        assert len(opened.streams.audio) == 1


@pytest.mark.compat
def test_a_list_of_files_opens_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import av

    (tmp_path / "secret.wav").write_bytes(wav(samples()))
    monkeypatch.chdir(tmp_path)
    script = b"ffconcat version 1.0\nfile secret.wav\n"
    with pytest.raises(decoder_errors()):
        open_container(io.BytesIO(script))
    with av.open(io.BytesIO(script), options={"safe": "0", "protocol_whitelist": "file"}) as opened:
        assert opened.streams.audio  # what the bounds are for


@pytest.mark.compat
@pytest.mark.parametrize("seed", range(20))
def test_a_damaged_file_raises_known_errors_only(seed: int) -> None:
    draw = np.random.default_rng(seed)
    content = bytearray(encoded(samples(rate=48_000), "ogg", "libopus", rate=48_000))
    for at in draw.integers(0, len(content), size=40):
        content[at] = draw.integers(0, 256)
    try:
        with open_container(io.BytesIO(bytes(content))) as opened:
            for packet in opened.demux(opened.streams.audio[0]):
                packet.decode()
    except decoder_errors():
        pass

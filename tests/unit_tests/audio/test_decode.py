"""Decoding sound files: formats, channels, rates, bounds, and files of strangers that are none."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import numpy as np
import pytest

from langchain_quantllm.audio.decode import open_sound
from langchain_quantllm.errors import InvalidOptionError, MissingPackageError
from tests.support.hearing import samples, wav
from tests.support.sounds import decoded, encoded, only_video

TONE = (0.3 * np.sin(2 * np.pi * 440 * np.arange(48_000) / 16_000)).astype(np.float32)


def pitch(sound: np.ndarray, rate: int = 16_000) -> float:
    """Find the loudest frequency in Hz."""
    return float(np.abs(np.fft.rfft(sound)).argmax() * rate / len(sound))


def tone(rate: int, seconds: float = 3.0) -> np.ndarray:
    return (0.3 * np.sin(2 * np.pi * 440 * np.arange(int(rate * seconds)) / rate)).astype(np.float32)


@pytest.mark.parametrize(
    ("container", "codec", "rate", "layout"),
    [
        ("wav", "pcm_s16le", 8_000, "mono"),
        ("wav", "pcm_f32le", 96_000, "stereo"),
        ("wav", "pcm_s24le", 44_100, "7.1"),
        ("mp3", "mp3", 44_100, "stereo"),
        ("flac", "flac", 48_000, "5.1"),
        ("ogg", "libopus", 48_000, "stereo"),
        ("ipod", "aac", 44_100, "mono"),
        ("webm", "libopus", 48_000, "mono"),
    ],
)
def test_every_format_rate_and_layout_becomes_one_channel(container: str, codec: str, rate: int, layout: str) -> None:
    sound = decoded(encoded(tone(rate), container, codec, rate=rate, layout=layout))
    assert len(sound) / 16_000 == pytest.approx(3.0, abs=0.06)  # coders pad to whole frames
    assert pitch(sound) == pytest.approx(440, abs=1)
    assert np.abs(sound[8_000:40_000]).max() == pytest.approx(0.3, abs=0.03)


def test_a_wav_of_the_same_rate_comes_back_exactly() -> None:
    sound = samples(3)
    assert np.array_equal(decoded(wav(sound)), sound)


@pytest.mark.parametrize("channels", [3, 9, 16, 64])
def test_any_number_of_channels_is_mixed_to_their_mean(channels: int) -> None:
    assert decoded(wav(TONE, channels=channels)) == pytest.approx(TONE, abs=1e-4)


def test_the_sound_of_a_video_is_read_without_its_pictures() -> None:
    sound = decoded(encoded(tone(44_100), "mp4", "aac", rate=44_100, video=True))
    assert pitch(sound) == pytest.approx(440, abs=1)


def test_samples_that_are_no_numbers_become_silence() -> None:
    broken = TONE.copy()
    broken[100:110], broken[200] = np.nan, np.inf
    sound = decoded(encoded(broken, "wav", "pcm_f32le"))
    assert np.isfinite(sound).all()
    assert sound[150] == pytest.approx(TONE[150], abs=1e-6)


def test_blocks_come_before_the_file_is_decoded_to_its_end() -> None:
    with open_sound(io.BytesIO(wav(np.tile(TONE, 100))), "the file") as sound:
        next(iter(sound))
        assert 0 < sound.read_s < 1 < sound.duration_s == 300


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "the file is empty"),
        (b"hello " * 500, "is not sound that can be read, or is damaged; WAV, MP3"),
        (bytes(20_000), "is not sound that can be read"),
        (np.random.default_rng(0).bytes(50_000), "is not sound that can be read"),
        (wav(TONE)[:30], "is not sound that can be read"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "is not sound that can be read"),
    ],
)
def test_a_file_that_is_no_sound_says_so(content: bytes, sentence: str) -> None:
    with pytest.raises(InvalidOptionError, match=sentence):
        decoded(content)


def test_a_video_without_sound_says_so() -> None:
    with pytest.raises(InvalidOptionError, match="the file has no sound, only pictures"):
        decoded(only_video())


@pytest.mark.parametrize(
    "content",
    [
        "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{}\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile '{}'\n",
        "<?xml version='1.0'?><MPD><Period><BaseURL>{}</BaseURL></Period></MPD>",
    ],
)
def test_a_playlist_opens_no_other_file(content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "secret.wav").write_bytes(wav(TONE))
    monkeypatch.chdir(tmp_path)
    for name in ("secret.wav", str(tmp_path / "secret.wav"), f"file://{tmp_path}/secret.wav"):
        with pytest.raises(InvalidOptionError, match="is not sound that can be read"):
            decoded(content.format(name).encode())


@pytest.mark.parametrize("rate", [1, 500, 2**31 - 1])
def test_a_sample_rate_that_no_sound_has_is_refused(rate: int) -> None:
    content = bytearray(wav(TONE))
    content[24:28] = rate.to_bytes(4, "little")
    with pytest.raises(InvalidOptionError, match=f"claims {rate} samples a second"):
        decoded(bytes(content))


def test_a_longer_sound_than_allowed_is_refused_by_its_header_and_by_its_samples() -> None:
    content = wav(TONE)
    lying = bytearray(wav(np.tile(TONE, 4)))
    lying[40:44] = (0xFFFFFFFF).to_bytes(4, "little")  # a length that is not known, as pipes write it
    for file in (content, bytes(lying)):
        with (
            pytest.raises(InvalidOptionError, match="the file lasts longer than max_duration_s=2 allows"),
            open_sound(io.BytesIO(file), "the file", max_duration_s=2) as sound,
        ):
            list(sound)


@pytest.mark.parametrize(("container", "codec", "rate"), [("wav", "pcm_s16le", 16_000), ("mp3", "mp3", 44_100)])
def test_a_file_that_is_cut_off_gives_its_beginning(container: str, codec: str, rate: int) -> None:
    content = encoded(tone(rate), container, codec, rate=rate)
    sound = decoded(content[: len(content) // 2])
    assert len(sound) / 16_000 == pytest.approx(1.5, abs=0.2)
    assert pitch(sound) == pytest.approx(440, abs=2)


def test_a_file_whose_index_is_cut_off_says_so() -> None:
    content = encoded(tone(44_100), "ipod", "aac", rate=44_100)
    with pytest.raises(InvalidOptionError, match="or is damaged"):
        decoded(content[: len(content) // 2])


def test_damage_in_the_middle_is_noted_and_the_rest_is_read(caplog: pytest.LogCaptureFixture) -> None:
    content = bytearray(encoded(tone(44_100), "mp3", "mp3", rate=44_100))
    middle = len(content) // 2
    content[middle : middle + 8000] = np.random.default_rng(1).bytes(8000)
    with (
        caplog.at_level(logging.WARNING),
        open_sound(io.BytesIO(bytes(content)), "the file") as sound,
    ):
        seconds = sum(map(len, sound)) / 16_000
        assert 1.0 < seconds < 3.2
        assert sound.damaged_at_s is not None
        assert 0.5 < sound.damaged_at_s < 2.0
    assert "the file is damaged from second" in caplog.text


def test_without_the_decoder_an_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("langchain_quantllm.audio.decode.is_installed", lambda name: name != "av")
    with pytest.raises(MissingPackageError, match=r'pip install "langchain-quantllm\[audio\]"'):
        decoded(wav(TONE))

"""Cutting sound into pieces: nothing is lost, cuts lie in pauses, and silence is told from quiet speech."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from langchain_quantllm.audio.pieces import Piece, cut

RATE = 1_000


def noise(seconds: float, loudness: float = 0.3, seed: int = 0) -> np.ndarray:
    return (loudness * np.random.default_rng(seed).standard_normal(int(seconds * RATE))).astype(np.float32)


@pytest.mark.parametrize("seed", range(40))
def test_pieces_put_together_are_the_sound(seed: int) -> None:
    draw = np.random.default_rng(seed)
    loudness, longest_s = draw.choice([0.0, 1e-6, 0.3]), draw.uniform(0.05, 2.0)
    lengths = draw.integers(0, 700, size=draw.integers(0, 20))
    blocks = [noise(length / RATE, loudness, seed=i) for i, length in enumerate(lengths)]
    pieces = list(cut(iter(blocks), RATE, longest_s))
    whole = np.concatenate([*blocks, np.zeros(0, np.float32)])
    assert np.array_equal(np.concatenate([*(piece.samples for piece in pieces), np.zeros(0, np.float32)]), whole)
    for before, after in pairwise(pieces):
        assert after.start_s == pytest.approx(before.end_s)
    for piece in pieces:
        assert 0 < len(piece.samples) <= round(longest_s * RATE)
    for piece in pieces[:-1]:
        assert len(piece.samples) >= round(longest_s * RATE) // 2


def test_a_cut_lies_in_the_pause_of_the_second_half() -> None:
    sound = np.concatenate([noise(5), noise(1, 0.001), noise(14), noise(0.5, 0.001), noise(20)])
    first = next(cut([sound], RATE, 30.0))
    assert 20.0 <= first.end_s <= 20.5


def test_a_piece_comes_before_the_next_is_decoded() -> None:
    read = 0

    def blocks():
        nonlocal read
        for _ in range(100):
            read += 1
            yield noise(1)

    next(cut(blocks(), RATE, 10.0))
    assert read == 11


@pytest.mark.parametrize(("loudness", "is_silent"), [(0.0, True), (1e-5, True), (3e-3, False), (0.3, False)])
def test_silence_is_told_from_quiet_sound(loudness: float, is_silent: bool) -> None:
    assert Piece(start_s=0, samples=noise(2, loudness), rate=RATE).is_silent() is is_silent


def test_a_short_word_makes_a_long_silence_no_silence() -> None:
    samples = np.zeros(20 * RATE, np.float32)
    samples[12 * RATE : 12 * RATE + 100] = noise(0.1)
    assert not Piece(start_s=0, samples=samples, rate=RATE).is_silent()


@pytest.mark.parametrize(("silent_s", "start_s"), [(0.0, 10.0), (0.05, 10.0), (3.0, 12.9)])
def test_a_piece_begins_just_before_its_first_sound(silent_s: float, start_s: float) -> None:
    samples = np.concatenate([np.zeros(int(silent_s * RATE), np.float32), noise(2)])
    piece = Piece(start_s=10.0, samples=samples, rate=RATE).from_first_sound()
    assert piece.start_s == pytest.approx(start_s, abs=0.021)
    assert np.array_equal(piece.samples[-2 * RATE :], noise(2))


def test_a_silent_piece_stays() -> None:
    piece = Piece(start_s=1.0, samples=np.zeros(RATE, np.float32), rate=RATE)
    assert piece.from_first_sound() is piece


def test_the_rest_of_a_piece_begins_where_it_is_cut() -> None:
    piece = Piece(start_s=60.0, samples=noise(10), rate=RATE)
    rest = piece.after(4.0)
    assert (rest.start_s, rest.duration_s, rest.end_s) == (64.0, 6.0, 70.0)
    assert np.array_equal(rest.samples, piece.samples[4 * RATE :])
    assert piece.after(99.0).is_silent()

"""Texts of a calibration, and the sequences cut from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from langchain_quantllm import Calibration
from langchain_quantllm.errors import InvalidOptionError
from langchain_quantllm.quantization.calibration import read_texts, sequences
from tests.support.quantization import TEXTS


@pytest.mark.parametrize("suffix", ["txt", "json", "jsonl"])
def test_texts_come_from_files(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"texts.{suffix}"
    rows = [{"text": text, "other": 1} for text in TEXTS]
    path.write_text(
        {
            "txt": "\n---\n".join(TEXTS),
            "json": json.dumps(TEXTS),
            "jsonl": "\n".join(json.dumps(row) for row in rows),
        }[suffix]
    )
    assert read_texts(Calibration(source=str(path))) == TEXTS
    assert read_texts(Calibration(source=path)) == TEXTS


def test_texts_come_from_data_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.jsonl").write_text("\n".join(json.dumps({"body": text}) for text in TEXTS))
    assert read_texts(Calibration(source=str(folder), column="body")) == TEXTS
    with pytest.raises(InvalidOptionError, match="has no column 'text'; its columns are 'body'"):
        read_texts(Calibration(source=str(folder)))


def test_the_built_in_text_shares_no_line_with_the_evaluation_text() -> None:
    from langchain_quantllm.bench.quality import evaluation_text

    texts = read_texts(Calibration())
    assert len(texts) > 50
    measured = evaluation_text()
    lines = [line for text in texts for line in text.splitlines() if len(line) > 40]
    assert len(lines) > 200
    assert not [line for line in lines if line in measured]


def test_sequences_have_one_length_and_end_texts(tokenizer: Any) -> None:
    calibration = Calibration(source=TEXTS, samples=5, tokens=8)
    cut = sequences(calibration, TEXTS, tokenizer, 2048)
    assert [len(ids) for ids in cut] == [8] * 5
    assert tokenizer.eos_token_id in [i for ids in cut for i in ids]
    whole = sequences(Calibration(source=TEXTS, tokens=512), TEXTS, tokenizer, 2048)
    assert len(whole) == 1  # shorter than asked for, as there is no more
    assert 8 < len(whole[0]) < 512


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda _: Calibration(samples=0), ["samples=0", "at least 1"]),
        (lambda _: Calibration(tokens=4), ["tokens=4", "at least 8"]),
        (lambda _: Calibration(source=[]), ["texts that are not empty", "'none'"]),
        (lambda _: Calibration(source=["a", 3]), ["texts that are not empty"]),  # type: ignore[list-item]
        (lambda path: read_texts(Calibration(source=str(path / "none.txt"))), ["none.txt cannot be read"]),
        (lambda path: _written(path / "a.json", '{"a": 1}'), ["holds no list"]),
        (lambda path: _written(path / "a.json", "[1"), ["is not JSON"]),
        (lambda path: _written(path / "a.jsonl", '{"a": "b"}'), ["has no column 'text'", "'a'"]),
        (lambda path: _written(path / "a.jsonl", '{"text": 3}'), ["holds int, not text"]),
        (lambda path: _written(path / "a.txt", "\n"), ["holds no text"]),
    ],
)
def test_unusable_calibrations_are_refused(make: Any, words: list[str], tmp_path: Path) -> None:
    with pytest.raises(InvalidOptionError) as caught:
        make(tmp_path)
    for word in words:
        assert word in str(caught.value)


def _written(path: Path, content: str) -> list[str]:
    path.write_text(content)
    return read_texts(Calibration(source=path))

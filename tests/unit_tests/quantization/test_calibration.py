"""Texts of a calibration, and the sequences cut from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from langchain_quantllm import Calibration
from langchain_quantllm.errors import InvalidOptionError
from langchain_quantllm.quantization import calibration as calibration_module
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
    contents = [[text] if isinstance(text, str) else [m["content"] for m in text.messages] for text in texts]
    lines = [line for own in contents for text in own for line in text.splitlines() if len(line) > 40]
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
        (lambda _: Calibration(source=["a", " "]), ["texts that are not empty"]),
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


class TestFilesOfOthers:
    @pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.JSONL", "a.ndjson", "a.txt"])
    def test_a_mark_at_the_beginning_is_no_part_of_the_text(self, name: str, tmp_path: Path) -> None:
        path = tmp_path / name
        content = {"json": json.dumps(TEXTS[:1]), "txt": TEXTS[0]}.get(name.split(".")[1], json.dumps(TEXTS[0]))
        path.write_text(content, encoding="utf-8-sig")
        assert read_texts(Calibration(source=str(path))) == TEXTS[:1]

    def test_lines_end_with_a_line_feed_alone(self, tmp_path: Path) -> None:
        texts = ["one\u2028two", "three\u0085four", "five\x0csix"]
        path = tmp_path / "a.jsonl"
        path.write_bytes("\r\n".join(json.dumps(text, ensure_ascii=False) for text in texts).encode())
        assert read_texts(Calibration(source=path)) == texts

    def test_an_error_names_the_line(self, tmp_path: Path) -> None:
        with pytest.raises(InvalidOptionError, match="line 3 of .*a.jsonl is not JSON: Expecting value"):
            _written(tmp_path / "a.jsonl", '"a"\n\n{"text": \n"b"')
        with pytest.raises(InvalidOptionError, match="line 1 of .*a.jsonl is not JSON: .*recursion"):
            _written(tmp_path / "a.jsonl", "[" * 100_000)
        with pytest.raises(InvalidOptionError, match="must end in .jsonl"):
            _written(tmp_path / "a.json", '"a"\n"b"')

    def test_halves_of_characters_are_no_text_that_fails(self, tmp_path: Path, tokenizer: Any) -> None:
        path = tmp_path / "a.jsonl"
        chat = {"messages": [{"role": "user", "content": TEXTS[0] + " \ud83d"}]}
        path.write_text("\n".join(map(json.dumps, [TEXTS[0] + " \ud83d", chat])))
        calibration = Calibration(source=path, tokens=40)
        assert sequences(calibration, read_texts(calibration), tokenizer, None)

    def test_rows_without_a_text_are_left_out(self, tmp_path: Path) -> None:
        assert _written(tmp_path / "a.jsonl", '{"text": null}\n{"text": "a b"}') == ["a b"]

    def test_a_long_text_is_read_as_far_as_it_is_needed(self, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(calibration_module, "_PIECE_CHARS", 2_000)
        seen: list[int] = []

        def reads(text: str, **options: Any) -> Any:
            seen.append(len(text))
            return tokenizer(text, **options)

        reads.eos_token_id = tokenizer.eos_token_id  # type: ignore[attr-defined]
        short = Calibration(source=[TEXTS[0] * 100], samples=2, tokens=32)
        cut = sequences(short, read_texts(short), reads, None)
        assert [len(ids) for ids in cut] == [32, 32]
        assert sum(seen) == 2_000
        longer = Calibration(source=[TEXTS[0] * 100], samples=1000, tokens=32)
        ids = [i for own in sequences(longer, read_texts(longer), tokenizer, None) for i in own]
        assert tokenizer.decode(ids[-64:-32]) in TEXTS[0] * 3
        assert len(ids) > 0.95 * len(tokenizer(TEXTS[0] * 100)["input_ids"])


MadeOf: Any = Calibration
"""The class, with values of any type."""


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: MadeOf(samples="5"), "samples='5' is not allowed"),
        (lambda: MadeOf(tokens=16.5), "tokens=16.5 is not allowed; it must be a whole number"),
        (lambda: MadeOf(seed=[1]), r"seed=\[1\] is not allowed"),
        (lambda: MadeOf(source=5), "of type int cannot be read"),
        (lambda: Calibration(source=b"text"), "of type bytes cannot be read"),
        (lambda: Calibration(source=""), "is no name of a file"),
        (lambda: Calibration(source="A text. " * 200), "put texts into a list"),
        (lambda: Calibration(source="One line.\nAnother."), "put texts into a list"),
        (lambda: Calibration(source=[(Calibration(), 1)]), "of type Calibration cannot be read"),
        (lambda: Calibration(source=[([("built-in", 1)], 0.5), ("built-in", 0.5)]), "give all parts in one list"),
        (lambda: read_texts(Calibration(source="~no_such_user/a.txt")), "cannot be read"),
        (lambda: read_texts(Calibration(source=[{"role": "user", "content": "a"}])), "a single message"),
        (lambda: read_texts(Calibration(source=[[{"role": "user", "content": [None]}]])), "a block 'None' of type"),
        (
            lambda: read_texts(Calibration(source=[[{"role": "ai", "content": "", "tool_calls": 3}]])),
            "has a tool call without a name",
        ),
    ],
)
def test_sources_of_another_kind_are_refused_by_what_they_are(make: Any, words: str) -> None:
    with pytest.raises(InvalidOptionError, match=words):
        make()


def test_one_row_alone_and_its_tools_as_text_are_read() -> None:
    tool = {"name": "add", "parameters": {}}
    row = {"messages": [{"role": "user", "content": "1 + 1?"}], "tools": json.dumps([tool])}
    [conversation] = read_texts(MadeOf(source=row))
    assert conversation.messages == [{"role": "user", "content": "1 + 1?"}]
    assert conversation.tools == ({"type": "function", "function": tool},)
    strange = {"inputs": {"a": "b"}, "run_type": "llm", "trace_id": [1], "child_runs": 5}
    assert len(read_texts(Calibration(source=[strange]))) == 1

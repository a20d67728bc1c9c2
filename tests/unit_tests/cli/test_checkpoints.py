"""`quantize`, `merge` and `convert`: checkpoints written from the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from langchain_quantllm.cli import app, checkpoints
from langchain_quantllm.quantization import gguf
from langchain_quantllm.quantization.output_dir import claim_output
from tests.support.adapters import make_adapter
from tests.support.checkpoints import make_checkpoint


def call(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def test_convert_writes_a_checkpoint_and_prints_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The conversion itself has its tests beside the sources of models."""
    file, asked = tmp_path / "model.gguf", []

    def convert(source: Path, folder: Path) -> Path:
        asked.append((source, folder))
        return folder.resolve()

    monkeypatch.setattr(gguf, "convert_gguf", convert)
    result = call("convert", file, tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{(tmp_path / 'out').resolve()}\n"
    assert asked == [(file, tmp_path / "out")]


@pytest.mark.parametrize(
    ("file", "folder", "said"),
    [
        ("none.gguf", "out", "there is no file"),
        ("broken.gguf", ".", "is not empty"),
        ("broken.gguf", "out", "transformers cannot read"),
    ],
)
def test_a_file_that_cannot_be_converted_is_told(file: str, folder: str, said: str, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF, or so it says")
    result = call("convert", tmp_path / file, tmp_path / folder)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert said in " ".join(result.stderr.split())
    assert [path.name for path in tmp_path.iterdir()] == ["broken.gguf"]  # nothing half written is left


def test_quantize_offers_every_scheme_but_none() -> None:
    assert "none" not in checkpoints._WRITTEN
    result = call("quantize", "model", "-s", "none")
    assert result.exit_code == 1
    assert "is not a scheme to quantize with" in result.stderr


def test_options_of_gptq_are_refused_with_other_schemes(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    (tmp_path / "model.safetensors").touch()
    result = call("quantize", tmp_path, "-s", "nf4", "--calibration", "text.txt")
    assert result.exit_code == 1
    assert (
        "--calibration, --for, --skip, --method and --distill are for gptq and awq, and nf4 needs none" in result.stderr
    )
    result = call("quantize", tmp_path, "-s", "awq", "--bits", 8)
    assert result.exit_code == 1
    assert "awq has 4 bits and zero points" in result.stderr


def test_outputs_that_are_refused_are_one_line(tmp_path: Path) -> None:
    """In the place of a source, in that of another run, and where nothing can be written."""
    pytest.importorskip("peft")
    base = make_checkpoint(tmp_path / "models" / "base")
    sql = make_adapter(base, tmp_path / "sql", seed=1)
    (tmp_path / "models" / "mine.txt").write_text("mine")
    (tmp_path / "file").touch()
    cases = {
        ("quantize", base, "-s", "nf4", "-o", tmp_path / "models", "--overwrite"): "one of the sources",
        ("merge", base, sql, "-o", base, "--overwrite"): "one of the sources",
        ("quantize", base, "-s", "nf4", "-o", tmp_path / "busy"): "being written by another run (process",
        ("convert", base / "config.json", tmp_path / "busy"): "being written by another run (process",
        ("quantize", base, "-s", "gptq", "-o", tmp_path / "file" / "out"): "could not be written: Not a directory",
        ("merge", base, sql, "-o", tmp_path / ("n" * 300)): "could not be written: File name too long",
    }
    with claim_output(tmp_path / "busy", ()):
        for words, says in cases.items():
            result = call(*words)
            assert result.exit_code == 1, words
            assert result.stdout == ""
            assert result.stderr.startswith("error: ")
            assert says in result.stderr
            assert result.stderr.count("\n") == 1
    assert (tmp_path / "models" / "mine.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "models", "sql"]

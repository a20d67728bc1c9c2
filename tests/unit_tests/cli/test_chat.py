"""`chat`: its commands, what an interrupted answer leaves behind, and a real terminal."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from langchain_quantllm import ChatQuantizedHuggingFace, QuantizedHuggingFaceLLM
from langchain_quantllm.cli import app
from langchain_quantllm.cli.chat import COMMANDS, Conversation


class Typed:
    """The real model, with what it was asked, and Ctrl-C pressed after some chunks of chosen answers."""

    def __init__(self, llm: Any, interrupts: dict[int, int]) -> None:
        self._llm = llm
        self._interrupts = interrupts
        self.asked: list[list[dict[str, str]]] = []
        self.streams: list[Any] = []

    def stream(self, messages: list[dict[str, str]], config: Any) -> Iterator[Any]:
        after = self._interrupts.get(len(self.asked))
        self.asked.append(messages)
        self.streams.append(self._llm.stream(messages, config))
        return self._chunks(self.streams[-1], after)

    def _chunks(self, chunks: Any, after: int | None) -> Iterator[Any]:
        with contextlib.closing(chunks):
            for i, chunk in enumerate(chunks):
                if i == after:
                    signal.raise_signal(signal.SIGINT)
                yield chunk


def talk(
    llm: Any, lines: list[str], monkeypatch: pytest.MonkeyPatch, interrupts: dict[int, int] | None = None
) -> list[list[dict[str, str]]]:
    """Type lines into a conversation; gives the messages that the model got for each answer."""
    typed = Typed(llm, interrupts or {})
    given = iter(lines)

    def read(_: str = "") -> str:
        try:
            return next(given)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    Conversation(typed).run()
    return typed.asked


@pytest.fixture
def chat_model(llm: QuantizedHuggingFaceLLM) -> Any:
    return ChatQuantizedHuggingFace(llm=llm)


def test_what_was_shown_of_a_stopped_answer_stays(
    chat_model: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = talk(chat_model, ["Count to ten.", "Go on."], monkeypatch, {0: 4})
    assert first == [{"role": "user", "content": "Count to ten."}]
    user, assistant, again = second
    assert (user, again) == (first[0], {"role": "user", "content": "Go on."})
    shown = capsys.readouterr()
    assert assistant["content"]
    assert shown.out.startswith(assistant["content"] + "\n")
    assert "stopped; the text so far stays" in shown.err
    whole = chat_model.invoke(first).content
    assert whole.startswith(assistant["content"])
    assert whole != assistant["content"]


def test_a_turn_that_was_stopped_before_its_first_word_is_forgotten(
    chat_model: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, second = talk(chat_model, ["Count to ten.", "Hello."], monkeypatch, {0: 0})
    assert second == [{"role": "user", "content": "Hello."}]
    assert "stopped; the turn is forgotten" in capsys.readouterr().err


def test_the_model_stops_when_an_answer_is_stopped(llm: QuantizedHuggingFaceLLM) -> None:
    from langchain_quantllm.cli.console import print_stream

    chunks = llm.stream("Once upon a time", max_new_tokens=200)

    def interrupted() -> Iterator[Any]:
        with contextlib.closing(chunks):
            yield next(chunks)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        print_stream(interrupted())
    assert chunks.gi_frame is None  # closed, which cancels the request


def test_a_failed_turn_is_forgotten(
    chat_model: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, second = talk(chat_model, ["word " * 20_000, "Hello."], monkeypatch)
    assert second == [{"role": "user", "content": "Hello."}]
    assert "error: " in capsys.readouterr().err


def test_the_role_and_the_turns_can_be_set_anew(
    chat_model: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["/system Be brief.", "Hello.", "/system", "/clear", "Bye.", "/system  Be loud. ", "What?"]
    first, second, third = talk(chat_model, lines, monkeypatch)
    brief = {"role": "system", "content": "Be brief."}
    assert first == [brief, {"role": "user", "content": "Hello."}]
    assert "\nBe brief.\n" in capsys.readouterr().err
    assert second == [brief, {"role": "user", "content": "Bye."}]
    assert third[0] == {"role": "system", "content": "Be loud."}
    assert [turn["role"] for turn in third] == ["system", "user", "assistant", "user"]


@pytest.mark.parametrize("line", ["/list", "/help me", "/exi", "/", "/etc/hosts what is this?"])
def test_no_line_with_a_slash_reaches_the_model(
    line: str, chat_model: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert talk(chat_model, [line], monkeypatch) == []
    shown = capsys.readouterr()
    if line.startswith("/help"):
        assert all(name in shown.out and meaning in shown.out for name, meaning in COMMANDS.items())
    else:
        assert f"There is no command {line.split()[0]}; /help lists them." in shown.err


def test_a_space_sends_a_line_with_a_slash(chat_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert talk(chat_model, [" /etc is what?", "", "   "], monkeypatch) == [
        [{"role": "user", "content": "/etc is what?"}]
    ]


@pytest.mark.parametrize("word", ["/exit", "/quit", "/bye", " /exit "])
def test_leaving(word: str, chat_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert talk(chat_model, [word, "Hello."], monkeypatch) == []


def chat(folder: Path, typed: str, *words: object) -> Result:
    return CliRunner().invoke(app, ["chat", "-m", str(folder), *(str(word) for word in words)], input=typed)


def test_through_a_pipe_only_answers_are_written(smollm2: Path) -> None:
    result = chat(smollm2, "What is the capital of France?", "--max-new-tokens", 8)
    assert result.exit_code == 0
    assert "Paris" in result.stdout
    assert len(result.stdout.splitlines()) == 1
    assert "quantization nf4 (default; -q none for 16 bits)" in result.stderr
    assert "116 MB weights (nf4)" in result.stderr
    assert "/help lists the commands, Ctrl-C stops an answer, /exit or Ctrl-D leaves." in result.stderr
    assert re.search(r"\d+ tokens in, \d+ out", result.stderr)


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_keys_in_a_terminal(smollm2: Path) -> None:
    """Ctrl-C in an answer and at the prompt stays in the chat, Ctrl-D leaves."""
    import pty

    outer, inner = pty.openpty()
    command = [sys.executable, "-m", "langchain_quantllm.cli", "chat", "-m", str(smollm2), "--max-new-tokens", "1000"]
    environ = {**os.environ, "PYTHONWARNINGS": "ignore"}  # what is waited for are words of the answer
    process = subprocess.Popen(command, stdin=inner, stdout=inner, stderr=inner, start_new_session=True, env=environ)
    os.close(inner)
    seen = ""

    def wait_for(pattern: str, interrupt: bool = False) -> None:
        """Read until the terminal shows a pattern after what was waited for before; with `interrupt`, press Ctrl-C.

        It is pressed again where nothing comes: pressed between the prompt and the wait for a key, it counts with the
        next key.
        """
        nonlocal seen
        until = time.monotonic() + 300
        if interrupt:
            process.send_signal(signal.SIGINT)
        while (found := re.search(pattern, seen)) is None:
            assert time.monotonic() < until, f"{pattern!r} does not come; seen: {seen!r}"
            if select.select([outer], [], [], 2)[0]:
                seen += os.read(outer, 65536).decode(errors="replace")
            elif interrupt:
                process.send_signal(signal.SIGINT)
        seen = seen[found.end() :]

    try:
        wait_for(r">>> $")
        os.write(outer, b"Tell me a very long story.\n")
        wait_for(r"long story\.\r\n\S+ \S+ \S+ ")  # what was typed comes back, and then some words
        wait_for(r"stopped; the text so far stays(.|\n)*>>> $", interrupt=True)
        wait_for(r"/exit or Ctrl-D leaves\.(.|\n)*>>> $", interrupt=True)
        os.write(outer, b"\x04")
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(outer)

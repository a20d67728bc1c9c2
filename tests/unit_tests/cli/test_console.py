"""What models and checkpoints write does not control the terminal."""

from __future__ import annotations

import io
import sys

import pytest
from rich.console import Console
from rich.table import Table
from rich.text import Text

from langchain_quantllm.cli import console
from langchain_quantllm.cli.console import SafeConsole, print_error, print_stream, say

CLIPBOARD = "\x1b]52;c;cm0gLXJmIH4=\x07"
"""Writes the clipboard of most terminals."""


def terminal() -> tuple[SafeConsole, io.StringIO]:
    file = io.StringIO()
    return SafeConsole(file=file, force_terminal=True, color_system=None, width=200), file


def test_rich_by_itself_passes_commands_on() -> None:
    file = io.StringIO()
    Console(file=file, force_terminal=True).print(CLIPBOARD, markup=False, highlight=False)
    assert "\x1b]52" in file.getvalue(), "this class is no longer needed"


@pytest.mark.parametrize("code", [c for c in [*range(32), 0x7F, *range(0x80, 0xA0)] if chr(c) not in "\t\n\r\x85"])
def test_every_control_character_is_shown_and_not_sent(code: int) -> None:
    out, file = terminal()
    out.print(f"a{chr(code)}b", markup=False, highlight=False)
    assert chr(code) not in file.getvalue().rstrip("\n")
    shown = file.getvalue().rstrip("\n")
    assert shown.startswith("a")
    assert shown.endswith("b")
    assert len(shown) > 2 or chr(code) in "\a\b\v\f", "rich drops these four, something stands for the others"


def test_answers_remarks_errors_and_tables_are_safe(monkeypatch: pytest.MonkeyPatch) -> None:
    out, file = terminal()
    monkeypatch.setattr(console, "out", out)
    monkeypatch.setattr(console, "err", out)
    print_stream((piece for piece in ["sky ", "\x1b", "]52;c;x\x07", "blue\n", "日本語"]), thoughts=out)
    say(CLIPBOARD)
    print_error(f"no model {CLIPBOARD}")
    table = Table("model")
    table.add_row(CLIPBOARD)
    table.add_row(Text(CLIPBOARD))
    out.print(table)
    assert "\x1b" not in file.getvalue()
    assert "\x07" not in file.getvalue()
    assert "blue\n日本語" in file.getvalue()
    assert file.getvalue().count("␛]52") == 5


def test_a_file_gets_the_answer_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    SafeConsole(file=sys.stdout).print(CLIPBOARD, end="", markup=False, highlight=False, soft_wrap=True)
    assert capsys.readouterr().out == CLIPBOARD.replace("\x07", ""), "rich itself drops the bell"

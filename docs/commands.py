"""Writes docs/commands.md from the command line itself: `python docs/commands.py`. A test compares the two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from typer.main import get_command

from langchain_quantllm.cli import app

DOCUMENT = Path(__file__).with_suffix(".md")
_TITLE = """# Command line

The help of each command. `python docs/commands.py` writes this page; do not edit it.
"""


def document() -> str:
    """The page: each command with its arguments and options, as the command line defines them."""
    command: Any = get_command(app)
    return "\n".join([_TITLE, *_section(app.info.name or "langchain-quantllm", command)])


def _section(name: str, command: Any) -> list[str]:
    options = [parameter for parameter in command.params if not getattr(parameter, "hidden", False)]
    commands = {} if not hasattr(command, "commands") else command.commands
    arguments = [_metavar(parameter) for parameter in options if parameter.param_type_name == "argument"]
    usage = [name, *arguments, *(["COMMAND"] if commands else []), "[OPTIONS]"]
    lines = [f"## {name}", "", _cell(command.help), "", "```", " ".join(usage), "```", ""]
    if options:
        lines += ["| argument or option | what it is | default |", "|---|---|---|"]
        lines += [f"| {_names(option)} | {_cell(option.help)} | {_default(option)} |" for option in options] + [""]
    if commands:
        lines += ["| command | what it does |", "|---|---|"]
        lines += [f"| [`{each}`](#{name}-{each}) | {_cell(commands[each].help)} |" for each in commands] + [""]
    for each in commands:
        lines += _section(f"{name} {each}", commands[each])
    return lines


def _metavar(argument: Any) -> str:
    text = argument.name.upper() + ("..." if argument.nargs != 1 else "")
    return text if argument.required else f"[{text}]"


def _names(option: Any) -> str:
    names = [_metavar(option)] if option.param_type_name == "argument" else [*option.opts, *option.secondary_opts]
    return ", ".join(f"`{name}`" for name in names)


def _default(option: Any) -> str:
    if option.required:
        return "required"
    if option.default in (None, "", (), []) or callable(option.default):
        return ""
    if isinstance(option.default, bool):
        return "on" if option.default else "off"
    return f"`{option.default}`"


def _cell(text: str | None) -> str:
    """Put a text of the command line into one line of a table."""
    return " ".join((text or "").split()).replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    DOCUMENT.write_text(document(), encoding="utf-8")

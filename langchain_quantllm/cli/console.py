"""The app, its consoles, the options that commands share, and the handling of errors."""

from __future__ import annotations

import contextlib
import difflib
import inspect
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text
from typer.core import TyperGroup

from langchain_quantllm._version import __version__
from langchain_quantllm.compat.library_logging import without_torchao
from langchain_quantllm.errors import InvalidOptionError, QuantLLMError
from langchain_quantllm.schemes import SCHEMES

_ELSEWHERE = {
    "pull": "`run`, `chat` and the other commands fetch a model from the Hub when they first need it",
    "list": "models from the Hub lie in its cache, which `hf cache ls` lists",
    "ps": "a model lives in the process that loaded it and ends with it; `doctor` shows the free memory",
    "rm": "models from the Hub lie in its cache, from which `hf cache rm` removes them",
    "generate": "`run` answers a prompt",
    "embed": "the package runs models that write text and computes no embeddings",
}
_ELSEWHERE |= {"download": _ELSEWHERE["pull"], "ls": _ELSEWHERE["list"]}
"""Commands of similar tools, and what to use in their place."""

C = TypeVar("C")


class _Commands(TyperGroup):
    """The commands, with a hint for unknown names."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find a command, or fail with a hint."""
        name = args[0]
        if name not in self.commands and not name.startswith("-"):
            ctx.fail(f"There is no command {name!r}{self._hint(name)}")
        return super().resolve_command(ctx, args)

    def _hint(self, name: str) -> str:
        if name in _ELSEWHERE:
            return f": {_ELSEWHERE[name]}."
        near = difflib.get_close_matches(name, self.commands, n=1, cutoff=0.65)  # "serve" and "merge" are 0.6 alike
        near = near or [command for command in self.commands if len(name) > 2 and command.startswith(name)]
        return f"; did you mean {near[0]!r}?" if near else f"; the commands are {', '.join(sorted(self.commands))}."


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class SafeConsole(Console):
    """A console on which texts of models and checkpoints cannot control the terminal."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render; in a terminal, with pictures of the control characters that are in texts."""
        for segment in super().render(renderable, options):
            if segment.control is None and self.is_terminal and _CONTROLS.search(segment.text):
                yield Segment(_CONTROLS.sub(_picture, segment.text), segment.style)
            else:
                yield segment


_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x0c\x0e-\x1f\x7f-\x9f]")
"""Those that start or are commands of a terminal, such as to write the clipboard; not tab, line feed and return."""


def _picture(control: re.Match[str]) -> str:
    code = ord(control[0])
    return chr(0x2400 + code) if code < 0x20 else "\u2421" if code == 0x7F else f"\\x{code:x}"


out = SafeConsole()
err = SafeConsole(stderr=True)


def _print_version(wanted: bool) -> None:
    if wanted:
        out.print(f"langchain-quantllm {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Quantized local language models in LangChain, with their memory and speed."""


Model = Annotated[
    str | None, typer.Option("--model", "-m", help="Folder, or repository on the Hub. Default: a small demo model.")
]
Quantization = Annotated[
    str | None,
    typer.Option("--quantization", "-q", help=f"{', '.join(SCHEMES)}. Default: nf4, or the checkpoint's own scheme."),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda:0, ... Default: the first GPU, else the CPU.")]
MaxNewTokens = Annotated[int | None, typer.Option(help="Most tokens of an answer. Default: the checkpoint's, or 256.")]
Temperature = Annotated[
    float | None, typer.Option(help="Randomness of the answer; 0 is greedy. Default: the checkpoint's, or 0.")
]
Seed = Annotated[int | None, typer.Option(help="Makes sampling repeatable.")]
KVCacheDtype = Annotated[
    str, typer.Option(help="Dtype of the KV cache: auto is the model's; fp8 and int8 hold twice the tokens.")
]
LMHeadDtype = Annotated[str, typer.Option(help="Dtype of the output head: auto is the model's; int8 has 8 bits.")]
DraftModel = Annotated[
    str | None,
    typer.Option(help="Folder or repository of a small model of the same vocabulary, whose guesses are verified."),
]
DraftQuantization = Annotated[
    str | None, typer.Option(help="Scheme of the draft model. Default: the checkpoint as it is.")
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the checkpoint.")
]


@contextlib.contextmanager
def errors() -> Iterator[None]:
    """Print an error of the package as a sentence; exit with 1, or 130 after Ctrl-C."""
    try:
        with without_torchao():
            yield
    except KeyboardInterrupt:
        say("stopped")
        raise typer.Exit(130) from None
    except BrokenPipeError:  # the reader of the output has closed it
        raise
    except (QuantLLMError, ValueError, OSError) as error:
        print_error(str(error))
        raise typer.Exit(1) from None


def command(cls: type[C]) -> type[C]:
    """Make a dataclass a command of its name: the fields are arguments and options, `run` does the work.

    For commands with more options than a function can show. The class's docstring is the command's help.
    """

    def call(**given: Any) -> None:
        with errors():
            made: Any = cls(**given)
            made.run()

    call.__doc__ = cls.__doc__
    call.__signature__ = inspect.signature(cls, eval_str=True)  # type: ignore[attr-defined]
    app.command(cls.__name__.lower())(call)
    return cls


def print_error(text: str) -> None:
    """Print a sentence as an error."""
    err.print("error: ", style="bold red", end="")
    err.print(text, markup=False, highlight=False, soft_wrap=True)


def say(text: str) -> None:
    """Print a remark to standard error."""
    err.print(text, style="dim", markup=False, highlight=False, soft_wrap=True)


def print_stream(chunks: Any, *, shown: list[str] | None = None, thoughts: Console = out) -> None:
    """Print an answer as it comes, with the model's reasoning dimmed before it.

    Args:
        chunks: The iterator of `stream`; closed however this ends, so that the model stops.
        shown: Takes the pieces of text, without the reasoning.
        thoughts: The console for the reasoning.
    """
    thinks = False
    with contextlib.closing(chunks):
        for chunk in chunks:
            if thought := "" if isinstance(chunk, str) else chunk.additional_kwargs.get("reasoning_content", ""):
                thoughts.print(thought, end="", style="dim", markup=False, highlight=False, soft_wrap=True)
                thinks = True
            text = chunk if isinstance(chunk, str) else str(chunk.text)
            if text and thinks:
                thoughts.print("\n")
                thinks = False
            if shown is not None:
                shown.append(text)
            out.print(text, end="", markup=False, highlight=False, soft_wrap=True)
    out.print()


def check_file(option: str, file: Path | None) -> None:
    """Check that a file can be written, before the work that it is for.

    Raises:
        InvalidOptionError: If the folder does not exist, or the path is a folder itself.
    """
    if file is not None and (file.is_dir() or not file.parent.is_dir()):
        why = "it is a folder" if file.is_dir() else f"there is no folder {file.parent}"
        msg = f"{option} {file} cannot be written: {why}; name a file in a folder that exists."
        raise InvalidOptionError(msg)


def read_text(option: str, file: Path, kind: str = "text file in UTF-8") -> str:
    """Read the file of an option.

    Raises:
        InvalidOptionError: If it cannot be read.
    """
    try:
        return file.read_text(encoding="utf-8-sig")  # with or without a mark at its beginning
    except (OSError, UnicodeDecodeError) as error:
        msg = f"{option} {file} cannot be read: {error}; name a {kind}."
        raise InvalidOptionError(msg) from error


def find_model(model: str, **options: Any) -> Any:
    """Find a checkpoint and read its config, before torch is imported, which takes seconds.

    Args:
        model: Folder, or repository on the Hub.
        **options: Further fields of `LoadSpec`.
    """
    from langchain_quantllm.loading.checkpoint import find_checkpoint
    from langchain_quantllm.loading.spec import LoadSpec

    with err.status(Text(f"looking for {model}")):
        return find_checkpoint(LoadSpec(model_id=model, **options))


def demo_folder() -> str:
    """Make the demo model where it is not there yet; returns its folder."""
    from langchain_quantllm.cli.demo_model import demo_model

    with err.status("getting the demo model, SmolLM2-135M-Instruct"):
        return str(demo_model(progress=False))


def accelerators() -> list[str]:
    """Name the devices of this machine beside the CPU."""
    import torch

    if not torch.accelerator.is_available():
        return []
    accelerator = torch.accelerator.current_accelerator()
    kind = accelerator.type if accelerator is not None else "cpu"
    return [f"{kind}:{i}" for i in range(torch.accelerator.device_count())]

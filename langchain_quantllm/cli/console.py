"""What the commands share: the app, where they print, their common options, and how an error ends them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Annotated

import typer
from rich.console import Console

from langchain_quantllm.errors import QuantLLMError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Quantized local language models in LangChain, and what they take.",
)
out = Console()
err = Console(stderr=True)

Model = Annotated[
    str | None, typer.Option("--model", "-m", help="Folder, or repository on the Hub. Default: a small demo model.")
]
Quantization = Annotated[
    str | None,
    typer.Option("--quantization", "-q", help="none, int8, nf4, nf4-double, fp4, gptq. Default: as the checkpoint is."),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda:0, ... Default: the first GPU, else the CPU.")]
MaxNewTokens = Annotated[int | None, typer.Option(help="Most tokens of an answer.")]
Temperature = Annotated[float | None, typer.Option(help="0 is greedy.")]
Seed = Annotated[int | None, typer.Option(help="Makes sampling repeatable.")]
TrustRemoteCode = Annotated[bool, typer.Option(help="Run Python code that comes with the checkpoint.")]
ShowMemory = Annotated[bool, typer.Option("--memory", help="Show the memory report afterwards.")]


@contextlib.contextmanager
def errors() -> Iterator[None]:
    """Print an error of the package as the sentence that it is; exit with 1, or 130 after Ctrl-C."""
    try:
        yield
    except KeyboardInterrupt:
        err.print("stopped")
        raise typer.Exit(130) from None
    except (QuantLLMError, ValueError) as error:
        print_error(str(error))
        raise typer.Exit(1) from None


def print_error(text: str) -> None:
    """Print a sentence as an error."""
    err.print("error: ", style="bold red", end="")
    err.print(text, markup=False, highlight=False, soft_wrap=True)


def accelerators() -> list[str]:
    """Name the devices of this machine beside the CPU."""
    import torch

    if not torch.accelerator.is_available():
        return []
    accelerator = torch.accelerator.current_accelerator()
    kind = accelerator.type if accelerator is not None else "cpu"
    return [f"{kind}:{i}" for i in range(torch.accelerator.device_count())]

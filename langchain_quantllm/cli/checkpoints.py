"""The commands that write checkpoints: quantize, merge and convert."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from langchain_quantllm.cli.console import Device, Revision, TrustRemoteCode, app, err, errors, find_model, out
from langchain_quantllm.errors import InvalidOptionError, nearest
from langchain_quantllm.schemes import GPTQ_BITS, SCHEMES

Output = Annotated[Path | None, typer.Option("--output", "-o", help="Folder to write. Default: one named after both.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a folder that is there already.")]
_WRITTEN = [name for name in SCHEMES if name != "none"]
"""Schemes that `quantize` writes."""
_BITS = ", ".join(map(str, GPTQ_BITS))


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help="Folder, or repository on the Hub, unquantized.")],
    scheme: Annotated[str, typer.Option("--scheme", "-s", help=f"{', '.join(_WRITTEN)}.")] = "gptq",
    output: Output = None,
    bits: Annotated[int, typer.Option(help=f"GPTQ: {_BITS}.")] = 4,
    group_size: Annotated[
        int | None, typer.Option(help="GPTQ: inputs that share a scale; -1 is all. Default: 128, or a divisor.")
    ] = None,
    desc_act: Annotated[bool, typer.Option("--desc-act", help="GPTQ: groups by the size of the activations.")] = False,
    asymmetric: Annotated[bool, typer.Option("--asymmetric", help="GPTQ: a zero point for each group.")] = False,
    damping: Annotated[float, typer.Option(help="GPTQ: share of the mean added to the diagonal.")] = 0.01,
    calibration: Annotated[
        str | None,
        typer.Option(help="GPTQ: text or JSON file, data set (name:config:split), none. Default: the package's text."),
    ] = None,
    samples: Annotated[int, typer.Option(help="GPTQ: most sequences of the calibration.")] = 128,
    tokens: Annotated[int, typer.Option(help="GPTQ: tokens of each.")] = 512,
    column: Annotated[str, typer.Option(help="GPTQ: key of the text in JSON objects and data sets.")] = "text",
    skip: Annotated[
        list[str] | None, typer.Option(help="GPTQ: ending of a layer's name to leave out; may be repeated.")
    ] = None,
    device: Device = None,
    dtype: Annotated[str, typer.Option(help="Dtype of the unquantized weights: auto, float16 or bfloat16.")] = "auto",
    overwrite: Overwrite = False,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Quantize a checkpoint and write it. GPTQ keeps finished blocks: the same command goes on after Ctrl-C."""
    with errors():
        if scheme not in _WRITTEN:
            msg = f"--scheme {scheme!r} is not a scheme to quantize with{nearest(scheme, _WRITTEN)}"
            raise InvalidOptionError(msg)
        if bits not in GPTQ_BITS:
            msg = f"--bits {bits} is not allowed; GPTQ takes one of {_BITS}."
            raise InvalidOptionError(msg)
        find_model(model, revision=revision, trust_remote_code=trust_remote_code)
        with err.status("importing PyTorch and transformers"):
            from langchain_quantllm.memory import format_bytes
            from langchain_quantllm.quantization.api import quantize as quantize_checkpoint
            from langchain_quantllm.quantization.calibration import BUILT_IN, Calibration
            from langchain_quantllm.schemes import GPTQ

        given: dict[str, Any] = {"output": output, "device": device, "dtype": dtype, "overwrite": overwrite}
        given |= {"revision": revision, "trust_remote_code": trust_remote_code}
        wanted: Any = scheme
        if scheme == "gptq":
            wanted = GPTQ(bits=bits, group_size=group_size, sym=not asymmetric, desc_act=desc_act)
            texts = Calibration(source=calibration or BUILT_IN, samples=samples, tokens=tokens, column=column)
            given |= {"calibration": texts, "skip_modules": skip or (), "damping": damping}
        elif calibration or skip:
            msg = f"--calibration and --skip are for gptq, and {scheme} needs none; leave them out."
            raise InvalidOptionError(msg)
        with _block_progress() as report:
            done = quantize_checkpoint(model, wanted, report=report, progress=False, **given)
        if done.resumed_blocks:
            err.print(f"{done.resumed_blocks} blocks were finished already", highlight=False)
        if done.calibration:
            err.print(f"calibrated with {done.calibration_tokens} tokens: {done.calibration}", highlight=False)
        err.print(f"{format_bytes(done.weights_bytes)} in {done.total_s:.0f} s", highlight=False)
        out.print(str(done.folder), markup=False, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def _block_progress() -> Iterator[Callable[[Any], None]]:
    """Show a bar of the quantized blocks; yields the function that moves it."""
    columns = (
        TextColumn("blocks"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
    )
    bar = Progress(*columns, console=err)
    task = bar.add_task("blocks", total=None, left="")

    def report(progress: Any) -> None:
        bar.start()  # at the first block: until then, and for other schemes, it would be an empty line
        left = "" if progress.remaining_s is None else f"{progress.remaining_s:.0f} s left"
        bar.update(task, completed=progress.done, total=progress.total, left=left)

    try:
        yield report
    except KeyboardInterrupt:
        if bar.tasks[0].completed:
            bar.console.print("finished blocks are kept; the same command goes on from there")
        raise
    finally:
        if bar.live.is_started:
            bar.stop()


@app.command()
def merge(
    model: Annotated[str, typer.Argument(help="Folder, or repository on the Hub, of the base model.")],
    adapter: Annotated[str, typer.Argument(help="Folder, or repository on the Hub, of an adapter of peft.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    dtype: Annotated[str, typer.Option(help="Dtype of the result: auto, float16, bfloat16 or float32.")] = "auto",
    device: Device = None,
    overwrite: Overwrite = False,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Merge an adapter into its base model and write the result, unquantized."""
    with errors():
        find_model(model, revision=revision, trust_remote_code=trust_remote_code)
        from langchain_quantllm.quantization.merge import merge_adapter

        given: dict[str, Any] = {"dtype": dtype, "device": device, "overwrite": overwrite, "revision": revision}
        folder = merge_adapter(model, adapter, output, trust_remote_code=trust_remote_code, progress=False, **given)
        out.print(str(folder), markup=False, highlight=False, soft_wrap=True)


@app.command()
def convert(
    file: Annotated[Path, typer.Argument(help="The GGUF file.")],
    folder: Annotated[Path, typer.Argument(help="Folder to write; new or empty.")],
) -> None:
    """Write a GGUF file's weights, dequantized to bfloat16, as an ordinary checkpoint."""
    with errors():
        from langchain_quantllm.quantization.gguf import convert_gguf

        out.print(str(convert_gguf(file, folder)), markup=False, highlight=False, soft_wrap=True)

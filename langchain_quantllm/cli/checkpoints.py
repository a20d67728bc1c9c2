"""The commands that write checkpoints: quantize, merge and convert."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from langchain_quantllm.cli.console import Device, Revision, TrustRemoteCode, app, command, err, errors, find_model, out
from langchain_quantllm.errors import InvalidOptionError, nearest
from langchain_quantllm.schemes import AWQ, GPTQ, GPTQ_BITS, SCHEMES

Output = Annotated[Path | None, typer.Option("--output", "-o", help="Folder to write. Default: one named after both.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a folder that is there already.")]
_WRITTEN = [name for name in SCHEMES if name != "none"]
"""Schemes that `quantize` writes."""
_BITS = ", ".join(map(str, GPTQ_BITS))


@command
@dataclass(frozen=True, kw_only=True)
class Quantize:
    """Quantize a checkpoint and write it. GPTQ keeps finished blocks: the same command goes on after Ctrl-C."""

    model: Annotated[str, typer.Argument(help="Folder, or repository on the Hub, unquantized.")]
    scheme: Annotated[str, typer.Option("--scheme", "-s", help=f"{', '.join(_WRITTEN)}.")] = "gptq"
    output: Output = None
    bits: Annotated[
        str, typer.Option(help=f"GPTQ: {_BITS}; or auto:4.25, bits chosen by layer with a mean of 4.25.")
    ] = "4"
    group_size: Annotated[
        int | None, typer.Option(help="GPTQ and AWQ: inputs that share a scale; -1 is all. Default: 128, or a divisor.")
    ] = None
    desc_act: Annotated[bool, typer.Option("--desc-act", help="GPTQ: groups by the size of the activations.")] = False
    asymmetric: Annotated[bool, typer.Option("--asymmetric", help="GPTQ: a zero point for each group.")] = False
    damping: Annotated[float, typer.Option(help="GPTQ: share of the mean added to the diagonal.")] = 0.01
    calibration: Annotated[
        str | None,
        typer.Option(
            help="GPTQ: file of texts, chats or runs, data set (name:config:split), none. Default: the package's text."
        ),
    ] = None
    for_texts: Annotated[
        str | None,
        typer.Option("--for", help="GPTQ: a sample of what the model will be asked; warns if the calibration is far."),
    ] = None
    method: Annotated[
        str,
        typer.Option(
            help="GPTQ's format: gptq; autoround, which trains each block; rtn, to nearest without calibration."
        ),
    ] = "gptq"
    distill: Annotated[
        int, typer.Option(help="GPTQ: epochs in which the scales are trained afterwards; 0 leaves them.")
    ] = 0
    samples: Annotated[int, typer.Option(help="GPTQ: most sequences of the calibration.")] = 128
    tokens: Annotated[int, typer.Option(help="GPTQ: tokens of each.")] = 512
    column: Annotated[str, typer.Option(help="GPTQ: key of the text in JSON objects and data sets.")] = "text"
    skip: Annotated[
        list[str] | None, typer.Option(help="GPTQ: ending of a layer's name to leave out; may be repeated.")
    ] = None
    device: Device = None
    dtype: Annotated[str, typer.Option(help="Dtype of the unquantized weights: auto, float16 or bfloat16.")] = "auto"
    overwrite: Overwrite = False
    revision: Revision = None
    trust_remote_code: TrustRemoteCode = False

    def run(self) -> None:
        """Quantize, write, and print what was done and the folder."""
        scheme = self._scheme()
        find_model(self.model, revision=self.revision, trust_remote_code=self.trust_remote_code)
        with err.status("importing PyTorch and transformers"):
            from langchain_quantllm.quantization.api import quantize

        options = self._rounding()
        with _block_progress() as report:
            done = quantize(
                self.model,
                scheme,
                output=self.output,
                device=self.device,
                dtype=self.dtype,
                overwrite=self.overwrite,
                report=report,
                progress=False,
                revision=self.revision,
                trust_remote_code=self.trust_remote_code,
                **options,
            )
        _print_done(done)

    def _scheme(self) -> str | GPTQ | AWQ:
        if self.scheme not in _WRITTEN:
            msg = f"--scheme {self.scheme!r} is not a scheme to quantize with{nearest(self.scheme, _WRITTEN)}"
            raise InvalidOptionError(msg)
        if self.scheme == "gptq":
            sym = not self.asymmetric
            return GPTQ(bits=self.bits, group_size=self.group_size, sym=sym, desc_act=self.desc_act)
        if self.scheme == "awq":
            if self.bits != "4" or self.asymmetric or self.desc_act:
                msg = "--bits, --asymmetric, --desc-act are for gptq: awq has 4 bits and zero points; leave them out."
                raise InvalidOptionError(msg)
            return AWQ(group_size=self.group_size)
        return self.scheme

    def _rounding(self) -> dict[str, Any]:
        """The options of `quantize` that are for GPTQ and AWQ; none for other schemes, where none may be given."""
        from langchain_quantllm.quantization.calibration import BUILT_IN, Calibration
        from langchain_quantllm.quantization.distill import Distillation

        if self.scheme not in ("gptq", "awq"):
            if self.calibration or self.for_texts or self.skip or self.distill or self.method != "gptq":
                msg = (
                    "--calibration, --for, --skip, --method and --distill are for gptq and awq, and "
                    f"{self.scheme} needs none; leave them out."
                )
                raise InvalidOptionError(msg)
            return {}
        source, column = self.calibration or BUILT_IN, self.column
        texts = Calibration(source=source, samples=self.samples, tokens=self.tokens, column=column)
        return {
            "calibration": texts if self.calibration or self.method != "rtn" else None,
            "for_texts": Calibration(source=self.for_texts, column=column) if self.for_texts else None,
            "method": self.method,
            "distill": Distillation(epochs=self.distill) if self.distill else None,
            "skip_modules": self.skip or (),
            "damping": self.damping,
        }


def _print_done(done: Any) -> None:
    """Print the facts of a `QuantizedCheckpoint` as remarks, and its folder as the output."""
    from langchain_quantllm.memory import format_bytes

    if done.resumed_blocks:
        err.print(f"{done.resumed_blocks} blocks were finished already", highlight=False)
    if done.calibration_distance is not None:
        err.print(f"distance of the calibration from --for: {done.calibration_distance:.2f}", highlight=False)
    if done.calibration:
        err.print(f"calibrated with {done.calibration_tokens} tokens: {done.calibration}", highlight=False)
    if len(bits_of := getattr(done.scheme, "layer_bits", ())) > 1:
        counted = " and ".join(map(str, bits_of))
        err.print(f"{done.mean_bits:.3g} bits a weight: layers have {counted}", highlight=False)
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

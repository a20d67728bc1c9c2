"""Conversion of GGUF files, llama.cpp's format, to ordinary checkpoints: `langchain-quantllm convert FILE FOLDER`."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from langchain_quantllm.compat.library_logging import progress_bars, without_torchao
from langchain_quantllm.errors import (
    CheckpointError,
    MissingPackageError,
    ModelNotFoundError,
    pip_install,
)
from langchain_quantllm.loading.foreign_errors import as_checkpoint_error, reason_of
from langchain_quantllm.memory.estimate import build_on_meta
from langchain_quantllm.quantization.output_dir import claim_output


def convert_gguf(file: str | Path, folder: str | Path, *, progress: bool = True) -> Path:
    """Write the weights of a GGUF file, dequantized to bfloat16, and its tokenizer as a checkpoint.

    The precision that quantizing into the file has lost stays lost: the original checkpoint is more exact.

    Args:
        file: The GGUF file.
        folder: Folder to write; it must be new or empty.
        progress: Show progress bars.

    Returns:
        The folder.

    Raises:
        MissingPackageError: If `gguf`, or a package that the file's tokenizer needs, is not installed.
        ModelNotFoundError: If there is no such file.
        InvalidOptionError: If the folder is not empty.
        CheckpointError: If transformers cannot read the file, or it lacks tensors of the model that it describes.
        OutputError: If the folder cannot be written; nothing is left of it then.
    """
    from langchain_quantllm.quantization.saving import save_checkpoint  # imports torch

    file = Path(file).expanduser().resolve()
    if not file.is_file():
        msg = f"there is no file {file}; check the path."
        raise ModelNotFoundError(msg)
    with claim_output(folder, (), [file]) as output:
        try:
            import gguf as _  # noqa: F401
        except ImportError as error:
            msg = f"reading a GGUF file needs gguf: {pip_install('langchain-quantllm[demo]')}"
            raise MissingPackageError(msg) from error
        # The bar of GGUF's conversion has no switch; it writes to the standard error stream.
        quiet = contextlib.nullcontext() if progress else contextlib.redirect_stderr(io.StringIO())
        with without_torchao(), progress_bars(progress), quiet:
            output.check_space(file.stat().st_size)
            model, tokenizer = _read(file)
            output.check_space(sum(parameter.nbytes for parameter in model.parameters()))
            save_checkpoint(output, model, tokenizer)
        output.publish()
    return output.folder


def _read(file: Path) -> tuple[Any, Any]:
    """Read a GGUF file into a plain model in bfloat16 and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from langchain_quantllm.compat.transformers_quantizers import dequantizing_gguf, forget_quantization

    source: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    options = {"dtype": torch.bfloat16, "output_loading_info": True, **dequantizing_gguf(), **source}
    with _reading(file):
        _check_size(file, source)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **source)
        model, info = AutoModelForCausalLM.from_pretrained(file.parent, **options)
    _check_complete(file, {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
    forget_quantization(model)
    return model, tokenizer


@contextlib.contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Turn what is raised while a file is read into this package's errors: the readers check little of it."""

    def describe(error: Exception) -> str:
        reason = reason_of(error)
        return f"transformers cannot read {file} ({reason}); give the checkpoint that the file was made of."

    with as_checkpoint_error(describe):
        try:
            yield
        except ImportError as error:
            msg = f"{file} needs a further package ({reason_of(error)}): {pip_install('sentencepiece', 'tiktoken')}"
            raise MissingPackageError(msg) from error


def _check_size(file: Path, source: dict[str, Any]) -> None:
    """Check that the model that a file describes is no larger than the tensors in it, before it is allocated.

    Raises:
        CheckpointError: If it is.
    """
    import gguf
    import torch
    from transformers import AutoConfig

    tensors = gguf.GGUFReader(file).tensors
    blocks = {tensor.name.split(".")[1] for tensor in tensors if tensor.name.startswith("blk.")}
    config = AutoConfig.from_pretrained(file.parent, **source)
    layers = getattr(config, "num_hidden_layers", len(blocks))
    if layers > len(blocks):
        _check_complete(file, {f"blk.{len(blocks)}"})
    model = build_on_meta(config, torch.bfloat16, False, file.name)
    needed = sum(parameter.numel() for parameter in model.parameters())
    there = sum(int(tensor.n_elements) for tensor in tensors)
    # An output head that is the embeddings may be there once or twice.
    if needed > there + model.get_input_embeddings().weight.numel():
        msg = f"{file} describes a model of {needed} weights and holds {there}; get the file again."
        raise CheckpointError(msg)


def _check_complete(file: Path, missing: set[str]) -> None:
    if missing:
        msg = (
            f"{file} lacks matching weights for {len(missing)} tensors of the model that it describes (for example "
            f"{min(missing)!r}), which would have been initialized at random; get the file again."
        )
        raise CheckpointError(msg)

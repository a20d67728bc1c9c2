"""Conversion of GGUF files, llama.cpp's format, to ordinary checkpoints: `langchain-quantllm convert FILE FOLDER`."""

from __future__ import annotations

import contextlib
import io
import struct
from pathlib import Path
from typing import Any

from langchain_quantllm.compat.library_logging import progress_bars, without_torchao
from langchain_quantllm.errors import (
    CheckpointError,
    MissingPackageError,
    ModelNotFoundError,
    pip_install,
)
from langchain_quantllm.quantization.output_dir import claim_output
from langchain_quantllm.quantization.saving import save_checkpoint


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
        CheckpointError: If transformers cannot read the file.
        OutputError: If the folder cannot be written; nothing is left of it then.
    """
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
    options = {"dtype": torch.bfloat16, **dequantizing_gguf(), **source}
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **source)
        model = AutoModelForCausalLM.from_pretrained(file.parent, **options)
    except ImportError as error:
        msg = f"{file} needs a further package ({_reason(error)}): {pip_install('sentencepiece', 'tiktoken')}"
        raise MissingPackageError(msg) from error
    except (ValueError, OSError, LookupError, RuntimeError, struct.error) as error:
        msg = f"transformers cannot read {file} ({_reason(error)}); give the checkpoint that the file was made of."
        raise CheckpointError(msg) from error
    forget_quantization(model)
    return model, tokenizer


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).partition("\n")[0].rstrip(". ")

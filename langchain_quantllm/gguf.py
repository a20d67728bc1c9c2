"""Files in llama.cpp's format, GGUF, turned into ordinary checkpoints.

Owns the conversion, also as a command: `python -m langchain_quantllm.gguf FILE FOLDER`. Knows nothing of schemes and
engines.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import struct
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from langchain_quantllm.errors import (
    CheckpointError,
    InvalidOptionError,
    MissingPackageError,
    ModelNotFoundError,
    QuantLLMError,
    pip_install,
)
from langchain_quantllm.output_folder import written
from langchain_quantllm.silence import progress_bars, without_torchao


def convert_gguf(file: str | Path, folder: str | Path, *, progress: bool = True) -> Path:
    """Write the weights of a GGUF file, dequantized to bfloat16, and its tokenizer as a checkpoint.

    What quantizing into the file has lost stays lost: the checkpoint that the file was made of is more exact.

    Args:
        file: The GGUF file.
        folder: Where the checkpoint goes; it must be new or empty.
        progress: Show how far it is.

    Returns:
        The folder.

    Raises:
        MissingPackageError: If `gguf`, or a package that the file's tokenizer needs, is not installed.
        ModelNotFoundError: If there is no such file.
        InvalidOptionError: If the folder is not empty.
        CheckpointError: If transformers cannot read the file.
        QuantLLMError: If the folder cannot be written; nothing is left of it then.
    """
    file, folder = Path(file).expanduser().resolve(), Path(folder).expanduser()
    if not file.is_file():
        msg = f"there is no file {file}; check the path."
        raise ModelNotFoundError(msg)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        msg = f"{folder} is there already and not empty; name a new folder."
        raise InvalidOptionError(msg)
    try:
        import gguf as _  # noqa: F401
    except ImportError as error:
        msg = f"reading a GGUF file needs gguf: {pip_install('langchain-quantllm[demo]')}"
        raise MissingPackageError(msg) from error
    with without_torchao():
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from langchain_quantllm.compat.transformers_quantizers import dequantizing_gguf, forget_quantization

    source: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    # The bar of GGUF's conversion knows no off switch but the stream that it writes to.
    quiet = contextlib.nullcontext() if progress else contextlib.redirect_stderr(io.StringIO())
    with without_torchao(), progress_bars(progress), quiet:
        try:
            tokenizer = AutoTokenizer.from_pretrained(file.parent, **source)
            model = AutoModelForCausalLM.from_pretrained(
                file.parent, dtype=torch.bfloat16, **dequantizing_gguf(), **source
            )
        except ImportError as error:
            msg = f"{file} needs a further package ({_reason(error)}): {pip_install('sentencepiece', 'tiktoken')}"
            raise MissingPackageError(msg) from error
        except (ValueError, OSError, LookupError, RuntimeError, struct.error) as error:
            msg = f"transformers cannot read {file} ({_reason(error)}); give the checkpoint that the file was made of."
            raise CheckpointError(msg) from error
        forget_quantization(model)
        with written(folder) as part:
            model.save_pretrained(part)
            tokenizer.save_pretrained(part)
    return folder


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).partition("\n")[0].rstrip(". ")


def main(arguments: Sequence[str] | None = None) -> None:
    """Convert a file from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m langchain_quantllm.gguf", description="Write a GGUF file's weights as a bfloat16 checkpoint."
    )
    parser.add_argument("file", type=Path, help="the GGUF file")
    parser.add_argument("folder", type=Path, help="where the checkpoint goes; new or empty")
    given = parser.parse_args(arguments)
    try:
        convert_gguf(given.file, given.folder)
    except QuantLLMError as error:
        sys.exit(f"Error: {error}")


if __name__ == "__main__":
    main()

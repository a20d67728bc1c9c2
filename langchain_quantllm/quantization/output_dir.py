"""An output folder that appears only when it is complete."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from langchain_quantllm.compat.library_logging import progress_bars
from langchain_quantllm.errors import InvalidOptionError, QuantLLMError


def free_folder(output: str | os.PathLike[str], sources: Sequence[str], *, overwrite: bool) -> Path:
    """Check that an output folder may be written, and return its absolute path.

    Args:
        output: The folder.
        sources: Folders or repositories that the result is made of.
        overwrite: Whether the content of the folder may be replaced.

    Raises:
        InvalidOptionError: If it is a source or a file, or is not empty and may not be replaced.
    """
    folder = Path(output).expanduser().resolve()
    if any(Path(source).expanduser().resolve() == folder for source in sources):
        msg = f"output={str(folder)!r} is one of the sources; give another folder."
        raise InvalidOptionError(msg)
    if folder.exists() and not folder.is_dir():
        msg = f"output={str(folder)!r} is a file; give a folder."
        raise InvalidOptionError(msg)
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        msg = f"output={str(folder)!r} is not empty; give another folder, or overwrite=True to replace its content."
        raise InvalidOptionError(msg)
    return folder


def save_checkpoint(folder: Path, model: Any, preprocessor: Any, *, progress: bool = True, **options: Any) -> None:
    """Write a model and its tokenizer or processor into a folder, which replaces the one there once it is complete.

    Args:
        folder: The folder; nothing is left of it if writing fails, and its old content stays.
        model: A transformers model.
        preprocessor: Its tokenizer or processor.
        progress: Show progress bars, unless they are switched off.
        **options: Further options of the model's `save_pretrained`.

    Raises:
        QuantLLMError: If the disk is full, or the folder cannot be written.
    """
    with _replacing(folder) as part, progress_bars(progress):
        model.save_pretrained(part, **options)
        preprocessor.save_pretrained(part)


@contextlib.contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """Yield a new folder, which replaces `folder` at the end of the block and is removed on an error."""
    mark = uuid.uuid4().hex[:8]
    part, old = (folder.parent / f".{folder.name}.{mark}.{suffix}" for suffix in ("part", "old"))
    try:
        part.mkdir(parents=True)
        yield part
        if folder.exists():
            folder.rename(old)
        part.rename(folder)
    except OSError as error:
        reason = str(error).partition("\n")[0]
        msg = f"{folder} could not be written: {reason}"
        raise QuantLLMError(msg) from error
    finally:
        if old.exists():
            if folder.exists():
                shutil.rmtree(old, ignore_errors=True)
            else:
                old.rename(folder)
        shutil.rmtree(part, ignore_errors=True)

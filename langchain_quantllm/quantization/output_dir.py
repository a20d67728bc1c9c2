"""A folder that is written as a whole: it takes its place when all is there, or is not there at all.

Owns the checks before the work and the change of places after it. Knows nothing of what is written.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

from langchain_quantllm.errors import InvalidOptionError, QuantLLMError


def free_folder(output: str | os.PathLike[str], sources: Sequence[str], *, overwrite: bool) -> Path:
    """Give the absolute path of an output, if it may be written.

    Args:
        output: The folder.
        sources: What the result is made of, some of them folders.
        overwrite: Whether what is there may be replaced.

    Raises:
        InvalidOptionError: If it is a source or a file, or holds something that may not be replaced.
    """
    folder = Path(output).expanduser().resolve()
    if any(Path(source).expanduser().resolve() == folder for source in sources):
        msg = f"output={str(folder)!r} is what it is to be made of; give another folder."
        raise InvalidOptionError(msg)
    if folder.exists() and not folder.is_dir():
        msg = f"output={str(folder)!r} is a file; give a folder."
        raise InvalidOptionError(msg)
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        msg = f"output={str(folder)!r} is not empty; give another folder, or overwrite=True to replace what is there."
        raise InvalidOptionError(msg)
    return folder


@contextlib.contextmanager
def written(folder: Path) -> Iterator[Path]:
    """Give a new folder to write into, which takes a folder's place at the end of the block, or is gone.

    Raises:
        QuantLLMError: If the disk is full, or the place cannot be written.
    """
    mark = uuid.uuid4().hex[:8]
    part, old = (folder.parent / f".{folder.name}.{mark}.{what}" for what in ("part", "old"))
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

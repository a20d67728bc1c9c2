"""Reading JSON files of checkpoints and adapters, which may come from strangers. Imports the standard library only."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

from langchain_quantllm.errors import CheckpointError, first_line

MOST_BYTES = 256 * 2**20
"""Largest file that is read: the index of the largest models has some MB."""


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Args:
        file: The file.

    Raises:
        CheckpointError: If it is no ordinary file, cannot be read, or holds something else.
    """
    try:
        status = file.stat()
        if not stat.S_ISREG(status.st_mode):
            msg = f"{file} cannot be read: it is no ordinary file; get the file again."
            raise CheckpointError(msg)
        if status.st_size > MOST_BYTES:
            msg = f"{file} cannot be read: it has {status.st_size} bytes, and {MOST_BYTES} are allowed; get it again."
            raise CheckpointError(msg)
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        kind = "is not JSON" if isinstance(error, ValueError | RecursionError) else "cannot be read"
        msg = f"{file} {kind}: {first_line(error)}; get the file again."
        raise CheckpointError(msg) from error
    if not isinstance(content, dict):
        msg = f"{file} does not hold a JSON object, but {type(content).__name__}; get the file again."
        raise CheckpointError(msg)
    return content


def json_or_empty(file: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object; an empty one if it is missing or damaged, which loading reports."""
    try:
        return read_json(file)
    except CheckpointError:
        return {}

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
    content = _read(file)
    if not isinstance(content, dict):
        msg = f"{file} does not hold a JSON object, but {type(content).__name__}; get the file again."
        raise CheckpointError(msg)
    return content


def json_or_empty(file: Path) -> dict[str, Any]:
    """Read a JSON file, whose content is under the name `""` if it is no object.

    Returns:
        The content; empty if the file is missing or damaged, which loading reports.
    """
    try:
        content = _read(file)
    except CheckpointError:
        return {}
    return content if isinstance(content, dict) else {"": content}


def _read(file: Path) -> Any:
    try:
        status = file.stat()
        if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait for ever
            msg = f"{file} cannot be read: it is no ordinary file; get the file again."
            raise CheckpointError(msg)
        if status.st_size > MOST_BYTES:
            msg = f"{file} cannot be read: it has {status.st_size} bytes, and {MOST_BYTES} are allowed; get it again."
            raise CheckpointError(msg)
        return json.loads(file.read_text(encoding="utf-8"))
    except CheckpointError:
        raise
    except OSError as error:
        msg = f"{file} cannot be read: {first_line(error)}; get the file again."
        raise CheckpointError(msg) from error
    except (ValueError, RecursionError) as error:
        msg = f"{file} is not JSON: {first_line(error)}; get the file again."
        raise CheckpointError(msg) from error

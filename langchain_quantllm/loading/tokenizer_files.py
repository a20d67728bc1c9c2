"""Checks of a tokenizer's JSON files: that they are readable, and name no file outside the checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from langchain_quantllm.errors import CheckpointError
from langchain_quantllm.loading.json_files import read_json
from langchain_quantllm.loading.stored_tensors import check_inside

_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def check_tokenizer_files(folder: Path) -> None:
    """Check the small files of a tokenizer.

    transformers reads any file that a tokenizer_config.json names. Paths of the maker's machine are often left in one;
    only those that lead to a file here are refused.

    Args:
        folder: The checkpoint's folder.

    Raises:
        CheckpointError: If a file is damaged, or names one outside the folder.
    """
    contents = {name: read_json(folder / name) for name in _FILES if (folder / name).exists()}
    file = folder / _FILES[0]
    for option, name in _names(contents.get(_FILES[0], {})):
        if option == "fast_tokenizer_files":
            check_inside(name, file)
        elif (folder / name).exists() and not (folder / name).resolve().is_relative_to(folder.resolve()):
            msg = f"{file} names {name!r} as its {option}, outside the checkpoint; only files inside it are read."
            raise CheckpointError(msg)


def _names(content: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the names of files in a tokenizer_config.json, with the option that each stands under."""
    for option, value in content.items():
        if option.endswith(("_file", "_files")):
            yield from (
                (option, name) for name in (value if isinstance(value, list) else [value]) if isinstance(name, str)
            )

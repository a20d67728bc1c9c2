"""Finished blocks on the disk, so that a quantization that was broken off goes on where it was.

Owns the folder beside the output, what tells one run from another, and reading and writing blocks. Knows no model.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from langchain_quantllm.errors import InvalidOptionError

_ABOUT = "about.json"


class Journal:
    """What was finished of one run."""

    def __init__(self, output: Path, about: Mapping[str, Any], *, overwrite: bool) -> None:
        """Open the journal of a run, or begin one.

        Args:
            output: The folder that the run writes in the end.
            about: All that the blocks depend on, ready for JSON.
            overwrite: Throw the blocks of another run away.

        Raises:
            InvalidOptionError: If the folder beside the output holds blocks of another run.
        """
        self.folder = output.with_name(f"{output.name}.partial")
        text = json.dumps(about, sort_keys=True, indent=1)
        known = self.folder / _ABOUT
        if known.is_file() and known.read_text(encoding="utf-8") != text:
            if not overwrite:
                msg = (
                    f"{self.folder} holds finished blocks of a quantization with other settings; give it the same "
                    "settings to go on, another output, or overwrite=True to throw these blocks away."
                )
                raise InvalidOptionError(msg)
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        known.write_text(text, encoding="utf-8")

    def read(self, index: int) -> dict[str, torch.Tensor] | None:
        """Give the tensors of a finished block, None if it is not finished."""
        path = self._path(index)
        try:
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no mapping)
        except (OSError, SafetensorError):
            return None

    def write(self, index: int, tensors: dict[str, torch.Tensor]) -> None:
        """Keep the tensors of a block; what was broken off in the middle does not count."""
        path = self._path(index)
        unfinished = path.with_suffix(".unfinished")
        save_file(tensors, unfinished)
        unfinished.replace(path)

    def remove(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, index: int) -> Path:
        return self.folder / f"block-{index:04}.safetensors"


def digest(sequences: Sequence[Sequence[int]]) -> str:
    """Tell token sequences apart without keeping them."""
    return hashlib.sha256(json.dumps([list(ids) for ids in sequences]).encode()).hexdigest()


def weights_of(folder: Path) -> list[list[Any]]:
    """Tell the weights of a local checkpoint apart by the names, sizes and times of their files."""
    files = sorted(folder.glob("*.safetensors"))
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]

"""The finished blocks of a GPTQ run, kept beside its output, so that the same call resumes after an interruption."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from langchain_quantllm.errors import InvalidOptionError
from langchain_quantllm.quantization.output_dir import output_errors

ENDING = ".partial"
"""Of the folder's name, after that of the output."""

_FILES = re.compile(r"about\.json|((block|bits)-\d{4,}|scales)\.(safetensors|unfinished)")


class Journal:
    """Folder of the finished blocks of one run, named `OUTPUT.partial`. The output's lock holds for it too."""

    def __init__(self, output: Path) -> None:
        """Name the journal of an output.

        Raises:
            InvalidOptionError: If its folder holds anything else.
        """
        self._output = output
        self._folder = output.with_name(f"{output.name}{ENDING}")
        if not self._folder.exists() and not self._folder.is_symlink():
            return
        is_own = self._folder.is_dir() and not self._folder.is_symlink()
        foreign = [] if not is_own else [path.name for path in self._files() if not _FILES.fullmatch(path.name)]
        if foreign or not is_own:
            what = f"holds {sorted(foreign)[0]!r}" if foreign else "is no folder of its own"
            msg = (
                f"{self._folder} {what}, and finished blocks would be kept there; move it away, or give another output."
            )
            raise InvalidOptionError(msg)

    @property
    def finished_bytes(self) -> int:
        """Size of the blocks that are finished."""
        return sum(path.stat().st_size for path in self._files())

    def open(self, about: Mapping[str, Any], *, overwrite: bool) -> None:
        """Go on with the journal of the run that `about` describes, or begin one.

        Args:
            about: Everything that the blocks depend on.
            overwrite: Remove the blocks of a run with other settings.

        Raises:
            InvalidOptionError: If there are such blocks and they may not be removed.
            OutputError: If the folder cannot be written.
        """
        text = json.dumps(about, sort_keys=True, indent=1)
        known = self._folder / "about.json"
        with output_errors(self._output):
            if not known.is_file() or known.read_text(encoding="utf-8") != text:
                if self._is_begun() and not overwrite:
                    msg = (
                        f"{self._folder} holds finished blocks of a quantization with other settings; give the same "
                        "settings to resume it, another output, or overwrite=True to delete these blocks."
                    )
                    raise InvalidOptionError(msg)
                self.remove()
            self._folder.mkdir(parents=True, exist_ok=True)
            unfinished = known.with_name("block-0000.unfinished")
            unfinished.write_text(text, encoding="utf-8")
            unfinished.replace(known)

    def read(self, index: int | str | None) -> dict[str, torch.Tensor] | None:
        """Read the tensors of a finished block; None if it is not finished, or its file is damaged.

        Args:
            index: The block; None stands for the training of scales, a text is the name of anything else.
        """
        try:
            with safe_open(self._path(index), framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is not a mapping)
        except (OSError, SafetensorError):
            return None

    def write(self, index: int | str | None, tensors: dict[str, torch.Tensor]) -> None:
        """Keep a finished block; with None, the training of scales; with a name, anything else.

        Raises:
            OutputError: If it cannot be written; the blocks before it stay.
        """
        unfinished = self._path(index).with_suffix(".unfinished")
        try:
            with output_errors(self._output):
                save_file(tensors, unfinished)
                unfinished.replace(self._path(index))
        finally:
            with contextlib.suppress(OSError):
                unfinished.unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove the blocks, and the folder if nothing else has come into it."""
        with contextlib.suppress(OSError):
            for path in self._files():
                if _FILES.fullmatch(path.name):
                    path.unlink()
            self._folder.rmdir()

    def remove_empty(self) -> None:
        """Remove a journal in which no block is finished."""
        if not self._is_begun():
            self.remove()

    def _is_begun(self) -> bool:
        return any(path.suffix == ".safetensors" for path in self._files())

    def _files(self) -> list[Path]:
        return list(self._folder.iterdir()) if self._folder.is_dir() else []

    def _path(self, index: int | str | None) -> Path:
        name = index if isinstance(index, str) else "scales" if index is None else f"block-{index:04}"
        return self._folder / f"{name}.safetensors"

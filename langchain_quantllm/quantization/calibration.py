"""The calibration of GPTQ: texts of the package, of files or of data sets, cut into sequences of tokens."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Any

from langchain_quantllm.compat.packages import is_installed
from langchain_quantllm.errors import InvalidOptionError, MissingPackageError, NamedOptions, pip_install

BUILT_IN = "built-in"
NONE = "none"
_SUFFIXES = (".txt", ".md", ".json", ".jsonl")
_MOST_TEXTS = 20_000  # of a data set: enough for the largest calibration, small enough to read at once


@dataclass(frozen=True, kw_only=True)
class Calibration(NamedOptions):
    """Texts to calibrate with, and how many tokens of them.

    Args:
        source: Texts; the name of a text file, or of a JSON or JSON Lines file of texts or of objects; a data set of
            the Hugging Face Hub, as `name`, `name:config` or `name:config:split`; `"built-in"`, some passages in
            several languages and in code; or `"none"`, which makes GPTQ round to nearest.
        samples: Most sequences.
        tokens: Tokens of each sequence.
        column: Key of the text in a JSON object or a data set.
        seed: Seed of the choice of sequences where there are more.

    Raises:
        InvalidOptionError: If a number is too small, or the source is no text.
    """

    source: str | Path | Sequence[str] = BUILT_IN
    samples: int = 128
    tokens: int = 512
    column: str = "text"
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the numbers and the kind of the source."""
        for name, least in (("samples", 1), ("tokens", 8)):
            if (value := getattr(self, name)) < least:
                msg = f"calibration {name}={value} is not allowed; it must be at least {least}."
                raise InvalidOptionError(msg)
        if not isinstance(self.source, str | Path):
            texts = list(self.source)
            if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
                msg = "the calibration must be a list of texts that are not empty; 'none' rounds to nearest."
                raise InvalidOptionError(msg)
            object.__setattr__(self, "source", tuple(texts))

    @property
    def source_label(self) -> str:
        """Name of the source, without any text of it."""
        if isinstance(self.source, tuple):
            return f"{len(self.source)} texts"
        return Path(str(self.source)).name if _is_file(self.source) else str(self.source)

    @property
    def file(self) -> Path | None:
        """The file that holds the texts; None where they come from elsewhere."""
        is_named = isinstance(self.source, str | Path) and self.source not in (BUILT_IN, NONE)
        return Path(str(self.source)).expanduser() if is_named and _is_file(self.source) else None

    @property
    def label(self) -> str:
        """Description in a few words, without any text of the source."""
        tokens = "" if self.source == NONE else f", up to {self.samples} x {self.tokens} tokens"
        return f"{self.source_label}{tokens}"


def calibration_from(value: Any) -> Calibration:
    """Convert a `Calibration`, its source, or None for the built-in one to a calibration."""
    if value is None or isinstance(value, Calibration):
        return value or Calibration()
    return Calibration(source=Path(value) if isinstance(value, os.PathLike) else value)


def read_texts(calibration: Calibration) -> list[str]:
    """Read the texts of a calibration.

    Raises:
        InvalidOptionError: If there is no such file or data set, or no text in it.
        MissingPackageError: If it is a data set and the package `datasets` is not installed.
    """
    source = calibration.source
    if isinstance(source, tuple):
        return list(source)
    if source == NONE:
        return []
    if source == BUILT_IN:
        return _passages(resources.files("langchain_quantllm").joinpath("data/calibration.txt").read_text("utf-8"))
    read = _read_file if _is_file(source) else _read_data_set
    if not (texts := read(str(source), calibration.column)):
        msg = f"the calibration {str(source)!r} holds no text."
        raise InvalidOptionError(msg)
    return texts


def sequences(calibration: Calibration, texts: Sequence[str], tokenizer: Any, longest: int | None) -> list[list[int]]:
    """Cut texts into sequences of tokens of one length.

    Texts follow each other, with the tokenizer's special tokens between them; the rest at the end is not used.

    Args:
        calibration: Number and length of the sequences.
        texts: Texts from `read_texts`.
        tokenizer: The model's tokenizer.
        longest: Tokens of the model's context, where known.

    Returns:
        Token ids.

    Raises:
        InvalidOptionError: If the texts have fewer tokens than 8, or a sequence more than the context.
    """
    if longest is not None and calibration.tokens > longest:
        msg = f"calibration tokens={calibration.tokens} is more than the model's context of {longest}; use fewer."
        raise InvalidOptionError(msg)
    texts = list(texts)
    random.Random(calibration.seed).shuffle(texts)  # noqa: S311  (a choice, no secret)
    end = tokenizer.eos_token_id
    ids: list[int] = []
    for text in texts:
        ids += tokenizer(text, verbose=False)["input_ids"]
        if end is not None and ids[-1:] != [end]:
            ids.append(end)
        if len(ids) >= calibration.samples * calibration.tokens:
            break
    length = min(calibration.tokens, len(ids))
    if length < min(8, calibration.tokens):
        msg = f"the calibration has {len(ids)} tokens; give at least a few sentences."
        raise InvalidOptionError(msg)
    cut = [ids[at : at + length] for at in range(0, len(ids) - length + 1, length)]
    return cut[: calibration.samples]


def _passages(text: str) -> list[str]:
    return [part.strip() for part in text.split("\n---\n") if part.strip()]


def _is_file(source: Any) -> bool:
    path = Path(str(source)).expanduser()
    return isinstance(source, Path) or path.is_file() or path.suffix in _SUFFIXES


def _read_file(source: str, column: str) -> list[str]:
    path = Path(source).expanduser()
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        msg = (
            f"the calibration file {path} cannot be read ({error}); give a text file in UTF-8, or a JSON file of texts."
        )
        raise InvalidOptionError(msg) from error
    if path.suffix not in (".json", ".jsonl"):
        return _passages(content)
    try:
        if path.suffix == ".json":
            rows = json.loads(content)
        else:
            rows = [json.loads(line) for line in content.splitlines() if line.strip()]
    except ValueError as error:
        msg = f"the calibration file {path} is not JSON: {error}."
        raise InvalidOptionError(msg) from error
    if not isinstance(rows, list):
        msg = f"the calibration file {path} holds no list; give texts, or objects with {column!r}."
        raise InvalidOptionError(msg)
    return list(_column(rows, str(path), column))


def _column(rows: Any, source: str, column: str) -> Iterator[str]:
    """Yield the texts of rows, which are texts or objects with a column of texts."""
    for row in rows:
        if isinstance(row, dict) and column not in row:
            msg = f"{source} has no column {column!r}; its columns are {', '.join(map(repr, row)) or 'none'}."
            raise InvalidOptionError(msg)
        text = row[column] if isinstance(row, dict) else row
        if not isinstance(text, str):
            msg = f"column {column!r} of {source} holds {type(text).__name__}, not text; name another with column=."
            raise InvalidOptionError(msg)
        if text.strip():
            yield text


def _read_data_set(source: str, column: str) -> list[str]:
    if not is_installed("datasets"):
        msg = (
            f"the calibration {source!r} is not a file here, and reading a data set needs the package datasets: "
            f"{pip_install('datasets')}"
        )
        raise MissingPackageError(msg)
    from datasets import load_dataset

    name, config, split = (*source.split(":"), "", "")[:3]
    try:
        rows = load_dataset(name, config or None, split=split or "train", streaming=True)
    except Exception as error:  # of many packages: the Hub's, the file system's, its own
        msg = f"the calibration {source!r} is neither a file nor a data set that can be read here: {error}"
        raise InvalidOptionError(msg) from error
    return list(islice(_column(rows, source, column), _MOST_TEXTS))

"""The calibration of GPTQ: texts and conversations from anywhere, cut into sequences of tokens of one length."""

from __future__ import annotations

import contextlib
import json
import os
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from itertools import islice
from numbers import Integral
from pathlib import Path
from typing import Any

from langchain_quantllm.compat.packages import is_installed
from langchain_quantllm.errors import InvalidOptionError, MissingPackageError, NamedOptions, pip_install
from langchain_quantllm.loading.pieces import valid_text
from langchain_quantllm.quantization.conversations import Conversation
from langchain_quantllm.quantization.samples import Sample, samples_from

BUILT_IN = "built-in"
NONE = "none"
_PASSAGES, _CHATS = "calibration.txt", "calibration_chats.jsonl"
_LINES = (".jsonl", ".ndjson")
_SUFFIXES = (".txt", ".md", ".json", *_LINES)
_MOST_TEXTS = 20_000  # of a data set: enough for the largest calibration, small enough to read at once
_PIECE_CHARS = 2**20  # of a text that are tokenized at once, as a file may be one text of any length
_LONGEST_NAME = 1000  # characters of a file's or data set's name


@dataclass(frozen=True, kw_only=True)
class Calibration(NamedOptions):
    """Texts and conversations to calibrate with, and how many tokens of them.

    Args:
        source: Texts, conversations (lists of messages), documents of LangChain, examples and runs of LangSmith or of
            LangChain's tracers; the name of a text file, or of a JSON or JSON Lines file of any of these; a data set of
            the Hugging Face Hub, as `name`, `name:config` or `name:config:split`; `"built-in"`, passages in several
            languages and in code, and conversations with and without tools; `"none"`, which makes GPTQ round to
            nearest; or a mix, pairs of a source and its share of the tokens: `[("chats.jsonl", 0.7), ("built-in",
            0.3)]`. Conversations are written by the model's own chat template.
        samples: Most sequences.
        tokens: Tokens of each sequence.
        column: Key of the text in a JSON object or a data set.
        seed: Seed of the choice of sequences where there are more.

    Raises:
        InvalidOptionError: If a number is too small, or the source is nothing to read.
    """

    source: str | Path | Sequence[Any] = BUILT_IN
    samples: int = 128
    tokens: int = 512
    column: str = "text"
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the numbers and the kind of the source."""
        for name, least in (("samples", 1), ("tokens", 8), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
                msg = f"calibration {name}={value!r} is not allowed; it must be a whole number of at least {least}."
                raise InvalidOptionError(msg)
        if isinstance(self.source, str | Path):
            _check_name(str(self.source))
            return
        object.__setattr__(self, "source", _rows_of(self.source))
        if self.mix:
            if any(part.mix for part, _ in self.mix):
                msg = "a part of a calibration is a mix itself; give all parts in one list, each with its share."
                raise InvalidOptionError(msg)
            if wrong := [share for _, share in self.mix if not 0 < share < float("inf")]:
                msg = f"the calibration has a part with share {wrong[0]!r}; shares are positive numbers, such as 0.3."
                raise InvalidOptionError(msg)
            if NONE in [part.source for part, _ in self.mix]:
                msg = "'none' cannot be a part of a calibration; leave it out."
                raise InvalidOptionError(msg)
        elif not self.source or any(isinstance(text, str) and not text.strip() for text in self.source):
            msg = "the calibration must be a list of texts that are not empty; 'none' rounds to nearest."
            raise InvalidOptionError(msg)

    @property
    def mix(self) -> tuple[tuple[Calibration, float], ...]:
        """The parts of a mix with their shares; empty for any other source."""
        if not isinstance(self.source, tuple) or not self.source or not all(map(_is_part, self.source)):
            return ()
        return tuple((replace(self, source=own), float(share)) for own, share in self.source)

    @property
    def source_label(self) -> str:
        """Name of the source, without any text of it."""
        if parts := self.mix:
            whole = sum(share for _, share in parts)
            return ", ".join(f"{part.source_label} ({share / whole:.0%})" for part, share in parts)
        if isinstance(self.source, tuple):
            return f"{len(self.source)} texts"
        return Path(str(self.source)).name if _is_file(self.source) else str(self.source)

    @property
    def files(self) -> list[Path]:
        """The files that hold the texts; none where they come from elsewhere."""
        if parts := self.mix:
            return [file for part, _ in parts for file in part.files]
        is_named = isinstance(self.source, str | Path) and self.source not in (BUILT_IN, NONE)
        return [Path(str(self.source)).expanduser()] if is_named and _is_file(self.source) else []

    @property
    def label(self) -> str:
        """Description in a few words, without any text of the source."""
        tokens = "" if self.source == NONE else f", up to {self.samples} x {self.tokens} tokens"
        return f"{self.source_label}{tokens}"


def _check_name(source: str) -> None:
    """Check that a source may be the name of a file or a data set, and no text.

    Raises:
        InvalidOptionError: If it may not.
    """
    if not source.strip() or "\n" in source or len(source) > _LONGEST_NAME:
        msg = (
            f"calibration={source[:60]!r} is no name of a file or a data set; put texts into a list, such as [text], "
            "or into a file."
        )
        raise InvalidOptionError(msg)


def _rows_of(source: Any) -> tuple[Any, ...]:
    """Return the rows of a source that is no name; a row that stands alone is one.

    Raises:
        InvalidOptionError: If it has none.
    """
    if isinstance(source, Mapping) or any(hasattr(source, name) for name in ("inputs", "page_content")):
        return (source,)  # of a file, a run, or a document
    if not isinstance(source, Iterable) or isinstance(source, bytes):
        msg = (
            f"calibration={str(source)[:60]!r} of type {type(source).__name__} cannot be read; give the name of a file "
            "or a data set, or a list of texts, conversations, documents or runs."
        )
        raise InvalidOptionError(msg)
    return tuple(source)


def _is_part(value: Any) -> bool:
    """Say whether a value is a part of a mix: a source with a number."""
    is_pair = isinstance(value, tuple | list) and len(value) == 2
    return is_pair and isinstance(value[1], int | float) and not isinstance(value[1], bool)


def calibration_from(value: Any) -> Calibration:
    """Convert a `Calibration`, its source, or None for the built-in one to a calibration."""
    if value is None or isinstance(value, Calibration):
        return value or Calibration()
    return Calibration(source=Path(value) if isinstance(value, os.PathLike) else value)


@contextlib.contextmanager
def named(option: str) -> Iterator[None]:
    """Let errors about a calibration begin with the option that it was given by."""
    try:
        yield
    except InvalidOptionError as error:
        msg = f"{option}: {error}"
        raise InvalidOptionError(msg) from error


def read_texts(calibration: Calibration) -> list[Any]:
    """Read the texts and conversations of a calibration; of a mix, a list for each part.

    Raises:
        InvalidOptionError: If there is no such file or data set, or nothing that can be read in it.
        MissingPackageError: If it is a data set and the package `datasets` is not installed.
    """
    if parts := calibration.mix:
        return [read_texts(part) for part, _ in parts]
    source = calibration.source
    if source == NONE:
        return []
    if source == BUILT_IN:
        data = resources.files("langchain_quantllm") / "data"
        chats = [json.loads(line) for line in (data / _CHATS).read_text("utf-8").splitlines()]
        texts: list[Sample] = list(_passages((data / _PASSAGES).read_text("utf-8")))
        return [*texts, *samples_from(chats, _CHATS, calibration.column)]
    if isinstance(source, tuple):
        found = list(samples_from(source, "the calibration", calibration.column))
    else:
        read = _read_file if _is_file(source) else _read_data_set
        found = list(read(str(source), calibration.column))
    if not found:
        msg = f"the calibration {calibration.source_label!r} holds no text."
        raise InvalidOptionError(msg)
    return found


def sequences(calibration: Calibration, texts: Sequence[Any], tokenizer: Any, longest: int | None) -> list[list[int]]:
    """Cut texts into sequences of tokens of one length.

    Texts follow each other, with the tokenizer's special tokens between them; conversations are written by its chat
    template. The rest at the end is not used. Of a mix, each part has its share of the tokens; one that is too short
    for it is repeated, which gives its tokens more weight.

    Args:
        calibration: Number and length of the sequences.
        texts: What `read_texts` has returned.
        tokenizer: The model's tokenizer.
        longest: Tokens of the model's context, where known.

    Returns:
        Token ids.

    Raises:
        InvalidOptionError: If the texts have fewer tokens than 8, or a sequence more than the context, or the chat
            template refuses a conversation.
    """
    if longest is not None and calibration.tokens > longest:
        msg = f"calibration tokens={calibration.tokens} is more than the model's context of {longest}; use fewer."
        raise InvalidOptionError(msg)
    if not (parts := calibration.mix):
        return _cut(calibration, _token_ids(calibration, texts, tokenizer))
    whole = sum(share for _, share in parts)
    shares = [share / whole for _, share in parts]
    ids = [_token_ids(part, own, tokenizer) for (part, _), own in zip(parts, texts, strict=True)]
    most = max(len(own) / share for own, share in zip(ids, shares, strict=True))
    total = min(calibration.samples * calibration.tokens, int(most))
    counts = [max(1, round(share * total / calibration.tokens)) for share in shares]
    found: list[list[int]] = []
    for own, count in zip(ids, counts, strict=True):
        repeated = own * -(-count * calibration.tokens // max(len(own), 1))
        found += _cut(replace(calibration, source=BUILT_IN, samples=count), repeated)
    random.Random(calibration.seed).shuffle(found)  # noqa: S311  (an order, no secret)
    return found


def _token_ids(calibration: Calibration, texts: Sequence[Sample], tokenizer: Any) -> list[int]:
    """Return the token ids of texts one after the other, as many as the calibration asks for and somewhat more."""
    texts = list(texts)
    random.Random(calibration.seed).shuffle(texts)  # noqa: S311  (a choice, no secret)
    end = tokenizer.eos_token_id
    ids: list[int] = []
    for text in texts:
        is_chat = isinstance(text, Conversation)
        for at, piece in _pieces(valid_text(text.render(tokenizer) if isinstance(text, Conversation) else text)):
            # A template writes the special tokens itself.
            ids += tokenizer(piece, add_special_tokens=not is_chat and at == 0, verbose=False)["input_ids"]
            if len(ids) >= calibration.samples * calibration.tokens:
                break
        if end is not None and ids[-1:] != [end]:
            ids.append(end)
        if len(ids) >= calibration.samples * calibration.tokens:
            break
    return ids


def _pieces(text: str) -> Iterator[tuple[int, str]]:
    """Cut a text into pieces that are tokenized at once, with the place of each."""
    return ((at, text[at : at + _PIECE_CHARS]) for at in range(0, len(text), _PIECE_CHARS))


def _cut(calibration: Calibration, ids: Sequence[int]) -> list[list[int]]:
    length = min(calibration.tokens, len(ids))
    if length < min(8, calibration.tokens):
        msg = f"the calibration has {len(ids)} tokens; give at least a few sentences."
        raise InvalidOptionError(msg)
    cut = [list(ids[at : at + length]) for at in range(0, len(ids) - length + 1, length)]
    return cut[: calibration.samples]


def _passages(text: str) -> list[str]:
    return [part.strip() for part in text.split("\n---\n") if part.strip()]


def _is_file(source: Any) -> bool:
    path = Path(str(source))
    if isinstance(source, Path) or path.suffix.lower() in _SUFFIXES:
        return True
    try:
        return path.expanduser().is_file()
    except (OSError, RuntimeError, ValueError):  # no name that a file may have
        return False


def _read_file(source: str, column: str) -> Iterable[Sample]:
    path = Path(source)
    try:
        path = path.expanduser()
        content = path.read_text(encoding="utf-8-sig")  # with or without a mark at its beginning
    except (OSError, RuntimeError, ValueError) as error:
        msg = (
            f"the calibration file {path} cannot be read ({error}); give a text file in UTF-8, or a JSON file of texts."
        )
        raise InvalidOptionError(msg) from error
    suffix = path.suffix.lower()
    if suffix not in (".json", *_LINES):
        return _passages(content)
    if suffix in _LINES:  # which end with a line feed alone: a text may hold other ends of lines
        lines = enumerate(content.split("\n"), 1)
        rows = [_parsed(line, f"line {at} of {path}") for at, line in lines if line.strip()]
    else:
        rows = _parsed(content, str(path), " (a file with a value in each line must end in .jsonl)")
    if not isinstance(rows, list):
        msg = f"the calibration file {path} holds no list; give texts, or objects with {column!r} or 'messages'."
        raise InvalidOptionError(msg)
    return samples_from(rows, str(path), column)


def _parsed(text: str, where: str, hint: str = "") -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        msg = f"the calibration cannot be read: {where} is not JSON: {error}{hint}."
        raise InvalidOptionError(msg) from error


def _read_data_set(source: str, column: str) -> Iterable[Sample]:
    if not is_installed("datasets"):
        msg = (
            f"the calibration {source!r} is not a file here, and reading a data set needs the package datasets: "
            f"{pip_install('datasets')}"
        )
        raise MissingPackageError(msg)
    from datasets import load_dataset

    name, config, split = (*source.split(":"), "", "")[:3]
    try:
        found = load_dataset(name, config or None, split=split or "train", streaming=True)
        rows = list(islice(found, _MOST_TEXTS))  # which reads its files
    except Exception as error:  # of many packages: the Hub's, the file system's, its own
        msg = f"the calibration {source!r} is neither a file nor a data set that can be read here: {error}"
        raise InvalidOptionError(msg) from error
    return samples_from(rows, source, column)

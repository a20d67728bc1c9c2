"""Where an output may be written: which folders it must not touch, and which content may be replaced.

Knows paths alone: it writes nothing, and holds no lock.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from langchain_quantllm.errors import InvalidOptionError, first_line

_CHECKPOINT_FILES = re.compile(
    r"[\w.-]+\.safetensors(\.index\.json)?"
    r"|[\w-]*config\.json|(chat_template|response_template|response_schema)\.(json|jinja)"
    r"|(tokenizer|vocab|special_tokens_map|added_tokens|normalizer)\.json|merges\.txt|vocab\.txt"
    r"|[\w.-]+\.(model|tiktoken|spm|bpe)"
    r"|(configuration|modeling|modular|tokenization|processing|image_processing|feature_extraction)_\w+\.py"
)
"""Names of the files that saving a model with its tokenizer or processor writes."""

_OWN = re.compile(r"\.quantllm-(new|old|lock)$")
"""Endings of names that runs use beside their outputs."""

_TEMPLATES = "additional_chat_templates"
"""The one folder among them."""


def output_folder(
    output: str | os.PathLike[str],
    sources: Iterable[str | os.PathLike[str]],
    files: Iterable[str | os.PathLike[str]] = (),
    *,
    cache_dir: str | None = None,
    beside: Iterable[str] = (),
    overwrite: bool,
) -> Path:
    """Check that a folder may be written, and return its absolute path, without links.

    Args:
        output: The folder.
        sources: Folders that the result is made of; names of repositories are passed over.
        files: Files that the result is made of.
        cache_dir: Folder in which files of the Hub are kept; None is the Hub's own.
        beside: Endings of the names of further folders that are written beside it.
        overwrite: Whether a checkpoint in the folder may be replaced.

    Raises:
        InvalidOptionError: If it is, holds, or lies in a folder of others; is a file; or has content that may not be
            replaced.
        OSError: If it cannot be read.
    """
    folder = _resolved(output)
    if not folder.name:
        _refuse(folder, "is the root of a disk")
    if _OWN.search(folder.name):
        msg = f"output={str(folder)!r} has the name of a run's own working folder; give another one."
        raise InvalidOptionError(msg)
    sources = list(sources)
    for ending in ("", *beside):
        _check_apart(folder.with_name(folder.name + ending), sources, cache_dir)
    check_content(folder, overwrite=overwrite)
    for file in filter(None, map(_existing, files)):
        if _holds(folder, file):
            _refuse(folder, f"holds {str(file)!r}, which is read")
    return folder


def check_content(folder: Path, *, overwrite: bool) -> None:
    """Check that a folder is absent or empty, or that `overwrite` is set and it holds a checkpoint and nothing else.

    Raises:
        InvalidOptionError: If it is a file, or its content may not be replaced.
        OSError: If it cannot be read.
    """
    if os.path.lexists(folder) and not folder.is_dir():
        msg = f"output={str(folder)!r} is a file; give a folder."
        raise InvalidOptionError(msg)
    try:
        names = sorted(path.name for path in folder.iterdir())
    except FileNotFoundError:
        return
    if names and not overwrite:
        msg = f"output={str(folder)!r} is not empty; give another folder, or overwrite=True to replace a checkpoint."
        raise InvalidOptionError(msg)
    foreign = foreign_entries(folder)
    if names and (foreign or "config.json" not in names):
        found = ", ".join(map(repr, foreign[:3])) or "no config.json"
        more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
        msg = (
            f"output={str(folder)!r} holds {found}{more}, and overwrite=True only replaces a folder that holds a "
            "checkpoint and nothing else; give another folder, or remove these yourself."
        )
        raise InvalidOptionError(msg)
    if os.path.ismount(folder) or not os.access(folder, os.W_OK | os.X_OK):
        why = "is where a disk is mounted" if os.path.ismount(folder) else "may not be written by this user"
        msg = f"output={str(folder)!r} {why}, so it cannot be replaced; give another folder."
        raise InvalidOptionError(msg)


def foreign_entries(folder: Path) -> list[str]:
    """List the names in a folder that no file of a checkpoint has; names of folders end in a slash."""
    found = []
    for path in sorted(folder.iterdir()):
        is_folder = path.is_dir() and not path.is_symlink()
        if is_folder and path.name == _TEMPLATES:
            found += [f"{_TEMPLATES}/{p.name}" for p in sorted(path.iterdir()) if p.is_dir() or p.suffix != ".jinja"]
        elif is_folder or not _CHECKPOINT_FILES.fullmatch(path.name):
            found.append(f"{path.name}/" if is_folder else path.name)
    return found


def _resolved(path: str | os.PathLike[str]) -> Path:
    """Return the absolute path that a user's path means.

    Raises:
        InvalidOptionError: If it can mean none.
    """
    text = os.fspath(path)
    if not text or "\0" in text:
        msg = f"output={text!r} is no path of a folder; give a name such as 'model-nf4'."
        raise InvalidOptionError(msg)
    try:
        return Path(text).expanduser().resolve()
    except (OSError, RuntimeError) as error:  # a link to itself, a home of an unknown user
        msg = f"output={text!r} is no path of a folder ({first_line(error)}); give another folder."
        raise InvalidOptionError(msg) from error


def _check_apart(
    folder: Path,
    sources: Iterable[str | os.PathLike[str]],
    cache_dir: str | None,
) -> None:
    """Check that replacing a folder removes nothing else.

    Raises:
        InvalidOptionError: If it is, holds, or lies in a source, or is or holds a folder of the system's.
    """
    for source in filter(None, map(_existing, sources)):
        if source.is_dir() and _holds(source, folder):
            what = "is" if _same(source, folder) else "lies in"
            _refuse(folder, f"{what} {str(source)!r}, one of the sources")
        if any(_holds(folder, path) for path in (source, *_linked(source))):
            _refuse(folder, f"holds files of {str(source)!r}, one of the sources")
    for cache in _hub_caches(cache_dir):
        if _holds(folder, cache) or _holds(cache, folder):
            _refuse(folder, f"is, holds or lies in {str(cache)!r}, the cache of the Hub")
    places = {"home": Path("~").expanduser(), "current": Path(), "temporary": Path(tempfile.gettempdir())}
    for what, place in places.items():
        if _holds(folder, place.resolve()):
            _refuse(folder, f"is or holds the {what} folder")


def _linked(source: Path) -> list[Path]:
    """List the files to which links in a folder lead."""
    try:
        return [path.resolve() for path in source.iterdir() if path.is_symlink()] if source.is_dir() else []
    except (OSError, RuntimeError):  # loading it says what is wrong
        return []


def _hub_caches(cache_dir: str | None) -> Sequence[Path]:
    from huggingface_hub import constants

    return [Path(path).expanduser().resolve() for path in (cache_dir, constants.HF_HUB_CACHE) if path]


def _refuse(folder: Path, why: str) -> None:
    msg = f"output={str(folder)!r} {why}; give another folder, which holds nothing else."
    raise InvalidOptionError(msg)


def _existing(path: str | os.PathLike[str]) -> Path | None:
    """Return the absolute path of what is there; None where it is not, such as a name of a repository."""
    try:
        found = Path(path).expanduser().resolve()
        return found if found.exists() else None
    except (OSError, RuntimeError, ValueError):
        return None


def _holds(outer: Path, inner: Path) -> bool:
    """Say whether a folder is another path or one of its parents, under whatever name."""
    return any(_same(outer, path) for path in (inner, *inner.parents))


def _same(one: Path, other: Path) -> bool:
    """Say whether two paths are one, also where the file system ignores case or mounts a folder twice."""
    if one == other:
        return True
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False

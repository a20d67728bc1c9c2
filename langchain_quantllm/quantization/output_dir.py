"""An output folder: claimed for one run, written beside its place, and put there in one step when it is complete.

The new content of `NAME` is written into `.NAME.quantllm-new`. Linux exchanges both folders in one step, so a process
that is killed at any moment leaves the old or the new content in place, and the other one beside it, which the next
run removes. Elsewhere the old folder becomes `.NAME.quantllm-old` for a moment, and the next run puts it back.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from stat import S_ISDIR
from typing import Any

from langchain_quantllm.errors import OutputError, QuantLLMError, first_line
from langchain_quantllm.memory import format_bytes
from langchain_quantllm.quantization.exchange import exchange, remove, sync
from langchain_quantllm.quantization.output_lock import locked
from langchain_quantllm.quantization.output_place import check_content, output_folder

_logger = logging.getLogger(__name__)

_SPARE_BYTES = 32 * 2**20
"""For the tokenizer, configs and headers, beside the weights."""

_OTHER_DISK = "give an output on another disk"
_TAKEN = "something else has appeared there meanwhile, and is left alone; give another output"
_ADVICE = {
    errno.ENOSPC: f"make room, or {_OTHER_DISK}",
    errno.EDQUOT: f"make room, or {_OTHER_DISK}",
    errno.EFBIG: _OTHER_DISK,
    errno.EROFS: _OTHER_DISK,
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ENOTEMPTY: _TAKEN,
    errno.EEXIST: _TAKEN,
    errno.ENOTDIR: "a file is in its way; give another output",
}
"""What to do about an error of the system; where there is no better advice, to give another output."""

_State = frozenset[tuple[str, int, int, int]]


class OutputDir:
    """The output of one run, which alone may write it.

    Attributes:
        folder: Where the result will be.
        part: Where it is written.
    """

    def __init__(self, folder: Path, *, overwrite: bool) -> None:
        """Look at what is in the folder; its lock must be held."""
        self.folder = folder
        self.part = _beside(folder, "new")
        self._old = _beside(folder, "old")
        check_content(folder, overwrite=overwrite)
        self._before = _state(folder)

    def check_space(self, needed_bytes: int) -> None:
        """Check that the disk has room for weights of a size.

        Raises:
            OutputError: If it has not.
        """
        free_bytes, needed_bytes = shutil.disk_usage(self.folder.parent).free, needed_bytes + _SPARE_BYTES
        if free_bytes < needed_bytes:
            msg = (
                f"{self.folder} needs {format_bytes(needed_bytes)} and the disk has {format_bytes(free_bytes)} free; "
                "make room, or give an output on another disk."
            )
            raise OutputError(msg)

    @contextlib.contextmanager
    def writing(self) -> Iterator[Path]:
        """Make the folder for the new content, and turn whatever fails while it is written into `OutputError`."""
        with output_errors(self.folder):
            self.part.mkdir()
            yield self.part

    def publish(self) -> None:
        """Put the new content in its place, and remove the old one.

        Raises:
            OutputError: If it cannot be put there, or what was there has changed since the run began; nothing is
                removed then.
        """
        with output_errors(self.folder):
            sync(self.part)
            if not self._before or not self.folder.exists():
                _move(self.part, self.folder)
                sync(self.folder.parent, content=False)
                return
            self._check_unchanged(self.folder)
            if exchange(self.part, self.folder):
                self._finish(self.part, undo=lambda: exchange(self.part, self.folder))
            else:
                self.folder.rename(self._old)
                self._finish(self._old, undo=lambda: self._old.rename(self.folder), fill=True)

    def _finish(self, old: Path, undo: Callable[[], Any], *, fill: bool = False) -> None:
        """Remove the old content, which lies at `old` now, unless something came into it at the last moment.

        Args:
            old: Where the old content lies.
            undo: Puts it back.
            fill: The place is empty, and the new content is still to be moved there.
        """
        try:
            self._check_unchanged(old)
            if fill:
                _move(self.part, self.folder)
        except OSError:
            undo()
            raise
        sync(self.folder.parent, content=False)
        try:
            remove(old)
        except OSError as error:
            _logger.warning("%s is written, but %s cannot be removed: %s", self.folder, old, first_line(error))

    def _check_unchanged(self, folder: Path) -> None:
        if _state(folder) != self._before:
            msg = (
                f"the content of {self.folder} has changed while this run was at work, so it is left as it is, and the "
                "result is not kept; give another output."
            )
            raise OutputError(msg)


@contextlib.contextmanager
def claim_output(
    output: str | os.PathLike[str],
    sources: Iterable[str | os.PathLike[str]],
    files: Iterable[str | os.PathLike[str]] = (),
    *,
    cache_dir: str | None = None,
    beside: Iterable[str] = (),
    overwrite: bool = False,
) -> Iterator[OutputDir]:
    """Claim a folder for one run, before its work; other runs that want it get an error at once.

    Args:
        output: The folder.
        sources: Folders or repositories that the result is made of.
        files: Files that it is made of.
        cache_dir: Folder in which files of the Hub are kept; None is the Hub's own.
        beside: Endings of the names of further folders that are written beside it.
        overwrite: Whether a checkpoint in the folder may be replaced.

    Yields:
        The output. At the end of the block nothing of it is left unless it was published.

    Raises:
        InvalidOptionError: If the folder is in a place of others, or has content that may not be replaced.
        OutputError: If it cannot be written, or another run writes it.
    """
    with output_errors(output):
        folder = output_folder(output, sources, files, cache_dir=cache_dir, beside=beside, overwrite=overwrite)
    with contextlib.ExitStack() as stack:
        with output_errors(folder):
            stack.enter_context(_parents(folder))
            stack.enter_context(locked(_beside(folder, "lock"), f"output={str(folder)!r}"))
            _recover(folder)
            claimed = OutputDir(folder, overwrite=overwrite)
            # A place that is not writable and a name that is too long are found out now, and not after the work.
            claimed.part.mkdir()
            claimed.part.rmdir()
            stack.callback(_remove_quietly, claimed.part)
        yield claimed


@contextlib.contextmanager
def output_errors(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Turn errors of the disk, and of the libraries that write to it, into `OutputError`.

    Args:
        folder: The output, for the error.
    """
    try:
        yield
    except QuantLLMError:
        raise
    except Exception as error:
        found = re.search(r"\(os error (\d+)\)", str(error))  # as the Rust code of safetensors and tokenizers writes it
        number = error.errno if isinstance(error, OSError) else int(found[1]) if found else None
        why = first_line(error) if number is None else os.strerror(number)
        advice = _ADVICE.get(number or 0, "give another output")
        msg = f"{os.fspath(folder)} could not be written: {why}; {advice}. What was there before is left as it was."
        raise OutputError(msg) from error


def _recover(folder: Path) -> None:
    """Put back or remove what a run that was killed has left beside an output, whose lock is held.

    Raises:
        OutputError: If an old result cannot be put back, because another one is in its place.
    """
    new, old = _beside(folder, "new"), _beside(folder, "old")
    if old.exists() and not folder.exists():
        old.rename(folder)
    elif old.exists() and new.exists():
        msg = f"{old} holds a result that a killed run could not put back to {folder}; move one of both away."
        raise OutputError(msg)
    remove(old)
    remove(new)


@contextlib.contextmanager
def _parents(folder: Path) -> Iterator[None]:
    """Make the folders above an output; at the end of the block, remove those that were made and are empty."""
    missing = [path for path in folder.parents if not path.exists()]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for path in missing:
            with contextlib.suppress(OSError):
                path.rmdir()


def _beside(folder: Path, what: str) -> Path:
    """Return the path of a run's own folder or file beside its output."""
    return folder.with_name(f".{folder.name}.quantllm-{what}")


def _move(source: Path, folder: Path) -> None:
    """Move a folder to a place that is free or an empty folder; an error if it is anything else."""
    if os.name == "nt" and folder.is_dir():
        folder.rmdir()
    source.rename(folder)


def _remove_quietly(path: Path) -> None:
    with contextlib.suppress(OSError):
        remove(path)


def _state(folder: Path) -> _State:
    """Describe the files of a folder, so that a change is seen; empty if it is not there."""
    found = {path: path.lstat() for path in folder.rglob("*")}
    return frozenset(
        (str(path.relative_to(folder)), stat.st_ino, stat.st_size, stat.st_mtime_ns)
        for path, stat in found.items()
        if not S_ISDIR(stat.st_mode)
    )

"""The lock of an output: one run at a time writes a folder, in whatever thread or process.

A file beside the output, locked by the system and so free again when its process ends, however it ends. Where the
system or the file system has no such locks, the file itself is the lock: it names the process, which may be dead.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from langchain_quantllm.errors import OutputError

_EMPTY_S = 10.0
"""Seconds after which a lock file without content is one whose process died before it wrote it."""

_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)


class _HeldError(Exception):
    """Another run holds the lock."""


@contextlib.contextmanager
def locked(file: Path, what: str) -> Iterator[None]:
    """Hold a lock inside the block; its file is there only while it is held.

    Args:
        file: The lock's file, in a folder that exists.
        what: What the lock is for, in errors.

    Raises:
        OutputError: If another run holds it; at once.
        OSError: If the file cannot be written.
    """
    try:
        release = _acquire(file)
    except _HeldError:
        pid = _read(file).get("pid")
        owner = f" (process {pid})" if isinstance(pid, int) else ""
        msg = f"{what} is being written by another run{owner}; wait until it has ended, or give another output."
        raise OutputError(msg) from None
    try:
        yield
    finally:
        release()


def _acquire(file: Path) -> Callable[[], None]:
    """Take the lock, and return the function that releases it.

    Raises:
        _HeldError: If another run holds it.
    """
    try:
        import fcntl as _  # noqa: F401
    except ImportError:
        return lock_by_name(file)
    try:
        return lock_by_system(file)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return lock_by_name(file)


def lock_by_system(file: Path) -> Callable[[], None]:
    """Take the lock with `flock`, which the system releases when this process ends; as `_acquire` otherwise."""
    descriptor = _open_locked(file)

    def release() -> None:
        with contextlib.suppress(OSError):
            file.unlink()
        os.close(descriptor)

    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps(_owner()).encode())
    except OSError:
        release()
        raise
    return release


def _open_locked(file: Path) -> int:
    """Open a file, make it where it is missing, and lock it."""
    import fcntl

    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(descriptor, file):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise _HeldError from None
        except OSError:
            file.unlink(missing_ok=True)
            os.close(descriptor)
            raise
        os.close(descriptor)  # the run before removed the file when it ended


def _is_at(descriptor: int, file: Path) -> bool:
    """Say whether an open file is still the one of this name."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(file))
    except FileNotFoundError:
        return False


def lock_by_name(file: Path) -> Callable[[], None]:
    """Take the lock by creating its file; the file of a dead process is removed. As `_acquire` otherwise."""
    owner = _owner()
    for _ in range(3):
        try:
            descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            _remove_dead(file)
            continue
        try:
            os.write(descriptor, json.dumps(owner).encode())
        finally:
            os.close(descriptor)

        def release() -> None:
            if _read(file) == owner:
                with contextlib.suppress(OSError):
                    file.unlink()

        return release
    raise _HeldError


def _remove_dead(file: Path) -> None:
    """Remove the lock file of a dead process.

    Raises:
        _HeldError: If its process lives, or cannot be known because it runs on another machine.
    """
    with contextlib.suppress(FileNotFoundError):  # released meanwhile, or removed by another run
        before = file.stat()
        if not _is_dead(_read(file), before.st_mtime):
            raise _HeldError
        aside = file.with_name(f"{file.name}.{uuid.uuid4().hex[:8]}")
        file.rename(aside)  # of several runs that do so, one succeeds
        after = aside.stat()
        if (before.st_ino, before.st_mtime_ns) != (after.st_ino, after.st_mtime_ns):
            aside.rename(file)  # another run has removed the dead one's already, and this lock is its own
            raise _HeldError
        aside.unlink()


def _is_dead(owner: dict[str, object], written: float) -> bool:
    """Say whether the process of a lock file is dead, by the file's content and the time it was written."""
    if not owner:
        return time.time() - written > _EMPTY_S
    if owner.get("host") != socket.gethostname():
        return False
    try:
        return bool(psutil.Process(int(str(owner["pid"]))).create_time() != owner.get("started"))
    except (psutil.NoSuchProcess, KeyError, ValueError):
        return True
    except psutil.Error:
        return False


def _owner() -> dict[str, object]:
    """Describe this process and this lock, so that it can be told from an earlier one of the same number."""
    started = psutil.Process().create_time()
    return {"pid": os.getpid(), "host": socket.gethostname(), "started": started, "lock": uuid.uuid4().hex}


def _read(file: Path) -> dict[str, object]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}

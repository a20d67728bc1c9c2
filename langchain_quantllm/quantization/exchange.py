"""Folders on the disk: two exchanged in one step, one removed, one written through to the disk."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h and linux/fs.h
_IMPOSSIBLE = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)


def exchange(one: Path, other: Path) -> bool:
    """Exchange two paths in one step, so that at every moment each name has one of both contents.

    Returns:
        Whether it was done; False where the system or the file system has no such step.

    Raises:
        OSError: If the system refuses it.
    """
    renameat2 = _renameat2()
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _IMPOSSIBLE:
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))


@functools.cache
def _renameat2() -> Callable[..., int] | None:
    """Find Linux's call; None where the C library has none. Source: renameat2(2)."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        call = ctypes.CDLL(None, use_errno=True).renameat2
        call.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
        call.restype = ctypes.c_int
        found: Callable[..., int] = call
        return found
    return None


def remove(path: Path) -> None:
    """Remove a folder with its content, also a read-only one, or the link of this name; nothing if it is not there.

    Raises:
        OSError: If something of it cannot be removed.
    """
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path, onerror=_make_writable)


def _make_writable(function: Callable[..., Any], path: str, info: Any) -> None:
    """Try a step of removing again after its folder was made writable."""
    if not isinstance(info[1], PermissionError):
        raise info[1]
    for place in (os.path.dirname(path), path):
        if not os.path.islink(place):
            os.chmod(place, os.stat(place).st_mode | stat.S_IRWXU)
    if function in (os.unlink, os.remove, os.rmdir):
        function(path)
    else:
        shutil.rmtree(path)


def sync(folder: Path, *, content: bool = True) -> None:
    """Wait until a folder's files are on the disk, so that a loss of power cannot empty what has its place already.

    Args:
        folder: The folder.
        content: Its files too; else its list of names only.

    Raises:
        OSError: If the disk could not take them.
    """
    for path in [*(folder.rglob("*") if content else ()), folder]:
        if path.is_file() or os.name == "posix":
            descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

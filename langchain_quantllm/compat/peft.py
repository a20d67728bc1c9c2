"""What adapters need of peft, checked by this package's own lower bound.

The smallest version that transformers names is no guide: 5.24 names one that was never released, and all that it
calls is in older ones.
"""

from __future__ import annotations

from importlib import metadata

from langchain_quantllm.errors import MissingPackageError, pip_install
from langchain_quantllm.packages import is_installed

SMALLEST_VERSION = "0.20"
"""The oldest peft that the tests ran with; the same as in pyproject.toml."""


def check_peft() -> None:
    """Check that peft is there, and new enough.

    Raises:
        MissingPackageError: If it is missing or too old.
    """
    command = pip_install("langchain-quantllm[adapters]")
    if not is_installed("peft"):
        msg = f"adapters need peft: {command}"
        raise MissingPackageError(msg)
    found = metadata.version("peft")
    if _release(found) < _release(SMALLEST_VERSION):
        msg = f"adapters need peft {SMALLEST_VERSION} or newer, and {found} is installed: {command}"
        raise MissingPackageError(msg)


def _release(version: str) -> tuple[int, ...]:
    """Read the first two numbers of a version."""
    return tuple(int(part) for part in version.split(".")[:2])

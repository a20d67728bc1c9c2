"""The tried versions of other packages, and the comparison with the installed ones. Imports none of the packages.

docs/compatibility.md has the same table, with the reasons.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata

from packaging.version import Version


@dataclass(frozen=True)
class Tried:
    """The oldest and the newest version of a package with which all compatibility tests passed."""

    oldest: str
    newest: str


TRIED: Mapping[str, Tried] = {
    "accelerate": Tried("1.13.0", "1.15.0"),
    "bitsandbytes": Tried("0.50.0", "0.50.2"),
    "gptqmodel": Tried("7.6.0", "7.7.0"),
    "huggingface-hub": Tried("1.31.0", "1.33.0"),
    "langchain-core": Tried("1.7.0", "1.8.3"),
    "optimum": Tried("2.3.0", "2.3.0"),
    "peft": Tried("0.20.0", "0.21.2"),
    "sentence-transformers": Tried("6.2.0", "6.2.0"),
    "torch": Tried("2.8.0", "2.15.0"),
    "transformers": Tried("5.14.0", "5.24.0"),
    "vllm": Tried("0.32.0", "0.32.0"),
    "xgrammar": Tried("0.2.8", "0.2.9"),
}
"""Tried versions, by the name under which pip installs the package."""


def installed_version(package: str) -> str | None:
    """Return the version of an installed package; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def compared(package: str, version: str) -> str | None:
    """Return `"newer than tried"` or `"older than tried"` for a version outside the tried ones, else None."""
    tried = TRIED.get(package)
    if tried is None:
        return None
    found = Version(Version(version).public)  # 2.13.0+cpu is 2.13.0
    if found > Version(tried.newest):
        return "newer than tried"
    return "older than tried" if found < Version(tried.oldest) else None

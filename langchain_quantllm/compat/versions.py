"""Versions of other packages that this one was tried with. docs/compatibility.md has the same table, with the reasons.

Owns the table and the comparison with what is installed. Imports none of the packages.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata

from packaging.version import Version


@dataclass(frozen=True)
class Tried:
    """The oldest and the newest version of a package that all tests for such versions passed with."""

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
    "torch": Tried("2.8.0", "2.15.0"),
    "transformers": Tried("5.14.0", "5.24.0"),
    "xgrammar": Tried("0.2.8", "0.2.9"),
}
"""By the names under which they are installed."""


def installed_version(package: str) -> str | None:
    """Version of an installed package; None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def compared(package: str, version: str) -> str | None:
    """How a version lies outside those tried: `"newer than tried"` or `"older than tried"`; None where it does not."""
    tried = TRIED.get(package)
    if tried is None:
        return None
    found = Version(Version(version).public)  # 2.13.0+cpu is 2.13.0
    if found > Version(tried.newest):
        return "newer than tried"
    return "older than tried" if found < Version(tried.oldest) else None

"""The versions that were tried, and the comparison with what is installed."""

from __future__ import annotations

from importlib import metadata

from langchain_quantllm.compat.versions import TRIED, compared, installed_version


def test_newer_and_older_versions_are_told() -> None:
    newest = TRIED["transformers"].newest
    assert compared("transformers", newest) is None
    assert compared("torch", f"{TRIED['torch'].newest}+cpu") is None
    assert compared("transformers", "999.0") == "newer than tried"
    assert compared("transformers", "0.1") == "older than tried"
    assert compared("rich", "999.0") is None


def test_versions_are_those_of_the_installed_packages() -> None:
    assert installed_version("no-such-package") is None
    assert installed_version("torch") == metadata.version("torch")

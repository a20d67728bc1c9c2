"""What is used of peft, looked for in peft itself."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

import pytest

from langchain_quantllm.compat.peft import SMALLEST_VERSION, check_peft
from langchain_quantllm.errors import MissingPackageError

pytest.importorskip("peft")


def test_what_is_installed_will_do() -> None:
    check_peft()


def test_another_packages_smallest_version_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations import peft as integration

    monkeypatch.setattr(integration, "MIN_PEFT_VERSION", "99.0.0", raising=False)
    check_peft()


@pytest.mark.parametrize(("version", "is_new_enough"), [("0.19.9", False), ("0.20.0.dev0", True), ("1.0", True)])
def test_the_smallest_version_is_our_own(monkeypatch: pytest.MonkeyPatch, version: str, is_new_enough: bool) -> None:
    monkeypatch.setattr(metadata, "version", lambda _: version)
    if is_new_enough:
        check_peft()
        return
    with pytest.raises(MissingPackageError, match=rf"peft 0\.20 or newer, and {version} is installed: .*pip install"):
        check_peft()


def test_it_is_the_one_of_the_extra() -> None:
    project = (Path(__file__).parents[3] / "pyproject.toml").read_text(encoding="utf-8")
    assert set(re.findall(r'"peft>=([\d.]+)', project)) == {SMALLEST_VERSION}

"""Checkpoints that the tests of loading share."""

from __future__ import annotations

import importlib.machinery
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from langchain_quantllm.loading import registry
from tests.support.checkpoints import make_checkpoint, quicken, spoil_weights


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama, not to be changed."""
    quicken()
    return make_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def fresh(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint, which no other test has loaded: pytest keeps the frames of failed tests."""
    return Path(shutil.copytree(tiny, tmp_path / "fresh"))


@pytest.fixture
def unreadable(fresh: Path) -> Path:
    """A checkpoint with garbage for weights."""
    return spoil_weights(fresh)


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The model ids that the registry has loaded, in order."""
    noted: list[str] = []
    load = registry.load

    def noting(spec: Any, *found: Any) -> Any:
        noted.append(spec.model_id)
        return load(spec, *found)

    monkeypatch.setattr(registry, "load", noting)
    return noted


@pytest.fixture
def hide_packages(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that makes packages look as if they were not installed."""

    def hide(*packages: str) -> None:
        class Hiding:
            def __init__(self, finder: Any) -> None:
                self.finder = finder

            def find_spec(self, name: str, *args: Any, **kwargs: Any) -> importlib.machinery.ModuleSpec | None:
                return None if name.partition(".")[0] in packages else self.finder.find_spec(name, *args, **kwargs)

            def find_distributions(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
                return getattr(self.finder, "find_distributions", lambda *a, **k: iter(()))(*args, **kwargs)

            def invalidate_caches(self) -> None:
                pass

        monkeypatch.setattr(sys, "meta_path", [Hiding(finder) for finder in sys.meta_path])
        for name in [n for n in sys.modules if n.partition(".")[0] in packages]:
            monkeypatch.delitem(sys.modules, name)

    return hide

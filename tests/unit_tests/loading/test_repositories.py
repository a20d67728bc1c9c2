"""Repositories on the Hub and in its cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from langchain_quantllm.errors import ModelNotFoundError, QuantLLMError
from tests.support.checkpoints import FakeHub, make_cached, make_checkpoint
from tests.support.loading import PROMPT, make_llm


def test_cached_repository_loads_without_a_request(tiny: Path, tmp_path: Path) -> None:
    make_cached(tmp_path, tiny, "acme/tiny")
    expected = make_llm(tiny).invoke(PROMPT)
    for local_files_only in (None, True):  # sockets are off in these tests: a request would be an error
        llm = make_llm("acme/tiny", cache_dir=str(tmp_path), local_files_only=local_files_only)
        assert llm.invoke(PROMPT) == expected
        llm.unload()
    llm = make_llm("acme/tiny", cache_dir=tmp_path, quantization="nf4")
    assert llm.invoke(PROMPT) == make_llm(tiny, quantization="nf4").invoke(PROMPT)


def test_cached_revisions_are_told_apart(tiny: Path, tmp_path: Path) -> None:
    other = make_checkpoint(tmp_path / "other", seed=1)
    cache = tmp_path / "cache"
    make_cached(cache, tiny, "acme/tiny", commit="a" * 40)
    make_cached(cache, other, "acme/tiny", commit="b" * 40, ref="v2")
    by_revision = {
        revision: make_llm("acme/tiny", cache_dir=str(cache), revision=revision).invoke(PROMPT)
        for revision in (None, "main", "v2", "a" * 40, "b" * 40)
    }
    one, two = make_llm(tiny).invoke(PROMPT), make_llm(other).invoke(PROMPT)
    assert one != two
    assert by_revision == {None: one, "main": one, "v2": two, "a" * 40: one, "b" * 40: two}
    with pytest.raises(ModelNotFoundError):
        make_llm("acme/tiny", cache_dir=str(cache), revision="v3", local_files_only=True).load()


def test_cached_pickles_load_without_a_request(tiny: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folder = make_checkpoint(tmp_path / "pickled")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    make_cached(tmp_path / "cache", folder, "acme/pickled")
    llm = make_llm("acme/pickled", cache_dir=str(tmp_path / "cache"), use_safetensors=False)
    assert llm.invoke(PROMPT) == make_llm(tiny).invoke(PROMPT)


def test_incomplete_cache_is_not_taken_for_a_copy(tiny: Path, tmp_path: Path) -> None:
    partial = tmp_path / "partial"
    partial.mkdir()
    (partial / "config.json").write_bytes((tiny / "config.json").read_bytes())
    make_cached(tmp_path / "cache", partial, "acme/tiny")
    with pytest.raises(QuantLLMError, match="acme/tiny") as caught:
        make_llm("acme/tiny", cache_dir=str(tmp_path / "cache"), local_files_only=True).load()
    assert "\n" not in str(caught.value)


@pytest.fixture
def hub(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    with FakeHub({"acme/tiny": tiny, "acme/gated": tiny}, gated=("acme/gated",)) as server:
        FakeHub.point_to(server.url, monkeypatch)
        yield server


@pytest.mark.enable_socket
def test_repository_is_fetched_once(tiny: Path, hub: FakeHub, tmp_path: Path) -> None:
    llm = make_llm("acme/tiny", cache_dir=str(tmp_path), revision="v2")
    assert llm.invoke(PROMPT) == make_llm(tiny).invoke(PROMPT)
    assert "GET /acme/tiny/resolve/v2/model.safetensors" in [a.replace(hub.commit, "v2") for a in hub.asked]
    assert (tmp_path / "models--acme--tiny" / "snapshots" / hub.commit / "model.safetensors").exists()
    llm.unload()
    hub.asked.clear()
    assert llm.invoke(PROMPT)
    assert hub.asked == []  # all of it is here now
    fresh = make_llm("acme/tiny", cache_dir=str(tmp_path), revision="v2", local_files_only=False)
    assert fresh.load().is_loaded
    fresh.unload()


@pytest.mark.enable_socket
def test_local_files_only_false_asks_the_hub(hub: FakeHub, tiny: Path, tmp_path: Path) -> None:
    make_cached(tmp_path, tiny, "acme/tiny", commit=hub.commit)
    make_llm("acme/tiny", cache_dir=str(tmp_path)).load()
    assert hub.asked == []
    make_llm("acme/tiny", cache_dir=str(tmp_path), local_files_only=False, revision="main").load()
    assert hub.asked


@pytest.mark.enable_socket
def test_the_token_opens_a_gated_repository(tiny: Path, hub: FakeHub, tmp_path: Path) -> None:
    llm = make_llm("acme/gated", cache_dir=str(tmp_path), token=hub.TOKEN)
    assert llm.invoke(PROMPT) == make_llm(tiny).invoke(PROMPT)
    assert hub.tokens <= {f"Bearer {hub.TOKEN}", None}
    assert f"Bearer {hub.TOKEN}" in hub.tokens

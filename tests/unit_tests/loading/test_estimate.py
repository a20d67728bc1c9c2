"""`estimate_memory` finds a config as loading does, and reports the same errors."""

from __future__ import annotations

from pathlib import Path

import pytest

import langchain_quantllm
from langchain_quantllm import estimate_memory, memory
from langchain_quantllm.errors import CheckpointError, ModelNotFoundError, UnsupportedError
from tests.support.checkpoints import FakeHub, edit_json, make_cached, make_checkpoint


def test_it_is_importable_from_the_package_and_from_memory() -> None:
    assert langchain_quantllm.estimate_memory is memory.estimate_memory is estimate_memory
    with pytest.raises(AttributeError, match="no attribute 'estimate_nothing'"):
        _ = memory.estimate_nothing


def test_a_cached_repository_is_estimated_like_its_folder(tiny: Path, tmp_path: Path) -> None:
    make_cached(tmp_path, tiny, "acme/tiny")
    found = estimate_memory("acme/tiny", "nf4", cache_dir=str(tmp_path), local_files_only=True)
    assert found.model_id == "acme/tiny"
    assert found.weights == estimate_memory(str(tiny), "nf4").weights


def test_local_files_only_forbids_asking_the_hub(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"the Hub may not be asked \(local_files_only=True\)"):
        estimate_memory("acme/tiny", cache_dir=str(tmp_path), local_files_only=True)


@pytest.mark.enable_socket
def test_only_the_config_of_a_repository_is_downloaded(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FakeHub({"acme/tiny": tiny, "acme/gated": tiny}, gated=("acme/gated",)) as hub:
        FakeHub.point_to(hub.url, monkeypatch)
        assert estimate_memory("acme/tiny", cache_dir=str(tmp_path)).weights == estimate_memory(str(tiny)).weights
        assert {asked.rpartition("/")[2] for asked in hub.asked} == {"config.json"}
        assert estimate_memory("acme/gated", cache_dir=str(tmp_path), token=hub.TOKEN).parameters > 0
        with pytest.raises(ModelNotFoundError, match="acme/nothing is neither a folder here nor a repository"):
            estimate_memory("acme/nothing", cache_dir=str(tmp_path))


@pytest.mark.parametrize(
    ("model_type", "error", "words"),
    [
        ("of_tomorrow", UnsupportedError, "does not know the architecture 'of_tomorrow'"),
        ("vit", UnsupportedError, "'vit'"),
    ],
)
def test_unknown_models_are_named(tmp_path: Path, model_type: str, error: type[Exception], words: str) -> None:
    edit_json(make_checkpoint(tmp_path) / "config.json", model_type=model_type)
    with pytest.raises(error, match=words):
        estimate_memory(str(tmp_path))


def test_a_damaged_config_is_an_error_of_the_checkpoint(tmp_path: Path) -> None:
    (make_checkpoint(tmp_path) / "config.json").write_text('{"model_type": ')
    with pytest.raises(CheckpointError, match="the config of .* cannot be read"):
        estimate_memory(str(tmp_path))

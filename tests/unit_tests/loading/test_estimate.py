"""`estimate_memory` finds a config as loading does, and reports the same errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import langchain_quantllm
from langchain_quantllm import estimate_memory, memory
from langchain_quantllm.errors import CheckpointError, ModelNotFoundError, UnsupportedError
from tests.support.checkpoints import FakeHub, edit_json, make_cached, make_checkpoint
from tests.support.loading import load


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


class TestNoDtype:
    """A config that names no dtype: loading takes that of the files, and so does the estimate."""

    @staticmethod
    def make(folder: Path, first: str, others: str, *, shards: bool, in_index: str | None = None) -> Path:
        """Write a checkpoint whose first tensor has another dtype than the others, and none in its config."""
        from safetensors.torch import load_file, save_file

        make_checkpoint(folder, dtype="float32")
        tensors = load_file(folder / "model.safetensors")
        names = sorted(tensors)
        cast = {n: tensors[n].to(getattr(torch, first if n == names[0] else others)) for n in names}
        if shards:
            (folder / "model.safetensors").unlink()
            parts = {"model-00002-of-00002": names[:5], "model-00001-of-00002": names[5:]}
            for part, own in parts.items():
                save_file({n: cast[n] for n in own}, folder / f"{part}.safetensors", metadata={"format": "pt"})
            weight_map = {n: f"{part}.safetensors" for part, own in parts.items() for n in own}
            metadata = {} if in_index is None else {"dtype": in_index}
            index = {"metadata": metadata, "weight_map": weight_map}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        else:
            save_file(cast, folder / "model.safetensors", metadata={"format": "pt"})
        edit_json(folder / "config.json", dtype=None)
        return folder

    @pytest.mark.parametrize("shards", [False, True])
    @pytest.mark.parametrize(
        ("first", "others"),
        [
            ("bfloat16", "bfloat16"),
            ("float16", "float16"),
            ("float32", "bfloat16"),
            ("bfloat16", "float32"),
            ("float16", "float32"),
        ],
    )
    def test_the_estimate_is_what_is_loaded(self, tmp_path: Path, first: str, others: str, shards: bool) -> None:
        folder = self.make(tmp_path, first, others, shards=shards)
        for scheme in ("none", "nf4"):
            llm = load(folder, quantization=scheme)
            estimate = estimate_memory(str(folder), scheme)
            assert estimate.dtype == str(llm.pipeline.model.dtype).removeprefix("torch.")
            assert estimate.weights == llm.memory_report().weights
            llm.unload()

    def test_an_index_that_names_one(self, tmp_path: Path) -> None:
        folder = self.make(tmp_path, "float32", "float32", shards=True, in_index="bfloat16")
        llm = load(folder)
        assert estimate_memory(str(folder)).weights == llm.memory_report().weights
        assert llm.pipeline.model.dtype == torch.bfloat16
        llm.unload()

    def test_the_check_of_memory_counts_it(self, tmp_path: Path) -> None:
        folder = self.make(tmp_path, "bfloat16", "bfloat16", shards=False)
        most = estimate_memory(str(folder)).total_bytes * 3 // 2
        llm = load(folder, device_map="auto", max_memory={"cpu": most})
        assert llm.is_loaded
        llm.unload()

    def test_what_was_asked_for_goes_before(self, tmp_path: Path) -> None:
        folder = self.make(tmp_path, "bfloat16", "bfloat16", shards=False)
        assert estimate_memory(str(folder), dtype="float32").dtype == "float32"
        llm = load(folder, dtype="float32")
        assert estimate_memory(str(folder), dtype="float32").weights == llm.memory_report().weights
        llm.unload()

    def test_quantize_keeps_it(self, tmp_path: Path) -> None:
        from langchain_quantllm import GPTQ, quantize

        folder = self.make(tmp_path / "plain", "bfloat16", "bfloat16", shards=False)
        done = quantize(folder, GPTQ(bits=4, group_size=32), "none", output=tmp_path / "gptq", progress=False)
        assert json.loads((done.folder / "config.json").read_text())["dtype"] == "bfloat16"

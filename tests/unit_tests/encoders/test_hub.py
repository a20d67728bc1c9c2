"""Encoders from the Hub: only files that are needed, once, and no request where all are here."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from langchain_quantllm import QuantizedHuggingFaceEmbeddings
from langchain_quantllm.errors import ModelNotFoundError
from tests.support.checkpoints import FakeHub
from tests.support.encoder_models import tiny_embedder

pytestmark = pytest.mark.enable_socket


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    folder = tiny_embedder(tmp_path / "model", dense=16)
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.onnx").write_bytes(b"x")
    gated = tmp_path / "gated"
    shutil.copytree(folder, gated)
    with FakeHub({"some/embedder": folder, "some/gated": gated}, gated=("some/gated",)) as hub:
        FakeHub.point_to(hub.url, monkeypatch)
        yield hub


def make(tmp_path: Path, model_id: str = "some/embedder", **fields: Any) -> QuantizedHuggingFaceEmbeddings:
    options = {"cache_dir": str(tmp_path / "cache"), "device": "cpu", "progress": False}
    return QuantizedHuggingFaceEmbeddings(model_id=model_id, **{**options, **fields})


def test_the_needed_files_are_fetched_once_and_then_nothing_is_asked(hub: FakeHub, tmp_path: Path) -> None:
    source = make(tmp_path)
    vector = source.embed_query("abc")
    assert vector == make(tmp_path, str(tmp_path / "model")).embed_query("abc")
    assert any("model.safetensors" in request for request in hub.asked)
    assert not any(name in request for request in hub.asked for name in ("pytorch_model.bin", "onnx"))
    source.unload()
    hub.asked.clear()
    for fields in ({}, {"local_files_only": True}, {"quantization": "nf4"}):
        assert len(make(tmp_path, **fields).embed_query("abc")) == 16
    assert hub.asked == []


def test_what_the_hub_does_not_give_is_named(hub: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="nor a repository on the Hub"):
        make(tmp_path, "some/other").load()
    with pytest.raises(ModelNotFoundError, match="gated"):
        make(tmp_path, "some/gated").load()
    with pytest.raises(ModelNotFoundError, match="local_files_only"):
        make(tmp_path, local_files_only=True).load()
    with pytest.raises(ModelNotFoundError, match="no revision 'v9'"):
        make(tmp_path, revision="v9").load()
    assert len(make(tmp_path, "some/gated", token=FakeHub.TOKEN).embed_query("abc")) == 16

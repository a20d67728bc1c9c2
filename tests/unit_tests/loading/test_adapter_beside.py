"""Files of an adapter in a model's folder: a model is loaded without it, a folder without a model refused."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from langchain_quantllm import GPTQ, QuantizedHuggingFaceLLM, estimate_memory, merge_adapter, quantize
from langchain_quantllm.errors import ModelNotFoundError
from tests.support.adapters import PROMPT, Reference, make_adapter
from tests.support.checkpoints import FakeHub, edit_json, make_checkpoint, quicken

pytest.importorskip("peft")

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    quicken()
    folder = tmp_path_factory.mktemp("beside")
    base = make_checkpoint(folder / "tiny", dtype="float32")
    make_adapter(base, folder / "lora", seed=1)
    shutil.copytree(base, folder / "both")
    for name in ADAPTER_FILES:
        shutil.copy(folder / "lora" / name, folder / "both")
    return folder


def llm(model_id: Path | str, **fields: Any) -> QuantizedHuggingFaceLLM:
    return QuantizedHuggingFaceLLM(model_id=str(model_id), max_new_tokens=8, progress=False, dtype="float32", **fields)


def warnings_of(caplog: pytest.LogCaptureFixture, folder: Path | str) -> list[str]:
    return [r.getMessage() for r in caplog.records if str(folder) in r.getMessage() and "adapter" in r.getMessage()]


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_a_whole_model_is_loaded_without_it(root: Path, caplog: pytest.LogCaptureFixture, quantization: Any) -> None:
    plain, both = (llm(root / name, quantization=quantization) for name in ("tiny", "both"))
    with caplog.at_level(logging.WARNING):
        assert both.invoke(PROMPT) == plain.invoke(PROMPT)
    [said] = warnings_of(caplog, root / "both")
    assert "is not applied" in said
    assert f"adapter={str(root / 'both')!r}" in said
    assert both.adapters == {}
    assert not hasattr(both.pipeline.model, "peft_config")
    assert both.memory_report().weights == plain.memory_report().weights
    for one in (plain, both):
        one.unload()


def test_asked_for_it_is_applied(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        both = llm(root / "both", adapter=str(root / "both"))
        assert both.invoke(PROMPT) == Reference(root / "tiny").text(root / "lora", PROMPT, 8)
    assert warnings_of(caplog, root / "both") == []
    both.unload()


def test_the_base_that_it_names_is_not_followed(root: Path, tmp_path: Path) -> None:
    other = make_checkpoint(tmp_path / "other", seed=7, dtype="float32")
    folder = Path(shutil.copytree(root / "both", tmp_path / "both"))
    for base in (str(other), "/no/where", ["a", 1], None):
        content = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**content, "base_model_name_or_path": base}))
        one = llm(folder)
        assert one.invoke(PROMPT) == Reference(root / "tiny").text(None, PROMPT, 8)
        one.unload()


@pytest.mark.parametrize("content", ["{", "[]", "\0", '{"auto_map": {"AutoModel": "code.Evil"}}'])
def test_whatever_is_in_its_config(root: Path, tmp_path: Path, content: str) -> None:
    folder = Path(shutil.copytree(root / "both", tmp_path / "both"))
    (folder / "adapter_config.json").write_text(content)
    one = llm(folder)
    assert one.invoke(PROMPT) == Reference(root / "tiny").text(None, PROMPT, 8)
    one.unload()


def test_quantize(root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for scheme, calibration in (("nf4", None), (GPTQ(bits=4, group_size=32), "none")):
        tensors = []
        for name in ("tiny", "both"):
            caplog.clear()
            with caplog.at_level(logging.WARNING):
                done = quantize(
                    root / name, scheme, calibration, output=tmp_path / name, overwrite=True, progress=False
                )
            assert len(warnings_of(caplog, root / "both")) == (name == "both")
            tensors.append(load_file(done.folder / "model.safetensors"))
            assert not any((done.folder / file).exists() for file in ADAPTER_FILES)
        assert tensors[0].keys() == tensors[1].keys()
        assert all(torch.equal(tensors[1][key], tensor) for key, tensor in tensors[0].items())


def test_merge(root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        merged = merge_adapter(str(root / "both"), str(root / "lora"), tmp_path / "merged", progress=False)
    assert len(warnings_of(caplog, root / "both")) == 1
    assert Reference(merged).text(None, PROMPT, 8) == Reference(root / "tiny").text(root / "lora", PROMPT, 8)


def test_estimate(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert estimate_memory(str(root / "both")).weights == estimate_memory(str(root / "tiny")).weights
    assert len(warnings_of(caplog, root / "both")) == 1


@pytest.mark.enable_socket
def test_on_the_hub(root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: Any) -> None:
    edit_json(root / "both" / "adapter_config.json", base_model_name_or_path="acme/strange")
    with FakeHub({"acme/both": root / "both"}) as hub, caplog.at_level(logging.WARNING):
        FakeHub.point_to(hub.url, monkeypatch)
        one = llm("acme/both", cache_dir=str(tmp_path))
        assert one.invoke(PROMPT) == Reference(root / "tiny").text(None, PROMPT, 8)
        assert not [path for path in hub.asked if "strange" in path or "adapter_model" in path]
    assert len(warnings_of(caplog, "acme/both")) == 1
    one.unload()


TRAINER_FILES = ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth")

ACTIONS: dict[str, Callable[[Path, Path, Path], Any]] = {
    "load": lambda folder, _, __: llm(folder).load(),
    "quantize": lambda folder, _, output: quantize(folder, "nf4", output=output, progress=False),
    "merge": lambda folder, lora, output: merge_adapter(str(folder), str(lora), output, progress=False),
    "estimate": lambda folder, _, __: estimate_memory(str(folder)),
}


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("has_config", [False, True])
def test_an_adapter_is_no_model(root: Path, tmp_path: Path, action: str, has_config: bool) -> None:
    folder = Path(shutil.copytree(root / "lora", tmp_path / "lora"))
    for name in (*TRAINER_FILES, "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text("{}")
    if has_config:
        shutil.copy(root / "tiny" / "config.json", folder)
    with pytest.raises(ModelNotFoundError) as caught:
        ACTIONS[action](folder, root / "lora", tmp_path / "output")
    assert "holds an adapter, not a model" in str(caught.value)
    assert f"model_id={str(root / 'tiny')!r}, adapter={str(folder)!r}" in str(caught.value)
    assert not (tmp_path / "output").exists()

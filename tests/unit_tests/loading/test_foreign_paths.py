"""Files of strangers: nothing is unpickled, no code runs, no file outside the checkpoint is read."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from langchain_quantllm import QuantizedHuggingFaceLLM, estimate_memory, merge_adapter, quantize
from langchain_quantllm.errors import CheckpointError
from tests.support.adapters import make_adapter
from tests.support.checkpoints import edit_json, make_checkpoint, quicken

pytest.importorskip("peft")

INDEX = "model.safetensors.index.json"


class Evil:
    """A pickle that makes a file when it is read."""

    def __init__(self, trap: Path) -> None:
        self.trap = trap

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.trap),)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    quicken()
    folder = tmp_path_factory.mktemp("foreign")
    make_adapter(make_checkpoint(folder / "tiny", dtype="float32"), folder / "adapter", seed=1)
    return folder / "tiny"


@pytest.fixture
def fresh(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "fresh"))


@pytest.fixture
def trap(tmp_path: Path) -> Path:
    """A folder that exists if a pickle or a module was run."""
    return tmp_path / "trap"


def refused(model_id: Path, words: str, **fields: Any) -> str:
    """Check that loading, and quantizing, end in a CheckpointError of one sentence."""
    with pytest.raises(CheckpointError, match=words) as caught:
        QuantizedHuggingFaceLLM(model_id=str(model_id), progress=False, **fields).load()
    if not fields:
        with pytest.raises(CheckpointError, match=words):
            quantize(model_id, "nf4", output=model_id.parent / "output", progress=False)
        assert not (model_id.parent / "output").exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


class TestPickles:
    @pytest.mark.parametrize(
        "file",
        ["pytorch_model.bin", "model-1.bin", "model-1.pt", "weights/model-1.pth", "adapter_model.bin"],
    )
    def test_weights(self, fresh: Path, trap: Path, file: str) -> None:
        tensors = load_file(fresh / "model.safetensors")
        (fresh / "model.safetensors").unlink()
        (fresh / file).parent.mkdir(exist_ok=True)
        torch.save({**tensors, "evil": Evil(trap)}, fresh / file)
        if file == "adapter_model.bin":
            edit_json(fresh / "config.json", transformers_weights=file)
        elif file != "pytorch_model.bin":
            (fresh / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, file)}))
        assert "use_safetensors=False" in refused(fresh, "pickle")
        if file != "adapter_model.bin":
            with pytest.raises(CheckpointError, match="pickle"):
                estimate_memory(str(fresh))
        assert not trap.exists()

    def test_one_shard_among_good_ones(self, fresh: Path, trap: Path) -> None:
        names = sorted(load_file(fresh / "model.safetensors"))
        (fresh / "model.safetensors").rename(fresh / "good.safetensors")
        torch.save(Evil(trap), fresh / "bad.bin")
        weight_map = {**dict.fromkeys(names, "good.safetensors"), names[0]: "bad.bin"}
        (fresh / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        refused(fresh, r"bad\.bin")
        assert not trap.exists()

    @pytest.mark.parametrize("file", ["adapter_model.bin", "adapter_model.safetensors"])
    def test_an_adapter(self, tiny: Path, tmp_path: Path, trap: Path, file: str) -> None:
        """Also one under a name that promises safetensors."""
        adapter = Path(shutil.copytree(tiny.with_name("adapter"), tmp_path / "adapter"))
        (adapter / "adapter_model.safetensors").unlink()
        torch.save(Evil(trap), adapter / file)
        refused(tiny, "pickle|damaged", adapters={"mine": str(adapter)})
        with pytest.raises(CheckpointError, match="pickle|damaged"):
            merge_adapter(str(tiny), str(adapter), tmp_path / "merged", progress=False)
        assert not trap.exists()

    def test_even_if_allowed_only_tensors_are_read(self, fresh: Path, trap: Path) -> None:
        (fresh / "model.safetensors").unlink()
        torch.save(Evil(trap), fresh / "pytorch_model.bin")
        refused(fresh, "cannot be loaded", use_safetensors=False)
        assert not trap.exists()


class TestPaths:
    @pytest.mark.parametrize(
        "name", ["../other.safetensors", "a/../../other.safetensors", "{outside}", "..\\o.safetensors"]
    )
    def test_an_index_that_leads_outside(self, fresh: Path, tmp_path: Path, name: str) -> None:
        outside = tmp_path / "other.safetensors"
        name = name.format(outside=outside)
        names = sorted(load_file(fresh / "model.safetensors"))
        (fresh / "model.safetensors").rename(outside)
        (fresh / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, name)}))
        refused(fresh, "outside the checkpoint")
        with pytest.raises(CheckpointError, match="outside the checkpoint"):
            estimate_memory(str(fresh))

    def test_a_config_that_leads_outside(self, fresh: Path, tmp_path: Path) -> None:
        (fresh / "model.safetensors").rename(tmp_path / "other.safetensors")
        edit_json(fresh / "config.json", transformers_weights="../other.safetensors")
        refused(fresh, "outside the checkpoint")

    @pytest.mark.parametrize(
        "content",
        [
            {"tokenizer_file": "{outside}"},
            {"vocab_file": "../tokenizer.json"},
            {"fast_tokenizer_files": ["tokenizer.json", "../tokenizer.9.9.json"]},
        ],
        ids=lambda content: next(iter(content)),
    )
    def test_a_tokenizer_that_leads_outside(self, fresh: Path, tmp_path: Path, content: dict[str, Any]) -> None:
        outside = tmp_path / "tokenizer.json"
        shutil.copy(fresh / "tokenizer.json", outside)
        made = json.loads(json.dumps(content).replace("{outside}", str(outside)))
        edit_json(fresh / "tokenizer_config.json", **made)
        refused(fresh, "outside the checkpoint")

    def test_paths_of_the_makers_machine_are_no_fault(self, fresh: Path) -> None:
        edit_json(
            fresh / "tokenizer_config.json", special_tokens_map_file="/home/maker/map.json", name_or_path="/home/m"
        )
        assert QuantizedHuggingFaceLLM(model_id=str(fresh), progress=False).load().is_loaded

    def test_links_of_the_hubs_cache(self, fresh: Path, tmp_path: Path) -> None:
        blobs = tmp_path / "blobs"
        blobs.mkdir()
        for file in list(fresh.iterdir()):
            file.rename(blobs / file.name)
            file.symlink_to(blobs / file.name)
        assert QuantizedHuggingFaceLLM(model_id=str(fresh), progress=False).load().is_loaded


class TestCode:
    @pytest.fixture
    def code(self, fresh: Path, trap: Path) -> Path:
        """A checkpoint with a module beside it that makes the trap when it is imported."""
        (fresh / "code.py").write_text(f"import os\nos.mkdir({str(trap)!r})\n")
        return fresh

    @pytest.mark.parametrize("model_type", ["llama", "of_tomorrow"])
    def test_of_a_model(self, code: Path, trap: Path, model_type: str) -> None:
        """A known model is loaded with transformers' own code."""
        auto_map = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
        edit_json(code / "config.json", auto_map=auto_map, model_type=model_type)
        if model_type == "llama":
            assert QuantizedHuggingFaceLLM(model_id=str(code), progress=False).load().is_loaded
        else:
            refused(code, "trust_remote_code=True")
        assert not trap.exists()

    def test_of_a_tokenizer(self, code: Path, trap: Path) -> None:
        auto_map = {"AutoTokenizer": ["code.Tokenizer", None]}
        edit_json(code / "tokenizer_config.json", auto_map=auto_map, tokenizer_class="Tokenizer")
        refused(code, "trust_remote_code=True")
        assert not trap.exists()

    @pytest.mark.parametrize("option", ["attn_implementation", "_attn_implementation"])
    def test_of_a_kernel(self, fresh: Path, option: str) -> None:
        edit_json(fresh / "config.json", **{option: "evil/kernel:attention"})
        refused(fresh, "'evil/kernel:attention', which is code")

    def test_of_an_adapter(self, tiny: Path, tmp_path: Path, trap: Path) -> None:
        adapter = Path(shutil.copytree(tiny.with_name("adapter"), tmp_path / "adapter"))
        (adapter / "code.py").write_text(f"import os\nos.mkdir({str(trap)!r})\n")
        mapping = {"base_model_class": "Model", "parent_library": "code"}
        edit_json(adapter / "adapter_config.json", auto_mapping=mapping, auto_map={"AutoModel": "code.Model"})
        llm = QuantizedHuggingFaceLLM(model_id=str(tiny), adapters={"mine": str(adapter)}, progress=False)
        assert llm.load().is_loaded
        llm.unload()
        assert not trap.exists()

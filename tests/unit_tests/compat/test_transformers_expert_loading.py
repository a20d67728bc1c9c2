"""transformers' loader with a reader of experts: it passes on each expert's matrices, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from langchain_quantllm.compat.transformers_expert_loading import ExpertReader, missing_loading_api, reading_config
from tests.support.mixtures import EXPERTS, make_mixture


class Recorder(ExpertReader):
    """Keeps what it is given, and leaves zeros in the model."""

    def __init__(self) -> None:
        self.kept: Callable[[str], bool] = lambda name: False
        self.single: dict[str, list[list[dict[str, torch.Tensor]]]] = {}
        self.whole: dict[str, torch.Tensor] = {}
        self.finished = 0

    def start(self, model: Any, is_kept: Callable[[str], bool]) -> None:
        self.kept = is_kept

    def takes(self, name: str) -> bool:
        return name.endswith(("experts.gate_up_proj", "experts.down_proj"))

    def element_bytes(self, name: str) -> float:
        return 0.5

    def read(self, model: Any, name: str, experts: Sequence[Sequence[Mapping[str, Any]]]) -> None:
        self.single[name] = [[{n: read() for n, read in part.items()} for part in parts] for parts in experts]
        self._fill(model, name)

    def take(self, model: Any, name: str, values: torch.Tensor) -> None:
        self.whole[name] = values
        self._fill(model, name)

    def _fill(self, model: Any, name: str) -> None:
        path, _, own = name.rpartition(".")
        experts = model.get_submodule(path)
        setattr(experts, own, torch.nn.Parameter(torch.zeros(getattr(experts, own).shape)))
        getattr(experts, own)._is_hf_initialized = True

    def finish(self, model: Any) -> None:
        self.finished += 1

    def state_dict(self, model: Any, sources: Mapping[str, Sequence[str]]) -> dict[str, torch.Tensor] | None:
        return None


def load(kind: str, folder: Path, reader: Recorder) -> tuple[Any, Any]:
    make_mixture(kind).save_pretrained(folder)
    config = reading_config(BitsAndBytesConfig(load_in_4bit=True), reader)
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, device_map={"": "cpu"}, output_loading_info=True
    )
    return model, info


def test_all_is_there() -> None:
    assert missing_loading_api() is None


def test_single_matrices_are_passed_on_in_their_order(tmp_path: Path) -> None:
    reader = Recorder()
    _, info = load("qwen3_moe", tmp_path, reader)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not reader.whole
    assert reader.finished == 1
    assert len(reader.single) == 4
    stored = load_file(tmp_path / "model.safetensors")
    for name, experts in reader.single.items():
        parent, _, own = name.rpartition(".")
        parts = ["gate_proj", "up_proj"] if own == "gate_up_proj" else ["down_proj"]
        assert [len(found) for found in experts] == [len(parts)] * EXPERTS
        for expert, found in enumerate(experts):
            for part, tensors in zip(parts, found, strict=True):
                assert list(tensors) == ["weight"]
                assert torch.equal(tensors["weight"], stored[f"{parent}.{expert}.{part}.weight"])


def test_parameters_of_all_experts_are_passed_on_whole(tmp_path: Path) -> None:
    reader = Recorder()
    _, info = load("gpt_oss", tmp_path, reader)
    assert not info["missing_keys"]
    assert not reader.single
    stored = load_file(tmp_path / "model.safetensors")
    assert len(reader.whole) == 4
    for name, values in reader.whole.items():
        assert torch.equal(values, stored[name])


def test_names_are_kept_by_the_rules_for_layers_and_sizes_are_the_readers(tmp_path: Path) -> None:
    reader = Recorder()
    model, _ = load("mixtral", tmp_path, reader)
    name = "model.layers.0.mlp.experts.down_proj"
    assert model.hf_quantizer.param_element_size(model, name, model.get_parameter(name)) == reader.element_bytes(name)
    assert reader.kept("lm_head")
    assert not reader.kept("model.layers.0.mlp.experts")


@pytest.mark.parametrize("method", ["bitsandbytes_4bit", "bitsandbytes_8bit"])
def test_quantizers_of_transformers_stay_its_own(tmp_path: Path, method: str) -> None:
    load("mixtral", tmp_path, Recorder())
    assert AUTO_QUANTIZER_MAPPING[method].__module__.startswith("transformers.")

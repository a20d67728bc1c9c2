"""transformers' loader of AWQ with GPTQModel's layers of GPTQ, checked on both."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from langchain_quantllm.compat.gptqmodel_awq import AWQLayers, awq_reading_config
from langchain_quantllm.compat.gptqmodel_import import gptqmodel_imported
from tests.support.awq_checkpoints import make_awq_checkpoint
from tests.support.checkpoints import make_checkpoint

if importlib.util.find_spec("gptqmodel") is None:
    pytest.skip("gptqmodel is not installed", allow_module_level=True)


def test_tensors_arrive_as_they_are_stored_and_are_repacked_in_their_layer(tmp_path: Path) -> None:
    """The layer is that of GPTQ from the start; one without a kernel is transformers' own; the config is AWQ's."""
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM, AwqConfig
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
    from transformers.quantizers.quantizer_awq import AwqQuantizer

    make_awq_checkpoint(make_checkpoint(tmp_path))
    tensors = load_file(tmp_path / "model.safetensors")
    seen: list[Mapping[str, torch.Tensor]] = []

    def repack(layer: Mapping[str, torch.Tensor], group_size: int) -> dict[str, torch.Tensor]:
        assert group_size == 32
        seen.append(dict(layer))
        inputs, words = layer["qweight"].shape
        return {
            "qweight": torch.zeros(inputs // 8, words * 8, dtype=torch.int32),
            "qzeros": layer["qzeros"],
            "scales": layer["scales"],
            "g_idx": torch.arange(inputs, dtype=torch.int32) // group_size,
        }

    def choose(inputs: int, outputs: int) -> str | None:
        return None if (inputs, outputs) == (128, 64) else "gptq_torch"

    config: Any = AutoConfig.from_pretrained(tmp_path)
    layers = AWQLayers(choose_kernel=choose, repack=repack, restore=dict, scaled_activations=False)
    config.quantization_config = awq_reading_config(config.quantization_config, layers)
    with gptqmodel_imported():
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path, config=config, device_map="cpu", dtype=torch.float16, output_loading_info=True
        )
    model, info = model
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(model.config.quantization_config) is AwqConfig
    assert len(seen) == 12
    first = model.model.layers[0]
    assert type(first.self_attn.q_proj).__name__ == "TorchLinear"
    assert first.self_attn.q_proj.qzero_format() == 2
    assert "Awq" in type(first.mlp.down_proj).__name__
    stored = next(layer for layer in seen if layer["qweight"].data_ptr())
    name = next(key for key, tensor in tensors.items() if torch.equal(tensor, stored["qweight"]))
    for key in ("qzeros", "scales"):
        assert torch.equal(stored[key], tensors[name.replace("qweight", key)])
    assert AUTO_QUANTIZER_MAPPING["awq"] is AwqQuantizer
    assert AUTO_QUANTIZATION_CONFIG_MAPPING["awq"] is AwqConfig

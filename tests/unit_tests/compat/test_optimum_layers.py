"""optimum's quantizer: transformers takes ours in its place, and each layer is made with its own settings."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from langchain_quantllm.compat.gptqmodel_import import gptqmodel_imported
from langchain_quantllm.compat.optimum_layers import layers_by_rules
from tests.support import families
from tests.support.selection import skip_without_gptqmodel

CONFIG: dict[str, Any] = {
    "bits": 4,
    "group_size": 32,
    "sym": True,
    "desc_act": False,
    "checkpoint_format": "gptq",
    "backend": "gptq_torch",
    "dynamic": {
        "-:.*\\.1\\.mlp": {},
        "+:.*q_proj": {"bits": 8, "group_size": 16, "backend": "gptq_torch_int8"},
    },
}


@pytest.mark.compat
def test_transformers_makes_layers_by_the_rules_inside_the_block_alone() -> None:
    skip_without_gptqmodel()
    model: Any = families.family_model(families.FAST["llama-grouped"]).half()
    with gptqmodel_imported():
        import optimum.gptq
        from transformers import GPTQConfig
        from transformers.quantizers.auto import AutoHfQuantizer

        usual = optimum.gptq.GPTQQuantizer
        with layers_by_rules(CONFIG):
            made: Any = AutoHfQuantizer.from_config(GPTQConfig(**CONFIG), pre_quantized=True)
        assert optimum.gptq.GPTQQuantizer is usual
        assert type(made.optimum_quantizer) is not usual
        made._process_model_before_weight_loading(model, device_map={"": "cpu"})
        with layers_by_rules({**CONFIG, "dynamic": {}}):
            assert optimum.gptq.GPTQQuantizer is usual
    layers = dict(model.named_modules())
    assert type(layers["model.layers.1.mlp.up_proj"]) is torch.nn.Linear
    attention = [layers[f"model.layers.0.self_attn.{name}_proj"] for name in ("q", "k", "v", "o")]
    assert [layer.bits for layer in attention] == [8, 4, 4, 4]
    assert [layer.group_size for layer in attention] == [16, 32, 32, 32]
    assert [type(layer).__name__ for layer in attention[:2]] == ["TorchInt8Linear", "TorchLinear"]

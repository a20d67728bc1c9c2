"""The formats, layers and marks of transformers' quantizers, checked on transformers itself."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn

from langchain_quantllm.compat.transformers_quantizers import (
    BITSANDBYTES_LOGGER,
    dequantizing_gguf,
    float32_patterns,
    forget_quantization,
    knows_format,
    quantization_config_from,
    replaced_by_bitsandbytes,
    was_quantized,
)
from tests.support.models import tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    tiny_model(512).save_pretrained(folder)
    return folder


def load_nf4(folder: Path) -> Any:
    pytest.importorskip("bitsandbytes")
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    return transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu")


class TestFormats:
    @pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "bitsandbytes_4bit", "torchao"])
    def test_known(self, method: str) -> None:
        assert knows_format(method)

    def test_unknown(self) -> None:
        assert not knows_format("of_tomorrow")

    def test_a_config_of_a_dictionary(self) -> None:
        config = quantization_config_from({"quant_method": "bitsandbytes", "load_in_4bit": True})
        assert isinstance(config, transformers.BitsAndBytesConfig)
        assert config.load_in_4bit
        assert isinstance(quantization_config_from({"quant_method": "gptq", "bits": 4}), transformers.GPTQConfig)

    def test_gguf_becomes_plain(self) -> None:
        """Older releases get no option; `test_sources` converts a file."""
        options = dequantizing_gguf()
        if Version(transformers.__version__) < Version("5.17"):
            assert options == {}
        else:
            assert options["quantization_config"].dequantize is True


class TestLayers:
    def test_what_is_replaced(self, folder: Path) -> None:
        model = load_nf4(folder)
        linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        replaced = {name for name, m in model.named_modules() if type(m).__name__ == "Linear4bit"}
        assert 0 < len(replaced) < len(linears)
        assert replaced_by_bitsandbytes(tiny_model(512), linears, None) == replaced

    def test_what_is_left_out_by_name(self) -> None:
        paths = ["model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"]
        assert replaced_by_bitsandbytes(tiny_model(512), paths, ["up_proj"]) == {paths[1]}

    @pytest.mark.parametrize("strict", [False, True])
    def test_float32(self, strict: bool) -> None:
        assert float32_patterns(tiny_model(512), strict=strict) == set()

    def test_a_model_that_keeps_layers_in_float32(self) -> None:
        config = transformers.T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
        with torch.device("meta"):
            assert float32_patterns(transformers.T5ForConditionalGeneration(config), strict=False) == {"wo"}


class TestTraces:
    def test_a_plain_model_has_none(self, folder: Path) -> None:
        assert not was_quantized(transformers.AutoModelForCausalLM.from_pretrained(folder))

    def test_a_dequantized_model_is_saved_as_a_plain_one(self, folder: Path, tmp_path: Path) -> None:
        model = load_nf4(folder)
        assert was_quantized(model)
        model = model.dequantize()
        forget_quantization(model)
        assert not getattr(model, "is_quantized", False)
        model.save_pretrained(tmp_path)
        again, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert not was_quantized(again)
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(again.state_dict()[name], tensor)


def test_what_the_logger_says(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """`quiet_logger` uses its name; messages of other loggers would be shown."""
    transformers.utils.logging.warning_once.cache_clear()  # another test may have heard it
    root = logging.getLogger("transformers")
    root.addHandler(caplog.handler)
    try:
        load_nf4(folder).dequantize()
        assert {record.name for record in caplog.records} == {BITSANDBYTES_LOGGER}
    finally:
        root.removeHandler(caplog.handler)

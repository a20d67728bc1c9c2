"""GPTQModel's kernels and layers, checked on GPTQModel itself."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from langchain_quantllm.compat.gptqmodel import (
    BACKEND_PREFIX,
    backend_names,
    can_train,
    packed_tensors,
    stored_tensors,
    uncompile_gptq_model,
    unsupported_reason,
)
from langchain_quantllm.compat.gptqmodel_import import gptqmodel_imported
from tests.support.gptq_checkpoints import make_gptq_checkpoint

if importlib.util.find_spec("gptqmodel") is None:
    pytest.skip("gptqmodel is not installed", allow_module_level=True)

CONFIG = {"bits": 4, "group_size": 32, "sym": True, "desc_act": False, "checkpoint_format": "gptq"}


@pytest.fixture(scope="module")
def layers(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, list[Any]]]:
    """The layers of a small checkpoint, by the kernel that it was loaded with."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = make_gptq_checkpoint(smollm2, tmp_path_factory.mktemp("gptq") / "new", small=True)
    found = {}
    for kernel in ("torch", "torch_aten"):
        config = AutoConfig.from_pretrained(folder)
        config.quantization_config = {**config.quantization_config, "backend": BACKEND_PREFIX + kernel}
        with gptqmodel_imported():
            model = AutoModelForCausalLM.from_pretrained(folder, config=config, device_map="cpu", dtype=torch.bfloat16)
            names = uncompile_gptq_model(model)
        found[kernel] = [m for m in model.modules() if type(m).__name__ in names.split(", ")]
    yield found
    shutil.rmtree(folder)


def test_backends() -> None:
    with gptqmodel_imported():
        names = backend_names()
    assert {"gptq_torch", "gptq_torch_aten", "gptq_torch_int8", "gptq_triton", "gptq_marlin"} <= set(names)
    assert names == sorted(names)
    assert all(name.startswith(BACKEND_PREFIX) for name in names)


@pytest.mark.parametrize(
    ("backend", "changed", "words"),
    [
        ("auto", {}, None),
        ("gptq_torch", {}, None),
        ("gptq_torch", {"group_size": 33}, "group"),
        ("gptq_torch_aten", {"bits": 2}, "bits"),
        ("gptq_marlin", {}, "runs on"),
        ("gptq_torch", {"checkpoint_format": "marlin"}, "checkpoint_format"),
    ],
)
def test_a_backend_takes_a_checkpoint_or_says_why_not(backend: str, changed: dict[str, Any], words: str | None) -> None:
    with gptqmodel_imported():
        found = unsupported_reason(backend, {**CONFIG, **changed}, "cpu")
    assert found is None if words is None else words in str(found).lower()


def test_layers_that_keep_their_tensors(layers: dict[str, list[Any]]) -> None:
    assert layers["torch"]
    for layer in layers["torch"]:
        stored = stored_tensors(layer)
        assert stored is not None
        assert stored.bits == 4
        assert stored.in_features == layer.in_features == stored.words.shape[0] * 8
        assert stored.words.dtype == stored.zeros.dtype == torch.int32
        assert stored.scales.shape[1] == stored.words.shape[1] == layer.out_features
        assert stored.groups.shape == (layer.in_features,)
        assert int(stored.zeros.flatten()[0]) & 15 == 8  # as it is (v2), and not one too small (v1)
        assert "dequantize_weight" not in vars(layer)


def test_layers_with_another_layout_have_no_stored_tensors(layers: dict[str, list[Any]]) -> None:
    assert layers["torch_aten"]
    assert all(stored_tensors(layer) is None for layer in layers["torch_aten"])
    assert stored_tensors(nn.Linear(4, 4)) is None


def test_layers_that_can_be_trained(layers: dict[str, list[Any]]) -> None:
    assert layers["torch"][0].SUPPORTS_TRAINING is True
    with gptqmodel_imported():
        from gptqmodel.nn_modules.qlinear.marlin import MarlinLinear
    assert MarlinLinear.SUPPORTS_TRAINING is False
    assert can_train(layers["torch"][0])
    assert not can_train(MarlinLinear)
    assert can_train(nn.Linear(4, 4))


def test_the_layer_for_cpus_is_packed_by_its_first_forward(layers: dict[str, list[Any]]) -> None:
    """The product with the packed tensors is the layer's own, bit for bit."""
    from langchain_quantllm.compat.torch_products import int4_product

    product = int4_product()
    assert product is not None
    for layer in layers["torch_aten"]:
        x = torch.randn(3, layer.in_features).bfloat16()
        with torch.no_grad():
            expected = layer.eval()(x)
        packed = packed_tensors(layer)
        assert packed is not None
        assert packed.words.data_ptr() == layer.qweight.data_ptr()
        found = product(x[:, packed.order.long()], packed.words, packed.group_size, packed.scales_and_zeros)
        assert torch.equal(found if layer.bias is None else found + layer.bias, expected)
    assert all(packed_tensors(layer) is None for layer in layers["torch"])

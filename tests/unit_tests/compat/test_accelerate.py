"""accelerate's marks on a model and its parser of sizes, checked on accelerate itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module
from torch import nn
from transformers import AutoModelForCausalLM

from langchain_quantllm.compat.accelerate import beneath_hook, has_device_map, offloads_weights, size_in_bytes
from tests.support.models import tiny_model


@pytest.mark.parametrize(
    ("text", "size"), [("10GiB", 10 * 2**30), ("500MB", 500 * 10**6), ("1.5GiB", 3 * 2**29), (123, 123)]
)
def test_sizes(text: str | int, size: int) -> None:
    assert size_in_bytes(text) == size


@pytest.mark.parametrize("text", ["much", "10 apples", ""])
def test_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="size"):
        size_in_bytes(text)


def test_spread_models_are_known(tmp_path: Path) -> None:
    tiny_model(512).save_pretrained(tmp_path)
    assert not has_device_map(AutoModelForCausalLM.from_pretrained(tmp_path))
    places = {"model": "cpu", "lm_head": "disk"}
    assert has_device_map(
        AutoModelForCausalLM.from_pretrained(tmp_path, device_map=places, offload_folder=tmp_path / "off")
    )


def test_weights_that_lie_elsewhere_are_known() -> None:
    layer = nn.Sequential(nn.Linear(4, 4))
    assert not any(map(offloads_weights, layer.modules()))
    cpu_offload(layer, execution_device=torch.device("cpu"))
    assert any(map(offloads_weights, layer.modules()))


class TestBeneathHook:
    """The own forward of a module whose inputs accelerate moves."""

    def test_a_hook_that_moves_inputs(self) -> None:
        model = dispatch_model(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), {"": "cpu"}, force_hooks=True)
        for module in model.modules():
            own = beneath_hook(module, module.forward)
            assert own == type(module).forward.__get__(module)
        x = torch.ones(2, 4, dtype=torch.float32)
        assert torch.equal(beneath_hook(model[0], model[0].forward)(x), model[0](x))

    def test_two_of_them(self) -> None:
        layer = nn.Linear(4, 4)
        for _ in range(2):
            add_hook_to_module(layer, AlignDevicesHook(torch.device("cpu")), append=True)
        assert beneath_hook(layer, layer.forward) == nn.Linear.forward.__get__(layer)

    def test_a_module_without_a_hook(self) -> None:
        layer = nn.Linear(4, 4)
        assert beneath_hook(layer, layer.forward) is None

    def test_a_hook_that_brings_weights(self) -> None:
        layer = nn.Sequential(nn.Linear(4, 4))
        cpu_offload(layer, execution_device=torch.device("cpu"))
        assert beneath_hook(layer[0], layer[0].forward) is None

    def test_a_forward_in_front_of_the_hook(self) -> None:
        layer = nn.Linear(4, 4)
        add_hook_to_module(layer, AlignDevicesHook(torch.device("cpu")))
        layer.forward = lambda x, before=layer.forward: before(x) + 1
        assert beneath_hook(layer, layer.forward) is None

    def test_a_hook_of_another_kind(self) -> None:
        layer = nn.Linear(4, 4)
        add_hook_to_module(layer, ModelHook())
        assert beneath_hook(layer, layer.forward) is None

"""accelerate's marks on a model and its parser of sizes, checked on accelerate itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from torch import nn
from transformers import AutoModelForCausalLM

from langchain_quantllm.compat.accelerate import has_device_map, offloads_weights, size_in_bytes
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

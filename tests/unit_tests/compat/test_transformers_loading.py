"""transformers' loading of a model that was changed after it was made."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from langchain_quantllm.compat.transformers_loading import mark_initialized, model_class_with
from tests.support.mixtures import make_mixture


def test_a_replaced_module_is_neither_read_nor_initialized_nor_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_mixture("gpt_oss")
    kind = type(model)
    model.save_pretrained(tmp_path)
    made: list[str] = []

    def change(model: Any) -> None:
        own = torch.nn.Module()
        own.register_buffer("words", torch.empty(3, 5, dtype=torch.int32, device="meta"))
        experts = model.model.layers[1].mlp.experts
        made.append(model.lm_head.weight.device.type)
        del experts._parameters["down_proj"]
        experts.down_proj = own
        mark_initialized([experts, own])

    changed: Any = model_class_with(
        kind,
        change,
        ignored=["model.layers.1.mlp.experts.down_proj"],
        filled=["model.layers.1.mlp.experts.down_proj"],
    )
    assert changed.__name__ == kind.__name__
    with caplog.at_level(logging.WARNING, "transformers"):
        loaded, info = changed.from_pretrained(tmp_path, output_loading_info=True)
    assert made == ["meta"]
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert "down_proj" not in caplog.text
    words = loaded.model.layers[1].mlp.experts.down_proj.words
    assert (words.device.type, words.dtype, words.shape) == ("cpu", torch.int32, (3, 5))
    before, after = model.state_dict(), loaded.state_dict()
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items() if name in before)
    assert isinstance(loaded, kind)

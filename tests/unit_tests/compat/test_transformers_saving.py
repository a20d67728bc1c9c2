"""The tensors that `save_pretrained` writes, checked on files that it has written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from langchain_quantllm.compat.transformers_saving import saved_tensors
from tests.support.checkpoints import SIZES
from tests.support.models import tiny_model


def mixtral() -> Any:
    """Its experts are one tensor in the model, and many in the file."""
    options = {name: value for name, value in SIZES.items() if name != "initializer_range"}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**options, num_local_experts=4))


@pytest.mark.parametrize("make", [lambda: tiny_model(512), lambda: tiny_model(512, "qwen2"), mixtral])
@pytest.mark.compat
def test_tensors_are_those_of_the_file(tmp_path: Path, make: Any) -> None:
    model = make()
    model.save_pretrained(tmp_path)
    written, expected = load_file(tmp_path / "model.safetensors"), saved_tensors(model)
    assert written.keys() <= expected.keys()
    assert all(torch.equal(written[key], expected[key]) for key in written)
    places = {expected[key].data_ptr() for key in written}
    assert all(expected[key].data_ptr() in places for key in expected.keys() - written.keys())  # tied

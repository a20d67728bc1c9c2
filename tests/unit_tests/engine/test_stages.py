"""Models in stages: the same tokens as on one device. Two stages on one CPU stand for two GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from langchain_quantllm.engine.continuous import ContinuousEngine
from langchain_quantllm.engine.fusion.fuse import EXPERTS, LINEAR, Fusion
from langchain_quantllm.engine.stages import Stages
from langchain_quantllm.errors import InvalidOptionError
from langchain_quantllm.kernels import reference
from langchain_quantllm.kernels.linear import reference as linear_reference
from tests.support.families import FAST, family_model, generated_ids, random_ids
from tests.support.fusion import forwards_in, write
from tests.support.models import pipeline_of, tiny_model
from tests.support.stages import hooked

PROMPTS = [random_ids(count) for count in (23, 5, 40)]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def engine_in_stages(model: Any, tokenizer: Any, *, fuses: bool = False, firsts: tuple[int, ...] = (1,)) -> Any:
    stages = Stages(model, first_layers=firsts)
    fusion = None
    if fuses:
        fusion = Fusion(model, kernels=reference, linear_kernels=linear_reference, stages=stages)
    return ContinuousEngine(pipeline_of(model, tokenizer), fusion=fusion, stages=stages)


@pytest.mark.parametrize("fuses", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_every_family_writes_the_same(name: str, fuses: bool, tokenizer: Any) -> None:
    model = hooked(family_model(FAST[name]))
    expected = [generated_ids(model, prompt, 24) for prompt in PROMPTS]
    engine = engine_in_stages(model, tokenizer, fuses=fuses)
    assert "2 stages" in engine.info.reason
    assert write(engine, PROMPTS, 24) == expected
    if fuses and name == "llama":
        assert all(not kind.left for kind in engine._parts._fusion.summary)
        assert {k for k, n in engine.info.fused.items() if not n} <= {LINEAR, EXPERTS}
    assert [generated_ids(model, prompt, 24) for prompt in PROMPTS] == expected
    engine.close()

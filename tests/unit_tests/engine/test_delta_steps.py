"""Decode steps of gated delta rules over the states in their pool, by plain torch in the kernel's place."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from langchain_quantllm.compat.transformers_delta_rules import PooledState, delta_rule_of
from langchain_quantllm.compat.transformers_states import state_modules
from langchain_quantllm.engine import build
from langchain_quantllm.engine.delta_steps import find_delta_steps
from langchain_quantllm.kernels import recurrent_reference
from tests.support.engine import ask, plan
from tests.support.families import FAST, family_model, generated_ids, random_ids
from tests.support.models import llm_of

pytestmark = pytest.mark.usefixtures("one_thread")

FAMILIES = ("qwen3_next", "qwen3_5", "kimi_linear", "olmo_hybrid")


class Counting:
    """The plain function, which counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def delta_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.calls += 1
        return recurrent_reference.delta_step(*args, **kwargs)


class Wrong:
    """A kernel that computes something else."""

    @staticmethod
    def delta_step(*args: Any, **kwargs: Any) -> torch.Tensor:
        return 1.01 * recurrent_reference.delta_step(*args, **kwargs)


def use(monkeypatch: pytest.MonkeyPatch, kernels: Any) -> None:
    def find(parts: build.EngineParts) -> None:
        assert parts.states is not None
        parts.states.delta_steps = find_delta_steps(parts.model, parts.states.tensors, kernels)

    monkeypatch.setattr(build.EngineParts, "_find_delta_steps", find)


@pytest.mark.parametrize("family", FAMILIES)
def test_texts_are_those_of_generate(family: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    counting = Counting()
    use(monkeypatch, counting)
    model = family_model(FAST[family])
    prompts = [random_ids(count) for count in (5, 33, 18)]
    expected = [generated_ids(model, ids, 24) for ids in prompts]
    llm = llm_of(model, tokenizer, max_new_tokens=24)
    layers = sum(delta_rule_of(module) is not None for module in state_modules(model))
    assert llm.engine_info.fused["recurrent"] == layers > 0
    before = counting.calls
    for _ in range(2):
        requests = [request for ids in prompts for request in plan(llm, ids, max_new_tokens=24)]
        assert [answer.token_ids for answer in ask(llm, requests)] == expected
    assert counting.calls >= before + layers * 23
    assert [generated_ids(model, ids, 24) for ids in prompts] == expected  # the model by itself is as it was
    llm.unload()


def test_a_kernel_that_computes_something_else_is_left_out_and_said(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, Wrong)
    llm = llm_of(family_model(FAST["qwen3_5"]), tokenizer, max_new_tokens=8)
    info = llm.engine_info
    assert "recurrent" not in info.fused
    assert "the model's own: the kernel gives something else than the model's own function" in info.reason
    llm.unload()


def test_states_that_stay_where_they_are_take_no_other_dtype() -> None:
    state = PooledState(torch.zeros(2, 1, 4, 4), torch.zeros(1, dtype=torch.long), recurrent_reference)
    assert state.to(torch.float32) is state
    with pytest.raises(TypeError, match="float16"):
        state.to(torch.float16)

"""Decode steps over the states in their pool, by plain torch in the place of the kernels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from langchain_quantllm.compat.transformers_state_functions import PooledState, convolution_of, delta_rule_of
from langchain_quantllm.compat.transformers_states import state_modules
from langchain_quantllm.engine import build
from langchain_quantllm.engine.state_steps import find_state_steps
from langchain_quantllm.kernels import recurrent_reference
from tests.support.engine import ask, plan
from tests.support.families import FAST, family_model, generated_ids, random_ids
from tests.support.models import llm_of

pytestmark = pytest.mark.usefixtures("one_thread")

DELTA_RULES = ("qwen3_next", "qwen3_5", "kimi_linear", "olmo_hybrid")
CONVOLUTIONS = (
    *DELTA_RULES,
    "lfm2",
    "mamba2",
    "bamba",
    "falcon_h1",
    "nemotron_h",
    "jamba",
    "zamba2",
    "inkling",
)


class Counting:
    """The plain functions, which count their calls."""

    def __init__(self) -> None:
        self.delta_steps = self.conv_steps = 0

    def delta_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.delta_steps += 1
        return recurrent_reference.delta_step(*args, **kwargs)

    def conv_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.conv_steps += 1
        return recurrent_reference.conv_step(*args, **kwargs)


class Wrong:
    """Kernels that compute something else."""

    @staticmethod
    def delta_step(*args: Any, **kwargs: Any) -> torch.Tensor:
        return 1.01 * recurrent_reference.delta_step(*args, **kwargs)

    @staticmethod
    def conv_step(*args: Any, **kwargs: Any) -> torch.Tensor:
        return 1.01 * recurrent_reference.conv_step(*args, **kwargs)


def use(monkeypatch: pytest.MonkeyPatch, kernels: Any) -> None:
    def find(parts: build.EngineParts) -> None:
        assert parts.states is not None
        parts.states.steps = find_state_steps(parts.model, parts.states.tensors, kernels)

    monkeypatch.setattr(build.EngineParts, "_find_state_steps", find)


@pytest.mark.parametrize("family", CONVOLUTIONS)
def test_texts_are_those_of_generate(family: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    counting = Counting()
    use(monkeypatch, counting)
    model = family_model(FAST[family])
    prompts = [random_ids(count) for count in (5, 33, 18)]
    expected = [generated_ids(model, ids, 24) for ids in prompts]
    llm = llm_of(model, tokenizer, max_new_tokens=24)
    rules, convolutions = (
        sum(found(module) is not None for module in state_modules(model)) for found in (delta_rule_of, convolution_of)
    )
    fused = llm.engine_info.fused
    assert fused.get("recurrent", 0) == rules
    assert (rules > 0) == (family in DELTA_RULES)
    assert fused["conv"] == convolutions > 0
    before = counting.delta_steps, counting.conv_steps
    for _ in range(2):
        requests = [request for ids in prompts for request in plan(llm, ids, max_new_tokens=24)]
        assert [answer.token_ids for answer in ask(llm, requests)] == expected
    assert counting.delta_steps >= before[0] + rules * 23
    assert counting.conv_steps >= before[1] + convolutions * 23
    assert [generated_ids(model, ids, 24) for ids in prompts] == expected  # the model by itself is as it was
    llm.unload()


@pytest.mark.parametrize("key_heads", [None, 4], ids=["inkling2", "as wide as the others"])
def test_convolutions_of_one_layer_have_a_state_each(
    key_heads: int | None, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = FAST["inkling2"]
    if key_heads is not None:
        width = family.options["hidden_size"]
        heads = {"num_attention_heads": key_heads, "num_key_value_heads": key_heads, "head_dim": width // key_heads}
        family = replace(family, options={**family.options, **heads})
    use(monkeypatch, recurrent_reference)
    model = family_model(family)
    found = [one for module in state_modules(model) if (one := convolution_of(module)) is not None]
    assert len({one.number for one in found}) > 1
    llm = llm_of(model, tokenizer, max_new_tokens=24)
    info = llm.engine_info
    assert info.fused["conv"] == len(found), info.reason
    ids = random_ids(18)
    [answer] = ask(llm, plan(llm, ids, max_new_tokens=24))
    assert answer.token_ids == generated_ids(model, ids, 24)
    llm.unload()


def test_kernels_that_compute_something_else_are_left_out_and_said(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, Wrong)
    llm = llm_of(family_model(FAST["qwen3_5"]), tokenizer, max_new_tokens=8)
    info = llm.engine_info
    assert not {"recurrent", "conv"} & set(info.fused)
    for steps in ("recurrent steps", "convolutions"):
        assert f"{steps} of 1 layers are the model's own: the kernel gives something else" in info.reason
    llm.unload()


def test_states_that_stay_where_they_are_take_no_other_dtype() -> None:
    state = PooledState(torch.zeros(2, 1, 4, 4), torch.zeros(1, dtype=torch.long), recurrent_reference)
    assert state.to(torch.float32) is state
    with pytest.raises(TypeError, match="float16"):
        state.to(torch.float16)

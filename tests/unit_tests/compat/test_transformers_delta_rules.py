"""Gated delta rules in transformers' files: they are found, and take states that stay where they are."""

from __future__ import annotations

import sys

import pytest
import torch

from langchain_quantllm.compat.transformers_delta_rules import PooledState, delta_rule_of, prepare
from langchain_quantllm.compat.transformers_states import state_modules
from langchain_quantllm.kernels import recurrent_reference
from tests.support.families import FAST, family_model

FAMILIES = {"qwen3_next": False, "qwen3_5": False, "olmo_hybrid": False, "kimi_linear": True}
"""Families with such a rule, and whether each channel of a key decays by itself."""


@pytest.mark.compat
@pytest.mark.parametrize("family", FAMILIES)
def test_a_prepared_file_takes_states_of_both_kinds(family: str) -> None:
    module = next(iter(state_modules(family_model(FAST[family]))))
    rule = delta_rule_of(module)
    assert rule is not None
    assert rule.by_channel == FAMILIES[family]
    prepare(module)
    prepare(module)  # changes nothing more
    assert delta_rule_of(module) == rule
    called = vars(sys.modules[type(module).__module__])[rule.own.__name__]
    made = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=made, dtype=torch.float32)

    query, key, value, beta = draw(2, 1, 3, 8), draw(2, 1, 3, 8), draw(2, 1, 3, 4), draw(2, 1, 3).sigmoid()
    given = {"g": -draw(2, 1, 3, *[8] * rule.by_channel).square(), "beta": beta, "output_final_state": True}
    states, slots = draw(5, 3, 8, 4), torch.tensor([4, 1])
    options = {**given, "use_qk_l2norm_in_kernel": True}
    expected, after = called(query, key, value, initial_state=states[slots], **options)
    pooled = PooledState(states, slots, recurrent_reference)
    found, same = called(query, key, value, initial_state=pooled, use_cache=True, **options)
    assert same is pooled
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(states[slots], after)


def test_packed_sequences_and_several_tokens_are_refused() -> None:
    state = PooledState(
        torch.zeros(2, 1, 4, 4, dtype=torch.float32), torch.zeros(1, dtype=torch.long), recurrent_reference
    )
    one = torch.zeros(1, 1, 1, 4, dtype=torch.float32)
    with pytest.raises(ValueError, match="one token of each"):
        state.step(one.expand(1, 2, 1, 4), one, one, one, one, initial_state=state)
    with pytest.raises(ValueError, match="one token of each"):
        state.step(one, one, one, one, one, initial_state=state, cu_seqlens=one)


def test_a_model_without_such_a_rule_has_none() -> None:
    module = next(iter(state_modules(family_model(FAST["lfm2"]))))
    assert delta_rule_of(module) is None

"""Gated delta rules and convolutions in transformers' files: they are found, and take states that stay in place."""

from __future__ import annotations

import sys

import pytest
import torch

from langchain_quantllm.compat.transformers_state_functions import (
    PooledInputs,
    PooledState,
    convolution_of,
    delta_rule_of,
    prepare,
)
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


@pytest.mark.compat
@pytest.mark.parametrize("family", [*FAMILIES, "lfm2", "mamba2", "bamba", "falcon_h1", "nemotron_h", "jamba", "zamba2"])
@pytest.mark.parametrize("activation", [None, "silu", "gelu"])
def test_a_prepared_convolution_takes_inputs_of_both_kinds(family: str, activation: str | None) -> None:
    found = [convolution_of(module) for module in state_modules(family_model(FAST[family]))]
    assert found[0] is not None
    module = next(iter(state_modules(family_model(FAST[family]))))
    prepare(module)
    assert convolution_of(module) == found[0]
    called = vars(sys.modules[type(module).__module__])["causal_conv1d_update"]
    made = torch.Generator().manual_seed(0)
    channels, taps = found[0].channels, found[0].taps
    for inputs in (taps - 1, taps):
        pool = torch.randn(5, channels, inputs, generator=made, dtype=torch.float32)
        new = torch.randn(2, channels, 1, generator=made, dtype=torch.float32)
        weight, bias = torch.randn(channels, taps, generator=made), torch.randn(channels, generator=made)
        slots = torch.tensor([4, 1])
        after = pool[slots]
        expected = called(new, after, weight, bias, activation)
        pooled = PooledInputs(pool, slots, recurrent_reference)
        torch.testing.assert_close(called(new, pooled, weight=weight, bias=bias, activation=activation), expected)
        torch.testing.assert_close(pool[slots], after)


def test_packed_sequences_and_several_tokens_are_refused() -> None:
    state = PooledState(
        torch.zeros(2, 1, 4, 4, dtype=torch.float32), torch.zeros(1, dtype=torch.long), recurrent_reference
    )
    one = torch.zeros(1, 1, 1, 4, dtype=torch.float32)
    with pytest.raises(ValueError, match="one token of each"):
        state.step(None, one.expand(1, 2, 1, 4), one, one, one, one, initial_state=state)
    with pytest.raises(ValueError, match="one token of each"):
        state.step(None, one, one, one, one, one, initial_state=state, cu_seqlens=one)


def test_a_model_without_such_functions_has_none() -> None:
    assert delta_rule_of(next(iter(state_modules(family_model(FAST["lfm2"]))))) is None
    assert convolution_of(next(iter(state_modules(family_model(FAST["minimax"]))))) is None

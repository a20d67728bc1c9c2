"""Rotary modules whose frequencies follow from the length: their attributes, and what `generate` does then."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from langchain_quantllm.compat.transformers_rotary import (
    frequencies_of,
    is_moving_rotary,
    moving_rope,
    moving_rotary_modules,
    original_length,
    recomputes_beyond,
)
from tests.support.families import CONTEXT, FAST, ORIGINAL_CONTEXT, family_model, generated_ids, random_ids

LENGTHS = {"llama-longrope": ORIGINAL_CONTEXT, "phi3-longrope": ORIGINAL_CONTEXT, "llama-dynamic-rope": CONTEXT}


@pytest.fixture(params=LENGTHS)
def case(request: pytest.FixtureRequest) -> tuple[str, Any]:
    return request.param, family_model(FAST[request.param])


def test_the_kind_stands_in_the_config_and_the_length_in_the_module(case: tuple[str, Any]) -> None:
    name, model = case
    assert moving_rope(model.config) == ("dynamic" if "dynamic" in name else "longrope")
    [module] = moving_rotary_modules(model)
    assert is_moving_rotary(module)
    assert original_length(module) == LENGTHS[name]


def test_other_kinds_do_not_move() -> None:
    assert moving_rope(family_model(FAST["llama-linear-rope"]).config) is None
    assert not list(moving_rotary_modules(family_model(FAST["llama-3-rope"])))
    nested = {"full_attention": {"rope_type": "longrope"}, "sliding_attention": {"rope_type": "default"}}
    config = LlamaConfig()
    config.rope_parameters = nested
    assert moving_rope(config) == "longrope"


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama-longrope", "phi3-longrope"])
def test_a_call_overwrites_the_frequencies_and_keeps_the_original_ones(name: str) -> None:
    [module] = moving_rotary_modules(family_model(FAST[name]))
    original = frequencies_of(module)[1].clone()
    module(torch.zeros(1), torch.tensor([[0, ORIGINAL_CONTEXT]]))
    chosen, kept = frequencies_of(module)
    torch.testing.assert_close(kept, original)
    torch.testing.assert_close(chosen, original / 2)  # the long factors are 2, the short ones 1
    module(torch.zeros(1), torch.tensor([[0, ORIGINAL_CONTEXT - 1]]))
    torch.testing.assert_close(frequencies_of(module)[0], original)


@pytest.mark.parametrize("name", ["llama-longrope", "phi3-longrope", "phimoe-longrope"])
def test_a_model_says_whether_generate_computes_a_grown_text_anew(name: str) -> None:
    model = family_model(FAST[name])
    tokens: list[int] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: tokens.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    generated_ids(model, random_ids(ORIGINAL_CONTEXT - 2), 6)
    recomputes = recomputes_beyond(model, ORIGINAL_CONTEXT)
    assert recomputes == ("phi" in name)
    again = ORIGINAL_CONTEXT + 1 if recomputes else 1
    assert tokens == [ORIGINAL_CONTEXT - 2, 1, 1, again, 1, 1]

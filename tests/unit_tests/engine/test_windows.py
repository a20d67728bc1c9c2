"""Models whose layers all have a window give back the blocks before it while they run."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.engine import ask, plan
from tests.support.families import FAST, family_model, likeliest_ids, random_ids
from tests.support.models import llm_of

pytestmark = pytest.mark.usefixtures("one_thread")

BLOCK_BYTES = 2 * 16 * 2 * 32 * 4  # of two layers with two heads of keys and values of 16 numbers


@pytest.mark.parametrize(
    ("name", "is_freed"), [("mistral-window", True), ("gpt_neo-local", True), ("mistral", False), ("gemma3", False)]
)
@pytest.mark.parametrize("prefix_caching", [True, False])
def test_blocks_before_the_window_of_all_layers_are_freed(
    name: str, is_freed: bool, prefix_caching: bool, tokenizer: Any
) -> None:
    model = family_model(FAST[name])
    options = FAST[name].options
    scale = options.get("head_dim", 16) * options.get("num_heads", 2) // 32
    llm = llm_of(model, tokenizer, kv_cache_memory=24 * BLOCK_BYTES * scale, prefix_caching=prefix_caching)
    assert llm.engine_info.name == "fast"
    prompts = [random_ids(40 + i, seed=i) for i in range(3)]
    answers = ask(llm, [plan(llm, prompt, max_new_tokens=150, ignore_eos=True)[0] for prompt in prompts])
    engine: Any = llm._engine()
    for prompt, answer in zip(prompts, answers, strict=True):
        assert len(answer.token_ids) == 150
        assert answer.token_ids == likeliest_ids(model, prompt, answer.token_ids)
    # Three texts of 190 tokens do not fit into some 23 blocks; three windows of 24 do.
    assert (engine._scheduler.preempted == 0) == is_freed
    assert engine._blocks.held == 0
    llm.unload()

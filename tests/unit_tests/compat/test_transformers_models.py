"""The call of transformers' models, checked on transformers itself."""

from __future__ import annotations

import types
import warnings
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from langchain_quantllm.compat.transformers_models import (
    CACHE_NAMES,
    cache_name,
    cache_of,
    forward_parameters,
    given_cache_name,
)
from tests.support.models import tiny_model

IDS = torch.arange(1, 8)[None]


@pytest.fixture(scope="module", params=["llama", "qwen2", "mistral"])
def model(request: pytest.FixtureRequest) -> Any:
    return tiny_model(512, request.param)


class TestCache:
    def test_it_goes_in_and_out_without_a_warning(self, model: Any, caplog: pytest.LogCaptureFixture) -> None:
        cache = DynamicCache(config=model.config)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("error")
            output = model(input_ids=IDS, use_cache=True, **{cache_name(model): cache})
            assert cache_of(output) is cache
            assert cache.get_seq_length() == IDS.shape[1]
            whole = model(input_ids=torch.cat([IDS, IDS], 1)).logits[:, IDS.shape[1] :]
            again = model(input_ids=IDS, use_cache=True, **{cache_name(model): cache})
        torch.testing.assert_close(again.logits, whole, rtol=1e-4, atol=1e-4)
        assert "deprecated" not in caplog.text

    def test_attention_is_given_the_cache_by_one_of_the_names(self, model: Any) -> None:
        seen: list[str | None] = []
        attention = next(m for name, m in model.named_modules() if name.endswith("self_attn"))
        hook = attention.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(given_cache_name(kwargs)), with_kwargs=True
        )
        with torch.no_grad():
            model(input_ids=IDS, use_cache=False)  # given as None
            model(input_ids=IDS, use_cache=True)
        hook.remove()
        assert seen[0] == seen[1] in CACHE_NAMES

    def test_none_is_returned_where_none_is_kept(self, model: Any) -> None:
        with torch.no_grad():
            assert cache_of(model(input_ids=IDS, use_cache=False)) is None

    @pytest.mark.parametrize("name", CACHE_NAMES)
    def test_code_of_a_models_own(self, name: str) -> None:
        """In every release, the names in the forward count, and outputs need not be those of transformers."""
        scope: dict[str, Any] = {}
        exec(f"def forward(input_ids, {name}=None): ...", scope)
        assert cache_name(types.SimpleNamespace(forward=scope["forward"])) == name
        assert cache_of(types.SimpleNamespace(logits=None, **{name: IDS})) is IDS

    def test_a_forward_that_hands_all_on(self, model: Any) -> None:
        wrapper = types.SimpleNamespace(forward=lambda *args, **kwargs: model(*args, **kwargs))
        assert cache_name(wrapper) == cache_name(model)


def test_inside_of_a_wrapper_of_peft() -> None:
    peft = pytest.importorskip("peft")
    model = tiny_model(512)
    expected = forward_parameters(model)
    assert "logits_to_keep" in expected
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert forward_parameters(wrapped) == expected
    assert cache_name(wrapped) == cache_name(model)

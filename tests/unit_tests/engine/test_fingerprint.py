"""The fingerprint of a model: what it sees, and that requests never get results of the model before a change."""

from __future__ import annotations

import gc
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import Parameter
from torch.nn.functional import linear

from langchain_quantllm.engine import build
from langchain_quantllm.engine.fingerprint import Fingerprint, fingerprint
from langchain_quantllm.engine.forward_patch import ForwardPatch
from tests.support.engine import Background, MakeLLM, ask, cached_tokens, ids_after, ids_of, plan
from tests.support.families import FAST, family_model, generated_ids, random_ids
from tests.support.models import llm_of, tiny_model, wait_for_rest

pytestmark = pytest.mark.usefixtures("one_thread")


class BufferLinear(torch.nn.Module):
    """A linear layer whose weight is a buffer, as the words of GPTQ and AWQ are."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.register_buffer("qweight", layer.weight.detach().clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.qweight)


def with_buffers(model: Any) -> Any:
    for layer in model.model.layers:
        layer.self_attn.v_proj = BufferLinear(layer.self_attn.v_proj)
    return model


def projection(model: Any) -> Any:
    return model.model.layers[0].self_attn.v_proj


def doubled(module: Any) -> Callable[..., Any]:
    forward = module.forward
    return lambda *args, **kwargs: 2 * forward(*args, **kwargs)


def replace_twice(model: Any) -> None:
    """Replace a weight, and the new one, whose place in memory the last one may get."""
    for factor in (2.0, -1.0):
        weight = projection(model).weight
        projection(model).weight = Parameter(weight.detach() * factor)
        del weight
        gc.collect()


def negate_in_place(tensor: torch.Tensor) -> None:
    with torch.no_grad():
        tensor.neg_()


def negate_in_inference_mode(tensor: torch.Tensor) -> None:
    with torch.inference_mode():
        tensor.neg_()


CHANGES: dict[str, Callable[[Any], Any]] = {
    "a weight in place": lambda model: negate_in_place(projection(model).weight),
    "a weight in inference mode": lambda model: negate_in_inference_mode(projection(model).weight),
    "a detached weight": lambda model: projection(model).weight.detach().neg_(),
    "a weight's data": lambda model: setattr(projection(model).weight, "data", -projection(model).weight.data),
    "another weight": lambda model: setattr(projection(model), "weight", Parameter(-projection(model).weight)),
    "a weight twice": replace_twice,
    "all weights": lambda model: model.load_state_dict({n: -t for n, t in model.state_dict().items()}),
    "a buffer in place": lambda model: negate_in_place(model.model.rotary_emb.inv_freq),
    "another buffer": lambda model: model.model.rotary_emb.register_buffer("inv_freq", torch.ones(16)),
    "a forward": lambda model: setattr(projection(model), "forward", doubled(projection(model))),
    "a bound forward": lambda model: setattr(
        projection(model), "forward", types.MethodType(lambda self, x: -linear(x, self.weight), projection(model))
    ),
    "a module": lambda model: setattr(model.model.layers[0].self_attn, "v_proj", BufferLinear(projection(model))),
    "no module": lambda model: model.model.layers.pop(1),
    "a hook": lambda model: projection(model).register_forward_hook(lambda module, args, output: -output),
    "a hook before": lambda model: projection(model).register_forward_pre_hook(lambda module, args: None),
    "a number of the config": lambda model: setattr(model.config, "final_logit_softcapping", 3.0),
    "a list of the config": lambda model: setattr(model.config, "layer_types", ["full_attention"] * 2),
    "an entry of the config": lambda model: model.config.rope_parameters.update(rope_theta=5.0),
    "the attention": lambda model: model.set_attn_implementation("eager"),
    "dropout": lambda model: model.train(),
}


UNSEEN: dict[str, Callable[[Any], Any]] = {
    "a weight's data in place": lambda model: projection(model).weight.data.neg_(),
    "an array of NumPy": lambda model: np.negative(*[projection(model).weight.detach().numpy()] * 2),
    "a norm's epsilon": lambda model: setattr(model.model.norm, "variance_epsilon", 3.0),
}
"""Changes that nothing counts; docs/engine.md names them."""


class TestChanges:
    @pytest.mark.parametrize("name", CHANGES)
    def test_a_change_is_seen_and_seen_once(self, name: str) -> None:
        model = tiny_model(300)
        before = fingerprint(model)
        assert fingerprint(model) == before
        CHANGES[name](model)
        after = fingerprint(model)
        assert after != before
        assert fingerprint(model) == after

    def test_a_forward_of_a_class_is_seen(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = with_buffers(tiny_model(300))
        before = fingerprint(model)
        monkeypatch.setattr(BufferLinear, "forward", lambda self, x: -linear(x, self.qweight))
        assert fingerprint(model) != before

    def test_patches_of_this_package_are_not_seen_and_what_they_cover_is(self) -> None:
        """Other engines over the same model make and close them at any time."""
        model = tiny_model(300)
        before = fingerprint(model)
        patch = ForwardPatch(projection(model), lambda context, module, forward, args, kwargs: forward(*args, **kwargs))
        assert fingerprint(model) == before
        patch.close()
        projection(model).forward = doubled(projection(model))
        replaced = fingerprint(model)
        assert replaced != before
        patch = ForwardPatch(projection(model), lambda context, module, forward, args, kwargs: forward(*args, **kwargs))
        assert fingerprint(model) == replaced
        patch.close()

    def test_weights_of_inference_mode_have_a_fingerprint(self) -> None:
        with torch.inference_mode():
            model = tiny_model(300)
        before = fingerprint(model)
        assert fingerprint(model) == before
        projection(model).weight = Parameter(torch.zeros_like(projection(model).weight))
        assert fingerprint(model) != before

    def test_weights_that_accelerate_offloads_again_are_the_same(self) -> None:
        model = tiny_model(300).to("meta")
        before = fingerprint(model)
        projection(model).weight = Parameter(torch.empty_like(projection(model).weight))
        assert fingerprint(model) == before

    def test_it_keeps_no_weight_alive(self) -> None:
        model = tiny_model(300)
        before = fingerprint(model)
        weight = projection(model).weight
        gone = torch.utils.weak.WeakTensorKeyDictionary({weight: 1})
        projection(model).weight = Parameter(weight.detach().clone())
        del weight
        gc.collect()
        assert len(gone) == 0
        assert fingerprint(model) != before

    @pytest.mark.parametrize("family", FAST)
    def test_running_a_model_changes_nothing(self, family: str) -> None:
        """Or every request would begin with an empty prefix cache."""
        model = family_model(FAST[family])
        given = torch.tensor([random_ids(20)])
        with torch.no_grad():
            model(given, attention_mask=torch.ones_like(given))
            before = fingerprint(model)
            model(given[:, :7], attention_mask=torch.ones_like(given[:, :7]))
        assert fingerprint(model) == before


class TestRequests:
    """Keys and values of the model before a change are no use after it."""

    @pytest.mark.parametrize("name", ["a buffer in place", "a forward", "a bound forward", "a weight twice"])
    def test_a_request_after_a_change_is_computed_anew(self, make_tiny: MakeLLM, name: str) -> None:
        llm = make_tiny()
        before = ids_after(llm, ids_of(40))
        wait_for_rest()
        CHANGES[name](llm.pipeline.model)
        after = ids_after(llm, ids_of(40))
        assert after == generated_ids(llm.pipeline.model, ids_of(40), 12)
        assert after != before
        assert cached_tokens(llm, ids_of(40)) == [32]

    def test_weights_that_are_buffers_may_change_in_place(self, tokenizer: Any) -> None:
        llm = llm_of(with_buffers(tiny_model(len(tokenizer), seed=3)), tokenizer)
        before = ids_after(llm, ids_of(40))
        wait_for_rest()
        projection(llm.pipeline.model).qweight.mul_(-1.5)
        after = ids_after(llm, ids_of(40))
        assert after == generated_ids(llm.pipeline.model, ids_of(40), 12)
        assert after != before

    @pytest.mark.parametrize("name", UNSEEN)
    def test_a_change_that_is_not_seen_counts_after_unloading(self, make_tiny: MakeLLM, name: str) -> None:
        llm = make_tiny()
        model = llm.pipeline.model
        assert ids_after(llm, ids_of(40)) == generated_ids(model, ids_of(40), 12)
        before = fingerprint(model)
        UNSEEN[name](model)
        assert fingerprint(model) == before, "it is seen: say so in docs/engine.md"
        llm.unload()
        assert ids_after(llm, ids_of(40)) == generated_ids(model, ids_of(40), 12)

    def test_a_cap_that_the_config_holds_is_read_anew(self, tokenizer: Any) -> None:
        model = family_model(FAST["gemma2"])
        llm = llm_of(model, tokenizer)
        options: dict[str, Any] = {"do_sample": True, "seed": 1, "logprobs": 0}
        before = ask(llm, plan(llm, random_ids(40), **options))[0]
        wait_for_rest()
        model.config.final_logit_softcapping = 0.5
        after = ask(llm, plan(llm, random_ids(40), **options))[0]
        assert after.usage is not None
        assert after.usage.cached_tokens == 0
        assert after.logprobs[0].logprob != before.logprobs[0].logprob

    def test_a_change_while_the_engine_looks_at_the_model_for_another_request(
        self, make_tiny: MakeLLM, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The changer's own request joins the queue after the engine has looked, and before it takes requests."""
        llm = make_tiny()
        model = llm.pipeline.model
        before = ids_after(llm, ids_of(70))
        wait_for_rest()
        after: list[Background] = []

        def look_slowly(*args: Any, **kwargs: Any) -> Fingerprint:
            found = fingerprint(*args, **kwargs)
            if not after:
                model.load_state_dict({name: -value for name, value in model.state_dict().items()})
                stream = llm._engine().submit(plan(llm, ids_of(70)))
                after.append(Background(lambda: [i for chunk in stream for i in chunk.token_ids]))
            return found

        monkeypatch.setattr(build, "fingerprint", look_slowly)
        ids_after(llm, ids_of(5), max_new_tokens=3)
        with after[0]:
            pass
        assert after[0].result == generated_ids(model, ids_of(70), 12)
        assert after[0].result != before

    def test_a_change_while_the_parts_are_made_anew(self, make_tiny: MakeLLM, monkeypatch: pytest.MonkeyPatch) -> None:
        llm = make_tiny()
        model = llm.pipeline.model
        ids_after(llm, ids_of(40))
        wait_for_rest()
        engine: Any = llm._engine()
        made: list[int] = []
        rebuild_once = engine._parts._rebuild_once

        def change_meanwhile() -> None:
            rebuild_once()
            made.append(len(made))
            if len(made) == 1:
                negate_in_place(projection(model).weight)

        monkeypatch.setattr(engine._parts, "_rebuild_once", change_meanwhile)
        negate_in_place(projection(model).weight)
        assert ids_after(llm, ids_of(40)) == generated_ids(model, ids_of(40), 12)
        assert len(made) == 2

    def test_a_failure_while_the_engine_looks_fails_the_requests_that_wait(
        self, make_tiny: MakeLLM, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        llm = make_tiny()
        expected = ids_after(llm, ids_of(40))
        wait_for_rest()
        seen: list[int] = []

        def fail_once(*args: Any, **kwargs: Any) -> Fingerprint:
            seen.append(1)
            if len(seen) == 1:
                msg = "a module without weights"
                raise RuntimeError(msg)
            return fingerprint(*args, **kwargs)

        monkeypatch.setattr(build, "fingerprint", fail_once)
        with pytest.raises(Exception, match="a module without weights"):
            ids_after(llm, ids_of(40))
        assert ids_after(llm, ids_of(40)) == expected

"""What the caller's thread and process have set in torch: the engines run as without it, under it and afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from langchain_quantllm import QuantizedHuggingFaceLLM
from tests.support.adapters import make_adapter
from tests.support.engine import AllowOnly, MakeLLM, ask, ids_of, plan
from tests.support.models import tiny_model
from tests.support.selection import slow_but
from tests.support.torch_settings import FEW, OF_THE_PROCESS, STATES

pytestmark = pytest.mark.usefixtures("one_thread")


PROMPTS = [ids_of(count) for count in (9, 40, 5, 7, 10)]


def texts(llm: QuantizedHuggingFaceLLM) -> list[Any]:
    """Run a model in several ways, together through all parts of the engines that make tensors."""
    requests = [
        *plan(llm, PROMPTS[0]),
        *plan(llm, PROMPTS[1], do_sample=True, temperature=0.9, top_k=50, top_p=0.9, seed=1),
        *plan(llm, PROMPTS[2], do_sample=True, min_p=0.01, repetition_penalty=1.3, seed=2),
        *plan(llm, PROMPTS[3], min_new_tokens=5, eos_token_id=(3, 4), logprobs=2),
        *plan(llm, PROMPTS[4], mask=lambda: AllowOnly(AllowOnly.IDS)),
    ]
    found = [answer.token_ids for request in requests for answer in ask(llm, [request])]
    return [llm.invoke("The sea"), *found]


@pytest.fixture(scope="module")
def expected(tiny: QuantizedHuggingFaceLLM) -> list[Any]:
    return texts(tiny)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model(len(tokenizer), seed=3).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class TestEngines:
    @pytest.mark.parametrize("state", slow_but([name for name in STATES if name != "two threads"], STATES))
    def test_a_first_call_under_it_gives_the_same_and_so_do_later_ones(
        self, make_tiny: MakeLLM, expected: list[Any], state: str
    ) -> None:
        llm = make_tiny(engine="fast")
        with STATES[state]():
            assert texts(llm) == expected
        assert texts(llm) == expected

    @pytest.mark.parametrize("state", slow_but(FEW, STATES))
    def test_the_same_holds_for_the_pipeline_engine(self, make_tiny: MakeLLM, expected: list[Any], state: str) -> None:
        llm = make_tiny(engine="pipeline")
        with STATES[state]():
            assert texts(llm) == expected
        assert texts(llm) == expected

    @pytest.mark.parametrize("state", slow_but(FEW, STATES))
    def test_a_model_that_changes_under_it_runs_with_the_new_weights(self, make_tiny: MakeLLM, state: str) -> None:
        llm, other = make_tiny(engine="fast"), make_tiny(seed=4, engine="fast")
        before, after = texts(llm), texts(other)
        assert before != after
        weights = other.pipeline.model.state_dict()
        llm.pipeline.model.load_state_dict(weights)
        with STATES[state]():
            assert texts(llm) == after

    @pytest.mark.parametrize("state", OF_THE_PROCESS)
    def test_it_may_change_while_the_engine_is_there(self, make_tiny: MakeLLM, expected: list[Any], state: str) -> None:
        llm = make_tiny(engine="fast")
        assert texts(llm) == expected
        with STATES[state]():
            assert texts(llm) == expected

    def test_timing_a_step_under_inference_mode_leaves_the_engine_usable(
        self, make_tiny: MakeLLM, expected: list[Any]
    ) -> None:
        llm = make_tiny(engine="fast")
        engine: Any = llm._engine()
        with torch.inference_mode():
            assert engine.time_step(2, 20, 1) > 0
        assert texts(llm) == expected


class TestLoading:
    @pytest.mark.parametrize(
        ("state", "quantization"),
        [
            *(pytest.param(state, None, marks=[] if state in FEW else pytest.mark.slow) for state in STATES),
            # All states reach a scheme in the one clean thread that loads; few tell whether it is loaded there.
            *(pytest.param(state, scheme, marks=pytest.mark.slow) for state in FEW for scheme in ("nf4", "int8")),
        ],
    )
    def test_weights_loaded_under_it_are_those_loaded_without(
        self, folder: Path, state: str, quantization: str | None
    ) -> None:
        def load() -> QuantizedHuggingFaceLLM:
            llm = QuantizedHuggingFaceLLM(
                model_id=str(folder), quantization=quantization, max_new_tokens=8, progress=False
            )
            return llm.load()

        llm = load()
        expected, dtypes = llm.invoke("The sea"), [p.dtype for p in llm.pipeline.model.parameters()]
        name = llm.engine_info.name
        llm.unload()
        with STATES[state]():
            load()
        tensors = [*llm.pipeline.model.parameters(), *llm.pipeline.model.buffers()]
        assert not [t for t in tensors if t.is_inference()]
        assert {t.device.type for t in tensors} == {"cpu"}
        assert [p.dtype for p in llm.pipeline.model.parameters()] == dtypes
        assert (llm.invoke("The sea"), llm.engine_info.name) == (expected, name)
        llm.unload()

    @pytest.mark.slow
    @pytest.mark.parametrize("state", FEW)
    def test_adapters_loaded_under_it_are_those_loaded_without(self, folder: Path, tmp_path: Path, state: str) -> None:
        adapter = make_adapter(folder, tmp_path / "adapter", seed=1)
        llm = QuantizedHuggingFaceLLM(
            model_id=str(folder), adapters={"one": str(adapter)}, engine="fast", max_new_tokens=8, progress=False
        )

        def both() -> list[str]:
            return [llm.invoke("The sea", adapter=name) for name in ("one", "base")]

        expected = both()
        assert expected[0] != expected[1]
        llm.unload()
        with STATES[state]():
            assert both() == expected
        assert both() == expected
        llm.unload()

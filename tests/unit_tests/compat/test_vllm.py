"""vLLM's names and promises that `compat.vllm` uses, checked on vLLM itself: `make test-vllm`."""

from __future__ import annotations

import dataclasses
import inspect
import os
from typing import get_args

import pytest
from packaging.version import Version

from langchain_quantllm.compat import vllm
from langchain_quantllm.compat.packages import is_installed
from langchain_quantllm.engine.external.vllm import VLLM
from langchain_quantllm.engine.external.vllm_options import OWN_ARGUMENTS

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not is_installed("vllm"), reason="needs vLLM: make test-vllm"),
]


def test_its_version_is_read_without_an_import() -> None:
    version = vllm.vllm_version()
    assert version is not None
    assert Version(version) >= Version("0.32")


def test_an_import_of_it_leaves_the_environment_as_it_was() -> None:
    before = dict(os.environ)
    assert vllm.engine_arguments()
    changed = {name for name in {*before, *os.environ} if before.get(name) != os.environ.get(name)}
    assert not changed


def test_variables_of_the_user_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_NO_USAGE_STATS", "0")
    with vllm.variables_kept():
        assert os.environ["VLLM_NO_USAGE_STATS"] == "0"
        assert os.environ["VLLM_CPU_INT4_W4A8"] == "0"
        os.environ["VLLM_NO_USAGE_STATS"] = "7"
        os.environ["VLLM_SET_MEANWHILE"] = "1"
    assert os.environ["VLLM_NO_USAGE_STATS"] == "0"
    assert "VLLM_SET_MEANWHILE" not in os.environ


def test_the_variables_are_vllms() -> None:
    vllm.engine_arguments()
    import vllm.envs as envs

    assert set(vllm._VARIABLES) <= set(envs.environment_variables)


def test_its_engine_has_the_arguments_that_are_given_to_it() -> None:
    own = {field.name for field in dataclasses.fields(VLLM) if field.name != "engine_args"}
    used = {"max_logprobs", "max_loras", "max_lora_rank", "disable_log_stats", "block_size"}
    assert own | used | set(OWN_ARGUMENTS) <= vllm.engine_arguments()


def test_its_sampling_parameters_have_the_names_that_are_given() -> None:
    vllm.engine_arguments()
    from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

    named = SamplingParams(
        max_tokens=3,
        min_tokens=1,
        ignore_eos=True,
        stop_token_ids=[4],
        repetition_penalty=1.1,
        temperature=2.0,
        top_k=0,
        top_p=1.0,
        min_p=0.0,
        seed=2**63 - 1,
        logprobs=0,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        structured_outputs=StructuredOutputsParams(structural_tag="{}"),
    )
    assert named.stop_token_ids == [4]
    assert SamplingParams(logprob_token_ids=[1, 2]).num_logprobs == 2
    with pytest.raises(Exception, match="temperature") as raised:
        SamplingParams(temperature=2.01)
    assert vllm.is_refusal(raised.value)


def test_its_bounds_are_those_that_are_written_down() -> None:
    vllm.engine_arguments()
    from vllm.config.lora import MaxLoRARanks
    from vllm.sampling_params import MAX_LOGPROB_TOKEN_IDS

    assert get_args(MaxLoRARanks) == vllm.LORA_RANKS
    assert MAX_LOGPROB_TOKEN_IDS == vllm.MOST_NAMED_LOGPROBS


def test_its_engine_generates_ends_and_says_that_it_died_by_the_names_that_are_used() -> None:
    vllm.engine_arguments()
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.core_client import BackgroundResources
    from vllm.v1.engine.exceptions import EngineDeadError

    assert {"lora_request", "priority"} <= set(inspect.signature(AsyncLLM.generate).parameters)
    assert "timeout" in inspect.signature(AsyncLLM.shutdown).parameters
    assert isinstance(AsyncLLM.errored, property)
    assert "engine_manager" in BackgroundResources.__dataclass_fields__
    assert vllm.is_death(EngineDeadError())
    assert not vllm.is_refusal(EngineDeadError())


def test_an_adapter_has_name_number_and_folder() -> None:
    request = vllm.adapter_request("sql", 2, "/folder")
    assert (request.lora_name, request.lora_int_id, request.lora_path) == ("sql", 2, "/folder")

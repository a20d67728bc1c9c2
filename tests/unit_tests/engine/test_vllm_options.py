"""`VLLM` as a value, and the translation into vLLM's terms: what holds without vLLM."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from langchain_core.load import dumpd, load

from langchain_quantllm import VLLM, ChatQuantizedHuggingFace, QuantizedHuggingFaceLLM
from langchain_quantllm.compat.packages import is_installed
from langchain_quantllm.engine.external.spec import EngineSource, external_engine
from langchain_quantllm.engine.external.vllm_arguments import (
    FITTED_LENGTH,
    check_names,
    engine_arguments,
    prompt_of,
    sampling_arguments,
)
from langchain_quantllm.engine.request import ModelLimits, OutputForm, Request, plan_requests
from langchain_quantllm.errors import CheckpointError, InvalidOptionError, MissingPackageError, UnsupportedError
from langchain_quantllm.options import GenerationOptions
from langchain_quantllm.schemes import GPTQ, NF4, Int8, Scheme
from tests.support.checkpoints import make_checkpoint

LIMITS = ModelLimits(context_tokens=256, vocab_size=512, eos_token_ids=(1,), pad_token_id=0)


def source_of(folder: Path, **fields: Any) -> EngineSource:
    given = {
        "model_id": str(folder),
        "checkpoint": str(folder),
        "scheme": None,
        "stored_quantization": None,
        "dtype": "auto",
        "revision": None,
        "token": None,
        "cache_dir": None,
        "trust_remote_code": False,
        "model_kwargs": {},
        "adapters": {},
        "tokenizer": None,
        "processor": None,
        "config": None,
        "limits": LIMITS,
    }
    return EngineSource(**{**given, **fields})


def request_of(**options: Any) -> Request:
    given = GenerationOptions(**{"max_new_tokens": 9, "seed": 3, **options})
    return plan_requests([5, 6, 7], given, LIMITS)[0]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "tiny")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"tensor_parallel_size": 0}, "tensor_parallel_size=0"),
        ({"tensor_parallel_size": True}, "tensor_parallel_size=True"),
        ({"pipeline_parallel_size": 1.5}, "pipeline_parallel_size=1.5"),
        ({"max_model_len": -1}, "max_model_len=-1"),
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization=1.5"),
        ({"distributed_executor_backend": "rya"}, "did you mean 'ray'"),
        ({"distributed_executor_backend": "uni", "tensor_parallel_size": 2}, "take 2"),
        ({"tensor_paralel_size": 2}, "did you mean 'tensor_parallel_size'"),
        ({"tp": 2}, "write tensor_parallel_size="),
        ({"enforce_eager": 1}, "enforce_eager=1"),
        ({"nnodes": 2, "tensor_parallel_size": 2}, "needs master_addr="),
        ({"nnodes": 2, "tensor_parallel_size": 3, "master_addr": "10.0.0.1"}, "cannot divide 3 workers"),
        ({"nnodes": 2, "tensor_parallel_size": 2, "distributed_executor_backend": "ray"}, "without Ray"),
        ({"master_addr": "10.0.0.1"}, "nnodes= of at least 2"),
        ({"engine_args": {"model": "x"}}, "model_id= of the model"),
        ({"engine_args": {"enable_lora": True}}, "adapters= of the model"),
        ({"engine_args": {"max_num_seqs": 3}}, "write VLLM(max_num_seqs=...)"),
        ({"engine_args": [1]}, "must be a dict"),
    ],
)
def test_a_wrong_option_is_named(options: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidOptionError) as raised:
        VLLM(**options)
    assert told in str(raised.value)


def test_a_value_survives_pickles_dicts_and_serialization() -> None:
    engine = VLLM(tensor_parallel_size=2, engine_args={"block_size": 32})
    assert pickle.loads(pickle.dumps(engine)) == engine
    assert external_engine(json.loads(json.dumps(engine.to_dict()))) == engine
    assert hash(engine) == hash(VLLM(tensor_parallel_size=2, engine_args={"block_size": 32}))
    assert external_engine("vllm") == VLLM()
    assert VLLM().to_dict() == {"name": "vllm"}
    llm = QuantizedHuggingFaceLLM(model_id="owner/name", engine=engine)
    assert (
        load(dumpd(llm), allowed_objects=[QuantizedHuggingFaceLLM], valid_namespaces=["langchain_quantllm"]).engine
        == engine
    )


def test_the_key_of_a_cache_has_engine_and_version() -> None:
    own = QuantizedHuggingFaceLLM(model_id="owner/name")
    llm = QuantizedHuggingFaceLLM(model_id="owner/name", engine="vllm")
    assert llm._identifying_params["engine"]["name"] == "vllm"
    assert "version" in llm._identifying_params["engine"]
    assert "engine" not in own._identifying_params


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"device_map": "auto"}, "VLLM(tensor_parallel_size=...)"),
        ({"kv_cache_memory": "4GiB"}, "VLLM(kv_cache_memory_bytes=...)"),
        ({"model_kwargs": {"rope_scaling": None}}, "engine_args"),
        ({"batch_invariant": True}, "engine='fast'"),
        ({"attn_implementation": "eager"}, "attention"),
        ({"temperature": 2.5}, "temperature=2.5"),
        ({"num_beams": 3}, "num_beams=3"),
    ],
)
@pytest.mark.parametrize("kind", [QuantizedHuggingFaceLLM, ChatQuantizedHuggingFace])
def test_fields_that_vllm_does_not_carry_out_are_refused_before_anything_starts(
    kind: Callable[..., Any], fields: dict[str, Any], told: str
) -> None:
    with pytest.raises(InvalidOptionError) as raised:
        kind(model_id="owner/name", engine=VLLM(), **fields)
    assert told in str(raised.value)


@pytest.mark.skipif(is_installed("vllm"), reason="vLLM is installed")
def test_without_vllm_the_error_says_what_to_install(folder: Path) -> None:
    llm = QuantizedHuggingFaceLLM(model_id=str(folder), engine=VLLM())
    with pytest.raises(MissingPackageError, match="langchain-quantllm\\[vllm\\]"):
        llm.invoke("x")


def test_arguments_follow_from_the_model_and_the_options(folder: Path) -> None:
    engine = VLLM(tensor_parallel_size=2, max_num_seqs=7, engine_args={"block_size": 32})
    given = engine_arguments(engine, source_of(folder, dtype="float16", revision="v1", trust_remote_code=True))
    expected = {
        "model": str(folder),
        "dtype": "float16",
        "revision": "v1",
        "trust_remote_code": True,
        "tensor_parallel_size": 2,
        "max_num_seqs": 7,
        "block_size": 32,
        "max_model_len": FITTED_LENGTH,
        "scheduling_policy": "priority",
    }
    assert given.items() >= expected.items()
    assert not {"nnodes", "enable_lora", "quantization", "kv_cache_memory_bytes"} & given.keys()
    nodes = VLLM(nnodes=2, tensor_parallel_size=2, master_addr="10.0.0.1", master_port=29501)
    given = engine_arguments(nodes, source_of(folder))
    assert (given["nnodes"], given["node_rank"], given["master_addr"]) == (2, 0, "10.0.0.1")
    assert given["distributed_executor_backend"] == "mp"


def test_a_folder_without_weights_leaves_loading_to_vllm(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        file.unlink()
    assert engine_arguments(VLLM(), source_of(folder, model_id="owner/name"))["model"] == "owner/name"


@pytest.mark.parametrize(
    ("scheme", "stored", "told"),
    [
        (GPTQ(), None, "langchain-quantllm quantize MODEL -o FOLDER"),
        (Int8(), None, "plain nf4 alone"),
        (NF4(double_quantization=True), None, "plain nf4 alone"),
        (NF4(), {"quant_method": "gptq", "bits": 4, "sym": True}, "quantized already, by gptq"),
        (None, {"quant_method": "gptq", "bits": 3, "sym": True}, "4 or 8 bits"),
        (None, {"quant_method": "gptq", "bits": 4, "sym": False}, "symmetric"),
        (None, {"quant_method": "gptq", "bits": 4, "sym": True, "dynamic": {".*": {"bits": 2}}}, "of 2 and 4 bits"),
    ],
)
def test_weights_that_vllm_does_not_read_are_refused(
    folder: Path, scheme: Scheme | None, stored: dict[str, Any] | None, told: str
) -> None:
    with pytest.raises(CheckpointError) as raised:
        engine_arguments(VLLM(), source_of(folder, scheme=scheme, stored_quantization=stored))
    assert told in str(raised.value)


def test_bitsandbytes_weights_need_the_plugin_or_gptq(folder: Path) -> None:
    stored = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    with pytest.raises(CheckpointError, match="tensor_parallel_size=1"):
        engine_arguments(VLLM(tensor_parallel_size=2), source_of(folder, stored_quantization=stored))
    for given in ({"stored_quantization": stored}, {"scheme": NF4()}):
        with pytest.raises(MissingPackageError, match="vllm-bnb-plugin.*langchain-quantllm quantize"):
            engine_arguments(VLLM(), source_of(folder, **given))


def test_gptq_and_awq_folders_go_straight_in(folder: Path) -> None:
    for stored in ({"quant_method": "gptq", "bits": 4, "sym": True}, {"quant_method": "awq", "bits": 4}):
        assert "quantization" not in engine_arguments(VLLM(), source_of(folder, stored_quantization=stored))


def _adapter(folder: Path, **config: Any) -> str:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, **config}))
    return str(folder)


def test_adapters_are_all_there_at_once_in_the_least_rank_that_fits(folder: Path, tmp_path: Path) -> None:
    adapters = {"a": _adapter(tmp_path / "a"), "b": _adapter(tmp_path / "b", rank_pattern={"q_proj": 20})}
    given = engine_arguments(VLLM(), source_of(folder, adapters=adapters))
    assert (given["enable_lora"], given["max_loras"], given["max_lora_rank"]) == (True, 3, 32)
    for number, (config, told) in enumerate(
        [({"r": 4000}, "rank 4000"), ({"use_dora": True}, "use_dora"), ({"peft_type": "IA3"}, "'IA3'")]
    ):
        with pytest.raises(UnsupportedError, match=told):
            engine_arguments(VLLM(), source_of(folder, adapters={"c": _adapter(tmp_path / f"c{number}", **config)}))


def test_greedy_requests_have_no_sampling_options_and_the_requests_own_ends() -> None:
    given = sampling_arguments(request_of(top_p=0.5, repetition_penalty=1.2), LIMITS.eos_token_ids)
    assert given == {
        "max_tokens": 9,
        "min_tokens": 0,
        "ignore_eos": True,
        "stop_token_ids": [1],
        "repetition_penalty": 1.2,
        "temperature": 0.0,
    }
    assert sampling_arguments(request_of(eos_token_id=(4,)), (1,))["stop_token_ids"] == [4]
    assert sampling_arguments(request_of(ignore_eos=True), (1,))["stop_token_ids"] == []
    form = OutputForm(kind="regex", value="a")
    assert sampling_arguments(replace(request_of(eos_token_id=(4,)), form=form), (1,))["stop_token_ids"] == [4, 1]


def test_sampling_options_go_on_with_a_seed_for_each_sample() -> None:
    options = GenerationOptions(max_new_tokens=4, seed=3, do_sample=True, temperature=0.7, top_k=5, min_p=0.1, n=2)
    first, second = (sampling_arguments(r, (1,)) for r in plan_requests([5], options, LIMITS))
    assert (first["temperature"], first["top_k"], first["top_p"], first["min_p"]) == (0.7, 5, 1.0, 0.1)
    assert first["seed"] != second["seed"]
    assert all(0 <= given["seed"] < 2**63 for given in (first, second))
    assert first == sampling_arguments(plan_requests([5], options, LIMITS)[0], (1,))


def test_logprobs_are_the_likeliest_or_those_of_named_tokens() -> None:
    assert sampling_arguments(request_of(logprobs=4), (1,))["logprobs"] == 4
    named = sampling_arguments(replace(request_of(logprobs=0), reported_ids=(7, 3)), (1,))
    assert named["logprob_token_ids"] == [7, 3]
    assert "logprobs" not in named


def test_prompts_have_a_salt_where_they_share_less() -> None:
    assert prompt_of(request_of()) == {"prompt_token_ids": [5, 6, 7]}
    assert prompt_of(request_of(cache_salt="x"))["cache_salt"] == "x"
    alone = replace(request_of(cache_salt="x"), shares_prefix=False)
    assert len({prompt_of(alone)["cache_salt"], prompt_of(alone)["cache_salt"], "x"}) == 3


def test_an_unknown_argument_of_vllm_is_named() -> None:
    with pytest.raises(InvalidOptionError, match="did you mean 'block_size'"):
        check_names({"blok_size": 3}, frozenset({"block_size", "seed"}))


def test_making_the_value_imports_neither_torch_nor_vllm() -> None:
    code = "import sys; from langchain_quantllm import VLLM; VLLM(); print({'torch', 'vllm'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"

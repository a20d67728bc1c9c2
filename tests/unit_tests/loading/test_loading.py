"""Loading: a pipeline of one's own, HuggingFacePipeline's arguments, stored quantization, offline, no side effects."""

from __future__ import annotations

import copy
import json
import logging
import os
import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig, pipeline

from langchain_quantllm import FP4, NF4, Int8, QuantizedHuggingFaceLLM, Scheme, Unquantized
from langchain_quantllm.errors import ModelNotFoundError, QuantLLMError
from langchain_quantllm.schemes import Prequantized
from tests.support.checkpoints import FakeHub, edit_json, make_cached, make_checkpoint, quicken, run_python

PROMPT = "The capital of France"
NF4_CONFIG = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    quicken()
    return make_checkpoint(tmp_path_factory.mktemp("tiny"))


def make_llm(folder: Path | str, **kwargs: Any) -> QuantizedHuggingFaceLLM:
    return QuantizedHuggingFaceLLM(**{"model_id": str(folder), "progress": False, "max_new_tokens": 8, **kwargs})


def make_pipeline(folder: Path, config: BitsAndBytesConfig | None = None, **kwargs: Any) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map={"": "cpu"})
    return pipeline("text-generation", model=model, tokenizer=AutoTokenizer.from_pretrained(folder), **kwargs)


def count_tokens(llm: QuantizedHuggingFaceLLM, **call: Any) -> int:
    output = llm.generate([PROMPT], ignore_eos=True, **call).llm_output
    assert output is not None
    return int(output["token_usage"]["completion_tokens"])


# A pipeline of one's own.


def test_own_pipeline_is_used_as_it_is(tiny: Path) -> None:
    pipe = make_pipeline(tiny, max_new_tokens=5)

    def state() -> Any:
        return copy.deepcopy(
            (
                pipe._preprocess_params,
                pipe._forward_params,
                pipe._postprocess_params,
                pipe._generate_kwargs,
                pipe._generation_defaults,
                pipe.model.generation_config.to_dict(),
                pipe.model.config.to_dict(),
                pipe.tokenizer.init_kwargs,
                (pipe.tokenizer.padding_side, pipe.tokenizer.truncation_side, pipe.tokenizer.pad_token),
            )
        )

    before = state()
    llm = QuantizedHuggingFaceLLM(pipeline=pipe)
    assert llm.pipeline is pipe
    assert llm.model_id == str(tiny)
    assert llm.scheme == Unquantized()
    text = llm.invoke(PROMPT)
    assert llm.load().pipeline is pipe
    assert text == make_llm(tiny, max_new_tokens=5).invoke(PROMPT)
    llm.batch([PROMPT, "東京"])
    assert state() == before
    llm.unload()
    assert pipe.model is not None
    assert llm.pipeline is pipe
    assert llm.invoke(PROMPT) == text


def test_own_pipeline_s_options_are_the_checkpoint_s_layer(tiny: Path) -> None:
    pipe = make_pipeline(tiny, max_new_tokens=5)
    assert count_tokens(QuantizedHuggingFaceLLM(pipeline=pipe)) == 5
    assert count_tokens(QuantizedHuggingFaceLLM(pipeline=pipe, max_new_tokens=7)) == 7
    assert count_tokens(QuantizedHuggingFaceLLM(pipeline=pipe), max_new_tokens=3) == 3


def test_own_pipeline_s_generation_config_counts(tiny: Path) -> None:
    pipe = make_pipeline(tiny, generation_config=GenerationConfig(max_new_tokens=4, do_sample=False))
    assert count_tokens(QuantizedHuggingFaceLLM(pipeline=pipe)) == 4


def test_own_model_s_generation_config_counts(tiny: Path) -> None:
    pipe = make_pipeline(tiny)
    pipe.model.generation_config.max_new_tokens = 6
    assert count_tokens(QuantizedHuggingFaceLLM(pipeline=pipe)) == 6


def test_the_pipeline_s_injected_sampling_never_shows(tiny: Path) -> None:
    pipe = make_pipeline(tiny)
    assert pipe._generation_defaults["do_sample"]  # what is injected: if it no longer is, this test has no point
    llm = QuantizedHuggingFaceLLM(pipeline=pipe, max_new_tokens=20)
    ids = pipe.tokenizer(PROMPT, return_tensors="pt")
    greedy = pipe.model.generate(**ids, max_new_tokens=20, do_sample=False)[0, ids.input_ids.shape[1] :]
    expected = pipe.tokenizer.decode(greedy, skip_special_tokens=True)
    assert [llm.invoke(PROMPT) for _ in range(2)] == [expected] * 2


def test_end_tokens_given_to_the_pipeline_count(tiny: Path) -> None:
    """As the model cards of Llama 3 do it: pipeline(..., eos_token_id=terminators)."""
    (whole,) = make_llm(tiny).generate([PROMPT], logprobs=True).generations[0]
    assert whole.generation_info is not None
    third = whole.generation_info["logprobs"]["content"][2]["token_id"]
    llm = QuantizedHuggingFaceLLM(pipeline=make_pipeline(tiny, max_new_tokens=8, eos_token_id=[1, third]))
    result = llm.generate([PROMPT]).generations[0][0]
    assert result.generation_info is not None
    assert result.generation_info["finish_reason"] == "stop"
    assert len(result.text) < len(whole.text)


def test_sampling_asked_of_the_pipeline_counts(tiny: Path) -> None:
    pipe = make_pipeline(tiny, max_new_tokens=20, do_sample=True, temperature=3.0)
    llm = QuantizedHuggingFaceLLM(pipeline=pipe)
    assert len({llm.invoke(PROMPT, seed=seed) for seed in range(4)}) == 4
    assert len({llm.invoke(PROMPT, temperature=0) for _ in range(3)}) == 1


def test_own_quantized_model(tiny: Path) -> None:
    pipe = make_pipeline(tiny, NF4_CONFIG, max_new_tokens=5)
    llm = QuantizedHuggingFaceLLM(pipeline=pipe)
    assert isinstance(llm.scheme, NF4)
    assert llm.invoke(PROMPT) == make_llm(tiny, quantization="nf4", max_new_tokens=5).invoke(PROMPT)
    assert isinstance(llm.scheme, NF4)
    assert count_tokens(llm) == 5
    pipe8 = make_pipeline(tiny, BitsAndBytesConfig(load_in_8bit=True))
    assert isinstance(QuantizedHuggingFaceLLM(pipeline=pipe8).scheme, Int8)


@pytest.mark.parametrize(
    "field",
    [
        {"quantization": "nf4"},
        {"quantization": "none"},
        {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)},
        {"dtype": "float16"},
        {"device": -1},
        {"device_map": "auto"},
        {"max_memory": {"cpu": "1GB"}},
        {"attn_implementation": "eager"},
        {"revision": "main"},
        {"token": "hf_secret"},
        {"cache_dir": "/tmp/x"},
        {"trust_remote_code": True},
        {"use_safetensors": False},
        {"local_files_only": True},
        {"model_kwargs": {"nonsense": 1}},
        {"model_kwargs": {"torch_dtype": torch.float16}},
    ],
    ids=lambda field: next(iter(field)),
)
def test_loading_fields_mean_nothing_beside_a_pipeline(tiny: Path, field: dict[str, Any]) -> None:
    pipe = make_pipeline(tiny)
    with pytest.raises(ValueError, match="already loaded") as caught:
        QuantizedHuggingFaceLLM(pipeline=pipe, **field)
    assert "hf_secret" not in str(caught.value)


def test_pipelines_of_other_kinds_are_refused(tiny: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny), AutoTokenizer.from_pretrained(tiny)
    other = pipeline("feature-extraction", model=model, tokenizer=tokenizer)
    for given in (other, model, "text-generation"):
        with pytest.raises(ValueError, match=r"transformers\.pipeline\('text-generation'"):
            QuantizedHuggingFaceLLM(pipeline=given)


# HuggingFacePipeline's arguments.


def test_from_model_id_with_everything(tiny: Path) -> None:
    model_kwargs = {
        "torch_dtype": torch.float32,
        "quantization_config": BitsAndBytesConfig(load_in_8bit=True),
        "low_cpu_mem_usage": True,
        "attn_implementation": "eager",
    }
    pipeline_kwargs = {"max_new_tokens": 10, "do_sample": False, "return_full_text": False, "repetition_penalty": 1.1}
    given = copy.deepcopy((model_kwargs, pipeline_kwargs))
    llm = QuantizedHuggingFaceLLM.from_model_id(
        model_id=str(tiny),
        task="text-generation",
        backend="default",
        device=-1,
        model_kwargs=model_kwargs,
        pipeline_kwargs=pipeline_kwargs,
        batch_size=2,
        verbose=False,
        tags=["mine"],
    )
    assert (llm.max_new_tokens, llm.batch_size, llm.dtype, llm.tags) == (10, 2, "float32", ["mine"])
    model = llm.load().pipeline.model
    assert type(model.model.layers[0].self_attn.q_proj) is bnb.nn.Linear8bitLt
    assert model.lm_head.weight.dtype == torch.float32
    assert model.config._attn_implementation == "eager"
    assert count_tokens(llm) == 10
    assert model_kwargs.keys() == given[0].keys()
    assert model_kwargs["quantization_config"].to_dict() == given[0]["quantization_config"].to_dict()
    assert model_kwargs["torch_dtype"] is torch.float32
    assert pipeline_kwargs == given[1]


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("value", [torch.float16, "float16", "torch.float16"])
def test_dtype_in_model_kwargs(tiny: Path, name: str, value: Any) -> None:
    llm = QuantizedHuggingFaceLLM.from_model_id(str(tiny), "text-generation", model_kwargs={name: value})
    assert llm.dtype == "float16"
    assert llm.model_kwargs == {}


def test_dtype_in_model_kwargs_is_loaded(tiny: Path) -> None:
    llm = QuantizedHuggingFaceLLM.from_model_id(str(tiny), "text-generation", model_kwargs={"torch_dtype": "float16"})
    assert llm.load().pipeline.model.lm_head.weight.dtype == torch.float16


@pytest.mark.parametrize(
    ("model_kwargs", "field", "value"),
    [
        ({"load_in_8bit": True}, "quantization", "int8"),
        ({"load_in_4bit": True}, "quantization", "fp4"),
        ({"load_in_8bit": False}, "quantization", None),
        ({"trust_remote_code": True}, "trust_remote_code", True),
        ({"revision": "v2"}, "revision", "v2"),
        ({"cache_dir": Path("/some/where")}, "cache_dir", "/some/where"),
        ({"device_map": "auto"}, "device_map", "auto"),
        ({"max_memory": {0: "1GB"}}, "max_memory", {0: "1GB"}),
        ({"use_safetensors": False}, "use_safetensors", False),
        ({"local_files_only": True}, "local_files_only", True),
    ],
    ids=str,
)
def test_model_kwargs_become_fields(model_kwargs: dict[str, Any], field: str, value: Any) -> None:
    llm = QuantizedHuggingFaceLLM.from_model_id("acme/tiny", "text-generation", model_kwargs=model_kwargs)
    assert getattr(llm, field) == value
    assert llm.model_kwargs == {}


def test_the_token_in_model_kwargs_becomes_the_field() -> None:
    for name in ("token", "use_auth_token"):
        llm = QuantizedHuggingFaceLLM.from_model_id("acme/tiny", "text-generation", model_kwargs={name: "hf_secret"})
        assert llm.token is not None
        assert llm.token.get_secret_value() == "hf_secret"
        assert "hf_secret" not in repr(llm)


def test_other_model_kwargs_reach_from_pretrained(tiny: Path) -> None:
    """Fields of the config among them, which `from_pretrained(folder, use_cache=False)` takes."""
    llm = make_llm(tiny, model_kwargs={"use_cache": False, "max_position_embeddings": 128})
    config = llm.load().pipeline.model.config
    assert config.use_cache is False
    assert config.max_position_embeddings == 128
    assert llm.invoke(PROMPT)


@pytest.mark.parametrize("task", ["text2text-generation", "summarization", "translation", "text_generation"])
def test_from_model_id_with_another_task(task: str) -> None:
    with pytest.raises(ValueError, match=f"task='{task}'") as caught:
        QuantizedHuggingFaceLLM.from_model_id("acme/tiny", task)
    assert "text-generation" in str(caught.value)


@pytest.mark.parametrize("backend", ["openvino", "onnx"])
def test_from_model_id_with_another_backend(backend: str) -> None:
    with pytest.raises(ValueError, match=f"backend='{backend}'"):
        QuantizedHuggingFaceLLM.from_model_id("acme/tiny", "text-generation", backend)


def test_from_model_id_with_device_and_device_map() -> None:
    with pytest.raises(ValueError, match="give one of them"):
        QuantizedHuggingFaceLLM.from_model_id("acme/tiny", "text-generation", device=-1, device_map="auto")
    with pytest.raises(ValueError, match=r"give (it once|one of them)"):
        QuantizedHuggingFaceLLM.from_model_id(
            "acme/tiny", "text-generation", device_map="cpu", model_kwargs={"device_map": "auto"}
        )


def test_unknown_pipeline_kwargs() -> None:
    with pytest.raises(ValueError, match="max_new_tokens"):
        QuantizedHuggingFaceLLM.from_model_id("acme/tiny", "text-generation", pipeline_kwargs={"max_new_token": 1})


@pytest.mark.parametrize("alias", ["model_id", "model", "model_name"])
def test_aliases_of_the_model(tiny: Path, alias: str) -> None:
    for given in (str(tiny), tiny):
        llm = QuantizedHuggingFaceLLM(**{alias: given}, max_tokens=3, progress=False)
        assert llm.model_id == str(tiny)
        assert llm.max_new_tokens == 3
    assert count_tokens(llm) == 3


def test_two_names_for_the_model_must_agree(tiny: Path) -> None:
    assert QuantizedHuggingFaceLLM(model=str(tiny), model_id=str(tiny)).model_id == str(tiny)
    with pytest.raises(ValueError, match="model"):
        QuantizedHuggingFaceLLM(model="acme/one", model_id="acme/two")


def test_folders_by_any_path(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny.parent)
    monkeypatch.setenv("HOME", str(tiny.parent))
    expected = make_llm(tiny).invoke(PROMPT)
    for path in (tiny.name, f"./{tiny.name}", f"~/{tiny.name}", f"{tiny}/"):
        assert make_llm(path).invoke(PROMPT) == expected


# Checkpoints that are quantized already.

STORED: dict[str, Scheme] = {
    "int8": Int8(),
    "nf4": NF4(),
    "nf4-double": NF4(double_quantization=True),
    "fp4": FP4(),
}


@pytest.fixture(scope="module")
def stored(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The checkpoint, quantized and saved; saved before the first forward, which repacks 4-bit weights on CPUs."""
    folders = {}
    for name in STORED:
        folders[name] = tmp_path_factory.mktemp("stored") / name
        llm = make_llm(tiny, quantization=name).load()
        llm.pipeline.save_pretrained(folders[name])
        llm.unload()
    return folders


@pytest.fixture(scope="module")
def clean_run(
    tiny: Path, stored: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], str]:
    """What a new process reports that loads from folders, with the package `kernels` there and a Hub that is not.

    Gives its report, and all that it wrote to its terminal.
    """
    root = tmp_path_factory.mktemp("clean")
    (root / "kernels.py").write_text(
        "import pathlib\ndef get_kernel(*_, **__):\n    pathlib.Path(__file__).with_name('asked').touch()\n"
    )
    code = """
import json, logging, os, socket, sys, threading
asked = []
def refuse(self, address, *_):
    asked.append(str(address)); raise OSError("no network here")
socket.socket.connect = refuse
socket.getaddrinfo = lambda host, *_, **__: refuse(None, host)
import torch, transformers, huggingface_hub
from transformers import LlamaForCausalLM  # which imports `kernels`, before anything of ours could hide it
from langchain_quantllm import QuantizedHuggingFaceLLM
def state():
    return {
        "environ": dict(os.environ), "dtype": str(torch.get_default_dtype()), "cwd": os.getcwd(),
        "root": [logging.root.level, len(logging.root.handlers)],
        "transformers": [logging.getLogger("transformers").level, len(logging.getLogger("transformers").handlers)],
        "bitsandbytes": [logging.getLogger("bitsandbytes").level, len(logging.getLogger("bitsandbytes").handlers)],
        "bars": [transformers.utils.logging.is_progress_bar_enabled(),
                 huggingface_hub.utils.are_progress_bars_disabled()],
        "argv": sys.argv, "hook": sys.excepthook is sys.__excepthook__, "threads": torch.get_num_threads(),
    }
before = state()
report = {"texts": {}, "schemes": {}}
for name, folder in json.loads(sys.argv[1]).items():
    llm = QuantizedHuggingFaceLLM(model_id=folder, progress=False, max_new_tokens=8,
                                  quantization="nf4" if name == "fresh" else None)
    report["texts"][name] = llm.invoke("The capital of France")
    report["schemes"][name] = llm.scheme.to_dict()
after = state()
report |= {"changed": {k: [before[k], after[k]] for k in before if before[k] != after[k]}, "asked": asked}
open(sys.argv[2], "w").write(json.dumps(report))
"""
    folders = json.dumps({"fresh": str(tiny), **{name: str(folder) for name, folder in stored.items()}})
    env = {"PYTHONPATH": str(root), "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(root / "hf")}
    done = run_python(code, folders, root / "report.json", env=env)
    report = json.loads((root / "report.json").read_text())
    report["kernels"] = (root / "asked").exists()
    # torchao, where it is installed, complains while transformers imports it about kernels for other GPUs.
    said = [line for line in (done.stdout + done.stderr).splitlines() if "torchao" not in line and "pytree" not in line]
    return report, "\n".join(said)


@pytest.mark.parametrize("name", STORED)
def test_stored_scheme_is_recognized(tiny: Path, stored: dict[str, Path], name: str) -> None:
    llm = make_llm(stored[name]).load()
    scheme = llm.scheme
    assert type(scheme) is type(STORED[name])
    assert getattr(scheme, "double_quantization", False) == getattr(STORED[name], "double_quantization", False)
    layer = llm.pipeline.model.model.layers[0].self_attn.q_proj
    assert type(layer) is (bnb.nn.Linear8bitLt if name == "int8" else bnb.nn.Linear4bit)
    if name != "int8":
        assert layer.weight.quant_type == name.removesuffix("-double")
        assert layer.weight.quant_state.nested == name.endswith("double")
    assert llm.invoke(PROMPT) == make_llm(tiny, quantization=name).invoke(PROMPT)


@pytest.mark.parametrize("name", STORED)
def test_scheme_of_a_stored_checkpoint_is_said_before_loading(stored: dict[str, Path], name: str) -> None:
    """`scheme` is "how the weights are, or will be, held"; unquantized is not what they will be."""
    assert type(make_llm(stored[name]).scheme) is type(STORED[name])


@pytest.mark.parametrize("name", STORED)
def test_stored_scheme_may_be_asked_for(stored: dict[str, Path], name: str) -> None:
    llm = make_llm(stored[name], quantization=name)
    assert type(llm.load().scheme) is type(STORED[name])
    assert llm.invoke(PROMPT) == make_llm(stored[name]).invoke(PROMPT)


def test_stored_schemes_in_a_new_process(clean_run: tuple[dict[str, Any], str], tiny: Path) -> None:
    report, _ = clean_run
    for name in STORED:
        assert report["schemes"][name]["name"] == STORED[name].name
        assert report["texts"][name] == make_llm(tiny, quantization=name).invoke(PROMPT)
    assert report["texts"]["fresh"] == report["texts"]["nf4"]


def test_torchao_checkpoint(tmp_path: Path) -> None:
    quantization = pytest.importorskip("torchao.quantization", exc_type=ImportError)
    from transformers import TorchAoConfig

    source = make_checkpoint(tmp_path / "source")
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig(version=2))
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config, device_map={"": "cpu"})
    folder = tmp_path / "torchao"
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    llm = make_llm(folder).load()
    assert isinstance(llm.scheme, Prequantized)
    assert llm.scheme.method == "torchao"
    assert type(llm.pipeline.model.model.layers[0].self_attn.q_proj.weight).__module__.startswith("torchao")
    ids = AutoTokenizer.from_pretrained(source)(PROMPT, return_tensors="pt")
    expected = model.generate(**ids, max_new_tokens=8, do_sample=False)[0, ids.input_ids.shape[1] :]
    assert llm.invoke(PROMPT) == AutoTokenizer.from_pretrained(source).decode(expected, skip_special_tokens=True)


# Offline, and the Hub.


def test_local_folders_ask_nobody(clean_run: tuple[dict[str, Any], str]) -> None:
    report, _ = clean_run
    assert report["asked"] == []
    assert report["kernels"] is False  # bitsandbytes would have asked the Hub through it


def test_loading_prints_nothing_without_progress(clean_run: tuple[dict[str, Any], str]) -> None:
    assert clean_run[1] == ""


def test_loading_changes_nothing_global(clean_run: tuple[dict[str, Any], str]) -> None:
    assert clean_run[0]["changed"] == {}


def test_cached_repository_loads_without_a_request(tiny: Path, tmp_path: Path) -> None:
    make_cached(tmp_path, tiny, "acme/tiny")
    expected = make_llm(tiny).invoke(PROMPT)
    for local_files_only in (None, True):  # sockets are off in these tests: a request would be an error
        llm = make_llm("acme/tiny", cache_dir=str(tmp_path), local_files_only=local_files_only)
        assert llm.invoke(PROMPT) == expected
        llm.unload()
    llm = make_llm("acme/tiny", cache_dir=tmp_path, quantization="nf4")
    assert llm.invoke(PROMPT) == make_llm(tiny, quantization="nf4").invoke(PROMPT)


def test_cached_revisions_are_told_apart(tiny: Path, tmp_path: Path) -> None:
    other = make_checkpoint(tmp_path / "other", seed=1)
    cache = tmp_path / "cache"
    make_cached(cache, tiny, "acme/tiny", commit="a" * 40)
    make_cached(cache, other, "acme/tiny", commit="b" * 40, ref="v2")
    by_revision = {
        revision: make_llm("acme/tiny", cache_dir=str(cache), revision=revision).invoke(PROMPT)
        for revision in (None, "main", "v2", "a" * 40, "b" * 40)
    }
    one, two = make_llm(tiny).invoke(PROMPT), make_llm(other).invoke(PROMPT)
    assert one != two
    assert by_revision == {None: one, "main": one, "v2": two, "a" * 40: one, "b" * 40: two}
    with pytest.raises(ModelNotFoundError):
        make_llm("acme/tiny", cache_dir=str(cache), revision="v3", local_files_only=True).load()


def test_cached_pickles_load_without_a_request(tiny: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folder = make_checkpoint(tmp_path / "pickled")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    make_cached(tmp_path / "cache", folder, "acme/pickled")
    llm = make_llm("acme/pickled", cache_dir=str(tmp_path / "cache"), use_safetensors=False)
    assert llm.invoke(PROMPT) == make_llm(tiny).invoke(PROMPT)


def test_incomplete_cache_is_not_taken_for_a_copy(tiny: Path, tmp_path: Path) -> None:
    partial = tmp_path / "partial"
    partial.mkdir()
    (partial / "config.json").write_bytes((tiny / "config.json").read_bytes())
    make_cached(tmp_path / "cache", partial, "acme/tiny")
    with pytest.raises(QuantLLMError, match="acme/tiny") as caught:
        make_llm("acme/tiny", cache_dir=str(tmp_path / "cache"), local_files_only=True).load()
    assert "\n" not in str(caught.value)


@pytest.fixture
def hub(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    with FakeHub({"acme/tiny": tiny, "acme/gated": tiny}, gated=("acme/gated",)) as server:
        FakeHub.point_to(server.url, monkeypatch)
        yield server


@pytest.mark.enable_socket
def test_repository_is_fetched_once(tiny: Path, hub: FakeHub, tmp_path: Path) -> None:
    llm = make_llm("acme/tiny", cache_dir=str(tmp_path), revision="v2")
    assert llm.invoke(PROMPT) == make_llm(tiny).invoke(PROMPT)
    assert "GET /acme/tiny/resolve/v2/model.safetensors" in [a.replace(hub.commit, "v2") for a in hub.asked]
    assert (tmp_path / "models--acme--tiny" / "snapshots" / hub.commit / "model.safetensors").exists()
    llm.unload()
    hub.asked.clear()
    assert llm.invoke(PROMPT)
    assert hub.asked == []  # all of it is here now
    fresh = make_llm("acme/tiny", cache_dir=str(tmp_path), revision="v2", local_files_only=False)
    assert fresh.load().is_loaded
    fresh.unload()


@pytest.mark.enable_socket
def test_local_files_only_false_asks_the_hub(hub: FakeHub, tiny: Path, tmp_path: Path) -> None:
    make_cached(tmp_path, tiny, "acme/tiny", commit=hub.commit)
    make_llm("acme/tiny", cache_dir=str(tmp_path)).load()
    assert hub.asked == []
    make_llm("acme/tiny", cache_dir=str(tmp_path), local_files_only=False, revision="main").load()
    assert hub.asked


@pytest.mark.enable_socket
def test_the_token_opens_a_gated_repository(tiny: Path, hub: FakeHub, tmp_path: Path) -> None:
    llm = make_llm("acme/gated", cache_dir=str(tmp_path), token=hub.TOKEN)
    assert llm.invoke(PROMPT) == make_llm(tiny).invoke(PROMPT)
    assert hub.tokens <= {f"Bearer {hub.TOKEN}", None}
    assert f"Bearer {hub.TOKEN}" in hub.tokens


# What loading leaves as it was.


def global_state() -> dict[str, Any]:
    import huggingface_hub
    import transformers

    return {
        "environ": dict(os.environ),
        "dtype": torch.get_default_dtype(),
        "rng": torch.get_rng_state().tolist(),
        "random": random.getstate(),
        "grad": torch.is_grad_enabled(),
        "levels": {name: logging.getLogger(name).level for name in logging.root.manager.loggerDict},
        "root": (logging.root.level, list(logging.root.handlers)),
        "filters": list(warnings.filters),
        "bars": (
            transformers.utils.logging.is_progress_bar_enabled(),
            huggingface_hub.utils.are_progress_bars_disabled(),
        ),
        "verbosity": transformers.utils.logging.get_verbosity(),
    }


@pytest.mark.parametrize("quantization", [None, "int8", "nf4", "nf4-double"])
@pytest.mark.parametrize("progress", [True, False])
def test_globals_stay(tiny: Path, quantization: str | None, progress: bool) -> None:
    before = global_state()
    make_llm(tiny, quantization=quantization, progress=progress).load().unload()
    after = global_state()
    after["levels"] = {name: level for name, level in after["levels"].items() if name in before["levels"]}
    assert after == before


@pytest.mark.parametrize("bars", [True, False])
def test_globals_stay_after_an_error(tmp_path: Path, bars: bool) -> None:
    import huggingface_hub
    import transformers

    broken = make_checkpoint(tmp_path / "broken")
    (broken / "model.safetensors").unlink()
    switch: Callable[[], None] = (
        transformers.utils.logging.enable_progress_bar if bars else transformers.utils.logging.disable_progress_bar
    )
    was = transformers.utils.logging.is_progress_bar_enabled()
    switch()
    try:
        before = global_state()
        with pytest.raises(QuantLLMError):
            make_llm(broken).load()
        assert global_state()["bars"] == before["bars"] == (bars, huggingface_hub.utils.are_progress_bars_disabled())
        assert global_state()["environ"] == before["environ"]
    finally:
        (transformers.utils.logging.enable_progress_bar if was else transformers.utils.logging.disable_progress_bar)()


def test_arguments_stay(tiny: Path) -> None:
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    device_map, max_memory = {"": "cpu"}, {"cpu": "20GB"}
    model_kwargs = {"torch_dtype": torch.float32, "low_cpu_mem_usage": True}
    generation_kwargs = {"no_repeat_ngram_size": 2}
    stop = ["x"]
    kwargs: dict[str, Any] = {
        "quantization_config": config,
        "device_map": device_map,
        "model_kwargs": model_kwargs,
        "generation_kwargs": generation_kwargs,
        "stop": stop,
    }
    before = copy.deepcopy(kwargs)
    before_config = config.to_dict()
    make_llm(tiny, **kwargs).invoke(PROMPT)
    make_llm(tiny, max_memory=max_memory).invoke(PROMPT)
    assert config.to_dict() == before_config
    assert {k: v for k, v in kwargs.items() if k != "quantization_config"} == {
        k: v for k, v in before.items() if k != "quantization_config"
    }
    assert max_memory == {"cpu": "20GB"}


def test_progress_is_shown_unless_turned_off(tiny: Path, capfd: pytest.CaptureFixture[str]) -> None:
    make_llm(tiny, progress=True).load().unload()
    said = capfd.readouterr()
    assert "100%" in said.err
    make_llm(tiny, progress=False).load().unload()
    said = capfd.readouterr()
    assert said.out + said.err == ""


def test_checkpoint_files_stay(tiny: Path) -> None:
    before = {file.name: file.read_bytes() for file in tiny.iterdir()}
    make_llm(tiny, quantization="nf4").invoke(PROMPT)
    assert {file.name: file.read_bytes() for file in tiny.iterdir()} == before


def test_generation_config_of_the_checkpoint_counts(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "short")
    edit_json(folder / "generation_config.json", max_new_tokens=9)
    assert count_tokens(QuantizedHuggingFaceLLM(model_id=str(folder), progress=False)) == 9


def test_dropout_is_off(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "dropout", attention_dropout=0.9)
    llm = make_llm(folder).load()
    assert not llm.pipeline.model.training
    assert llm.invoke(PROMPT) == llm.invoke(PROMPT)


def test_a_model_in_memory_outlives_its_folder(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "gone")
    given = {"model_id": str(folder), "progress": False}
    first = QuantizedHuggingFaceLLM(**given).load()
    shutil.rmtree(folder)
    assert QuantizedHuggingFaceLLM(**given).load().pipeline is first.pipeline
    first.unload()
    with pytest.raises(ModelNotFoundError, match="there is no folder"):
        QuantizedHuggingFaceLLM(**given).load()

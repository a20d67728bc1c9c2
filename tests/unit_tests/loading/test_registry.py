"""Instances of the same model share its weights, which are freed with the last of them."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import PromptTemplate
from langchain_core.runnables import ConfigurableField
from transformers import BitsAndBytesConfig

from langchain_quantllm import NF4, Int8, QuantizedHuggingFaceLLM
from langchain_quantllm.errors import UnsupportedError
from langchain_quantllm.loading import handles
from tests.support.checkpoints import make_cached, make_checkpoint, run_python
from tests.support.loading import PROMPT, is_gone, make_llm, model_of

# What is shared, and what is not.


@pytest.mark.parametrize(
    "other",
    [
        {},
        {"max_new_tokens": 3},
        {"temperature": 1.0, "seed": 3, "stop": ["x"]},
        {"batch_size": 2},
        {"progress": True},
        {"local_files_only": True},
        {"token": "hf_secret"},
        {"device": -1},
        {"device": "cpu"},
        {"device_map": "cpu"},
        {"device_map": {"": "cpu"}},
        {"quantization": "none"},
        {"model_kwargs": {"low_cpu_mem_usage": True}},
    ],
    ids=str,
)
def test_other_options_share_the_weights(fresh: Path, other: dict[str, Any], loads: list[str]) -> None:
    if torch.accelerator.is_available() and other.keys() & {"device", "device_map"}:
        pytest.skip("on a machine with an accelerator the CPU is another device")
    one, two = make_llm(fresh), make_llm(fresh, **other)
    same = model_of(one) is model_of(two)
    assert same
    assert len(loads) == 1
    assert one.invoke(PROMPT)


@pytest.mark.parametrize(
    "spellings",
    [
        [{"quantization": "int8"}, {"quantization": Int8()}, {"quantization_config": {"load_in_8bit": True}}],
        [
            {"quantization": "int8"},
            {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)},
            {"model_kwargs": {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}},
            {"model_kwargs": {"load_in_8bit": True}},
        ],
        [{"quantization": "nf4-double"}, {"quantization": NF4(double_quantization=True)}],
        [
            {"quantization_config": BitsAndBytesConfig(load_in_4bit=True)},
            {"quantization_config": BitsAndBytesConfig(load_in_4bit=True)},
        ],
    ],
    ids=["int8", "int8-config", "nf4-double", "config"],
)
def test_one_scheme_in_several_spellings_is_shared(
    fresh: Path, spellings: list[dict[str, Any]], loads: list[str]
) -> None:
    llms = [make_llm(fresh, **spelling) for spelling in spellings]
    assert len({id(model_of(llm)) for llm in llms}) == 1
    assert len(loads) == 1


def test_one_folder_by_several_paths_is_shared(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny.parent)
    (tmp_path / "link").symlink_to(tiny, target_is_directory=True)
    llms = [make_llm(path) for path in (tiny, tiny.name, f"{tiny}/", tmp_path / "link")]
    assert len({id(model_of(llm)) for llm in llms}) == 1


@pytest.mark.parametrize(
    "other",
    [
        {"quantization": "int8"},
        {"quantization": "nf4"},
        {"quantization": NF4(double_quantization=True)},
        {"quantization": NF4(skip_modules=["q_proj"])},
        {"dtype": "float32"},
        {"attn_implementation": "eager"},
    ],
    ids=str,
)
def test_options_that_change_the_weights_share_none(tiny: Path, other: dict[str, Any]) -> None:
    assert model_of(make_llm(tiny)) is not model_of(two := make_llm(tiny, **other))
    assert two.invoke(PROMPT)


def test_another_model_or_revision_is_not_shared(tiny: Path, tmp_path: Path) -> None:
    other = make_checkpoint(tmp_path / "other", seed=1)
    make_cached(tmp_path, tiny, "acme/tiny", commit="a" * 40)
    make_cached(tmp_path, other, "acme/tiny", commit="b" * 40, ref="v2")
    llms = [
        make_llm(tiny),
        make_llm(other),
        make_llm("acme/tiny", cache_dir=str(tmp_path)),
        make_llm("acme/tiny", cache_dir=str(tmp_path), revision="v2"),
    ]
    assert len({id(model_of(llm)) for llm in llms}) == len(llms)


def test_max_memory_stays_shared_over_a_reload(fresh: Path, loads: list[str]) -> None:
    """accelerate replaces "20GB" by a number in its argument."""
    one, two = (make_llm(fresh, max_memory={"cpu": "20GB"}) for _ in range(2))
    assert model_of(one) is model_of(two)
    assert len(loads) == 1


def test_chains_share(fresh: Path, loads: list[str]) -> None:
    chains = [
        PromptTemplate.from_template("{x}") | make_llm(fresh, max_new_tokens=3).bind(stop=["x"]) | StrOutputParser()
        for _ in range(2)
    ]
    assert chains[0].invoke({"x": "hello"}) == chains[1].invoke({"x": "hello"})
    assert len(loads) == 1


def test_copies_share(fresh: Path, loads: list[str]) -> None:
    llm = make_llm(fresh).load()
    twins = [copy.copy(llm), copy.deepcopy(llm), llm.model_copy(), llm.model_copy(update={"max_new_tokens": 3})]
    for twin in twins:
        assert model_of(twin) is llm.pipeline.model
    assert len(loads) == 1


def test_many_threads_load_once(fresh: Path, loads: list[str]) -> None:
    barrier = threading.Barrier(8)

    def work(_: int) -> str:
        barrier.wait()
        return make_llm(fresh, quantization="nf4").invoke(PROMPT)

    with ThreadPoolExecutor(8) as executor:
        texts = list(executor.map(work, range(8)))
    assert len(set(texts)) == 1
    # An instance is freed at the end of its thread, so that only overlapping ones must share.
    assert len(loads) <= 2


def test_many_threads_of_living_instances_load_once(fresh: Path, loads: list[str]) -> None:
    llms = [make_llm(fresh, quantization="int8") for _ in range(8)]
    with ThreadPoolExecutor(8) as executor:
        texts = list(executor.map(lambda llm: llm.invoke(PROMPT), llms))
    assert len(set(texts)) == 1
    assert len({id(llm.pipeline.model) for llm in llms}) == 1
    assert len(loads) == 1


def test_one_instance_in_many_threads_loads_once(fresh: Path, loads: list[str]) -> None:
    llm = make_llm(fresh)
    with ThreadPoolExecutor(8) as executor:
        assert len(set(executor.map(lambda _: llm.invoke(PROMPT), range(8)))) == 1
    assert len(loads) == 1


@pytest.mark.slow
def test_different_models_loaded_at_once_leave_transformers_whole(tiny: Path, tmp_path: Path) -> None:
    """`from_pretrained` swaps functions of transformers, and torch's default dtype, while it runs.

    Two at once put back what the other had put there: from then on no model's weights are tied. A process
    of its own, since the damage would last.
    """
    code = """
import sys
from concurrent.futures import ThreadPoolExecutor
import torch
from transformers import PreTrainedModel
from langchain_quantllm import QuantizedHuggingFaceLLM
state = lambda: (PreTrainedModel.tie_weights, PreTrainedModel.init_weights, torch.nn.init.normal_, torch.linspace,
                 torch.get_default_dtype())
before = state()
expected = None
for i in range(8):
    llms = [QuantizedHuggingFaceLLM(model_id=folder, progress=False, max_new_tokens=6, dtype=dtype)
            for folder in sys.argv[1:] for dtype in ("float32", "bfloat16")]
    with ThreadPoolExecutor(len(llms)) as executor:
        texts = list(executor.map(lambda llm: llm.invoke("The capital of France"), llms))
    assert state() == before, f"changed in round {i}"
    expected = expected or texts
    assert texts == expected, f"other texts in round {i}"
"""
    run_python(code, tiny, make_checkpoint(tmp_path / "other", seed=1))


# configurable_fields makes a new instance at every use.


@pytest.mark.parametrize("quantization", [None, "nf4"])
@pytest.mark.parametrize("loaded", [False, True])
def test_configurable_fields_share(fresh: Path, quantization: str | None, loaded: bool, loads: list[str]) -> None:
    llm = make_llm(fresh, quantization=quantization)
    if loaded:
        llm.load()
    configurable = llm.configurable_fields(max_new_tokens=ConfigurableField(id="length"))
    keeper = make_llm(fresh, quantization=quantization)
    keeper.load()
    for length in (3, 5):
        text = configurable.with_config(configurable={"length": length}).invoke(PROMPT)
        assert text == make_llm(fresh, quantization=quantization, max_new_tokens=length).invoke(PROMPT)
    assert configurable.invoke(PROMPT) == llm.invoke(PROMPT)
    assert len(loads) == 1


@pytest.mark.parametrize("loaded", [False, True])
def test_configurable_scheme(tiny: Path, loaded: bool) -> None:
    """A configured instance has the fields of a loaded one, but loads its own weights in another scheme."""
    llm = make_llm(tiny, max_new_tokens=30)
    texts = {name: make_llm(tiny, quantization=name, max_new_tokens=30).invoke(PROMPT) for name in ("none", "nf4")}
    assert texts["none"] != texts["nf4"]
    if loaded:
        llm.load()
    configurable = llm.configurable_fields(quantization=ConfigurableField(id="scheme"))
    for name in ("nf4", "none"):
        assert configurable.with_config(configurable={"scheme": name}).invoke(PROMPT) == texts[name]


def test_configurable_model(tiny: Path, tmp_path: Path) -> None:
    other = make_checkpoint(tmp_path / "other", seed=1)
    llm = make_llm(tiny).load()
    configurable = llm.configurable_fields(model_id=ConfigurableField(id="model"))
    text = configurable.with_config(configurable={"model": str(other)}).invoke(PROMPT)
    assert text == make_llm(other).invoke(PROMPT)


# Freed with the last.


@pytest.mark.parametrize("quantization", [None, "int8", "nf4"])
def test_weights_go_with_the_last_instance(fresh: Path, quantization: str | None) -> None:
    one, two = make_llm(fresh, quantization=quantization), make_llm(fresh, quantization=quantization)
    one.invoke(PROMPT)
    two.invoke(PROMPT)
    gone = weakref.ref(one.pipeline.model)
    weight = weakref.ref(one.pipeline.model.model.layers[0].mlp.up_proj.weight)
    del one
    gc.collect()
    assert gone() is not None
    assert two.invoke(PROMPT)
    del two
    assert is_gone(gone)
    assert is_gone(weight)


def test_weights_go_after_every_way_of_calling(fresh: Path) -> None:
    import asyncio

    llm = make_llm(fresh)
    llm.invoke(PROMPT)
    llm.batch([PROMPT, "a", "b"])
    llm.batch([PROMPT, "a"], return_exceptions=True)
    list(llm.stream(PROMPT))
    stream = llm.stream(PROMPT)
    next(stream)
    stream.close()
    asyncio.run(llm.ainvoke(PROMPT))
    assert isinstance(llm.batch(["", PROMPT], return_exceptions=True)[0], Exception)
    assert llm.memory_report() is not None
    gone = weakref.ref(llm.pipeline.model)
    del llm, stream
    assert is_gone(gone)


def test_weights_of_an_unused_load_go_too(fresh: Path) -> None:
    llm = make_llm(fresh).load()
    gone = weakref.ref(llm.pipeline.model)
    del llm
    assert is_gone(gone, within_s=1)


def test_an_own_pipeline_is_not_kept(fresh: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

    model = AutoModelForCausalLM.from_pretrained(fresh)
    pipe = pipeline("text-generation", model=model, tokenizer=AutoTokenizer.from_pretrained(fresh))
    llm = QuantizedHuggingFaceLLM(pipeline=pipe, max_new_tokens=3)
    llm.invoke(PROMPT)
    gone = weakref.ref(model)
    del llm, pipe, model
    assert is_gone(gone)


def test_nothing_is_left_behind_by_a_life(fresh: Path) -> None:
    make_llm(fresh).load().unload()
    threads = set(threading.enumerate())
    llm = make_llm(fresh)
    llm.invoke(PROMPT)
    llm.unload()
    assert set(threading.enumerate()) <= threads
    assert not [key for key in handles._handles if str(fresh) in str(key)]


def test_an_instance_that_never_runs_keeps_what_its_configured_ones_load(fresh: Path, loads: list[str]) -> None:
    """`configurable_fields` makes an instance for each call; the weights must not be read for each."""
    configurable = make_llm(fresh).configurable_fields(max_new_tokens=ConfigurableField(id="length"))
    for length in (2, 3, 4):
        assert configurable.with_config(configurable={"length": length}).invoke(PROMPT)
    assert len(loads) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_memory_limits_take_numbers_and_names_of_devices(tiny: Path) -> None:
    """Devices are numbers and names, as for accelerate; one that this machine lacks is an error."""
    limits = {0: "10GiB", "cpu": "10GiB"}
    with pytest.raises(UnsupportedError, match="cuda:0"):
        make_llm(tiny, device_map="auto", max_memory=limits).load()
    assert limits == {0: "10GiB", "cpu": "10GiB"}


def test_a_loading_field_that_is_set_later_counts(tiny: Path) -> None:
    llm = make_llm(tiny).load()
    assert llm.memory_report().scheme_name == "none"
    llm.quantization = "int8"
    assert not llm.is_loaded
    assert llm.memory_report().scheme_name == "int8"

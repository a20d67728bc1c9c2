"""Every scheme, in each way to ask for it: the weights in memory after loading, values, names and checks."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GPTQConfig, TorchAoConfig

from langchain_quantllm import AWQ, FP4, GPTQ, NF4, SCHEMES, Int8, QuantizedHuggingFaceLLM, Scheme, Unquantized
from langchain_quantllm.errors import InvalidOptionError
from langchain_quantllm.schemes import Prequantized, scheme_from, scheme_of_config
from tests.support.checkpoints import LINEAR_NAMES, make_checkpoint, quicken

PROMPT = "The capital of France"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    quicken()
    return make_checkpoint(tmp_path_factory.mktemp("tiny"))


def make_llm(folder: Path, **kwargs: Any) -> QuantizedHuggingFaceLLM:
    return QuantizedHuggingFaceLLM(**{"model_id": str(folder), "progress": False, "max_new_tokens": 8, **kwargs})


def linears(llm: QuantizedHuggingFaceLLM) -> dict[str, torch.nn.Linear]:
    modules = llm.load().pipeline.model.named_modules()
    return {name: module for name, module in modules if isinstance(module, torch.nn.Linear)}


def blocks_and_head(llm: QuantizedHuggingFaceLLM) -> tuple[list[Any], torch.nn.Linear]:
    found = linears(llm)
    head = found.pop("lm_head")
    assert len(found) == 2 * len(LINEAR_NAMES)
    return list(found.values()), head


def greedy_text(folder: Path, config: BitsAndBytesConfig | None, dtype: str = "auto") -> str:
    """Continue the prompt with transformers alone."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=dtype, device_map={"": "cpu"}
    )
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))


# In memory after loading.


@pytest.mark.parametrize("quantization", ["none", None, Unquantized(), {"name": "none"}])
def test_unquantized_stays_as_it_is(tiny: Path, quantization: Any) -> None:
    llm = make_llm(tiny, quantization=quantization)
    blocks, head = blocks_and_head(llm)
    assert {type(layer) for layer in [*blocks, head]} == {torch.nn.Linear}
    assert {p.dtype for p in llm.pipeline.model.parameters()} == {torch.bfloat16}
    assert llm.scheme == Unquantized()
    assert llm.invoke(PROMPT) == greedy_text(tiny, None)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_dtype_is_that_of_unquantized_weights(tiny: Path, dtype: str) -> None:
    for given in (dtype, getattr(torch, dtype)):
        llm = make_llm(tiny, dtype=given)
        assert {p.dtype for p in llm.load().pipeline.model.parameters()} == {getattr(torch, dtype)}
    assert llm.invoke(PROMPT) == greedy_text(tiny, None, dtype)


@pytest.mark.parametrize(
    "how",
    [
        {"quantization": "int8"},
        {"quantization": Int8()},
        {"quantization": {"name": "int8"}},
        {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)},
        {"quantization_config": {"load_in_8bit": True}},
        {"model_kwargs": {"load_in_8bit": True}},
        {"model_kwargs": {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}},
    ],
    ids=["name", "value", "dict", "config", "config_dict", "load_in_8bit", "in_model_kwargs"],
)
def test_int8_weights_are_held_in_8_bits_and_give_transformers_text(tiny: Path, how: dict[str, Any]) -> None:
    llm = make_llm(tiny, **how)
    assert llm.scheme == Int8()  # known before loading
    blocks, head = blocks_and_head(llm)
    assert {type(layer) for layer in blocks} == {bnb.nn.Linear8bitLt}
    assert {layer.weight.dtype for layer in blocks} == {torch.int8}
    assert {layer.state.threshold for layer in blocks} == {6.0}
    assert type(head) is torch.nn.Linear
    assert llm.scheme == Int8()
    assert llm.invoke(PROMPT) == greedy_text(tiny, BitsAndBytesConfig(load_in_8bit=True))


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_4bit_weights_are_held_in_4_bits_and_give_transformers_text(tiny: Path, kind: str, double: bool) -> None:
    scheme = {"nf4": NF4, "fp4": FP4}[kind](double_quantization=double)
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    expected = greedy_text(tiny, config)
    for how in (
        {"quantization": f"{kind}-double" if double else kind},
        {"quantization": scheme},
        {"quantization": scheme.to_dict()},
        {"quantization_config": config},
        {"quantization_config": config.to_dict()},
    ):
        llm = make_llm(tiny, **how)
        blocks, head = blocks_and_head(llm)
        assert {type(layer) for layer in blocks} == {bnb.nn.Linear4bit}
        assert {layer.weight.quant_type for layer in blocks} == {kind}
        assert {layer.weight.quant_state.quant_type for layer in blocks} == {kind}
        assert {layer.weight.quant_state.nested for layer in blocks} == {double}
        assert {layer.weight.dtype for layer in blocks} == {torch.uint8}
        assert {layer.compute_dtype for layer in blocks} == {torch.bfloat16}
        assert type(head) is torch.nn.Linear
        assert llm.scheme.to_dict() in (scheme.to_dict(), {**scheme.to_dict(), "compute_dtype": "bfloat16"})
        assert llm.invoke(PROMPT) == expected


def test_load_in_4bit_alone_is_transformers_default(tiny: Path) -> None:
    for how in (
        {"quantization_config": BitsAndBytesConfig(load_in_4bit=True)},
        {"quantization_config": {"load_in_4bit": True}},
        {"model_kwargs": {"load_in_4bit": True}},
    ):
        llm = make_llm(tiny, **how)
        blocks, _ = blocks_and_head(llm)
        assert {layer.weight.quant_type for layer in blocks} == {"fp4"}
        assert isinstance(llm.scheme, FP4)
        assert not llm.scheme.double_quantization


@pytest.mark.parametrize("given", ["float32", torch.float32, "torch.float32"])
def test_compute_dtype_is_that_of_the_layers(tiny: Path, given: Any) -> None:
    blocks, _ = blocks_and_head(make_llm(tiny, quantization=NF4(compute_dtype=given)))
    assert {layer.compute_dtype for layer in blocks} == {torch.float32}


def test_compute_dtype_follows_the_model(tiny: Path) -> None:
    llm = make_llm(tiny, quantization="nf4", dtype="float16")
    blocks, head = blocks_and_head(llm)
    assert {layer.compute_dtype for layer in blocks} == {torch.float16}
    assert head.weight.dtype == torch.float16
    assert llm.invoke(PROMPT)


def test_storage_dtype_is_that_of_the_weights_and_changes_no_text(tiny: Path) -> None:
    llm = make_llm(tiny, quantization=NF4(storage_dtype="bfloat16"))
    blocks, _ = blocks_and_head(llm)
    assert {layer.weight.dtype for layer in blocks} == {torch.bfloat16}
    assert llm.invoke(PROMPT) == make_llm(tiny, quantization="nf4").invoke(PROMPT)


def test_threshold_is_that_of_the_layers(tiny: Path) -> None:
    llm = make_llm(tiny, quantization=Int8(threshold=0))
    blocks, _ = blocks_and_head(llm)
    assert {layer.state.threshold for layer in blocks} == {0.0}
    assert llm.invoke(PROMPT)


@pytest.mark.parametrize("scheme", [Int8(skip_modules=["q_proj"]), NF4(skip_modules=("q_proj",))])
def test_skipped_modules_stay_beside_the_output_head(tiny: Path, scheme: Scheme) -> None:
    llm = make_llm(tiny, quantization=scheme)
    plain = {name for name, layer in linears(llm).items() if type(layer) is torch.nn.Linear}
    assert plain == {"lm_head", "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"}
    assert llm.invoke(PROMPT)


def test_int8_does_not_warn_at_every_product(tiny: Path, caplog: pytest.LogCaptureFixture) -> None:
    llm = make_llm(tiny, quantization="int8").load()
    caplog.clear()
    llm.invoke(PROMPT)
    assert caplog.messages == []


def test_fp32_cpu_offload_is_handed_on() -> None:
    for scheme in (Int8(fp32_cpu_offload=True), NF4(fp32_cpu_offload=True)):
        assert scheme.transformers_config("bfloat16").llm_int8_enable_fp32_cpu_offload is True


def test_output_differs_between_schemes(tiny: Path) -> None:
    """The logits show that each scheme rounds in its own way."""
    ids = torch.arange(2, 34)[None]
    logits = {}
    for name in ("none", "int8", "nf4", "nf4-double", "fp4"):
        model = make_llm(tiny, quantization=name, dtype="float32").load().pipeline.model
        with torch.no_grad():
            logits[name] = model(ids).logits.float()
    far = {name: float((value - logits["none"]).abs().mean()) for name, value in logits.items()}
    assert 0 == far["none"] < far["int8"] < far["nf4"] < far["fp4"]  # 8 bits, 4 well placed bits, 4 bits
    assert not torch.equal(logits["nf4"], logits["nf4-double"])


# Values, names and their checks.


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Int8(threshold=-1), ["threshold=-1", "at least 0"]),
        (lambda: Int8(threshold="6"), ["threshold='6'", "number"]),
        (lambda: Int8(threshold=float("nan")), ["threshold=nan"]),
        (lambda: Int8(skip_modules="lm_head"), ["skip_modules='lm_head'", "['lm_head']"]),
        (lambda: Int8(skip_modules=[1]), ["skip_modules=[1]"]),
        (lambda: Int8(skip_modules=None), ["skip_modules=None"]),
        (lambda: Int8(fp32_cpu_offload="no"), ["fp32_cpu_offload='no'"]),
        (lambda: NF4(compute_dtype="int8"), ["compute_dtype='int8'", "'bfloat16'"]),
        (lambda: NF4(compute_dtype=torch.int8), ["compute_dtype='int8'", "'bfloat16'"]),
        (lambda: FP4(storage_dtype="int4"), ["storage_dtype='int4'", "'uint8'"]),
        (lambda: NF4(double_quantization="no"), ["double_quantization='no'"]),
        (lambda: NF4(skip_modules="q_proj"), ["skip_modules='q_proj'"]),
        (lambda: GPTQ(bits=5), ["bits=5", "2, 3, 4, 8"]),
        (lambda: GPTQ(bits=4.0), ["bits=4.0", "2, 3, 4, 8"]),  # type: ignore[arg-type]
        (lambda: GPTQ(bits=4, other_bits=(5,)), ["other_bits=(5,)", "2, 3, 4, 8"]),
        (lambda: GPTQ(bits=4, other_bits=None), ["other_bits=None", "2, 3, 4, 8"]),  # type: ignore[arg-type]
        (lambda: GPTQ(group_size=0), ["group_size=0", "-1 or a positive"]),
        (lambda: GPTQ(sym="yes"), ["sym=", "True or False"]),  # type: ignore[arg-type]
    ],
)
def test_wrong_options_are_refused_with_what_is_allowed(make: Any, words: list[str]) -> None:
    with pytest.raises(InvalidOptionError) as caught:
        make()
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("int_8", ["'int_8'", "did you mean 'int8'?"]),
        ("nf4-doubel", ["did you mean 'nf4-double'?"]),
        ("NF4", ["did you mean 'nf4'?"]),
        ("INT8", ["did you mean 'int8'?"]),
        ("nf4_double", ["did you mean 'nf4-double'?"]),
        ("GPTQ", ["did you mean 'gptq'?"]),
        ("None", ["did you mean 'none'?"]),
        *(
            (v, [repr(v), "'int8'"])
            for v in ("8bit", "8-bit", "8", 8, 8.0, "q8_0", "Q6_K", "bnb-8bit", "llm.int8()", "w8")
        ),
        *(
            (v, [repr(v), "'nf4'"])
            for v in ("4bit", "4", 4, 4.0, "int4", "Q4_K_M", "q4_0", "IQ4_XS", "bnb_4bit", "Q2_K")
        ),
        *((v, ["'int8'", "'nf4'", "'fp4'"]) for v in ("bnb", "bitsandbytes")),
        *(
            (v, ["its own config", "leave quantization out"])
            for v in ("aqlm", "hqq", "fp8", "nvfp4", "w4a16", "torchao")
        ),
        *((v, ["'awq'"]) for v in ("AWQ", "AutoAWQ", "awq-4bit")),
        *((v, ["'gptq'", "GPTQ(bits=4)"]) for v in ("gptq-4bit", "gptq-int4", "AutoGPTQ")),
        *(
            (v, ["is a dtype", "'float16'", "'none'"])
            for v in ("float16", "fp16", 16, "half", torch.float16, "torch.float16")
        ),
        *((v, ["is a dtype", "'bfloat16'"]) for v in ("bf16", "bfloat16")),
        ("fp32", ["is a dtype", "'float32'"]),
        ("gguf", ["langchain-quantllm convert"]),
        *((v, ["no scheme of so many bits"]) for v in (5, "3bit", "int2", 2.5)),
        ("qlora", ["'nf4-double'"]),
        (True, ["quantization=True", "'nf4'", "'int8'"]),
        *((v, ["'none'"]) for v in (False, "off", "")),
        ("zzz", ["allowed are", "nf4", "gptq"]),
        ({"name": ["nf4"]}, ["names no known scheme", "nf4"]),
        ({"name": "nf4-double", "skip_modules": ["a"]}, ["names no known scheme"]),
        ({"name": "nf5"}, ["'nf5'", "did you mean 'nf4'?"]),
        ({"double_quantization": True}, ["names no known scheme", "'name'"]),
        ({"load_in_4bit": True}, ["quantization_config="]),
        ({"name": "nf4", "double_quant": True}, ["'double_quant'", "did you mean 'double_quantization'?"]),
        (BitsAndBytesConfig(load_in_8bit=True), ["quantization_config="]),
        (NF4, ["quantization=NF4()"]),
    ],
)
def test_unknown_schemes_name_what_is_meant(tiny: Path, value: Any, words: list[str]) -> None:
    with pytest.raises(InvalidOptionError) as caught:
        scheme_from(value)
    for word in words:
        assert word in str(caught.value)
    with pytest.raises(ValueError, match="quantization"):  # when the LLM is made, not when it loads
        make_llm(tiny, quantization=value)


@pytest.mark.parametrize("name", SCHEMES)
def test_every_name_may_stand_in_a_dictionary(name: str) -> None:
    assert scheme_from({"name": name}) == SCHEMES[name]


def test_both_ways_at_once_are_refused(tiny: Path) -> None:
    with pytest.raises(ValueError, match="give one of them"):
        make_llm(tiny, quantization="int8", quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    with pytest.raises(ValueError, match=r"give (one of them|it once)"):
        make_llm(tiny, quantization="nf4", model_kwargs={"load_in_8bit": True})


def test_schemes_are_frozen_values() -> None:
    scheme = NF4(skip_modules=["q_proj"])
    with pytest.raises(dataclasses.FrozenInstanceError):
        scheme.double_quantization = True  # type: ignore[misc]
    assert scheme == NF4(skip_modules=("q_proj",))
    assert len({scheme, NF4(skip_modules=("q_proj",)), NF4()}) == 2
    assert NF4() != FP4()
    with pytest.raises(TypeError):
        NF4("float16")  # type: ignore[misc]


@pytest.mark.parametrize("name", SCHEMES)
def test_names_stand_for_the_schemes(name: str) -> None:
    scheme = scheme_from(name)
    assert scheme is SCHEMES[name]
    assert scheme_from(scheme) is scheme
    assert scheme.name == name.removesuffix("-double")


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("none", None),
        ("int8", 8),
        ("nf4", 4),
        ("nf4-double", 4),
        ("fp4", 4),
        ("fp4-double", 4),
        ("gptq", None),
        ("awq", 4),
    ],
)
def test_schemes_tell_the_bits_of_a_weight(name: str, bits: int | None) -> None:
    assert SCHEMES[name].weight_bits == bits
    assert GPTQ(bits=3).weight_bits == 3


ROUND_TRIP = [
    *SCHEMES.values(),
    Int8(threshold=4.5, skip_modules=["k_proj", "q_proj"], fp32_cpu_offload=True),
    NF4(compute_dtype=torch.float16, double_quantization=True, storage_dtype="bfloat16", skip_modules=["up_proj"]),
    FP4(compute_dtype="float32", fp32_cpu_offload=True),
    GPTQ(bits=3, kernel="triton"),
    GPTQ(bits=3, group_size=-1, sym=False, desc_act=True),
    AWQ(group_size=64),
    Prequantized(method="awq", bits=4),
]


@pytest.mark.parametrize("scheme", ROUND_TRIP, ids=str)
def test_to_dict_round_trip_through_json(scheme: Scheme) -> None:
    again = scheme_from(json.loads(json.dumps(scheme.to_dict())))
    assert again == scheme
    assert hash(again) == hash(scheme)


@pytest.mark.parametrize("scheme", [s for s in ROUND_TRIP if isinstance(s, Int8 | NF4 | FP4)], ids=str)
def test_transformers_config_round_trip(scheme: Scheme) -> None:
    config = scheme.transformers_config("bfloat16")
    assert isinstance(config, BitsAndBytesConfig)
    expected = scheme
    if not isinstance(scheme, Int8) and scheme.compute_dtype is None:
        expected = dataclasses.replace(scheme, compute_dtype="bfloat16")
    assert scheme_of_config(config.to_dict()) == expected
    assert scheme_of_config(json.loads(json.dumps(config.to_dict()))) == expected


def test_schemes_of_other_configs() -> None:
    assert scheme_of_config(GPTQConfig(bits=4, desc_act=False).to_dict()) == GPTQ(
        bits=4, group_size=128, sym=True, desc_act=False
    )
    assert scheme_of_config({"quant_method": "gptq", "bits": 8}) == GPTQ(bits=8)
    assert scheme_of_config({"load_in_8bit": True}) == Int8()
    assert scheme_of_config({"quant_method": "hqq", "bits": 4}) == Prequantized(method="hqq", bits=4)
    awq = {"quant_method": "awq", "w_bit": 4, "group_size": 64, "zero_point": True, "version": "GEMM"}
    assert scheme_of_config(awq) == AWQ(group_size=64)
    assert scheme_of_config({"quant_method": "awq"}) == AWQ(group_size=128)
    for other in ({"version": "gemv"}, {"zero_point": False}, {"w_bit": 8}):
        assert isinstance(scheme_of_config({**awq, **other}), Prequantized)
    assert scheme_of_config({"quant_method": "compressed-tensors"}) == Prequantized(method="compressed-tensors")
    from torchao.quantization import Int8WeightOnlyConfig

    scheme = scheme_of_config(TorchAoConfig(Int8WeightOnlyConfig()).to_dict())
    assert isinstance(scheme, Prequantized)
    assert scheme.method == "torchao"


def test_unquantized_has_no_transformers_config() -> None:
    assert Unquantized().transformers_config("bfloat16") is None

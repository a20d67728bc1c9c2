"""Mixtures of experts in bitsandbytes' schemes: what is loaded is what bitsandbytes makes of each expert's matrix."""

from __future__ import annotations

import copy
import logging
import pickle
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import functional

from langchain_quantllm import NF4, Int8, QuantizedHuggingFaceLLM
from langchain_quantllm.compat.transformers_experts import projections
from langchain_quantllm.experts.module import QuantizedExperts
from langchain_quantllm.experts.stacked import StackedLinear
from tests.support.checkpoints import make_tokenizer, quicken
from tests.support.loading import model_of
from tests.support.mixtures import EXPERTS, make_mixture

SCHEMES = ["int8", "nf4", "nf4-double", "fp4", "fp4-double"]
IDS = torch.arange(3, 43)[None]


@pytest.fixture(scope="module", autouse=True)
def quick() -> None:
    quicken()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Path] = {}

    def folder_of(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            make_mixture(kind).save_pretrained(made[kind], max_shard_size="100KB")
            make_tokenizer().save_pretrained(made[kind])
        return made[kind]

    return folder_of


def load(folder: Path, scheme: Any = None, **options: Any) -> Any:
    return model_of(QuantizedHuggingFaceLLM(model_id=str(folder), quantization=scheme, progress=False, **options))


def rounded(matrix: torch.Tensor, scheme: str) -> torch.Tensor:
    """Quantize a matrix by bitsandbytes, and dequantize it."""
    if scheme == "int8":
        codes, scales, _ = functional.int8_vectorwise_quant(matrix.half())
        return codes.float() * scales[:, None] / 127
    kind, _, double = scheme.partition("-")
    row = matrix.reshape(1, -1)  # on a CPU, bitsandbytes dequantizes wrongly where a block has elements of two rows
    packed, state = functional.quantize_4bit(row, quant_type=kind, compress_statistics=bool(double))
    return functional.dequantize_4bit(packed, state).float().reshape(matrix.shape)


def experts_in(model: Any) -> dict[str, Any]:
    return {name: m for name, m in model.named_modules() if name.endswith(".experts")}


@pytest.mark.parametrize(
    ("kind", "scheme"),
    [
        *(("qwen3_moe", scheme) for scheme in SCHEMES),
        ("mixtral", "fp4"),
        ("gpt_oss", "int8"),
        ("gpt_oss", "nf4-double"),
        ("nemotron_h", "int8"),
        ("deepseek_v3", "nf4"),
    ],
)
def test_each_matrix_of_each_expert_is_what_bitsandbytes_makes_of_it(folders: Any, kind: str, scheme: str) -> None:
    plain = experts_in(make_mixture(kind))
    found = experts_in(load(folders(kind), scheme))
    assert found.keys() == plain.keys()
    assert len(found) in (1, 2)
    for path, experts in found.items():
        assert isinstance(experts, QuantizedExperts)
        assert not list(experts.parameters())
        for name, projection in projections(plain[path]).items():
            stacked = getattr(experts, name)
            assert isinstance(stacked, StackedLinear)
            for expert in range(EXPERTS):
                weight = getattr(plain[path], name)[expert].detach()
                weight = weight.t() if projection.transposed else weight
                values = stacked.dequantize(expert, torch.float32)
                torch.testing.assert_close(values, rounded(weight, scheme), rtol=1e-5, atol=1e-6)
            if projection.bias is not None:
                torch.testing.assert_close(stacked.stack.bias, getattr(plain[path], projection.bias).detach())


def reference_model(kind: str, scheme: str, folder: Path) -> Any:
    """Make the unquantized model whose experts have the rounded values, its other layers quantized as ever."""
    from transformers import AutoModelForCausalLM

    from langchain_quantllm.schemes import SCHEMES

    config = SCHEMES[scheme].transformers_config("float32")
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map={"": "cpu"})
    for experts in experts_in(model).values():
        for name, projection in projections(experts).items():
            weight = getattr(experts, name).data
            for expert in range(EXPERTS):
                turned = weight[expert].t() if projection.transposed else weight[expert]
                turned.copy_(rounded(turned.clone().contiguous(), scheme))
    return model


@torch.no_grad()
@pytest.mark.parametrize(("kind", "scheme"), [("qwen3_moe", "nf4-double"), ("gpt_oss", "int8"), ("mixtral", "fp4")])
def test_logits_are_those_of_a_model_with_the_rounded_weights(folders: Any, kind: str, scheme: str) -> None:
    expected = reference_model(kind, scheme, folders(kind))(input_ids=IDS).logits
    found = load(folders(kind), scheme)(input_ids=IDS).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("scheme", ["int8", "nf4-double"])
def test_a_loaded_mixture_is_pickled_and_computes_the_same(folders: Any, scheme: str) -> None:
    model = load(folders("qwen3_moe"), scheme)
    expected = model(input_ids=IDS).logits
    found = pickle.loads(pickle.dumps(model))
    assert all(isinstance(experts, QuantizedExperts) for experts in experts_in(found).values())
    torch.testing.assert_close(found(input_ids=IDS).logits, expected)


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@torch.no_grad()
@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_quantized_experts_change_the_logits_about_as_much_as_the_dense_layers(folders: Any, scheme: str) -> None:
    expected = make_mixture("qwen3_moe")(input_ids=IDS).logits
    both = difference(load(folders("qwen3_moe"), scheme)(input_ids=IDS).logits, expected)
    dense = difference(load(folders("qwen3_moe"), unquantized_experts(scheme))(input_ids=IDS).logits, expected)
    assert 0.5 * dense < both < 2 * dense


def unquantized_experts(scheme: str) -> Any:
    return {"int8": Int8, "nf4": NF4}[scheme](skip_modules=("experts",))


def largest_unquantized_bytes(monkeypatch: pytest.MonkeyPatch, folder: Path) -> int:
    """Load a mixture in nf4, and return the most bytes of weights of experts that were in memory as they are stored."""
    from transformers import core_model_loading

    read, alive, most = core_model_loading._materialize_copy, {}, [0]

    def recorded(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        found = read(tensor, *args, **kwargs)
        if tuple(tensor.get_shape())[-2:] in ((32, 64), (64, 32), (64, 256), (128, 64)):  # of experts alone
            alive[id(found)] = (weakref.ref(found), found.nbytes)
            most[0] = max(most[0], sum(size for ref, size in alive.values() if ref() is not None))
        return found

    monkeypatch.setattr(core_model_loading, "_materialize_copy", recorded)
    load(folder, "nf4")
    assert most[0] > 0
    return most[0]


def test_one_expert_is_in_memory_unquantized_where_a_checkpoint_has_single_experts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    make_mixture("qwen3_moe", num_experts=16).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    matrix_bytes = 32 * 64 * 4
    assert largest_unquantized_bytes(monkeypatch, tmp_path) <= 3 * matrix_bytes  # gate, up and the down before them


def test_one_parameter_is_in_memory_unquantized_where_a_checkpoint_has_all_experts_of_a_layer_in_one(
    monkeypatch: pytest.MonkeyPatch, folders: Any
) -> None:
    parameter_bytes = EXPERTS * 64 * 256 * 4
    assert largest_unquantized_bytes(monkeypatch, folders("gpt_oss")) <= parameter_bytes


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_routers_stay_as_they_are(folders: Any, kind: str) -> None:
    plain, found = make_mixture(kind), load(folders(kind), "nf4")
    name = "router" if kind == "gpt_oss" else "gate"
    for expected, layer in zip(plain.model.layers, found.model.layers, strict=True):
        router = getattr(layer.mlp, name)
        assert torch.equal(router.weight, getattr(expected.mlp, name).weight)


@pytest.mark.parametrize("skipped", ["experts", "model.layers.0.mlp", "down_proj"])
def test_skip_modules_names_experts_as_it_names_layers(
    folders: Any, skipped: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        model = load(folders("qwen3_moe"), NF4(skip_modules=(skipped,)))
    kept = [not isinstance(experts, QuantizedExperts) for experts in experts_in(model).values()]
    assert kept == [True, skipped != "model.layers.0.mlp"]
    plain = make_mixture("qwen3_moe").model.layers[0].mlp.experts
    assert torch.equal(model.model.layers[0].mlp.experts.gate_up_proj, plain.gate_up_proj)
    assert "experts" not in caplog.text


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("llama4", {}, "Llama4TextExperts keeps the weights of its experts in a layout of its own"),
        ("qwen3_moe", {"moe_intermediate_size": 28}, "down_proj has 28 inputs, no multiple of 8"),
    ],
)
def test_experts_that_cannot_be_quantized_stay_and_one_warning_and_the_report_have_the_reason(
    tmp_path: Path, kind: str, options: dict[str, Any], words: str, caplog: pytest.LogCaptureFixture
) -> None:
    make_mixture(kind, **options).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        llm = QuantizedHuggingFaceLLM(model_id=str(tmp_path), quantization="nf4", progress=False).load()
    assert not any(isinstance(experts, QuantizedExperts) for experts in experts_in(llm.pipeline.model).values())
    said = [r.getMessage() for r in caplog.records if words in r.getMessage()]
    assert len(said) == 1
    assert words in " ".join(repr(llm.memory_report()).split())


def test_a_running_batch_writes_what_generate_writes(folders: Any) -> None:
    llm = QuantizedHuggingFaceLLM(
        model_id=str(folders("qwen3_moe")), quantization="nf4", progress=False, max_new_tokens=8
    )
    found = llm.invoke("The capital of France")
    assert llm.engine_info is not None
    assert llm.engine_info.name == "fast"
    tokenizer, model = llm.pipeline.tokenizer, llm.pipeline.model
    ids = tokenizer("The capital of France", return_tensors="pt")["input_ids"]
    output = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert found == tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    llm.unload()


def test_models_that_other_programs_load_stay_as_they_are(folders: Any) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    load(folders("qwen3_moe"), "nf4")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(
        folders("qwen3_moe"), quantization_config=config, device_map={"": "cpu"}
    )
    assert type(model.hf_quantizer).__module__.startswith("transformers.")
    assert all(experts.gate_up_proj.dtype == torch.float32 for experts in experts_in(model).values())


def test_a_loaded_mixture_has_the_marks_of_bitsandbytes(folders: Any) -> None:
    model = load(folders("qwen3_moe"), "nf4")
    assert model.config.quantization_config.quant_method == "bitsandbytes"
    assert type(model.config.quantization_config).__name__ == "BitsAndBytesConfig"
    assert model.quantization_method == "bitsandbytes"
    assert torch.equal(copy.deepcopy(model)(input_ids=IDS).logits, model(input_ids=IDS).logits)

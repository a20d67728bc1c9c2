"""AWQ checkpoints: their dense layers are loaded as layers of GPTQ, and no weight changes."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from langchain_quantllm import QuantizedHuggingFaceLLM
from langchain_quantllm.engine.fusion.fuse import LINEAR
from langchain_quantllm.errors import UnsupportedError
from langchain_quantllm.kernels.linear.reference import dequantize
from langchain_quantllm.kernels.linear.weights import GPTQWeight, Int4PackWeight, weight_of
from langchain_quantllm.loading.registry import LoadedModel, load
from langchain_quantllm.loading.spec import LoadSpec
from tests.support.adapters import NAMES, PROMPT, make, make_adapter_folders
from tests.support.awq_checkpoints import FILE, make_awq_checkpoint
from tests.support.checkpoints import make_checkpoint, make_tokenizer
from tests.support.selection import skip_without_gptqmodel

IDS = torch.arange(3, 43)[None]
PROMPTS = ["The capital of France", "Quantized models take", "The quick brown fox"]


@pytest.fixture(autouse=True, scope="module")
def _needs_gptqmodel() -> None:
    skip_without_gptqmodel()


def loaded(folder: Path, **options: Any) -> LoadedModel:
    given = {"dtype": "float32", "progress": False, "device_map": {"": "cpu"}}
    return load(LoadSpec(model_id=str(folder), **{**given, **options}))


def quantized(model: Any) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if "qweight" in module._buffers}


@pytest.mark.compat
@pytest.mark.parametrize("group_size", [16, -1])
def test_weights_are_exactly_those_of_the_checkpoint(tmp_path: Path, group_size: int) -> None:
    twin = make_awq_checkpoint(make_checkpoint(tmp_path), group_size=group_size)
    model = loaded(tmp_path).pipeline.model
    layers = quantized(model)
    assert len(layers) == 14
    for name, layer in layers.items():
        assert type(layer).__name__ == "TorchLinear"  # of GPTQ; no faster one takes these groups on a CPU
        weight = weight_of(layer)
        assert isinstance(weight, GPTQWeight)
        assert weight.zero_point == -1
        assert torch.equal(dequantize(weight, torch.float32), twin.get_submodule(name).weight)
    with torch.no_grad():
        found, expected = (each(IDS).logits for each in (model, twin))
    assert (found - expected).norm() < 2e-3 * expected.norm()  # GPTQModel's layer rounds weights to float16


@pytest.mark.compat
def test_the_kernel_for_cpus_computes_with_them(tmp_path: Path) -> None:
    twin = make_awq_checkpoint(make_checkpoint(tmp_path))
    model = loaded(tmp_path).pipeline.model
    inputs: dict[str, Any] = {}
    for name, layer in quantized(model).items():
        layer.register_forward_hook(lambda _, args, output, name=name: inputs.update({name: (*args, output)}))
    with torch.no_grad():
        model(IDS)
        for name, (x, output) in inputs.items():
            assert isinstance(weight_of(model.get_submodule(name)), Int4PackWeight)
            expected = twin.get_submodule(name)(x)
            assert (output - expected).norm() < 0.01 * expected.norm()  # the kernel computes in bfloat16


@pytest.mark.parametrize("lm_head_dtype", ["auto", "int8"])
def test_the_fast_engine_fuses_them_and_writes_the_text_of_generate(tmp_path: Path, lm_head_dtype: Any) -> None:
    make_awq_checkpoint(make_checkpoint(tmp_path))
    fields: dict[str, Any] = {"device": "cpu", "max_new_tokens": 12, "temperature": 0, "progress": False}
    llm = QuantizedHuggingFaceLLM(model_id=str(tmp_path), engine="fast", lm_head_dtype=lm_head_dtype, **fields)
    assert llm.pipeline.model.dtype == torch.bfloat16
    assert llm.engine_info.fused[LINEAR] == 14 + (lm_head_dtype == "int8")
    plain = llm.model_copy(update={"engine": "pipeline"})
    assert llm.batch(PROMPTS) == [plain.invoke(prompt) for prompt in PROMPTS]
    llm.unload()


def test_adapters_run_on_top(tmp_path: Path) -> None:
    root = make_adapter_folders(tmp_path)
    make_awq_checkpoint(root / "tiny")
    llm = make(root, dtype="auto", max_new_tokens=8)
    assert llm.engine_info.name == "fast"
    texts = {name: llm.invoke(PROMPT, adapter=name) for name in NAMES}
    assert len(set(texts.values())) == 3
    plain = llm.model_copy(update={"engine": "pipeline"})
    assert {name: plain.invoke(PROMPT, adapter=name) for name in NAMES} == texts
    llm.unload()


def test_its_memory_is_estimated(tmp_path: Path) -> None:
    make_awq_checkpoint(make_checkpoint(tmp_path))
    found = loaded(tmp_path, dtype="auto")
    shifts = 8 * 4  # a table of each layer
    assert found.estimate is not None
    assert found.weights.quantized_bytes == found.estimate.weights.quantized_bytes + 14 * shifts
    assert found.weights.unquantized_bytes == found.estimate.weights.unquantized_bytes


def test_a_layer_that_fits_no_kernel_of_gptq_stays_awq(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path, intermediate_size=68)  # GPTQ has 8 inputs in a word
    make_awq_checkpoint(source, group_size=-1, kept=["gate_proj", "up_proj"])
    layers = quantized(loaded(tmp_path).pipeline.model)
    kinds = {name.rpartition(".")[2]: type(layer).__name__ for name, layer in layers.items()}
    assert "Awq" in kinds.pop("down_proj")
    assert kinds == dict.fromkeys(["q_proj", "k_proj", "v_proj", "o_proj"], "TorchLinear")


def test_a_model_is_saved_in_awq_bit_for_bit(tmp_path: Path) -> None:
    make_awq_checkpoint(make_checkpoint(tmp_path / "source"), group_size=16)
    model = loaded(tmp_path / "source", dtype="auto").pipeline.model
    model.save_pretrained(tmp_path / "again")
    make_tokenizer().save_pretrained(tmp_path / "again")
    before, after = (load_file(tmp_path / folder / FILE) for folder in ("source", "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    again = loaded(tmp_path / "again", dtype="auto").pipeline.model
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_a_model_whose_layers_are_packed_for_cpus_is_not_saved(tmp_path: Path) -> None:
    make_awq_checkpoint(make_checkpoint(tmp_path / "source"))
    model = loaded(tmp_path / "source").pipeline.model
    with pytest.raises(UnsupportedError, match="copy the checkpoint's folder"):
        model.save_pretrained(tmp_path / "again")


def test_a_loaded_model_is_copied_and_pickled(tmp_path: Path) -> None:
    make_awq_checkpoint(make_checkpoint(tmp_path), group_size=16)
    model = loaded(tmp_path).pipeline.model
    expected = model(IDS).logits
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(made(IDS).logits, expected)


def test_a_family_whose_activations_autoawq_scales_loads_without_these_scales(tmp_path: Path) -> None:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    sizes = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, num_attention_heads=2)).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    twin = make_awq_checkpoint(tmp_path, group_size=16, kept=["embed_out"])
    model = loaded(tmp_path).pipeline.model
    assert len(quantized(model)) == 8
    with torch.no_grad():
        found, expected = (each(IDS).logits for each in (model, twin))
    assert (found - expected).norm() < 2e-3 * expected.norm()


def test_layers_that_a_device_map_puts_on_the_disk_stay_in_memory(tmp_path: Path) -> None:
    twin = make_awq_checkpoint(make_checkpoint(tmp_path), group_size=16)
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    places |= {"model.norm": "cpu", "lm_head": "cpu"}
    kwargs = {"offload_folder": str(tmp_path / "off")}
    model = loaded(tmp_path, device_map=places, model_kwargs=kwargs).pipeline.model
    with torch.no_grad():
        found, expected = (each(IDS).logits for each in (model, twin))
    assert (found - expected).norm() < 2e-3 * expected.norm()
    with pytest.raises(UnsupportedError, match="leave offload_buffers out"):
        loaded(tmp_path, device_map=places, model_kwargs={**kwargs, "offload_buffers": True})

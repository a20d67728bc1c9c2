"""Checkpoints of mixtures whose experts are packed: they load in their bits, compute the same, and are saved again."""

from __future__ import annotations

import dataclasses
import gc
import importlib.util
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from langchain_quantllm.compat.transformers_experts import is_experts
from langchain_quantllm.errors import CheckpointError, QuantLLMError, UnsupportedError
from langchain_quantllm.experts.stacked import StackedLinear
from langchain_quantllm.loading.checkpoint import find_checkpoint
from langchain_quantllm.loading.packed_experts import find_packed_experts
from langchain_quantllm.loading.registry import load
from langchain_quantllm.loading.spec import LoadSpec
from langchain_quantllm.memory import estimate_config
from langchain_quantllm.schemes import MXFP4, NF4
from tests.support.checkpoints import FakeHub, edit_json
from tests.support.packed_experts import FILE, make_packed

IDS = torch.arange(3, 43)[None]

needs_gptqmodel = pytest.mark.skipif(importlib.util.find_spec("gptqmodel") is None, reason="gptqmodel is not installed")


def spec_of(folder: Path, **options: Any) -> LoadSpec:
    given: dict[str, Any] = {"dtype": "float32", "device_map": {"": "cpu"}, "progress": False}
    return LoadSpec(model_id=str(folder), **{**given, **options})


def loaded(folder: Path, **options: Any) -> Any:
    """Load a checkpoint and return its model."""
    found = load(spec_of(folder, **options))
    model = found.pipeline.model
    gc.collect()
    return model


@torch.no_grad()
def difference(model: Any, twin: Any) -> float:
    """Return the relative difference of two models' logits."""
    logits, expected = model(IDS).logits.float(), twin(IDS).logits.float()
    return float((logits - expected).norm() / expected.norm())


def stacks_of(model: Any) -> list[Any]:
    return [module.stack for module in model.modules() if isinstance(module, StackedLinear)]


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the tensors of a checkpoint."""
    tensors = load_file(folder / FILE)
    edit(tensors)
    save_file(tensors, folder / FILE, metadata={"format": "pt"})


CASES = [
    pytest.param("gpt_oss", "mxfp4", {}, id="gpt-oss"),
    pytest.param("qwen3_moe", "mxfp4", {}, id="mxfp4-of-another-family"),
    pytest.param("qwen3_moe", "gptq", {}, id="qwen3"),
    pytest.param("qwen3_moe", "gptq", {"fused": True, "sym": False, "desc_act": True}, id="fused-names"),
    pytest.param("mixtral", "gptq", {"bits": 3, "sym": False, "checkpoint_format": "gptq_v2"}, id="mixtral-v2"),
    pytest.param("mixtral", "gptq", {"bits": 8, "desc_act": True}, id="mixtral-act-order"),
    pytest.param("gpt_oss", "gptq", {"sym": False}, id="gpt-oss-with-alternating-outputs"),
    pytest.param("qwen3_moe", "awq", {"sym": False}, id="awq"),
    pytest.param("mixtral", "awq", {"sym": False}, id="mixtral-awq"),
]


@needs_gptqmodel
@pytest.mark.parametrize(("kind", "method", "options"), CASES)
def test_a_checkpoint_computes_as_its_dequantized_weights_and_is_saved_bit_for_bit(
    tmp_path: Path, kind: str, method: str, options: dict[str, Any]
) -> None:
    twin = make_packed(tmp_path / "packed", kind, method, attention=False, **options)
    model = loaded(tmp_path / "packed")
    assert difference(model, twin) < 1e-5
    assert len(stacks_of(model)) == 4
    assert not [name for name, p in model.named_parameters() if p.ndim == 3]
    model.save_pretrained(tmp_path / "again")
    before, after = load_file(tmp_path / "packed" / FILE), load_file(tmp_path / "again" / FILE)
    assert before.keys() == after.keys()
    assert all(t.dtype == after[name].dtype and torch.equal(t, after[name]) for name, t in before.items())
    config = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == method


@needs_gptqmodel
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_packed_attention_stays_with_its_own_kernels(tmp_path: Path, method: str) -> None:
    twin = make_packed(tmp_path, "mixtral", method)
    model = loaded(tmp_path)
    assert hasattr(model.model.layers[0].self_attn.q_proj, "qweight")
    assert len(stacks_of(model)) == 4
    assert difference(model, twin) < 0.05  # these kernels compute in 16 bits


def test_gates_and_up_projections_in_orders_of_their_own_compute_the_same_and_say_that_they_are_not_saved(
    tmp_path: Path,
) -> None:
    twin = make_packed(tmp_path, "qwen3_moe", "gptq", attention=False, desc_act=True, sym=False, own_order=True)
    model = loaded(tmp_path)
    assert difference(model, twin) < 1e-5
    with pytest.raises(UnsupportedError, match="groups of their own"):
        model.state_dict()


def test_layers_without_a_group_index_have_groups_of_neighbours(tmp_path: Path) -> None:
    twin = make_packed(tmp_path, "qwen3_moe", "gptq", attention=False)

    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("g_idx")]:
            del tensors[name]

    change(tmp_path, drop)
    assert difference(loaded(tmp_path), twin) < 1e-5


def test_the_experts_take_their_bits_and_nothing_more_while_they_load(tmp_path: Path) -> None:
    make_packed(tmp_path, "gpt_oss", "mxfp4", dtype=torch.bfloat16)
    model = loaded(tmp_path, dtype="auto")
    assert model.dtype == torch.bfloat16
    for stack in stacks_of(model):
        numbers = stack.experts * stack.in_features * stack.out_features
        assert stack.words.nbytes + stack.scales.nbytes == numbers * 17 // 32
        assert stack.bias.dtype == torch.bfloat16


@needs_gptqmodel
@pytest.mark.parametrize(("kind", "method"), [("gpt_oss", "mxfp4"), ("mixtral", "gptq")])
def test_the_memory_is_estimated(tmp_path: Path, kind: str, method: str) -> None:
    make_packed(tmp_path, kind, method, dtype=torch.bfloat16)
    found = load(spec_of(tmp_path, dtype="auto"))
    assert found.estimate is not None
    assert found.estimate.weights.experts_bytes == found.weights.experts_bytes
    packed = sum(
        t.nbytes for stack in stacks_of(found.pipeline.model) for t in vars(stack).values() if hasattr(t, "nbytes")
    )
    assert found.weights.experts_bytes == packed


def test_gpt_oss_20b_is_estimated_below_14_gb() -> None:
    from transformers import GptOssConfig

    config = GptOssConfig(num_hidden_layers=24, num_local_experts=32, dtype="bfloat16")
    config.quantization_config = {"quant_method": "mxfp4"}
    estimate = estimate_config(config)
    assert estimate.scheme == MXFP4()
    assert estimate.parameters == pytest.approx(20.9e9, rel=0.01)
    assert 13e9 < estimate.total_bytes < 14e9


@pytest.mark.enable_socket
def test_a_checkpoint_on_the_hub_is_downloaded_and_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    twin = make_packed(tmp_path / "packed", "gpt_oss", "mxfp4")
    with FakeHub({"acme/packed": tmp_path / "packed"}) as hub:
        FakeHub.point_to(hub.url, monkeypatch)
        cache = {"cache_dir": str(tmp_path / "cache"), "local_files_only": False}
        found = load(dataclasses.replace(spec_of(tmp_path), model_id="acme/packed", **cache))
    assert difference(found.pipeline.model, twin) < 1e-5


def test_mxfp4_is_a_scheme_that_its_checkpoints_keep(tmp_path: Path) -> None:
    make_packed(tmp_path, "gpt_oss", "mxfp4")
    assert load(spec_of(tmp_path)).scheme == MXFP4()
    assert load(spec_of(tmp_path, scheme=MXFP4())).scheme == MXFP4()
    with pytest.raises(CheckpointError, match=r"already quantized \(mxfp4\), so it cannot be loaded as nf4"):
        load(spec_of(tmp_path, scheme=NF4()))


def test_an_unquantized_checkpoint_is_not_made_mxfp4_while_it_loads(tmp_path: Path) -> None:
    make_packed(tmp_path, "gpt_oss", "mxfp4")
    edit_json(tmp_path / "config.json", quantization_config=None)
    with pytest.raises(CheckpointError, match="mxfp4 is not made while loading"):
        load(spec_of(tmp_path, scheme=MXFP4()))


def test_weights_in_several_files_load(tmp_path: Path) -> None:
    twin = make_packed(tmp_path, "qwen3_moe", "gptq", attention=False)
    tensors = load_file(tmp_path / FILE)
    (tmp_path / FILE).unlink()
    names = sorted(tensors)
    places = {name: f"part-{i % 3}.safetensors" for i, name in enumerate(names)}
    for file in set(places.values()):
        save_file({n: tensors[n] for n in names if places[n] == file}, tmp_path / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": places}
    (tmp_path / f"{FILE}.index.json").write_text(json.dumps(index))
    assert difference(loaded(tmp_path), twin) < 1e-5


# Incomplete and hostile checkpoints.

EXPERT = "model.layers.1.mlp.experts.2"


def without(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: [tensors.pop(key) for key in list(tensors) if key.startswith(name)] and None


def replaced(name: str, function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({name: function(tensors[name]).contiguous()})


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        pytest.param(without(f"{EXPERT}."), ["lacks", "expert 2", "layers.1.mlp.experts"], id="expert"),
        pytest.param(without(f"{EXPERT}.up_proj."), ["lacks", "expert 2", "gate_up_proj"], id="layer"),
        pytest.param(without(f"{EXPERT}.up_proj.scales"), [f"{EXPERT}.up_proj.scales", "complete?"], id="scales"),
        pytest.param(
            replaced(f"{EXPERT}.down_proj.qweight", lambda t: t[:, :-8]),
            [f"{EXPERT}.down_proj.qweight", "(4, 120)", "(4, 128)"],
            id="outputs",
        ),
        pytest.param(
            replaced(f"{EXPERT}.down_proj.scales", lambda t: t.to(torch.int32)),
            [f"{EXPERT}.down_proj.scales", "int32"],
            id="dtype",
        ),
        pytest.param(replaced(f"{EXPERT}.down_proj.g_idx", lambda t: t + 7), ["g_idx", "group"], id="group"),
        pytest.param(replaced(f"{EXPERT}.down_proj.g_idx", lambda t: t - 7), ["g_idx", "group"], id="negative-group"),
        pytest.param(without("model.layers.1.mlp.experts"), ["model.layers.1.mlp.experts", "complete"], id="all"),
    ],
)
def test_an_incomplete_checkpoint_of_gptq_names_the_tensor(
    tmp_path: Path, edit: Callable[[dict[str, torch.Tensor]], None], words: list[str]
) -> None:
    make_packed(tmp_path, "qwen3_moe", "gptq", attention=False)
    change(tmp_path, edit)
    with pytest.raises(CheckpointError) as caught:
        load(spec_of(tmp_path))
    assert [word for word in words if word not in str(caught.value)] == []


GPT_OSS = "model.layers.1.mlp.experts"


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        pytest.param(without(f"{GPT_OSS}.down_proj_blocks"), ["down_proj"], id="blocks"),
        pytest.param(without(f"{GPT_OSS}.down_proj_scales"), ["down_proj_scales"], id="scales"),
        pytest.param(without(f"{GPT_OSS}.down_proj_bias"), ["down_proj_bias"], id="bias"),
        pytest.param(
            replaced(f"{GPT_OSS}.gate_up_proj_blocks", lambda t: t[..., :8]),
            ["gate_up_proj_blocks", "(4, 256, 4, 8)", "(4, 256, 4, 16)"],
            id="short-blocks",
        ),
        pytest.param(
            replaced(f"{GPT_OSS}.gate_up_proj_blocks", lambda t: t[:3]), ["(3, 256, 4, 16)"], id="fewer-experts"
        ),
        pytest.param(
            replaced(f"{GPT_OSS}.gate_up_proj_scales", lambda t: t.float()), ["gate_up_proj_scales"], id="float-scales"
        ),
    ],
)
def test_an_incomplete_checkpoint_of_mxfp4_names_the_tensor(
    tmp_path: Path, edit: Callable[[dict[str, torch.Tensor]], None], words: list[str]
) -> None:
    make_packed(tmp_path, "gpt_oss", "mxfp4")
    change(tmp_path, edit)
    with pytest.raises(CheckpointError) as caught:
        load(spec_of(tmp_path))
    assert [word for word in words if word not in str(caught.value)] == []


def test_a_config_that_says_mxfp4_of_plain_weights_is_an_error(tmp_path: Path) -> None:
    make_packed(tmp_path, "gpt_oss", "mxfp4")
    change(tmp_path, lambda tensors: [tensors.pop(name) for name in list(tensors) if "experts" in name] and None)
    with pytest.raises(CheckpointError, match="no packed experts"):
        load(spec_of(tmp_path))


def test_a_truncated_file_is_an_error(tmp_path: Path) -> None:
    make_packed(tmp_path, "gpt_oss", "mxfp4")
    content = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(content[: len(content) // 2])
    with pytest.raises(QuantLLMError):
        load(spec_of(tmp_path))


def test_more_experts_than_the_config_says_are_an_error(tmp_path: Path) -> None:
    make_packed(tmp_path, "qwen3_moe", "gptq", attention=False)
    edit_json(tmp_path / "config.json", num_experts=3, num_local_experts=3)
    with pytest.raises(CheckpointError, match=r"experts\.3\.gate_proj\.qweight'.*3 experts"):
        load(spec_of(tmp_path))


def test_a_config_that_says_a_huge_number_of_experts_takes_no_memory_for_them(tmp_path: Path) -> None:
    make_packed(tmp_path, "qwen3_moe", "gptq", attention=False)
    edit_json(tmp_path / "config.json", num_experts=10**7, num_local_experts=10**7)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match="lacks a packed layer of expert 4"):
            load(spec_of(tmp_path))
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()


def test_packed_experts_of_a_family_with_a_layout_of_its_own_are_refused(tmp_path: Path) -> None:
    make_packed(tmp_path, "qwen3_moe", "gptq", attention=False)
    from tests.support.mixtures import make_mixture

    make_mixture("llama4").save_pretrained(tmp_path / "llama4")
    config = json.loads((tmp_path / "llama4" / "config.json").read_text())
    own = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": own}))

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".mlp." in name]:
            tensors[name.replace(".mlp.", ".feed_forward.")] = tensors.pop(name)

    change(tmp_path, rename)
    with pytest.raises(UnsupportedError, match="layout of its own"):
        load(spec_of(tmp_path))


def test_unquantized_and_dense_checkpoints_have_no_packed_experts(tmp_path: Path) -> None:
    make_packed(tmp_path, "qwen3_moe", "gptq", attention=False)
    spec = spec_of(tmp_path)
    assert find_packed_experts(spec, find_checkpoint(spec)) is not None
    edit_json(tmp_path / "config.json", quantization_config=None)
    assert find_packed_experts(spec, find_checkpoint(spec)) is None


def test_the_experts_are_still_experts_for_the_engine(tmp_path: Path) -> None:
    make_packed(tmp_path, "mixtral", "gptq", attention=False)
    model = loaded(tmp_path)
    assert [name for name, module in model.named_modules() if is_experts(module)] == [
        "model.layers.0.mlp.experts",
        "model.layers.1.mlp.experts",
    ]

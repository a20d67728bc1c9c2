"""GPTQ checkpoints: their formats, their settings, their kernels, and the numbers after loading."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from langchain_quantllm import quantize
from langchain_quantllm.compat import gptqmodel_import
from langchain_quantllm.compat.gptqmodel import uncompile_gptq_model
from langchain_quantllm.errors import CheckpointError, InvalidOptionError, UnsupportedError
from langchain_quantllm.loading import gptq
from langchain_quantllm.schemes import GPTQ

# Not imported here: only `gptqmodel_imported()` imports it.
if importlib.util.find_spec("gptqmodel") is None:
    pytest.skip("gptqmodel is not installed", allow_module_level=True)
torch = pytest.importorskip("torch")

from tests.support.checkpoints import make_checkpoint  # noqa: E402
from tests.support.gptq_checkpoints import load_float_twin, make_gptq_checkpoint, packed_as, round_linear  # noqa: E402

PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def four_bit(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One block of SmolLM2 in 4 bits, with quantize_config.json and the old name of the weight file."""
    folder = tmp_path_factory.mktemp("gptq") / "old"
    yield make_gptq_checkpoint(smollm2, folder, layout="old_name", small=True)
    shutil.rmtree(folder)


def load(folder: Path, scheme: GPTQ | None = None, **options: Any) -> tuple[Any, dict[str, Any]]:
    """Load as the loader does; return the model and the loading info of transformers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    found = gptq.read_gptq_folder(folder)
    assert found is not None
    sizes = gptq.read_layer_sizes(sorted(folder.glob("*.safetensors")), found.quantization_config)
    config = AutoConfig.from_pretrained(folder)
    config.quantization_config = gptq.check_gptq(found.quantization_config, scheme or GPTQ(), "cpu", sizes)
    if found.weights_name is not None:
        config.transformers_weights = found.weights_name
    with gptqmodel_import.gptqmodel_imported():
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, config=config, device_map="cpu", dtype=torch.bfloat16, output_loading_info=True, **options
        )
        uncompile_gptq_model(model)
    return model, info


def relative_error(model: Any, twin: Any) -> float:
    """Return the relative error of the logits of 40 tokens."""
    ids = torch.arange(100, 140)[None]
    with torch.no_grad():
        logits, expected = model(ids).logits.float(), twin(ids).logits
    return float((logits - expected).norm() / expected.norm())


# The packed format.


def test_v1_stores_zero_points_one_too_small() -> None:
    rounded = round_linear(torch.randn(32, 64), bits=4, group_size=32, desc_act=False, sym=True)
    assert packed_as(rounded, "gptq")["qzeros"].view(torch.uint8).unique().tolist() == [0x77]
    assert packed_as(rounded, "gptq_v2")["qzeros"].view(torch.uint8).unique().tolist() == [0x88]


# Numbers after loading.


@pytest.mark.parametrize(
    ("bits", "group_size", "sym", "desc_act", "kernel", "runs"),
    [
        (4, 64, True, False, "auto", "TorchAtenLinear"),
        (4, 32, False, True, "auto", "TorchAtenLinear"),
        (4, 64, False, False, "torch", "TorchLinear"),
        (4, 64, True, True, "torch_fused", "TorchFusedLinear"),
        (4, -1, True, False, "auto", "TorchLinear"),  # gptqmodel's own choice fails in the forward pass
        (4, 128, True, True, "auto", "TorchLinear"),  # 128 does not divide 576: gptqmodel's choice fails
        (8, 64, True, False, "auto", "TorchInt8Linear"),
        (8, 64, False, True, "auto", "TorchInt8Linear"),
        (8, 64, False, True, "gptq_torch", "TorchLinear"),
        (3, 64, True, True, "auto", "TorchLinear"),
        (3, -1, False, False, "auto", "TorchLinear"),
        (2, 64, False, False, "auto", "TorchLinear"),
        (2, 32, True, True, "auto", "TorchLinear"),
    ],
)
def test_logits_are_those_of_the_dequantized_weights(
    smollm2: Path, tmp_path: Path, bits: int, group_size: int, sym: bool, desc_act: bool, kernel: str, runs: str
) -> None:
    options: dict[str, Any] = {"bits": bits, "group_size": group_size, "sym": sym, "desc_act": desc_act}
    folder = make_gptq_checkpoint(smollm2, tmp_path, small=True, **options)
    model, info = load(folder, GPTQ(bits=bits, kernel=kernel))
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert uncompile_gptq_model(model) == runs
    # bfloat16 holds 8 bits, so each rounding errs by up to 2**-9 = 0.002 of its value; a block rounds a dozen times.
    # Measured: 0.003 to 0.005, 0.008 for torch_int8. A zero point off by one, or a wrong order of groups, gives 0.5.
    assert relative_error(model, load_float_twin(smollm2, small=True, **options)) < 0.012


@pytest.mark.parametrize("layout", ["config", "quantize_config", "old_name"])
@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
@pytest.mark.compat
def test_every_layout_loads(smollm2: Path, tmp_path: Path, layout: Any, checkpoint_format: Any) -> None:
    """Where transformers sees no config, it silently makes random weights, whose error would be 1."""
    folder = make_gptq_checkpoint(smollm2, tmp_path, layout=layout, checkpoint_format=checkpoint_format, small=True)
    model, info = load(folder)
    assert not info["missing_keys"]
    assert relative_error(model, load_float_twin(smollm2, small=True)) < 0.012


def test_sharded_old_names_load(smollm2: Path, tmp_path: Path, four_bit: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "sharded"
    shutil.copytree(four_bit, folder)
    base = "gptq_model-4bit-64g"
    tensors = load_file(folder / f"{base}.safetensors")
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for i, part in enumerate((names[::2], names[1::2]), 1):
        shard = f"{base}-{i:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, shard)
    (folder / f"{base}.safetensors").unlink()
    (folder / f"{base}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    model, info = load(folder)
    assert not info["missing_keys"]
    assert relative_error(model, load_float_twin(smollm2, small=True)) < 0.012


@pytest.mark.parametrize("bits", [4, pytest.param(8, marks=pytest.mark.slow)])
def test_greedy_text_is_sensible(smollm2: Path, tmp_path: Path, bits: int) -> None:
    from transformers import AutoTokenizer

    model, _ = load(make_gptq_checkpoint(smollm2, tmp_path, bits=bits))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    encoded = tokenizer(PROMPT, return_tensors="pt")
    out = model.generate(**encoded, max_new_tokens=4, do_sample=False)
    assert tokenizer.decode(out[0][encoded.input_ids.shape[1] :]).startswith(" Paris")


# Settings.


def write(folder: Path, **files: Any) -> Path:
    """Write JSON files, each named by a keyword."""
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_a_checkpoint_without_gptq_is_none(smollm2: Path, tmp_path: Path) -> None:
    assert gptq.read_gptq_folder(smollm2) is None
    awq = write(tmp_path, config={"quantization_config": {"quant_method": "awq", "bits": 4}})
    assert gptq.read_gptq_folder(awq) is None
    other = write(tmp_path, config={}, quantize_config={"per_channel": True})  # of transformers.js
    assert gptq.read_gptq_folder(other) is None


def test_only_small_files_are_fetched(four_bit: Path) -> None:
    fetched = []

    def fetch(name: str) -> Path:
        fetched.append(name)
        return four_bit / name

    found = gptq.read_gptq_checkpoint(os.listdir(four_bit), fetch)
    assert found is not None
    assert found.weights_name == "gptq_model-4bit-64g.safetensors"
    assert found.found_in == "quantize_config.json"
    assert fetched == ["config.json", "quantize_config.json"]


def test_what_transformers_would_warn_about_is_left_out(tmp_path: Path) -> None:
    config = {"bits": 4, "desc_act": True, "dataset": ["private text"], "tokenizer": "x", "damp_percent": 0}
    (tmp_path / "model.safetensors").touch()
    found = gptq.read_gptq_folder(write(tmp_path, quantize_config=config))
    assert found is not None
    assert found.quantization_config["act_group_aware"] is False
    assert not {"dataset", "tokenizer", "damp_percent"} & set(found.quantization_config)
    assert found.quantization_config["quant_method"] == "gptq"
    assert found.quantization_config["group_size"] == 128


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        (["model.safetensors", "gptq_model-4bit-128g.safetensors"], None),
        (["model.safetensors.index.json"], None),
        (["gptq_model-4bit-128g.safetensors", "other.safetensors"], "gptq_model-4bit-128g.safetensors"),
        (["named.safetensors", "other.safetensors"], "named.safetensors"),
        (["wizard-4bit-128g.act.order.safetensors", "x.bin"], "wizard-4bit-128g.act.order.safetensors"),
    ],
)
def test_weight_file_names(tmp_path: Path, weights: list[str], expected: str | None) -> None:
    write(tmp_path, quantize_config={"bits": 4, "group_size": 128, "model_file_base_name": "named"})
    for name in weights:
        (tmp_path / name).touch()
    found = gptq.read_gptq_folder(tmp_path)
    assert found is not None
    assert found.weights_name == expected


@pytest.mark.parametrize(
    ("content", "files", "words"),
    [
        ({"bits": 5}, ["model.safetensors"], "bits=5 in quantize_config.json is not known to GPTQ"),
        ({"bits": 4, "group_size": 0}, ["model.safetensors"], "group_size=0"),
        ({"bits": 4, "checkpoint_format": "marlin"}, ["model.safetensors"], "checkpoint_format='marlin'"),
        ({"bits": 4, "is_marlin_format": True}, ["model.safetensors"], "checkpoint_format='marlin'"),
        ({"bits": 4, "dynamic": ["-:.*"]}, ["model.safetensors"], "must be an object of rules"),
        ({"bits": 4, "dynamic": {"-:(": {}}}, ["model.safetensors"], "'-:(' of the checkpoint's dynamic is no"),
        ({"bits": 4, "dynamic": {".*": {"bits": 5}}}, ["model.safetensors"], "sets bits=5; bits are one of 2, 3, 4, 8"),
        ({"bits": 4, "dynamic": {".*": {"format": "gptq_v2"}}}, ["model.safetensors"], "sets format='gptq_v2'"),
        ({"bits": 4, "lm_head": True}, ["model.safetensors"], "a quantized output head"),
        ({"bits": 4}, ["gptq_model-4bit-128g.pt"], "pickled, in gptq_model-4bit-128g.pt"),
        ({"bits": 4}, ["gptq_model-4bit-128g.bin"], "only safetensors are read"),
        ({"bits": 4}, ["a.safetensors", "b.safetensors"], "Several weight files, a.safetensors, b.safetensors"),
        ({"bits": 4}, [], "No weight file among quantize_config.json"),
        (["bits"], [], "not hold a JSON object"),
    ],
)
def test_unreadable_checkpoints_are_refused_in_words(
    tmp_path: Path, content: Any, files: list[str], words: str
) -> None:
    write(tmp_path, quantize_config=content)
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError) as caught:
        gptq.read_gptq_folder(tmp_path)
    assert words in str(caught.value)


def test_broken_json_is_refused_in_words(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="is not JSON"):
        gptq.read_gptq_folder(tmp_path)


# Layers.


def test_layer_sizes(four_bit: Path) -> None:
    weights = list(four_bit.glob("*.safetensors"))
    config = {"bits": 4, "group_size": 64}
    sizes = gptq.read_layer_sizes(weights, config)
    assert len(sizes) == 7
    assert sizes["model.layers.0.mlp.down_proj"] == (1536, 576)
    with pytest.raises(CheckpointError, match="is packed in 4 bits, but the config says bits=8"):
        gptq.read_layer_sizes(weights, {**config, "bits": 8})
    with pytest.raises(CheckpointError, match=r"has \d+ groups of scales for in_features=\d+, .*group_size=32"):
        gptq.read_layer_sizes(weights, {**config, "group_size": 32})


def test_a_cut_off_file_is_refused_in_words(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    for content in (b"", b"version https://git-lfs", b"\x08\0\0\0\0\0\0\0[1, 2, 3"):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="is not a safetensors file"):
            gptq.read_layer_sizes([path], {"bits": 4, "group_size": 64})


# Checks before loading.

CONFIG = {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": 64,
    "sym": True,
    "desc_act": False,
    "checkpoint_format": "gptq",
}


@pytest.mark.parametrize(
    ("scheme", "changes", "error", "words"),
    [
        (GPTQ(bits=8), {}, CheckpointError, "asks for GPTQ with bits=8, but the checkpoint has bits=4"),
        (GPTQ(kernel="marlyn"), {}, InvalidOptionError, "did you mean 'marlin'?"),
        (GPTQ(kernel="exllamav2"), {}, InvalidOptionError, "did you mean 'exllama_v2'?"),
        (GPTQ(kernel="marlin"), {}, UnsupportedError, "'marlin' cannot run this checkpoint (4 bits, group_size=64"),
        (GPTQ(kernel="marlin"), {}, UnsupportedError, "on cpu: it runs on cuda; use kernel='auto'"),
        (GPTQ(kernel="exllama_v2"), {"bits": 8}, UnsupportedError, "it takes bits 4"),
        (GPTQ(kernel="gptq_triton"), {}, UnsupportedError, "it runs on cuda"),
        (GPTQ(kernel="torch_aten"), {"group_size": -1}, UnsupportedError, "takes group_size 32, 64 or 128"),
        (GPTQ(kernel="torch_int8"), {"bits": 3}, UnsupportedError, "it takes bits 2, 4, 8"),
        (GPTQ(), {"group_size": 48}, UnsupportedError, "it takes group sizes -1, 16, 32"),
    ],
)
def test_checks_say_what_is_wrong(scheme: GPTQ, changes: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error) as caught:
        gptq.check_gptq({**CONFIG, **changes}, scheme, "cpu")
    assert words in str(caught.value)


def test_an_uneven_group_size_is_refused_for_kernels_that_cannot() -> None:
    sizes = {"model.layers.0.mlp.down_proj": (1536, 576), "model.layers.0.self_attn.q_proj": (576, 576)}
    config = {**CONFIG, "group_size": 128}
    with pytest.raises(UnsupportedError, match=r"128 does not divide in_features=576 of layer '.*q_proj'"):
        gptq.check_gptq(config, GPTQ(kernel="torch_aten"), "cpu", sizes)
    assert gptq.check_gptq(config, GPTQ(), "cpu", sizes)["backend"] == "gptq_torch"


def test_outputs_that_torch_s_int4_product_does_not_take_run_by_another_kernel(tmp_path: Path) -> None:
    sizes = {"model.layers.0.mlp.up_proj": (64, 128), "model.layers.0.self_attn.k_proj": (64, 24)}
    assert gptq.check_gptq(CONFIG, GPTQ(), "cpu", sizes)["backend"] == "gptq_torch"
    with pytest.raises(UnsupportedError, match=r"multiples of 16 on the CPU, not 24 of layer '.*k_proj'; use kernel"):
        gptq.check_gptq(CONFIG, GPTQ(kernel="torch_aten"), "cpu", sizes)
    source = make_checkpoint(tmp_path / "own", num_attention_heads=4, num_key_value_heads=1, head_dim=24)
    written = quantize(source, GPTQ(group_size=32), method="rtn", output=tmp_path / "packed", progress=False)
    model, _ = load(written.folder)
    with torch.no_grad():
        assert model(torch.tensor([[5, 7]])).logits.isfinite().all()


def test_the_config_is_not_changed() -> None:
    before = dict(CONFIG)
    assert gptq.check_gptq(CONFIG, GPTQ(kernel="TORCH"), "cpu") == {**before, "backend": "gptq_torch"}
    assert before == CONFIG

"""Whole GPTQ and bitsandbytes checkpoints: their content, interrupted runs, refused options."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from langchain_quantllm import FP4, GPTQ, NF4, SCHEMES, Calibration, Int8, QuantizedHuggingFaceLLM, quantize
from langchain_quantllm.errors import CheckpointError, InvalidOptionError, ModelNotFoundError, UnsupportedError
from langchain_quantllm.quantization.gptq import Progress
from langchain_quantllm.quantization.packing import TENSORS, RoundedLinear
from langchain_quantllm.quantization.solver import solve
from tests.support import families
from tests.support.checkpoints import spoil_weights
from tests.support.quantization import TEXTS, rounding
from tests.support.selection import skip_without_gptqmodel, slow_but
from tests.support.torch_settings import FEW, STATES


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> Path:
    """A random Llama of three blocks with SmolLM2's tokenizer, in bfloat16."""
    folder = tmp_path_factory.mktemp("plain") / "model"
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    family = families.FAST["llama-grouped"]
    options = {**family.options, "vocab_size": len(tokenizer), "num_hidden_layers": 3, "intermediate_size": 192}
    model = families.family_model(families.Family(config=family.config, options=options, gain=0.1))
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run(plain: Path, output: Path, scheme: Any = GPTQ(bits=4, group_size=32), **options: Any) -> Any:  # noqa: B008
    given = {"calibration": Calibration(source=TEXTS, tokens=16), "progress": False, "device": "cpu"}
    return quantize(plain, scheme, output=output, **{**given, **options})


@pytest.mark.parametrize(
    ("scheme", "group_size"),
    [
        (GPTQ(bits=4, group_size=32), 32),
        (GPTQ(bits=4, sym=False, desc_act=True), 64),
        pytest.param(GPTQ(bits=8, group_size=-1), -1, marks=pytest.mark.slow),
        (GPTQ(bits=3, group_size=16, sym=False), 16),
        pytest.param(GPTQ(bits=2, group_size=16, sym=False), 16, marks=pytest.mark.slow),
        ("gptq", 64),
    ],
)
@pytest.mark.compat
def test_a_written_checkpoint_computes_with_its_dequantized_weights(
    plain: Path, tmp_path: Path, scheme: Any, group_size: int
) -> None:
    skip_without_gptqmodel()
    done = run(plain, tmp_path / "out", scheme)
    assert done.folder == tmp_path / "out"
    assert done.scheme.group_size == group_size  # the largest that divides 64 and 192
    bits = done.scheme.bits
    config = json.loads((done.folder / "config.json").read_text())["quantization_config"]
    assert (config["bits"], config["group_size"]) == (bits, group_size)
    tensors = load_file(done.folder / "model.safetensors")
    twin = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    for name, module in twin.named_modules():
        if f"{name}.qweight" in tensors:
            packed = {key: tensors[f"{name}.{key}"] for key in TENSORS}
            module.weight.data.copy_(RoundedLinear.unpack(packed, bits).dequantize())
    assert sum(name.endswith("qweight") for name in tensors) == 21
    llm = QuantizedHuggingFaceLLM(model_id=str(done.folder), dtype="float32", progress=False, device="cpu")
    ids = torch.tensor([families.random_ids(30)])
    with torch.no_grad():
        found, expected = llm.pipeline.model(ids).logits, twin(ids).logits
    # Its kernels on the CPU compute in bfloat16, or with activations of 8 bits for 8-bit weights.
    assert (found - expected).norm() < 0.03 * expected.norm()
    llm.unload()


@pytest.mark.parametrize("state", slow_but(["inference mode", "autocast"], [*FEW, "autocast"]))
def test_what_the_caller_has_set_in_torch_changes_no_weight(plain: Path, tmp_path: Path, state: str) -> None:
    expected = load_file(run(plain, tmp_path / "expected").folder / "model.safetensors")
    with STATES[state]():
        done = run(plain, tmp_path / "out")
    found = load_file(done.folder / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_no_text_of_the_calibration_is_written(plain: Path, tmp_path: Path) -> None:
    done = run(plain, tmp_path / "out")
    assert done.calibration == "3 texts, up to 128 x 16 tokens"
    assert done.calibration_tokens == 48
    for path in done.folder.iterdir():
        content = path.read_bytes()
        assert not any(text[:30].encode() in content for text in TEXTS), path.name
    assert json.loads((done.folder / "config.json").read_text())["quantization_config"]["meta"]["calibration_tokens"]
    assert not list(tmp_path.glob("*.partial"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_an_interrupted_run_resumes_after_its_finished_blocks(plain: Path, tmp_path: Path) -> None:
    whole = run(plain, tmp_path / "whole")

    def stop(progress: Progress) -> None:
        if progress.done == 2:
            raise KeyboardInterrupt

    output = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(plain, output, report=stop)
    assert not output.exists()
    assert len(list((tmp_path / "out.partial").glob("block-*.safetensors"))) == 2
    (tmp_path / "out.partial" / "block-0001.safetensors").write_bytes(b"torn")  # by a power cut, say
    with pytest.raises(InvalidOptionError, match="with other settings"):
        run(plain, output, GPTQ(bits=8, group_size=32))
    seen: list[Progress] = []
    again = run(plain, output, report=seen.append)
    assert again.resumed_blocks == 1
    assert [(p.done, p.total, p.resumed) for p in seen] == [(1, 3, 1), (2, 3, 1), (3, 3, 1)]
    assert seen[0].remaining_s is None
    assert seen[-1].remaining_s == 0
    one, two = (load_file(folder / "model.safetensors") for folder in (whole.folder, again.folder))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not (tmp_path / "out.partial").exists()


def test_skipped_layers_stay_unquantized(plain: Path, tmp_path: Path) -> None:
    done = run(plain, tmp_path / "out", skip_modules=["mlp.down_proj"])
    before, after = (load_file(folder / "model.safetensors") for folder in (plain, done.folder))
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(before[name], after[name])
    llm = QuantizedHuggingFaceLLM(model_id=str(done.folder), progress=False, device="cpu", max_new_tokens=4)
    assert type(llm.pipeline.model.model.layers[0].mlp.down_proj) is torch.nn.Linear
    assert type(llm.pipeline.model.model.layers[0].mlp.up_proj) is not torch.nn.Linear
    assert llm.invoke("one two")
    llm.unload()


def test_rounding_to_nearest_needs_no_text(plain: Path, tmp_path: Path) -> None:
    done = run(plain, tmp_path / "out", calibration="none")
    assert (done.calibration, done.calibration_tokens) == ("none", 0)
    weight = load_file(plain / "model.safetensors")["model.layers.2.mlp.up_proj.weight"]
    tensors = load_file(done.folder / "model.safetensors")
    packed = {key: tensors[f"model.layers.2.mlp.up_proj.{key}"] for key in TENSORS}
    how = rounding(group_size=32)
    assert torch.equal(RoundedLinear.unpack(packed, 4).codes, solve(weight, None, how).codes)


def test_an_output_takes_its_place_only_when_it_is_complete(plain: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "config.json").write_text("data")
    with pytest.raises(InvalidOptionError, match="is not empty"):
        run(plain, output)
    with pytest.raises(ZeroDivisionError):
        run(plain, output, overwrite=True, report=lambda p: p.done // 0)
    assert (output / "config.json").read_text() == "data"
    run(plain, output, overwrite=True)
    assert json.loads((output / "config.json").read_text())["model_type"] == "llama"


@pytest.mark.parametrize(
    ("scheme", "options", "error", "words"),
    [
        (GPTQ(bits=4, group_size=48), {}, InvalidOptionError, ["group_size=48", "in_features=64", "16, 32, 64, -1"]),
        (GPTQ(bits=4, kernel="torch"), {}, InvalidOptionError, ["kernel='torch'", "while loading"]),
        ("gptq", {"skip_modules": ["mlp.gate"]}, InvalidOptionError, ["'mlp.gate'", "mlp.gate_proj"]),
        ("gptq", {"skip_modules": "mlp.gate"}, InvalidOptionError, ["'mlp.gate'", "mlp.gate_proj"]),
        ("gptq", {"damping": 0}, InvalidOptionError, ["damping=0", "between 0 and 1"]),
        ("gptq", {"damping": "low"}, InvalidOptionError, ["damping='low'", "between 0 and 1"]),
        ("gptq", {"device": "cuda:99"}, UnsupportedError, ["device='cuda:99'", "use 'cpu'"]),
        ("gptq", {"dtype": "float32"}, InvalidOptionError, ["float32", "float16"]),
        ("gptq", {"calibration": Calibration(source=TEXTS, tokens=9999)}, InvalidOptionError, ["9999", "512"]),
        ("gptq", {"calibration": ["a"]}, InvalidOptionError, ["tokens", "a few sentences"]),
        ("none", {"calibration": None}, InvalidOptionError, ["'none' cannot be written", "'nf4'"]),
        ("gtpq", {}, InvalidOptionError, ["did you mean 'gptq'?"]),
        ("nf4", {}, InvalidOptionError, ["calibration is for GPTQ", "'nf4'"]),
        ("int8", {"calibration": None, "skip_modules": ["x"]}, InvalidOptionError, ["skip_modules is for GPTQ"]),
    ],
)
def test_wrong_options_are_refused_before_anything_is_written(
    plain: Path, tmp_path: Path, scheme: Any, options: dict[str, Any], error: type[Exception], words: list[str]
) -> None:
    with pytest.raises(error) as caught:
        run(plain, tmp_path / "out", scheme, **options)
    for word in words:
        assert word in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_sizes_that_cannot_be_packed_are_refused_before_weights_are_read(plain: Path, tmp_path: Path) -> None:
    odd = shutil.copytree(plain, tmp_path / "odd")
    config = json.loads((odd / "config.json").read_text())
    (odd / "config.json").write_text(json.dumps({**config, "intermediate_size": 100}))
    (odd / "model.safetensors").unlink()  # so nobody has read any
    with pytest.raises(InvalidOptionError, match="group_size=64 does not divide in_features=100"):
        run(odd, tmp_path / "out", GPTQ(group_size=64))
    with pytest.raises(InvalidOptionError, match="out_features=100 of layer 'model.layers.0.mlp.gate_proj' cannot be"):
        run(odd, tmp_path / "out", GPTQ(bits=4, group_size=-1))


def test_a_calibration_is_refused_before_weights_are_read(plain: Path, tmp_path: Path) -> None:
    folder = spoil_weights(shutil.copytree(plain, tmp_path / "model"))
    with pytest.raises(InvalidOptionError, match="the calibration has .* tokens; give at least a few sentences"):
        run(folder, tmp_path / "out", calibration=["One."])
    assert not (tmp_path / "out").exists()


def test_quantized_and_missing_checkpoints_are_refused(plain: Path, tmp_path: Path) -> None:
    done = run(plain, tmp_path / "out")
    with pytest.raises(CheckpointError, match="is quantized already"):
        run(done.folder, tmp_path / "again")
    with pytest.raises(ModelNotFoundError):
        run(tmp_path / "nowhere", tmp_path / "again")
    with pytest.raises(InvalidOptionError, match="is .*, one of the sources"):
        run(plain, plain, overwrite=True)


# --- every scheme: written, loaded in a new process, the same tokens ---

_NEW_PROCESS = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from langchain_quantllm import QuantizedHuggingFaceLLM
from langchain_quantllm.compat.gptqmodel_import import gptqmodel_imported

found = {}
for folder in sys.argv[2:]:
    llm = QuantizedHuggingFaceLLM(model_id=folder, device="cpu", max_new_tokens=12, engine="pipeline", progress=False)
    ours = llm.invoke(sys.argv[1])
    llm.unload()
    with gptqmodel_imported():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", dtype=torch.bfloat16)
        ids = tokenizer(sys.argv[1], return_tensors="pt")
        with torch.no_grad():
            out = model.generate(**ids, max_new_tokens=12, do_sample=False)
    plain = tokenizer.decode(out[0, ids["input_ids"].shape[1]:], skip_special_tokens=True)
    found[folder] = [ours, plain]
print("FOUND" + json.dumps(found))
"""


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(("nf4",), marks=pytest.mark.compat),
        pytest.param(
            tuple(name for name in SCHEMES if name not in ("none", "mxfp4")), marks=pytest.mark.slow, id="every"
        ),
    ],
)
def test_every_scheme_is_saved_and_loaded_in_a_new_process(plain: Path, tmp_path: Path, names: tuple[str, ...]) -> None:
    """Ours and plain transformers read the same tokens out of each of them."""
    skip_without_gptqmodel()
    prompt = "The capital of France is"
    expected: dict[str, str] = {}
    for name in names:
        folder = tmp_path / name
        options: dict[str, Any] = {"progress": False, "device": "cpu"}
        if name in ("gptq", "awq"):
            run(plain, folder, name)
            expected[str(folder)] = ""
            continue
        assert isinstance(SCHEMES[name], Int8 | NF4 | FP4)
        quantize(plain, name, output=folder, **options)
        llm = QuantizedHuggingFaceLLM(
            model_id=str(plain), quantization=name, device="cpu", max_new_tokens=12, engine="pipeline", progress=False
        )
        expected[str(folder)] = llm.invoke(prompt)
        llm.unload()
    command = [sys.executable, "-c", _NEW_PROCESS, prompt, *expected]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.partition("FOUND")[2])
    for folder, (ours, theirs) in found.items():
        assert ours == theirs, folder
        assert expected[folder] in ("", ours), folder

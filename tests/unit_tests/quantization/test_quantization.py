"""Making GPTQ and bitsandbytes checkpoints: the arithmetic, the walk through the blocks, and what is written."""

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
from langchain_quantllm.quantization.blocks import Blocks, find_layout
from langchain_quantllm.quantization.calibration import read_texts, sequences
from langchain_quantllm.quantization.gptq import Progress
from langchain_quantllm.quantization.packing import TENSORS, RoundedLinear, pack_bits, unpack_bits
from langchain_quantllm.quantization.solver import InputStatistics, Rounding, solve
from tests.support import families
from tests.support.selection import skip_without_gptqmodel

TEXTS = [
    "The river had risen in the night, and the bridge stood in brown water up to its rails.",
    "A function that calls itself needs a case in which it does not.",
    "Bread needs flour, water, salt and time; of these, time is what most people leave out.",
]


def rounding(**options: Any) -> Rounding:
    given: dict[str, Any] = {"bits": 4, "group_size": 32, "sym": True, "desc_act": False, "damping": 0.01}
    return Rounding(**{**given, **options})


def correlated_inputs(seed: int = 0, tokens: int = 512, features: int = 128) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(tokens, features, generator=generator) @ torch.randn(features, features, generator=generator)
    return mixed * torch.rand(features, generator=generator)


def statistics_of(inputs: torch.Tensor) -> InputStatistics:
    statistics = InputStatistics(inputs.shape[-1], "cpu")
    for part in inputs.split(100):
        statistics.add(part)
    return statistics


# --- the packed format ---


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_are_packed_as_one_stream_of_bits(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (6, 96), dtype=torch.uint8, generator=generator)
    words = pack_bits(codes, bits)
    for row, packed in zip(codes.tolist(), words.tolist(), strict=True):
        stream = sum(code << bits * i for i, code in enumerate(row))  # the first code in the lowest bits
        assert sum((word % 2**32) << 32 * i for i, word in enumerate(packed)) == stream
    assert torch.equal(unpack_bits(words, bits), codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
def test_a_packed_layer_is_read_back(bits: int, sym: bool) -> None:
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    rounded = solve(weight, statistics_of(correlated_inputs()), rounding(bits=bits, sym=sym, desc_act=True))
    again = RoundedLinear.unpack(rounded.pack(), bits)
    assert torch.equal(again.dequantize(), rounded.dequantize())
    assert torch.equal(again.zeros, rounded.zeros)


# --- the arithmetic ---


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("desc_act", [True, False])
@pytest.mark.parametrize("group_size", [32, -1, 256])
def test_outputs_change_less_than_by_rounding_to_nearest(bits: int, sym: bool, desc_act: bool, group_size: int) -> None:
    inputs = correlated_inputs(features=256)
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    how = rounding(bits=bits, sym=sym, desc_act=desc_act, group_size=group_size)

    def error(statistics: InputStatistics | None) -> float:
        rounded = solve(weight, statistics, how).dequantize()
        return float((inputs @ (rounded - weight).t()).norm() / (inputs @ weight.t()).norm())

    assert error(statistics_of(inputs)) < 0.8 * error(None)


def test_without_inputs_each_weight_is_rounded_to_its_nearest_code() -> None:
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(2))
    rounded = solve(weight, None, rounding(sym=False))
    scales = rounded.scales.float()[rounded.g_idx.long()].t()
    zeros = rounded.zeros.float()[rounded.g_idx.long()].t()
    nearest = ((weight / scales + zeros).round().clamp(0, 15) - zeros) * scales
    assert torch.allclose(rounded.dequantize(), nearest)
    assert torch.equal(solve(weight, InputStatistics(64, "cpu"), rounding(sym=False)).codes, rounded.codes)


def test_weights_that_are_codes_already_stay_as_they_are() -> None:
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(0, 16, (128, 64), generator=generator).float()
    codes[::32], codes[1::32] = 0, 15  # so that every group has the whole range
    weight = ((codes - 8) * 0.0625).t()
    rounded = solve(weight, statistics_of(correlated_inputs()), rounding(sym=False))
    assert torch.allclose(rounded.dequantize(), weight, atol=1e-6)


def test_scales_are_numbers_of_both_dtypes_of_16_bits() -> None:
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(4))
    scales = solve(weight, statistics_of(correlated_inputs()), rounding()).scales
    assert scales.dtype == torch.float16
    assert torch.equal(scales.bfloat16().half(), scales)


def test_groups_of_neighbours_unless_ordered_by_activation() -> None:
    inputs = correlated_inputs()
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(5))
    in_order = torch.arange(128, dtype=torch.int32) // 32
    assert torch.equal(solve(weight, statistics_of(inputs), rounding()).g_idx, in_order)
    by_size = solve(weight, statistics_of(inputs), rounding(desc_act=True)).g_idx
    sizes = statistics_of(inputs).hessian.diagonal()
    assert sizes[by_size == 0].min() >= sizes[by_size == 1].max()


def test_inputs_that_never_came_leave_their_weights_at_the_nearest_code() -> None:
    inputs = correlated_inputs()
    inputs[:, 40:60] = 0
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(6))
    rounded = solve(weight, statistics_of(inputs), rounding())
    scales = rounded.scales.float()[rounded.g_idx.long()].t()
    error = (rounded.dequantize() - weight).abs()[:, 40:60]
    clipped = ((weight / scales + 8).round() != (weight / scales + 8).round().clamp(0, 15))[:, 40:60]
    assert (error[~clipped] <= 0.501 * scales[:, 40:60][~clipped]).all()


def test_statistics_do_not_depend_on_how_the_inputs_are_cut() -> None:
    inputs = correlated_inputs()
    whole = InputStatistics(128, "cpu")
    whole.add(inputs.view(4, 128, 128))
    assert torch.allclose(whole.hessian, statistics_of(inputs).hessian, rtol=1e-4, atol=1e-3)
    assert torch.allclose(whole.hessian, 2 * inputs.t() @ inputs / len(inputs), rtol=1e-4, atol=1e-3)


def test_inputs_of_one_direction_are_damped_until_they_can_be_used() -> None:
    inputs = torch.randn(300, 1, generator=torch.Generator().manual_seed(7)) @ torch.ones(1, 128)
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(8))
    rounded = solve(weight, statistics_of(inputs), rounding(damping=1e-12)).dequantize()
    assert rounded.isfinite().all()
    nearest = solve(weight, None, rounding()).dequantize()
    assert (inputs @ (rounded - weight).t()).norm() < (inputs @ (nearest - weight).t()).norm()


# --- the blocks ---


@pytest.mark.parametrize("name", [n for n in families.FAST if "gpt2" not in n and "bigcode" not in n])
def test_blocks_one_by_one_give_what_the_model_gives(name: str) -> None:
    model = families.family_model(families.FAST[name])
    layout = find_layout(model)
    ids = [families.random_ids(40, seed=seed) for seed in range(3)]
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(layout.prefix)[-1].register_forward_hook(
        lambda _, __, output: seen.append(output[0] if isinstance(output, tuple) else output)
    )
    with torch.no_grad():
        model(input_ids=torch.tensor(ids), use_cache=False)
    handle.remove()
    blocks = Blocks(model, layout, ids, "cpu")
    for index in range(layout.count):
        blocks.advance(index)
    assert torch.allclose(torch.cat(blocks.states), seen[0], rtol=1e-4, atol=1e-4)


def test_layers_of_one_input_are_found_in_the_order_of_use() -> None:
    model = families.family_model(families.FAST["qwen3"])
    layout = find_layout(model)
    blocks = Blocks(model, layout, [families.random_ids(20)], "cpu")
    assert blocks.groups(0, layout.layers[0]) == [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        ["self_attn.o_proj"],
        ["mlp.gate_proj", "mlp.up_proj"],
        ["mlp.down_proj"],
    ]


def test_layers_see_what_the_model_gives_them() -> None:
    model = families.family_model(families.FAST["llama"])
    layout = find_layout(model)
    ids = [families.random_ids(20, seed=seed) for seed in range(2)]
    expected: list[torch.Tensor] = []
    layer = model.model.layers[1].mlp.down_proj
    handle = layer.register_forward_pre_hook(lambda _, args: expected.append(args[0]))
    with torch.no_grad():
        model(input_ids=torch.tensor(ids), use_cache=False)
    handle.remove()
    blocks = Blocks(model, layout, ids, "cpu")
    blocks.advance(0)
    seen: list[torch.Tensor] = []
    blocks.observe(1, ["mlp.down_proj"], seen.append)
    assert torch.allclose(torch.cat(seen), torch.cat(expected), atol=1e-5)
    assert not layer._forward_pre_hooks


def test_a_model_without_linear_layers_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="have no torch.nn.Linear"):
        find_layout(families.family_model(families.FAST["gpt2"]))


# --- calibration ---


@pytest.mark.parametrize("suffix", ["txt", "json", "jsonl"])
def test_texts_come_from_files(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"texts.{suffix}"
    rows = [{"text": text, "other": 1} for text in TEXTS]
    path.write_text(
        {
            "txt": "\n---\n".join(TEXTS),
            "json": json.dumps(TEXTS),
            "jsonl": "\n".join(json.dumps(row) for row in rows),
        }[suffix]
    )
    assert read_texts(Calibration(source=str(path))) == TEXTS
    assert read_texts(Calibration(source=path)) == TEXTS


def test_texts_come_from_data_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.jsonl").write_text("\n".join(json.dumps({"body": text}) for text in TEXTS))
    assert read_texts(Calibration(source=str(folder), column="body")) == TEXTS
    with pytest.raises(InvalidOptionError, match="has no column 'text'; its columns are 'body'"):
        read_texts(Calibration(source=str(folder)))


def test_the_built_in_text_is_there_and_is_not_the_one_that_is_measured_with() -> None:
    from langchain_quantllm.bench.quality import evaluation_text

    texts = read_texts(Calibration())
    assert len(texts) > 50
    measured = evaluation_text()
    lines = [line for text in texts for line in text.splitlines() if len(line) > 40]
    assert len(lines) > 200
    assert not [line for line in lines if line in measured]


def test_sequences_have_one_length_and_end_texts(tokenizer: Any) -> None:
    calibration = Calibration(source=TEXTS, samples=5, tokens=8)
    cut = sequences(calibration, TEXTS, tokenizer, 2048)
    assert [len(ids) for ids in cut] == [8] * 5
    assert tokenizer.eos_token_id in [i for ids in cut for i in ids]
    whole = sequences(Calibration(source=TEXTS, tokens=512), TEXTS, tokenizer, 2048)
    assert len(whole) == 1  # shorter than asked for, as there is no more
    assert 8 < len(whole[0]) < 512


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda _: Calibration(samples=0), ["samples=0", "at least 1"]),
        (lambda _: Calibration(tokens=4), ["tokens=4", "at least 8"]),
        (lambda _: Calibration(source=[]), ["texts that are not empty", "'none'"]),
        (lambda _: Calibration(source=["a", 3]), ["texts that are not empty"]),  # type: ignore[list-item]
        (lambda path: read_texts(Calibration(source=str(path / "none.txt"))), ["none.txt cannot be read"]),
        (lambda path: _written(path / "a.json", '{"a": 1}'), ["holds no list"]),
        (lambda path: _written(path / "a.json", "[1"), ["is no JSON"]),
        (lambda path: _written(path / "a.jsonl", '{"a": "b"}'), ["has no column 'text'", "'a'"]),
        (lambda path: _written(path / "a.jsonl", '{"text": 3}'), ["holds int, not text"]),
        (lambda path: _written(path / "a.txt", "\n"), ["holds no text"]),
    ],
)
def test_calibrations_that_cannot_be_used(make: Any, words: list[str], tmp_path: Path) -> None:
    with pytest.raises(InvalidOptionError) as caught:
        make(tmp_path)
    for word in words:
        assert word in str(caught.value)


def _written(path: Path, content: str) -> list[str]:
    path.write_text(content)
    return read_texts(Calibration(source=path))


# --- whole checkpoints ---


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
def test_what_is_written_loads_and_computes_what_the_codes_stand_for(
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


def test_a_run_that_was_broken_off_goes_on_where_it_was(plain: Path, tmp_path: Path) -> None:
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


def test_layers_that_are_skipped_stay_as_they_are(plain: Path, tmp_path: Path) -> None:
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
    (output / "precious").write_text("data")
    with pytest.raises(InvalidOptionError, match="is not empty"):
        run(plain, output)
    with pytest.raises(ZeroDivisionError):
        run(plain, output, overwrite=True, report=lambda p: p.done // 0)
    assert (output / "precious").exists()
    run(plain, output, overwrite=True)
    assert not (output / "precious").exists()


@pytest.mark.parametrize(
    ("scheme", "options", "error", "words"),
    [
        (GPTQ(bits=4, group_size=48), {}, InvalidOptionError, ["group_size=48", "in_features=64", "16, 32, 64, -1"]),
        (GPTQ(bits=4, kernel="torch"), {}, InvalidOptionError, ["kernel='torch'", "while loading"]),
        ("gptq", {"skip_modules": ["mlp.gate"]}, InvalidOptionError, ["'mlp.gate'", "mlp.gate_proj"]),
        ("gptq", {"damping": 0}, InvalidOptionError, ["damping=0", "between 0 and 1"]),
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
def test_what_cannot_be_quantized_is_told_first(
    plain: Path, tmp_path: Path, scheme: Any, options: dict[str, Any], error: type[Exception], words: list[str]
) -> None:
    with pytest.raises(error) as caught:
        run(plain, tmp_path / "out", scheme, **options)
    for word in words:
        assert word in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_sizes_that_cannot_be_packed_are_told_without_weights(plain: Path, tmp_path: Path) -> None:
    odd = shutil.copytree(plain, tmp_path / "odd")
    config = json.loads((odd / "config.json").read_text())
    (odd / "config.json").write_text(json.dumps({**config, "intermediate_size": 100}))
    (odd / "model.safetensors").unlink()  # so nobody has read any
    with pytest.raises(InvalidOptionError, match="group_size=64 does not divide in_features=100"):
        run(odd, tmp_path / "out", GPTQ(group_size=64))
    with pytest.raises(InvalidOptionError, match="out_features=100 of layer 'model.layers.0.mlp.gate_proj' cannot be"):
        run(odd, tmp_path / "out", GPTQ(bits=4, group_size=-1))


def test_checkpoints_that_are_quantized_or_not_there(plain: Path, tmp_path: Path) -> None:
    done = run(plain, tmp_path / "out")
    with pytest.raises(CheckpointError, match="is quantized already"):
        run(done.folder, tmp_path / "again")
    with pytest.raises(ModelNotFoundError):
        run(tmp_path / "nowhere", tmp_path / "again")
    with pytest.raises(InvalidOptionError, match="is what it is to be made of"):
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
        pytest.param(tuple(name for name in SCHEMES if name != "none"), marks=pytest.mark.slow, id="every"),
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
        if name == "gptq":
            run(plain, folder)
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

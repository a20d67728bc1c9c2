"""Bits by layer: what groups of layers cost, which bits they get for it, and the checkpoint that has them."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from langchain_quantllm import GPTQ, Calibration, QuantizedHuggingFaceLLM, quantize
from langchain_quantllm.bench.quality import Reference, evaluation_text
from langchain_quantllm.compat.gptqmodel_rules import settings_of
from langchain_quantllm.errors import CheckpointError, InvalidOptionError
from langchain_quantllm.kernels.experts.weights import GPTQStack
from langchain_quantllm.loading.registry import load
from langchain_quantllm.loading.spec import LoadSpec
from langchain_quantllm.memory import estimate_memory, weights_by_kind
from langchain_quantllm.quantization.decoder_layers import Layout, find_layout
from langchain_quantllm.quantization.expert_layers import RoutedTokens
from langchain_quantllm.quantization.gptq import Progress
from langchain_quantllm.quantization.journal import Journal
from langchain_quantllm.quantization.layer_bits import choose_bits
from langchain_quantllm.quantization.packing import TENSORS, RoundedLinear
from langchain_quantllm.quantization.sensitivity import LayerGroup, Sensitivity
from langchain_quantllm.quantization.solver import InputStatistics, solve
from tests.support import families
from tests.support.checkpoints import make_tokenizer
from tests.support.mixtures import make_mixture
from tests.support.quantization import TEXTS, rounding
from tests.support.selection import skip_without_gptqmodel

BITS = [2, 3, 4, 8]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two blocks, in float16."""
    folder = tmp_path_factory.mktemp("plain") / "model"
    family = families.FAST["llama-grouped"]
    options = {**family.options, "vocab_size": 512, "num_hidden_layers": 2, "intermediate_size": 192}
    model = families.family_model(families.Family(config=family.config, options=options, gain=0.1))
    model.half().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def run(plain: Path, output: Path, bits: Any = "auto:4.5", **options: Any) -> Any:
    given = {"calibration": Calibration(source=TEXTS * 4, tokens=64), "progress": False, "device": "cpu"}
    return quantize(plain, GPTQ(bits=bits, group_size=32), output=output, **{**given, **options})


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return found


def twin_of(plain: Path, folder: Path) -> Any:
    """The plain model in float32 with the weights that a checkpoint's packed layers stand for."""
    tensors, config = load_file(folder / "model.safetensors"), config_of(folder)
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    for name in [key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")]:
        own = settings_of(config, name)
        assert own is not None
        packed = {key: tensors[f"{name}.{key}"] for key in TENSORS}
        model.get_submodule(name).weight.data.copy_(RoundedLinear.unpack(packed, own["bits"]).dequantize())
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.tensor([families.random_ids(30)])).logits
    return found.float()


@pytest.mark.parametrize("seed", range(6))
def test_no_other_bits_within_the_mean_cost_less(seed: int) -> None:
    chance = random.Random(seed)
    groups = []
    for block in range(5):
        costs = sorted((chance.random() * 4**-i for i in range(4)), reverse=True)
        groups.append(LayerGroup(block=block, names=("a",), weights=chance.choice([6, 10, 16]), costs=tuple(costs)))
    mean = chance.choice([2.5, 3.5, 4.25, 8.0])

    def cost(bits: Any) -> float:
        return sum(group.costs[BITS.index(own)] for group, own in zip(groups, bits, strict=True))

    room = mean * sum(group.weights for group in groups)
    allowed = [
        bits
        for bits in itertools.product(BITS, repeat=5)
        if sum(group.weights * own for group, own in zip(groups, bits, strict=True)) <= room
    ]
    found = choose_bits(groups, BITS, mean)
    assert tuple(found) in allowed
    assert cost(found) == pytest.approx(min(map(cost, allowed)))


def test_sizes_without_a_common_part_keep_within_the_mean() -> None:
    groups = [LayerGroup(block=i, names=("a",), weights=10**7 + i, costs=(1.0, 0.0)) for i in range(20)]
    found = choose_bits(groups, [4, 8], 5.0)
    assert found.count(8) == 5
    assert sum(group.weights * own for group, own in zip(groups, found, strict=True)) <= 5 * 20 * 10**7 + 5 * 190
    assert choose_bits(groups, [4, 8], 4.99).count(8) == 4


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_a_cost_is_the_divergence_that_rounding_brings(plain: Path, tmp_path: Path, kind: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32) if kind == "llama" else make_mixture(kind)
    model.eval()
    ids = torch.randint(5, 500, (16, 64), generator=torch.Generator().manual_seed(0))
    layout = find_layout(model)
    journal = Journal(tmp_path / "out")
    journal.open({}, overwrite=True)
    groups = Sensitivity(model, layout, ids.tolist(), [4, 8], rounding(), "cpu").measure(journal, lambda *_: None)
    inside = [p for name, p in model.named_parameters() if f"{layout.prefix}." in name and p.ndim > 1]
    routers = [p for name, p in model.named_parameters() if name.endswith("mlp.gate.weight")]
    assert sum(group.weights for group in groups) == sum(p.numel() for p in inside) - sum(p.numel() for p in routers)
    assert all(parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():
        expected = model(ids).logits.log_softmax(-1)
    for group in groups:
        found = _rounded_log_probs(model, f"{layout.prefix}.{group.block}", layout, group, ids)
        divergence = float((expected.exp() * (expected - found)).sum(-1).mean())
        # One word is drawn at each of 1024 places. Of a mixture, rounding changes the choice of experts as well.
        assert divergence / 4 < group.costs[0] < 2 * divergence, group
        assert kind == "qwen3_moe" or group.costs[0] == pytest.approx(divergence, rel=0.3), group
        assert group.costs[1] == pytest.approx(group.costs[0] / 17**2)


def _rounded_log_probs(model: Any, block: str, layout: Layout, group: LayerGroup, ids: torch.Tensor) -> torch.Tensor:
    """Predict with one group of layers rounded by the statistics of the same tokens."""
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        if group.names[0].endswith("."):
            [experts] = layout.experts[group.block]
            module, tokens = model.get_submodule(f"{block}.{experts.path}"), RoutedTokens()
            hook = module.register_forward_pre_hook(lambda _, args: tokens.add(*args[:2]))
            model(ids)
            hook.remove()
            experts.quantize(module, tokens, rounding())
        else:
            modules = [model.get_submodule(f"{block}.{name}") for name in group.names]
            statistics = InputStatistics(modules[0].in_features, "cpu")
            with modules[0].register_forward_pre_hook(lambda _, args: statistics.add(args[0])):
                model(ids)
            for module in modules:
                module.weight.data.copy_(solve(module.weight, statistics, rounding()).dequantize())
        found: torch.Tensor = model(ids).logits.log_softmax(-1)
        for name, parameter in model.named_parameters():
            parameter.copy_(before[name])
    return found


@pytest.mark.compat
@pytest.mark.parametrize("bits", ["auto:4.5", "auto:2.75"])
def test_a_checkpoint_of_several_bits_is_loaded_with_all_of_them(plain: Path, tmp_path: Path, bits: str) -> None:
    skip_without_gptqmodel()
    done = run(plain, tmp_path / "out", bits)
    mean = float(bits.removeprefix("auto:"))
    assert mean - 0.6 < done.mean_bits <= mean
    config = config_of(done.folder)
    assert config["meta"]["bits"] == bits
    assert (done.scheme.bits, done.scheme.other_bits) == (config["bits"], done.scheme.other_bits)
    assert len(done.scheme.layer_bits) > 1
    assert set(done.scheme.layer_bits) <= ({4, 8} if mean >= 4 else set(BITS))
    for block in range(2):  # layers that engines join have the same bits
        for names in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
            assert len({settings_of(config, f"model.layers.{block}.{name}")["bits"] for name in names}) == 1  # type: ignore[index]
    llm = QuantizedHuggingFaceLLM(model_id=str(done.folder), dtype="float32", progress=False, device="cpu")
    found, expected = logits(llm.pipeline.model), logits(twin_of(plain, done.folder))
    assert (found - expected).norm() < 0.03 * expected.norm()
    assert llm.pipeline.model.config.quantization_config.to_dict()["dynamic"] == config["dynamic"]
    assert llm.invoke("1 2 3")
    estimate, tensors = estimate_memory(str(done.folder)), load_file(done.folder / "model.safetensors")
    packed = [tensor.nbytes for name, tensor in tensors.items() if name.rpartition(".")[2] in TENSORS]
    assert estimate.weights.quantized_bytes == sum(packed)
    assert estimate.scheme.layer_bits == done.scheme.layer_bits  # type: ignore[attr-defined]
    llm.unload()


def test_rules_that_leave_layers_unquantized_are_followed(plain: Path, tmp_path: Path) -> None:
    skip_without_gptqmodel()
    folder = run(plain, tmp_path / "out", 4).folder
    name = "model.layers.1.mlp.down_proj"
    tensors = load_file(folder / "model.safetensors")
    rounded = RoundedLinear.unpack({key: tensors.pop(f"{name}.{key}") for key in TENSORS}, 4)
    save_file(
        {**tensors, f"{name}.weight": rounded.dequantize().half()}, folder / "model.safetensors", {"format": "pt"}
    )
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["dynamic"] = {"-:.*\\.1\\.mlp\\.down.*": {}}
    (folder / "config.json").write_text(json.dumps(config))
    loaded = load(LoadSpec(model_id=str(folder), dtype="float32", device_map={"": "cpu"}, progress=False))
    model = loaded.pipeline.model
    assert type(model.get_submodule(name)) is torch.nn.Linear
    twin = twin_of(plain, folder)
    twin.get_submodule(name).weight.data.copy_(rounded.dequantize())
    assert (logits(model) - logits(twin)).norm() < 0.03 * logits(twin).norm()
    kinds = estimate_memory(str(folder), dtype="float32").weights, weights_by_kind(model)
    assert kinds[0].unquantized_bytes == kinds[1].unquantized_bytes
    loaded.close()
    config["quantization_config"]["dynamic"] = {"-:.*\\.0\\.mlp\\.down.*": {}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"'model.layers.0.mlp.down_proj' is packed, but the rule '-:"):
        load(LoadSpec(model_id=str(folder), progress=False))


def test_experts_of_a_block_have_bits_of_their_own(tmp_path: Path) -> None:
    skip_without_gptqmodel()
    make_mixture("qwen3_moe", vocab_size=512, dtype=torch.float16).save_pretrained(tmp_path / "plain")
    make_tokenizer().save_pretrained(tmp_path / "plain")
    done = run(tmp_path / "plain", tmp_path / "out", "auto:5")
    config, tensors = config_of(done.folder), load_file(done.folder / "model.safetensors")
    loaded = load(LoadSpec(model_id=str(done.folder), device_map={"": "cpu"}, progress=False))
    stacks = {name: module.stack for name, module in loaded.pipeline.model.named_modules() if hasattr(module, "stack")}
    assert len(stacks) == 4
    for name, stack in stacks.items():
        assert isinstance(stack, GPTQStack)
        own = {settings_of(config, f"{name.rpartition('.')[0]}.{expert}.down_proj")["bits"] for expert in range(4)}  # type: ignore[index]
        assert own == {stack.bits}
        layer = f"{name.rpartition('.')[0]}.0.down_proj"
        assert tensors[f"{layer}.qweight"].shape[0] * 32 == tensors[f"{layer}.g_idx"].shape[0] * stack.bits
    estimated = estimate_memory(str(done.folder)).weights.experts_bytes
    assert estimated == pytest.approx(weights_by_kind(loaded.pipeline.model).experts_bytes, rel=0.03)
    loaded.close()


def test_an_interrupted_choice_of_bits_resumes(plain: Path, tmp_path: Path) -> None:
    def stop(progress: Progress) -> None:
        if progress.done == 1:
            raise KeyboardInterrupt

    whole = run(plain, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(plain, tmp_path / "out", report=stop)
    assert [path.stem for path in (tmp_path / "out.partial").glob("*.safetensors")] == ["bits-0001"]
    with pytest.raises(InvalidOptionError, match="with other settings"):
        run(plain, tmp_path / "out", "auto:5")
    seen: list[Progress] = []
    again = run(plain, tmp_path / "out", report=seen.append)
    assert [(p.done, p.total, p.resumed) for p in seen] == [(1, 4, 1), (2, 4, 1), (3, 4, 0), (4, 4, 0)]
    assert config_of(again.folder) == config_of(whole.folder)
    one, two = (load_file(folder / "model.safetensors") for folder in (whole.folder, again.folder))
    assert all(torch.equal(one[name], two[name]) for name in one | two)


@pytest.mark.parametrize(
    ("bits", "options", "words"),
    [
        ("auto:9", {}, "from 2 to 8"),
        ("auto:", {}, "bits='auto:' is not known"),
        ("five", {}, "auto:4.25 for bits by layer"),
        ("auto:4.5", {"calibration": "none"}, "bits by layer are chosen on the text of the calibration"),
        ("auto:4.5", {"calibration": None, "method": "rtn"}, "bits by layer are chosen on the text"),
    ],
)
def test_means_that_cannot_be_had_are_refused(
    plain: Path, tmp_path: Path, bits: str, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(InvalidOptionError, match=words):
        run(plain, tmp_path / "out", bits, **options)


@pytest.mark.slow
def test_bits_by_layer_are_nearer_to_16_bits_than_fewer_for_all(smollm2: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    reference = Reference(model, AutoTokenizer.from_pretrained(smollm2), evaluation_text(), max_tokens=2048)
    texts, found = Calibration(samples=4), {}
    for bits in (3, "auto:3.5"):
        scheme = GPTQ(bits=bits, group_size=64)
        done = quantize(smollm2, scheme, texts, tmp_path / str(bits)[-3:], device="cpu", progress=False)
        found[bits] = reference.distance(twin_of(smollm2, done.folder)).kl_nats
    assert found["auto:3.5"].high < found[3].low

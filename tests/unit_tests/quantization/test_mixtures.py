"""GPTQ of mixtures: every expert is calibrated with the tokens that reach it, and written as its community does."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from langchain_quantllm import GPTQ, Calibration, quantize
from langchain_quantllm.compat.transformers_experts import is_experts, projections
from langchain_quantllm.errors import InvalidOptionError, UnsupportedError
from langchain_quantllm.experts.mxfp4 import mxfp4_stack
from langchain_quantllm.kernels.experts.reference import dequantize
from langchain_quantllm.loading.registry import load
from langchain_quantllm.loading.spec import LoadSpec
from langchain_quantllm.quantization.decoder_layers import DecoderLayers, find_layout
from langchain_quantllm.quantization.expert_layers import ExpertLayers, RoutedTokens, find_experts
from langchain_quantllm.quantization.gptq import Progress
from langchain_quantllm.quantization.packing import TENSORS, RoundedLinear
from langchain_quantllm.schemes import MXFP4
from tests.support.checkpoints import make_tokenizer
from tests.support.mixtures import EXPERTS, make_mixture
from tests.support.packed_experts import NAMES
from tests.support.quantization import TEXTS, rounding
from tests.support.selection import skip_without_gptqmodel

IDS = torch.arange(3, 43)[None]


def write(folder: Path, kind: str = "qwen3_moe") -> Path:
    make_mixture(kind, vocab_size=512, dtype=torch.float16).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def run(folder: Path, output: Path, **options: Any) -> Any:
    given = {"calibration": Calibration(source=TEXTS * 4, tokens=64), "progress": False, "device": "cpu"}
    return quantize(folder, GPTQ(bits=4, group_size=32), output=output, **{**given, **options})


def of(kind: str) -> tuple[Any, ExpertLayers]:
    """Return the experts of a mixture's last block in float32, and their layers."""
    model = make_mixture(kind)
    layout = find_layout(model)
    [layers] = find_experts(model, layout.prefix)[-1]
    return model.get_submodule(f"{layout.prefix}.{layout.count - 1}.{layers.path}"), layers


def tokens_of(width: int, *, count: int = 2000, most: int = EXPERTS) -> tuple[RoutedTokens, torch.Tensor]:
    """Make tokens whose inputs have few directions, routed to the first `most` experts."""
    torch.manual_seed(1)
    hidden = torch.randn(count, width // 4) @ torch.randn(width // 4, width) + 0.05 * torch.randn(count, width)
    routed = RoutedTokens()
    chosen = torch.stack([torch.randperm(most)[:2] for _ in range(count)])
    for rows, experts in zip(hidden.split(700), chosen.split(700), strict=True):
        routed.add(rows, experts)
    return routed, hidden


@torch.no_grad()
def output_of(experts: Any, expert: int, hidden: torch.Tensor) -> torch.Tensor:
    index = torch.full((len(hidden), 1), expert)
    found: torch.Tensor = experts(hidden, index, torch.ones(len(hidden), 1))
    return found


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss", "nemotron_h"])
def test_outputs_change_less_than_by_rounding_to_nearest(kind: str) -> None:
    errors = []
    for calibrated in (True, False):
        experts, layers = of(kind)
        width = next(iter(layers.projections.values())).in_features
        tokens, hidden = tokens_of(width)
        before = [output_of(experts, e, hidden) for e in range(EXPERTS)]
        layers.quantize(experts, tokens if calibrated else None, rounding(bits=3, sym=False))
        after = [output_of(experts, e, hidden) for e in range(EXPERTS)]
        errors.append([float((a - b).norm() / b.norm()) for a, b in zip(after, before, strict=True)])
    assert all(calibrated < 0.8 * nearest for calibrated, nearest in zip(*errors, strict=True))


def test_an_expert_that_no_token_reaches_is_calibrated_with_those_of_the_layer() -> None:
    errors = []
    for calibrated in (True, False):
        experts, layers = of("qwen3_moe")
        tokens, hidden = tokens_of(64, most=EXPERTS - 1)
        before = output_of(experts, EXPERTS - 1, hidden)
        packed = layers.quantize(experts, tokens if calibrated else None, rounding(bits=3, sym=False))
        errors.append(float((output_of(experts, EXPERTS - 1, hidden) - before).norm()))
        if calibrated:
            counts = packed["mlp.experts.tokens"]
            assert counts[-1] == 0
            assert int(counts.sum()) == 2 * len(hidden)
    assert errors[0] < 0.8 * errors[1]


def test_tokens_of_a_rare_expert_are_its_own_and_others_up_to_what_is_needed() -> None:
    tokens = RoutedTokens()
    hidden = torch.arange(20.0)[:, None]
    tokens.add(hidden, torch.tensor([[0, 1]] * 3 + [[1, 2]] * 17))
    rows, count = tokens.of(0, 8)
    assert count == 3
    assert torch.cat(rows)[:3].flatten().tolist() == [0, 1, 2]
    assert len(torch.cat(rows).unique()) == 8
    rows, count = tokens.of(1, 8)
    assert count == len(torch.cat(rows)) == 20
    assert len(torch.cat(tokens.of(3, 50)[0])) == 20


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_routed_tokens_are_those_of_the_model(kind: str) -> None:
    model = make_mixture(kind)
    layout = find_layout(model)
    seen: list[Any] = []
    experts = next(module for module in model.model.layers[1].modules() if is_experts(module))
    ids = [list(range(20)), list(range(30, 50))]
    with experts.register_forward_pre_hook(lambda _, args: seen.append(args[:2])), torch.no_grad():
        model(input_ids=torch.tensor(ids), use_cache=False)
    blocks = DecoderLayers(model, layout, ids, "cpu")
    blocks.advance(0)
    tokens = blocks.routed(1, layout.experts[1][0].path)
    [(hidden, index)] = seen
    for expert in range(EXPERTS):
        rows, count = tokens.of(expert, 0)
        mine = hidden.reshape(-1, hidden.shape[-1])[(index == expert).any(-1)]
        assert count == len(mine)
        if count:
            torch.testing.assert_close(torch.cat(rows), mine, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_a_written_checkpoint_has_a_layer_for_each_expert_and_computes_with_its_weights(
    tmp_path: Path, kind: str
) -> None:
    skip_without_gptqmodel()
    source = write(tmp_path / "source", kind)
    done = run(source, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    twin = make_mixture(kind, vocab_size=512, dtype=torch.float16).float()
    path = "block_sparse_moe" if kind == "mixtral" else "mlp"
    quantized = 0
    for name, module in twin.named_modules():
        if f"{name}.qweight" in tensors:
            weight = unpacked(tensors, name)
            module.weight.data.copy_(weight)
            quantized += weight.numel()
        for projection, layout in projections(module).items():
            for expert in range(EXPERTS):
                stored = f"{name.replace('.mlp.', f'.{path}.')}.{expert}"
                own = NAMES[kind]
                if projection == "down_proj":
                    weight = unpacked(tensors, f"{stored}.{own['down']}")
                else:
                    gate, up = (unpacked(tensors, f"{stored}.{own[part]}") for part in ("gate", "up"))
                    weight = torch.cat([gate, up])
                    if not module.is_concatenated:
                        weight = torch.stack([gate, up], dim=1).flatten(0, 1)
                getattr(module, projection).data[expert].copy_(weight.t() if layout.transposed else weight)
                quantized += weight.numel()
    assert done.quantized_share == pytest.approx(quantized / sum(p.numel() for p in twin.parameters()))
    loaded = load(LoadSpec(model_id=str(done.folder), dtype="float32", progress=False, device_map={"": "cpu"}))
    model = loaded.pipeline.model
    with torch.no_grad():
        for ours, theirs in zip(model.model.layers, twin.model.layers, strict=True):
            hidden, index = torch.randn(16, 64), torch.randint(0, EXPERTS, (16, 2))
            weights = torch.rand(16, 2)
            found, expected = (block.mlp.experts(hidden, index, weights) for block in (ours, theirs))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        # The attention's kernel computes in 16 bits.
        found, expected = model(IDS).logits.float(), twin(IDS).logits
    assert (found - expected).norm() < 0.2 * expected.norm()


def unpacked(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    return RoundedLinear.unpack({key: tensors[f"{name}.{key}"] for key in TENSORS}, 4).dequantize()


def test_experts_that_few_tokens_reach_are_named_in_the_result_and_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        done = run(write(tmp_path / "source"), tmp_path / "out", calibration=Calibration(source=TEXTS, tokens=16))
    named = {f"model.layers.{layer}.mlp.experts.{expert}" for layer in range(2) for expert in range(EXPERTS)}
    assert set(done.rare_experts) <= named
    assert done.rare_experts
    assert all(count < 64 for count in done.rare_experts.values())
    [said] = [record.getMessage() for record in caplog.records if "calibration reached" in record.getMessage()]
    name, count = min(done.rare_experts.items(), key=lambda item: item[1])
    assert f"{name} ({count})" in said


def test_an_interrupted_run_goes_on_to_the_same_checkpoint(tmp_path: Path) -> None:
    source = write(tmp_path / "source")
    whole = run(source, tmp_path / "whole")

    def stop(_: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "out", report=stop)
    resumed = run(source, tmp_path / "out")
    assert resumed.resumed_blocks == 1
    assert resumed.rare_experts == whole.rare_experts
    expected, found = (load_file(folder / "model.safetensors") for folder in (whole.folder, resumed.folder))
    assert expected.keys() == found.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


def test_skipped_experts_stay_as_they_are(tmp_path: Path) -> None:
    skip_without_gptqmodel()
    source = write(tmp_path / "source")
    done = run(source, tmp_path / "out", skip_modules=["experts"])
    before, after = (load_file(folder / "model.safetensors") for folder in (source, done.folder))
    names = [name for name in before if "experts" in name]
    assert names
    assert all(torch.equal(before[name], after[name]) for name in names)
    loaded = load(LoadSpec(model_id=str(done.folder), progress=False, device_map={"": "cpu"}))
    assert len([p for p in loaded.pipeline.model.parameters() if p.ndim == 3]) == 4


def test_a_group_size_that_does_not_divide_experts_is_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "source")
    with pytest.raises(
        InvalidOptionError, match=r"in_features=32 of layer 'model\.layers\.0\.mlp\.experts\.0\.down_proj'"
    ):
        quantize(source, GPTQ(group_size=64), "none", tmp_path / "out", progress=False)


def test_gpt_oss_is_written_in_mxfp4_and_computes_with_the_rounded_weights(tmp_path: Path) -> None:
    source = write(tmp_path / "source", "gpt_oss")
    done = quantize(source, "mxfp4", output=tmp_path / "out", progress=False, device="cpu")
    plain, packed = (load_file(folder / "model.safetensors") for folder in (source, done.folder))
    twin = make_mixture("gpt_oss", vocab_size=512, dtype=torch.float16).float()
    for path, module in twin.named_modules():
        for name in projections(module):
            weight = plain.pop(f"{path}.{name}").transpose(1, 2).float()
            blocks, scales = packed.pop(f"{path}.{name}_blocks"), packed.pop(f"{path}.{name}_scales")
            rounded = torch.stack([dequantize(mxfp4_stack(blocks, scales), e, torch.float32) for e in range(EXPERTS)])
            assert 0.01 < float((rounded - weight).norm() / weight.norm()) < 0.2
            getattr(module, name).data.copy_(rounded.transpose(1, 2))
    assert plain.keys() == packed.keys()
    loaded = load(LoadSpec(model_id=str(done.folder), dtype="float32", progress=False, device_map={"": "cpu"}))
    assert loaded.scheme == done.scheme == MXFP4()
    with torch.no_grad():
        found, expected = loaded.pipeline.model(IDS).logits, twin(IDS).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert 0.5 < done.quantized_share < 1


def test_mxfp4_is_for_gpt_oss(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="mxfp4 is gpt-oss's format"):
        quantize(write(tmp_path / "source"), "mxfp4", output=tmp_path / "out", progress=False)

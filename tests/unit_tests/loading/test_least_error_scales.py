"""nf4 weights of language models with scales of least error, while they load and in what `quantize` writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from langchain_quantllm import FP4, NF4, quantize
from tests.support import families
from tests.support.checkpoints import make_tokenizer
from tests.support.loading import load, model_of

bnb = pytest.importorskip("bitsandbytes")


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def plain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The folder of a random model, and the model; GPT-2 has its weights the other way round."""
    folder = tmp_path_factory.mktemp("plain") / request.param
    model = families.family_model(families.FAST[request.param])
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder, model


def errors(model: Any, plain: Any, kind: str) -> tuple[float, float]:
    """The squared error of a model's 4-bit weights, and the one with bitsandbytes' own scales."""
    ours = theirs = 0.0
    for name, module in model.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is None:
            continue
        before = plain.get_submodule(name)
        weight = before.weight.T if type(before).__name__ == "Conv1D" else before.weight
        weight = weight.detach().contiguous()
        own = bnb.functional.quantize_4bit(weight, quant_type=kind)
        held = bnb.functional.dequantize_4bit(module.weight.data, state).float()
        ours += float((held - weight).square().sum())
        theirs += float((bnb.functional.dequantize_4bit(*own) - weight).square().sum())
    return ours, theirs


@pytest.mark.parametrize(
    ("scheme", "kind", "most"),
    [
        (NF4(least_error=True), "nf4", 0.85),
        (NF4(double_quantization=True, least_error=True), "nf4", 0.87),
    ],
)
def test_loading_leaves_less_of_an_error_than_bitsandbytes(
    plain: tuple[Path, Any], scheme: Any, kind: str, most: float
) -> None:
    folder, before = plain
    llm = load(folder, quantization=scheme, dtype="float32", device="cpu")
    ours, theirs = errors(model_of(llm), before, kind)
    assert 0 < ours < most * theirs
    llm.unload()


@pytest.mark.parametrize(("scheme", "kind"), [(NF4(), "nf4"), (FP4(), "fp4")])
def test_without_it_weights_are_those_of_bitsandbytes(plain: tuple[Path, Any], scheme: Any, kind: str) -> None:
    folder, before = plain
    llm = load(folder, quantization=scheme, dtype="float32", device="cpu")
    ours, theirs = errors(model_of(llm), before, kind)
    assert ours == theirs > 0
    llm.unload()


def test_written_weights_are_the_ones_that_loading_makes(plain: tuple[Path, Any], tmp_path: Path) -> None:
    folder, before = plain
    written = quantize(folder, NF4(least_error=True), output=tmp_path / "out", device="cpu", progress=False).folder
    llm = load(written, device="cpu")
    ours, theirs = errors(model_of(llm), before, "nf4")
    assert 0 < ours < 0.87 * theirs
    ids = torch.tensor([families.random_ids(12)])
    assert torch.isfinite(model_of(llm)(ids).logits).all()
    llm.unload()

"""The quality of quantized mixtures and hybrids, on tiny models that are trained here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import trained_quality
from langchain_quantllm.bench.quality import Reference
from langchain_quantllm.compat.transformers_experts import is_experts
from tests.support.selection import skip_without_gptqmodel

pytestmark = [pytest.mark.slow]

TOKENS, ENGINE_TOKENS = 4096, 128
MOST_NATS = {"int8": 0.008, "gptq": 0.07, "mxfp4": 0.025, "nf4": 0.13, "fp4": 0.22}
"""Most divergence of a scheme from 16 bits: about twice what it has here."""
IN_ORDER = ("int8", "gptq", "nf4", "fp4")
"""Schemes from the nearest to 16 bits to the farthest, each well below the next one."""


@pytest.fixture(scope="module", params=list(trained_quality.KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def trained(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return trained_quality.train(kind, tmp_path_factory.mktemp("trained") / kind)
    finally:
        torch.set_num_threads(before)


@pytest.fixture(scope="module")
def reference(trained: Path) -> Reference:
    """The predictions of the model before it is quantized."""
    llm = trained_quality.in_scheme(trained, "none", engine="pipeline")
    found = trained_quality.reference_of(llm, tokens=TOKENS)
    llm.unload()
    return found


def test_schemes_keep_the_quality_and_the_fast_engine_has_the_model_s(
    kind: str, trained: Path, reference: Reference
) -> None:
    skip_without_gptqmodel()
    assert reference.perplexity.perplexity < 20  # of 256 bytes that are equally likely without training
    found = {}
    for scheme in trained_quality.schemes_of(kind):
        llm = trained_quality.in_scheme(trained, scheme, engine="fast")
        distance = reference.distance(llm.pipeline.model)
        found[scheme] = distance.kl_nats.mean
        assert distance.perplexity.perplexity < reference.perplexity.perplexity * 1.06
        beginning = trained_quality.own_perplexity(llm, tokens=ENGINE_TOKENS)
        # Outliers that int8 keeps in 16 bits are those of all rows of a call.
        rel = 0.02 if scheme == "int8" else 0.01
        assert trained_quality.engine_perplexity(llm, tokens=ENGINE_TOKENS) == pytest.approx(beginning, rel=rel)
        llm.unload()
    assert abs(found.pop("none")) < 1e-5
    assert all(0 < nats < MOST_NATS[scheme] for scheme, nats in found.items()), found
    assert sorted(IN_ORDER, key=found.__getitem__) == list(IN_ORDER), found


def test_experts_in_another_order_show(trained: Path, reference: Reference) -> None:
    """A checkpoint that is read wrongly writes fluent texts, but farther from the model's than any scheme does."""
    llm = trained_quality.in_scheme(trained, "nf4", engine="pipeline")
    for module in llm.pipeline.model.modules():
        if is_experts(module):
            module.down_proj.words = module.down_proj.words.roll(1, 0)
    broken = reference.distance(llm.pipeline.model).kl_nats
    llm.unload()
    assert broken.low > max(MOST_NATS.values())

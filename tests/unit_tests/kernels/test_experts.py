"""Experts: the Triton kernels against plain torch, in every format.

Without a GPU the kernels run in Triton's interpreter, in one subprocess, except the instructions in PTX, which
`test_codebook` emulates. On a GPU the tests run the same cases compiled, and larger ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from langchain_quantllm.engine.fusion.fuse import EXPERTS, Fusion
from langchain_quantllm.kernels import reference as plain
from langchain_quantllm.kernels.experts import reference
from langchain_quantllm.kernels.experts.config import ExpertsConfig
from langchain_quantllm.kernels.experts.gating import (
    GELU,
    GELU_TANH,
    RELU,
    RELU_SQUARED,
    SILU,
    Gating,
)
from langchain_quantllm.kernels.experts.weights import Stack
from langchain_quantllm.kernels.linear import reference as plain_linear
from langchain_quantllm.kernels.linear.config import LinearConfig
from langchain_quantllm.kernels.linear.weights import weight_of
from tests.support.expert_stacks import float_stack, moved, mxfp4_stack, stack_of, with_bias
from tests.support.fusion import in_engine
from tests.support.interpreter import multiply_in_order, report_cases
from tests.support.mixtures import make_mixture
from tests.support.selection import covering, slow_but
from tests.unit_tests.kernels.test_linear import Case as LinearCase
from tests.unit_tests.kernels.test_linear import layer

ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}
KINDS = ("nf4", "fp4", "int8", "gptq2", "gptq3", "gptq4", "gptq8", "mxfp4", "float", "float-transposed")
GATINGS = {
    "silu": Gating(activation=SILU),
    "gelu": Gating(activation=GELU),
    "gelu-tanh-interleaved": Gating(activation=GELU_TANH, is_interleaved=True),
    "gpt-oss": Gating(activation=SILU, is_interleaved=True, alpha=1.702, limit=0.7, shift=1.0),
    "limited-after": Gating(activation=SILU, limit=0.5, limits_activated=True),
    "relu": Gating(activation=RELU, is_gated=False),
    "relu-squared": Gating(activation=RELU_SQUARED, is_gated=False),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """The experts of some tokens."""

    name: str
    kind: str = "nf4"
    gating: str = "silu"
    tokens: int = 2
    chosen: int = 2
    experts: int = 3
    hidden: int = 64
    inner: int = 32
    bias: bool = False
    nested: bool = False
    act_order: bool = False
    symmetric: bool = False
    split: bool = False
    """Whether gates and ups are two stacks."""
    dtype: torch.dtype = torch.float32
    regime: str | None = None
    tile_rows: int = 16
    some_left_out: bool = False
    """Whether some numbers are those of no expert."""
    one_expert: bool = False
    """Whether all tokens choose one expert, several times."""


def _cases() -> Iterator[Case]:
    halves = (torch.float16, torch.bfloat16)
    for number, kind in enumerate(KINDS):
        for regime in ("vector", "tile"):
            plain = Case(name=f"{kind}-{regime}", kind=kind, regime=regime)
            yield plain
            odd = replace(plain, hidden=96, inner=160 if kind != "gptq3" else 96, bias=True, tokens=3)
            yield replace(odd, name=f"{plain.name}-odd-biased-gpt-oss", gating="gpt-oss", some_left_out=True)
            half = replace(plain, dtype=halves[number % 2], tokens=9 if regime == "tile" else 1)
            yield replace(half, name=f"{plain.name}-16-bits", gating="gelu")
            if kind in ("nf4", "gptq4", "float"):
                yield replace(half, name=f"{plain.name}-not-gated", gating="relu-squared", bias=True)
    for gating in GATINGS:
        for regime in ("vector", "tile"):
            yield Case(name=f"{gating}-{regime}", gating=gating, regime=regime, kind="int8", inner=40)
    for kind in ("nf4", "fp4"):
        for regime in ("vector", "tile"):
            yield Case(name=f"{kind}-nested-{regime}", kind=kind, nested=True, regime=regime, inner=160)
    for bits in (2, 3, 4, 8):
        for regime in ("vector", "tile"):
            gptq = Case(name=f"gptq{bits}-{regime}", kind=f"gptq{bits}", regime=regime, hidden=128, inner=64)
            yield replace(gptq, name=f"{gptq.name}-act-order", act_order=True)
            yield replace(gptq, name=f"{gptq.name}-act-order-split", act_order=True, split=True, bias=True)
            yield replace(gptq, name=f"{gptq.name}-symmetric", symmetric=True, dtype=torch.bfloat16)
    yield Case(name="nf4-split", split=True, gating="gelu", regime="vector", bias=True)
    yield Case(name="mxfp4-split-tile", split=True, kind="mxfp4", regime="tile", bias=True)
    for tokens, kind in ((1, "nf4"), (1, "gptq4"), (2, "mxfp4"), (6, "gptq4"), (40, "nf4"), (200, "int8")):
        yield Case(name=f"tokens-{tokens}-{kind}", tokens=tokens, experts=4, kind=kind, dtype=torch.bfloat16)
    for kind in ("nf4", "gptq4", "float"):
        many = Case(name=f"{kind}-one-expert", kind=kind, regime="tile", tokens=9, one_expert=True, chosen=4)
        yield many
        yield replace(many, name=f"{kind}-larger-tiles", tile_rows=32, one_expert=False, dtype=torch.float16)
    yield Case(name="none-left", tokens=4, some_left_out=True, experts=1)
    yield Case(name="many-experts", tokens=2, experts=70, chosen=8, kind="float", regime="tile", hidden=32)


CASES = {case.name: case for case in _cases()}


def _features(case: Case) -> list[Any]:
    return [
        (case.kind, case.regime),
        (case.regime, case.dtype),
        case.gating,
        ("order", case.act_order, case.regime, case.kind == "gptq3"),
        ("two", case.split, case.kind.startswith("gptq")),
        ("nested", case.regime, case.nested),
        ("bias", case.regime, case.bias),
        (case.tokens, case.tile_rows),
        ("left out", case.regime, case.some_left_out),
        ("one", case.one_expert),
        case.experts > 16,
    ]


QUICK = covering(CASES, _features)
LARGE = {
    f"{kind}-{tokens}": Case(
        name=f"{kind}-{tokens}", kind=kind, tokens=tokens, experts=16, chosen=4, hidden=1024 + 64, inner=736,
        bias=tokens == 8, gating="gpt-oss" if tokens == 8 else "silu", symmetric=True, nested=tokens == 64,
        dtype=torch.bfloat16 if tokens % 3 else torch.float16,
    )
    for kind in KINDS
    for tokens in (1, 3, 8, 64, 300)
}  # fmt: skip
"""For a GPU: configs as they are used."""


def make_stack(case: Case, outputs: int, inputs: int, seed: int) -> Stack:
    """Quantize random weights of all experts."""
    made = torch.Generator().manual_seed(seed)
    stack: Stack
    if case.kind.startswith("float"):
        transposed = case.kind == "float-transposed"
        stack = float_stack(case.experts, outputs, inputs, transposed=transposed, made=made)
    elif case.kind == "mxfp4":
        stack = mxfp4_stack(case.experts, outputs, inputs, made=made)
    else:
        wanted = LinearCase(
            name="", kind=case.kind, nested=case.nested, act_order=case.act_order, symmetric=case.symmetric,
            block=64 if case.kind in ("nf4", "fp4") else 32, inputs=inputs,
        )  # fmt: skip
        weights = [weight_of(layer(wanted, outputs, 100 * seed + expert)) for expert in range(case.experts)]
        assert None not in weights
        stack = stack_of([weight for weight in weights if weight is not None])
    return with_bias(stack, made) if case.bias else stack


def make_choice(case: Case, made: torch.Generator) -> torch.Tensor:
    """Choose the experts of each token: different ones, as a router does, or all the same."""
    if case.one_expert:
        return torch.full((case.tokens, case.chosen), 3)
    scores = torch.rand(case.tokens, max(case.experts, case.chosen), generator=made)
    index = scores.topk(case.chosen, -1).indices
    if case.some_left_out:
        index[torch.rand(index.shape, generator=made) < 0.3] = case.experts
        index[0] = case.experts
    return index


def config_of(case: Case) -> ExpertsConfig | None:
    if case.regime is None:
        return None
    if case.regime == "vector":
        config = LinearConfig(regime="vector", outputs=32, words=8, warps=1)
    else:
        config = LinearConfig(regime="tile", outputs=16, words=16, stages=2, decode="table", tile_rows=case.tile_rows)
    return ExpertsConfig(first=config, second=replace(config, outputs=2 * config.outputs))


def inputs_of(case: Case, device: str) -> tuple[Any, ...]:
    gating = GATINGS[case.gating]
    hidden, inner = case.hidden, case.inner
    widths = [inner, inner] if case.split else [2 * inner if gating.is_gated else inner]
    first = [moved(make_stack(case, width, hidden, seed), device, case.dtype) for seed, width in enumerate(widths)]
    second = moved(make_stack(case, hidden, inner, 7), device, case.dtype)
    made = torch.Generator().manual_seed(9)
    x = torch.randn(case.tokens, hidden + 16, generator=made).to(device, case.dtype)[:, 16:]
    index = make_choice(case, made).to(device)
    weights = torch.rand(index.shape, generator=made).to(device, case.dtype)
    return x, first, second, index, weights, gating


def run_case(case: Case, device: str) -> dict[str, Any]:
    """Compare the kernels with the reference."""
    from langchain_quantllm.kernels.experts import dispatch

    given = inputs_of(case, device)
    config = config_of(case)
    found = dispatch.experts(*given, config=config)
    again = found if device == "cpu" else dispatch.experts(*given, config=config)
    expected = reference.experts(*given)
    error = (found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-9)
    return {
        "shape": list(found.shape),
        "dtype": str(found.dtype),
        "again": torch.equal(found, again),
        "cuts": device == "cpu" and case.dtype == torch.bfloat16,
        "error": float(error.nan_to_num(nan=torch.inf)),
        "largest": float(expected.abs().max()) if len(expected) else 0.0,
    }


def run_sorted(device: str) -> dict[str, Any]:
    """Put rows into tiles, and compare with plain Python."""
    from langchain_quantllm.kernels.experts.routing import most_tiles, sort_into_tiles

    sound, made = True, torch.Generator().manual_seed(4)
    for rows, experts, tile_rows in ((1, 3, 16), (16, 1, 16), (70, 5, 16), (2500, 12, 32), (40, 100, 16), (5, 2, 4)):
        index = torch.randint(-1, experts + 1, (rows,), generator=made).to(device)
        tiles = sort_into_tiles(index, experts, tile_rows)
        expected, of_tiles = reference.tiles_of_experts(index, experts, tile_rows)
        filled = [tile + [rows] * (tile_rows - len(tile)) for tile in expected]
        found = tiles.rows.view(-1, tile_rows)[: len(filled)].tolist()
        left = most_tiles(rows, experts, tile_rows) - len(filled)
        sound &= found == filled and tiles.experts.tolist() == of_tiles + [-1] * left
    return {"sound": bool(sound)}


def run_alone(device: str) -> dict[str, Any]:
    """Compute a token alone and among others, in tiles of one size."""
    from langchain_quantllm.kernels.experts import dispatch

    if device == "cpu":
        multiply_in_order()
    report = {}
    for kind in ("nf4", "int8", "gptq4", "mxfp4", "float"):
        case = Case(name="", kind=kind, tokens=9, bias=True, dtype=torch.bfloat16)
        x, first, second, index, weights, gating = inputs_of(case, device)
        whole = dispatch.tiled_experts(x, first, second, index, weights, gating, tile_rows=16)
        same = True
        for part in (slice(0, 1), slice(3, 8)):
            alone = dispatch.tiled_experts(x[part], first, second, index[part], weights[part], gating, tile_rows=16)
            same &= torch.equal(alone, whole[part])
        report[kind] = bool(same)
    return report


def run_refusals(device: str) -> dict[str, Any]:
    """Ask for what there is not."""
    from langchain_quantllm.errors import InvalidOptionError, UnsupportedError
    from langchain_quantllm.kernels.experts import dispatch

    given = inputs_of(CASES["nf4-tile"], device)
    x, first, second, index, weights, gating = given
    tile, vector = config_of(CASES["nf4-tile"]), config_of(CASES["nf4-vector"])
    assert tile is not None
    assert vector is not None
    refused = []
    for config in (
        replace(tile, second=vector.second),
        replace(tile, first=replace(tile.first, tile_rows=0), second=replace(tile.second, tile_rows=0)),
        replace(tile, first=replace(tile.first, splits=2)),
    ):
        try:
            dispatch.experts(*given, config=config)
        except InvalidOptionError as error:
            refused.append(str(error))
    interleaved = GATINGS["gpt-oss"]
    other = make_stack(replace(CASES["nf4-tile"], kind="int8"), first[0].out_features, 64, 1)
    for stacks, used in (
        (first * 3, gating),
        (first * 2, interleaved),
        ([first[0], other], gating),
        (first, GATINGS["relu"]),
    ):
        try:
            dispatch.experts(x, stacks, second, index, weights, used)
        except UnsupportedError as error:
            refused.append(str(error))
    return {"refused": refused}


def run_empty(device: str) -> dict[str, Any]:
    """Compute no tokens."""
    from langchain_quantllm.kernels.experts import dispatch

    x, first, second, index, weights, gating = inputs_of(CASES["nf4-tile"], device)
    return {"shape": list(dispatch.experts(x[:0], first, second, index[:0], weights[:0], gating).shape)}


def run_model(device: str) -> dict[str, Any]:
    """Fuse the experts of a model with the kernels, and compare its logits."""
    from langchain_quantllm.kernels.experts import dispatch

    model = make_mixture("gpt_oss", num_hidden_layers=1).to(device)
    fusion = Fusion(model, kernels=plain, linear_kernels=plain_linear, experts_kernels=dispatch, kinds=(EXPERTS,))
    [found] = fusion.summary
    ids = torch.arange(3, 24, device=device)[None]
    with torch.no_grad():
        expected = model(ids).logits
        with in_engine(fusion):
            error = (model(ids).logits - expected).norm() / expected.norm()
    return {"fused": found.fused, "left": dict(found.left), "error": float(error)}


OTHERS = {"model": run_model, "sorted": run_sorted, "alone": run_alone, "refusals": run_refusals, "empty": run_empty}


def run(name: str, device: str) -> dict[str, Any]:
    return OTHERS[name](device) if name in OTHERS else run_case(CASES[name], device)


def check(report: dict[str, Any], case: Case) -> None:
    """Compare a report with what must be.

    In 16 bits, the inputs of the second product are rounded, on tensor cores the weights too, and the outputs of each
    expert: some roundings, independent of each other. In float32 sums have another order. The interpreter cuts results
    off to bfloat16 where others round, so that the errors of a weight, of its inputs and of the outputs add up.
    """
    assert report["shape"] == [case.tokens, case.hidden]
    assert report["dtype"] == str(case.dtype)
    assert report["again"], "the same tokens twice differ"
    bound = 1e-5 if case.dtype == torch.float32 else (8 if report["cuts"] else 3) * ROUNDING[case.dtype]
    assert report["error"] <= bound


@pytest.mark.parametrize("name", slow_but(QUICK, CASES))
def test_experts_are_the_reference(found: Any, name: str) -> None:
    check(found(name), CASES[name])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("name", LARGE)
def test_large_experts_are_the_reference(name: str) -> None:
    check(run_case(LARGE[name], "cuda"), LARGE[name])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("kind", ["nf4", "gptq4", "mxfp4", "float"])
@pytest.mark.parametrize("tokens", [1, 8, 64])
def test_captured_experts_are_those_of_new_inputs_and_choices(kind: str, tokens: int) -> None:
    from langchain_quantllm.kernels.experts import dispatch

    x, first, second, index, weights, gating = inputs_of(LARGE[f"{kind}-{tokens}"], "cuda")
    dispatch.experts(x, first, second, index, weights, gating)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = dispatch.experts(x, first, second, index, weights, gating)
    x.copy_(torch.randn_like(x))
    index.copy_((index + 3) % first[0].experts)
    graph.replay()
    assert torch.equal(captured, dispatch.experts(x, first, second, index, weights, gating))


def test_rows_are_put_into_tiles_of_their_experts(found: Any) -> None:
    assert found("sorted") == {"sound": True}


def test_tiles_of_one_size_give_a_token_the_same_among_any_others(found: Any) -> None:
    report = found("alone")
    assert len(report) == 5
    assert all(report.values()), report


def test_what_there_is_not_is_refused(found: Any) -> None:
    refused = found("refusals")["refused"]
    assert len(refused) == 7
    assert sum("regime" in reason or "splits" in reason or "tiles of experts" in reason for reason in refused) == 3


def test_a_model_gives_the_same_logits_by_the_kernels(found: Any) -> None:
    report = found("model")
    assert (report["fused"], report["left"]) == (1, {})
    assert report["error"] < 1e-5


def test_no_tokens_make_no_outputs(found: Any) -> None:
    assert found("empty") == {"shape": [0, CASES["nf4-tile"].hidden]}


if __name__ == "__main__":
    report_cases(lambda name: run(name, "cpu"))

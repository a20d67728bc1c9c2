"""Quantized linear layers: the Triton kernels against plain torch, and that against the weights' own libraries.

Without a GPU the kernels run in Triton's interpreter, in one subprocess, except the instructions in PTX, which
`test_codebook` emulates. On a GPU the tests run the same cases compiled, and more.
"""

from __future__ import annotations

import copy
import importlib.util
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from langchain_quantllm.compat.gptqmodel_import import gptqmodel_imported
from langchain_quantllm.kernels.linear import reference as linear_reference
from langchain_quantllm.kernels.linear.bit_packing import pack_bits
from langchain_quantllm.kernels.linear.config import LinearConfig, config_for
from langchain_quantllm.kernels.linear.weights import (
    FourBitWeight,
    GPTQWeight,
    Int8Weight,
    Weight,
    float_weight_of,
    weight_of,
)
from langchain_quantllm.quantization.packing import RoundedLinear
from tests.support.interpreter import report_cases
from tests.support.selection import covering, slow_but

ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}
"""The largest relative error of rounding to a dtype: half of its machine epsilon."""


class PackedLinear(torch.nn.Module):
    """A layer of GPTQ as GPTQModel's torch and Triton layers hold it."""

    QUANT_TYPE = "tritonv2"

    def __init__(self, rounded: RoundedLinear, bias: torch.Tensor | None) -> None:
        super().__init__()
        packed = rounded.pack()
        self.bits = rounded.bits
        self.qweight, self.scales, self.g_idx, self.bias = packed["qweight"], packed["scales"], packed["g_idx"], bias
        self.qzeros = pack_bits(rounded.zeros, rounded.bits)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One product, of weights with the same inputs."""

    name: str
    kind: str = "nf4"
    """nf4, fp4, int8, or gptq with the number of bits."""
    nested: bool = False
    block: int = 64
    """Elements of a block, or inputs of a group."""
    act_order: bool = False
    symmetric: bool = False
    rows: int = 1
    inputs: int = 128
    outputs: tuple[int, ...] = (24,)
    bias: bool = False
    dtype: torch.dtype = torch.float32
    config: dict[str, Any] | None = None
    """Options of `LinearConfig`; None for the rule's."""

    @property
    def bits(self) -> int:
        return int(self.kind[4:]) if self.kind.startswith("gptq") else 8 if self.kind == "int8" else 4


VECTOR = {"regime": "vector", "outputs": 8, "words": 8, "warps": 1}
TILE = {"regime": "tile", "outputs": 16, "words": 16, "stages": 2, "decode": "table"}
MATRIX = {"regime": "matrix", "outputs": 64, "words": 8, "stages": 2, "decode": "permute", "tile_rows": 16}


def _cases() -> Iterator[Case]:
    halves = (torch.float16, torch.bfloat16)
    for kind in ("nf4", "fp4", "int8", "gptq4", "gptq8", "gptq2", "gptq3"):
        for rows in (1, 3, 8, 17):
            yield Case(name=f"{kind}-rows-{rows}", kind=kind, rows=rows, dtype=halves[rows % 2], outputs=(32,))
        yield Case(name=f"{kind}-float32", kind=kind, rows=2, outputs=(32,))
        yield Case(name=f"{kind}-float32-tile", kind=kind, rows=5, outputs=(32,))
        # Neither inputs nor outputs fill the tiles; with splits, the last have less to do, or nothing.
        odd = Case(name=f"{kind}-odd", kind=kind, block=32, inputs=160, outputs=(16 * 3,), bias=True)
        for splits in (1, 2, 8) if kind in ("nf4", "gptq4") else (2,):
            vector = {**VECTOR, "outputs": 32, "splits": splits}
            yield replace(odd, name=f"{odd.name}-vector-{splits}", rows=4, config=vector)
            tile = {**TILE, "outputs": 32, "splits": splits}
            yield replace(odd, name=f"{odd.name}-tile-{splits}", rows=9, config=tile)
        several = replace(odd, name=f"{kind}-several", outputs=(16, 48, 32), block=64, inputs=128)
        for count, dtype in ((2, torch.float16), (3, torch.bfloat16)):
            few = replace(several, outputs=several.outputs[:count], dtype=dtype)
            yield replace(few, name=f"{few.name}-vector-{count}", rows=2, config=VECTOR)
            yield replace(few, name=f"{few.name}-tile-{count}", rows=20, config={**TILE, "splits": 2})
    for kind, rows in itertools.product(("nf4", "fp4"), (2, 6)):
        config = VECTOR if rows == 2 else TILE
        nested = Case(name=f"{kind}-nested-{rows}", kind=kind, nested=True, rows=rows, config=config)
        yield replace(nested, inputs=96, outputs=(200,))  # 300 scales: more than one scale of them
        yield replace(nested, name=f"{nested.name}-several", outputs=(40, 8, 24), dtype=torch.bfloat16)
        for block in (128, 512):
            # Blocks that are longer than a row, and that do not end with one.
            yield replace(nested, name=f"{nested.name}-blocks-{block}", block=block, inputs=192, outputs=(33,))
        yield replace(nested, name=f"{nested.name}-row-of-words", nested=False, inputs=72, outputs=(19,))
    yield Case(name="int8-row-of-words", kind="int8", inputs=52, outputs=(19,), config=VECTOR)
    for bits, rows in itertools.product((2, 3, 4, 8), (1, 9)):
        config = VECTOR if rows == 1 else TILE
        gptq = Case(name=f"gptq{bits}-{rows}", kind=f"gptq{bits}", rows=rows, inputs=128, block=32, config=config)
        gptq = replace(gptq, outputs=(48,), dtype=torch.bfloat16)
        yield replace(gptq, name=f"{gptq.name}-act-order", act_order=True)
        yield replace(gptq, name=f"{gptq.name}-act-order-symmetric", act_order=True, symmetric=True)
        yield replace(gptq, name=f"{gptq.name}-symmetric", symmetric=True)
        yield replace(gptq, name=f"{gptq.name}-one-group", block=128)
        yield replace(gptq, name=f"{gptq.name}-one-group-odd", block=96, inputs=96)
        yield replace(gptq, name=f"{gptq.name}-large-groups", block=256, inputs=512, symmetric=True)
    # Rows, inputs and outputs do not fill the tiles; with 3 splits, the last has less to do.
    for kind in ("nf4", "fp4", "int8", "gptq4", "gptq8", "gptq2", "gptq3"):
        matrix = Case(name=f"{kind}-matrix", kind=kind, rows=37, inputs=160, outputs=(80,), block=32, config=MATRIX)
        matrix = replace(matrix, dtype=torch.float16)
        yield matrix
        yield replace(matrix, name=f"{matrix.name}-symmetric", symmetric=True, dtype=torch.bfloat16)
        several = replace(matrix, name=f"{matrix.name}-several", outputs=(80, 16, 48), bias=True, dtype=torch.bfloat16)
        yield replace(several, config={**MATRIX, "splits": 3, "ahead": 4})
        large = {**MATRIX, "words": 16, "tile_rows": 64}
        yield replace(several, name=f"{matrix.name}-groups", outputs=(64, 64), block=128, inputs=512, config=large)
    yield replace(matrix, name="nf4-matrix-nested", kind="nf4", nested=True, inputs=96, outputs=(200,), rows=18)
    many = Case(name="int8-many-rows", kind="int8", rows=70, outputs=(48, 16), bias=True, dtype=torch.bfloat16)
    yield many
    for kind in ("nf4", "int8", "gptq4"):
        yield replace(many, name=f"{kind}-more-rows", kind=kind, rows=530, outputs=(32,))
    for kind in ("nf4", "fp4"):
        yield replace(many, name=f"{kind}-many-rows", kind=kind, nested=True)
        yield replace(many, name=f"{kind}-many-rows-float32", kind=kind, nested=True, dtype=torch.float32)
    for bits in (2, 3, 4, 8):
        gptq = replace(many, name=f"gptq{bits}-many-rows", kind=f"gptq{bits}", inputs=160, block=32)
        yield gptq
        yield replace(gptq, name=f"{gptq.name}-act-order", act_order=True, symmetric=True, dtype=torch.float32)


def _whole(case: Case) -> Case:
    """Fill whole words with the zero points of 3 bits: 32 to 3 words."""
    return replace(case, outputs=tuple(-(-width // 32) * 32 for width in case.outputs)) if case.bits == 3 else case


CASES = {case.name: _whole(case) for case in _cases()}


def _features(case: Case) -> list[Any]:
    way = "rule" if case.config is None else case.config["regime"]
    kind = (case.kind, case.nested)
    return [
        (kind, way),
        (kind, case.dtype),
        ("several", case.kind, len(case.outputs) > 1),
        ("order", case.kind, case.act_order, case.symmetric),
        ("bias", way, case.bias),
        ("block", way, case.block),
        ("many rows", way, case.rows > 16),
        ("splits", way, (case.config or {}).get("splits")),
    ]


QUICK = covering(CASES, _features)
LARGE = {
    case.name: _whole(case)
    for kind, decode, rows in itertools.product(
        ("nf4", "fp4", "int8", "gptq4", "gptq8", "gptq2", "gptq3"),
        ("table", "permute", "mixed", "shuffle"),
        (1, 4, 8, 64, 100, 300),
    )
    for case in [
        Case(
            name=f"{kind}-{decode}-{rows}",
            kind=kind,
            nested=decode == "permute",
            rows=rows,
            inputs=2048 + 64,
            outputs=(1024, 208, 80) if kind == "gptq2" else (1024, 200, 72),  # whole words of zero points
            block=64 if kind in ("nf4", "fp4") else 32,
            dtype=torch.bfloat16 if rows % 8 else torch.float16,
            bias=decode == "table",
            config=None
            if decode == "table"
            else {"regime": "vector", "outputs": 8, "words": 128, "decode": decode, "splits": 2}
            if rows <= 4
            else {**MATRIX, "outputs": 128, "words": 16, "warps": 8, "tile_rows": 128, "splits": 3, "ahead": 4}
            if rows >= 100 and decode == "permute"
            else {"regime": "tile", "outputs": 64, "words": 32, "stages": 3, "decode": decode, "splits": 2},
        )
    ]
    if kind in ("nf4", "fp4") or decode in ("table", "permute")
}
"""For a GPU: every way to look up, and configs as they are used."""


def layer(case: Case, width: int, seed: int) -> torch.nn.Module:
    """Quantize random weights, with bitsandbytes itself or with this package's packing."""
    made = torch.Generator().manual_seed(seed)
    weight = torch.randn(width, case.inputs, generator=made) / case.inputs**0.5
    bias = torch.randn(width, generator=made).to(case.dtype) if case.bias else None
    if case.kind.startswith("gptq"):
        return PackedLinear(rounded(case, width, made), bias)
    import bitsandbytes

    if case.kind == "int8":
        module = bitsandbytes.nn.Linear8bitLt(case.inputs, width, bias=case.bias, has_fp16_weights=False)
        module.weight = bitsandbytes.nn.Int8Params(weight.half(), requires_grad=False).to("cpu")
    else:
        module = bitsandbytes.nn.Linear4bit(case.inputs, width, bias=case.bias, quant_type=case.kind)
        module.weight = bitsandbytes.nn.Params4bit(
            weight, blocksize=case.block, compress_statistics=case.nested, quant_type=case.kind
        ).to("cpu")
    if bias is not None:
        module.bias = torch.nn.Parameter(bias)
    return module


def rounded(case: Case, width: int, made: torch.Generator) -> RoundedLinear:
    """Make codes, zero points and scales at random."""
    groups = -(-case.inputs // case.block)
    shape = (groups, width)
    if case.symmetric:
        zeros = torch.full(shape, 1 << case.bits - 1, dtype=torch.uint8)
    else:
        zeros = torch.randint(1, 1 << case.bits, shape, generator=made, dtype=torch.uint8)
    index = torch.arange(case.inputs, dtype=torch.int32) // case.block
    if case.act_order:
        index = index[torch.randperm(case.inputs, generator=made)]
    return RoundedLinear(
        codes=torch.randint(0, 1 << case.bits, (case.inputs, width), generator=made, dtype=torch.uint8),
        zeros=zeros,
        scales=((torch.rand(shape, generator=made) + 0.5) / (1 << case.bits) / case.inputs**0.5).half(),
        g_idx=index,
        bits=case.bits,
    )


def on(weight: Weight, device: str) -> Weight:
    """Move the tensors of a weight."""
    tensors = {name: value.to(device) for name, value in vars(weight).items() if isinstance(value, torch.Tensor)}
    return replace(weight, **tensors)


def run_case(case: Case, device: str) -> dict[str, Any]:
    """Compare the kernels with the reference, and count what makes their errors."""
    from langchain_quantllm.kernels.linear import dispatch

    weights = []
    for seed, width in enumerate(case.outputs):
        weight = weight_of(layer(case, width, seed))
        assert weight is not None
        weights.append(on(weight, device))
    made = torch.Generator().manual_seed(9)
    # As models have them: a batch, and rows that are a part of something wider.
    wide = torch.randn(1, case.rows, case.inputs + 16, generator=made).to(device, case.dtype)
    x = wide[..., 16:]
    config = None if case.config is None else LinearConfig(**case.config)
    found = dispatch.grouped_linear(x, weights, config=config)
    # The interpreter runs programs one after another: it would find no race.
    again = found if device == "cpu" else dispatch.grouped_linear(x, weights, config=config)
    alone = found[0] if len(weights) == 1 else dispatch.quantized_linear(x, weights[0], weights[0].bias, config=config)
    expected = linear_reference.grouped_linear(x, weights)
    # An error of each term, independent of the others, and that of the result.
    terms = [x.double().square() @ linear_reference.dequantize(weight).square().t() for weight in weights]
    rounding = ROUNDING[case.dtype]
    excess = [
        ((f.double() - e).abs() - rounding * e.abs()) / t.sqrt() for f, e, t in zip(found, expected, terms, strict=True)
    ]
    # Results that lie on both sides of a border are rounded to neighbours.
    apart = ((alone.double() - found[0].double()).abs() - 2 * rounding * found[0].double().abs()) / terms[0].sqrt()
    return {
        "shapes": [list(f.shape) for f in found],
        "dense": all(f.is_contiguous() for f in found),
        "dtypes": [str(f.dtype) for f in found],
        "again": all(map(torch.equal, found, again)),
        "alone": float(apart.nan_to_num(nan=torch.inf).max()),
        "excess": max(float(e.nan_to_num(nan=torch.inf).max()) for e in excess),
    }


def run_empty(device: str) -> dict[str, Any]:
    """Multiply no rows."""
    from langchain_quantllm.kernels.linear import dispatch

    weight = on(weight_of(layer(CASES["nf4-float32"], 8, 0)), device)
    return {"shape": list(dispatch.quantized_linear(torch.zeros(2, 0, 128, device=device), weight).shape)}


def run_mixed(device: str) -> dict[str, Any]:
    """Multiply by weights of several formats, and by more than a launch takes."""
    from langchain_quantllm.kernels.linear import dispatch

    cases = [CASES[f"{kind}-float32"] for kind in ("nf4", "int8", "gptq4", "nf4")]
    weights = [on(weight_of(layer(case, 8 * seed + 8, seed)), device) for seed, case in enumerate(cases)]
    weights[2] = on(weight_of(layer(cases[2], 16, 2)), device)
    x = torch.randn(2, 128, generator=torch.Generator().manual_seed(1)).to(device)
    expected = linear_reference.grouped_linear(x, weights)
    found = dispatch.grouped_linear(x, weights)
    return {"error": max(float((f - e).abs().max()) for f, e in zip(found, expected, strict=True))}


def run_refusals(device: str) -> dict[str, Any]:
    """Ask for what there is not."""
    from langchain_quantllm.errors import InvalidOptionError
    from langchain_quantllm.kernels.linear import dispatch

    weight = on(weight_of(layer(CASES["nf4-float32"], 8, 0)), device)
    refused = []
    for rows, options in (
        (5, VECTOR),
        (1, {**VECTOR, "decode": "guess"}),
        (1, {**VECTOR, "regime": "scalar"}),
        (70, {**MATRIX, "decode": "shuffle"}),
        (70, MATRIX),  # for float32
    ):
        try:
            x = torch.zeros(rows, 128, device=device)
            dispatch.quantized_linear(x, weight, config=LinearConfig(**options))
        except InvalidOptionError as error:
            refused.append(str(error))
    return {"refused": len(refused)}


def run_rule(device: str) -> dict[str, Any]:
    """Ask for the configs of a small model and of a large one."""
    weights = [weight_of(layer(CASES[f"{kind}-float32"], 32, 0)) for kind in ("nf4", "int8", "gptq4", "gptq2")]
    sound = True
    for weight, size, rows in itertools.product(weights, (128, 4096, 11008), (1, 4, 5, 64)):
        large = replace(weight, in_features=size, out_features=size)
        for dtype in ROUNDING:
            config = config_for(large, rows, 132, dtype=dtype)
            powers = (config.outputs, config.words, config.splits, config.warps)
            sound &= all(value & value - 1 == 0 for value in powers)
            sound &= config.regime in (("vector",) if rows <= 2 else ("tile", "matrix"))
            if config.regime == "matrix":
                sound &= config.tile_rows >= rows and config.splits <= -(-size // 128)
            sound &= config.words >= (4 if config.regime == "vector" else 16)
            sound &= size < 4096 or config.splits * -(-size // config.outputs) >= 0.9 * 132  # nearly all of it
    for weight, size, rows in itertools.product(weights, (128, 4096, 11008), (65, 128, 300, 512)):
        large = replace(weight, in_features=size, out_features=size)
        for dtype, is_roomy in itertools.product((torch.float16, torch.bfloat16), (False, True)):
            config = config_for(large, rows, 132, dtype=dtype, is_roomy=is_roomy)
            powers = (config.outputs, config.words, config.tile_rows, config.warps)
            sound &= config.regime == "matrix" and all(value & value - 1 == 0 for value in powers)
            # A step reads 128 inputs, and no split is without a step.
            steps = -(-size * _bits(weight) // (32 * config.words))
            sound &= config.words * 32 == 128 * _bits(weight) and 1 <= config.splits <= steps
            programs = config.splits * -(-size // config.outputs) * -(-rows // config.tile_rows)
            sound &= size < 4096 or programs >= 0.6 * 132
        # Without tensor cores, or with a scale for each input, it has no such regime.
        sound &= config_for(large, rows, 132, dtype=torch.float32).regime == "tile"
    return {"sound": bool(sound)}


def _bits(weight: Weight) -> int:
    return 8 if isinstance(weight, Int8Weight) else weight.bits if isinstance(weight, GPTQWeight) else 4


def run_float(device: str) -> dict[str, Any]:
    """Multiply by weights that are not quantized: few rows by the kernel, more by torch."""
    from langchain_quantllm.kernels.linear import dispatch

    report = {}
    for dtype, rows, splits in itertools.product((torch.float16, torch.bfloat16), (1, 2, 3, 4, 6), (1, 3)):
        made = torch.Generator().manual_seed(rows)
        weights = []
        for width in (130, 128, 257):
            linear = torch.nn.Linear(328, width).to(device, dtype)
            linear.weight.data.copy_(torch.randn(width, 328, generator=made) / 328**0.5)
            weights.append(float_weight_of(linear))
        x = torch.randn(rows, 2 * 328, generator=made).to(device, dtype)[:, 328:]
        config = (
            None if rows > 4 else LinearConfig(regime="vector", outputs=64, words=64, splits=splits, decode="table")
        )
        found = dispatch.grouped_linear(x, weights, config=config)
        expected = linear_reference.grouped_linear(x, weights)
        error = max(float((f - e).abs().max()) for f, e in zip(found, expected, strict=True))
        report[f"{dtype} {rows} {splits}"] = error / (4 * ROUNDING[dtype])  # results of up to 4, cut off or rounded
    return report


def run_tiled(device: str) -> dict[str, Any]:
    """Multiply rows alone and among others, in tiles of one size."""
    from langchain_quantllm.kernels.linear import dispatch

    report = {}
    for kind, dtype in itertools.product(("nf4", "int8", "gptq4", "gptq3"), ROUNDING):
        case = CASES[f"{kind}-float32"]
        weights = [on(weight_of(layer(case, width, seed)), device) for seed, width in enumerate((32, 96))]
        if len({weight.layout for weight in weights}) > 1:
            weights = weights[:1]
        x = torch.randn(70, case.inputs, generator=torch.Generator().manual_seed(3)).to(device, dtype)
        whole = dispatch.tiled_linear(x, weights, None, tile_rows=64)
        same = True
        for start, end in ((0, 1), (69, 70), (3, 40)):
            parts = dispatch.tiled_linear(x[start:end], weights, None, tile_rows=64)
            same &= all(torch.equal(part, one[start:end]) for part, one in zip(parts, whole, strict=True))
        errors = [
            float((one - expected).norm() / expected.norm())
            for one, expected in zip(whole, linear_reference.grouped_linear(x, weights), strict=True)
        ]
        report[f"{kind}-{str(dtype).removeprefix('torch.')}"] = {"same": same, "error": max(errors)}
    return report


OTHERS = {
    "empty": run_empty,
    "mixed": run_mixed,
    "refusals": run_refusals,
    "rule": run_rule,
    "tiled": run_tiled,
    "float": run_float,
}


def run(name: str, device: str) -> dict[str, Any]:
    return OTHERS[name](device) if name in OTHERS else run_case(CASES[name], device)


def tolerance(case: Case) -> float:
    """Bound the error, in units of the root of the sum of the squared terms.

    On tensor cores a value, its scale and their product are rounded: three roundings of every term. Values that are
    looked up two at a time come from float16 in float32 too. The errors of terms are independent, and 5 deviations
    hold for all outputs. The interpreter cuts results off to bfloat16 where others round: 6 deviations are the largest
    result. Sums in float32 add up to one rounding of each term.
    """
    term = ROUNDING[torch.float32]
    if case.dtype != torch.float32 and (case.rows > 2 if case.config is None else case.config["regime"] != "vector"):
        term = 3 * ROUNDING[case.dtype]
    if case.config is not None and case.config.get("decode") in ("permute", "mixed"):
        term = max(term, ROUNDING[torch.float16])
    cut = 6 * ROUNDING[case.dtype] if case.dtype == torch.bfloat16 else 0
    return 5 * term + cut + 16 * ROUNDING[torch.float32] * case.inputs**0.5


def check(report: dict[str, Any], case: Case) -> None:
    assert report["shapes"] == [[1, case.rows, width] for width in case.outputs]
    assert report["dense"]
    assert report["dtypes"] == [str(case.dtype)] * len(case.outputs)
    assert report["again"], "the same product twice differs"
    assert report["excess"] <= tolerance(case)
    # The kernel for one weight is compiled apart from that for several, and may contract other products with their
    # sums: some roundings of float32. The rule may choose another config for it.
    assert report["alone"] <= (16 * ROUNDING[torch.float32] if case.config else 2 * tolerance(case))


@pytest.mark.parametrize("name", slow_but(QUICK, CASES))
def test_products_are_the_reference(found: Any, name: str) -> None:
    check(found(name), CASES[name])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("name", LARGE)
def test_large_products_are_the_reference(name: str) -> None:
    check(run_case(LARGE[name], "cuda"), LARGE[name])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("kind", ["nf4", "int8", "gptq4"])
def test_a_captured_product_is_that_of_new_inputs(kind: str) -> None:
    from langchain_quantllm.kernels.linear import dispatch

    case = replace(LARGE[f"{kind}-table-8"], outputs=(1024,), bias=False)
    weight = on(weight_of(layer(case, 1024, 0)), "cuda")
    for rows in (1, 8):
        x = torch.randn(rows, case.inputs, device="cuda", dtype=torch.bfloat16)
        dispatch.quantized_linear(x, weight)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = dispatch.quantized_linear(x, weight)
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(captured, dispatch.quantized_linear(x, weight))


def test_no_rows_make_no_rows(found: Any) -> None:
    assert found("empty") == {"shape": [2, 0, 8]}


def test_weights_of_several_formats_are_multiplied(found: Any) -> None:
    assert found("mixed")["error"] <= 1e-4


def test_what_there_is_not_is_refused(found: Any) -> None:
    assert found("refusals") == {"refused": 5}


def test_weights_that_are_not_quantized_are_multiplied(found: Any) -> None:
    report = found("float")
    assert len(report) == 20
    assert max(report.values()) <= 2, report


def test_float_weights_are_views_of_usual_layers() -> None:
    linear = torch.nn.Linear(256, 128, dtype=torch.bfloat16)
    weight = float_weight_of(linear)
    assert weight is not None
    assert (weight.in_features, weight.out_features) == (256, 128)
    assert weight.words.data_ptr() == linear.weight.data_ptr()
    assert weight.bias is not None
    assert weight.bias.data_ptr() == linear.bias.data_ptr()
    for other in (
        torch.nn.Linear(256, 128),  # float32
        torch.nn.Linear(256, 16, dtype=torch.bfloat16),  # an adapter's
        torch.nn.Linear(260, 128, dtype=torch.bfloat16),  # not whole vectors
        torch.nn.Conv1d(256, 256, 1, dtype=torch.bfloat16),
        layer(CASES["nf4-float32"], 128, 0),
    ):
        assert float_weight_of(other) is None


def test_the_rule_fits_and_fills_the_device(found: Any) -> None:
    assert found("rule") == {"sound": True}


@pytest.mark.parametrize(
    "name", [name for name, case in CASES.items() if case.kind in ("nf4", "fp4") and case.config and not case.bias]
)
def test_reference_dequantizes_as_bitsandbytes(name: str) -> None:
    from bitsandbytes.functional import dequantize_4bit

    case = CASES[name]
    module: Any = layer(case, case.outputs[0], 0)
    weight = weight_of(module)
    # In one row: on the CPU bitsandbytes quantizes blocks that go on in the next row, but does not dequantize them.
    state = copy.copy(module.weight.quant_state)
    state.shape = torch.Size((1, module.weight.numel() * 2))
    expected = dequantize_4bit(module.weight.data, state).reshape(case.outputs[0], case.inputs)
    assert isinstance(weight, FourBitWeight)
    # Both in float32.
    torch.testing.assert_close(linear_reference.dequantize(weight).float(), expected, rtol=1e-6, atol=1e-7)


def test_reference_dequantizes_int8_as_bitsandbytes() -> None:
    from bitsandbytes.functional import int8_vectorwise_dequant

    module: Any = layer(CASES["int8-float32"], 32, 0)
    expected = int8_vectorwise_dequant(module.weight.data, module.weight.SCB)
    torch.testing.assert_close(linear_reference.dequantize(weight_of(module)).float(), expected, rtol=1e-5, atol=1e-7)
    x = torch.randn(2, 128, dtype=torch.float16, generator=torch.Generator().manual_seed(0))
    module(x)  # its scales move into its state
    torch.testing.assert_close(linear_reference.dequantize(weight_of(module)).float(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.kind.startswith("gptq")])
def test_reference_dequantizes_what_was_packed(name: str) -> None:
    case = CASES[name]
    made = torch.Generator().manual_seed(0)
    made_of = rounded(case, 32, made)
    found = linear_reference.dequantize(weight_of(PackedLinear(made_of, None)))
    assert torch.equal(found.float(), made_of.dequantize())


@pytest.mark.skipif(importlib.util.find_spec("gptqmodel") is None, reason="needs gptqmodel")
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_layers_of_gptqmodel_are_weights(bits: int) -> None:
    with gptqmodel_imported():
        from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    made_of = rounded(Case(name="", kind=f"gptq{bits}", block=32), 64, torch.Generator().manual_seed(3))
    with gptqmodel_imported():
        module = TorchLinear(bits=bits, group_size=32, sym=False, desc_act=False, in_features=128, out_features=64)
        for name, tensor in {**made_of.pack(), "qzeros": pack_bits(made_of.zeros, bits)}.items():
            getattr(module, name).copy_(tensor)
        own = module.dequantize_weight().float().t()
    weight = weight_of(module)
    assert isinstance(weight, GPTQWeight)
    assert weight.group_size == 32
    # GPTQModel dequantizes in float16.
    torch.testing.assert_close(linear_reference.dequantize(weight).float(), own, rtol=2e-3, atol=1e-5)


def test_weights_are_views() -> None:
    for kind, name in (("nf4", "weight"), ("int8", "weight"), ("gptq4", "qweight")):
        module = layer(CASES[f"{kind}-float32"], 32, 0)
        weight = weight_of(module)
        assert weight is not None
        assert weight.words.data_ptr() == getattr(module, name).data_ptr()
    assert isinstance(weight_of(layer(CASES["int8-float32"], 32, 0)), Int8Weight)


def test_what_has_no_kernel_is_none() -> None:
    assert weight_of(torch.nn.Linear(8, 8)) is None
    assert weight_of(torch.nn.LayerNorm(8)) is None
    assert weight_of(layer(replace(CASES["nf4-float32"], inputs=68), 8, 0)) is None  # a word of two rows
    assert weight_of(layer(replace(CASES["int8-float32"], inputs=66), 8, 0)) is None
    five: Any = layer(CASES["gptq4-float32"], 32, 0)
    five.bits = 5
    assert weight_of(five) is None
    not_whole: Any = layer(replace(CASES["gptq3-float32"], inputs=96, outputs=(32,)), 32, 0)
    not_whole.qweight, not_whole.g_idx = not_whole.qweight[:-1].contiguous(), not_whole.g_idx[:85].contiguous()
    assert weight_of(not_whole) is None
    uneven: Any = layer(CASES["gptq3-float32"], 32, 0)
    uneven.qweight, uneven.scales = uneven.qweight[:, :24].contiguous(), uneven.scales[:, :24].contiguous()
    uneven.qzeros = uneven.qzeros[:, :2].contiguous()
    assert weight_of(uneven) is None
    marlin: Any = layer(CASES["gptq4-float32"], 32, 0)
    marlin.QUANT_TYPE = "marlin"
    assert weight_of(marlin) is None


def test_tiles_of_one_size_give_a_row_the_same_among_any_others(found: Any) -> None:
    for name, report in found("tiled").items():
        assert report["same"], name
        assert report["error"] < (1e-5 if name.endswith("float32") else 2.0**-7), name


if __name__ == "__main__":
    report_cases(lambda name: run(name, "cpu"))

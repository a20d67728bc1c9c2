"""The fused kernels against the same functions in plain torch, and those against transformers' own modules.

Without a GPU the kernels run in Triton's interpreter, which must be switched on before Triton is imported: one
subprocess runs this file as a module, all cases, and the tests look at what it reports. On a GPU the tests run
the same cases themselves, compiled.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from transformers.models.bamba.modeling_bamba import BambaRMSNormGated
from transformers.models.cohere.modeling_cohere import apply_rotary_pos_emb as rotate_pairs
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.glm.modeling_glm import apply_rotary_pos_emb as rotate_pairs_of_halves
from transformers.models.gpt_oss.modeling_gpt_oss import apply_rotary_pos_emb as rotate_halves_once
from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearRMSNormGated
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as rotate_halves
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5RMSNormGated

from langchain_quantllm.engine.fusion.fuse import EXPERTS, GATED_MLP, LINEAR, Fusion
from langchain_quantllm.kernels import kv_quantization, reference
from tests.support.families import FAST, family_model
from tests.support.interpreter import report_cases
from tests.support.selection import covering, slow_but

ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}
"""The largest relative error of rounding to a dtype: half of its machine epsilon."""

BLOCK_TOKENS = 16


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call of a function of both modules.

    Args:
        name: Of the case.
        call: The function.
        dtype: Of its tensors.
        shape: Of its first one: numbers of a norm or gate; tokens and rotary dimension of angles; tokens, heads, key
            heads, dimensions and rotary dimension.
        options: What it is called with by name.
        is_strided: Whether tensors are views whose rows lie apart.
    """

    name: str
    call: str
    dtype: torch.dtype = torch.float32
    shape: tuple[int, ...] = (3, 64)
    options: dict[str, Any] = field(default_factory=dict)
    is_strided: bool = False
    kv: str = "auto"
    """The format of the pool: that of `dtype`, or one in 8 bits."""


def _cases() -> Iterator[Case]:
    shapes = {"one": (1, 1, 64), "odd": (1, 3, 77), "heads": (1, 5, 3, 24), "wide": (1, 2, 1100), "rows": (70, 8)}
    for dtype in ROUNDING:
        kind = str(dtype).removeprefix("torch.")
        for name, shape in shapes.items():
            for call in ("rms_norm", "add_rms_norm"):
                yield Case(name=f"{call}-{name}-{kind}", call=call, dtype=dtype, shape=shape)
                options = {"offset": 1.0, "rounds_first": False}
                yield Case(name=f"{call}-offset-{name}-{kind}", call=call, dtype=dtype, shape=shape, options=options)
            for gating, first in itertools.product((reference.SILU, reference.SIGMOID), (True, False)):
                groups = 2 if shape[-1] % 2 == 0 and first else 1
                yield Case(
                    name=f"gated_rms_norm-{gating}-{first}-{name}-{kind}",
                    call="gated_rms_norm",
                    dtype=dtype,
                    shape=shape,
                    options={"gating": gating, "gates_first": first, "rounds": shape[0] == 1, "groups": groups},
                )
            for bias in (True, False):
                yield Case(
                    name=f"add_layer_norm-{bias}-{name}-{kind}",
                    call="add_layer_norm",
                    dtype=dtype,
                    shape=shape,
                    options={"has_bias": bias},
                )
            for activation in (reference.SILU, reference.GELU, reference.GELU_TANH):
                options = {"activation": activation}
                yield Case(
                    name=f"activation_mul-{activation}-{name}-{kind}",
                    call="activation_mul",
                    dtype=dtype,
                    shape=shape,
                    options=options,
                )
        heads = {
            "plain": (3, 2, 2, 16, 16),
            "grouped": (5, 6, 2, 32, 32),
            "odd": (2, 3, 1, 20, 12),
            "part": (4, 4, 4, 80, 32),
        }
        for name, shape in heads.items():
            for layout in (reference.HALVES, reference.PAIRS, reference.PAIRS_OF_HALVES, reference.HALVES_ONCE):
                for rounds in (True, False):
                    options = {"layout": layout, "rounds": rounds}
                    label = f"rotate-{name}-{layout}-{rounds}-{kind}"
                    yield Case(name=label, call="rotate_and_write", dtype=dtype, shape=shape, options=options)
        for name, shape in {"plain": (5, 16), "odd": (1, 20), "wide": (70, 128)}.items():
            for twice in (True, False):
                label = f"cos_sin-{name}-{twice}-{kind}"
                yield Case(name=label, call="cos_sin", dtype=dtype, shape=shape, options={"twice": twice})
    for call in ("rms_norm", "add_rms_norm", "activation_mul", "add_layer_norm"):
        options = {"activation": reference.SILU} if call == "activation_mul" else {}
        yield Case(name=f"{call}-strided", call=call, shape=(1, 6, 48), options=options, is_strided=True)
    yield Case(name="rotate-strided", call="rotate_and_write", shape=(5, 4, 2, 32, 32), is_strided=True)
    for kv in kv_quantization.KV_DTYPES:
        for kind in (torch.float16, torch.float32):
            name = f"rotate-{kv}-{str(kind).removeprefix('torch.')}"
            yield Case(name=name, call="rotate_and_write", dtype=kind, shape=(5, 6, 2, 32, 32), kv=kv)
    yield Case(
        name="activation_mul-two-tiles", call="activation_mul", shape=(2, 1500), options={"activation": reference.SILU}
    )


CASES = {case.name: case for case in _cases()}


def _features(case: Case) -> list[Any]:
    options = tuple(case.options.items())
    parts = {"shape": case.shape, "dtype": case.dtype, "options": options, "strided": case.is_strided}
    return [(case.call, *part) for part in parts.items()]


QUICK = covering(CASES, _features)

MODELS = ("llama-grouped", "llama-head-80", "qwen3", "gemma2", "phi3", "stablelm", "glm4", "gpt_oss")
"""Families of which every step is fused, with what it takes: all kinds of norms, gates and rotations."""


def _random(shape: tuple[int, ...], case: Case, generator: torch.Generator, device: str) -> torch.Tensor:
    if case.is_strided:  # a part of something wider, as of a product that gives two or three at once
        wide = torch.randn(*shape[:-1], 2 * shape[-1], generator=generator).to(device, case.dtype)
        return wide[..., shape[-1] :]
    return torch.randn(*shape, generator=generator).to(device, case.dtype)


def arguments(case: Case, device: str) -> dict[str, Any]:
    """Make random arguments of a case, the same for every module."""
    made = torch.Generator().manual_seed(len(case.name))
    options = dict(case.options)
    if case.call == "activation_mul":
        return {
            "gate": 3 * _random(case.shape, case, made, device),
            "up": _random(case.shape, case, made, device),
            **options,
        }
    if case.call == "cos_sin":
        tokens, width = case.shape
        return {
            "positions": torch.randint(100_000, (1, tokens), generator=made).to(device),
            "frequencies": (10_000 ** (-torch.arange(0, width, 2) / width)).to(device),
            "scale": 1.25,
            "dtype": case.dtype,
            **options,
        }
    if case.call == "rotate_and_write":
        return {**_rotary_arguments(case, made, device), **options}
    width = case.shape[-1]
    given = {"x": _random(case.shape, case, made, device), "eps": 1e-5}
    if case.call == "gated_rms_norm":
        given["gate"] = 3 * _random(case.shape, case, made, device)
    elif case.call != "rms_norm":
        given["residual"] = 2 * _random(case.shape, case, made, device)
    given["weight"] = torch.randn(width, generator=made).to(device, case.dtype)
    if case.call == "add_layer_norm":
        bias = torch.randn(width, generator=made).to(device, case.dtype)
        given["bias"] = bias if options.pop("has_bias", True) else None
    return {**given, **options}


def _rotary_arguments(case: Case, made: torch.Generator, device: str) -> dict[str, Any]:
    tokens, heads, kv_heads, dim, rotary_dim = case.shape
    # As models have them: (1, tokens, heads, dim), transposed.
    query, key, value = (
        _random((1, tokens, count, size), case, made, device).transpose(1, 2)
        for count, size in ((heads, dim), (kv_heads, dim), (kv_heads, dim + 4))
    )
    value[0, 0, 1, 2], value[0, 0, -1, dim - 1] = torch.nan, -torch.inf  # their keys become NaN
    is_once = case.options.get("layout") == reference.HALVES_ONCE
    angles = torch.randn(1, tokens, rotary_dim // (2 if is_once else 1), generator=made) * 3
    # Rows 2 and 0, with pages in any order; the last page is nobody's.
    table = torch.tensor([[4, 1], [2**30, 2**30], [3, 0]], dtype=torch.int32, device=device)
    positions = torch.tensor([(13 + i) % 32 for i in range(tokens)], dtype=torch.int32, device=device)
    slots = torch.tensor([2 - 2 * (i % 2) for i in range(tokens)], dtype=torch.int32, device=device)
    kv = torch.full((6, BLOCK_TOKENS, kv_heads, 2 * dim + 4), torch.nan, dtype=case.dtype, device=device)
    scales = None
    if case.kv != "auto":
        kv = torch.full(kv.shape, 99, dtype=kv_quantization.KV_DTYPES[case.kv], device=device)
        pairs = torch.zeros(6, kv_heads, BLOCK_TOKENS, 2, dtype=kv_quantization.SCALE_DTYPE, device=device)
        factors = torch.exp2(torch.randint(-3, 4, (kv_heads, dim), generator=made).float()).to(device)
        scales = kv_quantization.KVScales(pairs, factors)
    return {
        "scales": scales,
        "query": query,
        "key": key,
        "value": value,
        "cos": angles.cos().to(device, case.dtype),
        "sin": angles.sin().to(device, case.dtype),
        "kv": kv,
        "table": table,
        "slots": slots,
        "positions": positions,
    }


def call(module: Any, case: Case, device: str) -> list[torch.Tensor]:
    """Call a function of a module; gives what it returns and writes."""
    given = arguments(case, device)
    found = getattr(module, case.call)(**given)
    outputs = list(found) if isinstance(found, tuple) else [found]
    if "kv" in given:
        outputs += [given["kv"]] if given["scales"] is None else [given["kv"], given["scales"].pairs]
    return outputs


def run_case(case: Case, device: str) -> dict[str, Any]:
    """Compare a kernel with its reference on one case."""
    from langchain_quantllm.kernels import norms

    found, expected = call(norms, case, device), call(reference, case, device)
    both = list(zip(found, expected, strict=True))
    return {
        "like": all(f.shape == e.shape and f.dtype == e.dtype for f, e in both),
        "dense": all(f.is_contiguous() for f in found) or case.call == "rotate_and_write",
        "same_holes": all(torch.equal(f.isnan(), e.isnan()) for f, e in both),
        "equal": [float((f == e)[~e.isnan()].double().mean()) for f, e in both],
        "cuts": device == "cpu" and case.dtype == torch.bfloat16,
        # Sums whose parts cancel are off by the rounding of the parts, which are of the size of 1.
        "error": max(float(((f - e).float().abs() / (e.float().abs() + 1)).nan_to_num(nan=0).max()) for f, e in both),
    }


def run_model(family: str, device: str) -> dict[str, Any]:
    """Fuse a model with the kernels; gives what is not the same then."""
    from langchain_quantllm.kernels import norms
    from langchain_quantllm.kernels.linear import dispatch

    fusion = Fusion(family_model(FAST[family]).to(device), kernels=norms, linear_kernels=dispatch)
    return {
        "unsupported_reason": fusion.unsupported_reason,
        "kinds": {k.kind: [k.fused, dict(k.left)] for k in fusion.summary},
    }


def run(name: str, device: str) -> dict[str, Any]:
    return run_model(name, device) if name in MODELS else run_case(CASES[name], device)


@pytest.mark.parametrize("name", slow_but(QUICK, CASES))
def test_kernels_are_the_reference(found: Any, name: str) -> None:
    report, case = found(name), CASES[name]
    assert report["like"]
    assert report["dense"]
    assert report["same_holes"], "something else was written, or less"
    # Two values that round the other way at a border, and one product of them. Sums of some hundred squares in
    # another order, and other exponentials, are off by several times float32's rounding. Where bfloat16 is cut off
    # instead of rounded, as the interpreter does it, each of up to three roundings is off by twice as much.
    roundings = 8 if report["cuts"] else 4
    assert report["error"] <= roundings * ROUNDING[case.dtype] + 64 * ROUNDING[torch.float32]
    if report["cuts"]:
        return
    if case.call == "rotate_and_write":
        assert min(report["equal"]) == 1.0  # two products and their sum leave nothing to order
    elif case.dtype != torch.float32:
        assert min(report["equal"]) > 0.9  # those differences hardly ever show


@pytest.mark.parametrize("name", slow_but(("llama-grouped", "gemma2"), MODELS))
def test_kernels_are_what_models_do(found: Any, name: str) -> None:
    """They take the tensors of models as these have them, and give the same."""
    report = found(name)
    assert report["unsupported_reason"] is None
    for kind, (fused, left) in report["kinds"].items():
        # Nothing is quantized, there are no experts, or nothing but experts.
        assert fused > 0 or kind in (LINEAR, EXPERTS) or (name, kind) == ("gpt_oss", GATED_MLP)
        assert left == {}


def _weighted(norm: Any, width: int, dtype: torch.dtype) -> Any:
    with torch.no_grad():
        norm.weight.copy_(torch.randn(width, generator=torch.Generator().manual_seed(1)))
    return norm.to(dtype)


@pytest.mark.parametrize("dtype", ROUNDING)
class TestReference:
    """The reference does what transformers does, to the last bit."""

    def test_rms_norm(self, dtype: torch.dtype) -> None:
        x = torch.randn(3, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
        for kind, options in (
            (LlamaRMSNorm, {"rounds_first": True}),
            (Olmo2RMSNorm, {"rounds_first": False}),
            (Gemma2RMSNorm, {"rounds_first": False, "offset": 1.0}),
        ):
            norm = _weighted(kind(40, eps=1e-5), 40, dtype)
            with torch.no_grad():
                assert torch.equal(reference.rms_norm(x, norm.weight, 1e-5, **options), norm(x))
                total, normed = reference.add_rms_norm(x, 2 * x, norm.weight, 1e-5, **options)
                assert torch.equal(total, 2 * x + x)
                assert torch.equal(normed, norm(total))

    def test_gated_rms_norm(self, dtype: torch.dtype) -> None:
        made = torch.Generator().manual_seed(0)
        x, gate = (torch.randn(3, 40, generator=made).to(dtype) for _ in range(2))
        after, before = {"gates_first": False, "groups": 1}, {"gates_first": True, "groups": 4}
        for norm, options in (
            (Qwen3_5RMSNormGated(40, eps=1e-5), {"gating": reference.SILU, "rounds": True, **after}),
            (KimiLinearRMSNormGated(40, eps=1e-5), {"gating": reference.SIGMOID, "rounds": False, **after}),
            (BambaRMSNormGated(40, group_size=10, eps=1e-5), {"gating": reference.SILU, "rounds": True, **before}),
        ):
            _weighted(norm, 40, dtype)
            with torch.no_grad():
                assert torch.equal(reference.gated_rms_norm(x, gate, norm.weight, 1e-5, **options), norm(x, gate))

    def test_add_layer_norm(self, dtype: torch.dtype) -> None:
        x = torch.randn(3, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
        norm = torch.nn.LayerNorm(40).to(dtype)
        with torch.no_grad():
            _, normed = reference.add_layer_norm(x, x, norm.weight, norm.bias, norm.eps)
            assert torch.equal(normed, norm(x + x))

    @pytest.mark.parametrize("kind", ["default", "linear", "llama3", "yarn"])
    def test_cos_sin(self, dtype: torch.dtype, kind: str) -> None:
        rope: dict[str, Any] = {"rope_type": kind, "rope_theta": 10_000.0, "factor": 4.0}
        rope |= {"original_max_position_embeddings": 64, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        module = LlamaRotaryEmbedding(LlamaConfig(hidden_size=64, num_attention_heads=2, rope_parameters=rope))
        positions = torch.tensor([[3, 0, 100, 70_000]])
        found = reference.cos_sin(positions, module.inv_freq, module.attention_scaling, dtype)
        expected = module(torch.zeros(1, dtype=dtype), positions)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))

    @pytest.mark.parametrize("name", [name for name in CASES if name.startswith("rotate-grouped")])
    def test_rotary(self, dtype: torch.dtype, name: str) -> None:
        case = CASES[name]
        if case.dtype != dtype:
            pytest.skip("another dtype's")
        given = arguments(case, "cpu")
        theirs = (rotate_halves, rotate_pairs, rotate_pairs_of_halves, rotate_halves_once)[case.options["layout"]]
        if (theirs is rotate_pairs) == case.options["rounds"]:
            pytest.skip("transformers does not round so")
        query, key = theirs(given["query"], given["key"], given["cos"], given["sin"])
        assert torch.equal(reference.rotate_and_write(**given), query)
        for token in range(case.shape[0]):
            position = int(given["positions"][token])
            page = int(given["table"][given["slots"][token], position // BLOCK_TOKENS])
            written = given["kv"][page, position % BLOCK_TOKENS]
            expected = torch.cat([key[0, :, token], given["value"][0, :, token]], -1)
            sound = expected.isfinite().all(-1)
            assert torch.equal(written[sound], expected[sound])
            assert written[~sound, : case.shape[3]].isnan().all()
            assert not written[~sound, case.shape[3] :].any()


if __name__ == "__main__":
    report_cases(lambda name: run(name, "cpu"))

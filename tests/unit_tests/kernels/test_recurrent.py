"""The kernels of gated delta rules and convolutions against plain torch, and that against transformers' functions.

Without a GPU the kernels run in Triton's interpreter; see `test_norms_and_rotary`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers.models.kimi_linear.modeling_kimi_linear import recurrent_kimi_delta_attention
from transformers.models.qwen3_5.modeling_qwen3_5 import causal_conv1d_update, torch_recurrent_gated_delta_rule

from langchain_quantllm.kernels import recurrent_reference
from tests.support.interpreter import report_cases


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call: rows, heads of keys and of values, and the sizes of a key and a value."""

    name: str
    shape: tuple[int, int, int, int, int]
    dtype: torch.dtype = torch.float32
    by_channel: bool = False
    normalizes: bool = True


def _cases() -> Iterator[Case]:
    shapes = {
        "small": (3, 2, 4, 16, 16),
        "model": (2, 1, 2, 128, 128),
        "odd": (2, 3, 3, 20, 36),
        "wide": (1, 1, 1, 64, 300),
    }
    for name, shape in shapes.items():
        for dtype in (torch.float32, torch.bfloat16):
            kind = str(dtype).removeprefix("torch.")
            yield Case(name=f"{name}-{kind}", shape=shape, dtype=dtype)
            yield Case(
                name=f"{name}-channels-{kind}",
                shape=(shape[0], *[shape[2]] * 2, *shape[3:]),
                dtype=dtype,
                by_channel=True,
            )
    yield Case(name="not-normalized", shape=(2, 2, 4, 16, 16), normalizes=False)


RULES = {case.name: case for case in _cases()}


@dataclass(frozen=True, kw_only=True)
class Convolution:
    """One call: rows, channels, inputs that are kept, and taps."""

    name: str
    shape: tuple[int, int, int, int]
    dtype: torch.dtype = torch.float32
    has_bias: bool = True
    activates: bool = True


def _convolutions() -> Iterator[Convolution]:
    for name, shape in {"small": (3, 24, 3, 4), "all kept": (2, 300, 3, 3), "more kept": (2, 40, 5, 3)}.items():
        for dtype in (torch.float32, torch.bfloat16):
            kind = str(dtype).removeprefix("torch.")
            yield Convolution(name=f"conv-{name}-{kind}", shape=shape, dtype=dtype)
            yield Convolution(name=f"conv-{name}-sum-{kind}", shape=shape, dtype=dtype, has_bias=False, activates=False)


CONVOLUTIONS = {case.name: case for case in _convolutions()}
CASES = {**RULES, **CONVOLUTIONS}


def arguments(case: Case, device: str) -> dict[str, Any]:
    """Make random arguments, as views of one product, as models have them; the same for every module."""
    rows, key_heads, heads, key_dim, value_dim = case.shape
    made = torch.Generator().manual_seed(len(case.name))
    sizes = (key_heads * key_dim, key_heads * key_dim, heads * value_dim)
    mixed = torch.randn(rows, sum(sizes), generator=made).to(device, case.dtype)
    query, key, value = mixed.split(sizes, -1)
    decay = -torch.randn(rows, heads, *[key_dim] * case.by_channel, generator=made).square()
    return {
        "query": query.unflatten(-1, (key_heads, key_dim)),
        "key": key.unflatten(-1, (key_heads, key_dim)),
        "value": value.unflatten(-1, (heads, value_dim)),
        "decay": decay.to(device),
        "beta": torch.rand(rows, heads, generator=made).to(device, case.dtype),
        "states": torch.randn(rows + 2, heads, key_dim, value_dim, generator=made).to(device),
        "slots": torch.randperm(rows + 2, generator=made)[:rows].to(device, torch.int32),
        "normalizes": case.normalizes,
    }


def inputs(case: Convolution, device: str) -> dict[str, Any]:
    """Make random arguments of a convolution; its inputs are a part of a product, as models have them."""
    rows, channels, kept, taps = case.shape
    made = torch.Generator().manual_seed(len(case.name))
    bias = torch.randn(channels, generator=made).to(device, case.dtype)
    return {
        "x": torch.randn(rows, 2 * channels, generator=made).to(device, case.dtype)[:, channels:],
        "states": torch.randn(rows + 2, channels, kept, generator=made).to(device, case.dtype),
        "slots": torch.randperm(rows + 2, generator=made)[:rows].to(device, torch.int32),
        "weight": torch.randn(channels, taps, generator=made).to(device, case.dtype),
        "bias": bias if case.has_bias else None,
        "activates": case.activates,
    }


def run(name: str, device: str) -> dict[str, Any]:
    """Compare the kernel with its reference."""
    from langchain_quantllm.kernels import recurrent

    case = CASES[name]
    function, made = ("delta_step", arguments) if isinstance(case, Case) else ("conv_step", inputs)
    ours, plain = made(case, device), made(case, device)
    before = plain["states"].clone()
    found, expected = getattr(recurrent, function)(**ours), getattr(recurrent_reference, function)(**plain)
    untouched = torch.ones(len(before), dtype=torch.bool, device=before.device)
    untouched[plain["slots"].long()] = False
    return {
        "like": found.shape == expected.shape and found.dtype == expected.dtype,
        "error": _error(found, expected),
        "state_error": _error(ours["states"], plain["states"]),
        "changed": not torch.equal(ours["states"][~untouched], before[~untouched]),
        "others_untouched": torch.equal(ours["states"][untouched], before[untouched]),
    }


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_is_the_reference(found: Any, name: str) -> None:
    report = found(name)
    assert report["like"]
    assert report["changed"]
    assert report["others_untouched"]
    assert report["state_error"] < 1e-5
    # Where bfloat16 is cut off instead of rounded, as the interpreter does it, the error is twice as large; a sum that
    # SiLU follows is rounded before it, too.
    roundings = 2 if getattr(CASES[name], "activates", False) else 1
    assert report["error"] < (1e-5 if CASES[name].dtype == torch.float32 else roundings * 2.0**-7)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_the_reference_convolves_as_transformers_does(name: str) -> None:
    case = CONVOLUTIONS[name]
    given = inputs(case, "cpu")
    slots = given["slots"].long()
    after = given["states"][slots]
    activation = "silu" if case.activates else None
    expected = causal_conv1d_update(given["x"][..., None], after, given["weight"], given["bias"], activation)
    found = recurrent_reference.conv_step(**given)
    assert _error(found, expected[..., 0]) < (1e-6 if case.dtype == torch.float32 else 2.0**-8)
    assert torch.equal(given["states"][slots], after)


@pytest.mark.parametrize("name", [name for name, case in RULES.items() if case.dtype == torch.float32])
def test_the_reference_is_what_transformers_computes(name: str) -> None:
    case = RULES[name]
    given, own = (
        arguments(case, "cpu"),
        recurrent_kimi_delta_attention if case.by_channel else torch_recurrent_gated_delta_rule,
    )
    before = given["states"].clone()
    found = recurrent_reference.delta_step(**given)
    slots = given["slots"].long()
    expected, after = own(
        *(given[name][:, None] for name in ("query", "key", "value")),
        g=given["decay"][:, None],
        beta=given["beta"][:, None],
        initial_state=before[slots],
        output_final_state=True,
        use_qk_l2norm_in_kernel=case.normalizes,
    )
    assert _error(found, expected[:, 0]) < 1e-5
    assert _error(given["states"][slots], after) < 1e-5


if __name__ == "__main__":
    report_cases(lambda name: run(name, "cpu"))

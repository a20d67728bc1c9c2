"""Products, sums and attention whose result for a row does not depend on the other rows, on CPUs and GPUs.

Without a GPU the Triton kernels run in Triton's interpreter, in one subprocess; on a GPU compiled.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import gelu, scaled_dot_product_attention, silu

from langchain_quantllm.compat.bitsandbytes import import_quietly
from langchain_quantllm.errors import UnsupportedError
from langchain_quantllm.kernels.invariant import products, tiles
from langchain_quantllm.kernels.invariant.attention import KEYS, attend_in_tiles
from langchain_quantllm.kernels.invariant.ops import InvariantOps, paused
from langchain_quantllm.kernels.linear import invariant, reference
from langchain_quantllm.kernels.linear.weights import weight_of
from tests.support.interpreter import multiply_in_order, report_cases

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHAPES = [(64, 128), (1100, 64), (33, 7), (100, 52), (7, 1)]
"""Inputs and outputs: also those whose products depend on the number of rows in some libraries."""

ROWS = (1, 2, 3, 5, 8, 17, 33, 70, 150)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def cancelling(rows: int, inputs: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Make rows, and weights of one output, whose products nearly cancel: their last bits become visible."""
    x = random(rows, inputs, dtype=dtype)
    x[:, inputs - inputs // 2 :] = (0.01 * random(rows, inputs // 2, seed=1) - x[:, : inputs // 2].float()).to(dtype)
    weight = random(inputs, seed=2, dtype=dtype)
    weight[inputs - inputs // 2 :] = weight[: inputs // 2]
    return x, weight


# On a CPU.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_a_product_of_a_row_is_the_same_among_any_others(dtype: str, shape: tuple[int, int], layout: str) -> None:
    inputs, outputs = shape
    x, column = cancelling(150, inputs, DTYPES[dtype])
    matrix = column[:, None] * (2.0 ** torch.arange(outputs).remainder(5)).to(column.dtype)
    matrix = matrix.t().contiguous().t() if layout == "columns" else matrix.contiguous()
    expected = torch.cat([products.product(row[None], matrix) for row in x])
    for rows in ROWS:
        for start in {0, 1, 150 - rows}:
            assert torch.equal(products.product(x[start : start + rows], matrix), expected[start : start + rows])
    exact = x.double() @ matrix.double()
    bound = 4 * inputs * torch.finfo(torch.float32).eps * (x.double().abs() @ matrix.double().abs())
    assert ((expected.double() - exact).abs() <= bound + torch.finfo(x.dtype).eps * exact.abs() + 1e-6).all()


def test_products_add_what_they_are_given() -> None:
    for dtype in DTYPES.values():
        x, matrix, added = random(5, 64, dtype=dtype), random(64, 48, seed=1, dtype=dtype), random(48, dtype=dtype)
        expected = (x.double() @ matrix.double() + added.double()).to(dtype)
        for given in (added, added[None], added.expand(5, 48)):
            torch.testing.assert_close(products.product(x, matrix, given), expected, rtol=2e-2, atol=0.2)


def test_a_size_that_gives_other_bits_is_not_used() -> None:
    def gemv_differs(rows: torch.Tensor) -> torch.Tensor:
        return rows.sum(-1) if len(rows) > 1 else rows.flip(-1).cumsum(-1)[:, -1]

    calls: list[int] = []

    def counted(rows: torch.Tensor) -> torch.Tensor:
        calls.append(len(rows))
        return gemv_differs(rows)

    x = random(3, 1000)
    expected = tiles.run_in_tiles(gemv_differs, x, "differs")
    tiles.run_in_tiles(gemv_differs, x[:1], "differs")  # checks the size
    assert torch.equal(tiles.run_in_tiles(counted, x[:1], "differs"), expected[:1])
    assert calls == [2]


def test_a_function_that_depends_on_the_place_is_called_row_by_row() -> None:
    sizes: list[int] = []

    def by_place(rows: torch.Tensor) -> torch.Tensor:
        sizes.append(len(rows))
        places = torch.arange(len(rows)) % 2
        return torch.where(places == 0, rows.sum(-1), rows.flip(-1).cumsum(-1)[:, -1])

    x = random(6, 1000)
    tiles.run_in_tiles(by_place, x, "by place")
    sizes.clear()
    found = tiles.run_in_tiles(by_place, x, "by place")
    assert sizes == [1] * 6
    assert torch.equal(found, torch.cat([by_place(row[None]) for row in x]))


def test_tiles_hold_all_rows_with_few_calls() -> None:
    sizes: list[int] = []

    def double(rows: torch.Tensor) -> torch.Tensor:
        sizes.append(len(rows))
        return rows * 2

    for rows in (1, 5, 300):
        tiles.run_in_tiles(double, random(rows, 9), "double")
        sizes.clear()
        assert torch.equal(tiles.run_in_tiles(double, random(rows, 9), "double"), random(rows, 9) * 2)
        assert sizes == {1: [1], 5: [8], 300: [256, 64]}[rows]


@pytest.mark.parametrize("function", [silu, gelu, torch.exp, torch.tanh, torch.cos, torch.rsqrt, torch.sigmoid])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_number_has_the_same_function_at_every_place(function: Any, dtype: str) -> None:
    number = random(1, dtype=DTYPES[dtype]).abs() + 0.3
    with InvariantOps():
        expected = function(number)
        for count in (2, 31, 77, 130, 1001, 40000):
            assert torch.equal(function(number.repeat(count)), expected.repeat(count))
    torch.testing.assert_close(expected, function(number), rtol=1e-2, atol=1e-3)


def test_operations_give_what_pytorch_gives() -> None:
    x, y = random(3, 5, 48), random(48, 32, seed=1)
    calls: list[Any] = [
        lambda: x @ y,
        lambda: torch.nn.functional.linear(x, y.t(), y[0]),
        lambda: torch.bmm(x, y.expand(3, 48, 32)),
        lambda: x.mean(-1, keepdim=True),
        lambda: x.sum((1, 2)),
        lambda: x.sum(1),
        lambda: x.var(-1),
        lambda: x.softmax(1),
        lambda: x.log_softmax(-1),
        lambda: x.cumsum(-1),
        lambda: torch.nn.functional.layer_norm(x, (48,), y[:, 0], y[:, 1]),
        lambda: x.pow(3) + torch.pow(x.abs(), y[:, 0].abs()),
        lambda: torch.lerp(x, x + 1, 0.25),
        lambda: torch.add(x, x, alpha=0.3),
        lambda: torch.nn.functional.silu(x.clone(), inplace=True),
        lambda: x[:, ::2].transpose(0, 1).exp(),
        lambda: x.topk(3, -1).values,
    ]
    for i, call in enumerate(calls):
        with InvariantOps():
            found = call()
        torch.testing.assert_close(found, call(), rtol=1e-5, atol=1e-5, msg=f"call {i}")


def test_an_unknown_operation_is_refused_unless_the_mode_is_paused() -> None:
    x = random(4, 4)
    with InvariantOps():
        with pytest.raises(UnsupportedError, match="aten::cumprod"):
            x.cumprod(0)
        with paused():
            assert torch.equal(x.cumprod(0)[0], x[0])
        with pytest.raises(UnsupportedError, match="aten::sum"):
            x.sum()
    assert x.cumprod(0).shape == (4, 4)


def quantized_layer(kind: str, inputs: int, outputs: int, dtype: torch.dtype) -> torch.nn.Module:
    import_quietly()
    bnb = pytest.importorskip("bitsandbytes")
    data = random(outputs, inputs, seed=3)
    if kind == "int8":
        layer = bnb.nn.Linear8bitLt(inputs, outputs, bias=True, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(data.half(), requires_grad=False, has_fp16_weights=False)
    else:
        layer = bnb.nn.Linear4bit(inputs, outputs, bias=True, compute_dtype=dtype, quant_type=kind)
        layer.weight = bnb.nn.Params4bit(data.to(dtype), requires_grad=False, quant_type=kind)
    layer.bias.data = random(outputs, seed=4, dtype=dtype)
    return layer.to("cpu").eval()


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_called", [False, True])
def test_a_quantized_layer_gives_a_row_the_same_among_any_others(kind: str, dtype: str, is_called: bool) -> None:
    layer = quantized_layer(kind, 128, 64, DTYPES[dtype])
    if is_called:  # some CPUs repack the weight in the first forward
        with torch.no_grad():
            layer(random(2, 128, dtype=DTYPES[dtype]))
    weight = weight_of(layer)
    assert weight is not None
    x = random(1, 70, 128, dtype=DTYPES[dtype])
    expected = torch.cat([invariant.quantized_linear(row[None], weight, weight.bias) for row in x[0]])
    for rows in (2, 9, 70):
        assert torch.equal(invariant.quantized_linear(x[:, :rows], weight, weight.bias)[0], expected[:rows])
    [found] = invariant.grouped_linear(x, [weight])
    assert torch.equal(found[0], expected)
    exact = reference.quantized_linear(x[0], weight, weight.bias)
    assert float((expected - exact).norm() / exact.norm()) < 2.0**-6


@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (20, 0.0), (0, 5.0)])
def test_a_query_is_the_same_with_any_others(window: int, softcap: float) -> None:
    heads, kv_heads, tokens, dim = 4, 2, 150, 24
    query, key, value = (
        random(heads, tokens, dim),
        random(kv_heads, 192, dim, seed=1),
        random(kv_heads, 192, 16, seed=2),
    )
    options = {"scale": 0.3, "window": window, "softcap": softcap}
    whole = attend_in_tiles(query, key, value, 0, **options)
    generator = torch.Generator().manual_seed(0)
    for start, end in ((0, 1), (0, 7), (5, 6), (63, 65), (8, 150), (149, 150), (100, 131)):
        padded = -(-end // KEYS) * KEYS
        past = torch.randn(kv_heads, padded - end, dim, generator=generator)  # what is left of other texts
        keys = torch.cat([key[:, :end], past], 1)
        values = torch.cat([value[:, :end], past[..., :16]], 1)
        found = attend_in_tiles(query[:, start:end], keys, values, start, **options)
        assert torch.equal(found, whole[:, start:end])
    if not softcap:
        ages = torch.arange(tokens)[:, None] - torch.arange(tokens)
        mask = (ages >= 0) & (ages < window) if window else ages >= 0
        groups = heads // kv_heads
        keys, values = (t[:, :tokens].repeat_interleave(groups, 0) for t in (key, value))
        expected = scaled_dot_product_attention(query[None], keys[None], values[None], attn_mask=mask, scale=0.3)[0]
        torch.testing.assert_close(whole, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["sinks", "biases", "chunk", "all"])
def test_a_query_with_sinks_biases_or_chunks_is_the_same_with_any_others(kind: str) -> None:
    query, key, value = random(4, 150, 24), random(2, 192, 24, seed=1), random(2, 192, 16, seed=2)
    kinds = {"sinks": random(4, seed=3), "biases": random(4, 150, seed=4), "chunk": 20}
    options: dict[str, Any] = {"scale": 0.3, **(kinds if kind == "all" else {kind: kinds[kind]})}
    whole = attend_in_tiles(query, key, value, 0, **options)
    for start, end in ((0, 1), (0, 7), (5, 6), (63, 65), (8, 150), (149, 150), (100, 131)):
        padded = -(-end // KEYS) * KEYS
        found = attend_in_tiles(query[:, start:end], key[:, :padded], value[:, :padded], start, **options)
        assert torch.equal(found, whole[:, start:end])


@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (20, 0.0), (0, 5.0)])
@pytest.mark.parametrize("spoilt", ["key", "value"])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_key_that_is_not_finite_spoils_only_the_queries_that_see_it(
    window: int, softcap: float, spoilt: str, number: float
) -> None:
    query, key, value = random(4, 100, 16), random(2, 128, 16, seed=1), random(2, 128, 8, seed=2)
    options = {"scale": 0.3, "window": window, "softcap": softcap}
    sound = attend_in_tiles(query, key, value, 0, **options)
    (key if spoilt == "key" else value)[1, 50, 3] = number
    found = attend_in_tiles(query, key, value, 0, **options)
    seen = slice(50, 70 if window else 100)
    assert not found[2:, seen].isfinite().any()
    found[2:, seen] = sound[2:, seen] = 0  # heads 2 and 3 share the second key head
    assert torch.equal(found, sound)


# On a GPU.


def run_products(device: str) -> dict[str, Any]:
    """Multiply rows alone and among others, by matrices of both layouts."""
    from langchain_quantllm.kernels.invariant import gpu

    report: dict[str, Any] = {}
    for name, dtype in DTYPES.items():
        x, matrix, added = (random(*shape, dtype=dtype).to(device) for shape in ((70, 72), (72, 40), (40,)))
        for layout, given in (("rows", matrix), ("columns", matrix.t().contiguous().t())):
            whole = gpu.product(x, given, added)
            same = all(
                torch.equal(gpu.product(x[start:end], given, added), whole[start:end])
                for start, end in ((0, 1), (69, 70), (3, 36), (1, 70))
            )
            exact = x.double() @ matrix.double() + added.double()
            report[f"{name}-{layout}"] = {
                "same": same, "error": float((whole.double() - exact).norm() / exact.norm())
            }  # fmt: skip
    return report


def run_groups(device: str) -> dict[str, Any]:
    """Multiply groups of rows, empty ones too, and pairs of matrices."""
    from langchain_quantllm.kernels.invariant import gpu

    x, matrices = random(50, 40).to(device), random(4, 40, 24, seed=1).to(device)
    ends = torch.tensor([3, 3, 41, 48], dtype=torch.int32, device=device)
    found = gpu.grouped_product(x, matrices, ends)
    expected = products.grouped_product(x.cpu(), matrices.cpu(), ends.cpu())
    pairs = gpu.batched_product(x.view(2, 25, 40), matrices[:2])
    error = float((pairs - x.view(2, 25, 40).double() @ matrices[:2].double()).abs().max())
    alone = gpu.product(x[7:8], matrices[2])
    return {
        "error": max(error, float((found.cpu() - expected).abs().max())), "same": bool(torch.equal(found[7:8], alone))
    }  # fmt: skip


def run_rows(device: str) -> dict[str, Any]:
    """Compute sums and softmaxes of rows that are wider and narrower than a tile."""
    from langchain_quantllm.kernels.invariant import gpu

    errors, same = [], True
    for width in (1, 7, 100, 5000):
        x = random(5, width).to(device)
        for function, expected in (
            (gpu.sums, lambda x: x.sum(-1)),
            (gpu.softmax, lambda x: x.softmax(-1)),
            (lambda x: gpu.softmax(x, logarithm=True), lambda x: x.log_softmax(-1)),
        ):
            whole = function(x)
            same &= torch.equal(function(x[3:4]), whole[3:4])
            errors.append(float((whole - expected(x.double())).abs().max()))
    return {"error": max(errors), "same": bool(same)}


def run_attention(device: str) -> dict[str, Any]:
    """Attend with prompts whole, in chunks, and token by token."""
    from langchain_quantllm.kernels.attention import PREFILL_TILE, prefill_attention

    report = {}
    sinks, biases = random(2, seed=3).to(device), random(2, 70, seed=4).to(device)
    kinds: list[dict[str, Any]] = [{}, {"window": 20}, {"chunk": 20}, {"sinks": sinks}, {"biases": biases}]
    for kind in kinds:
        heads, tokens, dim = 2, 70, 16
        kv = random(9, 16, 1, 2 * dim, seed=1).to(device)
        table = torch.arange(9, dtype=torch.int32, device=device)[None]
        query = random(1, heads, tokens, dim, seed=2).to(device)

        found = []
        for start, end, size in ((0, 70, PREFILL_TILE), (0, 70, 1), (5, 69, PREFILL_TILE), (31, 33, 1), (63, 64, 1)):
            runs = [(0, at - start, at, min(size, end - at)) for at in range(start, end, size)]
            cut = torch.tensor(runs, dtype=torch.int32, device=device)
            part = query[:, :, start:end].contiguous()
            options: dict[str, Any] = {"value_dim": dim, "scale": 0.25, "masks_all": True, **kind}
            found.append((start, end, prefill_attention(part, kv, table, cut, **options)))
        whole = found[0][2]
        report["".join(kind)] = {"same": all(torch.equal(part, whole[:, start:end]) for start, end, part in found)}
    return report


OTHERS = {"products": run_products, "groups": run_groups, "rows": run_rows, "attention": run_attention}


def run(name: str, device: str) -> dict[str, Any]:
    return OTHERS[name](device)


def test_products_on_a_gpu_give_a_row_the_same_among_any_others(found: Any) -> None:
    report = found("products")
    assert all(one["same"] for one in report.values())
    for name, one in report.items():
        assert one["error"] < {"float32": 1e-6, "bfloat16": 2.0**-7, "float16": 2.0**-9}[name.partition("-")[0]]


def test_groups_of_rows_on_a_gpu_are_multiplied_each_by_its_matrix(found: Any) -> None:
    report = found("groups")
    assert report["error"] < 1e-4
    assert report["same"]


def test_sums_and_softmaxes_of_rows_on_a_gpu_are_right_and_the_same(found: Any) -> None:
    report = found("rows")
    assert report["error"] < 1e-3
    assert report["same"]


def test_the_prefill_kernel_gives_a_query_the_same_in_any_tile(found: Any) -> None:
    assert all(one["same"] for one in found("attention").values())


if __name__ == "__main__":
    multiply_in_order()
    report_cases(lambda name: run(name, "cpu"))

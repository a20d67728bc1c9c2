"""The Triton kernels against the same functions in plain torch, and those against torch's own attention.

Without a GPU the kernels run in Triton's interpreter, which must be switched on before Triton is imported: one
subprocess runs this file as a module, all cases, and the tests look at what it reports. On a GPU the tests run
the same cases themselves, compiled.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from langchain_quantllm.kernels import kv_quantization, reference
from tests.support.interpreter import report_cases
from tests.support.selection import covering, slow_but

ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}
"""The largest relative error of rounding to a dtype: half of its machine epsilon."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call of decode or prefill: some rows, each with its length, and the chunk of it that is new."""

    name: str
    lengths: tuple[int, ...] = (1, 5, 16, 17, 70)
    chunks: tuple[int, ...] | None = None
    """New tokens of each row; None is one of each, by `decode_attention`."""
    block: int = reference.PREFILL_TILE
    dtype: torch.dtype = torch.float32
    heads: int = 2
    kv_heads: int = 1
    key_dim: int = 16
    value_dim: int = 16
    window: int = 0
    softcap: float = 0.0
    chunk: int = 0
    sinks: float | None = None
    """Mean of the heads' sinks; None for none."""
    slope: float = 0.0
    """Bias of a key for each position, of the first head; twice as much for the next one."""
    splits: int = 1
    page_tokens: int = 16
    is_latent: bool = False
    """Whether values belong to keys, too."""
    kv: str = "auto"
    """The format of the pool: that of `dtype`, or one in 8 bits."""

    @property
    def query_dim(self) -> int:
        return self.key_dim + self.value_dim if self.is_latent else self.key_dim


def _cases() -> Iterator[Case]:
    dtypes = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
    variants: dict[str, dict[str, Any]] = {
        **{f"{name}-64": {"dtype": dtype, "key_dim": 64, "value_dim": 64} for name, dtype in dtypes.items()},
        **{f"{name}-128": {"dtype": dtype, "key_dim": 128, "value_dim": 128} for name, dtype in dtypes.items()},
        **{f"{name}-256": {"dtype": dtype, "key_dim": 256, "value_dim": 256} for name, dtype in dtypes.items()},
        **{f"dim-{dim}": {"key_dim": dim, "value_dim": dim} for dim in (8, 80, 96, 112)},
        "half-dim-80": {"key_dim": 80, "value_dim": 80, "dtype": torch.float16},
        "odd-dims": {"key_dim": 33, "value_dim": 19},
        "values-smaller": {"key_dim": 48, "value_dim": 32, "dtype": torch.bfloat16},
        "values-larger": {"key_dim": 24, "value_dim": 72},
        "latent": {"key_dim": 192, "value_dim": 128, "dtype": torch.bfloat16},
        "latents": {"key_dim": 8, "value_dim": 40, "is_latent": True},
        "latents-half": {"key_dim": 64, "value_dim": 512, "is_latent": True, "heads": 20, "dtype": torch.bfloat16},
        "latents-256": {"key_dim": 64, "value_dim": 256, "is_latent": True, "heads": 40, "dtype": torch.bfloat16},
        "one-head": {"heads": 1, "kv_heads": 1},
        "plain-heads": {"heads": 3, "kv_heads": 3},
        "grouped-heads": {"heads": 6, "kv_heads": 2},
        "group-of-7": {"heads": 7},
        "window-1": {"window": 1},
        "window-8": {"window": 8, "lengths": (1, 7, 8, 9, 200)},
        "window-100": {"window": 100, "lengths": (99, 100, 101, 300), "dtype": torch.float16},
        "softcap": {"softcap": 2.0},
        "softcap-far-beyond": {"softcap": 0.01},
        "softcap-window": {"softcap": 20.0, "window": 30, "dtype": torch.bfloat16},
        "pages-of-32": {"page_tokens": 32},
        "chunk-1": {"chunk": 1},
        "chunk-24": {"chunk": 24, "lengths": (1, 24, 25, 47, 200)},
        "chunk-100": {"chunk": 100, "lengths": (99, 100, 101, 300), "dtype": torch.float16},
        "sinks": {"heads": 6, "kv_heads": 2, "sinks": 0.0},
        "sinks-far-above": {"sinks": 200.0},
        "sinks-far-below": {"sinks": -200.0},
        "sinks-window": {"heads": 4, "sinks": 1.0, "window": 20, "dtype": torch.bfloat16},
        "biases": {"heads": 3, "kv_heads": 3, "slope": 0.01},
        "biases-grouped": {"heads": 6, "kv_heads": 2, "slope": 0.05, "dtype": torch.bfloat16},
        "biases-of-all-kinds": {"heads": 6, "kv_heads": 2, "slope": 0.05, "sinks": 1.0, "chunk": 40, "softcap": 5.0},
    }
    # From the start and with history; up to the middle of a page, its first place and its last; more than a block.
    chunks = {"lengths": (5, 130, 33, 32), "chunks": (5, 66, 1, 16)}
    for name, given in variants.items():
        yield Case(name=f"decode-{name}", **given)
        yield Case(name=f"prefill-{name}", **{**given, **chunks})
    for splits in (2, 4, 8, 16):
        long = Case(name=f"decode-splits-{splits}", splits=splits, lengths=(1, 64, 65, 700), heads=4)
        yield long
        yield replace(long, name=f"{long.name}-window", window=100)
        yield replace(long, name=f"{long.name}-half-80", dtype=torch.float16, key_dim=80, value_dim=48)
        yield replace(long, name=f"{long.name}-sinks", sinks=2.0)
        yield replace(long, name=f"{long.name}-chunk-biases", chunk=500, slope=0.01)
        yield replace(long, name=f"{long.name}-latents", key_dim=16, value_dim=48, is_latent=True)
    yield Case(name="decode-splits-64", splits=64, lengths=(2, 1100), dtype=torch.float16, key_dim=256, value_dim=256)
    for block in (1, 7, 16):
        yield Case(name=f"prefill-blocks-of-{block}", block=block, lengths=(30, 17), chunks=(10, 17))
    for kv in kv_quantization.KV_DTYPES:
        for name, given in _eight_bit_variants().items():
            yield Case(name=f"decode-{kv}-{name}", kv=kv, **given)
            yield Case(name=f"prefill-{kv}-{name}", kv=kv, **{**given, **chunks, "splits": 1})
    # Padded to 32 rows, and shared by two programs.
    yield Case(name="decode-group-of-20", heads=20)
    yield Case(name="decode-group-of-71", heads=71)
    yield Case(name="decode-group-of-71-splits", heads=71, splits=2, lengths=(3, 90))
    # The first tile holds no key that the last queries of a block see.
    yield Case(name="prefill-window-hides-a-tile", window=3, lengths=(64, 200), chunks=(64, 66))


def _eight_bit_variants() -> dict[str, dict[str, Any]]:
    half: dict[str, Any] = {"dtype": torch.bfloat16, "heads": 4, "kv_heads": 2}
    return {
        "bfloat16": {**half, "key_dim": 64, "value_dim": 64},
        "float16": {**half, "dtype": torch.float16, "key_dim": 128, "value_dim": 128},
        "float32": {"key_dim": 32, "value_dim": 32},
        "dims": {**half, "key_dim": 80, "value_dim": 48},
        "window": {**half, "window": 20},
        "sinks-chunk": {**half, "sinks": 1.0, "chunk": 40},
        "biases-softcap": {**half, "slope": 0.05, "softcap": 5.0},
        "splits": {**half, "splits": 8, "lengths": (1, 64, 65, 700), "sinks": 0.0},
        "pages-of-32": {**half, "page_tokens": 32},
    }


CASES = {case.name: case for case in _cases()}


def _features(case: Case) -> list[Any]:
    way = "decode" if case.chunks is None else "prefill"
    return [
        (way, case.dtype),
        ("heads", way, case.heads > 1, case.kv_heads > 1),
        ("scores", way, case.window > 0, case.softcap > 0),
        ("kinds", way, case.chunk > 0, case.sinks, case.slope > 0),
        ("shared", case.splits > 1, case.sinks is not None, case.slope > 0),
        ("values", way, case.key_dim == case.value_dim),
        ("latent", way, case.is_latent),
        ("format", way, case.kv, case.dtype),
        ("dim", case.key_dim),
        ("splits", case.splits),
        ("block", case.block),
        ("page", case.page_tokens),
        ("window", case.window),
    ]


QUICK = covering(CASES, _features)


class Rows:
    """Random rows in a pool with pages in any order, and NaN wherever nothing was written."""

    def __init__(self, case: Case, device: str = "cpu") -> None:
        made = torch.Generator().manual_seed(len(case.name))
        pieces = [-(-length // case.page_tokens) for length in case.lengths]
        order = torch.randperm(sum(pieces) + 3, generator=made, dtype=torch.int32)
        # Behind the end of a row the table points nowhere: reading that would fault.
        table = torch.full((len(pieces) + 2, max(pieces) + 1), 2**30, dtype=torch.int32)
        self.slots = torch.randperm(len(pieces) + 2, generator=made)[: len(pieces)].tolist()
        for slot, pages in zip(self.slots, order[: sum(pieces)].split(pieces), strict=True):
            table[slot, : len(pages)] = pages
        tokens = sum(case.lengths)
        # Strided as models have them: (1, tokens, heads, dim), transposed.
        made_key = torch.randn(1, tokens, case.kv_heads, case.key_dim, generator=made)
        made_value = torch.randn(1, tokens, case.kv_heads, case.value_dim, generator=made)
        self.key = made_key.to(device, case.dtype).transpose(1, 2)
        self.value = made_value.to(device, case.dtype).transpose(1, 2)
        rows = [slot for slot, length in zip(self.slots, case.lengths, strict=True) for _ in range(length)]
        self.rows = torch.tensor(rows, dtype=torch.int32, device=device)
        self.positions = torch.cat([torch.arange(length, dtype=torch.int32) for length in case.lengths]).to(device)
        self.table = table.to(device)
        shape = (len(order), case.page_tokens, case.kv_heads, case.key_dim + case.value_dim)
        self.empty = torch.full(shape, torch.nan, dtype=case.dtype, device=device)
        self.empty_scales = None
        if case.kv != "auto":
            self.empty = torch.full(shape, 99, dtype=kv_quantization.KV_DTYPES[case.kv], device=device)
            of_scales = (len(order), case.kv_heads, case.page_tokens, 2)
            self.empty_scales = torch.full(of_scales, torch.nan, dtype=kv_quantization.SCALE_DTYPE, device=device)
            exponents = torch.randint(-4, 5, (case.kv_heads, case.key_dim), generator=made)
            self.factors = torch.exp2(exponents.float()).to(device)
            self.value *= 10.0 ** torch.randint(-3, 3, (tokens, 1), generator=made).to(device)  # scales of their own
        self.kv, self.scales = self.new_pool()
        reference.write_kv(self.key, self.value, self.kv, self.table, self.rows, self.positions, self.scales)
        asked = len(case.lengths) if case.chunks is None else sum(case.chunks)
        made_query = torch.randn(1, asked, case.heads, case.query_dim, generator=made)
        if case.is_latent:  # long queries, whose scores are no further apart
            made_query *= (case.key_dim / case.query_dim) ** 0.5
        self.query = made_query.to(device, case.dtype).transpose(1, 2)
        self.sinks = self.biases = None
        if case.sinks is not None:
            self.sinks = (torch.randn(case.heads, generator=made) + case.sinks).to(device, case.dtype)
        if case.slope:
            # By the position and something else, so that no other position's is right.
            slopes = case.slope * 2.0 ** torch.arange(case.heads)[:, None]
            positions = torch.arange(max(case.lengths))
            self.biases = (slopes * positions + torch.randn(slopes.shape[0], len(positions), generator=made)).to(device)

    def new_pool(self) -> tuple[torch.Tensor, kv_quantization.KVScales | None]:
        """Return a pool in which nothing is written, and its scales."""
        if self.empty_scales is None:
            return self.empty.clone(), None
        return self.empty.clone(), kv_quantization.KVScales(self.empty_scales.clone(), self.factors)


def blocks_of(case: Case, slots: list[int]) -> torch.Tensor:
    """Cut each row's chunk into blocks; one more block has no token."""
    blocks: list[tuple[int, int, int, int]] = []
    first = 0
    for slot, length, chunk in zip(slots, case.lengths, case.chunks or (), strict=True):
        blocks += [
            (slot, first + done, length - chunk + done, min(case.block, chunk - done))
            for done in range(0, chunk, case.block)
        ]
        first += chunk
    return torch.tensor([*blocks, (slots[0], 0, 0, 0)], dtype=torch.int32)


def attend(module: Any, case: Case, rows: Rows) -> torch.Tensor:
    """Call `decode_attention` or `prefill_attention` of a module."""
    given = {"value_dim": case.value_dim, "scale": 0.3, "window": case.window, "softcap": case.softcap}
    given |= {"chunk": case.chunk, "sinks": rows.sinks, "biases": rows.biases, "scales": rows.scales}
    device = rows.kv.device
    if case.chunks is not None:
        blocks = blocks_of(case, rows.slots).to(device)
        return module.prefill_attention(rows.query, rows.kv, rows.table, blocks, **given)
    positions = torch.tensor(case.lengths, dtype=torch.int32, device=device) - 1
    slots = torch.tensor(rows.slots, dtype=torch.int32, device=device)
    arrivals = torch.zeros(len(slots) * case.heads, dtype=torch.int32, device=device)
    given |= {"splits": case.splits, "arrivals": arrivals}
    attended = module.decode_attention(rows.query, rows.kv, rows.table, slots, positions, **given)
    assert not arrivals.any(), "counts are left, which the next call would begin with"
    return attended


def run_case(case: Case, device: str) -> dict[str, Any]:
    """Compare the kernels with the reference on one case."""
    from langchain_quantllm.kernels import attention as attention_kernels

    rows = Rows(case, device)
    # Some tokens are enough: the interpreter takes a millisecond for each.
    few = slice(-len(rows.positions) // 4, None)
    given = (rows.table, rows.rows[few], rows.positions[few])
    written, expected = rows.new_pool(), rows.new_pool()
    for module, (kv, scales) in ((attention_kernels, written), (reference, expected)):
        module.write_kv(rows.key[:, :, few], rows.value[:, :, few], kv, *given, scales)
    same = torch.equal(written[0].nan_to_num(nan=99.0), expected[0].nan_to_num(nan=99.0))
    if written[1] is not None and expected[1] is not None:
        same &= torch.equal(written[1].pairs.nan_to_num(nan=99.0), expected[1].pairs.nan_to_num(nan=99.0))
    found, expected = attend(attention_kernels, case, rows), attend(reference, case, rows)
    return {
        "written": same,
        "shape": list(found.shape) == [1, rows.query.shape[2], case.heads, case.value_dim],
        "dense": found.is_contiguous(),
        "dtype": str(found.dtype),
        "error": float((found.float() - expected.float()).abs().nan_to_num(nan=torch.inf).max()),
        "largest": float(rows.value.float().abs().max()),
    }


def run_strided(device: str) -> dict[str, Any]:
    """Compare what the kernels make of tensors whose last dimension is strided with what they make of copies."""
    from langchain_quantllm.kernels import attention as attention_kernels

    case = Case(name="strided", heads=4, lengths=(9, 33))
    rows = Rows(case, device)
    dense = attend(attention_kernels, case, rows)
    for name in ("query", "key", "value"):
        setattr(rows, name, getattr(rows, name).repeat_interleave(2, -1)[..., ::2])
        assert getattr(rows, name).stride(-1) == 2
    written = rows.empty.clone()
    attention_kernels.write_kv(rows.key, rows.value, written, rows.table, rows.rows, rows.positions)
    return {
        "written": torch.equal(written.nan_to_num(nan=99.0), rows.kv.nan_to_num(nan=99.0)),
        "same": torch.equal(attend(attention_kernels, case, rows), dense),
    }


def run_single(device: str) -> dict[str, Any]:
    """Compare a prefill of one token with a decode of it."""
    from langchain_quantllm.kernels import attention as attention_kernels

    case = Case(name="single", lengths=(1, 16, 17, 90), key_dim=64, value_dim=64)
    rows = Rows(case, device)
    chunked = replace(case, chunks=(1,) * len(case.lengths))
    return {
        "error": float((attend(attention_kernels, case, rows) - attend(attention_kernels, chunked, rows)).abs().max())
    }


def run_padding(device: str) -> dict[str, Any]:
    """Compare a decode with and without rows that are not in use, which all point at position 0 of page 0."""
    from langchain_quantllm.kernels import attention as attention_kernels

    case = Case(name="padding", lengths=(20, 50), splits=2)
    rows = Rows(case, device)
    alone = attend(attention_kernels, case, rows)
    idle = next(slot for slot in range(len(rows.table)) if slot not in rows.slots)
    rows.table[idle] = 0
    arrivals = torch.zeros(4, dtype=torch.int32, device=device)
    given = {"value_dim": 16, "scale": 0.3, "splits": 2, "arrivals": arrivals}
    slots = torch.tensor([*rows.slots, idle, idle], dtype=torch.int32, device=device)
    positions = torch.tensor([19, 49, 0, 0], dtype=torch.int32, device=device)
    query = torch.cat([rows.query, rows.query], dim=2)
    padded = attention_kernels.decode_attention(query, rows.kv, rows.table, slots, positions, **given)
    return {"same": torch.equal(padded[:, :2], alone)}


def run_spoiled(device: str) -> dict[str, Any]:
    """Compare chunks with and without a token whose value or key is no number, seen by the last tokens only."""
    from langchain_quantllm.kernels import attention as attention_kernels

    report = {}
    for name, part, number, window in (
        ("value-nan", "value", torch.nan, 0),
        ("value-inf", "value", torch.inf, 0),
        ("key", "key", torch.nan, 0),
        ("window", "value", torch.nan, 10),
    ):
        case = Case(name="spoiled", lengths=(40,), chunks=(40,), window=window)
        rows = Rows(case, device)
        expected = attend(attention_kernels, case, rows)
        getattr(rows, part)[0, :, 20] = number
        rows.kv = rows.empty.clone()
        attention_kernels.write_kv(rows.key, rows.value, rows.kv, rows.table, rows.rows, rows.positions)
        found = attend(attention_kernels, case, rows)
        seen = slice(20, 20 + window if window else 40)
        others = [i for i in range(40) if not seen.start <= i < seen.stop]
        same = torch.equal(found[:, others], expected[:, others])
        report[name] = [same, bool(found[:, seen].isnan().all())]
    return report


def run_splits(device: str) -> dict[str, Any]:
    """Ask for the splits of some steps."""
    from langchain_quantllm.kernels import attention as attention_kernels

    asked = [(1, 8, 132), (4, 8, 132), (8, 8, 132), (32, 8, 132), (1000, 8, 132), (1, 1, 132), (1, 2, 4)]
    return {"splits": [attention_kernels.default_splits(*given) for given in asked]}


OTHERS = {
    "strided": run_strided,
    "single": run_single,
    "padding": run_padding,
    "spoiled": run_spoiled,
    "splits": run_splits,
}


def run(name: str, device: str) -> dict[str, Any]:
    return OTHERS[name](device) if name in OTHERS else run_case(CASES[name], device)


def tolerance(case: Case, largest: float) -> float:
    """Bound the error, for outputs that are averages of values of at most `largest`.

    Shares are rounded to the pool's dtype before they meet the values, to float16 in 8 bits, the result is rounded by
    both sides: three times the rounding error. In float32, sums of up to 256 products in another order weigh more:
    scores of up to some 20 that are off by several times their own rounding change shares by as much.
    """
    rounding = ROUNDING[case.dtype]
    if case.kv != "auto":
        rounding = max(rounding, ROUNDING[torch.float16])
    return largest * (3 * rounding + 128 * ROUNDING[torch.float32])


@pytest.mark.parametrize("name", slow_but(QUICK, CASES))
def test_kernels_are_the_reference(found: Any, name: str) -> None:
    report, case = found(name), CASES[name]
    assert report["written"], "the pool differs, though nothing is computed"
    assert report["shape"]
    assert report["dense"]
    assert report["dtype"] == str(case.dtype)
    assert report["error"] <= tolerance(case, report["largest"])


def test_kernels_take_strided_tensors(found: Any) -> None:
    assert found("strided") == {"written": True, "same": True}


def test_prefill_of_one_token_is_decode(found: Any) -> None:
    # The same sums, in tiles of other sizes.
    assert found("single")["error"] <= 128 * ROUNDING[torch.float32]


def test_rows_that_are_not_in_use_change_nothing(found: Any) -> None:
    assert found("padding") == {"same": True}


def test_a_token_that_is_no_number_spoils_only_those_that_see_it(found: Any) -> None:
    """The keys of the tokens before it are shared with other prompts that begin with them."""
    assert found("spoiled") == {name: [True, True] for name in ("value-nan", "value-inf", "key", "window")}


def test_splits_fill_the_device(found: Any) -> None:
    assert found("splits") == {"splits": [64, 16, 8, 2, 1, 64, 8]}


def rounded(numbers: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Round keys, which have factors, or values to the format of a pool."""
    factors = rows.factors[:, None] if numbers is rows.key else torch.ones(())
    codes, scales = kv_quantization.quantize(numbers / factors, rows.kv.dtype)
    return kv_quantization.dequantize(codes, scales, torch.float32) * factors


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.softcap])
def test_reference_is_the_attention_of_torch(name: str) -> None:
    case = replace(CASES[name], dtype=torch.float32)
    rows, start, first = Rows(case), 0, 0
    if rows.scales is not None:
        rows.key, rows.value = rounded(rows.key, rows), rounded(rows.value, rows)
    sinks = None if rows.sinks is None else rows.sinks.double()
    out = attend(reference, case, rows)[0]
    for length, chunk in zip(case.lengths, case.chunks or [1] * len(case.lengths), strict=True):
        at, seen = torch.arange(length - chunk, length)[:, None], torch.arange(length)
        visible = (at >= seen) & (at - seen < (case.window or length))
        visible &= at // (case.chunk or length) == seen // (case.chunk or length)
        mask = torch.zeros(case.heads, chunk, length, dtype=torch.float64).masked_fill(~visible, -torch.inf)
        if rows.biases is not None:
            mask += rows.biases[:, None, :length]
        own = (
            rows.query[:, :, first : first + chunk],
            (torch.cat([rows.key, rows.value], -1) if case.is_latent else rows.key)[:, :, start : start + length],
            rows.value[:, :, start : start + length],
        )
        query, key, value = (t.double() for t in own)
        if sinks is not None:  # a key of zeros, whose score is the sink, with a value of zeros
            mask = torch.cat([mask, sinks[:, None, None].expand(-1, chunk, 1)], -1)
            key, value = (torch.nn.functional.pad(t, (0, 0, 0, 1)) for t in (key, value))
        expected = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=0.3, enable_gqa=True
        )
        out_of_row = out[first : first + chunk].transpose(0, 1).double()
        # In float32 and in float64. Values in 8 bits are of many sizes, up to hundreds.
        largest = 1.0 if rows.scales is None else float(rows.value.abs().max())
        torch.testing.assert_close(out_of_row, expected[0], rtol=1e-4, atol=1e-5 * largest)
        start, first = start + length, first + chunk


def test_softcap_of_the_reference() -> None:
    case = Case(name="one", lengths=(2,), heads=1, kv_heads=1, softcap=2.0)
    rows = Rows(case)
    scores = 2 * torch.tanh(0.3 * (rows.key[0, 0] @ rows.query[0, 0, 0]) / 2)
    expected = scores.softmax(0) @ rows.value[0, 0]
    torch.testing.assert_close(attend(reference, case, rows)[0, 0, 0], expected)


if __name__ == "__main__":
    report_cases(lambda name: run(name, "cpu"))

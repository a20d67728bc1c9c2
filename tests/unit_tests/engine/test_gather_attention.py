"""Attention over gathered blocks: exact beside NaN, and at a cost of what the tokens see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from langchain_quantllm.engine.attention import Batch, LayerPool, Span
from langchain_quantllm.engine.block_manager import BLOCK_TOKENS
from langchain_quantllm.engine.gather_attention import GatherAttention
from langchain_quantllm.engine.invariant_attention import InvariantGatherAttention
from langchain_quantllm.kernels import reference

HEADS, KV_HEADS, KEY_DIM = 4, 2, 16


@dataclass(frozen=True, kw_only=True)
class New:
    """A sequence in a forward: tokens written before it, new ones, and runs of positions that see each other."""

    before: int
    count: int = 1
    groups: tuple[tuple[int, int], ...] = ()


class Sequences:
    """Sequences of random keys and values in a pool that holds NaN wherever none of them has written."""

    def __init__(self, *news: New, value_dim: int = KEY_DIM, is_latent: bool = False) -> None:
        made = torch.Generator().manual_seed(len(news))
        self.news = news
        self.value_dim = value_dim
        lengths = [new.before + new.count for new in news]
        widths = [-(-length // BLOCK_TOKENS) for length in lengths]
        order = torch.randperm(sum(widths), generator=made).to(torch.int32) + 1
        self.table = torch.zeros(len(news), max(widths), dtype=torch.int32)
        for slot, own in enumerate(order.split(widths)):
            self.table[slot, : len(own)] = own
        shape = (sum(widths) + 1, BLOCK_TOKENS, KV_HEADS, KEY_DIM + value_dim)
        self.pool = LayerPool(kv=torch.full(shape, torch.nan), key_dim=KEY_DIM, is_latent=is_latent)
        for slot, new in enumerate(news):
            positions = torch.arange(new.before, dtype=torch.int32)
            slots = torch.full_like(positions, slot)
            kv = torch.randn(1, KV_HEADS, new.before, KEY_DIM + value_dim, generator=made)
            given = (*kv.split([KEY_DIM, value_dim], -1), self.pool.kv, self.table)
            reference.write_kv(*given, slots, positions)
        tokens = sum(new.count for new in news)
        self.query = torch.randn(1, HEADS, tokens, self.pool.query_dim, generator=made)
        self.key = torch.randn(1, KV_HEADS, tokens, KEY_DIM, generator=made)
        self.value = torch.randn(1, KV_HEADS, tokens, value_dim, generator=made)

    def batch(self) -> Batch:
        spans, first = [], 0
        for slot, new in enumerate(self.news):
            spans.append(Span(slot=slot, first=first, position=new.before, count=new.count, groups=new.groups))
            first += new.count
        return Batch(
            table=self.table,
            slots=torch.tensor([span.slot for span in spans for _ in range(span.count)], dtype=torch.int32),
            positions=torch.tensor(
                [position for span in spans for position in range(span.position, span.position + span.count)],
                dtype=torch.int32,
            ),
            spans=spans,
            decodes=all(span.count == 1 for span in spans),
        )

    def attend(self, window: int = 0, softcap: float = 0.0, attention: Any = None, **options: Any) -> torch.Tensor:
        attention, batch = attention or GatherAttention(), self.batch()
        attention.write(self.pool, self.key, self.value, batch)
        given = {"scale": 0.3, "window": window, "softcap": softcap, **options}
        return attention.attend(self.pool, self.query, batch, **given)

    def expected(self, window: int = 0, softcap: float = 0.0, **options: Any) -> torch.Tensor:
        """Attend by the reference of the kernels, which takes every sequence by itself."""
        tiles = [
            (span.slot, span.first + at, span.position + at, 1)
            for span in self.batch().spans
            for at in range(span.count)
        ]
        given: dict[str, Any] = {"value_dim": self.value_dim, "scale": 0.3, "window": window, "softcap": softcap}
        return reference.prefill_attention(
            self.query, self.pool.kv, self.table, torch.tensor(tiles), **given, **options
        )


def scorings(positions: int = 1000) -> dict[str, dict[str, Any]]:
    """Further ways to score keys: sinks and biases of each head, chunks, and all of them."""
    made = torch.Generator().manual_seed(3)
    sinks = torch.randn(HEADS, generator=made) + 1
    slopes = 0.05 * 2.0 ** torch.arange(HEADS)[:, None]
    biases = slopes * torch.arange(positions) + torch.randn(HEADS, positions, generator=made)
    return {
        "sinks": {"sinks": sinks},
        "sinks in a window": {"sinks": sinks, "window": 24},
        "chunks": {"chunk": 24},
        "chunks of a token": {"chunk": 1},
        "biases": {"biases": biases},
        "biases in a window": {"biases": biases, "window": 24},
        "all": {"sinks": sinks, "biases": biases, "chunk": 40, "softcap": 2.0},
    }


MIXES = {
    "one sequence": (New(before=40),),
    "alike": (New(before=20), New(before=31), New(before=16), New(before=0)),
    "one long beside short ones": (New(before=700), *(New(before=3 + 5 * i) for i in range(9))),
    "a prompt": (New(before=0, count=50),),
    "a chunk": (New(before=37, count=30),),
    "prompts": (New(before=0, count=5), New(before=0, count=33), New(before=48, count=17)),
    "decoding beside a chunk": (New(before=12), New(before=300), New(before=64, count=40), New(before=15)),
    "a long chunk": (New(before=500, count=200),),
}


@pytest.fixture
def small_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounds that small sequences reach."""
    module = "langchain_quantllm.engine.gather_attention"
    monkeypatch.setattr(f"{module}._GATHERED_BYTES", 6 * BLOCK_TOKENS * KV_HEADS * 2 * KEY_DIM * 4)
    monkeypatch.setattr(f"{module}._SCORES", 2**10)


class TestExactness:
    @pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (24, 0.0), (1, 0.0), (0, 2.0), (24, 2.0)])
    @pytest.mark.parametrize("mix", MIXES)
    def test_each_token_sees_its_own_sequence_beside_nan(self, mix: str, window: int, softcap: float) -> None:
        sequences = Sequences(*MIXES[mix])
        found = sequences.attend(window, softcap)
        torch.testing.assert_close(found, sequences.expected(window, softcap), rtol=1e-5, atol=1e-5)

    @pytest.mark.usefixtures("small_bounds")
    @pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (24, 0.0), (24, 2.0)])
    @pytest.mark.parametrize("mix", MIXES)
    def test_bounded_memory_changes_nothing(self, mix: str, window: int, softcap: float) -> None:
        sequences = Sequences(*MIXES[mix])
        found = sequences.attend(window, softcap)
        torch.testing.assert_close(found, sequences.expected(window, softcap), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("attention", [GatherAttention, InvariantGatherAttention])
    @pytest.mark.parametrize("scoring", scorings())
    @pytest.mark.parametrize("mix", MIXES)
    def test_sinks_chunks_and_biases_are_those_of_the_reference(self, mix: str, scoring: str, attention: Any) -> None:
        sequences, options = Sequences(*MIXES[mix]), scorings()[scoring]
        found = sequences.attend(**options, attention=attention())
        torch.testing.assert_close(found, sequences.expected(**options), rtol=1e-5, atol=1e-5)

    @pytest.mark.usefixtures("small_bounds")
    @pytest.mark.parametrize("scoring", scorings())
    @pytest.mark.parametrize("mix", MIXES)
    def test_bounded_memory_changes_nothing_of_sinks_chunks_and_biases(self, mix: str, scoring: str) -> None:
        sequences, options = Sequences(*MIXES[mix]), scorings()[scoring]
        found = sequences.attend(**options)
        torch.testing.assert_close(found, sequences.expected(**options), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("bounds", ["large", "small"])
    @pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (24, 0.0), (5, 2.0)])
    def test_tokens_of_a_group_see_each_other(
        self, window: int, softcap: float, bounds: str, request: pytest.FixtureRequest
    ) -> None:
        if bounds == "small":
            request.getfixturevalue("small_bounds")
        groups = ((30, 47), (50, 53), (53, 67))  # the first one began before the chunk
        sequences = Sequences(New(before=37, count=40, groups=groups))
        found = sequences.attend(window, softcap)
        kv = sequences.pool.kv[sequences.table[0].long()].flatten(0, 1)[:77].transpose(0, 1)
        key, value = (part.repeat_interleave(HEADS // KV_HEADS, 0) for part in kv.split(KEY_DIM, -1))
        scores = sequences.query[0] @ key.mT * 0.3
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        at, seen = torch.arange(37, 77)[:, None], torch.arange(77)
        mask = seen <= at
        for start, end in groups:
            mask |= (at >= start) & (at < end) & (seen >= start) & (seen < end)
        mask &= (seen > at - window) if window else True
        expected = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ value
        torch.testing.assert_close(found[0], expected.transpose(0, 1), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("bounds", ["large", "small"])
    @pytest.mark.parametrize(("window", "has_sinks"), [(0, False), (24, False), (0, True), (24, True)])
    @pytest.mark.parametrize("mix", MIXES)
    def test_biases_by_distance_and_sinks_are_those_of_each_token(
        self, mix: str, window: int, has_sinks: bool, bounds: str, request: pytest.FixtureRequest
    ) -> None:
        if bounds == "small":
            request.getfixturevalue("small_bounds")
        sequences, made = Sequences(*MIXES[mix]), torch.Generator().manual_seed(5)
        tokens, extent = sequences.query.shape[2], 19
        relative = torch.randn(HEADS, tokens, extent, generator=made)
        sinks = torch.randn(HEADS, tokens, 1, generator=made) + 1 if has_sinks else None
        found = sequences.attend(window, relative=relative, sinks=sinks)
        for span in sequences.batch().spans:
            blocks = sequences.table[span.slot].long()
            kv = sequences.pool.kv[blocks].flatten(0, 1).transpose(0, 1).repeat_interleave(HEADS // KV_HEADS, 0)
            for token, position in enumerate(range(span.position, span.position + span.count), start=span.first):
                first = max(0, position + 1 - window) if window else 0
                key, value = kv[:, first : position + 1].split(KEY_DIM, -1)
                scores = (key @ sequences.query[0, :, token, :, None])[..., 0] * 0.3
                for at in range(max(first, position + 1 - extent), position + 1):
                    scores[:, at - first] += relative[:, token, position - at]
                beside = scores.new_empty(HEADS, 0) if sinks is None else sinks[:, token]
                shares = torch.cat([scores, beside], -1).softmax(-1)[:, : position + 1 - first]
                expected = (shares[:, None] @ value)[:, 0]
                torch.testing.assert_close(found[0, token], expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("value_dim", [8, 24])
    @pytest.mark.parametrize("mix", ["alike", "a chunk", "decoding beside a chunk"])
    def test_values_may_have_another_size_than_keys(self, mix: str, value_dim: int) -> None:
        sequences = Sequences(*MIXES[mix], value_dim=value_dim)
        torch.testing.assert_close(sequences.attend(24), sequences.expected(24), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (24, 0.0), (0, 2.0)])
    @pytest.mark.parametrize("value_dim", [8, 40])
    @pytest.mark.parametrize("mix", MIXES)
    def test_values_may_belong_to_keys(self, mix: str, value_dim: int, window: int, softcap: float) -> None:
        sequences = Sequences(*MIXES[mix], value_dim=value_dim, is_latent=True)
        found = sequences.attend(window, softcap)
        torch.testing.assert_close(found, sequences.expected(window, softcap), rtol=1e-5, atol=1e-5)

    def test_slots_that_held_a_longer_sequence_point_at_foreign_blocks(self) -> None:
        sequences = Sequences(New(before=200), New(before=20))
        expected = Sequences(New(before=200), New(before=20)).attend()
        sequences.table[1, 2:] = sequences.table[0, 2:]
        assert torch.equal(sequences.attend(), expected)

    @pytest.mark.parametrize("scoring", ["sinks", "biases", "all"])
    def test_a_token_that_is_no_number_spoils_only_those_that_see_it_beside_sinks_and_biases(
        self, scoring: str
    ) -> None:
        options = scorings()[scoring]
        sequences = Sequences(New(before=20, count=40))
        expected = Sequences(*sequences.news).attend(**options)
        sequences.value[0, :, 25] = torch.nan
        found = sequences.attend(**options)
        torch.testing.assert_close(found[0, :25], expected[0, :25], rtol=1e-5, atol=1e-5)
        assert not found[0, 25:].isfinite().all(-1).any()

    @pytest.mark.parametrize("softcap", [0.0, 2.0])
    @pytest.mark.parametrize("number", [torch.nan, torch.inf])
    @pytest.mark.parametrize("part", ["key", "value"])
    @pytest.mark.parametrize("before", [0, 20])
    def test_a_token_that_is_no_number_spoils_only_those_that_see_it(
        self, part: str, number: float, before: int, softcap: float
    ) -> None:
        """The keys of the tokens before it are shared with other prompts that begin with them."""
        sequences = Sequences(New(before=before, count=40), New(before=7, count=9))
        expected = Sequences(*sequences.news).attend(softcap=softcap)
        getattr(sequences, part)[0, :, 25] = number
        found = sequences.attend(softcap=softcap)
        torch.testing.assert_close(found[0, :25], expected[0, :25], rtol=1e-5, atol=1e-5)
        assert torch.equal(found[0, 40:], expected[0, 40:])
        assert not found[0, 25:40].isfinite().all(-1).any() or part == "key"

    @pytest.mark.parametrize("count", [1, 40])
    def test_a_window_that_has_passed_a_nan_does_not_see_it(self, count: int) -> None:
        sequences = Sequences(New(before=70, count=count))
        expected = Sequences(*sequences.news).attend(window=10)
        block, at = sequences.table[0, 60 // BLOCK_TOKENS], 60 % BLOCK_TOKENS
        sequences.pool.kv[block, at] = torch.nan
        torch.testing.assert_close(sequences.attend(window=10), expected, rtol=1e-5, atol=1e-5)


class Gathered(TorchDispatchMode):
    """Counts the elements that operations copy from a pool, and the largest result of any operation."""

    def __init__(self, pool: LayerPool) -> None:
        super().__init__()
        self._pool = pool
        self.elements = self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not out._is_view():
            if func.name().startswith("aten::index_select") and args[0] is self._pool.kv:
                self.elements += out.numel()
            if out.data_ptr() != self._pool.kv.data_ptr():
                self.largest = max(self.largest, out.numel())
        return out


def gathered(news: Sequence[New], window: int = 0, softcap: float = 0.0) -> Gathered:
    sequences = Sequences(*news)
    with Gathered(sequences.pool) as counted:
        sequences.attend(window, softcap)
    return counted


TOKEN = KV_HEADS * 2 * KEY_DIM


class TestCost:
    @pytest.mark.parametrize("chunk", [(), (New(before=0, count=64),)])
    def test_a_long_sequence_beside_short_ones_costs_the_sum_of_both(self, chunk: tuple[New, ...]) -> None:
        short, long = [New(before=20)] * 31, New(before=12000)
        alone = [gathered(news).elements for news in ([*short, *chunk], [long])]
        assert gathered([*short, *chunk, long]).elements == sum(alone)

    @pytest.mark.parametrize("window", [0, 64])
    def test_any_lengths_cost_at_most_twice_their_own(self, window: int) -> None:
        made = torch.Generator().manual_seed(1)
        news = [New(before=int(2 ** (13 * torch.rand((), generator=made)))) for _ in range(32)]
        own = sum(gathered([new], window).elements for new in news)
        groups = 14
        assert gathered(news, window).elements <= 2 * own + groups * 8 * BLOCK_TOKENS * TOKEN

    @pytest.mark.parametrize("count", [1, 50])
    def test_a_window_costs_its_own_length(self, count: int) -> None:
        assert gathered([New(before=3000, count=count)], window=100).elements <= (100 + count + 32) * TOKEN

    @pytest.mark.parametrize("count", [1, 50])
    def test_a_chunk_of_the_layer_costs_its_own_length(self, count: int) -> None:
        sequences = Sequences(New(before=3030, count=count))  # position 30 of a chunk, and those after it
        with Gathered(sequences.pool) as counted:
            sequences.attend(chunk=100)
        assert counted.elements <= (30 + count + 32) * TOKEN

    def test_decoding_beside_a_chunk_takes_no_operation_for_each_row(self) -> None:
        def operations(rows: int) -> int:
            class Count(TorchDispatchMode):
                count = 0

                def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                    self.count += 1
                    return func(*args, **(kwargs or {}))

            sequences = Sequences(*[New(before=20)] * rows, New(before=0, count=30))
            with Count() as counted:
                sequences.attend()
            return counted.count

        assert operations(30) == operations(3)

    @pytest.mark.usefixtures("small_bounds")
    @pytest.mark.parametrize(
        "news",
        [[New(before=60)] * 30, [New(before=90, count=500)], [New(before=800)], [New(before=0, count=400)]],
        ids=["many", "a chunk", "a long one", "a prompt"],
    )
    @pytest.mark.parametrize("softcap", [0.0, 2.0])
    def test_temporary_memory_is_bounded(self, news: list[New], softcap: float) -> None:
        """By the bounds, by the sequence itself, and by its queries."""
        longest = max(new.before + new.count for new in news) + BLOCK_TOKENS
        tokens = sum(new.count for new in news)
        bound = max(6 * BLOCK_TOKENS * TOKEN, longest * TOKEN, 2**10, 16 * HEADS * longest, tokens * HEADS * KEY_DIM)
        assert gathered(news, softcap=softcap).largest <= bound


def test_all_layers_of_a_forward_share_what_depends_on_the_lengths() -> None:
    sequences = Sequences(New(before=30), New(before=90))
    batch = sequences.batch()
    attention = GatherAttention()
    attention.write(sequences.pool, sequences.key, sequences.value, batch)
    made = []
    for _ in range(3):
        attention.attend(sequences.pool, sequences.query, batch, scale=0.3, window=0, softcap=0.0)
        made.append(len(batch.on_device))
    assert len(set(made)) == 1

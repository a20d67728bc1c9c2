"""Packs of prompts of fixed lengths: what is filled up changes nothing. Capturing itself is tested on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from langchain_quantllm.engine.attention import TritonAttention
from langchain_quantllm.engine.block_manager import BLOCK_TOKENS
from langchain_quantllm.engine.kv_cache import allocate_pools
from langchain_quantllm.engine.model_check import probe
from langchain_quantllm.engine.model_runner import Runner
from langchain_quantllm.engine.prefill_graphs import LENGTHS, MOST_ROWS, Run, fields, fill, length_for, size
from langchain_quantllm.kernels import attention_reference as reference
from tests.support.models import tiny_model

SLOTS, PAGES = 20, 120


class ReferenceAttention(TritonAttention):
    """The attention of a GPU with its kernels' reference, which needs none."""

    def __init__(self) -> None:
        self._kernels: Any = reference
        self._multiprocessors = 1
        self._changes_device = False
        self._prefills_by = None
        self.prefills_on_device = True


def make_runner(family: str) -> Runner:
    model = tiny_model(300, family)
    found = probe(model)
    return Runner(
        model,
        allocate_pools(found.shapes, PAGES),
        ReferenceAttention(),
        slots=SLOTS,
        pages_per_row=16,
        vocab_size=found.vocab_size,
        by_sdpa=False,
        can_capture=False,
    )


def runs_of(*counts: int, position: int = 0) -> list[Run]:
    generator = torch.Generator().manual_seed(sum(counts))
    return [
        Run(
            slot=slot,
            position=position,
            ids=torch.randint(0, 300, (count,), generator=generator).tolist(),
            is_last=slot % 3 != 2,
        )
        for slot, count in enumerate(counts)
    ]


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "mistral"])
@pytest.mark.parametrize("counts", [(1,), (16,), (17, 3), (70, 1, 5, 64), (5,) * MOST_ROWS])
def test_a_pack_gives_the_logits_of_its_rows(family: str, counts: tuple[int, ...]) -> None:
    runner = make_runner(family)
    with torch.no_grad():
        for position in (0, 20):  # the second time over what the first has written
            runs = runs_of(*counts, position=position)
            for run in runs:
                first = 1 + run.slot * 6
                pages = range(first, first + -(-(position + len(run.ids)) // BLOCK_TOKENS))
                runner._table[run.slot, : len(pages)] = torch.tensor(list(pages), dtype=torch.int32)
            expected = runner._prefill_eagerly(runs)
            length = length_for(runs)
            assert length is not None
            pack = fields(torch.zeros(size(), dtype=torch.int32), length)
            fill(pack, runs, runner._padding_slot)
            found = runner._forward_pack(pack)
            assert found.shape[0] == MOST_ROWS
            # Products of matrices of other sizes differ in the last digits.
            torch.testing.assert_close(found[: len(expected)], expected, rtol=1e-4, atol=1e-5)
            assert all(pool.kv.isfinite().all() for pool in runner._pools)


def test_the_memory_holds_every_length_and_keeps_what_it_reads_apart() -> None:
    for length in LENGTHS:
        memory = torch.zeros(size(), dtype=torch.int32)
        pack = fields(memory, length)
        runs = runs_of(*([length // MOST_ROWS] * MOST_ROWS))
        fill(pack, runs, SLOTS)
        assert pack.ids.tolist() == [i for run in runs for i in run.ids]
        assert int(pack.blocks[:, 3].sum()) == length
        assert pack.kept.tolist()[:2] == [length // MOST_ROWS - 1, 2 * (length // MOST_ROWS) - 1]


def test_what_is_too_long_or_too_many_has_no_graph() -> None:
    assert length_for(runs_of(LENGTHS[-1])) == LENGTHS[-1]
    assert length_for(runs_of(LENGTHS[-1] + 1)) is None
    assert length_for(runs_of(*([1] * (MOST_ROWS + 1)))) is None

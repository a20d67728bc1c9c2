"""Packs of prompts of fixed lengths: what is filled up changes nothing. Capturing itself is tested on a GPU."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from langchain_quantllm.engine.attention import Attention
from langchain_quantllm.engine.block_manager import BLOCK_TOKENS
from langchain_quantllm.engine.gather_attention import GatherAttention
from langchain_quantllm.engine.kv_cache import allocate_pools
from langchain_quantllm.engine.model_probe import inspect_model
from langchain_quantllm.engine.model_runner import ModelRunner
from langchain_quantllm.engine.prefill_graphs import LENGTHS, MOST_SEQUENCES, PACK_SIZE, Pack, length_for
from langchain_quantllm.engine.sequence import SamplingInput, bare_sequence
from langchain_quantllm.engine.step import PrefillChunk, Step
from langchain_quantllm.engine.triton_attention import TritonAttention
from langchain_quantllm.kernels import reference
from tests.support.models import tiny_model

SLOTS, BLOCKS = 20, 120


class ReferenceAttention(TritonAttention):
    """The attention of a GPU with its kernels' reference, which needs none."""

    def __init__(self) -> None:
        self._kernels: Any = reference
        self._multiprocessors = 1
        self._changes_device = False
        self._prefills_by = None
        self.prefills_on_device = True


def make_runner(family: str, attention: Attention | None = None) -> ModelRunner:
    model = tiny_model(300, family)
    found = inspect_model(model)
    return ModelRunner(
        model,
        allocate_pools(found.shapes, BLOCKS),
        attention or ReferenceAttention(),
        slots=SLOTS,
        blocks_per_sequence=16,
        vocab_size=found.vocab_size,
        by_sdpa=False,
        can_capture=False,
    )


def chunks_of(*counts: int, position: int = 0) -> list[PrefillChunk]:
    generator = torch.Generator().manual_seed(sum(counts))
    chunks = []
    for slot, count in enumerate(counts):
        ids = torch.randint(0, 300, (count,), generator=generator).tolist()
        sequence = bare_sequence([0] * position + ids, 1)
        sequence.slot = slot
        chunks.append(PrefillChunk(sequence, position, count, slot % 3 != 2))
    return chunks


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "mistral"])
@pytest.mark.parametrize("counts", [(1,), (16,), (17, 3), (70, 1, 5, 64), (5,) * MOST_SEQUENCES])
def test_a_padded_pack_gives_the_logits_of_its_chunks(family: str, counts: tuple[int, ...]) -> None:
    runner = make_runner(family)
    with torch.no_grad():
        for position in (0, 20):  # the second time over what the first has written
            chunks = chunks_of(*counts, position=position)
            for chunk in chunks:
                slot = chunk.sequence.slot
                first = 1 + slot * 6
                blocks = list(range(first, first + -(-(position + chunk.count) // BLOCK_TOKENS)))
                runner._table.blocks[slot, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
            expected = runner._run_eagerly(Step([], [], chunks))
            length = length_for(chunks)
            assert length is not None
            pack = Pack.over(torch.zeros(PACK_SIZE, dtype=torch.int32), length)
            pack.fill(chunks, runner._padding_slot)
            found = runner._forward_pack(pack)
            assert found.shape[0] == MOST_SEQUENCES
            # Products of matrices of other sizes differ in the last digits.
            torch.testing.assert_close(found[: len(expected)], expected, rtol=1e-4, atol=1e-5)
            assert all(pool.kv.isfinite().all() for pool in runner._pools.values())


def test_packs_of_every_length_fit_the_memory_without_overlap() -> None:
    for length in LENGTHS:
        memory = torch.zeros(PACK_SIZE, dtype=torch.int32)
        pack = Pack.over(memory, length)
        chunks = chunks_of(*([length // MOST_SEQUENCES] * MOST_SEQUENCES))
        pack.fill(chunks, SLOTS)
        assert pack.ids.tolist() == [i for chunk in chunks for i in chunk.ids]
        assert int(pack.tiles[:, 3].sum()) == length
        assert pack.kept.tolist()[:2] == [length // MOST_SEQUENCES - 1, 2 * (length // MOST_SEQUENCES) - 1]


def test_a_step_too_long_or_of_too_many_sequences_has_no_graph() -> None:
    assert length_for(chunks_of(LENGTHS[-1])) == LENGTHS[-1]
    assert length_for(chunks_of(LENGTHS[-1] + 1)) is None
    assert length_for(chunks_of(*([1] * (MOST_SEQUENCES + 1)))) is None


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_decoding_sequence_beside_prompts_gets_the_logits_that_it_gets_in_a_decode_step(family: str) -> None:
    runner = make_runner(family, GatherAttention())
    with torch.no_grad():
        step = Step([], [], chunks_of(30, 9))
        for sequence in (chunk.sequence for chunk in step.chunks):
            sequence.blocks = list(range(1 + sequence.slot * 6, 7 + sequence.slot * 6))
        runner.sample(runner.run(step, [SamplingInput()] * len(step.sampled)))
        rows = [chunk.sequence for chunk in step.chunks]
        positions = [30, 9]
        alone = runner.run(Step(rows, positions, []), [SamplingInput()] * 2).logits.clone()
        other = chunks_of(1, 2, 25)[2]
        other.sequence.blocks = list(range(100, 106))
        other = dataclasses.replace(other, is_last=True)
        beside = runner.run(Step(rows, positions, [other]), [SamplingInput()] * 3).logits
    torch.testing.assert_close(beside[:2], alone, rtol=1e-4, atol=1e-5)

"""Batches are packed by padded tokens, and halved where memory runs out."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch

from langchain_quantllm.encoders.batches import is_out_of_memory, pack, run_halving
from langchain_quantllm.errors import NotEnoughMemoryError


@pytest.mark.parametrize("seed", range(20))
def test_every_item_is_in_one_batch_and_no_batch_of_several_is_larger_than_the_bound(seed: int) -> None:
    chance = random.Random(seed)
    lengths = [chance.randint(0, 300) for _ in range(chance.randint(0, 200))]
    most = chance.randint(1, 1000)
    batches = pack(lengths, most)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    assert all(len(batch) == 1 or max(lengths[i] for i in batch) * len(batch) <= most for batch in batches)


def test_batches_begin_with_the_longest_items_and_waste_little_padding() -> None:
    lengths = list(range(1, 257))
    batches = pack(lengths, 1024)
    assert batches[0][0] == 255
    padded = sum(max(lengths[i] for i in batch) * len(batch) for batch in batches)
    assert padded < 1.05 * sum(lengths)


def _fits(most: int, sizes: list[int]) -> object:
    def run(items: Sequence[int]) -> list[int]:
        sizes.append(len(items))
        if len(items) > most:
            raise torch.OutOfMemoryError
        return [10 * item for item in items]

    return run


def test_a_batch_that_does_not_fit_is_halved_until_it_does_and_its_results_keep_their_order() -> None:
    sizes: list[int] = []
    shrunk: list[int] = []
    assert run_halving(_fits(3, sizes), list(range(11)), shrunk.append) == [10 * i for i in range(11)]  # type: ignore[arg-type]
    assert sizes[:3] == [11, 6, 3]
    assert set(shrunk) == {11, 6, 5}


def test_an_item_that_does_not_fit_alone_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(NotEnoughMemoryError, match="max_length="):
        run_halving(_fits(0, []), [1, 2])  # type: ignore[arg-type]


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    def run(items: Sequence[int]) -> list[int]:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        run_halving(run, [1, 2])
    assert is_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"))
    assert not is_out_of_memory(NotEnoughMemoryError("a single text"))


def test_torchs_own_error_for_a_tensor_larger_than_the_memory_is_recognized() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)

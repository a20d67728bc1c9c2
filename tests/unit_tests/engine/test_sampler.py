"""The batch sampler: every sequence gets the tokens of the `generate` sampler, whatever else is in the batch."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from langchain_quantllm.engine.generate_sampler import RowSampler
from langchain_quantllm.engine.request import Request
from langchain_quantllm.engine.sampler import (
    BLOCKS,
    MASKS,
    PENALIZES,
    SAMPLES,
    SORTS,
    BatchSampler,
    log_probabilities,
    needs_of,
)
from tests.support.sampling import COMBINATIONS, CPU, VOCAB, Batch, Only, alone, chi_square, logits_of, request_of

pytestmark = pytest.mark.usefixtures("one_thread")


class TestAgainstThePlainSampler:
    def test_all_combinations_of_options_in_one_batch(self) -> None:
        """Over a thousand rows with parameters of their own sample the tokens that each samples alone."""
        assert len(COMBINATIONS) > 1000
        found = Batch(COMBINATIONS).run()
        wrong = [i for i, request in enumerate(COMBINATIONS) if found[i] != alone(request)]
        assert [(COMBINATIONS[i], found[i]) for i in wrong[:3]] == []

    @pytest.mark.parametrize("size", [1, 5])
    def test_small_batches_need_no_more_than_their_flags(self, size: int) -> None:
        """Where no row samples, say, nothing is sorted: the flags leave out nothing that a row needs."""
        requests = random.Random(1).sample(COMBINATIONS, 60)
        for i in range(0, len(requests), size):
            batch = requests[i : i + size]
            assert Batch(batch).run() == [alone(request) for request in batch]

    @pytest.mark.parametrize("share", [0.05, pytest.param(0.5, marks=pytest.mark.slow)])
    def test_masks_beside_every_other_option(self, share: float) -> None:
        """Beside rows that have none, together with every other option."""
        requests = [
            replace(request, mask=None if i % 3 == 0 else lambda i=i: Only(i, share=share))
            for i, request in enumerate(COMBINATIONS)
        ]
        batch = Batch(requests)
        found = batch.run()
        wrong = [i for i, request in enumerate(requests) if found[i] != alone(request)]
        assert [(requests[i], found[i]) for i in wrong[:3]] == []
        for mask, sampled in zip(batch.masks, found, strict=True):
            if mask is not None:
                assert mask.accepted == sampled

    @pytest.mark.parametrize("vocab", [2, 31, 32, 33, 64, 1000])
    def test_vocabularies_of_any_size(self, vocab: int) -> None:
        options: list[dict[str, Any]] = [
            {},
            {"temperature": 0.8},
            {"top_k": 3},
            {"top_p": 0.7, "repetition_penalty": 2.0},
        ]
        requests = [
            replace(
                request_of(seed=i, prompt_ids=(1,), **options[i % 4]),
                mask=None if i % 8 < 4 else lambda i=i: Only(i, vocab),
            )
            for i in range(16)
        ]
        if vocab < 32:
            requests = [replace(request, mask=None) for request in requests]
        assert Batch(requests, vocab=vocab).run() == [alone(request, vocab=vocab) for request in requests]

    def test_logits_in_16_bits(self) -> None:
        """They are counted in float32, as in the plain engine; without top_k and top_p, as those keep ties here."""
        options: list[dict[str, Any]] = [{}, {"temperature": 0.8}, {"min_p": 0.05}, {"repetition_penalty": 1.3}]
        for dtype, (i, chosen) in itertools.product([torch.float16, torch.bfloat16], enumerate(options)):
            request = request_of(seed=i, **chosen)
            batch, plain, sampled = Batch([request]), RowSampler(request), []
            for step in range(30):
                logits = logits_of(step, 1).to(dtype)
                sampled.append(plain.sample(logits[0].float(), sampled)[0])
                assert batch.step(logits) == sampled[-1:]

    def test_random_numbers_do_not_depend_on_other_sequences(self) -> None:
        """A row that runs on after others have left samples what it would have sampled."""
        request = request_of(seed=3, temperature=1.0)
        both = Batch([request, request_of(seed=4, temperature=1.0)])
        one = Batch([request])
        assert both.run(20)[0] == one.run(20)[0]


class TestIndependence:
    def test_what_else_is_in_the_batch_does_not_matter(self) -> None:
        rng = random.Random(5)
        for _ in range(15):
            requests = rng.sample(COMBINATIONS, 6)
            together = Batch(requests).run()
            shuffled = rng.sample(requests, 6)
            assert Batch(shuffled).run() == [together[requests.index(request)] for request in shuffled]
            assert Batch(requests[:1]).run() == together[:1]

    def test_flags_of_other_sequences_do_not_matter(self) -> None:
        every = BLOCKS | PENALIZES | MASKS | SAMPLES | SORTS
        for i in range(0, len(COMBINATIONS), 41):
            request = COMBINATIONS[i]
            assert Batch([request]).run(extra_need=every) == Batch([request]).run()

    def test_slots_may_be_in_any_order(self) -> None:
        requests = random.Random(6).sample(COMBINATIONS, 5)
        assert Batch(requests, slots=[9, 2, 7, 0, 4]).run() == Batch(requests).run()

    def test_a_slot_keeps_nothing_of_its_former_sequence(self) -> None:
        """Neither what it had seen, nor its parameters, nor its end tokens."""
        rng = random.Random(8)
        batch = Batch(rng.sample(COMBINATIONS, 4))
        batch.run(5)
        for _ in range(15):
            requests = rng.sample(COMBINATIONS, 4)
            fresh = Batch(requests)
            batch.sampler.set(batch.slots, requests, [request.prompt_ids for request in requests])
            fresh.sampler = batch.sampler
            assert fresh.run() == [alone(request) for request in requests]

    def test_a_preempted_sequence_goes_on_as_it_was(self) -> None:
        """Set again with all its tokens so far, at another slot, it has seen them all."""
        request = request_of(seed=2, repetition_penalty=1.8, temperature=0.7)
        expected = alone(request, 20)
        batch = Batch([request], slots=[1])
        batch.run(8)
        batch.slots = [0]
        batch.sampler.set([0], [request], [[*request.prompt_ids, *batch.sampled[0]]])
        for step in range(8, 20):
            batch.step(batch.logits(0, step, 0)[None])
        assert batch.sampled[0] == expected

    def test_padding_changes_nothing(self) -> None:
        """Bucketed batches point them all at the last slot."""
        sampler = BatchSampler(2, VOCAB, CPU)
        requests = [request_of(seed=1, repetition_penalty=3.0), request_of(seed=2, top_k=4)]
        sampler.set([0, 1], requests, [(1,), (2,)])
        logits = logits_of(0, 4)
        need = PENALIZES | SAMPLES | SORTS | BLOCKS
        args = (torch.tensor([0.0, 0.4, 0.9, 0.9]), torch.tensor([False, False, True, False]), need)
        ids = sampler.sample(logits, torch.tensor([0, 1, 2, 2]), *args)
        other = BatchSampler(2, VOCAB, CPU)
        other.set([0, 1], requests, [(1,), (2,)])
        expected = other.sample(logits[:2], torch.tensor([0, 1]), args[0][:2], args[1][:2], need)
        assert ids[:2].tolist() == expected.tolist() == sampler.last_ids[:2].tolist()


class TestNoNumbers:
    @pytest.mark.parametrize("places", ["one", "all", "last"])
    def test_nan_logits_give_minus_one_and_leave_the_others_alone(self, places: str) -> None:
        requests = [*random.Random(4).sample(COMBINATIONS, 6), request_of(seed=1), request_of(seed=2, top_p=0.8)]
        expected = Batch(requests).run(6)
        for bad in range(len(requests)):
            batch = Batch(requests)
            for step in range(6):
                logits = torch.stack([batch.logits(i, step, 0) for i in range(len(requests))])
                if step >= 2:
                    logits[bad, {"one": 17, "all": slice(None), "last": VOCAB - 1}[places]] = float("nan")
                ids = batch.step(logits)
                assert ids == [-1 if i == bad and step >= 2 else expected[i][step] for i in range(len(requests))]
            # What is fed to the next step is a token, so that the device does not read outside of its tables.
            assert 0 <= batch.sampler.last_ids[bad] < VOCAB

    def test_a_slot_can_be_used_again_after_nan(self) -> None:
        batch = Batch([request_of(seed=1, repetition_penalty=2.0, temperature=0.9)])
        assert batch.step(torch.full((1, VOCAB), float("nan"))) == [-1]
        request = request_of(seed=5, repetition_penalty=2.0)
        again = Batch([request])
        batch.sampler.set([0], [request], [request.prompt_ids])
        again.sampler = batch.sampler
        assert again.run() == [alone(request)]

    def test_logits_of_minus_infinity_are_no_nan(self) -> None:
        logits = torch.full((2, VOCAB), -torch.inf)
        logits[:, 40] = 1.0
        assert Batch([request_of(), request_of(temperature=1.0)]).step(logits) == [40, 40]


class TestMasks:
    def test_only_allowed_tokens_are_sampled(self) -> None:
        options: list[dict[str, Any]] = [{}, {"temperature": 2.0}, {"top_k": 3}, {"top_p": 0.5}, {"ignore_eos": True}]
        requests = [
            replace(request_of(seed=i, **options[i % 5]), mask=lambda i=i: Only(i, share=0.1)) for i in range(25)
        ]
        batch = Batch(requests)
        batch.run(30)
        for mask, sampled in zip(batch.masks, batch.sampled, strict=True):
            assert mask is not None
            assert all(token_id in allowed for token_id, allowed in zip(sampled, mask.allowed, strict=True))

    @pytest.mark.parametrize("token_id", [0, 1, 30, 31, 32, 63, 64, 95, 96, 100])
    def test_a_mask_of_one_token_gives_it(self, token_id: int) -> None:
        """Each bit is the right one, the sign bit of a word and the last of the vocabulary, too."""
        bits = torch.zeros(1, 4, dtype=torch.int32)
        bits[0, token_id // 32] = -(2**31) if token_id % 32 == 31 else 1 << token_id % 32
        for options in ({}, {"temperature": 1.5}, {"top_k": 2, "top_p": 0.2}):
            request = request_of(**options)
            sampler = BatchSampler(1, VOCAB, CPU)
            sampler.set([0], [request], [(1,)])
            need = MASKS | needs_of(request)
            args = (torch.tensor([0]), torch.tensor([0.99]), torch.tensor([False]), need, bits)
            assert sampler.sample(logits_of(3, 1), *args).tolist() == [token_id]

    def test_bits_beyond_the_vocabulary_are_ignored(self) -> None:
        batch = Batch([request_of(), request_of(temperature=1.0)])
        args = (torch.tensor([0, 1]), torch.tensor([0.0, 0.999]), torch.tensor([False, False]))
        for bits in (torch.full((2, 4), -1, dtype=torch.int32), None):
            ids = batch.sampler.sample(logits_of(1, 2), *args, MASKS | SAMPLES, bits)
            assert ids.max() < VOCAB

    def test_a_mask_is_applied_before_top_k(self) -> None:
        """Else nothing might be left: the likeliest tokens are taken from those allowed."""
        logits = torch.arange(VOCAB, dtype=torch.float32)[None]
        bits = torch.tensor([[0b1110, 0, 0, 0]], dtype=torch.int32)
        request = request_of(top_k=2)
        sampler = BatchSampler(1, VOCAB, CPU)
        sampler.set([0], [request], [(1,)])
        found = {
            int(
                sampler.sample(
                    logits, torch.tensor([0]), torch.tensor([u]), torch.tensor([False]), MASKS | SAMPLES | SORTS, bits
                )
            )
            for u in (0.0, 0.1, 0.2, 0.5, 0.9)
        }
        assert found == {2, 3}


class TestEndTokens:
    def sample(self, requests: Sequence[Request], may_not_end: Sequence[bool], best: Sequence[int]) -> list[int]:
        """Sample once from logits that name the best tokens, the first by far."""
        sampler = BatchSampler(len(requests), VOCAB, CPU)
        sampler.set(range(len(requests)), requests, [request.prompt_ids for request in requests])
        logits = torch.zeros(len(requests), VOCAB)
        for i, token_id in enumerate(best):
            logits[:, token_id] = 50.0 - i
        slots = torch.arange(len(requests))
        uniforms = torch.full((len(requests),), 0.5)
        return sampler.sample(logits, slots, uniforms, torch.tensor(may_not_end), BLOCKS | SAMPLES).tolist()

    def test_end_tokens_are_blocked_if_the_sequence_may_not_end(self) -> None:
        request = replace(request_of(), eos_token_ids=(7,), stop_token_ids=(9,))
        assert self.sample([request] * 2, [True, False], [7, 9, 20]) == [20, 7]

    def test_sequences_may_have_different_numbers_of_end_tokens(self) -> None:
        requests = [
            replace(request_of(), eos_token_ids=ends, stop_token_ids=stops)
            for ends, stops in (((5,), ()), ((5, 6), ()), ((), (7,)), ((5, 6), (7, 8)))
        ]
        assert self.sample(requests, [True] * 4, [5, 6, 7, 8, 20]) == [6, 7, 5, 20]

    def test_more_end_tokens_than_there_was_room_for(self) -> None:
        """Earlier sequences keep theirs; `version` tells graphs that a tensor was replaced."""
        sampler = BatchSampler(3, VOCAB, CPU)
        few = replace(request_of(), eos_token_ids=(5, 6))
        many = replace(request_of(), eos_token_ids=tuple(range(10, 30)))
        sampler.set([0], [few], [(1,)])
        version = sampler.version
        sampler.set([2], [many], [(1,)])
        assert sampler.version > version
        version = sampler.version
        sampler.set([1], [few], [(1,)])
        assert sampler.version == version
        logits = torch.zeros(3, VOCAB)
        logits[:, :40] = torch.arange(40, 0, -1)
        logits[:, 1:5] = -1.0
        slots, uniforms = torch.tensor([0, 1, 2]), torch.zeros(3)
        logits[2, 5:10] = -1.0
        everyone = torch.tensor([True] * 3)
        # Token 0 is no end token, whatever fills the unused places.
        assert sampler.sample(logits, slots, uniforms, everyone, BLOCKS).tolist() == [0, 0, 0]
        logits[:, 0] = -1.0
        assert sampler.sample(logits, slots, uniforms, everyone, BLOCKS).tolist() == [7, 7, 30]
        assert sampler.sample(logits, slots, uniforms, torch.tensor([False] * 3), BLOCKS).tolist() == [5, 5, 10]

    @pytest.mark.parametrize("options", [{"ignore_eos": True}, {"min_new_tokens": 5}], ids=str)
    def test_without_end_tokens_nothing_is_blocked(self, options: dict[str, Any]) -> None:
        """Not even token 0."""
        request = replace(request_of(**options), eos_token_ids=())
        assert self.sample([request], [True], [0, 1]) == [0]

    def test_without_end_tokens_nothing_is_blocked_beside_sequences_that_have_some(self) -> None:
        requests = [replace(request_of(), eos_token_ids=()), replace(request_of(), eos_token_ids=(0,))]
        assert self.sample(requests, [True, True], [0, 1]) == [0, 1]


class TestDistribution:
    @pytest.mark.parametrize(
        "options",
        [{"do_sample": True}, {"temperature": 0.6}, {"top_k": 12}, {"top_p": 0.8}, {"min_p": 0.1}],
        ids=str,
    )
    def test_sampled_tokens_follow_the_softmax(self, options: dict[str, Any]) -> None:
        """Chi-square over 4000 samples; five deviations of it, as in `test_sampler`."""
        logits = logits_of(1, 1, scale=2.0)
        scores = logits / options.get("temperature", 1.0)
        probabilities = scores.softmax(-1)[0]
        if "top_k" in options:
            probabilities[probabilities < probabilities.topk(options["top_k"]).values[-1]] = 0
        if "top_p" in options:
            best = probabilities.sort(descending=True)
            probabilities[best.indices[best.values.cumsum(0) - best.values >= options["top_p"]]] = 0
        if "min_p" in options:
            probabilities[probabilities < options["min_p"] * probabilities.max()] = 0
        probabilities = probabilities / probabilities.sum()
        sampled = self.samples(options, logits, 4000)
        assert all(probabilities[i] > 0 for i in set(sampled))
        statistic, freedom = chi_square(sampled, probabilities)
        assert freedom >= 5
        assert statistic < freedom + 5 * (2 * freedom) ** 0.5

    def test_the_check_notices_a_wrong_distribution(self) -> None:
        logits = logits_of(1, 1, scale=2.0)
        statistic, freedom = chi_square(self.samples({"temperature": 0.8}, logits, 4000), logits[0].softmax(-1))
        assert statistic > freedom + 5 * (2 * freedom) ** 0.5

    def samples(self, options: dict[str, Any], logits: torch.Tensor, count: int) -> list[int]:
        request = request_of(seed=3, **options)
        sampler = BatchSampler(1, VOCAB, CPU)
        sampler.set([0], [request], [(1,)])
        generator = random.Random(11)
        uniforms = torch.tensor([generator.random() for _ in range(count)])
        slots, ends = torch.zeros(count, dtype=torch.long), torch.zeros(count, dtype=torch.bool)
        sampled = sampler.sample(logits.expand(count, -1), slots, uniforms, ends, needs_of(request))
        assert [int(i) for i in sampled] == [
            int(sampler.sample(logits, slots[:1], u[None], ends[:1], needs_of(request))) for u in uniforms[:50]
        ] + sampled[50:].tolist()
        return [int(i) for i in sampled]

    def test_a_token_of_probability_zero_is_never_sampled(self) -> None:
        """Even for the lowest and the highest number in float32, at either end of the vocabulary."""
        logits = torch.full((1, VOCAB), -torch.inf)
        logits[0, [5, 40]] = torch.tensor([0.0, 1.0])
        request = request_of(do_sample=True)
        sampler = BatchSampler(1, VOCAB, CPU)
        sampler.set([0], [request], [(1,)])
        for value, token in ((0.0, 5), (0.2689, 5), (0.269, 40), (1 - 2**-24, 40)):
            args = (torch.tensor([0]), torch.tensor([value]), torch.tensor([False]))
            for need in (SAMPLES, SAMPLES | SORTS):
                assert sampler.sample(logits, *args, need).tolist() == [token]

    def test_tokens_that_tie_with_the_last_kept_are_all_kept(self) -> None:
        """So that which ones are kept does not depend on how a device sorts."""
        logits = torch.zeros(1, VOCAB)
        logits[0, 3] = 5.0
        logits[0, [10, 20, 30]] = 3.0
        for options in ({"top_k": 2}, {"top_p": 0.6}):
            sampled = set(self.samples(options, logits, 400))
            assert sampled == {3, 10, 20, 30}

    def test_top_k_of_one_is_greedy(self) -> None:
        request = request_of(seed=1, top_k=1)
        assert Batch([request]).run() == [alone(request_of(seed=1))]

    def test_uniform_numbers_in_order_give_tokens_in_order(self) -> None:
        """Inverse CDF in the order of ids: the share of each token is its probability, to float32."""
        logits = logits_of(2, 1, vocab=10, scale=1.0)
        request = request_of(do_sample=True)
        sampler = BatchSampler(1, 10, CPU)
        sampler.set([0], [request], [(1,)])
        count = 20_000
        uniforms = (torch.arange(count) + 0.5) / count
        slots, ends = torch.zeros(count, dtype=torch.long), torch.zeros(count, dtype=torch.bool)
        sampled = sampler.sample(logits.expand(count, -1), slots, uniforms, ends, SAMPLES)
        assert sampled.tolist() == sorted(sampled.tolist())
        shares = torch.bincount(sampled.long(), minlength=10) / count
        # Each token's two borders are off by one number at most.
        assert torch.allclose(shares, logits.softmax(-1)[0], atol=2 / count)


class TestLogProbabilities:
    def test_log_probabilities_are_those_of_log_softmax(self) -> None:
        logits, ids = logits_of(1, 6), torch.tensor([0, 5, 100, -1, 31, 32], dtype=torch.int32)
        expected = logits.log_softmax(-1)
        chosen, best_ids, best = log_probabilities(logits, ids, 4)
        assert chosen.shape == (6,)
        for i, token_id in enumerate(ids.tolist()):
            if token_id >= 0:
                assert chosen[i] == expected[i, token_id]
        assert torch.equal(best, expected.topk(4, -1).values)
        assert torch.equal(best_ids, expected.topk(4, -1).indices)

    def test_no_alternatives_and_more_than_there_are_tokens(self) -> None:
        logits, ids = logits_of(1, 2), torch.tensor([3, 4])
        chosen, best_ids, _ = log_probabilities(logits, ids, 0)
        assert best_ids.shape == (2, 0)
        assert torch.equal(chosen, logits.log_softmax(-1)[[0, 1], ids])
        assert log_probabilities(logits, ids, 5000)[1].shape == (2, VOCAB)

    def test_log_probabilities_are_in_float32(self) -> None:
        logits = logits_of(1, 3).to(torch.bfloat16)
        chosen, _, best = log_probabilities(logits, torch.tensor([1, 2, 3]), 2)
        assert chosen.dtype == best.dtype == torch.float32
        assert torch.equal(chosen, logits.float().log_softmax(-1)[[0, 1, 2], [1, 2, 3]])

    def test_log_probabilities_of_nan_logits_leave_the_others_alone(self) -> None:
        logits = logits_of(1, 3)
        expected = logits.log_softmax(-1)
        logits[1] = float("nan")
        chosen, _, best = log_probabilities(logits, torch.tensor([1, -1, 3]), 2)
        assert chosen[0] == expected[0, 1]
        assert chosen[2] == expected[2, 3]
        assert torch.equal(best[[0, 2]], expected[[0, 2]].topk(2, -1).values)


def test_needs_follow_from_the_options() -> None:
    def needs(**options: Any) -> int:
        return needs_of(request_of(**options))

    assert needs() == 0
    assert needs(temperature=0.7) == SAMPLES
    assert needs(min_p=0.1) == SAMPLES
    assert needs(top_k=5) == needs(top_p=0.5) == SAMPLES | SORTS
    assert needs(repetition_penalty=1.2) == PENALIZES
    assert needs(temperature=0.0, top_k=5) == 0
    assert needs_of(replace(request_of(), mask=lambda: Only(0))) == MASKS


def test_global_generators_stay_as_they_are() -> None:
    before = torch.random.get_rng_state(), random.getstate()
    Batch([request_of(seed=5, temperature=0.7, top_p=0.9)]).run()
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert before[1] == random.getstate()

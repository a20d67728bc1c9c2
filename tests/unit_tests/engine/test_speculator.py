"""The choice of proposals: where they come from, and when they pay."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import pytest

from langchain_quantllm.engine.detokenizer import Completion
from langchain_quantllm.engine.request import Request
from langchain_quantllm.engine.sequence import Sequence
from langchain_quantllm.engine.speculation import costs as costs_module
from langchain_quantllm.engine.speculation.costs import StepClock, StepCosts
from langchain_quantllm.engine.speculation.ngrams import NGramIndex, PastTexts
from langchain_quantllm.engine.speculation.proposal import Proposal
from langchain_quantllm.engine.speculation.speculator import MOST_STEP_TOKENS, Speculator
from langchain_quantllm.engine.step import Step
from langchain_quantllm.options import GenerationOptions
from tests.support.speculation import AllowAhead


class TestNGrams:
    def test_the_longest_match_counts_and_the_latest_of_several(self) -> None:
        ids = [9, 1, 2, 3, 4, 5, 0, 8, 1, 2, 3, 4, 6, 0, 1, 2, 3, 4, 7, 0, 8, 1, 2, 3, 4]
        index = NGramIndex(ids)
        match = index.find()
        assert match == (12, 6)
        assert index.tokens(match, 4) == (6, 0, 1, 2)
        ids += [7]
        match = index.find()
        assert match is not None
        assert index.tokens(match, 2) == (0, 8)

    def test_two_tokens_that_agree_are_too_few(self) -> None:
        assert NGramIndex([1, 2, 3, 4, 5, 2, 3]).find() is None
        assert NGramIndex([1, 2]).find() is None

    def test_a_text_that_repeats_itself_goes_on_so(self) -> None:
        index = NGramIndex([4, 1, 2, 1, 2, 1, 2])
        match = index.find()
        assert match is not None
        assert index.tokens(match, 7) == (1, 2, 1, 2, 1, 2, 1)


class TestPastTexts:
    def test_a_text_goes_on_like_the_one_that_agrees_with_the_most_tokens(self) -> None:
        past = PastTexts()
        past.add([1, 2, 3, 4, 5, 6, 7, 50, 51])
        past.add([9, 9, 3, 4, 5, 6, 7, 60, 61])
        assert past.find([0, 2, 3, 4, 5, 6, 7], 2) == (6, (50, 51))
        assert past.find([8, 9, 9, 3, 4, 5, 6, 7], 1) == (7, (60,))
        assert past.find([8, 8, 3, 4, 5, 6, 7], 5) is None
        assert past.find([1, 2], 5) is None
        assert past.find([5, 6, 7, 50, 51], 5) is None

    def test_the_oldest_texts_are_dropped_with_their_places(self) -> None:
        past = PastTexts()
        texts = [[1000 * n + i % 900 for i in range(4000)] for n in range(20)]
        for text in texts:
            past.add(text)
        assert past.find(texts[0][:20], 3) is None
        assert past.find(texts[-1][:20], 3) == (20, tuple(texts[-1][20:23]))
        assert past._tokens == sum(map(len, past._texts.values())) <= 32768
        assert {number for places in past._places.values() for number, _ in places} == past._texts.keys()
        past.add(range(40000))
        assert past._tokens <= 32768


def test_proposed_tokens_follow_the_last_token_wherever_it_is() -> None:
    proposal = Proposal(10, (1, 2, 3, 4, 5), 3)
    assert proposal.fed(9) == [1, 2, 3]
    assert proposal.fed(11) == [3, 4, 5]
    assert proposal.fed(13) == [5, -1, -1]
    assert proposal.fed(20) == [-1, -1, -1]


def repeating(count: int = 1) -> list[Sequence]:
    """Make sequences that decode, whose text repeats itself."""
    rows = []
    for _ in range(count):
        request = Request(
            prompt_ids=(1, 2, 3, 4, 5) * 6,
            max_new_tokens=500,
            min_new_tokens=0,
            options=GenerationOptions(speculation="ngram"),
            sample_index=0,
            seed=0,
            eos_token_ids=(),
        )
        row = Sequence(Completion(request, lambda ids: ""))
        row.ids.append(1)
        row.sampled, row.written, row.decodes, row.slot = 1, 30, True, 0
        rows.append(row)
    return rows


def measured(costs: StepCosts, of_single: float, of_several: float, *, is_masked: bool = False) -> None:
    for tokens in (1, 2, 4, 8, 16, 32, 64, 128):
        for _ in range(4):
            costs.note(tokens, of_single, verifies=False, is_masked=is_masked)
            costs.note(tokens, of_several, verifies=True, is_masked=is_masked)


class TestWhenItPays:
    def test_right_proposals_in_cheap_steps_go_on(self) -> None:
        speculator, [row] = Speculator(), repeating()
        measured(speculator.costs, 1.0, 1.3)
        for _ in range(20):
            [proposal] = speculator.choose([row]).values()
            assert proposal.count >= 3
            speculator.note(row, proposal, proposal.count, proposal.count)
        assert proposal.count >= 10
        assert (speculator.proposed, speculator.accepted) == (row.speculation.proposed, row.speculation.accepted)

    @pytest.mark.parametrize(("right", "cost"), [(False, 1.3), (True, 40.0)], ids=["wrong", "slow"])
    def test_others_pause_for_longer_and_longer_and_are_tried_again(self, right: bool, cost: float) -> None:
        speculator, [row] = Speculator(), repeating()
        measured(speculator.costs, 1.0, cost)
        steps = []
        for step in range(2000):
            for proposal in speculator.choose([row]).values():
                steps.append(step)
                speculator.note(row, proposal, proposal.count, proposal.count if right else 0)
        assert 5 <= len(steps) <= 25
        gaps = [b - a for a, b in itertools.pairwise(steps)]
        assert gaps[-1] >= 200
        assert gaps[-1] > 8 * min(gaps)

    @pytest.mark.parametrize("is_masked", [True, False])
    def test_masks_that_take_long_hold_up_only_those_with_masks(self, is_masked: bool) -> None:
        speculator, [row] = Speculator(), repeating()
        measured(speculator.costs, 1.0, 1.3)
        measured(speculator.costs, 1.2, 40.0, is_masked=True)
        if is_masked:
            row.mask = AllowAhead(range(100))
        steps = 0
        for _ in range(40):
            for proposal in speculator.choose([row]).values():
                steps += 1
                speculator.note(row, proposal, proposal.count, proposal.count)
        assert steps <= 4 if is_masked else steps == 40

    @pytest.mark.parametrize("slow", [2, 3, 4])
    def test_one_of_the_first_steps_that_waits_for_a_compiler_does_not_count(self, slow: int) -> None:
        costs = StepCosts()
        for step in range(8):
            costs.note(8, 3.0 if step == slow else 0.01, verifies=True)
            costs.note(8, 0.01, verifies=False)
        assert costs.ratio(8, 8) == pytest.approx(1.0)

    def test_where_many_have_masks_only_the_others_get_proposals(self) -> None:
        speculator, rows = Speculator(), repeating(3)
        measured(speculator.costs, 1.0, 1.3)
        measured(speculator.costs, 1.0, 1.3, is_masked=True)
        speculator.most_masked = 1
        rows[0].mask = AllowAhead(range(100))
        assert set(speculator.choose(rows)) == set(rows)
        rows[1].mask = AllowAhead(range(100))
        assert set(speculator.choose(rows)) == {rows[2]}
        speculator.most_masked = None
        assert set(speculator.choose(rows)) == set(rows)

    def test_a_step_s_masks_count_for_it_where_a_round_ends_with_the_step_before(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        costs, [row], now = StepCosts(), repeating(), [1.0]
        monkeypatch.setattr(costs_module.time, "perf_counter", lambda: now[0])
        row.mask = AllowAhead(range(100))
        single = Step([row], [30], [])
        several = Step([row], [30], [], {row: Proposal(31, (2, 3, 4), 3)})
        clock, before_s = StepClock(costs, is_late=True), 0.0
        for _ in range(10):
            for step, forward_s, filled_s in ((single, 1.0, 0.25), (several, 1.5, 2.0)):
                now[0] += max(0.0, before_s) + filled_s  # what is left of the step before, and the masks of this one
                clock.end_round(step, 0.0, filled_s)
                before_s = forward_s - filled_s
        found = costs.seconds
        assert found == {"decode 1, masked": pytest.approx(1.0), "verify 4, masked": pytest.approx(2.0)}

    def test_a_new_request_begins_with_what_others_have_shown(self) -> None:
        speculator, rows = Speculator(), repeating(30)
        measured(speculator.costs, 1.0, 1.5)
        tries = 0
        for row in rows:
            for _ in range(20):
                for proposal in speculator.choose([row]).values():
                    tries += 1
                    speculator.note(row, proposal, proposal.count, 0)
        [last] = repeating()
        assert not speculator.choose([last])
        assert tries < 30 * 3

    def test_it_begins_again_once_it_pays(self) -> None:
        speculator, [row] = Speculator(), repeating()
        measured(speculator.costs, 1.0, 1.3)
        counts = []
        for step in range(1500):
            for proposal in speculator.choose([row]).values():
                counts.append((step, proposal.count))
                speculator.note(row, proposal, proposal.count, proposal.count if step > 500 else 0)
        assert sum(step > 800 for step, _ in counts) > 600

    def test_a_step_has_a_bounded_number_of_tokens(self) -> None:
        speculator = Speculator()
        for count in (1, 20, 100, MOST_STEP_TOKENS - 1, MOST_STEP_TOKENS, 200):
            rows = repeating(count)
            chosen = speculator.choose(rows)
            assert len(rows) + sum(p.count for p in chosen.values()) <= max(MOST_STEP_TOKENS, count)
            assert bool(chosen) == (count < MOST_STEP_TOKENS - 1)

    def test_no_more_is_proposed_than_may_be_written(self) -> None:
        speculator, [row] = Speculator(), repeating()
        row.sampled = 497
        row.written = 526
        row.ids += [2, 3, 4, 5, 1] * 99 + [2]
        [proposal] = speculator.choose([row]).values()
        assert proposal.count == 2
        row.sampled = 499
        assert not speculator.choose([row])

    def test_nothing_is_proposed_where_it_cannot_be_verified(self) -> None:
        speculator = Speculator()
        assert speculator.choose(repeating())
        speculator.no_reason = "layers keep a state"
        assert not speculator.choose(repeating())


class Drafter:
    """A draft model of known speed, which proposes the same token for ever."""

    def __init__(self, token_s: float, unread: int = 1) -> None:
        self.token_s, self.left = token_s, unread
        self.counts: list[int] = []

    def unread(self, row: Sequence) -> int:
        return self.left

    def seconds(self, rows: int, count: int, unread: float) -> float:
        return self.token_s * (count + unread)

    def propose(self, counts: Mapping[Sequence, int]) -> dict[Sequence, tuple[int, ...]]:
        self.counts += counts.values()
        return {row: (7,) * count for row, count in counts.items()}

    def forget(self, row: Sequence) -> None:
        pass


def drafting(drafter: Drafter, *, max_new_tokens: int = 500) -> tuple[Speculator, Sequence]:
    """Make a speculator with a draft model, and a sequence whose text has no repetition."""
    speculator = Speculator()
    speculator.drafters = {"small": drafter}
    measured(speculator.costs, 1.0, 1.3)
    request = Request(
        prompt_ids=tuple(range(30)),
        max_new_tokens=max_new_tokens,
        min_new_tokens=0,
        options=GenerationOptions(speculation="draft", draft="small"),
        sample_index=0,
        seed=0,
        eos_token_ids=(),
    )
    row = Sequence(Completion(request, lambda ids: ""))
    row.ids.append(30)
    row.sampled, row.written, row.decodes, row.slot = 1, 30, True, 0
    return speculator, row


class TestDraftModels:
    def test_right_proposals_of_a_fast_one_go_on(self) -> None:
        speculator, row = drafting(Drafter(0.05))
        for _ in range(30):
            [proposal] = speculator.choose([row]).values()
            assert proposal.tokens == (7,) * proposal.count
            speculator.note(row, proposal, proposal.count, proposal.count)
        assert proposal.count >= 7

    @pytest.mark.parametrize(("token_s", "right"), [(1.1, True), (0.05, False)], ids=["slow", "wrong"])
    def test_what_does_not_pay_is_tried_in_a_small_part_of_the_time(self, token_s: float, right: bool) -> None:
        drafter = Drafter(token_s)
        speculator, row = drafting(drafter)
        costs = speculator.costs
        for _ in range(3000):
            for proposal in speculator.choose([row]).values():
                speculator.note(row, proposal, proposal.count, proposal.count if right else 0)
            costs.total_s += 1.0
            costs.note(1, 1.0, verifies=False)
        assert len(drafter.counts) >= 2
        assert sum(drafter.counts) * token_s < 0.05 * 3000

    def test_a_long_prompt_is_not_read_for_a_short_text(self) -> None:
        for max_new_tokens, is_read in ((8, False), (500, True)):
            drafter = Drafter(0.005, unread=4000)
            speculator, row = drafting(drafter, max_new_tokens=max_new_tokens)
            speculator.costs.total_s = 100.0
            assert bool(speculator.choose([row])) == is_read

    def test_single_steps_come_between_so_that_their_time_stays_known(self) -> None:
        speculator, row = drafting(Drafter(0.05))
        verified = 0
        for _ in range(640):
            chosen = speculator.choose([row])
            verified += bool(chosen)
            speculator.costs.note(4 if chosen else 1, 1.0, verifies=bool(chosen))
            for proposal in chosen.values():
                speculator.note(row, proposal, proposal.count, proposal.count)
        assert 620 <= verified < 640
        unknown, row = drafting(Drafter(0.05))
        unknown.costs = StepCosts()
        assert not unknown.choose([row])

    def test_a_text_waits_for_its_tokens_only_while_a_draft_model_could_propose(self) -> None:
        speculator, row = drafting(Drafter(0.05))
        assert not speculator.awaits(row)
        row.sampled += 1
        assert speculator.awaits(row)
        row.speculation.acceptance["draft"].rest()
        assert not speculator.awaits(row)
        speculator.drafters = {}
        assert not speculator.awaits(row)


def test_uniforms_belong_to_their_tokens() -> None:
    [one], [other] = repeating(), repeating()
    for row in (one, other):
        object.__setattr__(row.request, "options", GenerationOptions(do_sample=True, speculation="ngram"))
    singly = [one.sampling_inputs(i, 1)[0].uniform for i in range(12)]
    at, found = 0, []
    for kept in (1, 4, 2, 5):
        found += [i.uniform for i in other.sampling_inputs(at, 6)[:kept]]
        at += kept
    assert found == singly

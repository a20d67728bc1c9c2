"""Several tokens a step: the text is that of single steps, whatever is proposed and whatever runs beside."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from langchain_quantllm import QuantizedHuggingFaceLLM
from langchain_quantllm.engine.gather_attention import GatherAttention
from langchain_quantllm.errors import GenerationError, InvalidOptionError
from langchain_quantllm.structured import JSONSchema
from langchain_quantllm.structured.compiler import Compiler
from tests.support.adapters import make, make_adapter_folders
from tests.support.engine import ONE_SEQUENCE, AllowOnly, Background, MakeLLM, ask, ids_after, ids_of, plan
from tests.support.families import FAST, WITH_STATES, family_model, likeliest_ids, random_ids
from tests.support.models import forwards, llm_of, slowly, wait_for_rest, wait_until
from tests.support.selection import QUICK_FAMILIES, slow_but
from tests.support.speculation import AllowAhead, OneWay, check_same, proposing, running

pytestmark = pytest.mark.usefixtures("one_thread")

SAMPLED: dict[str, Any] = {"do_sample": True, "temperature": 0.6, "seed": 5}
LATE = pytest.mark.parametrize("is_late", [False, True], ids=["known", "late"])
OPTIONS: dict[str, dict[str, Any]] = {
    "greedy with logprobs": {"logprobs": 3},
    "sampled": SAMPLED,
    "sampled from few": {**SAMPLED, "top_k": 40, "top_p": 0.8},
    "penalized": {**SAMPLED, "repetition_penalty": 1.4},
    "penalized greedy": {"repetition_penalty": 2.0},
    "several samples": {**SAMPLED, "n": 3},
    "no early end": {**SAMPLED, "min_new_tokens": 15, "eos_token_id": tuple(range(0, 49152, 3))},
}


def both(llm: QuantizedHuggingFaceLLM, prompt_ids: list[int], mask: Any = None, **options: Any) -> Any:
    """Plan a request without and with proposals."""
    return [plan(llm, prompt_ids, mask, speculation=value, **options) for value in ("off", "ngram")]


def compared(llm: QuantizedHuggingFaceLLM, prompts: list[list[int]], *, is_late: bool, **options: Any) -> Any:
    requests = [both(llm, prompt, **options) for prompt in prompts]
    plain, speculating = ([one for pair in requests for one in pair[i]] for i in (0, 1))
    return check_same(llm, plain, speculating, is_late=is_late)


@LATE
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_proposals_change_no_token(tiny: QuantizedHuggingFaceLLM, options: dict[str, Any], is_late: bool) -> None:
    prompts = [ids_of(count, seed=count) for count in (9, 16, 40)]
    compared(tiny, prompts, is_late=is_late, max_new_tokens=40, **options)


@LATE
def test_a_text_ends_where_it_does_without(tiny: QuantizedHuggingFaceLLM, is_late: bool) -> None:
    whole = ids_after(tiny, ids_of(9), max_new_tokens=40)
    decode = tiny.pipeline.tokenizer.decode
    for at in (7, 18, 23):
        compared(tiny, [ids_of(9)], is_late=is_late, max_new_tokens=40, eos_token_id=(whole[at],))
        stop = decode(whole[at : at + 2])[1:]
        compared(tiny, [ids_of(9)], is_late=is_late, max_new_tokens=40, stop=(stop,))
    for most in (5, 33):
        [answer] = compared(tiny, [ids_of(9)], is_late=is_late, max_new_tokens=most)
        assert len(answer.token_ids) == most


@LATE
def test_masks_hold_at_each_of_several_tokens(tiny: QuantizedHuggingFaceLLM, is_late: bool) -> None:
    for more in ({}, SAMPLED, {**SAMPLED, "repetition_penalty": 1.5, "temperature": 2.0}):
        for ends in ({}, {"ends_after": 13}, {"frees_after": 11}):
            plain, speculating = both(
                tiny, ids_of(9), lambda ends=ends: AllowAhead(AllowOnly.IDS, **ends), max_new_tokens=30, **more
            )
            [answer] = check_same(tiny, plain, speculating, is_late=is_late)
            assert set(answer.token_ids[:11]) <= set(AllowOnly.IDS)


@LATE
def test_a_mask_that_fails_behind_proposals_fails_its_request_alone(
    tiny: QuantizedHuggingFaceLLM, is_late: bool
) -> None:
    plain = plan(tiny, ids_of(9), lambda: AllowAhead(AllowOnly.IDS), max_new_tokens=30)
    other = plan(tiny, ids_of(12), max_new_tokens=30)
    known, expected = ask(tiny, plain), ask(tiny, other)
    with proposing(tiny, is_late=is_late) as texts:
        texts.add(plain, known)
        failing = {"speculation": "ngram", "max_new_tokens": 30}
        with Background(lambda: ask(tiny, other)) as beside, pytest.raises(GenerationError):
            ask(tiny, plan(tiny, ids_of(9), lambda: AllowAhead(AllowOnly.IDS, fails_at=20), **failing))
    assert beside.result[0].token_ids == expected[0].token_ids


def test_a_mask_that_cannot_be_filled_ahead_gets_no_proposals(tiny: QuantizedHuggingFaceLLM) -> None:
    plain, speculating = both(tiny, ids_of(9), lambda: AllowOnly(AllowOnly.IDS), max_new_tokens=20)
    expected = ask(tiny, plain)
    with proposing(tiny) as texts:
        texts.add(plain, expected)
        [answer] = ask(tiny, speculating)
    assert answer.token_ids == expected[0].token_ids
    assert answer.usage is not None
    assert answer.usage.proposed_tokens == 0


class TestForced:
    """Tokens that a grammar leaves no choice in."""

    @LATE
    def test_one_way_is_written_in_few_steps(self, tiny: QuantizedHuggingFaceLLM, is_late: bool) -> None:
        request = plan(tiny, ids_of(9), lambda: OneWay((7, 8, 9, 31, 49151)), max_new_tokens=40, logprobs=1)
        with running(tiny, is_late=is_late), forwards(tiny) as seen:
            [answer] = ask(tiny, request)
        assert answer.token_ids == [7, 8, 9, 31, 49151] * 8
        assert answer.usage is not None
        assert answer.usage.accepted_tokens >= 30
        assert len(seen.shapes) <= 8
        [plain] = ask(tiny, [replace(request[0], options=replace(request[0].options, speculation="off"))])
        assert plain.usage is not None
        assert plain.usage.proposed_tokens == 0
        assert [p.logprob for p in answer.logprobs] == pytest.approx([p.logprob for p in plain.logprobs], abs=1e-3)

    @LATE
    def test_json_is_what_single_steps_write(self, tiny: QuantizedHuggingFaceLLM, is_late: bool) -> None:
        pytest.importorskip("xgrammar")
        schema = {
            "type": "object",
            "properties": {
                "customer_name": {"enum": ["Maria", "Mary"]},
                "paid_in_advance": {"type": "boolean"},
                "shipping": {"type": "object", "properties": {"postal_code": {"type": "integer"}}},
            },
            "required": ["customer_name", "paid_in_advance", "shipping"],
        }
        tokenizer = tiny.pipeline.tokenizer
        compiler = Compiler(tokenizer, len(tokenizer), [0])
        make_mask = compiler.mask_factory(JSONSchema(json.dumps(schema)), 70)
        accepted = 0
        for seed in range(4):
            options = {"max_new_tokens": 70, "eos_token_id": (0,), "do_sample": True, "seed": seed, "mask": make_mask}
            [expected] = ask(tiny, plan(tiny, ids_of(9), speculation="off", **options))
            json.loads(expected.text)
            with running(tiny, is_late=is_late):
                [found] = ask(tiny, plan(tiny, ids_of(9), **options))
            assert (found.token_ids, found.text) == (expected.token_ids, expected.text)
            assert found.usage is not None
            accepted += found.usage.accepted_tokens
        assert accepted > 0


class TestBesideOthers:
    @LATE
    def test_requests_with_and_without_proposals_run_together(
        self, tiny: QuantizedHuggingFaceLLM, is_late: bool
    ) -> None:
        plain, speculating = both(tiny, ids_of(9), max_new_tokens=40)
        others = [plan(tiny, ids_of(20 + i), max_new_tokens=10 + 7 * i, speculation="off")[0] for i in range(3)]
        answers = check_same(tiny, [*plain, *others], [*speculating, *others], is_late=is_late)
        assert [a.usage.proposed_tokens > 0 for a in answers if a.usage] == [True, False, False, False]

    @LATE
    def test_prompts_that_arrive_meanwhile(self, tiny: QuantizedHuggingFaceLLM, is_late: bool) -> None:
        plain, speculating = both(tiny, ids_of(9), max_new_tokens=60)
        late = plan(tiny, ids_of(50, seed=2), max_new_tokens=20)
        expected, [beside] = ask(tiny, plain), ask(tiny, late)
        with proposing(tiny, is_late=is_late) as texts:
            texts.add(plain, expected)
            with forwards(tiny, slowly(0.002)) as seen, Background(lambda: ask(tiny, speculating)) as other:
                seen.wait_for(4)
                assert ask(tiny, late)[0].token_ids == beside.token_ids
        assert other.result[0].token_ids == expected[0].token_ids

    @LATE
    def test_preempted_requests_go_on_with_their_tokens(self, make_tiny: MakeLLM, is_late: bool) -> None:
        llm = make_tiny(kv_cache_memory=2 * ONE_SEQUENCE)
        prompts = [ids_of(15, seed=i) for i in range(5)]
        compared(llm, prompts, is_late=is_late, max_new_tokens=60, **SAMPLED)
        engine: Any = llm._engine()
        assert engine._scheduler.preempted > 0
        wait_for_rest()
        assert engine._blocks.held == 0

    @LATE
    def test_later_prompts_share_only_true_tokens(self, make_tiny: MakeLLM, is_late: bool) -> None:
        llm = make_tiny()
        [answer] = compared(llm, [ids_of(21)], is_late=is_late, max_new_tokens=60)
        longer = [*ids_of(21), *answer.token_ids, *ids_of(5, seed=1)]
        [found] = ask(llm, plan(llm, longer, max_new_tokens=10))
        assert found.usage is not None
        assert found.usage.cached_tokens == 80
        assert found.token_ids == likeliest_ids(llm.pipeline.model, longer, found.token_ids)

    @LATE
    def test_a_cancelled_request_leaves_nothing(self, tiny: QuantizedHuggingFaceLLM, is_late: bool) -> None:
        plain, speculating = both(tiny, ids_of(9), max_new_tokens=100)
        expected = ask(tiny, plain)
        with proposing(tiny, is_late=is_late) as texts:
            texts.add(plain, expected)
            with tiny._engine().submit(speculating) as stream:
                next(iter(stream))
            wait_until(lambda: tiny._engine()._blocks.held == 0)
            assert ask(tiny, speculating)[0].token_ids == expected[0].token_ids

    @LATE
    def test_each_request_runs_with_its_adapter(self, tmp_path: Path, is_late: bool) -> None:
        pytest.importorskip("peft")
        llm = make(make_adapter_folders(tmp_path))
        prompts = [ids_of(9) if llm.pipeline.tokenizer.vocab_size > 40000 else random_ids(9)]
        for name in ("sql", "chat", "base"):
            compared(llm, prompts, is_late=is_late, max_new_tokens=30, adapter=name)
        llm.unload()


@pytest.fixture(scope="module", params=slow_but(QUICK_FAMILIES, [n for n in FAST if n not in WITH_STATES]))
def of_family(request: pytest.FixtureRequest, tokenizer: Any) -> Iterator[QuantizedHuggingFaceLLM]:
    llm = llm_of(family_model(FAST[request.param]), tokenizer)
    yield llm
    llm.unload()


@LATE
def test_every_family_writes_what_it_writes_without(of_family: QuantizedHuggingFaceLLM, is_late: bool) -> None:
    prompts = [random_ids(count) for count in (12, 200)]
    # Greedy: a draw that lies at the border of two tokens to the last digit may fall on either side in another batch.
    compared(of_family, prompts, is_late=is_late, max_new_tokens=40)


def test_the_tokens_of_a_long_text_read_its_blocks_once(
    tiny: QuantizedHuggingFaceLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    attend, decode = GatherAttention.attend, GatherAttention.decode

    def count(self: GatherAttention, pool: Any, query: Any, batch: Any, **scoring: Any) -> Any:
        seen.append(len(batch.spans))
        return attend(self, pool, query, batch, **scoring)

    def count_rows(self: GatherAttention, pool: Any, states: Any, batch: Any, **scoring: Any) -> Any:
        seen.append(len(states[0]))
        return decode(self, pool, states, batch, **scoring)

    monkeypatch.setattr(GatherAttention, "attend", count)
    monkeypatch.setattr(GatherAttention, "decode", count_rows)
    for tokens, is_together in ((20, False), (220, True)):
        seen.clear()
        compared(tiny, [ids_of(tokens)], is_late=False, max_new_tokens=24, logprobs=1)
        assert (max(seen) == 1) == is_together


def test_a_model_with_states_says_why_it_gets_no_proposals(tokenizer: Any) -> None:
    llm = llm_of(family_model(FAST["qwen3_next"]), tokenizer)
    assert "state" in (llm.engine_info.no_speculation_reason or "")
    plain, speculating = both(llm, random_ids(8) * 4, max_new_tokens=20)
    assert ask(llm, plain)[0].token_ids == ask(llm, speculating)[0].token_ids
    assert llm.engine_info.proposed_tokens == 0
    llm.unload()


def test_log_probabilities_are_the_same_bit_for_bit_where_no_batch_changes_them(make_tiny: MakeLLM) -> None:
    llm = make_tiny(batch_invariant=True)
    plain, speculating = both(llm, ids_of(9), max_new_tokens=30, logprobs=2)
    expected = ask(llm, plain)
    with proposing(llm) as texts:
        texts.add(plain, expected)
        [found] = ask(llm, speculating)
    assert found.usage is not None
    assert found.usage.accepted_tokens > 0
    assert [(p.logprob, p.top) for p in found.logprobs] == [(p.logprob, p.top) for p in expected[0].logprobs]


class TestByItself:
    """`speculation="ngram"` as users have it."""

    def test_a_text_that_repeats_itself_takes_fewer_steps(self, tiny: QuantizedHuggingFaceLLM) -> None:
        def mask() -> AllowAhead:
            return AllowAhead((7, 8))

        options: dict[str, Any] = {"max_new_tokens": 100, "mask": mask}
        [expected] = ask(tiny, plan(tiny, ids_of(9), speculation="off", **options))
        with running(tiny), forwards(tiny) as seen:
            [found] = ask(tiny, plan(tiny, ids_of(9), speculation="ngram", **options))
        assert found.token_ids == expected.token_ids
        assert found.usage is not None
        assert 0 < found.usage.accepted_tokens <= found.usage.proposed_tokens
        assert len(seen.shapes) == 100 - found.usage.accepted_tokens

    def test_a_text_that_an_ended_request_had_takes_fewer_steps(self, make_tiny: MakeLLM) -> None:
        llm = make_tiny()
        options: dict[str, Any] = {"speculation": "ngram", "max_new_tokens": 40}
        again = {**options, "cache_salt": "of another tenant"}
        with running(llm):
            [first] = ask(llm, plan(llm, ids_of(9), **options))
            [other] = ask(llm, plan(llm, ids_of(9), **again))
            apart = replace(plan(llm, ids_of(9), **options)[0], shares_prefix=False)
            [alone] = ask(llm, [apart])
            [found] = ask(llm, plan(llm, ids_of(9), **options))
        answers = (first, other, alone, found)
        assert len({tuple(answer.token_ids) for answer in answers}) == 1
        counts = [answer.usage.accepted_tokens for answer in answers if answer.usage is not None]
        assert max(counts[:3]) < 10
        assert counts[3] >= 30

    def test_the_usage_and_the_engine_count_proposals(self, tiny: QuantizedHuggingFaceLLM) -> None:
        before = tiny.engine_info
        [answer] = ask(tiny, plan(tiny, ids_of(9), lambda: OneWay((7, 8)), max_new_tokens=30))
        assert answer.usage is not None
        info = tiny.engine_info
        assert info.no_speculation_reason is None
        assert info.proposed_tokens - before.proposed_tokens == answer.usage.proposed_tokens > 0
        assert info.accepted_tokens - before.accepted_tokens == answer.usage.accepted_tokens > 0

    def test_it_is_a_field_and_an_option_of_calls(self, tiny: QuantizedHuggingFaceLLM) -> None:
        llm = QuantizedHuggingFaceLLM(pipeline=tiny.pipeline, speculation="ngram", max_new_tokens=60)
        prompt = "one two three four, one two three four, one two"
        plain = llm.generate([prompt], speculation="off").generations[0][0]
        found = llm.generate([prompt], repetition_penalty=None).generations[0][0]
        assert found.text == plain.text
        assert "output_token_details" not in plain.generation_info["usage_metadata"]
        with pytest.raises(InvalidOptionError, match="speculation='eagle'"):
            llm.invoke(prompt, speculation="eagle")

"""A draft model's proposals: the text is that of single steps, whatever it proposes and whatever runs beside."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from langchain_quantllm import QuantizedHuggingFaceLLM
from langchain_quantllm.engine.request import Request
from langchain_quantllm.engine.selection import Engines
from langchain_quantllm.engine.speculation.ngrams import NGramIndex, PastTexts
from langchain_quantllm.errors import GenerationError, InvalidOptionError
from langchain_quantllm.structured import JSONSchema
from langchain_quantllm.structured.compiler import Compiler
from tests.support.adapters import make, make_adapter_folders
from tests.support.engine import ONE_SEQUENCE, AllowOnly, Answer, Background, MakeLLM, ask, ids_after, ids_of, plan
from tests.support.families import FAST, WITH_STATES, family_model, random_ids
from tests.support.models import forwards, llm_of, tiny_model, wait_for_rest, wait_until
from tests.support.selection import QUICK_FAMILIES, slow_but
from tests.support.speculation import AllowAhead, check_equal, noisy_copy, running, with_draft

pytestmark = pytest.mark.usefixtures("one_thread")

# Few tokens are likely: of thousands, a draw lies at the border of two now and then, to the last digit of the logits,
# and those depend on the batch.
SAMPLED: dict[str, Any] = {"do_sample": True, "temperature": 0.15, "seed": 5}
LATE = pytest.mark.parametrize("is_late", [False, True], ids=["known", "late"])
SLOW_LATE = pytest.mark.parametrize(
    "is_late", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["known", "late"]
)
OPTIONS: dict[str, dict[str, Any]] = {
    "greedy with logprobs": {"logprobs": 3},
    "sampled from few and penalized": {**SAMPLED, "top_k": 40, "repetition_penalty": 1.4},
    "several samples": {**SAMPLED, "n": 2},
    "no early end": {**SAMPLED, "min_new_tokens": 15, "eos_token_id": tuple(range(0, 49152, 3))},
}


@pytest.fixture(scope="module", autouse=True)
def _from_no_text() -> Iterator[None]:
    """Guess nothing from texts, so that proposals are those of draft models."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NGramIndex, "find", lambda self: None)
        patch.setattr(PastTexts, "find", lambda self, ids, most: None)
        yield


@pytest.fixture(scope="module")
def drafting(tiny: QuantizedHuggingFaceLLM) -> Iterator[QuantizedHuggingFaceLLM]:
    """An LLM over the model of `tiny` whose draft model is often right."""
    llm = with_draft(tiny)
    assert llm.engine_info.no_draft_reason is None
    yield llm
    llm.draft_model.unload()


def drafts_of(llm: QuantizedHuggingFaceLLM) -> Any:
    """Return the draft model of an LLM as its engine has it."""
    options = llm._options(None, {})
    return llm._engine(options)._drafts[options.draft]


def both(llm: QuantizedHuggingFaceLLM, prompt_ids: list[int], mask: Any = None, **options: Any) -> Any:
    """Plan a request without proposals and with those of the draft model."""
    draft = llm._options(None, {}).draft
    assert draft is not None
    return [
        plan(llm, prompt_ids, mask, speculation=value, draft=key, **options)
        for value, key in (("off", None), ("draft", draft))
    ]


def accepted(answers: Sequence[Answer]) -> int:
    return sum(answer.usage.accepted_tokens for answer in answers if answer.usage is not None)


def compare(
    llm: QuantizedHuggingFaceLLM, pairs: Sequence[Any], *, is_late: bool = False
) -> tuple[list[Answer], list[Request]]:
    """Check that requests give the same answers with a draft model; returns those with it, and their requests."""
    plain, speculating = ([request for pair in pairs for request in pair[i]] for i in (0, 1))
    expected = ask(llm, plain)
    with running(llm, is_late=is_late):
        answers = ask(llm, speculating)
    check_equal(answers, expected)
    return answers, speculating


@LATE
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_draft_model_changes_no_token(
    drafting: QuantizedHuggingFaceLLM, options: dict[str, Any], is_late: bool
) -> None:
    pairs = [both(drafting, ids_of(count, seed=count), max_new_tokens=24, **options) for count in (9, 40)]
    answers, _ = compare(drafting, pairs, is_late=is_late)
    assert accepted(answers) > 0


def test_the_model_as_its_own_draft_model_is_always_right(make_tiny: MakeLLM) -> None:
    own = make_tiny()
    llm = with_draft(own, own.pipeline.model)
    for options in ({}, {**SAMPLED, "repetition_penalty": 1.4}):
        [answer], _ = compare(llm, [both(llm, ids_of(31), max_new_tokens=30, **options)])
        assert answer.usage is not None
        # A draw at the border of two tokens may fall on either side in another batch.
        assert answer.usage.accepted_tokens >= 0.9 * answer.usage.proposed_tokens > 15


@SLOW_LATE
def test_a_text_ends_in_the_middle_of_right_proposals(tiny: QuantizedHuggingFaceLLM, is_late: bool) -> None:
    llm = with_draft(tiny, tiny.pipeline.model)
    whole = ids_after(tiny, ids_of(9), max_new_tokens=24)
    stop = tiny.pipeline.tokenizer.decode(whole[18:20])[1:]
    options: list[dict[str, Any]] = [{"eos_token_id": (whole[at],)} for at in (7, 15)]
    pairs = [both(llm, ids_of(9), max_new_tokens=24, **more) for more in (*options, {"stop": (stop,)})]
    compare(llm, pairs, is_late=is_late)
    for most in (1, 2, 17):
        [answer], _ = compare(llm, [both(llm, ids_of(9), max_new_tokens=most)], is_late=is_late)
        assert len(answer.token_ids) == most


class TestMasks:
    @LATE
    def test_a_mask_holds_for_proposals_too(self, drafting: QuantizedHuggingFaceLLM, is_late: bool) -> None:
        pairs = [
            both(drafting, ids_of(9), lambda ends=ends: AllowAhead(AllowOnly.IDS, **ends), max_new_tokens=20, **more)
            for more in ({}, {**SAMPLED, "temperature": 2.0})
            for ends in ({}, {"ends_after": 13}, {"frees_after": 11})
        ]
        answers, _ = compare(drafting, pairs, is_late=is_late)
        assert all(set(answer.token_ids[:11]) <= set(AllowOnly.IDS) for answer in answers)
        assert accepted(answers) > 0

    def test_json_is_what_single_steps_write(self, drafting: QuantizedHuggingFaceLLM) -> None:
        pytest.importorskip("xgrammar")
        schema = {
            "type": "object",
            "properties": {"name": {"type": "string", "maxLength": 12}, "count": {"type": "integer"}},
            "required": ["name", "count"],
        }
        tokenizer = drafting.pipeline.tokenizer
        make_mask = Compiler(tokenizer, len(tokenizer), [0]).mask_factory(JSONSchema(json.dumps(schema)), 60)
        found = 0
        for seed in range(2):
            options = {"max_new_tokens": 60, "eos_token_id": (0,), "do_sample": True, "seed": seed}
            [answer], _ = compare(drafting, [both(drafting, ids_of(9), make_mask, **options)])
            json.loads(answer.text)
            found += accepted([answer])
        assert found > 0

    def test_a_mask_without_a_copy_ends_no_draft_model(self, drafting: QuantizedHuggingFaceLLM) -> None:
        class Single(AllowAhead):
            def fork(self) -> Any:
                msg = "no copy"
                raise RuntimeError(msg)

        single = both(drafting, ids_of(9), lambda: Single(AllowOnly.IDS), max_new_tokens=20)
        answers, _ = compare(drafting, [single, both(drafting, ids_of(9), max_new_tokens=20)])
        assert drafts_of(drafting).failure is None
        assert accepted(answers[:1]) == 0 < accepted(answers[1:])


class TestBesideOthers:
    @SLOW_LATE
    def test_requests_of_every_kind_run_together(self, drafting: QuantizedHuggingFaceLLM, is_late: bool) -> None:
        pairs = [both(drafting, ids_of(9 + i), max_new_tokens=20 + 5 * i, **SAMPLED) for i in range(2)]
        others = [plan(drafting, ids_of(20 + i), max_new_tokens=20, speculation="ngram") for i in range(2)]
        answers, _ = compare(drafting, [*pairs, *([one, one] for one in others)], is_late=is_late)
        assert accepted(answers[:2]) > 0

    @SLOW_LATE
    def test_preempted_requests_go_on_with_their_tokens(self, make_tiny: MakeLLM, is_late: bool) -> None:
        llm = with_draft(make_tiny(), kv_cache_memory=2 * ONE_SEQUENCE)
        pairs = [both(llm, ids_of(15, seed=i), max_new_tokens=60) for i in range(4)]
        answers, _ = compare(llm, pairs, is_late=is_late)
        assert accepted(answers) > 0
        engine: Any = llm._engine()
        assert engine._scheduler.preempted > 0
        wait_for_rest()
        assert engine._blocks.held == drafts_of(llm).held_blocks == 0

    def test_texts_that_find_no_room_in_its_cache_go_on_without(self, drafting: QuantizedHuggingFaceLLM) -> None:
        draft = drafts_of(drafting)
        wait_for_rest()
        taken = [draft._blocks.take() for _ in range(draft._blocks.available - 3)]
        try:
            pairs = [both(drafting, ids_of(20, seed=i), max_new_tokens=40) for i in range(3)]
            compare(drafting, pairs)
        finally:
            draft._blocks.release([block for block in taken if block is not None])
        assert draft.failure is None

    @LATE
    def test_a_cancelled_request_leaves_nothing(self, drafting: QuantizedHuggingFaceLLM, is_late: bool) -> None:
        _, speculating = both(drafting, ids_of(9), max_new_tokens=200)
        engine: Any = drafting._engine()
        with running(drafting, is_late=is_late):
            with engine.submit(speculating) as stream:
                next(iter(stream))
            wait_until(lambda: engine._blocks.held == 0)
        wait_until(lambda: drafts_of(drafting).held_blocks == 0)

    def test_two_threads_and_the_draft_models_own_calls(self, drafting: QuantizedHuggingFaceLLM) -> None:
        pairs = [both(drafting, ids_of(12, seed=i), max_new_tokens=20, **SAMPLED) for i in range(2)]
        own = plan(drafting.draft_model, ids_of(12), max_new_tokens=30)
        expected, [alone] = [ask(drafting, pair[0]) for pair in pairs], ask(drafting.draft_model, own)
        with (
            running(drafting),
            Background(lambda: ask(drafting, pairs[0][1])) as first,
            Background(lambda: ask(drafting.draft_model, own)) as second,
        ):
            check_equal(ask(drafting, pairs[1][1]), expected[1])
        check_equal(first.result, expected[0])
        assert second.result[0].token_ids == alone.token_ids

    def test_prompts_that_begin_alike_are_read_once(self, drafting: QuantizedHuggingFaceLLM) -> None:
        prompt = ids_of(100, seed=8)
        draft_llm: Any = drafting.draft_model
        with running(drafting), forwards(draft_llm) as seen:
            ask(drafting, both(drafting, prompt, max_new_tokens=8)[1])
            read = max(tokens for _, tokens in seen.shapes)
            seen.shapes.clear()
            ask(drafting, both(drafting, [*prompt, 5], max_new_tokens=8)[1])
        assert read >= 100
        assert max(tokens for _, tokens in seen.shapes) <= 16 + 2

    def test_a_prompt_longer_than_a_round_is_read_in_several(self, drafting: QuantizedHuggingFaceLLM) -> None:
        pairs = [both(drafting, ids_of(300), max_new_tokens=30), both(drafting, ids_of(7), max_new_tokens=30)]
        draft_llm: Any = drafting.draft_model
        with forwards(draft_llm) as seen:
            answers, _ = compare(drafting, pairs)
        assert accepted(answers) > 0
        assert max(tokens for _, tokens in seen.shapes) <= 128

    @SLOW_LATE
    def test_each_request_runs_with_its_adapter(self, tmp_path: Path, is_late: bool) -> None:
        pytest.importorskip("peft")
        base = make(make_adapter_folders(tmp_path))
        llm = base.model_copy(update={"draft_model": base.model_id})
        pairs = [both(llm, random_ids(9), max_new_tokens=20, adapter=name) for name in ("sql", "base")]
        answers, _ = compare(llm, pairs, is_late=is_late)
        assert accepted(answers[1:]) > 0
        llm.unload()


@pytest.fixture(scope="module", params=slow_but(QUICK_FAMILIES, [n for n in FAST if n not in WITH_STATES]))
def of_family(request: pytest.FixtureRequest, tokenizer: Any) -> Iterator[QuantizedHuggingFaceLLM]:
    llm = llm_of(family_model(FAST[request.param]), tokenizer)
    yield llm
    llm.unload()


def test_every_family_drafts_and_writes_what_it_writes_without(of_family: QuantizedHuggingFaceLLM) -> None:
    # Unscaled attention (GPT-Neo's) turns with little noise.
    llm = with_draft(of_family, noisy_copy(of_family.pipeline.model, share=0.01))
    info = llm.engine_info
    assert info.draft_models or info.no_draft_reason
    answers, _ = compare(llm, [both(llm, random_ids(count), max_new_tokens=20) for count in (12, 41)])
    assert accepted(answers) > 0 or not info.draft_models
    llm.draft_model.unload()


class TestThatCannotPropose:
    def test_a_draft_model_with_states_says_so_and_texts_go_on(self, tiny: QuantizedHuggingFaceLLM) -> None:
        llm = with_draft(tiny, family_model(FAST["qwen3_next"]))
        assert "state" in (llm.engine_info.no_draft_reason or "")
        answers, _ = compare(llm, [both(llm, ids_of(9), max_new_tokens=20)])
        assert accepted(answers) == 0

    def test_one_that_fails_is_left_out_from_then_on(
        self, make_tiny: MakeLLM, caplog: pytest.LogCaptureFixture
    ) -> None:
        llm = with_draft(make_tiny())
        pair = both(llm, ids_of(9), max_new_tokens=40)
        [expected] = ask(llm, pair[0])
        with running(llm), torch.no_grad():
            handle = llm.draft_model.pipeline.model.register_forward_pre_hook(_fail)
            [found] = ask(llm, pair[1])
            handle.remove()
        assert found.token_ids == expected.token_ids
        assert "the draft is broken" in (llm.engine_info.no_draft_reason or "")
        assert "proposes no more" in caplog.text

    def test_one_of_another_model_is_only_less_often_right(self, tiny: QuantizedHuggingFaceLLM) -> None:
        other = tiny_model(len(tiny.pipeline.tokenizer), "qwen2", seed=9, context_tokens=128)
        llm = with_draft(tiny, other)
        compare(llm, [both(llm, ids_of(9), max_new_tokens=40), both(llm, ids_of(90), max_new_tokens=40)])

    def test_one_of_fewer_and_of_more_token_ids(self, tokenizer: Any) -> None:
        wide, narrow = (llm_of(tiny_model(len(tokenizer) + more, seed=3), tokenizer) for more in (128, 0))
        for target, draft in ((wide, narrow), (narrow, wide)):
            llm = with_draft(target, draft)
            prompts = [ids_of(9), [*ids_of(9), target._engine().limits.vocab_size - 1]]
            compare(llm, [both(llm, prompt, max_new_tokens=30, **SAMPLED) for prompt in prompts])
        for llm in (wide, narrow):
            llm.unload()


class TestUnloading:
    def test_an_unloaded_draft_model_comes_back_at_the_next_call(self, make_tiny: MakeLLM) -> None:
        llm = with_draft(make_tiny())
        pair = both(llm, ids_of(9), max_new_tokens=30)
        [expected] = ask(llm, pair[0])
        first = drafts_of(llm)
        llm.draft_model.unload()
        assert first.is_closed
        with running(llm):
            [found] = ask(llm, pair[1])
        check_equal([found], [expected])
        assert drafts_of(llm) is not first

    def test_a_call_on_its_way_says_that_the_model_was_unloaded(self, make_tiny: MakeLLM) -> None:
        llm = with_draft(make_tiny())
        engine: Any = llm._engine()
        engines = Engines(llm.draft_model.pipeline)
        made: list[Any] = []

        def make(most_tokens: int, vocab_size: int) -> Any:
            made.append(engines.make_draft("draft", most_tokens, vocab_size, fuse=False, source=None))
            engine.close()  # while it is made
            return made[-1]

        for _ in range(2):
            with pytest.raises(GenerationError, match="was unloaded"):
                engine.add_draft("draft", make)
        assert [draft.is_closed for draft in made] == [True]
        engines.close()
        with pytest.raises(GenerationError, match="was unloaded"):
            make(64, 64)
        llm.unload()

    def test_unloading_the_model_ends_its_draft_model(self, make_tiny: MakeLLM) -> None:
        llm = with_draft(make_tiny())
        draft = drafts_of(llm)
        llm.unload()
        assert draft.is_closed


def test_a_request_turns_it_off(drafting: QuantizedHuggingFaceLLM) -> None:
    assert drafting._options(None, {}).speculation == "draft"
    for value in ("off", "ngram", "forced"):
        options = drafting._options(None, {"speculation": value})
        assert (options.speculation, options.draft) == (value, None)
    with running(drafting):
        text = drafting.invoke("The sea", max_new_tokens=20)
        with forwards(drafting.draft_model) as seen:
            assert drafting.invoke("The sea", max_new_tokens=20, speculation="off") == text
            assert drafting.bind(speculation="off").invoke("The sea", max_new_tokens=20) == text
        assert not seen.shapes


@pytest.mark.parametrize("fields", [{"draft_model": 5}, {"engine": "pipeline"}])
def test_a_field_that_is_set_to_what_cannot_be_is_told_by_the_next_call(
    drafting: QuantizedHuggingFaceLLM, fields: dict[str, Any]
) -> None:
    llm = drafting.model_copy(update=fields)
    with pytest.raises(InvalidOptionError, match="draft_model="):
        llm.invoke("The sea")


def test_it_needs_a_draft_model(tiny: QuantizedHuggingFaceLLM) -> None:
    with pytest.raises(InvalidOptionError, match="needs draft_model="):
        tiny.invoke("The sea", speculation="draft")


def _fail(*_: Any) -> None:
    msg = "the draft is broken"
    raise RuntimeError(msg)

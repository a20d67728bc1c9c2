"""The fast engine over every family of models: the same tokens as `generate`, or refused with a reason."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from langchain_quantllm import QuantizedHuggingFaceLLM
from langchain_quantllm.engine.request import plan_requests
from langchain_quantllm.errors import UnsupportedError
from langchain_quantllm.options import GenerationOptions
from tests.support.engine import Answer
from tests.support.families import (
    FAST,
    NAMED,
    PLAIN,
    WITH_STATES,
    family_model,
    generated_ids,
    likeliest_ids,
    random_ids,
)
from tests.support.models import forwards, llm_of, slowly
from tests.support.selection import QUICK_FAMILIES, slow_but
from tests.support.state_families import SINGLE_TOKENS

pytestmark = pytest.mark.usefixtures("one_thread")

SHARED = random_ids(40, seed=7)


@dataclass(frozen=True)
class Visit:
    """A caller of a running batch: joins after so many forwards, and leaves after so many tokens."""

    prompt_ids: Sequence[int]
    new_tokens: int
    after: int = 0


# Blocks have 16 tokens: prompts and texts end before, on and behind their borders.
VISITS = [
    Visit(random_ids(17), 60),
    Visit(random_ids(40), 24),
    Visit(random_ids(1), 33, after=3),
    Visit(random_ids(15), 1, after=5),
    Visit(random_ids(16), 17, after=8),
    Visit(SHARED, 16, after=12),
    Visit([*SHARED[:33], *random_ids(7, seed=1)], 12, after=20),
    Visit([*SHARED[:20], *random_ids(5, seed=2)], 2, after=22),
    Visit([*SHARED[:33], *random_ids(14, seed=3)], 9, after=26),
]


@dataclass(frozen=True)
class Case:
    """A model of a family, and an LLM over it."""

    name: str
    model: Any
    llm: QuantizedHuggingFaceLLM


@pytest.fixture(scope="module", params=slow_but(QUICK_FAMILIES, FAST, pytest.mark.compat))
def case(request: pytest.FixtureRequest, tokenizer: Any) -> Iterator[Case]:
    model = family_model(FAST[request.param])
    llm = llm_of(model, tokenizer)
    yield Case(request.param, model, llm)
    llm.unload()


@pytest.fixture(scope="module", params=slow_but(QUICK_FAMILIES, PLAIN, pytest.mark.compat))
def refused(request: pytest.FixtureRequest, tokenizer: Any) -> Iterator[Case]:
    model = family_model(PLAIN[request.param][0])
    llm = llm_of(model, tokenizer)
    yield Case(request.param, model, llm)
    llm.unload()


def complete(
    llm: QuantizedHuggingFaceLLM,
    prompt_ids: Sequence[int],
    new_tokens: int,
    answer: Answer | None = None,
    submitted: threading.Event | None = None,
) -> Answer:
    """Complete token ids; the tokenizer's own are none of these models'."""
    answer = answer or Answer()
    options = GenerationOptions(max_new_tokens=new_tokens, eos_token_id=())
    engine = llm._engine(options)
    requests = plan_requests(prompt_ids, options, engine.limits, shares_prefix=llm.prefix_caching)
    with engine.submit(requests) as stream:
        if submitted is not None:
            submitted.set()
        for chunk in stream:
            answer.token_ids += chunk.token_ids
            answer.usage = chunk.usage
    return answer


def run_visits(llm: QuantizedHuggingFaceLLM, visits: Sequence[Visit]) -> tuple[list[Answer], int]:
    """Run visits, each in a thread of its own but one after the other; gives the answers and the number of forwards."""
    answers = [Answer() for _ in visits]
    submitted = [threading.Event() for _ in visits]
    # Slowed down a little, so that the threads get their turns in time.
    with forwards(llm, slowly(0.001)) as seen:

        def call(i: int) -> None:
            visit, answer = visits[i], answers[i]
            try:
                assert i == 0 or submitted[i - 1].wait(60)
                seen.wait_for(visit.after)
                complete(llm, visit.prompt_ids, visit.new_tokens, answer, submitted[i])
            except BaseException as error:
                answer.error = error

        threads = [threading.Thread(target=call, args=(i,)) for i in range(len(visits))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        return answers, seen.count


def check_visits(case: Case, *, prefix_caching: bool) -> None:
    """Run the visits over a model; each gets the tokens that it gets alone, and what is shared is counted."""
    llm = QuantizedHuggingFaceLLM(pipeline=case.llm.pipeline, prefix_caching=prefix_caching)
    assert llm.engine_info.name == "fast", llm.engine_info.reason
    answers, count = run_visits(llm, VISITS)
    for visit, answer in zip(VISITS, answers, strict=True):
        assert answer.error is None
        assert len(answer.token_ids) == visit.new_tokens
        assert answer.token_ids == likeliest_ids(case.model, visit.prompt_ids, answer.token_ids)
    assert count < 0.75 * sum(visit.new_tokens for visit in VISITS)  # else they ran one after another
    cached = [answer.usage.cached_tokens if answer.usage else None for answer in answers]
    # The full blocks of the shared 20 and 33 tokens; states are kept at the end of the longer ones only, if at all.
    of_short = 0 if case.name in WITH_STATES else 16
    shares = prefix_caching and case.name not in SINGLE_TOKENS
    assert cached == ([0, 0, 0, 0, 0, 0, 32, of_short, 32] if shares else [0] * len(VISITS))


class TestFast:
    def test_is_fast_and_writes_what_generate_writes(self, case: Case) -> None:
        info = case.llm.engine_info
        assert (info.name, info.graphs) == ("fast", False), info.reason
        prompt_ids = random_ids(23)
        expected = generated_ids(case.model, prompt_ids, 64)
        assert likeliest_ids(case.model, prompt_ids, expected) == expected  # else the other test asks for too little
        assert len(set(expected)) > 4  # a text that stands still would hide much
        assert complete(case.llm, prompt_ids, 64).token_ids == expected

    def test_sequences_that_join_and_leave_get_their_tokens(self, case: Case) -> None:
        check_visits(case, prefix_caching=True)

    @pytest.mark.compat
    @pytest.mark.parametrize("case", [name for name in QUICK_FAMILIES if name in FAST], indirect=True)
    def test_they_get_them_without_prefix_caching_too(self, case: Case) -> None:
        """No block is found again then, whatever the family: a few stand for all."""
        check_visits(case, prefix_caching=False)


@pytest.mark.parametrize("name", NAMED)
def test_common_families_are_fast(name: str) -> None:
    assert name in FAST


class TestRefused:
    def test_auto_gives_the_reason_and_the_text_of_generate(self, refused: Case) -> None:
        info = refused.llm.engine_info
        assert info.name == "pipeline"
        reason = info.reason.removeprefix("the fast engine cannot drive this model: ")
        assert reason != info.reason
        assert PLAIN[refused.name][1] in reason
        for count in (5, 23):  # a RecurrentGemma given one token goes on with the state of the text before
            expected = generated_ids(refused.model, random_ids(count), 40)
            assert complete(refused.llm, random_ids(count), 40).token_ids == expected

    def test_fast_is_an_error_before_anything_is_generated(self, refused: Case) -> None:
        reason = refused.llm.engine_info.reason
        llm = QuantizedHuggingFaceLLM(pipeline=refused.llm.pipeline, engine="fast")
        with forwards(llm) as seen:
            with pytest.raises(UnsupportedError) as caught:
                llm.invoke("a")
            with pytest.raises(UnsupportedError):
                _ = llm.engine_info
        assert seen.count == 0
        assert reason in str(caught.value)
        assert "engine='auto'" in str(caught.value)

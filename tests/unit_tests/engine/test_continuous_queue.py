"""The fast engine's queue: priorities, limits of one object, a bound of waiting requests, and text that is not read."""

from __future__ import annotations

from typing import Any

import pytest

from langchain_quantllm import QuantizedHuggingFaceLLM
from langchain_quantllm.engine import stream as stream_module
from langchain_quantllm.errors import GenerationError, InvalidOptionError, QueueFullError
from tests.support.engine import ONE_SEQUENCE, Background, MakeLLM, ask, ids_after, ids_of, plan
from tests.support.models import forwards, slowly, wait_for_rest, wait_until

pytestmark = pytest.mark.usefixtures("one_thread")

UNREAD = 8


@pytest.fixture
def few_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a stream be full with eight chunks."""
    monkeypatch.setattr(stream_module, "MOST_UNREAD", UNREAD)


def read_ids(stream: Any) -> list[int]:
    return [token_id for chunk in stream for token_id in chunk.token_ids]


def waiting_requests(llm: QuantizedHuggingFaceLLM) -> int:
    engine: Any = llm._engine()
    return int(engine._scheduler.waiting_count if llm.engine_info.name == "fast" else engine._worker.queued)


def computed(stream: Any) -> int:
    return len(stream._items)


@pytest.mark.usefixtures("few_unread")
class TestUnreadStreams:
    def test_a_stream_that_is_not_read_is_computed_up_to_the_bound(self, tiny: QuantizedHuggingFaceLLM) -> None:
        engine: Any = tiny._engine()
        expected = ids_after(tiny, ids_of(20), max_new_tokens=60)
        stream = engine.submit(plan(tiny, ids_of(20), max_new_tokens=60))
        wait_until(lambda: stream.is_full)
        assert len(ids_after(tiny, ids_of(9), max_new_tokens=40)) == 40  # others run
        assert UNREAD <= computed(stream) <= UNREAD + 1
        assert read_ids(stream) == expected
        wait_until(lambda: engine._blocks.held == 0)

    def test_its_blocks_go_to_those_that_need_them(self, make_tiny: MakeLLM) -> None:
        llm = make_tiny(kv_cache_memory=ONE_SEQUENCE, prefix_caching=False)
        engine: Any = llm._engine()
        expected = [ids_after(llm, ids_of(count), max_new_tokens=40) for count in (20, 30)]
        stream = engine.submit(plan(llm, ids_of(20), max_new_tokens=40))
        wait_until(lambda: stream.is_full)
        assert ids_after(llm, ids_of(30), max_new_tokens=40) == expected[1]
        assert engine._scheduler.preempted == 1
        assert read_ids(stream) == expected[0]

    def test_its_slot_goes_to_those_that_need_it(self, tiny: QuantizedHuggingFaceLLM) -> None:
        engine: Any = tiny._engine()
        slots = engine._scheduler.free_slots
        expected = ids_after(tiny, ids_of(5), max_new_tokens=30)
        streams = [engine.submit(plan(tiny, ids_of(5), max_new_tokens=30)) for _ in range(slots)]
        wait_until(lambda: all(stream.is_full for stream in streams))
        assert len(ids_after(tiny, ids_of(9))) == 12
        assert [read_ids(stream) for stream in streams] == [expected] * slots

    def test_its_place_under_its_objects_limit_goes_to_the_next_call(self, make_tiny: MakeLLM) -> None:
        """A program that reads some of a stream and then calls `invoke` would wait for itself."""
        llm = make_tiny(batch_size=1)
        stream = llm._plan(["a"], None, {"max_new_tokens": 60, "ignore_eos": True, "timeout": 20}).submit()
        wait_until(lambda: stream.is_full)
        assert llm.invoke("b", timeout=20)
        assert len(read_ids(stream)) == 60

    def test_it_can_be_read_at_the_moment_in_which_the_engine_comes_to_rest(
        self, tiny: QuantizedHuggingFaceLLM
    ) -> None:
        """Between the plan that finds nothing to run and the engine's look for the reason."""
        engine: Any = tiny._engine()
        expected = ids_after(tiny, ids_of(20), max_new_tokens=60)
        wait_for_rest()
        scheduler = engine._scheduler
        plan_of, read = scheduler.plan, []

        def plan_and_read(**options: Any) -> Any:
            step = plan_of(**options)
            if step is None and stream.is_full:
                read.extend(next(chunks) for _ in range(UNREAD))
            return step

        scheduler.plan = plan_and_read
        stream = engine.submit(plan(tiny, ids_of(20), max_new_tokens=60))
        chunks = iter(stream)
        wait_until(lambda: len(read) >= 40)
        del scheduler.plan
        read.extend(chunks)
        assert [token_id for chunk in read for token_id in chunk.token_ids] == expected
        assert engine._scheduler is scheduler  # the engine has not failed

    def test_closing_it_frees_its_blocks(self, tiny: QuantizedHuggingFaceLLM) -> None:
        engine: Any = tiny._engine()
        stream = engine.submit(plan(tiny, ids_of(20), max_new_tokens=60))
        wait_until(lambda: stream.is_full)
        stream.close()
        wait_until(lambda: engine._blocks.held == 0, 0.5)

    def test_the_model_can_be_unloaded_meanwhile(self, make_tiny: MakeLLM) -> None:
        llm = make_tiny()
        stream = llm._engine().submit(plan(llm, ids_of(20), max_new_tokens=60))
        wait_until(lambda: stream.is_full)
        llm.unload()
        with pytest.raises(GenerationError, match="unloaded"):
            read_ids(stream)

    def test_a_whole_text_needs_no_reader(self, tiny: QuantizedHuggingFaceLLM) -> None:
        assert len(ask(tiny, plan(tiny, ids_of(20), max_new_tokens=40))[0].token_ids) == 40
        stream = tiny._engine().submit(plan(tiny, ids_of(20), max_new_tokens=40), in_pieces=False)
        wait_until(lambda: computed(stream) == 1)


@pytest.fixture
def one_row(tiny: QuantizedHuggingFaceLLM) -> QuantizedHuggingFaceLLM:
    """An object over the tiny model with one sequence at a time."""
    return tiny.model_copy(update={"batch_size": 1})


class TestLimits:
    def test_a_limit_of_sequences_holds_up_no_other_object(
        self, tiny: QuantizedHuggingFaceLLM, one_row: QuantizedHuggingFaceLLM
    ) -> None:
        with forwards(tiny, slowly(0.003)):
            engine = tiny._engine()
            first = engine.submit(one_row._requests("a", one_row._options(None, {"max_new_tokens": 500})))
            second = engine.submit(one_row._requests("b", one_row._options(None, {"max_new_tokens": 5})))
            next(iter(first))
            assert len(ids_after(tiny, ids_of(5), max_new_tokens=5)) == 5
            assert not first.cancelled and computed(first) < 400  # noqa: PT018
            assert not computed(second)  # of the limited object
            first.close()
            assert len(read_ids(second)) == 5

    def test_too_many_waiting_requests_are_refused(self, one_row: QuantizedHuggingFaceLLM) -> None:
        bounded = one_row.model_copy(update={"max_waiting": 2})
        call = {"max_new_tokens": 300, "ignore_eos": True}
        with forwards(bounded, slowly(0.002)):
            running = bounded._plan(["a"], None, call).submit()
            next(iter(running))
            waiting = [bounded._plan([prompt], None, {**call, "max_new_tokens": 3}).submit() for prompt in "bc"]
            wait_until(lambda: waiting_requests(bounded) == 2)
            with pytest.raises(QueueFullError, match=r"2 requests wait .* max_waiting=2; call again later"):
                bounded.invoke("d")
            running.close()
            assert [len(read_ids(stream)) for stream in waiting] == [3, 3]
        assert bounded.invoke("d")

    @pytest.mark.parametrize("engine", ["fast", "pipeline"])
    def test_both_engines_refuse(self, make_tiny: MakeLLM, engine: str) -> None:
        llm = make_tiny(engine=engine, batch_size=1, max_waiting=1)
        call = {"max_new_tokens": 200, "ignore_eos": True}
        with forwards(llm, slowly(0.002)):
            running = llm._plan(["a"], None, call).submit()
            next(iter(running))
            waiting = llm._plan(["b"], None, call).submit()
            wait_until(lambda: waiting_requests(llm) == 1)
            with pytest.raises(QueueFullError):
                llm.invoke("c")
            waiting.close()
            running.close()

    def test_wrong_limits_are_refused(self, make_tiny: MakeLLM) -> None:
        with pytest.raises(InvalidOptionError, match="max_waiting"):
            make_tiny(max_waiting=0)


class TestPriority:
    @pytest.mark.parametrize("engine", ["fast", "pipeline"])
    def test_calls_of_a_lower_number_go_first(self, make_tiny: MakeLLM, engine: str) -> None:
        llm = make_tiny(engine=engine, batch_size=1)
        order: list[str] = []

        def call(name: str, priority: int) -> None:
            llm.invoke(name, priority=priority, max_new_tokens=4)
            order.append(name)

        with forwards(llm, slowly(0.004)):
            running = llm._plan(["z"], None, {"max_new_tokens": 400, "ignore_eos": True}).submit()
            next(iter(running))
            with Background(lambda: call("late", 1)), Background(lambda: call("early", -1)):
                wait_until(lambda: waiting_requests(llm) == 2)
                running.close()
        assert order == ["early", "late"]

    def test_priority_is_a_whole_number(self, tiny: QuantizedHuggingFaceLLM) -> None:
        with pytest.raises(InvalidOptionError, match="priority='high'"):
            tiny.invoke("a", priority="high")

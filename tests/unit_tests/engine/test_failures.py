"""What is raised in an engine's thread: its requests end with the cause, and the next ones run, whatever it was."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from langchain_quantllm import QuantizedHuggingFaceLLM
from langchain_quantllm.engine.stream import THREAD_ENDED, ChunkStream
from langchain_quantllm.errors import GenerationError, GenerationTimeoutError, UnsupportedError
from tests.support.engine import AllowOnly, Background, MakeLLM, ask, ids_after, ids_of, plan
from tests.support.models import forwards, wait_for_rest, wait_until

pytestmark = pytest.mark.usefixtures("one_thread")


class PanicError(BaseException):
    """Stands for `pyo3_runtime.PanicException` of packages written in Rust, which is no `Exception`."""


KINDS = [ValueError, PanicError, KeyboardInterrupt, SystemExit]


@pytest.fixture(params=["fast", "pipeline"])
def engine_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def llm(make_tiny: MakeLLM, engine_name: str) -> QuantizedHuggingFaceLLM:
    return make_tiny(engine=engine_name)


def error_of(stream: ChunkStream) -> BaseException:
    """Read a stream that must fail."""
    try:
        list(stream)
    except BaseException as error:
        return error
    pytest.fail("the stream ended well")


class Raising(AllowOnly):
    """A mask that raises in one of its parts, after some tokens."""

    def __init__(self, error: BaseException, where: str, after: int) -> None:
        super().__init__(AllowOnly.IDS)
        self._error, self._where, self._after = error, where, after

    def _raise_in(self, where: str) -> None:
        if where == self._where and len(self.accepted) >= self._after:
            raise self._error

    def fill(self, bits: torch.Tensor) -> bool:
        self._raise_in("fill")
        return super().fill(bits)

    def accept(self, token_id: int) -> None:
        self._raise_in("accept")
        super().accept(token_id)


class TestOneRequest:
    """Errors of a request's own mask or tokenizer."""

    @pytest.mark.parametrize("where", ["make", "fill", "accept"])
    @pytest.mark.parametrize("kind", KINDS)
    def test_a_mask_s_error_fails_its_request_alone(
        self, llm: QuantizedHuggingFaceLLM, kind: type[BaseException], where: str
    ) -> None:
        error = kind("the grammar is broken")

        def make() -> AllowOnly:
            if where == "make":
                raise error
            return Raising(error, where, 2)

        good, bad = plan(llm, ids_of(9), do_sample=True, seed=1), plan(llm, ids_of(9), mask=make)
        expected = ask(llm, good)[0].token_ids
        engine = llm._engine(good[0].options)
        streams = [engine.submit(requests) for requests in (good, bad, good)]
        failure = error_of(streams[1])
        assert type(failure) is GenerationError
        assert failure.__cause__ is error
        assert "the grammar is broken" in str(failure)
        for stream in (streams[0], streams[2]):
            assert [i for chunk in stream for i in chunk.token_ids] == expected

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_tokenizer_s_error_fails_its_request_alone(
        self, llm: QuantizedHuggingFaceLLM, kind: type[BaseException], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tokenizer = llm.pipeline.tokenizer
        decode, bad_ids = tokenizer.decode, ids_after(llm, ids_of(9))

        def fail_on(ids: Any, **options: Any) -> Any:
            if bad_ids[3] in ids:
                raise kind("no such character")
            return decode(ids, **options)

        good, bad = plan(llm, ids_of(7)), plan(llm, ids_of(9))
        expected = ask(llm, good)[0].token_ids
        assert bad_ids[3] not in expected
        monkeypatch.setattr(tokenizer, "decode", fail_on)
        streams = [llm._engine(good[0].options).submit(requests) for requests in (good, bad)]
        assert "no such character" in str(error_of(streams[1]))
        assert [i for chunk in streams[0] for i in chunk.token_ids] == expected


def raise_in_forward(number: int, error: BaseException) -> Callable[[int], None]:
    def before(count: int) -> None:
        if count == number:
            raise error

    return before


class TestAllRequests:
    """Errors of the model, its device, or the engine itself."""

    @pytest.mark.parametrize("kind", KINDS)
    def test_an_error_of_a_hook_fails_the_requests_in_flight_and_the_next_one_runs(
        self, llm: QuantizedHuggingFaceLLM, kind: type[BaseException]
    ) -> None:
        expected, error = ids_after(llm, ids_of(9)), kind("the hook is broken")
        with forwards(llm, raise_in_forward(3, error)):
            failure = error_of(llm._engine().submit([*plan(llm, ids_of(9)), *plan(llm, ids_of(30))]))
            assert type(failure) is GenerationError
            assert failure.__cause__ is error
            assert ids_after(llm, ids_of(9)) == expected

    def test_requests_that_wait_for_a_failed_batch_run_after_it(self, make_tiny: MakeLLM) -> None:
        llm = make_tiny(engine="pipeline")
        waiting = [*plan(llm, ids_of(8)), *plan(llm, ids_of(7))]
        expected = ask(llm, waiting)[0].token_ids
        begun, go_on = threading.Event(), threading.Event()

        def before(count: int) -> None:
            if count == 1:
                begun.set()
                go_on.wait(10)
                msg = "the device is on fire"
                raise RuntimeError(msg)

        with forwards(llm, before):
            first = llm._engine().submit(plan(llm, ids_of(9)))
            assert begun.wait(10)
            others = llm._engine().submit(waiting)
            go_on.set()
            assert "on fire" in str(error_of(first))
            assert [i for chunk in others if chunk.row == 0 for i in chunk.token_ids] == expected

    def test_a_request_with_one_sample_in_the_failed_batch_fails_though_others_wait(self, make_tiny: MakeLLM) -> None:
        llm = make_tiny(engine="pipeline", batch_size=1)
        error = RuntimeError("the device is on fire")
        with forwards(llm, raise_in_forward(2, error)):
            requests = plan(llm, ids_of(9), n=3, do_sample=True, seed=1)
            assert error_of(llm._engine().submit(requests)).__cause__ is error
            assert len(ask(llm, requests)) == 3

    @pytest.mark.parametrize("kind", KINDS)
    def test_an_error_while_changes_are_looked_for_ends_each_call_and_the_thread_does_not_spin(
        self, make_tiny: MakeLLM, kind: type[BaseException], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        llm = make_tiny(engine="fast")
        expected, engine, error, looked = ids_after(llm, ids_of(9)), llm._engine(), kind("cannot look"), []

        def fail() -> bool:
            looked.append(1)
            raise error

        wait_for_rest()
        with monkeypatch.context() as patch:
            patch.setattr(engine._parts, "model_changed", fail)  # type: ignore[attr-defined]
            for count in (1, 2):
                failure = error_of(engine.submit(plan(llm, ids_of(9))))
                assert failure.__cause__ is error
                wait_for_rest()
                assert len(looked) == count
        assert ids_after(llm, ids_of(9)) == expected

    def test_running_requests_fail_with_the_one_whose_arrival_failed(
        self, make_tiny: MakeLLM, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        llm = make_tiny(engine="fast")
        expected, engine, error = ids_after(llm, ids_of(9)), llm._engine(), RuntimeError("cannot look")
        begun, go_on = threading.Event(), threading.Event()

        def before(count: int) -> None:
            if count == 3:
                begun.set()
                go_on.wait(10)

        def fail() -> bool:
            raise error

        with forwards(llm, before), monkeypatch.context() as patch:
            running = engine.submit(plan(llm, ids_of(9), max_new_tokens=200))
            assert begun.wait(10)
            patch.setattr(engine._parts, "model_changed", fail)  # type: ignore[attr-defined]
            arriving = engine.submit(plan(llm, ids_of(8)))
            go_on.set()
            assert error_of(running).__cause__ is error_of(arriving).__cause__ is error
        assert ids_after(llm, ids_of(9)) == expected
        assert engine._blocks.held == 0  # type: ignore[attr-defined]

    @pytest.mark.parametrize("kind", [RuntimeError, PanicError])
    def test_calls_end_with_errors_while_the_engine_cannot_recover_and_run_when_it_can(
        self, make_tiny: MakeLLM, kind: type[BaseException], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As after an error of CUDA that every later operation reports again."""
        llm = make_tiny(engine="fast")
        expected, engine = ids_after(llm, ids_of(40)), llm._engine()
        error = RuntimeError("the device is on fire")

        def fail() -> None:
            msg = "still on fire"
            raise kind(msg)

        with monkeypatch.context() as patch:
            patch.setattr(engine, "_reset_cache", fail)
            with forwards(llm, raise_in_forward(3, error)):
                failure = error_of(engine.submit(plan(llm, ids_of(40))))
                assert failure.__cause__ is error
                assert "still on fire" in str(failure)
                for _ in range(2):
                    assert "still on fire" in str(error_of(engine.submit(plan(llm, ids_of(40)))))
        assert ids_after(llm, ids_of(40)) == expected
        assert engine._blocks.held == 0  # type: ignore[attr-defined]


class TestThread:
    def test_a_system_that_starts_no_thread_fails_that_call_alone(
        self, llm: QuantizedHuggingFaceLLM, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        requests, engine, start = plan(llm, ids_of(9)), llm._engine(), threading.Thread.start

        def refuse(thread: threading.Thread) -> None:
            if thread.name == "quantllm-engine":
                msg = "can't start new thread"
                raise RuntimeError(msg)
            start(thread)

        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            for _ in range(2):
                with pytest.raises(UnsupportedError, match="can't start new thread.*an engine needs one"):
                    engine.submit(requests)
        assert len(ask(llm, requests)[0].token_ids) == 12

    def test_ctrl_c_while_the_thread_starts_leaves_no_second_one(
        self, llm: QuantizedHuggingFaceLLM, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        requests, engine, start = plan(llm, ids_of(9)), llm._engine(), threading.Thread.start
        started = []

        def interrupted(thread: threading.Thread) -> None:
            start(thread)
            if thread.name == "quantllm-engine":
                started.append(thread)
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", interrupted)
            with pytest.raises(KeyboardInterrupt):
                engine.submit(requests)
        assert len(ask(llm, requests)[0].token_ids) == 12
        wait_until(lambda: not started[0].is_alive())
        assert len(ask(llm, requests)[0].token_ids) == 12

    @pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
    def test_an_exception_from_outside_in_an_idle_thread_disturbs_no_call(
        self, llm: QuantizedHuggingFaceLLM, kind: type[BaseException]
    ) -> None:
        """As debuggers and servers raise them in threads that they want to end."""
        expected, worker = ids_after(llm, ids_of(9)), llm._engine()._worker  # type: ignore[attr-defined]
        wait_for_rest()
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(worker._thread.ident), ctypes.py_object(kind))
        for _ in range(3):
            try:
                assert ids_after(llm, ids_of(9)) == expected
            except GenerationError as error:  # it woke up for this call
                assert isinstance(error.__cause__, kind)  # noqa: PT017

    @pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
    @pytest.mark.parametrize("failing", [["_give_up"], ["_give_up", "_leave"]], ids=str)
    @pytest.mark.parametrize("kind", [RuntimeError, SystemExit])
    def test_a_thread_that_dies_leaves_no_reader_waiting_and_the_next_call_starts_another(
        self,
        llm: QuantizedHuggingFaceLLM,
        monkeypatch: pytest.MonkeyPatch,
        kind: type[BaseException],
        failing: list[str],
    ) -> None:
        expected, engine = ids_after(llm, ids_of(9)), llm._engine()
        worker: Any = engine._worker  # type: ignore[attr-defined]
        before = worker._thread

        def fail(*_: Any) -> None:
            raise kind

        with monkeypatch.context() as patch, forwards(llm, raise_in_forward(3, RuntimeError("the device is on fire"))):
            for name in failing:
                patch.setattr(worker, name, fail)
            streams = [engine.submit(plan(llm, ids_of(count))) for count in (9, 20)]
            for stream in streams:
                assert str(error_of(stream)) == THREAD_ENDED
            wait_until(lambda: not before.is_alive())
        assert ids_after(llm, ids_of(9)) == expected
        assert worker._thread is not before

    @pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
    async def test_an_async_reader_notices_that_the_thread_has_ended(
        self, llm: QuantizedHuggingFaceLLM, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        engine = llm._engine()
        worker: Any = engine._worker  # type: ignore[attr-defined]

        def fail(*_: Any) -> None:
            raise SystemExit

        for name in ("_give_up", "_leave"):
            monkeypatch.setattr(worker, name, fail)
        with forwards(llm, raise_in_forward(3, RuntimeError("the device is on fire"))):
            with pytest.raises(GenerationError, match="thread has ended"):
                async for _ in engine.submit(plan(llm, ids_of(9))):
                    pass
            monkeypatch.undo()
            assert len(ids_after(llm, ids_of(9))) == 12


class TestDeadlines:
    """A request whose time is over is stopped by the engine, whether anybody reads its stream or not."""

    def test_an_expired_request_frees_its_place_unread(self, llm: QuantizedHuggingFaceLLM) -> None:
        expected, engine = ids_after(llm, ids_of(9)), llm._engine()
        begun, go_on = threading.Event(), threading.Event()

        def before(count: int) -> None:
            if count == 3:
                begun.set()
                go_on.wait(10)

        with forwards(llm, before) as seen:
            stream = engine.submit(plan(llm, ids_of(9), max_new_tokens=2000), timeout_s=3600)
            assert begun.wait(10)
            stream._deadline = 0.0  # long ago
            go_on.set()
            assert seen.settle() <= 4  # the one that ran, and one begun before the next look
        failure = error_of(stream)
        assert isinstance(failure, GenerationTimeoutError)
        assert "timeout=3600 seconds" in str(failure)
        assert ids_after(llm, ids_of(9)) == expected

    def test_beams_stop_when_their_time_is_over(self, make_tiny: MakeLLM) -> None:
        llm = make_tiny()
        requests = plan(llm, ids_of(9), max_new_tokens=2000, extra={"num_beams": 2})
        begun, go_on = threading.Event(), threading.Event()

        def before(count: int) -> None:
            if count == 3:
                begun.set()
                go_on.wait(10)

        with forwards(llm, before) as seen:
            stream = llm._engine(requests[0].options).submit(requests, timeout_s=3600)
            assert begun.wait(10)
            stream._deadline = 0.0  # long ago
            go_on.set()
            assert seen.settle() <= 4
        assert isinstance(error_of(stream), GenerationTimeoutError)

    def test_an_expired_request_leaves_others_alone(self, llm: QuantizedHuggingFaceLLM) -> None:
        expected, engine = ids_after(llm, ids_of(9), max_new_tokens=40), llm._engine()
        begun, go_on = threading.Event(), threading.Event()

        def before(count: int) -> None:
            if count == 5:
                begun.set()
                go_on.wait(10)

        with forwards(llm, before), Background(lambda: ids_after(llm, ids_of(9), max_new_tokens=40)) as other:
            stream = engine.submit(plan(llm, ids_of(9), max_new_tokens=200), timeout_s=3600)
            assert begun.wait(10)
            stream._deadline = 0.0  # long ago
            go_on.set()
        assert other.result == expected
        assert isinstance(error_of(stream), GenerationTimeoutError)

    def test_a_request_that_expires_in_the_queue_never_runs(self, llm: QuantizedHuggingFaceLLM) -> None:
        engine, begun, go_on = llm._engine(), threading.Event(), threading.Event()

        def before(count: int) -> None:
            if count == 1:
                begun.set()
                go_on.wait(10)

        with forwards(llm, before) as seen:
            first = engine.submit(plan(llm, ids_of(9)))
            assert begun.wait(10)
            late = engine.submit(plan(llm, ids_of(30)), timeout_s=3600)
            late._deadline = 0.0  # long ago
            go_on.set()
            assert len([i for chunk in first for i in chunk.token_ids]) == 12
            assert isinstance(error_of(late), GenerationTimeoutError)
            seen.settle()
            assert 30 not in [tokens for _, tokens in seen.shapes]

    def test_a_request_that_rests_unread_frees_its_place_when_its_time_is_over(self, make_tiny: MakeLLM) -> None:
        llm = make_tiny(engine="fast")
        engine: Any = llm._engine()
        stream = engine.submit(plan(llm, ids_of(9), max_new_tokens=2000), timeout_s=3600)
        wait_until(lambda: stream.is_full)
        stream._deadline = 0.0  # long ago
        wait_for_rest()
        assert engine._blocks.held == 0
        with pytest.raises(GenerationTimeoutError):
            list(stream)

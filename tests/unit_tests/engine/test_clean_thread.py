"""Calls in a thread of their own: results, exceptions, Ctrl-C, and what of the caller's thread reaches them."""

from __future__ import annotations

import _thread
import contextvars
import threading
import time
import traceback
from typing import Any

import pytest
import torch

from langchain_quantllm.engine.clean_thread import in_clean_thread
from langchain_quantllm.errors import UnsupportedError
from tests.support.models import wait_until


class TestResults:
    def test_a_call_returns_its_result(self) -> None:
        def add(a: int, *, b: int) -> int:
            """Add."""
            return a + b

        assert in_clean_thread(add)(1, b=2) == 3
        assert in_clean_thread(add).__doc__ == "Add."

    def test_it_runs_in_another_thread(self) -> None:
        assert in_clean_thread(threading.get_ident)() != threading.get_ident()

    def test_a_call_inside_another_one_runs_in_its_thread(self) -> None:
        """So that a lock of threads that the outer one holds is held by the inner one too."""
        lock = threading.RLock()

        def outer() -> tuple[int, int]:
            with lock:
                return threading.get_ident(), in_clean_thread(inner)()

        def inner() -> int:
            with lock:
                return threading.get_ident()

        first, second = in_clean_thread(outer)()
        assert first == second

    @pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, SystemExit])
    def test_an_exception_reaches_the_caller_with_its_traceback(self, kind: type[BaseException]) -> None:
        def fail() -> None:
            raise kind("broken")

        with pytest.raises(kind, match="broken") as caught:
            in_clean_thread(fail)()
        assert "fail" in [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]

    def test_context_variables_reach_the_call(self) -> None:
        variable = contextvars.ContextVar("variable", default="outside")
        variable.set("inside")
        assert in_clean_thread(variable.get)() == "inside"

    def test_no_thread_is_left(self) -> None:
        before = threading.active_count()
        for _ in range(5):
            in_clean_thread(int)()
        wait_until(lambda: threading.active_count() <= before)


class TestStates:
    def test_no_state_of_the_caller_s_thread_reaches_the_call(self) -> None:
        def state() -> tuple[Any, ...]:
            made = torch.ones(1)
            return (
                made.is_inference(),
                torch.is_grad_enabled(),
                torch.is_autocast_enabled("cpu"),
                torch.get_default_device().type,
                made.device.type,
            )

        with (
            torch.inference_mode(),
            torch.no_grad(),
            torch.autocast("cpu", torch.bfloat16),
            torch.device("meta"),
        ):
            assert in_clean_thread(state)() == (False, True, False, "cpu", "cpu")


class TestInterruptions:
    def test_ctrl_c_stops_the_call_and_waits_for_its_end(self) -> None:
        events: list[str] = []

        def work() -> None:
            try:
                events.append("begun")
                while True:
                    time.sleep(0.001)
            except KeyboardInterrupt:
                events.append("interrupted")
                time.sleep(0.05)  # what it still has to do
                raise
            finally:
                events.append("ended")

        def interrupt() -> None:
            wait_until(lambda: events)
            _thread.interrupt_main()

        thread = threading.Thread(target=interrupt, daemon=True)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            in_clean_thread(work)()
        assert events == ["begun", "interrupted", "ended"]
        thread.join()

    def test_a_second_ctrl_c_does_not_wait(self) -> None:
        release, events = threading.Event(), []

        def work() -> None:
            while "ended" not in events:
                try:
                    events.append("begun")
                    while not release.is_set():
                        time.sleep(0.001)
                    events.append("ended")
                except KeyboardInterrupt:
                    events.append("interrupted")

        def interrupt() -> None:
            wait_until(lambda: events)
            _thread.interrupt_main()
            wait_until(lambda: "interrupted" in events)
            _thread.interrupt_main()

        thread = threading.Thread(target=interrupt, daemon=True)
        thread.start()
        try:
            with pytest.raises(KeyboardInterrupt):
                in_clean_thread(work)()
            assert "ended" not in events
        finally:
            release.set()
        wait_until(lambda: "ended" in events)
        thread.join()

    def test_ctrl_c_while_the_thread_starts_stops_the_call_too(self, monkeypatch: pytest.MonkeyPatch) -> None:
        start, events = threading.Thread.start, []

        def work() -> None:
            try:
                events.append("begun")
                while True:
                    time.sleep(0.001)
            finally:
                events.append("ended")

        def interrupted_after(thread: threading.Thread) -> None:
            start(thread)
            wait_until(lambda: events)
            raise KeyboardInterrupt

        monkeypatch.setattr(threading.Thread, "start", interrupted_after)
        with pytest.raises(KeyboardInterrupt):
            in_clean_thread(work)()
        assert events == ["begun", "ended"]

    def test_a_system_without_threads_is_an_error_that_says_so(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(_: threading.Thread) -> None:
            msg = "can't start new thread"
            raise RuntimeError(msg)

        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            with pytest.raises(UnsupportedError, match=r"no more threads \(can't start new thread\).*ulimit -u"):
                in_clean_thread(int)()
        assert in_clean_thread(int)() == 0

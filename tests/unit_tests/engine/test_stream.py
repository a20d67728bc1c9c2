"""The stream between an engine's thread and its readers, and the thread's life."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from collections import deque
from typing import Any

import pytest

from langchain_quantllm.engine.detokenizer import Completion
from langchain_quantllm.engine.request import Request
from langchain_quantllm.engine.stream import Chunk, ChunkStream
from langchain_quantllm.engine.worker import Worker
from langchain_quantllm.errors import GenerationError, GenerationTimeoutError
from langchain_quantllm.options import GenerationOptions
from tests.support.models import wait_until


def chunks(count: int, row: int = 0) -> list[Chunk]:
    return [Chunk(row=row, text=str(i), finish_reason="stop" if i == count - 1 else None) for i in range(count)]


async def read_one(stream: ChunkStream) -> Chunk:
    async for chunk in stream:
        return chunk
    pytest.fail("the stream was empty")


def later(seconds: float, call: Any, *args: Any) -> threading.Thread:
    thread = threading.Timer(seconds, call, args)
    thread.daemon = True
    thread.start()
    return thread


class TestChunkStream:
    def test_a_stream_ends_after_the_last_request_s_last_chunk(self) -> None:
        stream = ChunkStream(2)
        for a, b in zip(chunks(3, row=0), chunks(3, row=1), strict=True):
            stream.put(a)
            stream.put(b)
        assert [(c.row, c.text) for c in stream] == [(r, str(i)) for i in range(3) for r in range(2)]
        assert list(stream) == []

    def test_chunks_come_while_others_are_still_made(self) -> None:
        stream = ChunkStream(1)
        first, *rest = chunks(3)
        stream.put(first)
        reader = iter(stream)
        assert next(reader) is first
        for i, chunk in enumerate(rest):
            later(0.02 * (i + 1), stream.put, chunk)
        assert list(reader) == rest

    async def test_async_reading_leaves_the_loop_free(self) -> None:
        stream = ChunkStream(1)
        for i, chunk in enumerate(chunks(3)):
            later(0.05 * (i + 1), stream.put, chunk)
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0.005)
                ticks += 1

        ticking = asyncio.create_task(tick())
        texts = [chunk.text async for chunk in stream]
        ticking.cancel()
        assert texts == ["0", "1", "2"]
        assert ticks >= 5  # of some 30; a blocked loop makes none

    def test_an_error_is_raised_at_once_and_closes(self) -> None:
        stream = ChunkStream(2)
        later(0.02, stream.fail, GenerationError("broken"))
        with pytest.raises(GenerationError, match="broken"):
            list(stream)
        assert stream.cancelled
        assert list(stream) == []

    async def test_an_error_is_raised_in_async_too(self) -> None:
        stream = ChunkStream(2)
        later(0.02, stream.fail, GenerationError("broken"))
        with pytest.raises(GenerationError, match="broken"):
            _ = [chunk async for chunk in stream]
        assert stream.cancelled

    def test_chunks_before_an_error_still_come(self) -> None:
        stream = ChunkStream(1)
        first = chunks(2)[0]
        stream.put(first)
        stream.fail(GenerationError("broken"))
        reader = iter(stream)
        assert next(reader) is first
        with pytest.raises(GenerationError, match="broken"):
            next(reader)

    def test_leaving_the_block_cancels(self) -> None:
        with ChunkStream(1) as stream:
            assert not stream.cancelled
        assert stream.cancelled

    def test_closing_wakes_a_reader_in_another_thread(self) -> None:
        stream = ChunkStream(1)
        later(0.05, stream.close)
        began = time.monotonic()
        with pytest.raises(GenerationError, match="cancelled"):
            list(stream)
        assert time.monotonic() - began < 0.9  # its bounded wait is a second

    async def test_closing_wakes_an_async_reader(self) -> None:
        stream = ChunkStream(1)
        later(0.05, stream.close)
        with pytest.raises(GenerationError, match="cancelled"):
            await asyncio.wait_for(read_one(stream), timeout=5)

    def test_timeout_of_a_silent_engine(self) -> None:
        stream = ChunkStream(1, timeout_s=0.1)
        began = time.monotonic()
        with pytest.raises(GenerationTimeoutError, match=r"timeout=0\.1 seconds"):
            list(stream)
        assert 0.09 < time.monotonic() - began < 0.9
        assert stream.cancelled

    async def test_timeout_in_async(self) -> None:
        stream = ChunkStream(1, timeout_s=0.1)
        with pytest.raises(GenerationTimeoutError):
            _ = [chunk async for chunk in stream]
        assert stream.cancelled

    def test_timeout_of_a_busy_engine(self) -> None:
        """Chunks that keep coming do not put it off."""
        stream = ChunkStream(1, timeout_s=0.15)

        def feed() -> None:
            while not stream.cancelled:
                stream.put(Chunk(row=0, text="x"))
                time.sleep(0.01)  # the pace of a model

        later(0, feed)
        with pytest.raises(GenerationTimeoutError):
            list(stream)
        assert stream.cancelled

    def test_a_slow_reader_does_not_time_out_a_text_made_in_time(self) -> None:
        stream = ChunkStream(1, timeout_s=0.05)
        stream.put(chunks(1)[0])
        time.sleep(0.1)  # longer than its timeout
        assert len(list(stream)) == 1

    async def test_a_cancelled_task_leaves_the_stream_usable_for_closing(self) -> None:
        stream = ChunkStream(1)

        async def read() -> None:
            with stream:
                async for _ in stream:
                    pass

        task = asyncio.create_task(read())
        await asyncio.sleep(0)  # it reads now
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert stream.cancelled
        stream.put(chunks(1)[0])  # the engine's last chunk without a reader is no error

    def test_a_loop_closed_over_its_reader_cancels(self) -> None:
        stream = ChunkStream(1)
        loop = asyncio.new_event_loop()
        loop.create_task(read_one(stream))  # noqa: RUF006  (dropped on purpose)
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()
        stream.put(Chunk(row=0, text="x"))
        assert stream.cancelled


def completion_of(stream: ChunkStream, index: int = 0) -> Completion:
    request = Request(
        prompt_ids=(1,),
        max_new_tokens=4,
        min_new_tokens=0,
        options=GenerationOptions(),
        sample_index=0,
        seed=0,
        eos_token_ids=(),
    )
    return Completion(request, lambda ids: "x" * len(ids), stream, index=index)


class Echo:
    """The least engine: finishes each row at once, and notes how many it was given together."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.threads: set[str] = set()
        self.hold = threading.Event()
        self.hold.set()
        self.error: BaseException | None = None
        self.recovered: list[BaseException] = []
        self.worker = Worker(self.run, self.recover)

    def run(self, waiting: deque[Completion]) -> None:
        self.threads.add(threading.current_thread().name)
        self.batches.append(len(waiting))
        self.hold.wait(5)
        if self.error is not None:
            raise self.error
        while waiting:
            completion = waiting.popleft()
            if not completion.stream.cancelled:
                completion.stream.put(completion.finish("stop"))

    def recover(self, error: BaseException) -> Exception:
        self.recovered.append(error)
        return GenerationError(f"the engine failed: {error!r}")

    def submit(self, rows: int = 1) -> ChunkStream:
        stream = ChunkStream(rows)
        self.worker.submit([completion_of(stream, i) for i in range(rows)])
        return stream


class TestWorker:
    def test_the_thread_starts_with_the_first_request(self) -> None:
        engine = Echo()
        assert engine.worker._thread is None
        list(engine.submit())
        assert engine.threads == {"quantllm-engine"}

    def test_requests_of_one_submission_run_together(self) -> None:
        engine = Echo()
        assert len(list(engine.submit(7))) == 7
        assert engine.batches == [7]

    def test_requests_that_come_close_together_from_threads_run_together(self) -> None:
        engine = Echo()
        barrier = threading.Barrier(6)

        def call() -> None:
            barrier.wait()
            list(engine.submit())

        threads = [threading.Thread(target=call) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(5)
        assert sum(engine.batches) >= 6
        assert len(engine.batches) <= 3  # one, but for a thread that the machine held up

    def test_the_thread_keeps_no_engine_alive(self) -> None:
        engine = Echo()
        list(engine.submit())
        thread = engine.worker._thread
        assert thread is not None
        assert thread.is_alive()  # idle
        gone = weakref.ref(engine)
        del engine
        gc.collect()
        wait_until(lambda: gone() is None, 1.0)
        thread.join(1)
        assert not thread.is_alive()

    def test_closing_fails_all_requests_and_ends_the_thread(self) -> None:
        engine = Echo()
        engine.hold.clear()
        running = engine.submit()
        wait_until(lambda: engine.batches)
        waiting = engine.submit()
        thread = engine.worker._thread
        later(0.1, engine.hold.set)
        engine.worker.close("the model was unloaded.")
        assert thread is not None
        assert not thread.is_alive()
        for stream in (running, waiting):
            with pytest.raises(GenerationError, match="unloaded"):
                list(stream)
        with pytest.raises(GenerationError, match="call again"):
            engine.submit()

    @pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt, SystemExit, BaseException])
    def test_an_engine_that_raises_fails_its_callers_with_the_cause_and_goes_on(
        self, kind: type[BaseException]
    ) -> None:
        engine = Echo()
        engine.error = kind("cable cut")
        with pytest.raises(GenerationError, match="cable cut") as error:
            list(engine.submit())
        assert error.value.__cause__ is engine.error
        assert engine.recovered == [engine.error]
        engine.error = None
        assert len(list(engine.submit())) == 1

    def test_a_failure_is_never_taken_for_a_cancellation(self) -> None:
        """A reader that looks in between, while the engine fails its stream, gets the reason."""
        errors: list[BaseException] = []

        class Watched(ChunkStream):
            def __setattr__(self, name: str, value: Any) -> None:
                super().__setattr__(name, value)
                if name == "cancelled" and value and not errors and threading.current_thread().name != "reader":
                    reader = threading.Thread(target=self.read, name="reader", daemon=True)
                    reader.start()
                    reader.join(0.2)

            def read(self) -> None:
                try:
                    list(self)
                except GenerationError as error:
                    errors.append(error)

        engine = Echo()
        engine.error = RuntimeError("cable cut")
        stream = Watched(1)
        engine.worker.submit([completion_of(stream)])
        wait_until(lambda: errors)
        assert "cable cut" in str(errors[0])

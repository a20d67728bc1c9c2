"""Concurrent calls of an encoder meet in batches, and each gets its own results or its own error."""

from __future__ import annotations

import gc
import itertools
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from langchain_quantllm.encoders.load import load
from langchain_quantllm.encoders.registry import LoadedEncoder
from langchain_quantllm.encoders.spec import EncoderSpec
from langchain_quantllm.encoders.work import Work
from langchain_quantllm.encoders.worker import EncoderWorker
from langchain_quantllm.errors import EncodingError, InvalidOptionError, NotEnoughMemoryError
from tests.support.encoder_models import tiny_embedder

_seen: list[list[Any]] = []
_open = threading.Event()


@dataclass(frozen=True)
class Double:
    """Doubles numbers; stops, fails or lacks memory where a test says so."""

    name: str = ""
    waits: bool = False
    fails_at: int | None = None
    most_items: int = 10**9

    def measure(self, model: Any, items: Sequence[Any]) -> tuple[Sequence[Any], Sequence[int]]:
        if any(not isinstance(item, int) for item in items):
            msg = "this is no number"
            raise InvalidOptionError(msg)
        return items, [max(1, item % 7) for item in items]

    def run(self, model: Any, items: Sequence[Any]) -> Sequence[Any]:
        if self.waits:
            assert _open.wait(10)
        _seen.append([self.name, *items])
        if self.fails_at in items:
            msg = "this number breaks the model"
            raise ValueError(msg)
        if len(items) > self.most_items:
            raise torch.OutOfMemoryError
        return [2 * item for item in items]


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load(EncoderSpec(model_id=str(tiny_embedder(tmp_path_factory.mktemp("e") / "model")), progress=False))


@pytest.fixture
def encoder(read: Any) -> Iterator[LoadedEncoder]:
    _seen.clear()
    _open.clear()
    encoder = LoadedEncoder(read, EncoderSpec(model_id="tiny"))
    yield encoder
    _open.set()
    if not encoder.closed:
        encoder.close()


def submit(
    encoder: LoadedEncoder, operation: Double, items: list[Any], most_tokens: int = 10_000, **options: Any
) -> Work:
    return encoder.submit(operation, items, sizes=[1] * len(items), most_tokens=most_tokens, **options)


def hold(encoder: LoadedEncoder) -> Work:
    """Keep the thread busy until `_open` is set."""
    work = submit(encoder, Double("hold", waits=True), [0])
    deadline = time.monotonic() + 10
    while work.remaining and time.monotonic() < deadline:
        time.sleep(0.001)
    return work


def test_results_come_in_the_order_of_the_items_whatever_the_batches(encoder: LoadedEncoder) -> None:
    items = list(range(1000))
    for most_tokens in (1, 13, 100, 100_000):
        assert submit(encoder, Double(), items, most_tokens).result() == [2 * item for item in items]


def test_calls_that_wait_meet_in_one_batch(encoder: LoadedEncoder) -> None:
    hold(encoder)
    works = [submit(encoder, Double(), [number]) for number in range(1, 21)]
    _open.set()
    assert [work.result() for work in works] == [[2 * number] for number in range(1, 21)]
    assert len(_seen) == 2
    assert sorted(_seen[1][1:]) == list(range(1, 21))


def test_calls_with_other_operations_share_no_batch(encoder: LoadedEncoder) -> None:
    hold(encoder)
    works = [submit(encoder, Double(name), [number]) for name in "ab" for number in (1, 2)]
    _open.set()
    assert [work.result() for work in works] == [[2], [4], [2], [4]]
    assert sorted(map(tuple, _seen[1:])) in ([("a", 1, 2), ("b", 1, 2)], [("a", 2, 1), ("b", 2, 1)])


def test_a_call_that_breaks_a_batch_fails_alone(encoder: LoadedEncoder) -> None:
    hold(encoder)
    works = [submit(encoder, Double(fails_at=3), [number]) for number in (1, 2, 3, 4)]
    _open.set()
    with pytest.raises(EncodingError, match="this number breaks the model"):
        works[2].result()
    assert [work.result() for work in (works[0], works[1], works[3])] == [[2], [4], [8]]


def test_a_call_that_cannot_be_measured_fails_alone(encoder: LoadedEncoder) -> None:
    hold(encoder)
    good, bad = submit(encoder, Double(), [1]), submit(encoder, Double(), ["one"])
    _open.set()
    with pytest.raises(InvalidOptionError, match="no number"):
        bad.result()
    assert good.result() == [2]


def test_a_short_call_passes_a_long_one(encoder: LoadedEncoder) -> None:
    long = submit(encoder, Double("long", waits=True), list(range(500)), most_tokens=7)
    time.sleep(0.05)
    short = submit(encoder, Double("short"), [1])
    _open.set()
    assert short.result() == [2]
    assert long.result() == [2 * item for item in range(500)]
    assert [batch[0] for batch in _seen].index("short") <= 2
    assert len(_seen) > 100


def test_a_cancelled_call_is_dropped_before_its_next_batch(encoder: LoadedEncoder) -> None:
    hold(encoder)
    work = submit(encoder, Double("cancelled"), [1, 2, 3])
    work.cancel()
    _open.set()
    assert submit(encoder, Double(), [5]).result() == [10]
    assert not any(batch[0] == "cancelled" for batch in _seen)


def test_batches_are_halved_when_memory_runs_out_and_stay_small(encoder: LoadedEncoder) -> None:
    operation = Double(most_items=4)
    assert submit(encoder, operation, [7] * 16).result() == [14] * 16
    _seen.clear()
    assert submit(encoder, operation, [7] * 16).result() == [14] * 16
    assert max(len(batch) - 1 for batch in _seen) <= 4
    with pytest.raises(NotEnoughMemoryError):
        submit(encoder, Double(most_items=0), [1]).result()


def test_batches_grow_again_up_to_the_callers_size_when_memory_is_free(encoder: LoadedEncoder) -> None:
    assert submit(encoder, Double(most_items=4), [6] * 32, most_tokens=32 * 6).result() == [12] * 32
    _seen.clear()
    assert submit(encoder, Double(), [6] * 2000, most_tokens=32 * 6).result() == [12] * 2000
    sizes = [len(batch) - 1 for batch in _seen]
    assert sizes[0] <= 4
    assert sorted(sizes[:-1]) == sizes[:-1]
    assert max(sizes) == 32


def test_doubling_that_fails_is_tried_less_and_less(encoder: LoadedEncoder) -> None:
    operation = Double(most_items=4)
    assert submit(encoder, operation, [6] * 4000, most_tokens=32 * 6).result() == [12] * 4000
    sizes = [len(batch) - 1 for batch in _seen]
    failures = [place for place, size in enumerate(sizes) if size > 4 and place > 10]
    assert 2 <= len(failures) <= 10
    waits = [after - before for before, after in itertools.pairwise(failures)]
    assert sorted(waits) == waits


def test_most_items_bounds_a_batch(encoder: LoadedEncoder) -> None:
    assert submit(encoder, Double(), list(range(10)), most_items=3).result() == [2 * item for item in range(10)]
    assert {len(batch) - 1 for batch in _seen} <= {1, 2, 3}


def test_progress_counts_every_item_once(encoder: LoadedEncoder) -> None:
    done: list[int] = []
    submit(encoder, Double(), list(range(100)), most_tokens=20, progress=done.append).result()
    assert sum(done) == 100
    assert len(done) > 5


def test_unloading_ends_waiting_calls_with_a_sentence(encoder: LoadedEncoder) -> None:
    hold(encoder)
    work = submit(encoder, Double(), [1])
    closing = threading.Thread(target=encoder.close)
    closing.start()
    with pytest.raises(EncodingError, match="unloaded"):
        work.result()
    _open.set()
    closing.join(10)
    with pytest.raises(EncodingError, match="unloaded"):
        submit(encoder, Double(), [1])


def test_no_items_are_a_call_that_has_ended(encoder: LoadedEncoder) -> None:
    assert submit(encoder, Double(), []).result() == []


def test_a_fault_of_the_thread_itself_ends_calls_and_the_next_one_runs(
    encoder: LoadedEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Any, encoder: Any) -> Any:
        monkeypatch.undo()
        raise SystemError("the books are wrong")

    monkeypatch.setattr(EncoderWorker, "_next_batch", fail)
    with pytest.raises(EncodingError, match="the books are wrong"):
        submit(encoder, Double(), [1]).result()
    encoder.worker()._threads[0].join(10)
    assert submit(encoder, Double(), [1]).result() == [2]


def test_an_idle_thread_keeps_no_encoder_alive(read: Any) -> None:
    encoder = LoadedEncoder(read, EncoderSpec(model_id="tiny"))
    assert submit(encoder, Double(), [1]).result() == [2]
    threads = encoder.worker()._threads
    reference = weakref.ref(encoder)
    del encoder
    deadline = time.monotonic() + 10
    while (reference() is not None or any(t.is_alive() for t in threads)) and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
    assert reference() is None
    assert not any(thread.is_alive() for thread in threads)


def test_many_threads_get_their_own_results(encoder: LoadedEncoder) -> None:
    def call(seed: int) -> bool:
        items = list(range(seed, seed + 40))
        return submit(encoder, Double(), items, most_tokens=50).result() == [2 * item for item in items]

    with ThreadPoolExecutor(16) as threads:
        assert all(threads.map(call, range(64)))

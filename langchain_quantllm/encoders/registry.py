"""Loaded encoders: one for each spec in memory, shared by all who ask for it."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Sequence
from typing import Any

from langchain_quantllm.compat.packages import label_of
from langchain_quantllm.encoders.load import ReadEncoder, device_of, load
from langchain_quantllm.encoders.processes import EncoderProcess
from langchain_quantllm.encoders.spec import EncoderSpec
from langchain_quantllm.encoders.work import UNLOADED, Operation, Work
from langchain_quantllm.encoders.worker import EncoderWorker, Runner
from langchain_quantllm.engine.process import check_process, note_loading
from langchain_quantllm.errors import EncodingError
from langchain_quantllm.loading.devices import devices_of, release_memory
from langchain_quantllm.loading.handles import Handle, get_or_make
from langchain_quantllm.memory import MemoryReport, memory_notes, take_snapshot, weights_by_kind
from langchain_quantllm.memory.weights import parameter_counts

MOST_TOKENS = 16_384
"""Most tokens of a batch, padding included, on an accelerator; see `default_most_tokens`."""

_MOST_CPU_TOKENS = 4_096


class LoadedEncoder:
    """An encoder with its weights in memory, shared by all instances with the same spec."""

    def __init__(self, read: ReadEncoder, spec: EncoderSpec) -> None:
        """Hold a loaded model.

        Args:
            read: The model, with its scheme and the memory that loading took.
            spec: What it was loaded for, its device named.
        """
        self.model: Any = read.model
        self.spec = spec
        self.scheme = read.scheme
        self.tracked = read.tracked
        self.weights = weights_by_kind(read.model)
        self.devices = devices_of(read.model)
        self.bytes_16bit = 2 * parameter_counts(read.model)[1]
        self.lock = threading.RLock()
        self.tokenizer_lock = threading.Lock()
        """Held while the tokenizer is used: its settings change during a call."""
        self.handle: Handle | None = None
        """Its entry in the registry, kept alive by it."""
        self._workers: dict[tuple[str, ...], EncoderWorker] = {}
        self._processes: list[EncoderProcess] = []

    @property
    def closed(self) -> bool:
        """Whether the weights were released."""
        return self.model is None

    @property
    def default_most_tokens(self) -> int:
        """Most tokens of a batch, padding included, where the caller gives no other number."""
        return _MOST_CPU_TOKENS if self.devices[:1] == ("cpu",) else MOST_TOKENS

    def submit(
        self,
        operation: Operation,
        items: Sequence[Any],
        *,
        sizes: Sequence[int],
        most_tokens: int | None = None,
        most_items: int | None = None,
        progress: Callable[[int], None] | None = None,
        further_devices: Sequence[str] = (),
    ) -> Work:
        """Queue a call, whose items share batches with those of other calls.

        Args:
            operation: The operation.
            items: Its items; none give a call that has ended.
            sizes: A rough size of each item, such as its characters.
            most_tokens: Most tokens of a batch, padding included; None is `default_most_tokens`.
            most_items: Most items of a batch; None bounds the tokens alone.
            progress: Is told the number of further items that are done, in another thread.
            further_devices: Devices with processes of their own, which load the model too and stay until `close`.

        Raises:
            EncodingError: If the model was unloaded.
            UnsupportedError: If this process was forked off the one that loaded the model, or starts no more threads.
        """
        work = Work(
            self,
            operation,
            items,
            sizes=sizes,
            most_tokens=most_tokens or self.default_most_tokens,
            most_items=most_items,
            progress=progress,
        )
        if not len(items):
            work.finish([])
            return work
        self.worker(further_devices).submit(work)
        return work

    def worker(self, further_devices: Sequence[str] = ()) -> EncoderWorker:
        """Return the threads over the model, and over its copies on further devices."""
        check_process()
        with self.lock:
            if self.closed:
                raise EncodingError(UNLOADED)
            key = tuple(further_devices)
            if key not in self._workers:
                runners: list[Runner] = [_Here()]
                for device in further_devices:
                    spec = dataclasses.replace(self.spec, device=device, progress=False)
                    spec = dataclasses.replace(spec, device=device_of(spec))  # checked before a process is started
                    process = EncoderProcess(spec)
                    self._processes.append(process)
                    runners.append(process)
                self._workers[key] = EncoderWorker(self, runners)
            return self._workers[key]

    def memory_report(self, model_id: str) -> MemoryReport:
        """Report the model's memory: before, during and after loading.

        Args:
            model_id: Name of the model in the report.
        """
        now = take_snapshot(self.devices)
        return MemoryReport(
            model_id=model_id,
            scheme_name=label_of(self.scheme),
            devices=self.devices,
            weights=self.weights,
            before=self.tracked.before,
            after_loading=self.tracked.after,
            peak_loading=self.tracked.peak,
            bytes_16bit=self.bytes_16bit,
            notes=memory_notes(now, self.weights),
        )

    def close(self) -> None:
        """Fail calls under way, end the processes on further devices, and release the weights.

        Instances that share the model load it again at their next call.

        Raises:
            UnsupportedError: If this process was forked off the one that loaded it.
        """
        check_process()
        with self.lock:
            workers, self._workers = list(self._workers.values()), {}
            processes, self._processes = self._processes, []
            self.model = None
        for worker in workers:
            worker.stop()
        for process in processes:
            process.close()
        for worker in workers:
            worker.join()
        release_memory()


class _Here:
    """The runner on the encoder's own model."""

    def prepare(self) -> None:
        """Do nothing: the model is loaded."""

    def run(self, encoder: LoadedEncoder, operation: Operation, items: Sequence[Any]) -> Sequence[Any]:
        """Run an operation, while nobody else uses the tokenizer."""
        model = encoder.model
        if model is None:
            raise EncodingError(UNLOADED)
        with encoder.tokenizer_lock:
            return operation.run(model, items)


def get_or_load(spec: EncoderSpec) -> LoadedEncoder:
    """Return the encoder of a spec; load it if it is not in memory.

    Safe to call from many threads; the weights are read once. The encoder lives as long as anybody holds the result.

    Raises:
        QuantLLMError: As `encoders.load.load` raises it.
    """
    note_loading()
    spec = dataclasses.replace(spec, device=device_of(spec))
    return get_or_make(spec.key(), lambda: LoadedEncoder(load(spec), spec))

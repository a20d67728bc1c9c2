"""An overview of quantization schemes on one model and one machine: memory, speed, training and quality.

Owns what is measured of each scheme, in which order, and that one failure leaves the rest standing. Prints nothing;
the command line does.

Source: the parts are those of https://huggingface.co/blog/overview-quantization-transformers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from langchain_quantllm.bench.memory import measure_sizes, touch_device
from langchain_quantllm.bench.overview_calls import ENGINE, GENERATE, Calls
from langchain_quantllm.bench.overview_results import (
    CallSpeed,
    Failure,
    MemoryUse,
    OverviewOptions,
    Quality,
    SchemeOverview,
    Subject,
    reason_of,
)
from langchain_quantllm.bench.quality import perplexity
from langchain_quantllm.bench.speed import unread_bytes
from langchain_quantllm.bench.speed_results import CopySpeed
from langchain_quantllm.bench.training import TrainingStep, check_peft, kernels_of, measure_training
from langchain_quantllm.bench.warmup import touch_kernel, touch_libraries
from langchain_quantllm.compat.library_logging import without_torchao
from langchain_quantllm.compat.packages import label_of
from langchain_quantllm.errors import InvalidOptionError, UnsupportedError
from langchain_quantllm.llms import QuantizedHuggingFaceLLM
from langchain_quantllm.loading.devices import release_memory
from langchain_quantllm.loading.estimate import estimate_memory
from langchain_quantllm.loading.gptq import read_gptq_folder
from langchain_quantllm.loading.sources import stored_quantization
from langchain_quantllm.memory import track_memory
from langchain_quantllm.memory.measure import device_name
from langchain_quantllm.schemes import GPTQ, scheme_from

_ROW_SLACK_TOKENS = 64  # pages that are not full, and the step that is on its way
_POOL_SLACK = 1.1


def subjects_of(
    schemes: Mapping[str, str], checkpoints: Mapping[str, str] | None = None, *, kernel: str = "auto"
) -> list[Subject]:
    """Name what is measured: schemes of a model, and checkpoints that are quantized already.

    Args:
        schemes: Folder or repository for each scheme's name; `"gptq"` needs one of its own.
        checkpoints: Folder or repository for each label.
        kernel: Kernel for GPTQ, or several with commas: a row for each, whose label ends with the kernel's name.

    Raises:
        InvalidOptionError: If a scheme or kernel is not known, or a label stands for two.
    """
    given: list[tuple[str, str, str | None, bool]] = [
        (name, folder, name, isinstance(scheme_from(name), GPTQ)) for name, folder in schemes.items()
    ]
    given += [(label, folder, None, _is_gptq(folder)) for label, folder in (checkpoints or {}).items()]
    kernels = kernel.split(",")
    subjects: dict[str, Subject] = {}
    for name, folder, scheme, is_gptq in given:
        for one in kernels if is_gptq else ("",):
            label = f"{name}-{one.strip()}" if is_gptq and len(kernels) > 1 else name
            if label in subjects:
                msg = f"the label {label!r} stands for two rows; call the checkpoint {folder} something else."
                raise InvalidOptionError(msg)
            quantization = GPTQ(kernel=one.strip()) if is_gptq else scheme
            subjects[label] = Subject(label=label, model_id=folder, quantization=quantization)
    return list(subjects.values())


def _is_gptq(model_id: str) -> bool:
    if Path(model_id).is_dir():
        return read_gptq_folder(Path(model_id)) is not None
    return (stored_quantization(model_id) or {}).get("quant_method") == "gptq"


def measure_overview(
    subjects: Sequence[Subject],
    *,
    device: str,
    options: OverviewOptions,
    copy_speed: CopySpeed,
    text: str | None = None,
    dtype: str = "auto",
    report: Callable[[str], None] = lambda _: None,
) -> Iterator[SchemeOverview]:
    """Load one subject after another and measure it; what fails is noted in its row, and the rest goes on.

    Args:
        subjects: What is measured.
        device: Device for the weights, such as `"cuda:0"`.
        options: What is measured of each.
        copy_speed: The device's, for the limits.
        text: The text whose perplexity is measured; None leaves the quality out.
        dtype: Dtype of what is not quantized.
        report: Called with a line for each finished measurement.

    Yields:
        A row for each subject; its weights are unloaded by then.

    Raises:
        MissingPackageError: If an adapter is to be trained and peft is not installed.
    """
    if "training" in options.parts:
        check_peft()
    device = device_name(device)
    touch_device(device)
    touch_libraries(device, trains="training" in options.parts)
    kernels = {s.quantization.kernel for s in subjects if isinstance(s.quantization, GPTQ)}
    for kernel in sorted(kernels):
        took_s = touch_kernel(kernel, device)
        report(f"kernel {kernel} of GPTQ was ready after {took_s:.1f} s")
    for subject in subjects:
        release_memory()
        fields = {
            "model_id": subject.model_id,
            "quantization": subject.quantization,
            "device": device,
            "dtype": dtype,
            "progress": False,
        }
        yield _Overview(subject, fields, device, options, report).measure(copy_speed, text)


class _Overview:
    """The measurements of one subject."""

    def __init__(
        self,
        subject: Subject,
        fields: dict[str, Any],
        device: str,
        options: OverviewOptions,
        report: Callable[[str], None],
    ) -> None:
        self._subject = subject
        self._fields = fields
        self._device = device
        self._options = options
        self._write = report
        self._failures: list[Failure] = []

    def measure(self, copy_speed: CopySpeed, text: str | None) -> SchemeOverview:
        """Load, measure and unload."""
        row = SchemeOverview(label=self._subject.label, model_id=self._subject.model_id)
        before = measure_sizes(self._device)
        llm = QuantizedHuggingFaceLLM(
            **self._fields,
            prefix_caching=False,
            do_sample=False,
            repetition_penalty=1.0,  # whatever the checkpoint says: one kind of step for all
            ignore_eos=True,
            kv_cache_memory=self._attempt("estimate", self._pool_bytes),
        )
        try:
            loaded = self._attempt("loading", partial(self._load, llm, row, before, copy_speed))
            if loaded is not None:
                row = self._measure_loaded(llm, loaded, text)
        finally:
            llm.unload()
        release_memory()
        if "training" in self._options.parts and row.scheme is not None and row.training is None and self._is_apart:
            row = replace(row, training=self._attempt("training", self._train_apart))
            release_memory()
        return replace(row, failures=tuple(self._failures))

    def _report(self, line: str) -> None:
        self._write(f"{self._subject.label}: {line}")

    def _attempt(self, part: str, measure: Callable[[], Any]) -> Any:
        """Measure something; where that does not work, note it as a failure and give None."""
        try:
            return measure()
        except Exception as error:  # whatever a kernel or a library says belongs into the row
            reason = reason_of(error)
        # Outside of the handler, whose error holds on to the tensors of what failed.
        release_memory()
        self._failures.append(Failure(part=part, reason=reason))
        self._report(f"{part} failed: {reason}")
        return None

    # Loading and memory.

    def _pool_bytes(self) -> int | None:
        """Give the KV cache that the largest call needs: by itself it would grow with the device."""
        options = self._options
        rows = [(1, length + options.prompt_tokens) for length in options.lengths]
        rows += [(batch, options.new_tokens + options.prompt_tokens) for batch in options.batches]
        rows += [(batch, options.prefill_tokens + 1) for batch in options.prefill_batches]
        tokens = max((batch * (tokens + _ROW_SLACK_TOKENS) for batch, tokens in rows), default=_ROW_SLACK_TOKENS)
        try:
            with without_torchao():
                estimate = estimate_memory(self._subject.model_id, dtype=self._fields["dtype"])
            return int(_POOL_SLACK * estimate.kv_cache_bytes(tokens))
        except UnsupportedError:  # a model without a formula
            return None

    def _load(
        self, llm: QuantizedHuggingFaceLLM, row: SchemeOverview, before: Any, copy_speed: CopySpeed
    ) -> SchemeOverview:
        with track_memory([self._device]) as tracked:
            began = time.perf_counter()
            llm.load()
            load_s = time.perf_counter() - began
        model = llm.pipeline.model
        after = measure_sizes(self._device).since(before)
        weights_bytes = llm.memory_report().weights.total_bytes
        read_bytes = weights_bytes - unread_bytes(model)
        limit_tok_s = copy_speed.rate_byte_s / read_bytes
        memory = MemoryUse(
            before_bytes=before.allocated_bytes,
            weights_bytes=weights_bytes,
            read_bytes=read_bytes,
            loaded_bytes=after.allocated_bytes,
            loaded_driver_bytes=after.driver_bytes,
            peak_loading_bytes=tracked.peak[self._device] - before.allocated_bytes,
            peak_bytes=after.allocated_bytes,
        )
        self._report(f"loaded in {load_s:.1f} s; at most {limit_tok_s:.1f} tokens/s by bandwidth")
        return replace(
            row,
            scheme=label_of(llm.scheme),
            kernels=kernels_of(model),
            load_s=load_s,
            memory=memory,
            limit_tok_s=limit_tok_s,
        )

    # The parts. Training comes before the first evaluation, which repacks 4-bit weights on some CPUs so that they
    # cannot be trained on; our engine comes last, as it sets memory aside that `generate` should not be blamed for.

    def _measure_loaded(self, llm: QuantizedHuggingFaceLLM, row: SchemeOverview, text: str | None) -> SchemeOverview:
        parts, memory = self._options.parts, row.memory
        assert memory is not None
        if "training" in parts and not self._is_apart:
            row = replace(row, training=self._attempt("training", lambda: self._train(llm, memory.before_bytes)))
        calls = self._attempt("prompts", partial(self._make_calls, llm, memory.before_bytes))
        if calls is not None and self._options.peer:
            row = self._measure_calls(calls, GENERATE, row)
        if calls is not None and "cache" in parts:
            row = replace(row, by_cache=self._collect("cache", calls.by_cache, (True, False)))
        if "quality" in parts and text is not None:
            row = replace(row, quality=self._attempt("quality", lambda: self._measure_quality(llm, text)))
        if calls is not None and {"prefill", "batches", "lengths"} & set(parts):
            info = self._attempt("engine", lambda: llm.engine_info)
            if info is not None:
                self._report(f"{info.name} engine: {info.reason}")
                row = replace(row, engine=info.name, engine_reason=info.reason, graphs=info.graphs)
                row = self._measure_calls(calls, ENGINE, row)
        found = (*row.prefill, *row.by_batch, *row.by_length, *row.by_cache)
        peak_bytes = max((call.peak_bytes for call in found), default=memory.loaded_bytes)
        return replace(row, memory=replace(memory, peak_bytes=max(peak_bytes, memory.loaded_bytes)))

    def _make_calls(self, llm: QuantizedHuggingFaceLLM, before_bytes: int) -> Calls:
        return Calls(llm, device=self._device, options=self._options, before_bytes=before_bytes, report=self._report)

    def _measure_calls(self, calls: Calls, runner: str, row: SchemeOverview) -> SchemeOverview:
        options, parts = self._options, self._options.parts
        for part, name, measure, values in (
            ("prefill", "prefill", calls.prefill, options.prefill_batches),
            ("batches", "by_batch", calls.by_batch, options.batches),
            ("lengths", "by_length", calls.by_length, options.lengths),
        ):
            if part in parts:
                found = self._collect(f"{part}, {runner}", partial(measure, runner), values)
                extended: dict[str, Any] = {name: (*getattr(row, name), *found)}
                row = replace(row, **extended)
        return row

    def _collect(self, part: str, measure: Callable[[Any], CallSpeed], values: Sequence[Any]) -> tuple[CallSpeed, ...]:
        found = (self._attempt(f"{part}, {value}", partial(measure, value)) for value in values)
        return tuple(call for call in found if call is not None)

    def _measure_quality(self, llm: QuantizedHuggingFaceLLM, text: str) -> Quality:
        options, pipeline = self._options, llm.pipeline
        found = perplexity(
            pipeline.model,
            pipeline.tokenizer,
            text,
            window_tokens=options.window_tokens,
            max_tokens=options.quality_tokens,
        )
        self._report(f"perplexity {found.perplexity:.3f} over {found.tokens} tokens")
        return Quality(perplexity=found.perplexity, loss_nats=found.loss_nats, tokens=found.tokens)

    # Training.

    @property
    def _is_apart(self) -> bool:
        """Whether training takes a load of its own: the fast kernels of GPTQ cannot train, others stay slow after."""
        return isinstance(self._subject.quantization, GPTQ)

    def _train_apart(self) -> TrainingStep:
        kernel = "torch" if self._device == "cpu" else "triton"
        before_bytes = measure_sizes(self._device).allocated_bytes
        llm = QuantizedHuggingFaceLLM(**{**self._fields, "quantization": GPTQ(kernel=kernel)})
        try:
            return self._train(llm.load(), before_bytes)
        finally:
            llm.unload()

    def _train(self, llm: QuantizedHuggingFaceLLM, before_bytes: int) -> TrainingStep:
        options = self._options
        found = measure_training(
            llm.pipeline.model,
            device=self._device,
            batch=options.train_batch,
            tokens=options.train_tokens,
            rank=options.rank,
            repeats=options.repeats,
            limit_s=options.limit_s,
        )
        self._report(f"training: forward {found.forward_s:.3f} s, backward {found.backward_s:.3f} s")
        return replace(found, peak_bytes=found.peak_bytes - before_bytes)

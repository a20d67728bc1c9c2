"""The runner of every bench: loads one scheme after another and makes the measurements of the options.

A measurement that fails becomes a record with its reason, and the rest goes on.

Source: the measurements of the overview are those of
https://huggingface.co/blog/overview-quantization-transformers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from langchain_quantllm.bench.checks import QualityChecks
from langchain_quantllm.bench.generation import (
    ENGINE,
    GENERATE,
    LoadedModel,
    measure_call,
    measure_generation,
    measure_long_prompt,
    measure_shared_prefix,
    most_tokens,
    time_bare_step,
)
from langchain_quantllm.bench.harness_tasks import TaskFiles
from langchain_quantllm.bench.memory import measure_generating, measure_sizes
from langchain_quantllm.bench.options import QUALITY, BenchOptions
from langchain_quantllm.bench.peer import make_peer_pipeline, measure_peer, peer_cases
from langchain_quantllm.bench.prompts import Prompts
from langchain_quantllm.bench.records import Record
from langchain_quantllm.bench.subjects import Subject
from langchain_quantllm.bench.training import check_peft, kernels_of, measure_training
from langchain_quantllm.bench.warmup import warm_up
from langchain_quantllm.compat.library_logging import without_torchao
from langchain_quantllm.compat.packages import label_of
from langchain_quantllm.errors import InvalidOptionError, QuantLLMError
from langchain_quantllm.llms import QuantizedHuggingFaceLLM
from langchain_quantllm.loading.devices import release_memory
from langchain_quantllm.memory import estimate_memory, track_memory
from langchain_quantllm.memory.measure import device_name
from langchain_quantllm.schemes import GPTQ

_ROW_SLACK_TOKENS = 64  # blocks that are not full, and the step that is on its way
_POOL_SLACK = 1.1
_LEAST_CACHE_TOKENS = 256
_CHECKS_CACHE_TOKENS = 16384


def run_bench(
    subjects: Sequence[Subject],
    *,
    device: str,
    options: BenchOptions,
    copy: Mapping[str, float] | None = None,
    text: str | None = None,
    tasks: TaskFiles | None = None,
    report: Callable[[str], None] = lambda _: None,
) -> Iterator[list[Record]]:
    """Load one subject after another and measure it.

    Args:
        subjects: Models and schemes.
        device: Device for the weights, such as `"cuda:0"`.
        options: The measurements.
        copy: The device's copying speed, as `measure_copy` gives it, for the limits; None leaves them out.
        text: Text for the perplexity; None leaves the quality out.
        tasks: Tasks of lm-evaluation-harness, for `"tasks"`.
        report: Called with a line for each finished measurement.

    Yields:
        The records of each subject, failures included; its weights are unloaded by then.

    Raises:
        MissingPackageError: If an adapter is to be trained and peft is not installed.
    """
    trains = "training" in options.measurements
    if trains:
        check_peft()
    device = device_name(device)
    checks = QualityChecks(options, text, tasks)
    warm_up(device, [subject.quantization for subject in subjects], trains=trains, report=report)
    for subject in subjects:
        release_memory()
        yield _SubjectBench(subject, device, options, report, checks).run(copy)
        release_memory()


class _SubjectBench:
    """The measurements of one subject."""

    def __init__(
        self,
        subject: Subject,
        device: str,
        options: BenchOptions,
        report: Callable[[str], None],
        checks: QualityChecks,
    ) -> None:
        self._checks = checks
        self._subject = subject
        self._device = device
        self._options = options
        self._asked = set(options.measurements)
        self._write = report
        self._loading_fields = {
            "model_id": subject.model_id,
            "quantization": subject.quantization,
            "device": device,
            "progress": False,
        }
        self._fields: dict[str, Any] = {
            **self._loading_fields,
            "do_sample": False,
            "repetition_penalty": 1.0,  # not the checkpoint's: one kind of step for all
            "ignore_eos": True,
            "batch_size": options.memory_batch if "memory" in self._asked else None,
        }
        self._records: list[Record] = []

    def run(self, copy: Mapping[str, float] | None) -> list[Record]:
        """Load, measure and unload."""
        self._before = measure_sizes(self._device)
        if "memory" in self._asked:
            self._record("estimate", {}, self._estimate)
        pool_bytes = self._attempt("KV cache", {}, self._pool_bytes)
        llm = QuantizedHuggingFaceLLM(**self._fields, prefix_caching=False, kv_cache_memory=pool_bytes)
        try:
            loading = self._record("loading", {}, partial(self._load, llm, copy))
            if loading is not None:
                self._measure_loaded(llm, loading, pool_bytes)
        finally:
            llm.unload()
        if loading is not None:
            self._record("unloading", {}, lambda: measure_sizes(self._device).since(self._before))
        release_memory()
        if "training" in self._asked and loading is not None and self._trains_apart:
            self._record("training", {}, self._train_apart)
            release_memory()
        return self._records

    def _report(self, line: str) -> None:
        self._write(f"{self._subject.label}: {line}")

    def _attempt(self, measurement: str, case: dict[str, Any], measure: Callable[[], Any]) -> Any:
        """Run a function; where it fails, record the failure and return None."""
        try:
            return measure()
        except Exception as error:  # any error of a kernel or a library belongs into the record
            reason = reason_of(error)
        # Outside of the handler, whose error holds on to the tensors of the failed call.
        release_memory()
        failed = Record(scheme=self._subject.label, measurement=measurement, case=case, failure=reason)
        self._records.append(failed)
        self._report(f"{failed.title} failed: {reason}")
        return None

    def _record(self, measurement: str, case: dict[str, Any], measure: Callable[[], Any]) -> dict[str, Any] | None:
        """Measure a case and record its values, or its failure; values of None leave the case out."""
        values: dict[str, Any] | None = self._attempt(measurement, case, measure)
        if values is not None:
            found = Record(scheme=self._subject.label, measurement=measurement, case=case, values=values)
            self._records.append(found)
        return values

    # Loading and memory.

    def _estimate(self) -> dict[str, Any]:
        scheme = None if isinstance(self._subject.quantization, GPTQ) else self._subject.quantization
        found = estimate_memory(self._subject.model_id, scheme, dtype="auto")
        return {"estimate_bytes": found.total_bytes}

    def _pool_bytes(self) -> int | None:
        """Size of the KV cache for the largest call: by itself it would grow with the device."""
        options = self._options
        if "generation" in self._asked:
            return None
        if "memory" in self._asked:
            tokens = options.memory_batch * max(_LEAST_CACHE_TOKENS, options.new_tokens + _ROW_SLACK_TOKENS)
            slack = 1.0
        elif self._asked & set(QUALITY):
            tokens, slack = max(_CHECKS_CACHE_TOKENS, 2 * max(options.retrieval_tokens, default=0)), 1.0
        else:
            rows = [(1, length + options.prompt_tokens) for length in options.lengths]
            rows += [(batch, options.new_tokens + options.prompt_tokens) for batch in options.batches]
            rows += [(batch, options.prefill_tokens + 1) for batch in options.prefill_batches]
            tokens = max((batch * (tokens + _ROW_SLACK_TOKENS) for batch, tokens in rows), default=_ROW_SLACK_TOKENS)
            slack = _POOL_SLACK
        try:
            with without_torchao():
                estimate = estimate_memory(self._subject.model_id, dtype="auto")
            return int(slack * estimate.kv_cache_bytes(tokens))
        except QuantLLMError:  # a model without a formula; what else is wrong with it, loading tells
            return None

    def _load(self, llm: QuantizedHuggingFaceLLM, copy: Mapping[str, float] | None) -> dict[str, Any]:
        """Load the weights.

        Returns:
            `scheme_name` of the scheme that holds the weights; `kernels`, classes of the quantized layers; `load_s`;
            `before_bytes` in use before, the CUDA context and the libraries' workspaces included; `allocated_bytes`,
            `reserved_bytes`, `driver_bytes` after loading and `peak_bytes` while loading, above those before;
            `weights_bytes` of all weights, counted; `read_bytes` of the weights that each step reads: without the
            input embedding, unless it is the head's, too; `limit_tok_s`, tokens/s of one text if a step took only as
            long as reading these, keys and values not counted.
        """
        with track_memory([self._device]) as tracked:
            began = time.perf_counter()
            llm.load()
            load_s = time.perf_counter() - began
        after = measure_sizes(self._device).since(self._before)
        weights_bytes = llm.memory_report().weights.total_bytes
        read_bytes = weights_bytes - unread_bytes(llm.pipeline.model)
        limit_tok_s = None if copy is None else copy["rate_byte_s"] / read_bytes
        bound = "" if limit_tok_s is None else f"; at most {limit_tok_s:.1f} tokens/s by bandwidth"
        self._report(f"loaded in {load_s:.1f} s{bound}")
        return {
            "scheme_name": label_of(llm.scheme),
            "kernels": kernels_of(llm.pipeline.model),
            "load_s": load_s,
            "before_bytes": self._before.allocated_bytes,
            **after,
            "peak_bytes": tracked.peak[self._device] - self._before.allocated_bytes,
            "weights_bytes": weights_bytes,
            "read_bytes": read_bytes,
            "limit_tok_s": limit_tok_s,
        }

    # Training comes before the first evaluation, which repacks 4-bit weights on some CPUs so that they cannot be
    # trained on; our engine comes last, as it sets memory aside that `generate` should not be blamed for.

    def _measure_loaded(self, llm: QuantizedHuggingFaceLLM, loading: dict[str, Any], pool_bytes: int | None) -> None:
        options, asked = self._options, self._asked
        if "training" in asked and not self._trains_apart:
            self._record("training", {}, partial(self._train, llm, self._before.allocated_bytes))
        if "memory" in asked:
            sizes = {"batch": options.memory_batch, "new_tokens": options.new_tokens}
            measure = partial(measure_generating, llm, device=self._device, before=self._before, **sizes)
            self._record("memory", sizes, measure)
        if asked & set(QUALITY):
            self._check(llm, pool_bytes)
            return
        calls = asked - {"training", "memory", "quality"}
        loaded = self._attempt("prompts", {}, partial(self._with_prompts, llm)) if calls else None
        if loaded is not None and options.peer:
            self._measure_calls(loaded, GENERATE)
        if loaded is not None and "cache" in asked:
            for use_cache in (True, False):
                lengths = (options.prompt_tokens, options.cache_new_tokens)
                measure = partial(measure_call, loaded, GENERATE, 1, *lengths, use_cache=use_cache)
                self._record("cache", {"use_cache": use_cache}, measure)
        if "quality" in asked and self._checks.has_text:
            self._record("quality", {}, partial(self._checks.predictions, llm, "layers", self._report))
        if loaded is None or not calls - {"cache"}:
            return
        if self._record("engine", {}, partial(self._engine_info, llm)) is not None:
            self._measure_calls(loaded, ENGINE)
            if "generation" in asked:
                self._measure_speed(loaded, loading["limit_tok_s"])

    def _check(self, llm: QuantizedHuggingFaceLLM, pool_bytes: int | None) -> None:
        """Make the checks of the quality, each of which may give several records."""
        fields = {**self._loading_fields, "kv_cache_memory": pool_bytes}
        for measurement, case, measure in self._checks.parts(llm, fields, self._report):
            for found, values in self._attempt(measurement, case, measure) or ():
                made = Record(scheme=self._subject.label, measurement=measurement, case=found, values=values)
                self._records.append(made)

    def _with_prompts(self, llm: QuantizedHuggingFaceLLM) -> LoadedModel:
        return LoadedModel(
            llm=llm,
            device=self._device,
            options=self._options,
            prompts=Prompts(llm.pipeline.tokenizer),
            before_bytes=self._before.allocated_bytes,
            report=self._report,
        )

    def _engine_info(self, llm: QuantizedHuggingFaceLLM) -> dict[str, Any]:
        """Name of the engine, the reason for it and for parts that are off, and whether it has CUDA graphs."""
        info = llm.engine_info
        self._report(f"{info.name} engine: {info.reason}")
        return {"name": info.name, "reason": info.reason, "graphs": info.graphs}

    def _measure_calls(self, loaded: LoadedModel, runner: str) -> None:
        """Measure the calls of an overview with one runner: prefill, generation by batch, and by length."""
        options = self._options
        new_tokens = options.new_tokens if runner == ENGINE else options.peer_new_tokens
        for measurement, calls in {
            "prefill": [(batch, options.prefill_tokens, 1) for batch in options.prefill_batches],
            "batches": [(batch, options.prompt_tokens, new_tokens) for batch in options.batches],
            "lengths": [(1, options.prompt_tokens, length) for length in options.lengths],
        }.items():
            if measurement in self._asked:
                for call in calls:
                    size = {"asked_tokens": call[2]} if measurement == "lengths" else {"batch": call[0]}
                    measure = partial(measure_call, loaded, runner, *call)
                    self._record(measurement, {"runner": runner, **size}, measure)

    def _measure_speed(self, loaded: LoadedModel, limit_tok_s: float | None) -> None:
        """Measure our engine in depth, and langchain-huggingface over the same weights."""
        options = self._options
        if self._attempt("generation", {}, partial(_check_room, loaded)) is None:
            return
        bare_s = {
            batch: self._attempt("bare step", {"batch": batch}, partial(time_bare_step, loaded, batch))
            for batch in options.batches
        }
        rates_tok_s = {}
        for batch in options.batches:
            measure = partial(measure_generation, loaded, batch, bare_step_s=bare_s[batch], limit_tok_s=limit_tok_s)
            if (values := self._record("generation", {"batch": batch}, measure)) is not None:
                rates_tok_s[batch] = values["rate_tok_s"]
        if "long_prompt" in self._asked:
            self._record("long_prompt", {}, partial(measure_long_prompt, loaded))
        if "shared_prefix" in self._asked:
            sharing = QuantizedHuggingFaceLLM(**self._fields, prefix_caching=True)  # over the same weights
            self._record("shared_prefix", {}, partial(measure_shared_prefix, loaded, sharing))
        if options.peer and (pipeline := self._attempt("peer", {}, partial(make_peer_pipeline, loaded))) is not None:
            for batch, size in peer_cases(options.batches):
                measure = partial(measure_peer, loaded, pipeline, batch, size, rates_tok_s.get(batch))
                self._record("peer", {"batch": batch, "batch_size": size}, measure)

    # Training.

    @property
    def _trains_apart(self) -> bool:
        """Whether training takes a load of its own: the fast kernels of GPTQ cannot train, others stay slow after."""
        return isinstance(self._subject.quantization, GPTQ)

    def _train_apart(self) -> dict[str, Any]:
        kernel = "torch" if self._device == "cpu" else "triton"
        before_bytes = measure_sizes(self._device).allocated_bytes
        llm = QuantizedHuggingFaceLLM(**{**self._loading_fields, "quantization": GPTQ(kernel=kernel)})
        try:
            return self._train(llm.load(), before_bytes)
        finally:
            llm.unload()

    def _train(self, llm: QuantizedHuggingFaceLLM, before_bytes: int) -> dict[str, Any]:
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
        self._report(f"training: forward {found['forward_s']:.3f} s, backward {found['backward_s']:.3f} s")
        return {**found, "peak_bytes": found["peak_bytes"] - before_bytes}


def _check_room(loaded: LoadedModel) -> bool:
    """Check that prompt and text fit, and make one call, which starts threads and loads kernels."""
    options, room = loaded.options, most_tokens(loaded.llm)
    if options.prompt_tokens + options.new_tokens > room:
        msg = (
            f"prompt_tokens={options.prompt_tokens} and new_tokens={options.new_tokens} do not fit into the "
            f"{room} tokens of the model's context or the KV cache; ask for fewer."
        )
        raise InvalidOptionError(msg)
    loaded.call(1, options.prompt_tokens, 2)
    return True


def unread_bytes(model: Any) -> int:
    """Bytes of the input embedding, of which a step reads some rows only; 0 where it is the head's, too."""
    embedding = model.get_input_embeddings().weight
    head = getattr(model.get_output_embeddings(), "weight", None)  # a packed one has none
    is_tied = head is not None and head.data_ptr() == embedding.data_ptr()
    return 0 if is_tied else int(embedding.nbytes)


def reason_of(error: Exception) -> str:
    """The reason of a failure in one line."""
    line = str(error).strip().partition("\n")[0]
    return line if isinstance(error, ValueError | OSError) and line else f"{type(error).__name__}: {line}".rstrip(": ")

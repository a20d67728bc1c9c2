"""The parts of `bench --quality` for one loaded model, each a list of cases with values.

Every value has its interval of 95%; where another scheme was asked the same, `records.with_baseline` adds the
difference.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

from langchain_quantllm.bench.answers import (
    MODES,
    call_questions,
    measure_calls,
    measure_outputs,
    output_questions,
)
from langchain_quantllm.bench.harness import engine_products, run_tasks
from langchain_quantllm.bench.harness_tasks import TaskFiles
from langchain_quantllm.bench.intervals import Interval
from langchain_quantllm.bench.options import BenchOptions
from langchain_quantllm.bench.quality import Distance, Reference, perplexity
from langchain_quantllm.bench.retrieval import measure_retrieval
from langchain_quantllm.llms import QuantizedHuggingFaceLLM
from langchain_quantllm.schemes import Unquantized

Cases = list[tuple[dict[str, Any], dict[str, Any]]]
"""Cases with their values."""


class QualityChecks:
    """The checks of one bench; the first unquantized model becomes the reference of the others."""

    def __init__(self, options: BenchOptions, text: str | None, tasks: TaskFiles | None = None) -> None:
        """Take what is the same for all models.

        Args:
            options: How many questions, how long, and how many tokens.
            text: Text for perplexity and divergence; None leaves them out.
            tasks: Tasks of lm-evaluation-harness; None leaves them out.
        """
        self._options, self._text, self._tasks = options, text, tasks
        self._reference: Reference | None = None

    @property
    def has_text(self) -> bool:
        """Whether there is a text for perplexity and divergence."""
        return self._text is not None

    def parts(
        self, llm: QuantizedHuggingFaceLLM, fields: Mapping[str, Any], report: Callable[[str], None]
    ) -> Iterator[tuple[str, dict[str, Any], Callable[[], Cases]]]:
        """List the checks of a model: measurement, case of a failure, and what measures it.

        Args:
            llm: The loaded model.
            fields: Fields of a model over the same weights and the same KV cache.
            report: Called with a line for each finished measurement.
        """
        options = self._options
        asked = set(options.measurements)
        greedy = {**fields, "temperature": 0, "repetition_penalty": 1.0}
        if "predictions" in asked and self._text is not None:
            # The layers first: the engine's kernels may repack their weights.
            for by in ("layers", "engine"):
                measure = partial(self.predictions, llm, by, report)
                yield "predictions", {"by": by}, partial(_one_case, {"by": by}, measure)
        for mode in MODES:
            if "tool_calls" in asked:
                calls = call_questions()[: options.questions]
                yield "tool_calls", {"mode": mode}, _told(partial(measure_calls, greedy, calls, mode), report)
            if "json" in asked:
                outputs = output_questions()[: options.questions]
                yield "json", {"mode": mode}, _told(partial(measure_outputs, greedy, outputs, mode), report)
        if "retrieval" in asked:
            sharing = QuantizedHuggingFaceLLM(**greedy, prefix_caching=True)
            for tokens in options.retrieval_tokens:
                facts = partial(measure_retrieval, sharing, tokens, options.questions)
                yield "retrieval", {"tokens": tokens}, _told(facts, report)
        if "tasks" in asked and self._tasks is not None:
            plain = QuantizedHuggingFaceLLM(**greedy, prefix_caching=True)
            yield "tasks", {}, partial(self._run_tasks, plain, self._tasks, report)

    def predictions(
        self, llm: QuantizedHuggingFaceLLM, by: str, report: Callable[[str], None] = lambda _: None
    ) -> dict[str, Any]:
        """Predict the text, and compare with the reference; the first unquantized model becomes it.

        Args:
            llm: The loaded model.
            by: `"layers"`, the model's own, or `"engine"`, its kernels.
            report: Called with a line about the result.

        Returns:
            `perplexity` with `low` and `high`, `loss_nats`, `tokens`; and against the reference, None without one,
            `kl_nats`, `loss_increase_nats` and `agreement`, each with its interval.
        """
        model, tokenizer, options = llm.pipeline.model, llm.pipeline.tokenizer, self._options
        cut: dict[str, Any] = {"window_tokens": options.window_tokens, "max_tokens": options.quality_tokens}
        distance: Distance | None = None
        with engine_products(llm) if by == "engine" else contextlib.nullcontext():
            if self._reference is not None:
                distance = self._reference.distance(model)
                found = distance.perplexity
            elif isinstance(llm.scheme, Unquantized):
                self._reference = Reference(model, tokenizer, self._text or "", **cut)
                found = self._reference.perplexity
            else:
                found = perplexity(model, tokenizer, self._text or "", **cut)
        kl = "" if distance is None else f", divergence {distance.kl_nats.mean:.5f} nats"
        report(f"perplexity by the {by} {found.perplexity:.3f} over {found.tokens} tokens{kl}")
        compared: dict[str, Any] = {}
        for name, unit in (("kl", "_nats"), ("loss_increase", "_nats"), ("agreement", "")):
            interval: Interval | None = None if distance is None else getattr(distance, name + unit)
            compared[name + unit] = interval and interval.mean
            compared[f"{name}_interval{unit}"] = interval and [interval.low, interval.high]
        return {**asdict(found), **compared}

    def _run_tasks(self, llm: QuantizedHuggingFaceLLM, tasks: TaskFiles, report: Callable[[str], None]) -> Cases:
        options = self._options
        found = run_tasks(llm, tasks, limit=options.task_questions, chat=options.task_chat, report=report)
        return [
            ({"task": task, "metric": metric, "filter": kind}, values) for (task, metric, kind), values in found.items()
        ]


def _one_case(case: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> Cases:
    return [(case, measure())]


def _told(measure: Callable[[], Cases], report: Callable[[str], None]) -> Callable[[], Cases]:
    """Report the values of a measurement."""

    def run() -> Cases:
        found = measure()
        for case, values in found:
            report(f"{', '.join(map(str, case.values()))}: {values['value']:.1%} of {values['questions']}")
        return found

    return run

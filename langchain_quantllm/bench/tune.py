"""Tuning of the linear layers' kernels to this GPU: `bench --tune`.

For each product that the fast engine's steps make of a model's own weights: the rule's config and some around it, each
compared with plain torch, then timed in a CUDA graph over more distinct weights than the L2 cache holds. What is faster
goes into the table that `kernels.linear.tuned` reads, after each product, so that a run that is stopped loses nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch

from langchain_quantllm.bench.graph_timing import copies_beyond_l2, graph_us
from langchain_quantllm.bench.linear_grid import (
    QuantizedWeight,
    brief,
    grid,
    neighbours,
    relative_error,
    weight_bytes,
)
from langchain_quantllm.bench.runner import reason_of
from langchain_quantllm.bench.subjects import Subject
from langchain_quantllm.engine.fusion.fuse import LINEAR, Fusion
from langchain_quantllm.engine.fusion.linear import LinearStep
from langchain_quantllm.errors import InvalidOptionError
from langchain_quantllm.kernels.linear import reference
from langchain_quantllm.kernels.linear.config import LinearConfig, chip, config_for, has_matrix, most_rows
from langchain_quantllm.kernels.linear.tuned import Entry, Gpu, Product, gpu_of, product_of, table_file, write_table
from langchain_quantllm.kernels.linear.weights import GPTQWeight, Int8Weight
from langchain_quantllm.llms import QuantizedHuggingFaceLLM
from langchain_quantllm.loading.devices import release_memory

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Numbers of rows that are tuned; others take the config of the next larger one."""

LIMIT_S = 600.0
"""Seconds that tuning may take by default, loading and compiling included."""

_LEAST_GAIN = 0.03
_LARGEST_ERROR = {torch.float32: 0.01}
_LARGEST_ERROR_16_BITS = 0.05
"""Of a few roundings, relative to the root mean square of the result."""

Products: TypeAlias = Mapping[Product, Sequence[Sequence[QuantizedWeight]]]
"""The groups of weights of each product."""


@dataclass(frozen=True, kw_only=True)
class TuneReport:
    """What a run has measured.

    Args:
        file: The table.
        entries: Its entries of this run.
        left_out: Products, each at one number of rows, that were not reached in time or failed with every config.
        failures: Why a scheme could not be tuned, by its name.
    """

    file: Path
    entries: tuple[Entry, ...]
    left_out: int
    failures: Mapping[str, str]

    @property
    def faster(self) -> int:
        """Count the entries for which the rule is not the best."""
        return sum(entry.config is not None for entry in self.entries)

    def to_dict(self) -> dict[str, Any]:
        """Return the report, ready for JSON."""
        counts = {"measured": len(self.entries), "faster": self.faster, "left_out": self.left_out}
        return {"kind": "tune", "file": str(self.file), **counts, "failures": dict(self.failures)}


def unsupported_device(device: str | None) -> str | None:
    """Say why a device cannot be tuned for; None if it can."""
    if (device is None or device.startswith("cuda")) and torch.cuda.is_available():
        return None
    given = "there is none here" if device is None or device.startswith("cuda") else f"{device} is none"
    return f"--tune measures kernels of CUDA GPUs, and {given}; leave it out."


def tune(
    subjects: Sequence[Subject], *, device: str, limit_s: float = LIMIT_S, report: Callable[[str], None]
) -> TuneReport:
    """Load one subject after another, measure its products, and write the table.

    Args:
        subjects: Models and schemes.
        device: A CUDA device, such as `"cuda:0"`.
        limit_s: Seconds for all of it; each subject has an equal share of what is left.
        report: Called with a line for each product and number of rows.

    Raises:
        InvalidOptionError: If the device is no CUDA GPU.
        OutputError: If the table cannot be written.
    """
    gpu = gpu_of(torch.device(device))
    if gpu is None:
        msg = f"device={device!r} is no CUDA GPU, and only kernels of these can be tuned."
        raise InvalidOptionError(msg)
    end = time.monotonic() + limit_s
    write_table(gpu, ())  # fails before anything is loaded
    tuner, failures = Tuner(gpu, report=report), {}
    for place, subject in enumerate(subjects):
        now = time.monotonic()
        tuner.until = now + (end - now) / (len(subjects) - place)
        try:
            _tune_subject(tuner, subject, device)
        except Exception as error:  # of a kernel or a library, too: the other subjects go on
            failures[subject.label] = reason_of(error)
        release_memory()
    return TuneReport(file=table_file(gpu), entries=tuple(tuner.entries), left_out=tuner.left_out, failures=failures)


def _tune_subject(tuner: Tuner, subject: Subject, device: str) -> None:
    llm = QuantizedHuggingFaceLLM(
        model_id=subject.model_id, quantization=subject.quantization, device=device, progress=False
    )
    try:
        model = llm.load().pipeline.model
        with torch.cuda.device(device):
            fusion = Fusion(model, kinds=(LINEAR,))
            try:
                products = products_of(fusion.steps.values(), model.dtype)
            finally:
                fusion.close()
            if not products:
                reason = fusion.unsupported_reason or "it has no quantized linear layers with a kernel of this package"
                msg = f"nothing to tune: {reason}."
                raise InvalidOptionError(msg)
            tuner.run(products)
    finally:
        llm.unload()


def products_of(steps: Iterable[Any], dtype: torch.dtype) -> dict[Product, list[list[QuantizedWeight]]]:
    """Find the groups of weights that fused steps multiply in one launch.

    Args:
        steps: Of `Fusion.steps`; those that are no `LinearStep` over a quantized weight are left out.
        dtype: Dtype of the activations.

    Returns:
        The groups by product, each weight in one of them.
    """
    from langchain_quantllm.kernels.linear.dispatch import one_launch

    found: dict[Product, list[list[QuantizedWeight]]] = {}
    seen = set()
    for step in steps:
        if not isinstance(step, LinearStep):
            continue
        group = [weight for _, weight in step.group] or [step.weight]
        for weights in [group] if one_launch(group) else [[weight] for weight in group]:
            first = weights[0]
            product = product_of(first, sum(weight.out_features for weight in weights), dtype)
            if product is None or first.words.data_ptr() in seen:
                continue
            seen.add(first.words.data_ptr())
            found.setdefault(product, []).append(cast("list[QuantizedWeight]", weights))
    return found


@dataclass(frozen=True, kw_only=True)
class _Inputs:
    """What the measurements of one product share.

    Args:
        groups: Weights, more than the L2 cache holds.
        x: Activations of shape `(rows, in_features)`, of the most rows.
        expected: The right results of the first group, each of shape `(rows, out_features)`, float32.
    """

    groups: Sequence[Sequence[QuantizedWeight]]
    x: torch.Tensor
    expected: Sequence[torch.Tensor]


class Tuner:
    """Measures products, and writes what it has found after each."""

    def __init__(
        self,
        gpu: Gpu,
        *,
        report: Callable[[str], None],
        rows: Sequence[int] = ROWS,
        time_us: Callable[[Sequence[Callable[[], Any]]], float] = graph_us,
    ) -> None:
        """Make a tuner.

        Args:
            gpu: The kind of GPU, whose table is written.
            report: Called with a line for each product and number of rows.
            rows: Numbers of rows.
            time_us: Measures the microseconds of a call, given several.
        """
        self._gpu = gpu
        self._report = report
        self._rows = rows
        self._time_us = time_us
        self._why = ""
        self.until = float("inf")
        """`time.monotonic()` from which on nothing more is measured."""
        self.entries: list[Entry] = []
        self.left_out = 0

    def run(self, products: Products) -> None:
        """Measure products, all of them for one number of rows before the next."""
        inputs: dict[Product, _Inputs | None] = {}
        for rows in self._rows:
            for product, groups in products.items():
                dtype = getattr(torch, product.dtype)
                if rows > most_rows(groups[0][0], dtype):  # dequantized, and multiplied by cuBLAS
                    continue
                if time.monotonic() >= self.until:
                    self.left_out += 1
                    continue
                if product not in inputs:
                    inputs[product] = self._inputs(product, groups)
                made = inputs[product]
                entry = None if made is None else self._measure(product, made, rows)
                if entry is None:
                    self.left_out += 1
                    self._report(f"{_name(product, rows)}: not measured: {self._why}")
                    continue
                self.entries.append(entry)
                write_table(self._gpu, [entry])

    def _inputs(self, product: Product, groups: Sequence[Sequence[QuantizedWeight]]) -> _Inputs | None:
        """Make the inputs of a product; None if there is no memory for them."""
        first = groups[0]
        try:
            count = copies_beyond_l2(sum(map(weight_bytes, first)))
            copies = [
                [replace(weight, words=weight.words.clone()) for weight in groups[i % len(groups)]]
                for i in range(count - len(groups))
            ]
            device = first[0].words.device
            made = torch.Generator(device).manual_seed(0)
            x = torch.randn(max(self._rows), product.in_features, generator=made, device=device, dtype=torch.float32)
            x = x.to(getattr(torch, product.dtype))
            expected = reference.grouped_linear(x, first, dtype=torch.float32)
        except torch.OutOfMemoryError as error:
            self._why = reason_of(error)
            return None
        return _Inputs(groups=[*groups[:count], *copies], x=x, expected=expected)

    def _measure(self, product: Product, inputs: _Inputs, rows: int) -> Entry | None:
        """Find the best config for a number of rows, and report it; None if none works."""
        weight, dtype = inputs.groups[0][0], inputs.x.dtype
        multiprocessors, is_roomy = chip(inputs.x.device)
        rule = config_for(
            weight, rows, multiprocessors, dtype=dtype, out_features=product.out_features, is_roomy=is_roomy
        )
        times: dict[LinearConfig, float] = {}
        for config in _candidates(weight, product, rows, rule):
            if times and time.monotonic() >= self.until:
                break
            if (taken := self._time(inputs, rows, config)) is not None:
                times[config] = taken
        if not times:
            return None
        best = min(times, key=times.__getitem__)
        if best != rule and rule in times:  # the best of many is partly lucky: both once more
            for config in (rule, best):
                times[config] = self._time(inputs, rows, config) or times[config]
        rule_us, best_us = times.get(rule), times[best]
        is_faster = best != rule and (rule_us is None or best_us <= (1 - _LEAST_GAIN) * rule_us)
        if rule_us is not None and not is_faster:
            best, best_us = rule, rule_us
        ruled = "does not run here" if rule_us is None else f"{rule_us:.2f} µs"
        self._report(f"{_name(product, rows)}: rule {ruled}, best {best_us:.2f} µs {brief(best)}")
        return Entry(product=product, rows=rows, config=best if is_faster else None, rule_us=rule_us, best_us=best_us)

    def _time(self, inputs: _Inputs, rows: int, config: LinearConfig) -> float | None:
        """Compare a config with the reference, and time it; None if it does not run or is wrong."""
        from langchain_quantllm.kernels.linear.dispatch import grouped_linear

        x = inputs.x[:rows]
        try:
            found = grouped_linear(x, inputs.groups[0], config=config)
            error = max(relative_error(one, right[:rows]) for one, right in zip(found, inputs.expected, strict=True))
            if not error < _LARGEST_ERROR.get(x.dtype, _LARGEST_ERROR_16_BITS):
                self._why = f"{brief(config)} has an error of {error:.2g}"
                return None
            return self._time_us([partial(grouped_linear, x, group, config=config) for group in inputs.groups])
        except Exception as error:  # any of Triton's: too much shared memory, say
            self._why = reason_of(error)
            return None


def _candidates(weight: QuantizedWeight, product: Product, rows: int, rule: LinearConfig) -> list[LinearConfig]:
    """List the configs to measure, the rule's first; those that a table may not have are left out."""
    per_word = weight.per_word if isinstance(weight, GPTQWeight) else 4 if isinstance(weight, Int8Weight) else 8
    matrix = has_matrix(weight, getattr(torch, product.dtype))
    around = grid(rule, rows, per_word=per_word, is_packed=isinstance(weight, GPTQWeight), has_matrix=matrix)
    found = []
    for config in dict.fromkeys([*around, *neighbours(rule)]):
        try:
            Entry(product=product, rows=rows, config=config, rule_us=None, best_us=1.0).check()
        except InvalidOptionError:
            continue
        found.append(config)
    return found


def _name(product: Product, rows: int) -> str:
    return f"{product.format} {product.in_features}→{product.out_features} {product.dtype}, {rows} rows"

"""Records of a bench and the report that holds them: `--json` writes it, tables and figures read it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from langchain_quantllm.errors import InvalidOptionError

VERSION = 2
"""Version of the document. 1 had a document of its own for each bench, with nested rows."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """One measured case.

    `record["batch"]` reads the case or the values. Their names end with the unit: `_s` seconds, `_tok_s` tokens per
    second, `_bytes`, `_tokens`, `_nats`, `_percent`; the function that measures a case documents its values.

    Args:
        scheme: Scheme, or label of a checkpoint: one row of the tables.
        measurement: Name of the measurement: `"loading"`, `"engine"`, one of `options.MEASUREMENTS`, ...
        case: The case of that measurement, such as `{"runner": "engine", "batch": 8}`.
        values: The results; medians where `runs_s` has the seconds of every repeat.
        failure: Why it could not be measured; None where it was.
    """

    scheme: str
    measurement: str
    case: Mapping[str, Any] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)
    failure: str | None = None

    def __getitem__(self, name: str) -> Any:
        return self.case[name] if name in self.case else self.values[name]

    @property
    def title(self) -> str:
        """Measurement and case in words: `lengths, engine, 512`."""
        return ", ".join([self.measurement, *map(str, self.case.values())])

    @property
    def spread(self) -> float:
        """By how much the slowest repeat took longer than the fastest, 0.1 for 10%."""
        runs_s = self.values["runs_s"]
        return float(max(runs_s) / min(runs_s) - 1)


@dataclass(frozen=True, kw_only=True)
class BenchReport:
    """Records, with the model, the machine and the options they were measured with.

    Args:
        model: Folder or repository; None for the demo model and random weights.
        shape: Name of the shape of random weights; None for a model.
        device: Device of the weights.
        kernel: Kernel for GPTQ.
        machine: Device name, threads and versions, as `describe_machine` gives them.
        options: The options of the bench, as `BenchOptions.to_dict` gives them.
        copy: Copying speed of the device's memory, as `measure_copy` gives it; None where no limit needs it.
        records: All records, in the order of measuring.
    """

    model: str | None
    shape: str | None
    device: str
    kernel: str
    machine: Mapping[str, Any]
    options: Mapping[str, Any]
    copy: Mapping[str, Any] | None
    records: tuple[Record, ...]

    def __post_init__(self) -> None:
        """Compare the quality of every scheme with that of the unquantized one."""
        object.__setattr__(self, "records", tuple(with_baseline(self.records)))

    @property
    def schemes(self) -> list[str]:
        """Schemes and labels, in the order of measuring."""
        return list(dict.fromkeys(record.scheme for record in self.records))

    @property
    def failures(self) -> list[Record]:
        """Records of the cases that could not be measured."""
        return [record for record in self.records if record.failure is not None]

    def of(self, measurement: str, scheme: str | None = None) -> list[Record]:
        """Records of one measurement that did not fail, of all schemes or of one."""
        return [
            record
            for record in self.records
            if record.measurement == measurement and record.failure is None and scheme in (None, record.scheme)
        ]

    def first(self, measurement: str, scheme: str) -> Record | None:
        """The first record of one measurement and scheme that did not fail; None without one."""
        return next(iter(self.of(measurement, scheme)), None)

    def peak_bytes(self, scheme: str) -> int:
        """Most memory in use in any call of a scheme, above that before loading; training is not counted."""
        [loading] = self.of("loading", scheme)
        calls = [record for name in ("prefill", "batches", "lengths", "cache") for record in self.of(name, scheme)]
        return max([int(loading["allocated_bytes"]), *(int(call["peak_bytes"]) for call in calls)])

    def to_dict(self) -> dict[str, Any]:
        """The document, ready for JSON."""
        document: dict[str, Any] = json.loads(json.dumps({"kind": "bench", "version": VERSION, **asdict(self)}))
        return document

    @classmethod
    def from_dict(cls, document: Any) -> BenchReport:
        """Read a document that `to_dict` gave.

        Raises:
            InvalidOptionError: If it is not a document of a bench, or one of another version.
        """
        kind = document.get("kind") if isinstance(document, dict) else None
        version = document.get("version", 1) if isinstance(document, dict) else None
        if kind not in ("bench", "overview"):
            msg = (
                "it is not a document of a bench; use the JSON that `langchain-quantllm bench MODEL --json FILE` wrote."
            )
            raise InvalidOptionError(msg)
        if version != VERSION:
            msg = (
                f"the document has version {version}, and this release reads version {VERSION}; measure again, or use "
                "the release that wrote it."
            )
            raise InvalidOptionError(msg)
        given = {name: document[name] for name in cls.__dataclass_fields__}
        return cls(**{**given, "records": tuple(Record(**record) for record in document["records"])})


def with_baseline(records: Sequence[Record]) -> list[Record]:
    """Compare the quality of each scheme with that of the first one without quantization.

    Args:
        records: Records of any measurements.

    Returns:
        The records, where the quality has two values more: `loss_increase_nats`, the loss above that of the
        unquantized scheme, and `perplexity_increase_percent`; both None without an unquantized scheme. Shares of the
        checks have `difference` and `difference_interval`, of 95%, by pairs of the same question.
    """
    plain = {record.scheme for record in records if record.measurement == "loading" and _is_plain(record)}
    found = [record for record in records if record.measurement == "quality" and record.failure is None]
    base_nats = next((record["loss_nats"] for record in found if record.scheme in plain), None)

    def compared(record: Record) -> Record:
        if record not in found:
            return record
        nats = None if base_nats is None else record["loss_nats"] - base_nats
        percent = None if nats is None else 100 * math.expm1(nats)
        return replace(
            record, values={**record.values, "loss_increase_nats": nats, "perplexity_increase_percent": percent}
        )

    return [_with_difference(compared(record), records, plain) for record in records]


def _with_difference(record: Record, records: Sequence[Record], plain: set[str]) -> Record:
    """Add `difference` and `difference_interval` to shares of the same questions that the unquantized scheme has."""
    if record.values.get("scores") is None or record.scheme in plain:
        return record
    kind = (record.measurement, dict(record.case))
    base = next((r for r in records if r.scheme in plain and (r.measurement, dict(r.case)) == kind), None)
    if base is None or len(base.values.get("scores") or ()) != len(record["scores"]):
        return record
    from langchain_quantllm.bench.intervals import difference

    found = difference(record["scores"], base["scores"])
    compared = {"difference": found.mean, "difference_interval": [found.low, found.high]}
    return replace(record, values={**record.values, **compared})


def _is_plain(record: Record) -> bool:
    return record.failure is None and record["scheme_name"] == "none"

"""The report of a bench: its document, what is read back from it, and the comparison with 16 bits."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from langchain_quantllm.bench.options import BenchOptions
from langchain_quantllm.bench.records import BenchReport, Record
from langchain_quantllm.errors import InvalidOptionError
from tests.support.bench import report_of


def quality(scheme: str, loss_nats: float) -> list[Record]:
    values = {"loss_nats": loss_nats, "perplexity": math.exp(loss_nats), "tokens": 5}
    return [
        Record(scheme=scheme, measurement="loading", values={"scheme_name": scheme}),
        Record(scheme=scheme, measurement="quality", values=values),
    ]


def test_without_16_bits_there_is_nothing_to_compare_with() -> None:
    [found] = report_of(quality("nf4", 1.0), BenchOptions()).of("quality")
    assert found["loss_increase_nats"] is found["perplexity_increase_percent"] is None
    assert found["loss_nats"] == 1.0


def test_quality_is_compared_with_the_unquantized_scheme_wherever_it_stands() -> None:
    nf4, none = report_of([*quality("nf4", 1.5), *quality("none", 1.0)], BenchOptions()).of("quality")
    assert (nf4["loss_increase_nats"], none["loss_increase_nats"]) == (0.5, 0.0)
    assert nf4["perplexity_increase_percent"] == pytest.approx(100 * (math.exp(0.5) - 1))


def test_a_report_is_read_back_from_its_document() -> None:
    failed = Record(scheme="int8", measurement="lengths", case={"runner": "engine", "tokens": 512}, failure="no memory")
    report = report_of([*quality("none", 1.0), failed], BenchOptions(limit_s=math.inf))
    document = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert document["options"]["limit_s"] is None
    read = BenchReport.from_dict(document)
    assert read.to_dict() == report.to_dict() == document
    assert [record.title for record in read.failures] == ["lengths, engine, 512"]
    assert read.records[0] == report.records[0]


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ({"rows": []}, "not a document of a bench"),
        ([], "not a document of a bench"),
        ({"kind": "comparison"}, "not a document of a bench"),
        ({"kind": "overview", "rows": []}, "has version 1, and this release reads version 2; measure again"),
        ({"kind": "bench", "version": 3}, "has version 3, and this release reads version 2; measure again"),
    ],
)
def test_other_documents_are_told(document: Any, said: str) -> None:
    with pytest.raises(InvalidOptionError, match=said):
        BenchReport.from_dict(document)

"""Reports of a model: text, HTML, bars, dict, and the memory that the first call takes."""

from __future__ import annotations

import importlib
import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from langchain_quantllm.errors import MissingPackageError
from langchain_quantllm.memory import (
    CpuReading,
    MemoryReport,
    MemorySnapshot,
    WeightBytes,
    estimate_memory,
    format_bytes,
    memory_notes,
    take_snapshot,
    track_memory,
    weights_by_kind,
)
from langchain_quantllm.memory.display import Bars, stage_bars
from langchain_quantllm.memory.measure import _resident_parts
from langchain_quantllm.schemes import SCHEMES
from tests.support.checkpoints import run_python
from tests.support.memory import MB, load_model
from tests.support.selection import slow_but


class _Balance(HTMLParser):
    """Counts table rows, and keeps the tags that were not closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows = 0

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.open.append(tag)
        self.rows += tag == "tr"

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def report(smollm2: Path) -> MemoryReport:
    with track_memory() as loading:
        model = load_model(smollm2, SCHEMES["int8"])
    weights = weights_by_kind(model)
    return MemoryReport(
        model_id="<b>SmolLM2</b>",
        scheme_name="int8",
        devices=("cpu",),
        weights=weights,
        before=loading.before,
        peak_loading=loading.peak,
        after_loading=loading.after,
        bytes_16bit=estimate_memory(str(smollm2)).bytes_16bit,
        kv_cache_bytes=23_040 * 100,
        notes=memory_notes(loading.before, weights),
    )


class TestReport:
    def test_summary_is_one_line_with_the_saving(self, report: MemoryReport) -> None:
        assert report.summary() == "cpu: 163 MB weights (int8), 39% less than 16 bits"

    def test_text_has_headline_title_stages_and_units(self, report: MemoryReport) -> None:
        text = str(report)
        assert repr(report) == text
        first, title = text.splitlines()[:2]
        assert first == report.headline == "163 MB of weights instead of 269 MB in 16 bits: 39% less"
        assert title == "Memory of <b>SmolLM2</b> (int8)"
        for part in ("before", "peak, loading", "loaded", "resident, this process", "KV cache at its largest: 2.30 MB"):
            assert part in text
        assert "generated" not in text
        assert "1 MB = 1,000,000 bytes" in text
        assert max(map(len, text.splitlines())) <= 100
        assert text.isascii()

    @pytest.mark.parametrize(
        ("bytes_16bit", "headline"),
        [
            (None, "10.0 MB of weights"),
            (10 * MB, "10.0 MB of weights, as in 16 bits"),
            (5 * MB, "10.0 MB of weights instead of 5.00 MB in 16 bits: 100% more"),
            (25 * MB, "10.0 MB of weights instead of 25.0 MB in 16 bits: 60% less"),
        ],
    )
    def test_headline_compares_with_16_bits_where_they_are_known(
        self, report: MemoryReport, bytes_16bit: int | None, headline: str
    ) -> None:
        weights = WeightBytes(quantized_bytes=10 * MB, unquantized_bytes=0, buffers_bytes=0)
        assert replace(report, weights=weights, bytes_16bit=bytes_16bit).headline == headline

    def test_html_is_escaped_and_stands_alone(self, report: MemoryReport) -> None:
        page = replace(report, scheme_name="<i>int8</i>")._repr_html_()
        assert "&lt;b&gt;SmolLM2" in page
        assert "&lt;i&gt;int8" in page
        for markup in ("<b>", "<i>", "<script", "<style", "<link", "<img", "url(", "http", " src=", " on"):
            assert markup not in page, markup
        parser = _Balance()
        parser.feed(page)
        assert parser.open == []
        assert parser.rows == len(report._table().rows) + 1 + len(report._bars().bars)

    def test_html_begins_with_the_headline_and_draws_bars(self, report: MemoryReport) -> None:
        page = report._repr_html_()
        assert page.index(report.headline) < page.index("peak, loading") < page.index("<caption>")
        widths = [float(width) for width in re.findall(r"<div style=.width:([\d.]+)%;background", page)]
        assert len(widths) >= len(report._bars().bars)
        # In 16 bits, what was there before and the weights: as the sizes are to each other.
        before_bytes = report.before.reading("cpu").resident_bytes
        assert widths[-1] / widths[-2] == pytest.approx(report.bytes_16bit / before_bytes, rel=0.01)

    def test_bars_are_the_measurements(self, report: MemoryReport) -> None:
        bars = {bar.label: bar for bar in report._bars().bars}
        assert list(bars) == ["before", "peak, loading", "loaded", "weights, int8", "weights, 16 bits"]
        before_bytes = report.before.reading("cpu").resident_bytes
        assert bars["before"].total_bytes == before_bytes
        assert bars["peak, loading"].total_bytes == report.peak_loading["cpu"]
        assert bars["loaded"].total_bytes == report.after_loading.reading("cpu").resident_bytes
        assert bars["weights, int8"].total_bytes == before_bytes + report.weights.total_bytes
        assert bars["weights, 16 bits"].total_bytes == before_bytes + report.bytes_16bit
        assert ("anonymous" in bars["loaded"].parts) == (sys.platform == "linux")

    def test_bars_without_anything_before_and_on_two_devices(self, report: MemoryReport) -> None:
        handed_in = replace(report, before=None, peak_loading=None, bytes_16bit=None)
        assert [bar.label for bar in handed_in._bars().bars] == ["loaded", "weights, int8"]
        stages = {"before": {"cuda:0": MB, "cuda:1": 2 * MB}, "peak": {"cuda:0": 5 * MB, "cuda:1": 6 * MB}}
        spread = stage_bars({**stages, "half": {"cuda:0": MB}}, ("cuda:0", "cuda:1"), {})
        assert [(bar.label, bar.parts) for bar in spread.bars] == [
            ("before", {"before loading": 3 * MB}),
            ("peak", {"before loading": 3 * MB, "allocated": 8 * MB}),
        ]
        assert Bars(title="none", bars=()).to_html() == ""

    def test_plot_draws_every_bar_at_its_length(self, report: MemoryReport) -> None:
        figure_module = pytest.importorskip("matplotlib.figure")
        figure = figure_module.Figure()
        given = figure.subplots()
        odd = replace(report, scheme_name="$\\frac$")  # no mathematics
        assert odd.plot(ax=given) is given
        figure.canvas.draw()
        ends = {patch.get_x() + patch.get_width() for patch in given.patches}
        factor = 10**9 if max(bar.total_bytes for bar in report._bars().bars) >= 10**9 else 10**6
        for bar in report._bars().bars:
            assert any(end == pytest.approx(bar.total_bytes / factor) for end in ends), bar.label
        own = report.plot()
        assert own.figure is not figure
        assert [label.get_text() for label in own.get_yticklabels()] == [bar.label for bar in report._bars().bars]
        importlib.import_module("matplotlib.pyplot").close(own.figure)

    def test_plot_without_matplotlib(self, report: MemoryReport, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        with pytest.raises(MissingPackageError, match=r'pip install "langchain-quantllm\[bench\]"'):
            report.plot()

    def test_dict_is_json_with_every_stage(self, report: MemoryReport) -> None:
        read = json.loads(json.dumps(report.to_dict()))
        assert read["weights"]["total_bytes"] == report.weights.total_bytes
        assert read["before"]["cpu"]["resident_bytes"] > 0
        assert read["peak_loading"]["cpu"] >= read["after_loading"]["cpu"]["resident_bytes"]
        assert read["after_generating"] is None

    def test_notes_are_those_that_apply(self, report: MemoryReport) -> None:
        notes = " ".join(report.notes)
        assert "cannot be reset" in notes
        assert ("NVML" in notes) == torch.cuda.is_available()
        offloaded = WeightBytes(quantized_bytes=0, unquantized_bytes=0, buffers_bytes=0, offloaded_bytes=1)
        assert "offloaded" in memory_notes(take_snapshot(), offloaded)[-1]

    def test_without_parts_of_the_resident_memory_no_growth_is_reported(self, tmp_path: Path) -> None:
        (tmp_path / "status").write_text("Name:\tpython\nVmRSS:\t  1000 kB\n")
        assert _resident_parts(tmp_path / "status") == {}
        assert _resident_parts(tmp_path / "none") == {}
        reading = CpuReading(
            name="CPU", resident_bytes=5 * MB, peak_resident_bytes=5 * MB, available_bytes=1, total_bytes=2
        )
        snapshot = MemorySnapshot(readings=(reading,))
        assert "does not tell apart" in " ".join(memory_notes(snapshot))
        report = MemoryReport(
            model_id="m",
            scheme_name="nf4",
            devices=("cpu",),
            weights=WeightBytes(quantized_bytes=MB, unquantized_bytes=0, buffers_bytes=0),
            before=snapshot,
            after_loading=snapshot,
            after_generating=snapshot,
        )
        assert report.anonymous_growth is None
        assert "anonymous" not in str(report)
        assert "anonymous" not in report._repr_html_()

    def test_growth_is_reported_only_for_a_model_measured_before_loading(self) -> None:
        loaded, generated = (
            MemorySnapshot(
                readings=(
                    CpuReading(
                        name="CPU",
                        resident_bytes=size,
                        peak_resident_bytes=size,
                        available_bytes=1,
                        total_bytes=2,
                        anonymous_bytes=size,
                        file_bytes=0,
                    ),
                )
            )
            for size in (5 * MB, 9 * MB)
        )
        report = MemoryReport(
            model_id="m",
            scheme_name="nf4",
            devices=("cpu",),
            weights=WeightBytes(quantized_bytes=MB, unquantized_bytes=0, buffers_bytes=0),
            before=loaded,
            after_loading=loaded,
            after_generating=generated,
            kv_resident_bytes=MB,
        )
        assert report.anonymous_growth == {"kv_cache": MB, "weights": 0, "workspace": 3 * MB, "total": 4 * MB}
        # Of a pipeline of the user's own nobody saw the moment after loading: both are the reading of now.
        handed_in = replace(report, before=None, after_loading=generated)
        assert handed_in.anonymous_growth is None
        assert "since loading" not in str(handed_in)

    def test_format_bytes_keeps_three_digits(self) -> None:
        sizes = {0: "0 bytes", 999: "999 bytes", 1500: "1.50 kB", 162_861_952: "163 MB", 4_256_000_000: "4.26 GB"}
        assert {size: format_bytes(size) for size in sizes} == sizes
        assert format_bytes(999_999_999) == "1.00 GB"
        assert format_bytes(-2_000_000) == "-2.00 MB"


_FIRST_CALL = """
import gc, json, sys, torch
from langchain_quantllm import QuantizedHuggingFaceLLM

def held():  # bytes of the packed weights, wherever a tensor holds some
    gc.collect()
    octets = [t.untyped_storage() for t in gc.get_objects()
              if issubclass(type(t), torch.Tensor) and t.dtype in (torch.uint8, torch.int32) and t.device.type == "cpu"]
    return sum({s.data_ptr(): s.nbytes() for s in octets}.values())

model_id, engine = sys.argv[1:]
llm = QuantizedHuggingFaceLLM(model_id=model_id, quantization="nf4", max_new_tokens=4, progress=False, engine=engine)
llm.load()
loaded_bytes = held()
llm.invoke("def fib(n):")
report = llm.memory_report().to_dict()
generated_bytes = held()
llm.unload()
from langchain_quantllm import take_snapshot
unloaded = take_snapshot().to_dict()
print(json.dumps({"report": report, "loaded": loaded_bytes, "generated": generated_bytes, "unloaded": unloaded}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the parts of the resident memory")
@pytest.mark.parametrize("engine", slow_but(("fast",), ["fast", "pipeline"]))
def test_memory_of_the_first_call_is_reported_by_cause_and_given_back(smollm2: Path, engine: str) -> None:
    ran = run_python(_FIRST_CALL, smollm2, engine, env={"OMP_NUM_THREADS": "1"}, timeout_s=500)
    found = json.loads(ran.stdout.splitlines()[-1])
    report, unloaded = found["report"], found["unloaded"]["cpu"]
    growth = report["anonymous_growth"]
    loaded, generated = (report[stage]["cpu"]["anonymous_bytes"] for stage in ("after_loading", "after_generating"))
    assert growth["total"] == generated - loaded == growth["kv_cache"] + growth["weights"] + growth["workspace"]
    assert found["generated"] <= 1.05 * found["loaded"]  # no second copy of a weight
    if engine == "fast":
        assert report["kv_cache_bytes"] <= growth["kv_cache"] < report["kv_pool_bytes"] / 4
    assert growth["workspace"] < report["weights"]["quantized_bytes"]
    assert unloaded["anonymous_bytes"] < loaded

"""The figures of a bench: made from its report alone, readable, and without a trace in matplotlib."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from langchain_quantllm.bench import plots
from langchain_quantllm.bench.options import BenchOptions
from langchain_quantllm.bench.plots import save_plots
from langchain_quantllm.bench.records import BenchReport, Record
from langchain_quantllm.errors import InvalidOptionError, MissingPackageError
from tests.support.bench import report_of


def call(scheme: str, measurement: str, runner: str, batch: int, rate_tok_s: float) -> Record:
    new_tokens = 128 if runner == "engine" else 32
    return Record(
        scheme=scheme,
        measurement=measurement,
        case={"runner": runner, "batch": batch},
        values={
            "new_tokens": new_tokens,
            "asked_tokens": new_tokens,
            "runs_s": [1.0],
            "rate_tok_s": rate_tok_s,
            "prompt_rate_tok_s": 3 * rate_tok_s,
            "peak_bytes": 10**9,
        },
    )


def records_of(scheme: str, size: float, perplexity: float) -> list[Record]:
    """The records of one scheme with weights of so many GB."""
    loading = {
        "scheme_name": scheme,
        "load_s": 3.0,
        "weights_bytes": int(size * 1e9),
        "allocated_bytes": int(size * 1.01e9),
        "driver_bytes": None,
        "peak_bytes": int(size * 1.2e9),
        "limit_tok_s": 300.0,
    }
    training = {
        "targets": "q_proj, v_proj",
        "rank": 8,
        "batch": 2,
        "tokens": 256,
        "forward_s": 0.111,
        "backward_s": 0.222,
        "rate_tok_s": 1000.0,
        "peak_bytes": int(size * 2e9),
        "kernels": "",
    }
    quality = {"perplexity": perplexity, "loss_nats": perplexity / 4, "tokens": 4088}
    calls = [
        call(scheme, measurement, runner, batch, size * batch)
        for measurement in ("prefill", "batches")
        for runner in ("engine", "generate")
        for batch in (1, 16)
    ]
    calls[-1].values["peak_bytes"] = int(size * 1.5e9)  # type: ignore[index]
    return [
        Record(scheme=scheme, measurement="loading", values=loading),
        Record(scheme=scheme, measurement="training", values=training),
        *calls,
        Record(scheme=scheme, measurement="quality", values=quality),
    ]


@pytest.fixture(scope="module")
def report() -> BenchReport:
    records = [*records_of("none", 13.5, 5.47), *records_of("nf4", 4.19, 5.72)]
    records.append(Record(scheme="broken", measurement="loading", failure="no"))
    found = report_of(records, BenchOptions(), model="acme/llama")
    return replace(found, machine={**found.machine, "device_name": "Some <GPU> & Co"})


def texts(file: Path) -> list[str]:
    """The texts of an SVG, in their order."""
    import html

    content = file.read_text(encoding="utf-8")
    return [html.unescape(text) for text in re.findall(r"<text[^>]*>([^<]*)</text>", content)]


def test_every_part_has_its_figure(report: BenchReport, tmp_path: Path) -> None:
    files = save_plots(report, tmp_path / "new", formats=("png", "svg"))
    names = ("memory", "prefill", "generation", "training", "quality")
    assert [file.name for file in files] == [f"{name}.{kind}" for name in names for kind in ("png", "svg")]
    for file in files[::2]:
        assert file.read_bytes().startswith(b"\x89PNG")
        assert file.stat().st_size > 10_000
    for file in files[1::2]:
        assert "llama on Some <GPU> & Co" in texts(file)
        assert {"none", "nf4"} <= {text.partition(",")[0] for text in texts(file)}
        assert "broken" not in texts(file)


def test_values_and_units_are_written(report: BenchReport, tmp_path: Path) -> None:
    files = {file.stem: texts(file) for file in save_plots(report, tmp_path, formats=("svg",))}
    assert {"13.5", "4.19", "20.2", "GB (1,000,000,000 bytes)", "weights", "peak while generating"} <= {
        *files["memory"]
    }
    assert {"216", "67.0", "new tokens/s", "langchain-quantllm, 128 new tokens"} <= {*files["generation"]}
    assert {"transformers generate, 32 new tokens", "texts at once", "16"} <= {*files["generation"]}
    assert {"648", "prompt tokens/s", "prompts at once"} <= {*files["prefill"]}
    assert {"0.33 s", "27.0 GB", "forward", "backward", "seconds"} <= {*files["training"]}
    assert {"5.47", "5.72 (+6.4%)", "nats per token; beside the bars: perplexity"} <= {*files["quality"]}


def test_a_file_read_again_gives_the_same_figures(report: BenchReport, tmp_path: Path) -> None:
    read = BenchReport.from_dict(json.loads(json.dumps(report.to_dict())))
    [*first] = save_plots(report, tmp_path / "a", formats=("svg",))
    [*second] = save_plots(read, tmp_path / "b", formats=("svg",))
    assert [file.read_bytes() for file in first] == [file.read_bytes() for file in second]


def test_what_was_not_measured_is_not_drawn(report: BenchReport, tmp_path: Path) -> None:
    kept = [r for r in report.records if r.measurement in ("loading", "batches") and r.case.get("runner") != "generate"]
    files = save_plots(replace(report, records=tuple(kept)), tmp_path, formats=("svg",))
    assert [file.stem for file in files] == ["memory", "generation"]
    assert not [text for text in texts(files[1]) if "transformers" in text]
    assert save_plots(replace(report, records=()), tmp_path) == []


def test_matplotlib_stays_as_it_was(report: BenchReport, tmp_path: Path) -> None:
    """In a process of its own: no pyplot, no backend chosen, the same settings."""
    code = """
import json, sys
from pathlib import Path
import matplotlib
before = matplotlib.rcParams.copy()
from langchain_quantllm.bench.plots import save_plots
from langchain_quantllm.bench.records import BenchReport
report = BenchReport.from_dict(json.loads(Path(sys.argv[1]).read_text()))
save_plots(report, Path(sys.argv[2]), formats=("png", "svg", "pdf"))
assert matplotlib.rcParams.copy() == before
assert matplotlib.get_backend(auto_select=False) is None
assert "matplotlib.pyplot" not in sys.modules
"""
    (tmp_path / "d.json").write_text(json.dumps(report.to_dict()), encoding="utf-8")
    command = [sys.executable, "-c", code, str(tmp_path / "d.json"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "out").iterdir())) == 15


def test_errors_are_a_sentence(report: BenchReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidOptionError, match="'gif' is not allowed; use png, svg, pdf"):
        save_plots(report, tmp_path, formats=("gif",))
    monkeypatch.setattr(plots, "is_installed", lambda _: False)
    with pytest.raises(MissingPackageError, match=r'pip install "langchain-quantllm\[bench\]"'):
        save_plots(report, tmp_path)

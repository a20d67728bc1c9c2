"""The figures of an overview: made from its document alone, readable, and without a trace in matplotlib."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from langchain_quantllm.bench import plots
from langchain_quantllm.bench.overview_results import (
    CallSpeed,
    Failure,
    MemoryUse,
    OverviewOptions,
    Quality,
    SchemeOverview,
    as_document,
)
from langchain_quantllm.bench.plots import save_plots
from langchain_quantllm.bench.speed_results import CopySpeed
from langchain_quantllm.bench.training import TrainingStep
from langchain_quantllm.errors import InvalidOptionError, MissingPackageError


def call(runner: str, batch: int, rate_tok_s: float) -> CallSpeed:
    return CallSpeed(
        runner=runner,
        call="generate" if runner == "generate" else "stream" if batch == 1 else "abatch",
        batch=batch,
        prompt_tokens=30,
        new_tokens=128 if runner == "engine" else 32,
        asked_tokens=128 if runner == "engine" else 32,
        use_cache=True,
        total_s=1.0,
        runs_s=(1.0,),
        rate_tok_s=rate_tok_s,
        prompt_rate_tok_s=3 * rate_tok_s,
        first_token_s=None,
        peak_bytes=10**10,
    )


def row(label: str, size: float, perplexity: float) -> SchemeOverview:
    calls = tuple(call(runner, batch, size * batch) for runner in ("engine", "generate") for batch in (1, 16))
    return SchemeOverview(
        label=label,
        model_id="acme/llama",
        scheme=label,
        load_s=3.0,
        memory=MemoryUse(
            before_bytes=0,
            weights_bytes=int(size * 1e9),
            read_bytes=int(size * 1e9),
            loaded_bytes=int(size * 1.01e9),
            loaded_driver_bytes=None,
            peak_loading_bytes=int(size * 1.2e9),
            peak_bytes=int(size * 1.5e9),
        ),
        limit_tok_s=300.0,
        prefill=calls,
        by_batch=calls,
        training=TrainingStep(
            targets="q_proj, v_proj",
            rank=8,
            batch=2,
            tokens=256,
            trainable_parameters=1,
            forward_s=0.111,
            backward_s=0.222,
            total_s=0.333,
            rate_tok_s=1000.0,
            runs_s=(0.333,),
            peak_bytes=int(size * 2e9),
            kernels="",
        ),
        quality=Quality(perplexity=perplexity, loss_nats=perplexity / 4, tokens=4088),
    )


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    rows = [row("none", 13.5, 5.47), row("nf4", 4.19, 5.72)]
    rows.append(SchemeOverview(label="broken", model_id="x", failures=(Failure(part="loading", reason="no"),)))
    copy_speed = CopySpeed(buffer_bytes=1, rate_byte_s=1e12)
    found = as_document(rows, options=OverviewOptions(), copy_speed=copy_speed, model="acme/llama", device="cpu")
    return found | {"device_name": "Some <GPU> & Co"}


def texts(file: Path) -> list[str]:
    """The texts of an SVG, in their order."""
    import html

    content = file.read_text(encoding="utf-8")
    return [html.unescape(text) for text in re.findall(r"<text[^>]*>([^<]*)</text>", content)]


def test_every_part_has_its_figure(document: dict[str, Any], tmp_path: Path) -> None:
    files = save_plots(document, tmp_path / "new", formats=("png", "svg"))
    names = ("memory", "prefill", "generation", "training", "quality")
    assert [file.name for file in files] == [f"{name}.{kind}" for name in names for kind in ("png", "svg")]
    for file in files[::2]:
        assert file.read_bytes().startswith(b"\x89PNG")
        assert file.stat().st_size > 10_000
    for file in files[1::2]:
        assert "llama on Some <GPU> & Co" in texts(file)
        assert {"none", "nf4"} <= {text.partition(",")[0] for text in texts(file)}
        assert "broken" not in texts(file)


def test_values_and_units_are_written(document: dict[str, Any], tmp_path: Path) -> None:
    files = {file.stem: texts(file) for file in save_plots(document, tmp_path, formats=("svg",))}
    assert {"13.5", "4.19", "20.2", "GB (1,000,000,000 bytes)", "weights", "peak while generating"} <= {
        *files["memory"]
    }
    assert {"216", "67.0", "new tokens/s", "langchain-quantllm, 128 new tokens"} <= {*files["generation"]}
    assert {"transformers generate, 32 new tokens", "texts at once", "16"} <= {*files["generation"]}
    assert {"648", "prompt tokens/s", "prompts at once"} <= {*files["prefill"]}
    assert {"0.33 s", "27.0 GB", "forward", "backward", "seconds"} <= {*files["training"]}
    assert {"5.47", "5.72 (+6.4%)", "nats per token; beside the bars: perplexity"} <= {*files["quality"]}


def test_a_file_read_again_gives_the_same_figures(document: dict[str, Any], tmp_path: Path) -> None:
    read = json.loads(json.dumps(document))
    [*first] = save_plots(document, tmp_path / "a", formats=("svg",))
    [*second] = save_plots(read, tmp_path / "b", formats=("svg",))
    assert [file.read_bytes() for file in first] == [file.read_bytes() for file in second]


def test_what_was_not_measured_is_not_drawn(document: dict[str, Any], tmp_path: Path) -> None:
    small = copy.deepcopy(document)
    for one in small["rows"]:
        one |= {"prefill": [], "training": None, "quality": None}
        one["by_batch"] = [c for c in one["by_batch"] if c["runner"] == "engine"]
    files = save_plots(small, tmp_path, formats=("svg",))
    assert [file.stem for file in files] == ["memory", "generation"]
    assert not [text for text in texts(files[1]) if "transformers" in text]
    assert save_plots({**document, "rows": []}, tmp_path) == []


def test_matplotlib_stays_as_it_was(document: dict[str, Any], tmp_path: Path) -> None:
    """In a process of its own: no pyplot, no backend chosen, the same settings."""
    code = """
import json, sys
from pathlib import Path
import matplotlib
before = matplotlib.rcParams.copy()
from langchain_quantllm.bench.plots import save_plots
save_plots(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]), formats=("png", "svg", "pdf"))
assert matplotlib.rcParams.copy() == before
assert matplotlib.get_backend(auto_select=False) is None
assert "matplotlib.pyplot" not in sys.modules
"""
    (tmp_path / "d.json").write_text(json.dumps(document), encoding="utf-8")
    command = [sys.executable, "-c", code, str(tmp_path / "d.json"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "out").iterdir())) == 15


def test_errors_are_a_sentence(document: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidOptionError, match="'gif' is not allowed; use png, svg, pdf"):
        save_plots(document, tmp_path, formats=("gif",))
    with pytest.raises(InvalidOptionError, match="no overview"):
        save_plots({"rows": []}, tmp_path)
    monkeypatch.setattr(plots, "is_installed", lambda _: False)
    with pytest.raises(MissingPackageError, match=r'pip install "langchain-quantllm\[bench\]"'):
        save_plots(document, tmp_path)

"""lm-evaluation-harness and datasets: what the package relies on, beyond what they promise."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from langchain_quantllm.compat.lm_eval import knows_metric, offline_datasets
from langchain_quantllm.compat.packages import is_installed

pytest.importorskip("datasets")


def test_local_files_are_read_without_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    looked_up: list[Any] = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **_: looked_up.append(args))
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n', encoding="utf-8")
    before = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS, datasets.config.HF_HUB_OFFLINE
    with offline_datasets():
        options = {"data_files": {"test": str(tmp_path / "rows.jsonl")}, "cache_dir": str(tmp_path / "cache")}
        assert list(datasets.load_dataset("json", **options)["test"]) == [{"a": 1}]
    assert looked_up == []
    assert before == (datasets.config.HF_UPDATE_DOWNLOAD_COUNTS, datasets.config.HF_HUB_OFFLINE)


@pytest.mark.skipif(not is_installed("lm_eval"), reason="needs lm-eval")
def test_metrics_of_the_harness_itself_are_known() -> None:
    assert knows_metric("acc")
    assert knows_metric("exact_match")
    assert not knows_metric("a metric of the Hub")

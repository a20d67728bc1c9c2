"""Real models for the tests: SmolLM2 always, Qwen2.5-Coder where `QUANTLLM_MODELS` says it is."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


def pytest_runtest_setup() -> None:
    """Begin every test, and what is made for it, with the same random numbers: it fails everywhere or nowhere."""
    torch.manual_seed(0)


def _model(name: str) -> Path | None:
    """Return the folder of a model in `QUANTLLM_MODELS`, which must hold it; None where that is unset."""
    root = os.environ.get("QUANTLLM_MODELS")
    if not root:
        return None
    folder = Path(root) / name
    if not (folder / "config.json").is_file():
        pytest.fail(f"QUANTLLM_MODELS={root} is set, but there is no model in {folder}")
    return folder


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct in bfloat16."""
    from langchain_quantllm.cli.demo_model import demo_model

    return _model("smollm2-135m") or demo_model(progress=False)


@pytest.fixture(scope="session")
def short_smollm2(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of SmolLM2's first two layers: it writes no sense, but the same tokens and formats, much sooner."""
    import transformers

    folder = tmp_path_factory.mktemp("short") / "smollm2"
    config = transformers.AutoConfig.from_pretrained(smollm2, num_hidden_layers=2)
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2, config=config, dtype="bfloat16")
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(smollm2).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", params=["two layers", pytest.param("whole", marks=pytest.mark.slow)])
def any_smollm2(request: pytest.FixtureRequest) -> Path:
    """SmolLM2's folder, for tests that hold whatever it writes: with two layers in `make test`, whole beside that."""
    return Path(request.getfixturevalue("smollm2" if request.param == "whole" else "short_smollm2"))


@pytest.fixture(scope="session")
def qwen_coder() -> Path:
    """The folder of Qwen2.5-Coder-0.5B-Instruct in bfloat16."""
    folder = _model("qwen2.5-coder-0.5b")
    if folder is None:
        pytest.skip("needs the folder of real models in QUANTLLM_MODELS")
    return folder


def pytest_configure() -> None:
    """Keep each of several test processes to one thread: more of them wait for each other."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture
def tuned_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of the tables of tuned products, empty."""
    from langchain_quantllm.kernels.linear import tuned

    monkeypatch.setenv("QUANTLLM_TUNED", str(tmp_path))
    tuned.table_for.cache_clear()
    yield tmp_path
    tuned.table_for.cache_clear()

"""The notebooks run from their first cell to their last."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

COOKBOOK = Path(__file__).parents[2] / "cookbook"
MARKS = {"01_quickstart": [pytest.mark.slow, pytest.mark.compat]}
NOTEBOOKS = [
    pytest.param(path, marks=MARKS.get(path.stem, pytest.mark.slow), id=path.stem)
    for path in sorted(COOKBOOK.glob("*.ipynb"))
]


def run_notebook(path: Path) -> None:
    """Run a notebook, which must show a memory report and no error."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(path.parent)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("Memory of" in str(output.get("data", {}).get("text/html", "")) for output in outputs)
    assert not [output for output in outputs if output.output_type == "error"]


@pytest.mark.enable_socket  # a notebook's kernel is spoken to through local sockets
@pytest.mark.parametrize("path", NOTEBOOKS)
def test_notebook_runs(path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "CHAT_MODEL" in path.read_text(encoding="utf-8"):
        monkeypatch.setenv("CHAT_MODEL", str(request.getfixturevalue("qwen_coder")))
    else:
        monkeypatch.setenv("RECIPE_STEPS", "16")  # enough to see every stage run, too few to learn the task
        request.getfixturevalue("smollm2")
    run_notebook(path)


@pytest.mark.slow
@pytest.mark.compat
@pytest.mark.enable_socket
def test_the_recipe_runs_on_two_layers(short_smollm2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every stage of the longest notebook, in a fraction of its time."""
    monkeypatch.setenv("MODEL", str(short_smollm2))
    monkeypatch.setenv("RECIPE_STEPS", "3")
    run_notebook(COOKBOOK / "04_recipe.ipynb")

"""The notebooks show what they write, nothing that only one machine would see, and run from first cell to last."""

from __future__ import annotations

import ast
import json
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import pytest

from benchmarks import rag_corpus
from tests.support.selection import skip_without_gptqmodel

COOKBOOK = Path(__file__).parents[3] / "cookbook"
NOTEBOOKS = sorted(COOKBOOK.glob("*.ipynb"))
SIZES = ((600, 60), (800, 100))
PASSAGES = {(size, overlap): rag_corpus.passages(size=size, overlap=overlap) for size, overlap in SIZES}
execute = SimpleNamespace(**runpy.run_path(str(COOKBOOK / "execute.py")))


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shows(source: str) -> bool:
    """Whether a cell prints at its own level, or ends with a value other than None."""
    lines = ast.parse(source).body
    printing = [node for line in lines if not isinstance(line, ast.FunctionDef) for node in ast.walk(line)]
    prints = any(isinstance(node, ast.Call) and ast.unparse(node.func) == "print" for node in printing)
    last = lines[-1]
    unloads = isinstance(last, ast.Expr) and ast.unparse(last).endswith(".unload()")
    return prints or (isinstance(last, ast.Expr) and not unloads)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_shipped_notebook_has_the_outputs_of_one_run(path: Path) -> None:
    cells = code_cells(nbformat.read(path, as_version=4))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert [cell.source for cell in cells if shows(cell.source) and not cell.outputs] == []
    results = [(cell, each) for cell in cells for each in cell.outputs if each.output_type == "execute_result"]
    assert all(each.execution_count == cell.execution_count for cell, each in results)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_shipped_notebook_is_as_clean_as_the_command_leaves_it(path: Path) -> None:
    shipped = nbformat.read(path, as_version=4)
    assert execute.clean(nbformat.read(path, as_version=4), {}) == shipped
    assert path.read_text(encoding="utf-8") == nbformat.writes(shipped) + "\n"


def output(kind: str, **content: Any) -> Any:
    return nbformat.v4.new_output(kind, **content)


def notebook_of(*outputs: Any) -> Any:
    """A notebook with one cell that gave these outputs."""
    cell = nbformat.v4.new_code_cell("1", execution_count=1, outputs=list(outputs))
    cell.metadata = {"execution": {"iopub.status.busy": "2028-11-29T02:40:00"}}
    language = {"name": "python", "version": "3.11.7"}
    return nbformat.v4.new_notebook(cells=[cell], metadata={"widgets": {}, "language_info": language})


@pytest.mark.parametrize(
    "fault",
    [
        output("stream", name="stdout", text="saved to /home/ada/models/smol"),
        output("stream", name="stdout", text="saved to 'C:\\Users\\Ada\\smol'"),
        output("stream", name="stderr", text="FutureWarning: soon"),
        output("error", ename="ValueError", evalue="no", traceback=[]),
        output("display_data", data={"text/html": "<td>/tmp/recipe-1/merged</td>"}),
        output("execute_result", data={"text/plain": "<Thing at 0x7fe08774a990>"}, execution_count=1),
    ],
    ids=["path", "Windows path", "warning", "error", "path in HTML", "address"],
)
def test_what_readers_should_not_see_is_an_error(fault: Any) -> None:
    with pytest.raises(execute.NotebookError, match="change the cells"):
        execute.clean(notebook_of(fault), {})


def test_what_only_one_machine_would_see_is_left_out() -> None:
    bar = {"application/vnd.jupyter.widget-view+json": {"model_id": "1"}, "text/plain": "0%"}
    notebook = notebook_of(
        output("display_data", data=bar, metadata={"needs_background": "light"}),
        output("stream", name="stdout", text="  0%\r 50%\r\x1b[1m100%\x1b[0m\nMemory of /home/ada/smol/x/y"),
        output("execute_result", data={"text/plain": "1/2, https://pypi.org/simple"}, execution_count=1),
    )
    cleaned = execute.clean(notebook, {"/home/ada": "~", "/home/ada/smol": "SmolLM2"})
    (cell,) = cleaned.cells
    assert [each.get("text") or each.data for each in cell.outputs] == [
        "100%\nMemory of SmolLM2/x/y",
        {"text/plain": "1/2, https://pypi.org/simple"},
    ]
    assert cell.metadata == {}
    assert cleaned.metadata == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }


def runs(path: Path, **environment: str) -> Any:
    """Run a notebook, which must show a memory report and no error."""
    notebook = execute.run(path, **environment)
    outputs = [each for cell in code_cells(notebook) for each in cell.outputs]
    assert any("Memory of" in str(each.get("data", {}).get("text/html", "")) for each in outputs)
    assert not [each for each in outputs if each.output_type == "error"]
    return notebook


MARKS = {"01_quickstart": [pytest.mark.slow, pytest.mark.compat]}
RUN = [pytest.param(path, marks=MARKS.get(path.stem, pytest.mark.slow), id=path.stem) for path in NOTEBOOKS]


@pytest.mark.timeout(1800)  # the longest takes some minutes on two cores
@pytest.mark.enable_socket  # a notebook's kernel is spoken to through local sockets
@pytest.mark.parametrize("path", RUN)
def test_notebook_runs(path: Path, request: pytest.FixtureRequest) -> None:
    text = path.read_text(encoding="utf-8")
    request.getfixturevalue("qwen_coder" if "CHAT_MODEL" in text else "smollm2")
    environment = execute.models(text)
    steps = {"RECIPE_STEPS": "16"}  # enough to see every stage run, too few to learn the task
    ran = execute.clean(runs(path, **environment, **steps), execute.folders(environment))
    shipped = nbformat.read(path, as_version=4)
    assert [bool(cell.outputs) for cell in code_cells(shipped)] == [bool(cell.outputs) for cell in code_cells(ran)]


QUESTIONS = json.loads((COOKBOOK / "data" / "questions.json").read_text(encoding="utf-8"))


def test_there_are_thirty_questions() -> None:
    assert len({entry["question"] for entry in QUESTIONS}) == 30
    assert all(set(entry) == {"question", "source", "phrase", "answer"} and entry["answer"] for entry in QUESTIONS)


@pytest.mark.parametrize("entry", QUESTIONS, ids=lambda entry: entry["phrase"])
def test_the_phrase_of_a_question_stands_once_in_its_file_and_in_passages_whole(entry: dict[str, Any]) -> None:
    (question,) = [each for each in rag_corpus.questions() if each.text == entry["question"]]
    text = rag_corpus.plain(rag_corpus.documents()[question.source])
    assert text.count(rag_corpus.plain(question.phrase)) == 1
    for size, overlap in SIZES:  # of the notebook and of the benches
        assert any(map(question.is_answered_by, PASSAGES[size, overlap]))


def test_the_notebook_reads_every_page_that_a_question_names() -> None:
    source = "".join(cell.source for cell in nbformat.read(COOKBOOK / "05_rag.ipynb", as_version=4).cells)
    assert [e["source"] for e in QUESTIONS if f'"{e["source"].removesuffix(".md")}"' not in source] == [
        "alice.txt" for e in QUESTIONS if e["source"] == "alice.txt"
    ]


@pytest.mark.slow
@pytest.mark.compat
@pytest.mark.enable_socket
def test_the_recipe_runs_on_two_layers(short_smollm2: Path) -> None:
    """Every stage of the longest notebook, in a fraction of its time."""
    skip_without_gptqmodel()
    runs(COOKBOOK / "04_recipe.ipynb", MODEL=str(short_smollm2), RECIPE_STEPS="3")

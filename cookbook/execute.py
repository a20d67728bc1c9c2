"""Runs the notebooks and writes their outputs into them: `python cookbook/execute.py`, or with some of their paths.

Notebooks read the names of their models from environment variables. `CHAT_MODEL` is `qwen2.5-coder-0.5b` in the folder
that `QUANTLLM_MODELS` names, where it is not set, else what the Hub has. `EMBEDDING_MODEL`, `SPEECH_MODEL` and
`IMAGE_MODEL` are the models of tests/support, from packages on PyPI; the last is a random one. What only this machine
would see is left out of what is written: its folders, times of day, progress bars, versions of Python.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode

HERE = Path(__file__).parent
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
"""Of every notebook, whatever ran it."""

NAMES = {
    "CHAT_MODEL": "Qwen/Qwen2.5-Coder-0.5B-Instruct",
    "EMBEDDING_MODEL": "sentence-transformers/all-MiniLM-L6-v2",
    "SPEECH_MODEL": "openai/whisper-base",
    "IMAGE_MODEL": "a random CLIP",
}
"""Environment variables of models, and the names that readers know these by."""

ABSOLUTE_PATH = re.compile(
    r"""(?<![\w.:/~-])(/(home|root|Users|tmp|var|private|work|workspace|mnt|opt|usr|etc|dev/shm)/[^\s"'<>),;]*|[A-Za-z]:\\[^\s"'<>]+)"""
)
"""A path that only one machine has."""

ADDRESS = re.compile(r"<[\w.]+ (?:object )?at 0x[0-9a-f]+>")
"""An object that says nothing but where it lies in memory."""

_NO_WIDGETS = "ignore:IProgress not found"
"""tqdm misses ipywidgets, which draws bars in Jupyter; there are none here."""


class NotebookError(Exception):
    """A notebook cannot be shipped as it ran."""


def run(path: Path, *, timeout_s: int = 3600, **environment: str) -> NotebookNode:
    """Execute a notebook from its first cell to its last, with this checkout's package.

    Args:
        path: The notebook, which is left as it is.
        timeout_s: Most seconds of one cell.
        **environment: Environment variables of the notebook beside the ones of this process.

    Returns:
        The notebook with its outputs.

    Raises:
        nbclient.exceptions.CellExecutionError: If a cell fails.
        nbclient.exceptions.CellTimeoutError: If one takes longer.
        nbclient.exceptions.DeadKernelError: If one ends the notebook's process.
    """
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=timeout_s,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(path.parent)}},
        extra_arguments=["--IPKernelApp.log_level=ERROR"],  # it warns that it is spoken to over TCP
    )
    search = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
    client.execute(env={**os.environ, "PYTHONPATH": search, "PYTHONWARNINGS": _NO_WIDGETS, **environment})
    return notebook


def clean(notebook: NotebookNode, names: Mapping[str, str]) -> NotebookNode:
    """Leave out of a notebook what only this machine would see.

    Args:
        notebook: One that ran. It is changed.
        names: What to write in place of a folder of this machine, as `{"/home/ada/models/smol": "smol"}`.

    Returns:
        The same notebook.

    Raises:
        NotebookError: If an output is an error, a warning, or holds a path of this machine all the same.
    """
    notebook.metadata = nbformat.from_dict(METADATA)
    faults = []
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({})
        if cell.cell_type != "code":
            continue
        cell.outputs = [_named(_plain(output), names) for output in cell.outputs if not _is_widget(output)]
        found = list(filter(None, map(_fault, cell.outputs)))
        faults += [f"\n\na cell gives {fault}:\n\n{cell.source}" for fault in found]
    if faults:
        msg = "readers would meet what they should not; change the cells." + "".join(faults)
        raise NotebookError(msg)
    return notebook


def _is_widget(output: NotebookNode) -> bool:
    return any("widget" in kind for kind in output.get("data", {}))


def _plain(output: NotebookNode) -> NotebookNode:
    if "metadata" in output:
        output.metadata = nbformat.from_dict({})
    if output.output_type == "stream":  # without bold and colours; of a line that is drawn over itself, the last
        text = re.sub(r"\x1b\[[0-9;]*m", "", output.text)
        output.text = "\n".join(line.rsplit("\r", 1)[-1] for line in text.split("\n"))
    return output


def _named(node: NotebookNode, names: Mapping[str, str]) -> NotebookNode:
    """Replace folders in every text of an output, longer ones first."""

    def replaced(value: object) -> object:
        if isinstance(value, str):
            for folder in sorted(names, key=len, reverse=True):
                value = value.replace(folder, names[folder])
            return value
        if isinstance(value, dict):
            return {key: replaced(item) for key, item in value.items()}
        return [replaced(item) for item in value] if isinstance(value, list) else value

    return nbformat.from_dict(replaced(node))


def _fault(output: NotebookNode) -> str | None:
    if output.output_type == "error":
        return f"an error, {output.ename}: {output.evalue}"
    if output.get("name") == "stderr":
        return f"a text on standard error, {output.text!r}"
    texts = [output.get("text", ""), *(str(data) for data in output.get("data", {}).values())]
    for kind, pattern in {"a path of this machine": ABSOLUTE_PATH, "an address in memory": ADDRESS}.items():
        if found := next(filter(None, map(pattern.search, texts)), None):
            return f"{kind}, {found[0]!r}"
    return None


def folders(environment: Mapping[str, str]) -> dict[str, str]:
    """Name the folders that outputs may hold, as a reader would know them.

    Args:
        environment: The environment variables of the notebooks.
    """
    from langchain_quantllm.cli.demo_model import demo_model

    names = {str(demo_model()): "SmolLM2-135M-Instruct", tempfile.gettempdir(): "tmp", str(Path.home()): "~"}
    return names | {environment[name]: NAMES[name] for name in NAMES if environment.get(name)}


def models(text: str) -> dict[str, str]:
    """Return the environment variables of the models that a notebook reads; those without a model here are left out.

    Args:
        text: The notebook's file.
    """
    makers = {"CHAT_MODEL": _chat_model, "EMBEDDING_MODEL": _embedding_model, "SPEECH_MODEL": _speech_model}
    makers["IMAGE_MODEL"] = _image_model
    found = {name: os.environ.get(name) or make() for name, make in makers.items() if name in text}
    return {name: folder for name, folder in found.items() if folder}


def _chat_model() -> str | None:
    root = os.environ.get("QUANTLLM_MODELS")
    return str(Path(root) / "qwen2.5-coder-0.5b") if root else None


def _embedding_model() -> str:
    from tests.support.encoder_models import minilm

    return str(minilm())


def _speech_model() -> str:
    from tests.support.speech_models import whisper_model

    return str(whisper_model())


def _image_model() -> str:
    from tests.support.encoder_models import tiny_clip

    return str(tiny_clip(Path(tempfile.mkdtemp(prefix="random-clip-")) / "model"))


def main() -> int:
    """Run and write the notebooks that are named, else all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("notebooks", nargs="*", type=Path, help="Default: all in this folder.")
    sys.path.insert(0, str(HERE.parent))  # the tests' models
    faults = 0
    for path in parser.parse_args().notebooks or sorted(HERE.glob("*.ipynb")):
        started = time.perf_counter()
        try:
            environment = models(path.read_text(encoding="utf-8"))
            notebook = clean(run(path, **environment), folders(environment))
        except (NotebookError, CellExecutionError, CellTimeoutError, DeadKernelError) as error:
            print(f"{path.name} is left as it was: {error}", file=sys.stderr, flush=True)
            faults += 1
        else:
            nbformat.write(notebook, path)
            print(f"{path.name}: {time.perf_counter() - started:.0f} s", flush=True)
    return faults


if __name__ == "__main__":
    sys.exit(main())

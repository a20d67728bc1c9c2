"""Tasks of lm-evaluation-harness in a folder of the user's: YAML files and their data, without the Hub.

Owns finding them, checking them before any weight is loaded, and the paths of their data. Runs no model.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from langchain_quantllm.compat.lm_eval import knows_metric, offline_datasets
from langchain_quantllm.compat.packages import is_installed
from langchain_quantllm.errors import InvalidOptionError, MissingPackageError, first_line, nearest, pip_install

LOCAL_FORMATS = ("json", "csv", "parquet", "text", "arrow")
"""Values of `dataset_path` that read the files of `data_files`; any other one names a data set on the Hub."""

_EXAMPLE = "dataset_path: json, and dataset_kwargs: {data_files: {test: questions.jsonl}}"


class TaskFiles:
    """The tasks of a folder, checked, and ready to be built as often as they run.

    Attributes:
        names: Their names.
    """

    def __init__(self, place: str) -> None:
        """Read the YAML files of a folder.

        Args:
            place: The folder; or `FOLDER:name,name` for some of its tasks. Paths of data are relative to the YAML file.

        Raises:
            InvalidOptionError: If the folder has no such tasks, or one of them needs the Hub.
            MissingPackageError: If lm-eval is not installed.
        """
        if not is_installed("lm_eval"):
            msg = f"--tasks needs lm-eval: {pip_install('langchain-quantllm[quality]')}."
            raise MissingPackageError(msg)
        folder, wanted = _folder_and_names(place)
        files = {}
        for file in sorted(folder.rglob("*.yaml")):
            config = _read(file)
            if isinstance(config.get("task"), str) and "group" not in config:
                files[config["task"]] = (file, config)
        if not files:
            msg = f"--tasks {folder} holds no task; write a .yaml file with `task: NAME` for each, as lm-eval reads it."
            raise InvalidOptionError(msg)
        for name in wanted:
            if name not in files:
                msg = f"--tasks {place!r}: there is no task {name!r} in {folder}{nearest(name, files)}"
                raise InvalidOptionError(msg)
        self.names = wanted or list(files)
        self._files = {name: files[name][0] for name in self.names}
        self._data = {name: _data_of(*files[name]) for name in self.names}
        self._scratch = tempfile.TemporaryDirectory(prefix="quantllm-tasks-")  # gone with this object
        self.load()

    def load(self) -> dict[str, Any]:
        """Build the tasks with lm-eval.

        Returns:
            What `TaskManager.load` of lm-eval returns.

        Raises:
            InvalidOptionError: If lm-eval refuses one.
        """
        from lm_eval.tasks import TaskManager  # type: ignore[import-not-found,import-untyped,unused-ignore]

        scratch = Path(self._scratch.name)
        for i, (name, file) in enumerate(self._files.items()):
            # A file that includes the user's, with whole paths; YAML reads JSON.
            data = {**self._data[name], "cache_dir": str(scratch / "data")}
            made = {"include": str(file.resolve()), "task": name, "dataset_kwargs": data}
            (scratch / f"{i}.yaml").write_text(json.dumps(made), encoding="utf-8")
        try:
            with offline_datasets():
                found: dict[str, Any] = TaskManager(include_path=str(scratch), include_defaults=False).load(self.names)
        except Exception as error:  # of any kind: of a template, a data file, a function in the folder
            msg = f"lm-eval cannot build the tasks {', '.join(self.names)}: {type(error).__name__}: {first_line(error)}"
            raise InvalidOptionError(msg) from error
        return found


def _folder_and_names(place: str) -> tuple[Path, list[str]]:
    folder, _, names = (place, "", "") if Path(place).is_dir() else place.rpartition(":")
    if not folder or not Path(folder).is_dir():
        msg = f"--tasks {place!r} is no folder; give one with a .yaml file for each task, or FOLDER:name."
        raise InvalidOptionError(msg)
    return Path(folder), [name.strip() for name in names.split(",") if name.strip()]


def _read(file: Path, seen: Sequence[Path] = ()) -> dict[str, Any]:
    """Read a YAML file and what it includes; functions are None here."""
    import yaml  # type: ignore[import-untyped,unused-ignore]

    class Loader(yaml.SafeLoader):  # type: ignore[misc,unused-ignore]
        """Reads plain values."""

    Loader.add_multi_constructor("!", lambda *_: None)
    if file in seen:
        msg = f"{file} includes itself."
        raise InvalidOptionError(msg)
    try:
        found = yaml.load(file.read_text(encoding="utf-8"), Loader)  # noqa: S506  (a safe one)
    except (OSError, ValueError, yaml.YAMLError) as error:
        msg = f"{file} cannot be read as YAML: {first_line(error)}."
        raise InvalidOptionError(msg) from error
    if not isinstance(found, dict):
        msg = f"{file} is no task of lm-eval: it holds a {type(found).__name__} and no names with values."
        raise InvalidOptionError(msg)
    includes = found.pop("include", [])
    merged: dict[str, Any] = {}
    for include in [includes] if isinstance(includes, str) else includes:
        merged |= _read(file.parent / include, (*seen, file))
    return {**merged, **found}


def _data_of(file: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a task's data, with whole paths.

    Raises:
        InvalidOptionError: If data or metrics come from the Hub, or a file is not there.
    """
    name, given = config["task"], dict(config.get("dataset_kwargs") or {})
    if "class" in config or "custom_dataset" in config:
        return given  # code of the folder, which makes its data itself
    if config.get("dataset_path") not in LOCAL_FORMATS or not given.get("data_files"):
        msg = (
            f"the task {name!r} in {file} takes its data from {config.get('dataset_path')!r}, and nothing is fetched; "
            f"store them beside it, and write {_EXAMPLE}."
        )
        raise InvalidOptionError(msg)
    for metric in config.get("metric_list") or ():
        called = metric.get("metric")  # None for a function of the folder
        if metric.get("hf_evaluate") or (called is not None and not knows_metric(called)):
            msg = f"the task {name!r} in {file} fetches its metric {called!r} from the Hub; use one of lm-eval's own."
            raise InvalidOptionError(msg)

    def whole(path: Any) -> Any:
        if isinstance(path, list):
            return [whole(one) for one in path]
        if not (file.parent / path).is_file():
            msg = f"the task {name!r} in {file} names the data file {path!r}, which is not there."
            raise InvalidOptionError(msg)
        return str((file.parent / path).resolve())

    files = given["data_files"]
    return {**given, "data_files": {k: whole(v) for k, v in files.items()} if isinstance(files, dict) else whole(files)}

"""The guard around a script's main part, `if __name__ == "__main__":`, which starting processes needs.

A process that multiprocessing spawns runs the main script again, as a module of another name. Without the guard it
would start the engine again, and so on; multiprocessing stops that with an error that names neither script nor line.
Source: get_preparation_data and _fixup_main_from_name in multiprocessing/spawn.py.
"""

from __future__ import annotations

import ast
import multiprocessing
import sys
from pathlib import Path
from types import FrameType

from langchain_quantllm.errors import UnsupportedError

_REMEDY = (
    "it starts processes, and each runs the script again: put the calls into a function, and call that under "
    '`if __name__ == "__main__":`.'
)


def check_guarded(what: str) -> None:
    """Check that this process may start others, as far as that can be seen from the threads that run.

    Args:
        what: What starts processes, in the error's words.

    Raises:
        UnsupportedError: If this process runs a script again that has no guard, or the main script has none around the
            line that it is at.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        msg = f"{what} is started while a process imports the main script: {_REMEDY}"
        raise UnsupportedError(msg)
    if multiprocessing.current_process().daemon:
        msg = f"{what} cannot be started in a daemonic process, which may have no children; start it in another one."
        raise UnsupportedError(msg)
    main = sys.modules.get("__main__")
    file, spec = getattr(main, "__file__", None), getattr(main, "__spec__", None)
    if file is None or (spec is not None and spec.name.endswith("__main__")):  # interactive, or python -m package
        return
    line = _line_of_main(main.__dict__)
    if line is not None and _is_unguarded(file, line):
        msg = f"{what} is started by line {line} of {file}: {_REMEDY}"
        raise UnsupportedError(msg)


def _line_of_main(names: dict[str, object]) -> int | None:
    """Return the line that the main script is at, in whichever thread; None if it has ended."""
    for running in sys._current_frames().values():
        frame: FrameType | None = running
        while frame is not None:
            if frame.f_globals is names and frame.f_code.co_name == "<module>":
                return frame.f_lineno
            frame = frame.f_back
    return None


def _is_unguarded(file: str, line: int) -> bool:
    """Whether a line of a script runs when the script is imported under another name; False if that is not known."""
    try:
        tree = ast.parse(Path(file).read_bytes())
    except (OSError, SyntaxError, ValueError):
        return False
    around = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.stmt) and node.lineno <= line <= (node.end_lineno or node.lineno)
    ]
    return bool(around) and not any(isinstance(node, ast.If) and _asks_for_main(node.test) for node in around)


def _asks_for_main(test: ast.expr) -> bool:
    """Whether a condition has to do with the module's name; what it asks is the script's own business."""
    return any(isinstance(node, ast.Name) and node.id == "__name__" for node in ast.walk(test))

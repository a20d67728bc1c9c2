"""Run a test module's kernel cases in Triton's interpreter.

It must be switched on before Triton is imported: so one process runs the module with `-m`, and its `main` calls
`report_cases` with the names that the tests ask for.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch


def interpret(module: str, names: Iterable[str]) -> dict[str, Any]:
    """Run cases of a module in a process of their own; gives each one's report, by name."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", module],
        input=json.dumps(list(names)),
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
        timeout=550,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def selected_names(request: pytest.FixtureRequest, fixture: str) -> list[str]:
    """List the values of `name` in the tests of the requesting module that this run has selected and use a fixture."""
    tests = [item for item in request.session.items if item.path == request.path and isinstance(item, pytest.Function)]
    used = [test.callspec.params for test in tests if fixture in test.fixturenames and hasattr(test, "callspec")]
    return list(dict.fromkeys(params["name"] for params in used if "name" in params))


def multiply_in_order() -> None:
    """Let the interpreter sum each product's terms one after another, as a GPU's tile does whatever is beside it.

    It multiplies tiles by NumPy's `matmul`, whose BLAS chooses another order for other numbers of rows on some CPUs.
    Only for a process of its own.
    """

    def matmul(a: Any, b: Any, dtype: Any = None) -> Any:
        a, b = a.astype(dtype or a.dtype), b.astype(dtype or b.dtype)
        total = numpy.zeros((*a.shape[:-1], b.shape[-1]), a.dtype)
        for k in range(a.shape[-1]):
            total += a[..., k, None] * b[..., k, None, :]
        return total

    numpy.matmul = matmul  # type: ignore[assignment]


def report_cases(run: Callable[[str], Any]) -> None:
    """Read names from the standard input, run the case of each, and print what came of it as JSON."""
    torch.set_num_threads(1)
    report = {}
    for name in json.loads(sys.stdin.read()):
        try:
            report[name] = run(name)
        except Exception:
            report[name] = {"failed": traceback.format_exc()}
    print(json.dumps(report))

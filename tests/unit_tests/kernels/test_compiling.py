"""The kernels compile for a GPU, which Triton's interpreter does not show."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

MODULES = ("attention", "experts", "invariant", "linear", "norms_and_rotary", "sampling")


@pytest.mark.parametrize("name", MODULES)
def test_what_the_cases_launch_compiles_for_a_gpu(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.compile_kernels", f"tests.unit_tests.kernels.test_{name}"],
        cwd=Path(__file__).parents[3],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["failures"] == []
    assert sum(report["compiled"].values()) > 20

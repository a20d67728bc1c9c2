"""The products of CPUs on a processor without AVX512: the same tests, with PyTorch held to AVX2."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

NARROW = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}


@pytest.mark.slow
@pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="AVX2 is of x86")
def test_products_and_whole_layers_are_right_without_avx512() -> None:
    import torch

    if torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "NO AVX"):
        pytest.skip("this processor has no AVX2")
    root = Path(__file__).parents[3]
    files = ["tests/unit_tests/kernels/test_linear_cpu.py", "tests/unit_tests/engine/test_fusion_layers.py"]
    plugins = ["-p", "no:cacheprovider", "-p", "no:xdist"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *plugins, "-m", "not slow", *files],
        cwd=root,
        env={**{k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}, **NARROW},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout

"""The kernels compile for GPUs, which Triton's interpreter does not show, and fit into their shared memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.chips import CHIPS
from tests.support.selection import slow_but

MODULES = ("attention", "experts", "invariant", "linear", "norms_and_rotary", "recurrent", "sampling")

EIGHT_BITS = {
    "attention": [f"{way}-{kv}-float16" for way in ("decode", "prefill") for kv in ("int8", "fp8")],
    "norms_and_rotary": ["rotate-int8-float16", "rotate-fp8-float16"],
}
"""Cases with keys and values in 8 bits, whose instructions only the last stage of the compiler looks at."""


def compiled(name: str, cache: Path, *options: str) -> dict[str, Any]:
    """Compile cases of a module; returns the report."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.compile_kernels", f"tests.unit_tests.kernels.test_{name}", *options],
        cwd=Path(__file__).parents[3],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


@pytest.mark.compat  # Triton changes what it compiles
@pytest.mark.parametrize("name", MODULES)
def test_what_the_cases_launch_compiles_for_a_gpu(name: str, tmp_path: Path) -> None:
    report = compiled(name, tmp_path)
    assert report["failures"] == []
    assert sum(report["compiled"].values()) > (10 if name == "recurrent" else 20)


def _shared_bytes(chip: str, rows: str, tmp_path: Path, kinds: str = "") -> dict[str, dict[str, list[int]]]:
    """Compile what the rule chooses for a chip; returns the shared memory of kernels by format and rows."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.compile_rules", chip, rows, *filter(None, [kinds])],
        cwd=Path(__file__).parents[3],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def _check(report: dict[str, dict[str, list[int]]], chip: str, least: int) -> None:
    assert len(report) >= least
    for name, kernels in report.items():
        assert kernels, name
        assert max(map(max, kernels.values())) <= CHIPS[chip].block_bytes, name


@pytest.mark.parametrize("chip", ["A10", "H100"])
def test_products_of_many_rows_fit_into_the_shared_memory_of_a_chip(chip: str, tmp_path: Path) -> None:
    _check(_shared_bytes(chip, "128", tmp_path, "nf4,gptq4"), chip, 2)


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
def test_every_product_fits_into_the_shared_memory_of_a_chip(chip: str, tmp_path: Path) -> None:
    report = _shared_bytes(chip, "1,2,16,64,128,256", tmp_path)
    _check(report, chip, 60)


@pytest.mark.parametrize("capability", slow_but(["90"], ["80", "89", "90"]))
@pytest.mark.parametrize("name", list(EIGHT_BITS))
def test_8_bits_are_decoded_by_instructions_of_each_gpu(name: str, capability: str, tmp_path: Path) -> None:
    """Ampere has none for fp8: whole numbers are moved to the places of float16's bits."""
    report = compiled(name, tmp_path, "--for", capability, *EIGHT_BITS[name])
    assert report["failures"] == []
    kernels = {"_decode_kernel", "_prefill_kernel", "_write_kernel"} if name == "attention" else {"_rotate_kernel"}
    assert {kernel for kernel in kernels if report["compiled"].get(kernel, 0) >= 2} == kernels

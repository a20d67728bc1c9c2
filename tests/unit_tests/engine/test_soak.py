"""A short soak of the fast engine; the long one is `python -m benchmarks.soak`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_hundreds_of_requests_of_every_kind_leave_nothing_behind() -> None:
    # A process of its own: what is counted are all tensors, threads and files, and other tests have theirs.
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.soak", "--requests", "400", "--seed", "1"],
        cwd=Path(__file__).parents[3], capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert sum(found["ended"].values()) == 400
    assert {"cancelled", "plain", "sampled", "several", "stopped", "turn"} <= found["ended"].keys()

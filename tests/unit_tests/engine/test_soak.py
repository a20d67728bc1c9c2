"""Short runs of the soak and of the stress; the long ones are `python -m benchmarks.soak` and `benchmarks.stress`."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.census import left_behind, settled_census
from benchmarks.oracle import Oracle
from benchmarks.soak import soak, wrong_answers
from benchmarks.stress import stress
from langchain_quantllm.engine.sequence import bare_sequence
from tests.support.families import FAST, family_model, likeliest_ids, random_ids


def run(module: str, *arguments: str) -> list[str]:
    """Run a benchmark and return the lines that it prints.

    In a process of its own: what the soak counts are all tensors, threads and files, and other tests have theirs.
    """
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{module}", *arguments],
        cwd=Path(__file__).parents[3], capture_output=True, text=True, timeout=580, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


def cells(lines: list[str]) -> dict[str, list[str]]:
    """Return the cells of a printed table's rows, by the first one."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return {row[0]: row[1:] for row in rows[2:]}


class TestSoak:
    def test_some_requests_of_every_kind_get_their_answers(self) -> None:
        found = soak(130, engine="both", seed=1)
        assert not wrong_answers(found)
        assert sum(tally.right for tally in found["tallies"].values()) > 60

    @pytest.mark.slow
    @pytest.mark.parametrize("engine", ["fast", "pipeline", "both"])
    def test_hundreds_of_requests_of_every_kind_do_and_leave_nothing_behind(self, engine: str) -> None:
        lines = run("soak", "--requests", "600", "--seed", "1", "--engine", engine)
        found: dict[str, Any] = json.loads(lines[-1])
        kinds = cells(lines)
        assert {
            "cancelled",
            "greedy",
            "seeded",
            "several",
            "stopped",
            "turn",
            "masked",
            "unread",
            "nan",
        } <= kinds.keys()
        assert int(kinds["all"][1]) > 300  # right
        assert found["books"] == []
        if engine != "pipeline":
            assert found["preemptions"] > 0


class TestCensus:
    """It must see what is left behind, or the soak would show nothing."""

    def test_tensors_left_behind_are_named_by_their_holders(self) -> None:
        held = {"old": torch.zeros(3, 5)}
        half = settled_census()
        held["old"] = torch.zeros(3, 5)  # in place of the one before
        held["new"] = torch.zeros(7, 11)
        left = left_behind(half, settled_census())
        assert any(line.startswith("tensors: ") for line in left)
        assert any(line.startswith("bytes of tensors: ") for line in left)
        kinds = [line for line in left if "[3, 5]" in line or "[7, 11]" in line]
        assert kinds == ["1 of [7, 11] torch.float32 in dict['new']"]

    def test_threads_and_files_are(self, tmp_path: Path) -> None:
        half = settled_census()
        ended = threading.Event()
        thread = threading.Thread(target=ended.wait)
        thread.start()
        with (tmp_path / "file").open("w"):
            left = left_behind(half, settled_census())
        ended.set()
        thread.join()
        assert [line.partition(":")[0] for line in left] == ["threads", "files"]

    def test_what_comes_and_goes_is_not(self) -> None:
        half = settled_census()
        held = [torch.zeros(3, 5)]
        del held
        assert left_behind(half, settled_census()) == []


class TestStress:
    def test_rows_of_some_models_get_the_tokens_of_a_plain_forward(self) -> None:
        counts = stress(2, 80)
        assert sum(count.rows for count in counts.values()) == 80
        assert not [fault for count in counts.values() for fault in count.verdict.faults]

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
    def test_rows_of_some_models_do_on_a_gpu(self) -> None:
        counts = stress(8, 400, device="cuda")
        assert not [fault for count in counts.values() for fault in count.verdict.faults]

    @pytest.mark.slow
    def test_rows_of_many_models_do(self) -> None:
        *_, wrong, cancelled, shared, preempted = cells(run("stress", "--models", "12", "--rows", "1000"))["all"]
        assert wrong == "0"
        assert min(int(cancelled), int(shared), int(preempted)) > 0


class TestOracle:
    """It must see a wrong token, or the soak and the stress would show nothing."""

    @pytest.fixture
    def oracle(self) -> Oracle:
        return Oracle(family_model(FAST["llama-grouped"]))

    def greedy(self, oracle: Oracle, count: int = 12) -> list[int]:
        ids: list[int] = []
        for _ in range(count):
            ids += likeliest_ids(oracle._model, random_ids(20), [*ids, 0])[-1:]
        return ids

    def test_greedy_tokens_are_right(self, oracle: Oracle) -> None:
        verdict = oracle.check_greedy(random_ids(20), self.greedy(oracle))
        assert (verdict.tokens, verdict.ties, verdict.faults) == (12, 0, [])

    @pytest.mark.parametrize("at", [0, 5, 11])
    def test_another_token_is_wrong(self, oracle: Oracle, at: int) -> None:
        ids = self.greedy(oracle)
        ids[at] = (ids[at] + 1) % 500
        request = bare_sequence(random_ids(20), 12).request
        for verdict in (oracle.check_greedy(random_ids(20), ids), oracle.check(request, ids)):
            assert f"token {at} " in verdict.faults[0]

    def test_scores_that_are_no_numbers_are_wrong(self) -> None:
        model = family_model(FAST["llama-grouped"])
        with torch.no_grad():
            model.get_output_embeddings().weight.fill_(torch.nan)
        assert Oracle(model).check_greedy([1, 2], [3]).faults
        assert Oracle(model).check(bare_sequence([1, 2], 1).request, [3]).faults

"""Snapshots and tracked memory compared with known allocations."""

from __future__ import annotations

import json
import mmap
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from langchain_quantllm.errors import InvalidOptionError, UnsupportedError
from langchain_quantllm.memory import available_memory, take_snapshot, track_memory
from langchain_quantllm.memory.measure import _container_left_bytes
from tests.support.memory import MB
from tests.support.models import wait_until


def resident(size_bytes: int) -> mmap.mmap:
    """Take memory of the system itself: an allocator may have freed blocks, resident already, for a tensor."""
    memory = mmap.mmap(-1, size_bytes)
    for page in range(0, size_bytes, mmap.PAGESIZE):
        memory[page] = 1
    return memory


class TestMeasuring:
    def test_snapshot_sees_new_resident_memory(self) -> None:
        before = take_snapshot().reading("cpu")
        kept = resident(100 * MB)
        after = take_snapshot().reading("cpu")
        kept.close()
        assert before is not None
        assert after is not None
        # 10 MB: what the interpreter and other threads allocate or free meanwhile
        assert after.used_bytes - before.used_bytes == pytest.approx(100 * MB, abs=10 * MB)
        assert after.peak_bytes >= after.used_bytes
        assert 0 < after.available_bytes <= after.total_bytes

    @pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the parts of the resident memory")
    def test_parts_of_the_resident_memory_add_up(self, tmp_path: Path) -> None:
        file = tmp_path / "weights"
        file.write_bytes(bytes(64 * MB))
        before = take_snapshot().reading("cpu")
        own = resident(100 * MB)
        with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            assert not any(mapped[:: mmap.PAGESIZE])
            after = take_snapshot().reading("cpu")
        own.close()
        for reading in (before, after):
            parts = (reading.anonymous_bytes, reading.file_bytes, reading.shared_bytes)
            assert sum(parts) == reading.resident_bytes
        shared_bytes = after.shared_bytes - before.shared_bytes
        # Python's anonymous mmap is shared memory, which the kernel counts apart, if not mapped privately.
        assert after.anonymous_bytes - before.anonymous_bytes + shared_bytes == pytest.approx(100 * MB, abs=10 * MB)
        assert after.file_bytes - before.file_bytes == pytest.approx(64 * MB, abs=5 * MB)

    def test_tracking_sees_a_peak_that_is_gone_afterwards(self) -> None:
        with track_memory() as tracked:
            assert tracked.after is None
            with track_memory() as inner:
                passing = resident(200 * MB)
                assert inner.before.reading("cpu").used_bytes > 0
                seen_bytes = take_snapshot().reading("cpu").used_bytes
                wait_until(lambda: min(t.peak.get("cpu", 0) for t in (tracked, inner)) > seen_bytes - 20 * MB)
                passing.close()
        assert tracked.after is not None
        for measured in (tracked, inner):
            grown_bytes = measured.peak["cpu"] - measured.before.reading("cpu").used_bytes
            assert grown_bytes == pytest.approx(200 * MB, abs=20 * MB)
            assert measured.after.reading("cpu").used_bytes < measured.peak["cpu"] - 150 * MB
        text = str(tracked)
        assert repr(tracked) == text
        assert "resident, this process" in text
        assert "peak" in text
        json.dumps(tracked.to_dict())

    def test_tracking_ends_with_an_error(self) -> None:
        tracking = track_memory()
        tracked = tracking.__enter__()
        assert not tracking.__exit__(RuntimeError, RuntimeError("from the block"), None)
        assert tracked.after is not None

    def test_available_memory_of_known_devices_only(self) -> None:
        assert 0 < available_memory("cpu") == pytest.approx(available_memory(torch.device("cpu")), abs=500 * MB)
        with pytest.raises(InvalidOptionError, match="'gpu'"):
            available_memory("gpu")
        with pytest.raises(InvalidOptionError, match="'meta'"):
            available_memory("meta")
        with pytest.raises(UnsupportedError, match="cuda:99"):
            available_memory("cuda:99")

    def test_container_limit_leaves_what_is_not_in_use(self, tmp_path: Path) -> None:
        assert _container_left_bytes(tmp_path) is None
        (tmp_path / "memory.max").write_text("max\n")
        (tmp_path / "memory.current").write_text("600\n")
        (tmp_path / "memory.stat").write_text("anon 300\ninactive_file 250\n")
        assert _container_left_bytes(tmp_path) is None
        (tmp_path / "memory.max").write_text("1000\n")
        assert _container_left_bytes(tmp_path) == 1000 - 600 + 250


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_nested_peaks_survive_the_reset() -> None:
    with track_memory(["cuda:0"]) as outer:
        big = torch.empty(100 * MB, dtype=torch.uint8, device="cuda")
        del big
        with track_memory(["cuda:0"]) as inner:
            small = torch.empty(10 * MB, dtype=torch.uint8, device="cuda")
            del small
    start_bytes = outer.before.reading("cuda:0").used_bytes
    assert outer.peak["cuda:0"] - start_bytes >= 100 * MB
    assert 10 * MB <= inner.peak["cuda:0"] - start_bytes < 20 * MB
    assert available_memory("cuda") > 0


def test_importing_loads_no_torch() -> None:
    code = "import sys, langchain_quantllm.memory; sys.exit(bool({'torch', 'transformers', 'rich'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

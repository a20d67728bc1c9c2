"""Output folders: where they may be, one run at a time, and processes that are killed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from langchain_quantllm import merge_adapter, quantize
from langchain_quantllm.errors import InvalidOptionError, OutputError
from langchain_quantllm.quantization import exchange as exchanging
from langchain_quantllm.quantization.output_dir import claim_output
from langchain_quantllm.quantization.output_lock import lock_by_name, lock_by_system
from tests.support.adapters import make_adapter
from tests.support.checkpoints import make_checkpoint


def tree(folder: Path) -> dict[str, bytes | str]:
    """The content of a folder: bytes of files, targets of links."""
    found: dict[str, bytes | str] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = os.readlink(path)
        else:
            found[name] = "folder" if path.is_dir() else path.read_bytes()
    return found


def write(output: Path, content: str, meanwhile: Callable[[], Any] = lambda: None, **options: Any) -> None:
    """Write a small checkpoint in the place of a large one."""
    with claim_output(output, (), **options) as claimed:
        with claimed.writing() as part:
            (part / "config.json").write_text(content)
            (part / "model.safetensors").write_text(content)
        meanwhile()
        claimed.publish()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder `models` with a base and something of its owner's, and adapters in a folder of their own."""
    root = tmp_path_factory.mktemp("made")
    base = make_checkpoint(root / "models" / "base")
    make_adapter(base, root / "adapters" / "sql", seed=1)
    return root


@pytest.fixture
def world(made: Path, tmp_path: Path) -> Path:
    root = Path(shutil.copytree(made, tmp_path / "world"))
    (root / "models" / "other").mkdir()
    (root / "models" / "other" / "mine.txt").write_text("mine")
    (root / "texts").mkdir()
    (root / "texts" / "config.json").write_text("[]")
    (root / "texts" / "vocab.txt").write_text("one two three " * 50)
    (root / "to-models").symlink_to(root / "models")
    (root / "to-base").symlink_to(root / "models" / "base")
    # Weights elsewhere, to which the files of a checkpoint are links, as in the cache of the Hub.
    shutil.copytree(root / "models" / "base", root / "blobs")
    (root / "linked").mkdir()
    for path in (root / "blobs").iterdir():
        (root / "linked" / path.name).symlink_to(path)
    return root


_BAD = {
    "parent of the source": ("models/base", "models"),
    "parent of its parent": ("models/base", "."),
    "source": ("models/base", "models/base"),
    "child of the source": ("models/base", "models/base/quantized"),
    "link to the source": ("models/base", "to-base"),
    "link to the parent": ("models/base", "to-models"),
    "source given as a link": ("to-base", "models/base"),
    "with dots": ("models/base", "adapters/../models"),
    "files of the source are links to it": ("linked", "blobs"),
}


class TestPlace:
    @pytest.mark.parametrize("case", _BAD)
    @pytest.mark.parametrize("overwrite", [False, True])
    def test_a_source_is_never_touched(self, world: Path, case: str, overwrite: bool) -> None:
        source, output = _BAD[case]
        before = tree(world)
        with pytest.raises(InvalidOptionError, match="one of the sources; give another folder"):
            quantize(world / source, "nf4", None, world / output, overwrite=overwrite, progress=False)
        assert tree(world) == before

    @pytest.mark.parametrize("output", ["adapters/sql", "adapters", "adapters/sql/merged", "models", "models/base"])
    def test_neither_is_an_adapter(self, world: Path, output: str) -> None:
        before = tree(world)
        sources = str(world / "models" / "base"), str(world / "adapters" / "sql")
        with pytest.raises(InvalidOptionError, match="one of the sources"):
            merge_adapter(*sources, world / output, overwrite=True, progress=False)
        assert tree(world) == before

    def test_neither_is_the_calibration(self, world: Path) -> None:
        """Though the names are those of a checkpoint."""
        before = tree(world)
        with pytest.raises(InvalidOptionError, match=r"holds .*vocab.txt', which is read"):
            quantize(world / "models" / "base", "gptq", world / "texts" / "vocab.txt", world / "texts", overwrite=True)
        assert tree(world) == before

    def test_a_source_is_not_taken_for_the_finished_blocks_of_its_output(self, world: Path) -> None:
        source = (world / "models" / "base").rename(world / "tiny.partial")
        before = tree(world)
        with pytest.raises(InvalidOptionError, match="one of the sources"):
            quantize(source, "gptq", "none", world / "tiny", progress=False)
        shutil.copytree(world / "models" / "other", world / "mine.partial")
        before = tree(world)
        for overwrite in (False, True):
            with pytest.raises(InvalidOptionError, match=r"mine.partial holds 'mine.txt', and finished blocks"):
                quantize(source, "gptq", "none", world / "mine", overwrite=overwrite, progress=False)
            assert tree(world) == before

    def test_places_of_the_system(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        home, hub = tmp_path / "people" / "home", tmp_path / "hub"
        for folder in (home, hub, tmp_path / "here" / "below"):
            folder.mkdir(parents=True)
        monkeypatch.setenv("HOME", str(home))
        monkeypatch.chdir(tmp_path / "here" / "below")
        for output, says in {
            "/": "the root of a disk",
            home: "home folder",
            home.parent: "home folder",
            "~": "home folder",
            ".": "current folder",
            "..": "current folder",
            "": "is no path",
            "a\0b": "is no path",
            hub: "cache of the Hub",
            hub / "models--a--b" / "snapshots" / "c": "cache of the Hub",
            "~nobody-of-this-name/out": "is no path",
            tmp_path / ".out.quantllm-new": "working folder",
        }.items():
            with (
                pytest.raises(InvalidOptionError, match=says),
                claim_output(output, (), cache_dir=str(hub), overwrite=True),
            ):
                pytest.fail("claimed")
        write(home / "out", "new")  # inside of them is allowed
        write(tmp_path / "here" / "below" / "out", "new")

    @pytest.mark.parametrize(
        ("name", "found"),
        [
            ("notes.txt", "'notes.txt'"),
            ("optimizer.pt", "'optimizer.pt'"),
            ("checkpoint-500/config.json", "'checkpoint-500/'"),
            (".git/config", "'.git/'"),
            ("train.py", "'train.py'"),
            ("additional_chat_templates/mine.txt", "'additional_chat_templates/mine.txt'"),
            ("pytorch_model.bin", "'pytorch_model.bin'"),
        ],
    )
    def test_only_a_checkpoint_is_replaced(self, tmp_path: Path, name: str, found: str) -> None:
        output = Path(make_checkpoint(tmp_path / "out"))
        (output / name).parent.mkdir(exist_ok=True)
        (output / name).write_text("mine")
        before = tree(tmp_path)
        with pytest.raises(InvalidOptionError, match=f"holds {found}, and overwrite=True only replaces"):
            write(output, "new", overwrite=True)
        assert tree(tmp_path) == before
        (output / name).unlink()
        if "/" in name and (output / name).parent.name != "additional_chat_templates":
            (output / name).parent.rmdir()
        write(output, "new", overwrite=True)
        assert tree(tmp_path).keys() == {"out", "out/config.json", "out/model.safetensors"}

    def test_a_folder_without_a_config_is_no_checkpoint(self, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "vocab.json").write_text("mine")
        with pytest.raises(InvalidOptionError, match="holds no config.json"):
            write(tmp_path / "out", "new", overwrite=True)

    def test_a_checkpoint_that_quantize_wrote_is_replaced(self, made: Path, tmp_path: Path) -> None:
        for scheme in ("int8", "nf4"):
            quantize(made / "models" / "base", scheme, None, tmp_path / "out", overwrite=True, progress=False)
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert config["quantization_config"]["bnb_4bit_quant_type"] == "nf4"
        assert os.listdir(tmp_path) == ["out"]


class TestOneRun:
    def test_what_appears_meanwhile_stays(self, tmp_path: Path) -> None:
        output = tmp_path / "out"
        for overwrite in (False, True):

            def appear() -> None:
                output.mkdir()
                (output / "hours of work").write_text("theirs")

            with pytest.raises(OutputError, match="has appeared there meanwhile"):
                write(output, "new", appear, overwrite=overwrite)
            assert tree(tmp_path) == {"out": "folder", "out/hours of work": b"theirs"}
            shutil.rmtree(output)

    @pytest.mark.parametrize("in_one_step", [True, False])
    def test_a_result_that_changed_meanwhile_stays(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_one_step: bool
    ) -> None:
        if not in_one_step:
            monkeypatch.setattr(exchanging, "_renameat2", lambda: None)
        output = tmp_path / "out"
        for name in ("config.json", "notes.txt"):
            write(output, "old", overwrite=True)
            with pytest.raises(OutputError, match="has changed while this run"):
                write(output, "new", partial((output / name).write_text, "theirs"), overwrite=True)
            assert tree(tmp_path) == {
                "out": "folder",
                "out/config.json": b"old",
                "out/model.safetensors": b"old",
                f"out/{name}": b"theirs",
            }
            (output / name).unlink()
            (output / "config.json").write_text("old")

    def test_the_second_run_is_refused_at_once(self, made: Path, tmp_path: Path) -> None:
        base, output = made / "models" / "base", tmp_path / "out"
        told: list[str] = []

        def again() -> None:
            began = time.monotonic()
            for run in (
                lambda: quantize(base, "nf4", None, output, overwrite=True, progress=False),
                lambda: merge_adapter(str(base), str(made / "adapters" / "sql"), output, progress=False),
            ):
                with pytest.raises(OutputError) as caught:
                    run()
                told.append(str(caught.value))
            assert time.monotonic() - began < 2

        def report(progress: Any) -> None:
            if progress.done == 1:
                again()
                thread = threading.Thread(target=again)
                thread.start()
                thread.join()
                code = (
                    "import sys, langchain_quantllm as q\n"
                    "try: q.quantize(sys.argv[1], 'nf4', None, sys.argv[2], progress=False)\n"
                    "except q.errors.OutputError as error: print(error)"
                )
                done = subprocess.run(
                    [sys.executable, "-c", code, base, output], capture_output=True, text=True, check=True
                )
                told.append(done.stdout)

        quantize(base, "gptq", "none", output, device="cpu", report=report, progress=False)
        assert len(told) == 5
        assert all(f"'{output}' is being written by another run (process {os.getpid()})" in text for text in told)
        assert os.listdir(tmp_path) == ["out"]

    @pytest.mark.parametrize("lock", [lock_by_system, lock_by_name])
    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
    def test_the_lock_excludes_processes_and_threads(self, tmp_path: Path, lock: Callable[[Path], Any]) -> None:
        done = subprocess.run(
            [sys.executable, "-c", _CONTEND, lock.__name__, tmp_path], capture_output=True, text=True, check=True
        )
        held = [int(line) for line in done.stdout.split()]
        assert len(held) == 4
        assert all(count > 0 for count in held)
        assert os.listdir(tmp_path) == []

    def test_the_lock_of_a_dead_process_is_taken_over(self, tmp_path: Path) -> None:
        file = tmp_path / "lock"
        code = (
            "import os, pathlib, signal, sys\nfrom langchain_quantllm.quantization import output_lock\n"
            "getattr(output_lock, sys.argv[1])(pathlib.Path(sys.argv[2]))\nos.kill(os.getpid(), signal.SIGKILL)"
        )
        for lock in (lock_by_system, lock_by_name):
            done = subprocess.run([sys.executable, "-c", code, lock.__name__, file], check=False)
            assert done.returncode == -9
            assert json.loads(file.read_text())["pid"] != os.getpid()
            release = lock(file)
            assert json.loads(file.read_text())["pid"] == os.getpid()
            release()
            assert os.listdir(tmp_path) == []

    def test_the_lock_of_a_process_elsewhere_is_not(self, tmp_path: Path) -> None:
        file = tmp_path / "lock"
        for found in ({"pid": 2**22 + 1, "host": "another machine"}, None):
            file.write_text("" if found is None else json.dumps(found))
            with pytest.raises(Exception, match="^$"):
                lock_by_name(file)
            assert file.exists()
        os.utime(file, (0, 0))  # empty for long: its process died before it wrote it
        lock_by_name(file)()
        file.write_text(json.dumps({**json.loads(_own_lock(file)), "started": 1.0}))  # the number was given out again
        lock_by_name(file)()

    def test_a_link_in_the_place_of_the_lock_is_not_followed(self, tmp_path: Path) -> None:
        (tmp_path / "theirs").write_text("theirs")
        (tmp_path / ".out.quantllm-lock").symlink_to(tmp_path / "theirs")
        with pytest.raises(OutputError):
            write(tmp_path / "out", "new")
        (tmp_path / ".out.quantllm-lock").unlink()
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "theirs").write_text("theirs")
        (tmp_path / ".out.quantllm-new").symlink_to(tmp_path / "folder")
        write(tmp_path / "out", "new")
        assert tree(tmp_path / "folder") == {"theirs": b"theirs"}
        assert (tmp_path / "theirs").read_text() == "theirs"


def _own_lock(file: Path) -> str:
    release = lock_by_name(file)
    text = file.read_text()
    release()
    return text


_CONTEND = """
import os, pathlib, sys, threading, time
from langchain_quantllm.quantization import output_lock
from langchain_quantllm.quantization.output_lock import _HeldError
lock = getattr(output_lock, sys.argv[1])
file, inside = (pathlib.Path(sys.argv[2], name) for name in ("lock", "inside"))
read, write = os.pipe()
def contend(counts):
    held = 0
    end = time.monotonic() + 1.5
    while time.monotonic() < end:
        try:
            release = lock(file)
        except _HeldError:
            continue
        os.close(os.open(inside, os.O_CREAT | os.O_EXCL))  # fails where two are inside
        time.sleep(0.0005)
        inside.unlink()
        release()
        held += 1
    counts.append(held)
children = []
for _ in range(2):
    if not (child := os.fork()):
        counts = []
        threads = [threading.Thread(target=contend, args=(counts,)) for _ in range(2)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        os.write(write, " ".join(map(str, counts)).encode() + b" ")
        os._exit(0 if len(counts) == 2 else 1)
    children.append(child)
assert all(os.waitpid(child, 0)[1] == 0 for child in children)
os.close(write)
print(os.read(read, 1000).decode())
"""


# --- killed ---

_KILL = """
import os, pathlib, signal, sys
from langchain_quantllm.quantization import exchange, output_dir
from langchain_quantllm.quantization.output_dir import claim_output
root, in_one_step, has_old = pathlib.Path(sys.argv[1]), sys.argv[2] == "True", sys.argv[3] == "True"
stride = int(sys.argv[4])
if not in_one_step:
    exchange._renameat2 = lambda: None
output = root / "out"
NAMES = [f"model-{i}.safetensors" for i in range(3)] + ["config.json"]

def write(content):
    with claim_output(output, (), overwrite=True) as claimed:
        with claimed.writing() as part:
            for name in NAMES:
                (part / name).write_text(content)
        claimed.publish()

def child(work):
    if not (pid := os.fork()):
        try:
            work()
        except BaseException as error:
            print(repr(error), flush=True)
            os._exit(1)
        os._exit(0)
    return os.waitpid(pid, 0)[1]

def killed_at(step):
    def work():
        left = step
        def trace(frame, event, _):
            nonlocal left
            if "quantization" not in frame.f_code.co_filename:
                return None
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return trace
        sys.settrace(trace)
        write("new")
        sys.settrace(None)
    return child(work)

def look():
    # Recovers, as the next run does first, and ends without a result.
    try:
        with claim_output(output, (), overwrite=True):
            raise KeyError
    except KeyError:
        pass

def state():
    if not output.exists():
        return None
    found = {path.read_text() for path in output.iterdir()}
    assert sorted(path.name for path in output.iterdir()) == sorted(NAMES), os.listdir(output)
    assert len(found) == 1, found
    return found.pop()

step, seen = 0, {}
while True:
    if has_old and child(lambda: write("old")):
        raise SystemExit("the next run failed")
    status = killed_at(step)
    if in_one_step:
        state()
    if child(look):
        raise SystemExit("recovering failed")
    found = state()
    assert found in ({"old", "new"} if has_old else {None, "new"}), found
    assert os.listdir(root) == (["out"] if found else []), os.listdir(root)
    seen[found] = seen.get(found, 0) + 1
    if child(lambda: write("next")):
        raise SystemExit("the next run failed")
    assert state() == "next" and os.listdir(root) == ["out"], os.listdir(root)
    import shutil
    shutil.rmtree(output)
    if not status:
        break
    assert os.WIFSIGNALED(status), status
    step += stride
print(step, seen)
"""


@pytest.mark.parametrize("stride", [37, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("in_one_step", [True, False])
@pytest.mark.parametrize("has_old", [True, False])
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs fork, and renameat2")
def test_a_run_that_is_killed_at_any_step_leaves_a_whole_result(
    tmp_path: Path, in_one_step: bool, has_old: bool, stride: int
) -> None:
    """Killed before each line of the package's that runs, or before some of them."""
    done = subprocess.run(
        [sys.executable, "-c", _KILL, tmp_path, str(in_one_step), str(has_old), str(stride)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    steps, _, seen = done.stdout.partition(" ")
    assert int(steps) > 100
    assert "'new': " in seen
    assert ("'old': " if has_old else "None: ") in seen

"""The guard around a script's main part, checked on scripts that start processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from langchain_quantllm.compat.main_guard import check_guarded

CHILD = "multiprocessing.get_context('spawn').Process(target=print, args=('CHILD',))"
GUARDED = f"""
import multiprocessing, threading
from langchain_quantllm.compat.main_guard import check_guarded

def main():
    thread = threading.Thread(target=check_guarded, args=("it",))
    thread.start()
    thread.join()
    check_guarded("it")
    process = {CHILD}
    process.start()
    process.join()

if __name__ == "__main__":
    main()
    print("END")
"""
UNGUARDED = GUARDED.replace('if __name__ == "__main__":\n', "if True:\n")
IMPORTED_AGAIN = f"""
import multiprocessing
from langchain_quantllm.compat.main_guard import check_guarded

if __name__ == "__mp_main__":
    check_guarded("it")
if __name__ == "__main__":
    process = {CHILD}
    process.start()
    process.join()
"""


def run(folder: Path, code: str, *before: str) -> subprocess.CompletedProcess[str]:
    script = folder / "script.py"
    script.write_text(code)
    command = [sys.executable, *(before or [str(script)])]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_a_guarded_script_may_start_processes(tmp_path: Path) -> None:
    done = run(tmp_path, GUARDED)
    assert done.stdout.split() == ["CHILD", "END"], done.stderr


def test_an_unguarded_script_is_told_its_line(tmp_path: Path) -> None:
    done = run(tmp_path, UNGUARDED)
    assert "UnsupportedError: it is started by line 15 of" in done.stderr
    assert "CHILD" not in done.stdout


def test_a_process_that_imports_the_script_again_may_start_none(tmp_path: Path) -> None:
    assert "it is started while a process imports the main script" in run(tmp_path, IMPORTED_AGAIN).stderr


def test_code_that_no_process_runs_again_needs_no_guard(tmp_path: Path) -> None:
    code = "from langchain_quantllm.compat.main_guard import check_guarded; check_guarded('it'); print('END')"
    assert run(tmp_path, "", "-c", code).stdout.split() == ["END"]


def test_a_test_may_start_processes() -> None:
    check_guarded("it")


@pytest.mark.parametrize("condition", ["__name__ == '__main__'", "'__main__' == __name__", "__name__ != '__mp_main__'"])
def test_any_condition_on_the_name_is_a_guard(tmp_path: Path, condition: str) -> None:
    done = run(tmp_path, GUARDED.replace('__name__ == "__main__"', condition))
    assert "END" in done.stdout, done.stderr


@pytest.mark.parametrize("around", ["try", "with contextlib.nullcontext()"])
def test_a_guard_may_stand_inside_other_statements(tmp_path: Path, around: str) -> None:
    begin, end = GUARDED.split('if __name__ == "__main__":\n')
    inside = "".join(f"    {line}\n" for line in end.splitlines())
    after = "finally:\n    pass\n" if around == "try" else ""
    code = f'import contextlib{begin}{around}:\n    if __name__ == "__main__":\n{inside}{after}'
    done = run(tmp_path, code)
    assert done.stdout.split() == ["CHILD", "END"], done.stderr
    unguarded = run(tmp_path, code.replace('if __name__ == "__main__"', "if True"))
    assert "UnsupportedError: it is started by line" in unguarded.stderr

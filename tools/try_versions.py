"""Run the tests marked `compat` with the newest or the oldest versions of all packages, and show both.

    python tools/try_versions.py newest    # the newest of everything, whatever pyproject.toml allows
    python tools/try_versions.py oldest    # the oldest that pyproject.toml allows (requirements/oldest.txt)

Ends with 1 where a test fails, and says how that test ended in .venv/test-all.xml, which `make test-all` writes.
`--record` writes the outcome into docs/compatibility.md.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree  # the file is pytest's own

from environment import ROOT, Environment
from lock import EXTRAS, OLDEST_TORCH

RECORD = ROOT / "docs/compatibility.md"
READ_PROJECT = """
import json, sys
try:
    import tomllib
except ImportError:
    from pip._vendor import tomli as tomllib
print(json.dumps(tomllib.load(open("pyproject.toml", "rb"))))
"""
READ_VERSIONS = """
import json, platform
from langchain_quantllm.compat.versions import TRIED, installed_version
print(json.dumps({"python": platform.python_version(), **{name: installed_version(name) for name in TRIED}}))
"""


def _read(python: Path, code: str) -> dict[str, object]:
    done = subprocess.run([str(python), "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, object] = json.loads(done.stdout)
    return found


def newest_requirements(python: Path) -> list[str]:
    """Every requirement of pyproject.toml that the tests need, without its upper bound."""
    project: dict = _read(python, READ_PROJECT)
    extras = project["project"]["optional-dependencies"]
    declared = [*project["project"]["dependencies"], *project["dependency-groups"]["test"]]
    declared += [requirement for extra in EXTRAS for requirement in extras[extra]]
    return [re.sub(r",?<[\d.]+", "", requirement) for requirement in declared]


def make_newest() -> Environment:
    """An environment with the newest version of every package, whatever pip's own settings hold back."""
    environment = Environment(ROOT / ".venv-newest", {"PIP_CONSTRAINT": os.devnull})
    environment.pip_install("--upgrade", "pip")
    environment.install_torch(["--upgrade", "torch"], "torch")
    requirements = newest_requirements(environment.python)
    environment.pip_install("--upgrade", "hatchling", "editables", *requirements)
    environment.install_package()
    return environment


def make_oldest() -> Environment:
    """An environment with the oldest versions that pyproject.toml allows."""
    environment = Environment(ROOT / ".venv-oldest")
    environment.install_torch([f"torch=={OLDEST_TORCH}+cpu"], f"torch=={OLDEST_TORCH}")
    environment.install_lock(ROOT / "requirements/oldest.txt")
    environment.install_package()
    return environment


def outcomes(report: Path) -> Iterator[tuple[str, str, str]]:
    """Name, outcome and first line of the error of each test in a JUnit file of pytest's."""
    for case in ElementTree.parse(report).iter("testcase"):  # noqa: S314
        name = f"{case.get('classname', '').replace('.', '/')}::{case.get('name')}"
        for child in case:
            if child.tag in ("failure", "error", "skipped"):
                yield (
                    name,
                    child.tag,
                    (child.get("message") or "").splitlines()[0][:160] if child.get("message") else "",
                )
                break
        else:
            yield name, "passed", ""


def markdown(versions: dict[str, object], results: list[tuple[str, str, str]], locked: dict[str, str]) -> str:
    """Versions and outcome as a section of docs/compatibility.md.

    Args:
        versions: Those of the environment, None for what is not installed.
        results: Name, outcome and error of each test.
        locked: Outcome of the tests with the locked versions, by name; empty where they were not run.
    """
    counts = {kind: sum(result[1] == kind for result in results) for kind in ("passed", "failure", "error", "skipped")}
    lines = ["| package | version |", "|---|---|"]
    lines += [f"| {name} | {version or '-'} |" for name, version in versions.items()]
    counted = (f"{counts['failure'] + counts['error']} failed", f"{counts['skipped']} skipped")
    lines += ["", f"Of {len(results)} tests {counts['passed']} passed, {counted[0]}, {counted[1]}."]
    failed = [result for result in results if result[1] in ("failure", "error")]
    if failed:
        lines += ["", "| fails | with the locked versions | error |", "|---|---|---|"]
    for name, _, message in failed:
        text = message.replace("|", "\\|").replace("<", "&lt;")
        lines.append(f"| `{name}` | {locked.get(name, 'not run')} | {text} |")
    return "\n".join(lines)


def record(which: str, text: str) -> None:
    """Write a section of docs/compatibility.md anew."""
    begin, end = f"<!-- {which}: written by make test-{which} RECORD=1 -->", f"<!-- end of {which} -->"
    document = RECORD.read_text(encoding="utf-8")
    before, after = document.split(begin)[0], document.split(end)[1]
    RECORD.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", encoding="utf-8")


def main() -> int:
    """Make the environment, run the tests, show versions and results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("which", choices=["newest", "oldest"])
    parser.add_argument("--jobs", default="2", help="test processes")
    parser.add_argument("--record", action="store_true", help=f"write the outcome into {RECORD.relative_to(ROOT)}")
    options = parser.parse_args()
    began = time.monotonic()
    environment = make_newest() if options.which == "newest" else make_oldest()
    made = time.monotonic()
    report = ROOT / f".venv-{options.which}/results.xml"
    report.unlink(missing_ok=True)
    subprocess.run([str(environment.python), "-m", "langchain_quantllm.cli.demo_model"], cwd=ROOT, check=True)
    command = [str(environment.python), "-m", "pytest", "-m", "compat", "--numprocesses", options.jobs, "--quiet"]
    subprocess.run([*command, "--dist", "loadfile", "--junitxml", str(report)], cwd=ROOT, check=False)
    if not report.is_file():
        print(f"The {options.which} versions: pytest did not run to its end.")
        return 1
    versions, results = _read(environment.python, READ_VERSIONS), list(outcomes(report))
    locked = ROOT / ".venv/test-all.xml"
    known = {name: kind for name, kind, _ in outcomes(locked)} if locked.is_file() else {}
    text = markdown(versions, results, known)
    times = f"{made - began:.0f} s to install, {time.monotonic() - made:.0f} s to test"
    print(f"\nThe {options.which} versions ({times})\n\n{text}")
    if options.record:
        record(options.which, text)
    return 0 if results and all(kind in ("passed", "skipped") for _, kind, _ in results) else 1


if __name__ == "__main__":
    sys.exit(main())
